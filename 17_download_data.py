"""Fetch GSE240429 (human liver, Visium) or HER2ST (breast, ST) into a data root for script 19.

Question   none: this script only fetches
Reads      GSE240429: one TIFF a sample from GEO, tables from the public repository of BLEEP
           HER2ST: images, counts and spot files from the public repository almaan/her2st
Writes     <DATA_ROOT>/slides.csv (one row a slide), image/ (H&E), data/ (positions and counts)
Prints     how many files are to be fetched, and their size
           HER2ST: of each section its number of spots and genes, and its image
           then the next command
Command    python 17_download_data.py
Override   python 17_download_data.py --dataset HER2ST --source DIR
           (DIR is a local mirror with the same relative paths)

Disk space is checked before a download; an interrupted download goes on where it stopped; sizes
and, where the listing states them, hashes are checked. GEO's bulk tar of the series is reported to
truncate one TIFF, so files come by sample.
"""

from study import shell

if __name__ == "__main__":  # Check the command before the slow imports.
    shell.check_command(__file__)


import functools
import gzip
import hashlib
import http.client
import json
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pandas as pd
import scipy.sparse
from tqdm import tqdm

from slides import inputs
from slides.imaging import open_image
from study import files
from study.errors import InputError

# ---------------------------------------------------------------------------------------- constants
DATASET = "GSE240429"  # GSE240429 or HER2ST
DATA_ROOT = ""  # folder to write; empty = <DATASET>_data
SOURCE = ""  # empty = the public site; else a local mirror's folder or its address
SECTIONS = ("C2", "C3", "C4", "C5")  # of HER2ST; tissue_index is the place in this list, from 1
# --------------------------------------------------------------------------------------------------

GEO = "https://ftp.ncbi.nlm.nih.gov"
GITHUB = "https://api.github.com"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PUBLISHED = Path(__file__).parent / "GSE240429_data"  # manifest, gene lists and published numbers
SAMPLES = {  # tissue_index: GEO sample
    1: "GSM7697868",
    2: "GSM7697869",
    3: "GSM7697870",
    4: "GSM7697871",
}
HVG_UNION = Path("data/filtered_expression_matrices/hvg_union.npy")
UNPACKED_TIFF = 2_600_000_000  # bytes; about what a slide's TIFF takes where GEO holds it as .gz
HER2ST_UM_PER_PX = 0.69  # 290 px between spots 200 um apart
FEW_LOST = 0.05  # of the spots in one of HER2ST's two tables, not in the other; C2 to C5 have 0.02
ATTEMPTS = 5  # connections in a row that bring no byte before a download gives up
CHUNK = 1 << 20  # bytes that are read at once


