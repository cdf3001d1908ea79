"""Script 17 against a server on loopback that does listings, ranges, a cut connection, a short file and a 404."""

import gzip
import hashlib
import http.server
import io
import json
import threading
import urllib.parse

import numpy as np
import pandas as pd
import pytest
import tifffile
from conftest import REPOSITORY, SHARED, expect_refusal, load_script, refused, run_script
from PIL import Image

from slides.manifest import read_manifest
from slides.positions import read_positions
from slides.spots import read_spots
from study.errors import InputError

SAMPLES = {"GSM7697868": "A1", "GSM7697869": "B1", "GSM7697870": "C1", "GSM7697871": "D1"}


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves `files` {path: bytes} as GEO (index pages) and GitHub's contents API do; misbehaves as `faults` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, path = self.server, urllib.parse.unquote(self.path)
        server.seen.append((path, self.headers.get("Range")))
        if path.endswith("/suppl/"):
            names = [name[len(path) :] for name in server.files if name.startswith(path)]
            lines = "".join(f'<a href="{n}">{n}</a>  1.8G\n' for n in names)
            page = '<pre><a href="/geo/">Parent Directory</a>' + lines
            return self.answer(page.encode()) if names else self.answer(b"none", 404)
        if "/contents/" in path and path not in server.files:
            inside = {n: v for n, v in server.files.items() if n.rpartition("/")[0] == path}
            if not inside:
                return self.answer(b"", 404)
            return self.answer(json.dumps([self.entry(*item) for item in inside.items()]).encode())
        if path not in server.files:
            return self.answer(b"gone", 404)
        return self.send_file(path)

    def entry(self, path, content):
        sha = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        url = f"http://127.0.0.1:{self.server.server_port}{urllib.parse.quote(path)}"
        wrong = self.server.faults.get(path) == "wrong hash"
        entry = {"name": path.rpartition("/")[2], "type": "file", "size": len(content)}
        return entry | {"sha": "0" * 40 if wrong else sha, "download_url": url}

    def send_file(self, path):
        content, fault, start = self.server.files[path], self.server.faults.get(path), 0
        probe = self.headers.get("Range") == "bytes=0-0"
        if (wanted := self.headers.get("Range")) and fault != "no ranges":
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            if not probe and self.headers.get("If-Range") != '"tag"':
                start, wanted = 0, None
        else:
            wanted = None
        stop = 1 if probe and wanted else len(content)
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", '"tag"')
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if fault in ("cut", "no ranges") and not probe and path not in self.server.cut:
            self.server.cut.add(path)
            stop = start + (stop - start) // 2
            self.close_connection = True
        if fault == "always short" and not probe:
            stop = start
            self.close_connection = True
        self.wfile.write(content[start:stop])

    def answer(self, body, code=200):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *ignored):
        pass


@pytest.fixture
def mirror():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.files, server.faults, server.seen, server.cut = {}, {}, [], set()
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()
        thread.join()


def tiff_bytes(seed):
    file, pixels = io.BytesIO(), np.random.default_rng(seed).integers(0, 256, (90, 80, 3), np.uint8)
    tifffile.imwrite(file, pixels, photometric="rgb")
    return file.getvalue()


@pytest.fixture
def liver(mirror):
    """GSE240429 on the mirror; two samples gzipped, as GEO may hold them."""
    images = {}
    for i, (sample, name) in enumerate(SAMPLES.items(), 1):
        images[name] = tiff_bytes(i)
        path = f"/geo/samples/GSM7697nnn/{sample}/suppl/{sample}_GEX_C73_{name}_Merged.tiff"
        packed = {f"{path}.gz": gzip.compress(images[name])}
        mirror.files |= packed if i % 2 else {path: images[name]}
        mirror.files[f"/geo/samples/GSM7697nnn/{sample}/suppl/{sample}_barcodes.tsv.gz"] = b"other"
        base = "/repos/bowang-lab/BLEEP/contents/GSE240429_data/data"
        positions = f"{base}/tissue_pos_matrices/tissue_positions_list_{i}.csv"
        mirror.files[positions] = b"A-1,1,0,0,40,40\n"
        base += "/filtered_expression_matrices"
        for part in ("barcodes.tsv", "features.tsv", "matrix.mtx"):
            mirror.files[f"{base}/{i}/{part}"] = f"{part} {i}\n".encode() * 50
        mirror.files[f"{base}/hvg_union.npy"] = b"array"
        mirror.files[f"{base}/notes.txt"] = b"not asked for"
    return images


