"""Fetch GSE240429 (human liver, Visium) or HER2ST (breast, ST) into a data root that script 19 reads.

Question   none: this script only fetches
Reads      GSE240429: one TIFF a sample from GEO, matrices and positions from the public repository of BLEEP
           HER2ST: images, counts and spot files from the public repository almaan/her2st
Writes     <DATA_ROOT>/slides.csv, image/, data/ in the layout of README.md, "The data"
Prints     every file with its size, and the next command
Command    python 17_download_data.py
Override   python 17_download_data.py --dataset HER2ST --source DIR     (a local mirror with the same relative paths)

Disk space is checked first; an interrupted download goes on where it stopped; sizes and, where the listing states
them, hashes are checked. GEO's bulk tar of the series is reported to truncate one TIFF, so files come by sample.
"""

import gzip
import hashlib
import http.client
import json
import re
import shutil
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path

import pandas as pd
import scipy.io
import scipy.sparse
import tifffile
from tqdm import tqdm

import common
import runner
from common import InputError

# ---------------------------------------------------------------------------------------------- constants
DATASET = "GSE240429"  # GSE240429 or HER2ST
DATA_ROOT = ""  # folder to write; empty = <DATASET>_data
SOURCE = ""  # empty = the public site; else a local mirror's folder or its address
SECTIONS = ("C2", "C3", "C4", "C5")  # of HER2ST; tissue_index is the place in this list, from 1
# --------------------------------------------------------------------------------------------------------

GEO = "https://ftp.ncbi.nlm.nih.gov"
GITHUB = "https://api.github.com"
SAMPLES = {1: "GSM7697868", 2: "GSM7697869", 3: "GSM7697870", 4: "GSM7697871"}  # tissue_index: GEO sample
UNPACKED_TIFF = 2_600_000_000  # bytes; about what one slide's TIFF takes where GEO holds it as .gz
ATTEMPTS = 5  # connections in a row that bring no byte before a download gives up
HER2ST_UM_PER_PX = 0.69  # 290 px between spots 200 um apart
CHUNK = 1 << 20
DAMAGED_TIFF = (tifffile.TiffFileError, ValueError, TypeError, LookupError, ZeroDivisionError, struct.error, OSError)


# ---------------------------------------------------------------------------------------------- network


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follow a redirect only where the address itself would be allowed."""

    def redirect_request(self, request, *rest):
        check_address(rest[-1])
        return super().redirect_request(request, *rest)


OPENER = urllib.request.build_opener(SafeRedirects)


def check_address(url):
    """https only; plain http is for a mirror on this very machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1")):
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


def read_listing(url):
    """Files of a remote folder, {name: {"url", "size", "sha"}}; size and sha are None where the listing has none.

    Understands GitHub's contents API (JSON) and a web server's index page (GEO: the links in it).
    """
    try:
        with connect(url) as response:
            text = response.read().decode("utf-8", "replace")
        if text.lstrip().startswith("["):
            files = {entry["name"]: describe_entry(entry) for entry in json.loads(text) if entry["type"] == "file"}
        else:
            names = map(urllib.parse.unquote, re.findall(r'href="([^"?#/]+)"', text))
            files = {
                n: {"url": urllib.parse.urljoin(url, urllib.parse.quote(n)), "size": None, "sha": None} for n in names
            }
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{url}: cannot be read ({error}); try again later") from None
    for name in files:  # they become files of the data root
        if Path(name).name != name and name != ".":
            raise InputError(f"{url}: lists {name!r}, which is no plain file name")
    return {name: entry for name, entry in files.items() if name not in ("", ".", "..")}


def describe_entry(entry):
    """Of an entry of GitHub's listing; of a file in Git LFS, which is served from elsewhere, they are its pointer's."""
    stored = "media.githubusercontent" not in entry["download_url"]
    size, sha = (entry["size"], entry["sha"]) if stored else (None, None)
    return {"url": entry["download_url"], "size": size, "sha": sha}