# ------------------------------------------------------------------------------------------ network


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect only where the address itself would be allowed."""

    def redirect_request(self, request, *rest):
        new_url = rest[-1]
        check_address(new_url)
        return super().redirect_request(request, *rest)


OPENER = urllib.request.build_opener(SafeRedirects)


def check_address(url):
    """Raise InputError unless `url` is https, or plain http of a mirror on this very machine."""
    parts = urllib.parse.urlsplit(url)
    local = parts.scheme == "http" and parts.hostname in LOOPBACK
    if parts.scheme != "https" and not local:
        raise InputError(f"{url}: only https addresses are fetched")


def connect(url, **headers):
    """An open response. Raises InputError for an answer that trying again will not change."""
    check_address(url)
    request = urllib.request.Request(url, headers={"User-Agent": "EffB0-ST", **headers})
    try:
        return OPENER.open(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code in (416, 429) or error.code >= 500:
            raise
        raise InputError(f"{url}: the server says {error.code} {error.reason}") from None


@functools.cache  # GitHub answers few requests an hour
def read_listing(url):
    """Files of a remote folder, {name: {"url", "size", "sha"}}.

    Size and sha are None where the listing has none. Raises InputError for an answer that is no
    listing, and for names that would lead out of the data root.
    """
    try:
        with connect(url) as response:
            text = response.read().decode("utf-8", "replace")
        listed = parse_listing(text, url)
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{url}: cannot be read ({error}); try again later") from None
    listed = {name: entry for name, entry in listed.items() if name not in ("", ".", "..")}
    for name in listed:
        if Path(name).name != name:
            raise InputError(f"{url}: lists {name!r}, which is no plain file name")
    return listed


def parse_listing(text, url):
    """Entries of GitHub's contents API (JSON) or of a web server's index page (GEO: its links)."""
    listed = {}
    if text.lstrip().startswith("["):
        for entry in json.loads(text):
            if entry["type"] != "file":
                continue
            file = {"url": entry["download_url"], "size": entry["size"], "sha": entry["sha"]}
            if "media.githubusercontent" in file["url"]:  # Listed is what LFS's pointer has.
                file |= {"size": None, "sha": None}
            listed[entry["name"]] = file
        return listed
    for link in re.findall(r'href="([^"?#/]+)"', text):
        name = urllib.parse.unquote(link)
        address = urllib.parse.urljoin(url, urllib.parse.quote(name))
        listed[name] = {"url": address, "size": None, "sha": None}
    return listed


def remote_size(entry):
    """Size in bytes of a listed file; None where neither the listing nor the server tells."""
    if entry["size"] is None:
        entry["size"] = ask_size(entry["url"])
    return entry["size"]


def ask_size(url):
    """Size in bytes as the server states it when asked for the first byte; None if it does not."""
    try:
        with connect(url, Range="bytes=0-0") as response:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if not total and response.status == 200:  # this server does not serve ranges
                total = response.headers.get("Content-Length", "")
    except OSError as error:
        raise InputError(f"{url}: cannot be reached ({error}); try again later") from None
    return int(total) if total.isdigit() else None


def fetch(entry, path):
    """Download one listed file to `path`, going on from `<path>.part`; check its size and hash."""
    part = path.with_name(path.name + ".part")
    tag = path.with_name(path.name + ".part.tag")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = remote_size(entry)
    with tqdm(
        total=size, unit="B", unit_scale=True, desc=path.name, leave=False, disable=None
    ) as bar:
        download(entry["url"], part, tag, size, bar)
    tag.unlink(missing_ok=True)
    if entry["sha"] and git_hash(part) != entry["sha"]:
        part.unlink()
        raise InputError(
            f"{entry['url']}: the content does not have the listed hash {entry['sha']}; "
            "run the command again"
        )
    part.replace(path)
    print(f"  {path}  {path.stat().st_size:,} bytes")


def download(url, part, tag, size, bar):
    """Receive `url` into `part` until it has `size` bytes, or all that come where that is None.

    Connects anew after an error. Raises InputError after ATTEMPTS connections without progress,
    and where more than `size` bytes come.
    """
    failures = 0
    while not part.exists() or part.stat().st_size != size:
        before = size_of(part)
        try:
            receive(url, part, tag, before, bar)
        except (OSError, http.client.HTTPException) as error:
            failures = 0 if size_of(part) > before else failures + 1
            if failures == ATTEMPTS:
                raise InputError(
                    f"{url}: {error}; the same command goes on from {before:,} bytes"
                ) from None
            time.sleep(min(2**failures, 30) / 10)
            continue
        if size is None:
            return
        after = size_of(part)
        if after == size:
            return
        failures = 0 if before < after < size else failures + 1
        if after > size or failures == ATTEMPTS:
            part.unlink()
            raise InputError(
                f"{url}: {after:,} bytes instead of {size:,}; run the same command again"
            )


def size_of(path):
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def receive(url, part, tag, have, bar):
    """Append the bytes from `have` on to `part`.

    Starts afresh where the server's file is not the one that `tag` names, or ranges are not served.
    """
    known = tag.read_text() if have and tag.exists() else ""
    headers = {"Range": f"bytes={have}-", "If-Range": known} if known else {}
    with connect(url, **headers) as response:
        going_on = response.status == 206
        current = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        tag.write_text(current)
        bar.n = have if going_on else 0
        with open(part, "ab" if going_on else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def git_hash(path):
    """SHA-1 of a file as git stores it, which GitHub's listing states."""
    header = f"blob {path.stat().st_size}\0".encode()
    digest = hashlib.sha1(header, usedforsecurity=False)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def check_space(root, needed):
    """Raise InputError where the disk of `root` has less than the needed bytes free."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise InputError(
            f"{root}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: "
            "use --data-root elsewhere"
        )


def copy_whole(source, path):
    """Copy a file, whole or not at all."""
    with files.whole_file(path) as partial:
        shutil.copyfile(source, partial)
    print(f"  {path}  {path.stat().st_size:,} bytes")


# ---------------------------------------------------------------------------------------- GSE240429


def prepare_gse240429(root):
    """Images, tables and manifest of the four sections, from the public sites or a mirror."""
    slides = pd.read_csv(PUBLISHED / "slides.csv")
    if source_is_remote():
        fetch_missing(plan_images(slides) + plan_tables(slides), root)
    else:
        copy_gse240429(root, slides, Path(SOURCE))
    for image in slides["image"]:
        open_image(root / image)  # InputError where it is cut short.
    if root.resolve() != PUBLISHED.resolve():
        for name in ("slides.csv", "gene_sets.csv", "published_results.csv"):
            copy_whole(PUBLISHED / name, root / name)


def plan_images(slides):
    """[(listing entry, path in the data root)] of the slides' TIFFs, from GEO."""
    plan = []
    for slide in slides.itertuples():
        sample = SAMPLES[slide.tissue_index]
        url = f"{source_or(GEO)}/geo/samples/{sample[:-3]}nnn/{sample}/suppl/"
        listing = read_listing(url)
        name = find_tiff(listing, slide.name, url)
        packed = name.lower().endswith(".gz")
        plan.append((listing[name], Path(f"{slide.image}.gz" if packed else slide.image)))
    return plan