def download(mirror, root):
    return run_script("17", "--source", mirror.url, "--data-root", root)


def test_liver_arrives_whole_and_in_the_published_layout(mirror, liver, tmp_path, capsys):
    assert download(mirror, tmp_path) == 0
    for name, content in liver.items():
        assert (tmp_path / "image" / f"GEX_C73_{name}_Merged.tiff").read_bytes() == content
    slides = pd.read_csv(tmp_path / "slides.csv")
    for column in ("image", "positions", "matrix"):
        assert all((tmp_path / value).exists() for value in slides[column])
    matrix = tmp_path / "data/filtered_expression_matrices/3/matrix.mtx"
    assert matrix.read_bytes() == b"matrix.mtx 3\n" * 50
    left = {p.suffix for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    assert left == {".tiff", ".csv", ".tsv", ".mtx", ".npy"}
    assert "19_make_patches_and_csv.py --data-root" in capsys.readouterr().out


ENTRY = {"type": "file", "download_url": "https://example.org/x", "size": 4, "sha": None}


@pytest.mark.parametrize("content", [
    json.dumps([ENTRY | {"name": "../../evil.jpg"}]),
    json.dumps([ENTRY | {"name": "/etc/evil.jpg"}]),
    json.dumps([ENTRY]),
    json.dumps(["evil"]),
    '<a href="..%2F..%2Fevil.jpg">x</a>',
])  # fmt: skip
def test_a_listing_cannot_name_files_elsewhere(mirror, content):
    mirror.files["/listing"] = content.encode()
    with pytest.raises(InputError, match=r"no plain file name|cannot be read"):
        load_script("17").read_listing(f"{mirror.url}/listing")


def test_folders_in_those_of_a_mirror_are_left_there(tmp_path):
    """As the .ipynb_checkpoints of a notebook."""
    script, slides = load_script("17"), pd.read_csv(REPOSITORY / "GSE240429_data" / "slides.csv")
    for name in (*slides["image"], *slides["positions"], script.HVG_UNION):
        write_files(tmp_path / "mirror", {name: b"1"})
    for folder in slides["matrix"]:
        files = {f"{folder}/.ipynb_checkpoints/x": b"", f"{folder}/y": b"2"}
        write_files(tmp_path / "mirror", files)
    script.copy_gse240429(tmp_path / "root", slides, tmp_path / "mirror")
    assert (tmp_path / "root" / slides["matrix"][0] / "y").read_bytes() == b"2"


def test_a_second_run_fetches_nothing(mirror, liver, tmp_path, capsys):
    assert download(mirror, tmp_path) == 0
    mirror.seen.clear()
    assert download(mirror, tmp_path) == 0
    assert "0 files to fetch" in capsys.readouterr().out
    assert not [seen for seen in mirror.seen if seen[0].endswith((".gz", ".mtx"))]


@pytest.mark.parametrize("fault", ["cut", "no ranges"])
def test_a_cut_connection_is_taken_up_again(mirror, liver, tmp_path, fault):
    paths = [path for path in mirror.files if "Merged" in path]
    mirror.faults = dict.fromkeys(paths, fault)
    assert download(mirror, tmp_path) == 0
    assert mirror.cut == set(paths)
    for name, content in liver.items():
        assert (tmp_path / "image" / f"GEX_C73_{name}_Merged.tiff").read_bytes() == content
    asked = [wanted for path, wanted in mirror.seen if path in paths]
    resumed = [wanted for wanted in asked if wanted not in (None, "bytes=0-0")]
    assert len(resumed) == 4 and "bytes=0-" not in resumed


@pytest.mark.parametrize("tag", ['"tag"', '"another tag"'])
def test_an_interrupted_download_goes_on_unless_the_file_has_changed(mirror, liver, tmp_path, tag):
    path = next(path for path in mirror.files if path.endswith("B1_Merged.tiff"))
    part = tmp_path / "image" / "GEX_C73_B1_Merged.tiff.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.files[path][:7000] if tag == '"tag"' else b"old" * 1000)
    part.with_name(part.name + ".tag").write_text(tag)
    have = part.stat().st_size
    assert download(mirror, tmp_path) == 0
    assert (path, f"bytes={have}-") in mirror.seen
    assert (tmp_path / "image" / "GEX_C73_B1_Merged.tiff").read_bytes() == liver["B1"]


def refuse(mirror, root, *words):
    expect_refusal(words, "17", "--source", mirror.url, "--data-root", root)


def test_a_short_file_is_told(mirror, liver, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    path = next(path for path in mirror.files if path.endswith("D1_Merged.tiff"))
    mirror.faults[path] = "always short"
    refuse(mirror, tmp_path, "D1_Merged.tiff")
    assert not (tmp_path / "image" / "GEX_C73_D1_Merged.tiff").exists()


def test_a_tiff_that_was_truncated_at_the_source_is_told(mirror, liver, tmp_path):
    path = next(path for path in mirror.files if path.endswith("D1_Merged.tiff"))
    mirror.files[path] = mirror.files[path][:-5000]
    refuse(mirror, tmp_path, "D1_Merged.tiff", "truncated")


@pytest.mark.parametrize("damage", ["cut", "corrupt"])
def test_a_broken_gzip_is_removed_and_told(mirror, liver, tmp_path, damage):
    path = next(path for path in mirror.files if path.endswith("A1_Merged.tiff.gz"))
    content = mirror.files[path]
    corrupt = content[:500] + b"\xff" * 3000 + content[3500:]
    mirror.files[path] = content[:-3000] if damage == "cut" else corrupt
    refuse(mirror, tmp_path, "A1_Merged.tiff.gz", "again")
    assert not list(tmp_path.glob("image/*A1*"))


@pytest.mark.parametrize(
    "gone", ["suppl", "Merged", "matrix.mtx", "tissue_positions_list_2", "hvg_union"]
)
def test_what_is_not_there_is_named(mirror, liver, tmp_path, gone):
    gone_path = next(path for path in mirror.files if gone in path)
    if gone == "suppl":
        mirror.files = {p: c for p, c in mirror.files.items() if "GSM7697870" not in p}
        words = ["404", "GSM7697870"]
    elif gone == "matrix.mtx":
        mirror.files = {p: c for p, c in mirror.files.items() if "/2/" not in p}
        words = ["404", "filtered_expression_matrices/2"]
    else:
        del mirror.files[gone_path]
        words = [{"Merged": "C73_A1"}.get(gone, gone)]
    refuse(mirror, tmp_path, *words)
    assert not (tmp_path / "slides.csv").exists()


def test_a_wrong_hash_is_told_and_nothing_kept(mirror, liver, tmp_path):
    path = next(path for path in mirror.files if path.endswith("/1/matrix.mtx"))
    mirror.faults[path] = "wrong hash"
    refuse(mirror, tmp_path, "hash")
    assert not list(tmp_path.glob("data/filtered_expression_matrices/1/matrix*"))


def test_disk_space_is_checked_before_the_first_byte(mirror, liver, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refuse(mirror, tmp_path, "GB are needed", "--data-root")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".lock"]


@pytest.mark.parametrize("url", ["http://example.org/x", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_only_https_is_fetched(url):
    with refused("https"):
        load_script("17").connect(url)


# ----------------------------------------------------------------------------------------------- HER2ST


def her2st_files():
    counts = "\tG1\tG2\tG3\n"
    for x, y in ((1, 3), (1, 4), (2, 3), (2, 4)):
        counts += f"{x}x{y}\t{x}\t{y}\t{x + y}\n"
    spots = "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n"
    for x, y in ((2, 4), (1, 3), (1, 4), (7, 7)):
        spots += f"{x}\t{y}\t{x}\t{y}\t{100 * x}.4\t{50 * y}.6\t1\n"
    spots += "2\t3\t2\t3\t200\t150\t0\n"
    image = io.BytesIO()
    Image.new("RGB", (400, 300), (200, 120, 160)).save(image, "JPEG")
    return {
        "data/ST-cnts/C2.tsv.gz": gzip.compress(counts.encode()),
        "data/ST-spotfiles/C2_selection.tsv": spots.encode(),
        "data/ST-imgs/C/C2/5714_HE_BT_C2.jpg": image.getvalue(),
    }


@pytest.mark.parametrize("where", ["server", "folder"])
def test_her2st_from_server_and_folder(mirror, tmp_path, where):
    files = her2st_files()
    if where == "server":
        mirror.files = {f"/repos/almaan/her2st/contents/{path}": files[path] for path in files}
        source = mirror.url
    else:
        source = tmp_path / "mirror"
        write_files(source, files)
    root = tmp_path / "HER2ST_data"
    assert run_script("17", dataset="HER2ST", source=source, sections="C2", data_root=root) == 0
    (slide,) = read_manifest(root)
    assert (slide.tissue_index, slide.name, slide.donor, slide.um_per_px) == (1, "C2", "C", 0.69)
    table = read_spots(slide, read_positions(slide.positions))
    places = table.obs[["array_row", "array_col", "pxl_row", "pxl_col"]]
    # Those that have both counts and a selected position.
    assert table.obs["barcode"].tolist() == ["1x3", "1x4", "2x4"]
    assert places.values.tolist() == [[3, 1, 151, 100], [4, 1, 201, 100], [4, 2, 201, 200]]
    assert table.X.toarray().tolist() == [[1, 3, 4], [1, 4, 5], [2, 4, 6]]


def write_files(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


@pytest.mark.parametrize("table, change, code, words", [
    ("cnts", lambda text: text[:-4], 2, ["C2.tsv", "a count is missing"]),
    ("cnts", lambda text: text.replace(b"\t3\t", b"\tx\t", 1), 2, ["C2.tsv", "not a table of counts", "'x'"]),
    ("cnts", lambda text: text.replace(b"\t3\t", b"\t.5\t", 1), 2, ["C2.tsv", "a fraction"]),
    ("cnts", lambda text: text + text.splitlines(True)[-1], 2, ["C2.tsv", "spot 2x4 stands there twice"]),
    ("cnts", lambda text: b"version https://git-lfs.github.com/spec/v1\nsize 9\n", 2, ["C2.tsv", "Git LFS"]),
    ("cnts", lambda text: text.replace(b"x", b"x9"), 2, ["section C2", "no spot has both"]),
    ("cnts", lambda text: b"".join(text.splitlines(True)[:-1]), 0, ["section C2: 2 spots have no counts, as 2x4"]),
    ("spotfiles", lambda text: b"".join(text.splitlines(True)[:-1]), 0, ["section C2: 1 spots have no position, as 2x3"]),
    ("spotfiles", lambda text: text + text.splitlines(True)[-1], 2, ["selection.tsv", "spot 2x3 stands"]),
])  # fmt: skip
def test_damaged_tables_of_her2st_are_told(tmp_path, capsys, table, change, code, words):
    files = her2st_files()
    files["data/ST-cnts/C2.tsv"] = gzip.decompress(files.pop("data/ST-cnts/C2.tsv.gz"))
    (path,) = (path for path in files if table in path)
    write_files(tmp_path, files | {path: change(files[path]), "data/ST-imgs/C/C2/._C2.jpg": b""})
    options = {"source": tmp_path, "sections": "C2", "data_root": tmp_path / "HER2ST_data"}
    assert run_script("17", dataset="HER2ST", **options) == code
    told = "".join(capsys.readouterr())
    assert all(word in told for word in words), told


@pytest.mark.parametrize("arguments, word", [
    (["--sections", "Z9"], "Z9"),
    (["--sections", "C2,C2"], "different"),
    (["--sections", ""], "--sections"),
    (["--source", "nowhere"], "nowhere"),
])  # fmt: skip
def test_her2st_refusals(tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    expect_refusal([word], "17", "--dataset", "HER2ST", "--source", "empty", *arguments)


@pytest.mark.data
@pytest.mark.skipif(not (SHARED / "her2st").is_dir(), reason="shared/her2st is not there")
def test_real_her2st_section(tmp_path):
    root = tmp_path / "HER2ST_data"
    source = SHARED / "her2st"
    assert run_script("17", dataset="HER2ST", source=source, sections="C5", data_root=root) == 0
    assert run_script("19", "--data-root", root, "--target", "lognorm") == 0
    rows = pd.read_csv(root / "dataset" / "dataset.csv", usecols=range(7))
    assert len(rows) == 181
    patches = np.load(root / "dataset" / "patches.npy", mmap_mode="r")
    tissue = patches[:, 62:162, 62:162].mean((1, 2))  # the spot's own disc, 145 px wide
    assert (tissue[:, 1] < 225).mean() > 0.95, "spots lie on tissue, which is less green than glass"