def remote_size(entry):
    """Size in bytes of a listed file, from the listing or the server; None where neither tells."""
    if entry["size"] is None:
        try:
            with connect(entry["url"], Range="bytes=0-0") as response:
                total = response.headers.get("Content-Range", "").rpartition("/")[2]
                total = total or (response.headers.get("Content-Length") if response.status == 200 else None)
                entry["size"] = int(total) if total and total.isdigit() else None
        except OSError as error:
            raise InputError(f"{entry['url']}: cannot be reached ({error}); try again later") from None
    return entry["size"]


def fetch(entry, path):
    """Download one listed file to `path`, going on from `<path>.part`, then check its size and hash."""
    part, mark = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.tag")
    path.parent.mkdir(parents=True, exist_ok=True)
    size = remote_size(entry)
    failures = 0
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, leave=False, disable=None) as bar:
        while not part.exists() or part.stat().st_size != size:
            have = part.stat().st_size if part.exists() else 0
            try:
                receive(entry["url"], part, mark, have, bar)
                if size is None:
                    break
            except (OSError, http.client.HTTPException) as error:
                failures = 0 if part.exists() and part.stat().st_size > have else failures + 1
                if failures == ATTEMPTS:
                    raise InputError(f"{entry['url']}: {error}; the same command goes on from {have:,} bytes") from None
                time.sleep(min(2**failures, 30) / 10)
                continue
            got = part.stat().st_size
            if got != size:
                failures = 0 if got > have and got < size else failures + 1
                if got > size or failures == ATTEMPTS:
                    part.unlink()
                    raise InputError(f"{entry['url']}: {got:,} bytes instead of {size:,}; run the same command again")
    mark.unlink(missing_ok=True)
    if entry["sha"] and git_hash(part) != entry["sha"]:
        part.unlink()
        raise InputError(
            f"{entry['url']}: the content does not have the listed hash {entry['sha']}; run the command again"
        )
    part.replace(path)
    print(f"  {path}  {path.stat().st_size:,} bytes")


def receive(url, part, mark, have, bar):
    """Append the bytes from `have` on to `part`; start afresh where the file changed or ranges are not served."""
    tag = mark.read_text() if have and mark.exists() else ""
    headers = {"Range": f"bytes={have}-", "If-Range": tag} if tag else {}
    with connect(url, **headers) as response:
        going_on = response.status == 206
        mark.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        bar.n = have if going_on else 0
        with open(part, "ab" if going_on else "wb") as file:
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def git_hash(path):
    """SHA-1 of a file as git stores it, which GitHub's listing states."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_space(root, needed):
    """Raise InputError where the disk of `root` has less than the needed bytes free."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free < needed:
        raise InputError(
            f"{root}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: use --data-root elsewhere"
        )


# ---------------------------------------------------------------------------------------------- GSE240429


def find_tiff(listing, name, where):
    """The one file of a sample's listing that is its merged H&E TIFF, possibly gzipped."""
    found = [key for key in listing if re.fullmatch(rf".*{name}.*\.tiff?(\.gz)?", key, re.IGNORECASE)]
    if len(found) != 1:
        raise InputError(
            f"{where}: {len(found)} files look like the TIFF of {name}: {', '.join(listing) or 'empty listing'}"
        )
    return found[0]


def plan_gse240429(slides, source):
    """[(listing entry, path in the data root)] of everything that the slides need, from two public places."""
    geo, github = (source, source) if source else (GEO, GITHUB)
    plan = []
    for slide in slides.itertuples():
        sample = SAMPLES[slide.tissue_index]
        url = f"{geo}/geo/samples/{sample[:-3]}nnn/{sample}/suppl/"
        listing = read_listing(url)
        name = find_tiff(listing, slide.name, url)
        plan.append((listing[name], Path(slide.image + (".gz" if name.lower().endswith(".gz") else ""))))
    base = f"{github}/repos/bowang-lab/BLEEP/contents/GSE240429_data/data"
    wanted = [(Path(slide.positions).parent, {Path(slide.positions).name}) for slide in slides.itertuples()]
    wanted += [(Path(slide.matrix), None) for slide in slides.itertuples()]
    wanted += [(Path("data/filtered_expression_matrices"), {"hvg_union.npy"})]
    listings = {}
    for folder, names in wanted:
        url = f"{base}/{folder.relative_to('data').as_posix()}"
        listing = listings[url] = listings.get(url) or read_listing(url)
        for name in names or listing:
            if name not in listing:
                raise InputError(f"{url}: holds no {name}")
            plan.append((listing[name], folder / name))
    return plan


