// The gene viewer of a report: reads the JSON beside it, draws the chosen gene or set on the H&E.
// viewer.py says what the JSON holds.
"use strict";
for (const root of document.querySelectorAll(".viewer")) {
  const data = JSON.parse(root.querySelector("script").textContent);
  const [choice] = root.getElementsByTagName("select");
  const [told] = root.getElementsByTagName("output");
  const [panels] = root.getElementsByClassName("panels");
  const MISSING = 255; // the code of a value that is not there
  const WIDTH = 640; // px of a map

  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
  const part = text => Array.from(new Uint16Array(bytes(text).buffer), value => value / 65535);
  const x = part(data.x), y = part(data.y);
  const colours = bytes(data.colours);
  const height = Math.round(WIDTH * data.ratio);
  const number = value => Number.isNaN(value) ? "-" : Number(value.toPrecision(3)).toString();
  let shown = []; // the maps of the chosen entry, with their codes

  function value_of(map, spot) {
    const code = map.bytes[spot];
    return code === MISSING ? NaN : map.low + (code / (MISSING - 1)) * (map.high - map.low);
  }

  function colour_of(code) {
    const place = Math.round((code / (MISSING - 1)) * 255) * 3;
    return `rgb(${colours[place]},${colours[place + 1]},${colours[place + 2]})`;
  }

  function draw_tissue(context, pale) {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, WIDTH, height);
    if (!data.image) return;
    context.globalAlpha = pale ? 0.6 : 1;
    context.drawImage(tissue, 0, 0, WIDTH, height);
    context.globalAlpha = 1;
    if (!pale) return;
    context.globalCompositeOperation = "saturation"; // All colour of a map is the spots'.
    context.fillStyle = "#888";
    context.fillRect(0, 0, WIDTH, height);
    context.globalCompositeOperation = "source-over";
  }

  function draw_spots(context, map) {
    map.bytes.forEach((code, spot) => {
      if (code === MISSING) return;
      context.fillStyle = colour_of(code);
      context.beginPath();
      context.arc(x[spot] * WIDTH, y[spot] * height, data.radius * WIDTH, 0, 2 * Math.PI);
      context.fill();
    });
  }

  function add_panel(title, caption) {
    const figure = panels.appendChild(document.createElement("figure"));
    const canvas = figure.appendChild(document.createElement("canvas"));
    canvas.width = WIDTH;
    canvas.height = height;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${title}, ${caption}`);
    const text = figure.appendChild(document.createElement("figcaption"));
    text.textContent = caption ? `${title}: ${caption}` : title;
    return [figure, canvas.getContext("2d")];
  }

  function add_bar(figure, map) {
    const bar = figure.appendChild(document.createElement("p"));
    bar.append(number(map.low));
    const canvas = bar.appendChild(document.createElement("canvas"));
    canvas.width = MISSING;
    canvas.height = 1;
    const context = canvas.getContext("2d");
    for (let code = 0; code < MISSING; code++) {
      context.fillStyle = colour_of(code);
      context.fillRect(code, 0, 1, 1);
    }
    bar.append(number(map.high));
  }

  function draw() {
    const entry = data.entries[choice.value] ?? { maps: [] };
    shown = [...entry.maps, ...data.shared].map(map => ({ ...map, bytes: bytes(map.codes) }));
    panels.replaceChildren();
    told.textContent = "";
    if (data.image) draw_tissue(add_panel("H&E", "")[1], false);
    for (const map of shown) {
      const [figure, context] = add_panel(map.kind, map.caption);
      draw_tissue(context, true);
      draw_spots(context, map);
      add_bar(figure, map);
    }
  }

  function tell_spot(event) {
    const box = event.target.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width;
    const down = (event.clientY - box.top) / box.height;
    let nearest = -1, least = (2 * data.radius) ** 2;
    for (let spot = 0; spot < x.length; spot++) {
      const distance = (x[spot] - across) ** 2 + ((y[spot] - down) * data.ratio) ** 2;
      if (distance < least) [nearest, least] = [spot, distance];
    }
    const values = shown.map(map => `${map.kind} ${number(value_of(map, nearest))}`);
    told.textContent = nearest < 0 ? "" : values.join(", ");
  }

  const tissue = new Image();
  choice.addEventListener("change", draw);
  panels.addEventListener("pointermove", event => {
    if (event.target.matches("figure > canvas")) tell_spot(event);
  });
  tissue.addEventListener("load", draw);
  if (data.image) tissue.src = data.image;
  else draw();
}