def find_tiff(listing, name, url):
    """The one file of a sample's listing that is its merged H&E TIFF, possibly gzipped."""
    pattern = re.compile(rf".*{name}.*\.tiff?(\.gz)?", re.IGNORECASE)
    found = [file for file in listing if pattern.fullmatch(file)]
    if len(found) != 1:
        listed = ", ".join(listing) or "empty listing"
        raise InputError(f"{url}: {len(found)} files look like the TIFF of {name}: {listed}")
    return found[0]


def plan_tables(slides):
    """[(listing entry, path in the data root)] of positions and counts, from BLEEP's repository."""
    base = f"{source_or(GITHUB)}/repos/bowang-lab/BLEEP/contents/GSE240429_data"
    plan = [find_file(base, Path(positions)) for positions in slides["positions"]]
    for folder in slides["matrix"]:
        listing = read_listing(f"{base}/{folder}")
        plan += [(entry, Path(folder, name)) for name, entry in listing.items()]
    plan.append(find_file(base, HVG_UNION))
    return plan


def find_file(base, path):
    """(listing entry, path) of a file below the address `base`."""
    url = f"{base}/{path.parent.as_posix()}"
    listing = read_listing(url)
    if path.name not in listing:
        raise InputError(f"{url}: holds no {path.name}")
    return listing[path.name], path


def is_packed(path):
    """Whether a file of the plan is a TIFF that is to be unpacked."""
    return path.name.endswith(".tiff.gz")


def fetch_missing(plan, root, converted=0):
    """Fetch the files [(listing entry, path in `root`)] that are missing; one that is there with
    the listed size, or any size where none is listed, is left alone. InputError without disk for
    them and for what they are `converted` into, in bytes.
    """
    missing = [(entry, root / path) for entry, path in plan if not is_done(entry, root / path)]
    needed = sum(bytes_needed(entry, path) for entry, path in missing)
    check_space(root, needed + converted)
    print(f"{len(missing)} files to fetch, {needed / 1e9:.1f} GB")
    for entry, path in missing:
        if not path.exists() or path.stat().st_size != remote_size(entry):
            fetch(entry, path)
        if is_packed(path):
            unpack_download(path)