def unpack(path):
    """Unpack x.tiff.gz to x.tiff, whole or not at all, and drop the packed file."""
    try:
        with gzip.open(path) as packed, common.whole_file(path.with_suffix("")) as partial, open(partial, "wb") as file:
            shutil.copyfileobj(packed, file, CHUNK)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        path.unlink()
        raise InputError(f"{path}: {error}; it was removed: run the same command again") from None
    path.unlink()


def check_tiff(path):
    """Raise InputError where a TIFF's own index points beyond its end."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page, held = tiff.pages[0], tiff.filehandle.size
            needed = max(o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True))
    except DAMAGED_TIFF as error:
        raise InputError(f"{path}: not a TIFF ({error}); remove it and run the same command again") from None
    if needed > held:
        raise InputError(f"{path}: truncated at its source: {held:,} of at least {needed:,} bytes")


def download_gse240429(root, slides, source):
    """Fetch what is missing; a file that is there with the right size is left alone."""
    todo = []
    for entry, path in plan_gse240429(slides, source):
        done = root / (
            path.with_suffix("") if path.suffix == ".gz" and path.name.endswith(("tiff.gz", "tif.gz")) else path
        )
        if not done.exists() or (
            done.name == path.name and done.stat().st_size != (remote_size(entry) or done.stat().st_size)
        ):
            todo.append((entry, root / path))
    parts = [path.with_name(path.name + ".part") for _, path in todo]
    needed = sum((remote_size(entry) or 0) + UNPACKED_TIFF * path.name.endswith("tiff.gz") for entry, path in todo)
    needed -= sum(part.stat().st_size for part in parts if part.exists())
    check_space(root, needed)
    print(f"{len(todo)} files to fetch, {needed / 1e9:.1f} GB")
    for entry, path in todo:
        if not path.exists() or path.stat().st_size != remote_size(entry):
            fetch(entry, path)
        if path.name.endswith("tiff.gz"):
            unpack(path)
    for image in slides["image"]:
        check_tiff(root / image)


def copy_mirror(root, slides, source):
    """GSE240429 from a local folder in the published layout."""
    names = [name for column in ("image", "positions", "matrix") for name in slides[column]]
    names += ["data/filtered_expression_matrices/hvg_union.npy"]
    if missing := [name for name in names if not (source / name).exists()]:
        raise InputError(f"{source / missing[0]} does not exist: --source needs GSE240429 in the published layout")
    files = [
        file for name in names for file in ([source / name] if (source / name).is_file() else (source / name).iterdir())
    ]
    check_space(root, sum(file.stat().st_size for file in files))
    for file in files:
        copy_whole(file, root / file.relative_to(source))
    for image in slides["image"]:
        check_tiff(root / image)


def copy_whole(source, path):
    """Copy a file, whole or not at all."""
    with common.whole_file(path) as partial:
        shutil.copyfile(source, partial)
    print(f"  {path}  {path.stat().st_size:,} bytes")


# ---------------------------------------------------------------------------------------------- HER2ST


def mirror_her2st(root, sections, source):
    """Fetch the sections' files into <root>/download under their public paths; returns that folder."""
    base = f"{source or GITHUB}/repos/almaan/her2st/contents/data"
    todo = []
    for folder, pattern in (("ST-cnts", r"{}\.tsv(\.gz)?"), ("ST-spotfiles", r"{}_selection\.tsv")):
        listing = read_listing(f"{base}/{folder}")
        for section in sections:
            names = [name for name in listing if re.fullmatch(pattern.format(section), name)]
            if not names:
                raise InputError(f"{base}/{folder}: no file of section {section}; HER2ST's sections are A1 to H3")
            todo.append((listing[names[0]], Path("data", folder, names[0])))
    for section in sections:
        folder = f"ST-imgs/{section[0]}/{section}"
        todo += [(entry, Path("data", folder, name)) for name, entry in read_listing(f"{base}/{folder}").items()]
    check_space(root, 2 * sum(remote_size(entry) or 0 for entry, _ in todo))
    for entry, path in todo:
        if not (root / "download" / path).exists():
            fetch(entry, root / "download" / path)
    return root / "download"