def is_done(entry, path):
    """Whether a file of the plan is there already, unpacked if it comes packed."""
    if is_packed(path):
        return path.with_suffix("").exists()
    return path.exists() and remote_size(entry) in (None, path.stat().st_size)


def bytes_needed(entry, path):
    """Bytes of disk that a file of the plan will take beyond what is there of it."""
    part = path.with_name(path.name + ".part")
    unpacked = UNPACKED_TIFF if is_packed(path) else 0
    return (remote_size(entry) or 0) + unpacked - size_of(part)


def unpack_download(path):
    """Unpack x.tiff.gz to x.tiff, whole or not at all, and drop the packed file."""
    try:
        with (
            gzip.open(path) as packed,
            files.whole_file(path.with_suffix("")) as partial,
            open(partial, "wb") as file,
        ):
            shutil.copyfileobj(packed, file, CHUNK)
    except inputs.DAMAGED_GZIP as error:
        path.unlink()
        raise InputError(f"{path}: {error}; it was removed: run the same command again") from None
    path.unlink()


def copy_gse240429(root, slides, source):
    """Copy the sections' files from a local folder in the published layout."""
    names = *slides["image"], *slides["positions"], *slides["matrix"], HVG_UNION
    paths = []
    for path in (source / name for name in names):
        if not path.exists():
            raise InputError(
                f"{path} does not exist: --source needs GSE240429 in the published layout"
            )
        inside = [path] if path.is_file() else path.iterdir()
        paths += [file for file in inside if file.is_file()]
    check_space(root, sum(file.stat().st_size for file in paths))
    for file in paths:
        copy_whole(file, root / file.relative_to(source))


# ------------------------------------------------------------------------------------------- HER2ST


def prepare_her2st(root):
    """Images, tables and manifest of SECTIONS, from the public repository or a mirror."""
    if not SECTIONS or len(set(SECTIONS)) < len(SECTIONS):
        raise InputError(
            f"--sections {','.join(SECTIONS)}: expected different sections, one at least"
        )
    source = download_her2st(root) if source_is_remote() else Path(SOURCE)
    slides = []
    for number, section in enumerate(SECTIONS, 1):
        slide = {"tissue_index": number, "name": section, "donor": section[0]}
        slide["um_per_px"] = HER2ST_UM_PER_PX
        slides.append(slide | convert_section(root, section, source))
    files.save_csv(root / "slides.csv", pd.DataFrame(slides))


def download_her2st(root):
    """Fetch the sections' files into <root>/download, under their public paths; that folder."""
    base = f"{source_or(GITHUB)}/repos/almaan/her2st/contents/data"
    plan = []
    for section in SECTIONS:
        plan += find_section(base, "ST-cnts", rf"{section}\.tsv(\.gz)?", section)[:1]
        plan += find_section(base, "ST-spotfiles", rf"{section}_selection\.tsv", section)
        plan += find_section(base, f"ST-imgs/{section[0]}/{section}", r".*", section)
    # What is fetched is converted into files of the same size.
    converted = sum(remote_size(entry) or 0 for entry, _ in plan)
    fetch_missing(plan, root / "download", converted)
    return root / "download"


def find_section(base, folder, pattern, section):
    """[(listing entry, path below the folder of downloads)] of a section's files in a folder."""
    listing = read_listing(f"{base}/{folder}")
    names = [name for name in listing if re.fullmatch(pattern, name)]
    if not names:
        raise InputError(
            f"{base}/{folder}: no file of section {section}; HER2ST's sections are A1 to H3"
        )
    return [(listing[name], Path("data", folder, name)) for name in names]