def one_file(folder, pattern):
    """The only file of `folder` that matches; InputError otherwise."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise InputError(f"{folder}: {len(found)} files match {pattern}; expected one")
    return found[0]


def convert_her2st(root, section, source):
    """One section into the layout of section 2 of the data contract; returns image, positions and matrix paths."""
    image = one_file(source / "data" / "ST-imgs" / section[0] / section, "*.jpg")
    counts_path = one_file(source / "data" / "ST-cnts", f"{section}.tsv*")
    spots_path = one_file(source / "data" / "ST-spotfiles", f"{section}_selection.tsv")
    try:
        counts = pd.read_csv(counts_path, sep="\t", index_col=0)
        spots = pd.read_csv(spots_path, sep="\t").astype({"x": int, "y": int})
        spots.index = spots["x"].astype(str) + "x" + spots["y"].astype(str)
        spots = spots[["selected", "y", "x", "pixel_y", "pixel_x"]].round().astype(int)
    except (ValueError, KeyError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{counts_path} or {spots_path}: not HER2ST tables ({error}); fetch them again") from None
    both = counts.index.intersection(spots.index[spots["selected"] == 1])
    print(
        f"  {section}: {len(both)} spots with counts and a position (of {len(counts)} and {len(spots)}),"
        f" {counts.shape[1]:,} genes"
    )
    target = root / "image" / f"{section}{image.suffix}"
    positions, matrix = Path("data/positions", f"{section}.csv"), Path("data/matrices", section)
    copy_whole(image, target)
    (root / matrix).mkdir(parents=True, exist_ok=True)
    with common.whole_file(root / positions) as path:
        spots.reset_index().to_csv(path, header=False, index=False)
    with common.whole_file(root / matrix / "barcodes.tsv") as path:
        path.write_text("\n".join(both) + "\n")
    with common.whole_file(root / matrix / "features.tsv") as path:
        path.write_text("".join(f"{gene}\t{gene}\tGene Expression\n" for gene in counts.columns))
    with common.whole_file(root / matrix / "matrix.mtx") as path:
        scipy.io.mmwrite(path, scipy.sparse.coo_matrix(counts.loc[both].to_numpy().T))
    return {"image": f"image/{target.name}", "positions": positions.as_posix(), "matrix": matrix.as_posix()}


def main():
    root = Path(DATA_ROOT or f"{DATASET}_data")
    published = Path(__file__).parent / "GSE240429_data"  # manifest, gene lists and results are in the repository
    remote = SOURCE == "" or "://" in SOURCE
    if not remote and not Path(SOURCE).is_dir():
        raise InputError(f"--source {SOURCE}: no such folder")
    runner.hold_folder(root)
    if DATASET == "GSE240429":
        slides = pd.read_csv(published / "slides.csv")
        (download_gse240429 if remote else copy_mirror)(root, slides, SOURCE.rstrip("/") if remote else Path(SOURCE))
    else:
        if not SECTIONS or len(set(SECTIONS)) < len(SECTIONS):
            raise InputError(f"--sections {','.join(SECTIONS)}: expected different sections, one at least")
        source = mirror_her2st(root, SECTIONS, SOURCE.rstrip("/")) if remote else Path(SOURCE)
        rows = [
            {"tissue_index": i, "name": section, "donor": section[0], "um_per_px": HER2ST_UM_PER_PX}
            | convert_her2st(root, section, source)
            for i, section in enumerate(SECTIONS, 1)
        ]
        slides = pd.DataFrame(rows)
    if DATASET == "HER2ST":
        with common.whole_file(root / "slides.csv") as path:
            slides.to_csv(path, index=False)
    elif root.resolve() != published.resolve():
        for name in ("slides.csv", "gene_sets.csv", "published_results.csv"):
            copy_whole(published / name, root / name)
    print(f"next: python 19_make_patches_and_csv.py --data-root {root}")


if __name__ == "__main__":
    runner.run_script(globals())