def convert_section(root, section, source):
    """Copy a section's image, and write its tables as Space Ranger does.

    Returns the columns image, positions and matrix of its row of slides.csv.
    """
    image = one_file(source / "data" / "ST-imgs" / section[0] / section, "[!.]*.jpg")
    counts, spots = read_section(source, section)
    selected = spots.index[spots["selected"] == 1]
    both = counts.index.intersection(selected)
    if both.empty:
        raise InputError(
            f"section {section}: no spot has both counts and a position: fetch it again"
        )
    lost = {
        "position": counts.index.difference(spots.index),
        "counts": selected.difference(counts.index),
    }
    for what, names in lost.items():
        if len(names) > FEW_LOST * len(both):  # A table may break off at the end of a line.
            inputs.warn(
                f"section {section}: {len(names)} spots have no {what}, as {names[0]}: fetch its "
                "tables again, unless that is so in the source"
            )
    print(
        f"  {section}: {len(both)} spots with counts and a position "
        f"(of {len(counts)} and {len(spots)}), {counts.shape[1]:,} genes"
    )
    slide = {
        "image": f"image/{section}{image.suffix}",
        "positions": f"data/positions/{section}.csv",
        "matrix": f"data/matrices/{section}",
    }
    copy_whole(image, root / slide["image"])
    with files.whole_file(root / slide["positions"]) as path:
        spots.reset_index().to_csv(path, header=False, index=False)
    genes = pd.DataFrame({"id": counts.columns, "name": counts.columns})
    table = scipy.sparse.csc_matrix(counts.loc[both].to_numpy())
    inputs.write_10x_folder(root / slide["matrix"], table, both, genes)
    return slide


def read_section(source, section):
    """(counts, spots) of a section, both indexed by spots named as 18x9.

    Counts have a column a gene. The columns of spots are, in the order of Space Ranger's positions:
    selected, y, x, pixel_y, pixel_x, all whole numbers.
    """
    counts_path = one_file(source / "data" / "ST-cnts", f"{section}.tsv*")
    genes, counts = inputs.read_dense_table(counts_path)
    counts.columns = genes
    inputs.check_unique(counts.index, "spot", counts_path)
    if counts.mod(1).ne(0).any(axis=None):
        raise InputError(
            f"{counts_path}: a count is missing or a fraction, as where the file breaks off: fetch "
            "it again"
        )
    spots_path = one_file(source / "data" / "ST-spotfiles", f"{section}_selection.tsv")
    try:
        spots = pd.read_csv(spots_path, sep="\t").astype({"x": int, "y": int})
        spots.index = spots["x"].astype(str) + "x" + spots["y"].astype(str)
        spots = spots[["selected", "y", "x", "pixel_y", "pixel_x"]].round().astype(int)
    except (ValueError, KeyError) as error:
        raise InputError(f"{spots_path}: no table of HER2ST ({error}); fetch it again") from None
    inputs.check_unique(spots.index, "spot", spots_path)
    return counts.astype(int), spots


def one_file(folder, pattern):
    """The only file of `folder` that matches; InputError otherwise."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{folder}: expected one file {pattern}, and there are: {names}")
    return found[0]


# ------------------------------------------------------------------------------------------- script


def source_is_remote():
    """Whether SOURCE is an address; the empty one stands for the public sites."""
    return SOURCE == "" or "://" in SOURCE


def source_or(public_site):
    """The address to fetch from: SOURCE, or the public site where it is empty."""
    return SOURCE.rstrip("/") or public_site


def main():
    root = Path(DATA_ROOT or f"{DATASET}_data")
    if not source_is_remote() and not Path(SOURCE).is_dir():
        raise InputError(f"--source {SOURCE}: no such folder")
    files.hold_folder(root)
    if DATASET == "GSE240429":
        prepare_gse240429(root)
    else:
        prepare_her2st(root)
    print(f"next: python 19_make_patches_and_csv.py --data-root {root}")


if __name__ == "__main__":
    shell.run_script(globals())
