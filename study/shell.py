"""The start and the end of a script: errors, files, its constants and the command line.

Needs no package but Python itself, so that --help and what is wrong in a command are told at once:
torch and its company take five seconds to load.
"""

import argparse
import ast
import atexit
import errno
import fcntl
import functools
import gc
import hashlib
import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from study.recipes import ALLOWED, PAPER, RECIPES, WITHOUT_EFFECT

SPINS = 3000  # of an OpenMP thread that waits on an idle machine; as it comes, some 300,000
WHOLE_BYTES = 16 * 2**20  # of a file, up to which hash_blocks takes all of it
BLOCKS, BLOCK_BYTES = 65, 2**14  # of a larger file, what it takes
# Batch systems and pods may set RANK and WORLD_SIZE of a process that torchrun did not start.
BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if BY_TORCHRUN else 0  # of this process among torchrun's
RANKS = int(os.environ["WORLD_SIZE"]) if BY_TORCHRUN else 1  # how many it started

# HDF5 locks every file that it opens, which some file systems cannot do. Nothing is lost without
# it: files get their name when they are whole, and hold_folder keeps other runs out. The variable
# is read when h5py is loaded; every script imports this room first.
os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"


class InputError(Exception):
    """The user's input is at fault. One line names the value, what was expected and the fix."""


# -------------------------------------------------------------------------------------------- files
@contextmanager
def whole_file(path, mark=RANK):
    """Give a temporary path beside `path`; rename it to `path` on success, remove it otherwise.

    The `mark` in its name keeps apart processes that write the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Writers look at the suffix, so it stays.
    partial = path.with_name(f".partial-{mark}-{path.name}")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save_csv(path, table):
    """Write the table, without its index, whole or not at all."""
    with whole_file(path) as partial:
        table.to_csv(partial, index=False)


def read_csv(path, texts=(), numbers=(), **options):
    """A table that save_csv wrote, with these columns at least; `options` of pandas.read_csv. Empty
    cells alone are NaN, since a gene may be called NA.

    InputError where another program has saved it since: a spreadsheet may separate cells by
    semicolons, and write decimals with commas. Numbers that it cut cannot be had back.
    """
    import pandas as pd  # Here, because commands are checked without it.

    fix = "run its script again"
    if (path.parent / "rows.json").is_file():  # Else the row counts as computed.
        fix = f"remove {path.parent} and {fix}"
    fix += "; a spreadsheet may have saved it in a form of its own"
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values=[""], **options)
    except ValueError as error:  # in which pandas has its own errors, and those of encodings
        cause = " ".join(str(error).split())
        raise InputError(f"{path}: not as a script wrote it ({cause}): {fix}") from None
    lacking = {*texts, *numbers} - {*table}
    if lacking:
        raise InputError(f"{path}: lacks {', '.join(sorted(lacking))}: {fix}")
    for name in numbers:
        cells = table[name].dropna()
        wrong = cells[pd.to_numeric(cells, errors="coerce").isna()]
        if len(wrong):
            raise InputError(f"{path}: {name} is {wrong.iloc[0]!r}, no number: {fix}")
    return table


def save_json(path, content):
    """Write the content as indented JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def without_nan(values):
    """A list of floats with None for NaN, which JSON does not have."""
    return [none_for_nan(float(value)) for value in values]


def none_for_nan(value):
    """The value, or None for NaN, which JSON does not have."""
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def as_utf8(text):
    """The text, with question marks for what UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode()


def reserve_disk(path):
    """Take the space of a sparse file now: written through memory, a full disk would kill the
    process later. macOS cannot reserve; there the free space is at least compared.
    """
    size = path.stat().st_size
    if not hasattr(os, "posix_fallocate"):
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return
    with open(path, "rb+") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def hash_file(path):
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identify_file(path):
    """The first digits of the hash of a file's content."""
    status = path.stat()
    return hash_unchanged(path, status.st_size, status.st_mtime_ns)[:16]


@functools.lru_cache(maxsize=64)
def hash_unchanged(path, size, changed):
    """hash_file, which reads the file again when its size or time of change is another."""
    return hash_file(path)


def hash_blocks(path):
    """SHA-256 of a file's content or, of a large one, of blocks all over it, which is quick."""
    size = path.stat().st_size
    if size <= WHOLE_BYTES:
        return hash_file(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(BLOCKS):
            # The first is the head, and the last the end, where TIFFs keep their tables.
            file.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def seed_of(*words):
    """A seed by the words alone, as seed_of(42, "epoch", 3), whatever ran before."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def fingerprint_of(meta_text):
    """What a run holds of the meta.json, as bytes, of the dataset that it was made on."""
    return hashlib.sha256(meta_text).hexdigest()[:16]


# ---------------------------------------------------------------------------------------- constants
LINE = re.compile(r"^# -{20,}.*$", re.MULTILINE)  # rules off the block of constants


def recipe_of(script):
    """{name: value} of a script's constants as they stand and, where it trains, of its RECIPE."""
    constants = {name: script[name] for name in read_comments(script)}
    if "PROTOCOL" not in constants:
        return constants
    recipe = RECIPES[constants.get("RECIPE", "paper")] | constants
    if "EPOCHS" not in constants:  # Each setting has its own.
        del recipe["EPOCHS"]
    return recipe


def flags_given(script):
    """{flag: value} of the constants that the command line has changed from those in the file."""
    written = read_script(script["__file__"])
    changed = [name for name in read_comments(script) if script[name] != written[name]]
    return {flag_of(name): show_constant(script[name]) for name in changed}


def read_comments(script):
    """{name: comment} of the constants in a script's ruled block."""
    block = LINE.split(Path(script["__file__"]).read_text(encoding="utf-8"))[1]
    pattern = r"^([A-Z][A-Z0-9_]*) = .*?(?:  # (.*))?$"
    return dict(re.findall(pattern, block, flags=re.MULTILINE))


def flag_of(name):
    """A constant's name on the command line."""
    return "--" + name.lower().replace("_", "-")


def show_constant(value):
    """A constant's value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse_constant(name, default, text):
    """The text of the command line as a value of the type of `default`; () takes whole numbers."""
    words = {"true": True, "false": False}
    if name == "PRETRAINED":  # true, false, or a file or folder, whatever it is edited to
        return words.get(text.lower(), text)
    if isinstance(default, bool):
        return words[text.lower()]
    if isinstance(default, tuple):
        kind = type(default[0]) if default else int
        return tuple(kind(part) for part in text.split(",") if part)
    return type(default)(text)


def build_parser(script):
    """argparse's parser of a script: a flag a constant, its comment and value as the help."""

    def refuse(message):
        raise InputError(f"{message}; --help lists this script's constants")

    parser = argparse.ArgumentParser(
        description=script["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the docstring's lines
        allow_abbrev=False,
    )
    parser.error = refuse
    for name, comment in read_comments(script).items():
        value = script[name]

        def parse(text, name=name, default=value):
            try:
                return parse_constant(name, default, text)
            except (KeyError, ValueError):
                kind = type(default).__name__
                hint = ": expected true or false" if kind == "bool" else ""
                raise argparse.ArgumentTypeError(f"invalid {kind} value: {text!r}{hint}") from None

        options = {"metavar": ""}
        if isinstance(value, bool):
            options = {"nargs": "?", "const": True, "metavar": "false"}
        text = f"{comment} [{show_constant(value)}]".replace("%", "%%")
        parser.add_argument(flag_of(name), dest=name, type=parse, help=text, **options)
    return parser


def parse_command(script, argv):
    """{name: value} of the command line. InputError for what the protocol does not ask for."""
    given = vars(build_parser(script).parse_args(argv))
    given = {name: value for name, value in given.items() if value is not None}
    protocol = given.get("PROTOCOL", script.get("PROTOCOL"))
    for name in WITHOUT_EFFECT.get(protocol, ()):
        if name in given:
            flag = f"{flag_of(name)} {show_constant(given[name])}"
            raise InputError(f"{flag}: --protocol {protocol} does not ask for it: leave it out")
    return given


def override_constants(script, argv):
    """Set a script's constants: what its recipe says, but for those that were edited, then
    `--quick`'s budget, then the command line. Prints what is not as the script comes.
    """
    given = parse_command(script, argv)
    quick = given.get("QUICK", script.get("QUICK", False))
    recipe = given.get("RECIPE", script.get("RECIPE", "paper"))
    values = (script["QUICK_BUDGET"] if quick else {}) | given
    allowed = ALLOWED | script.get("ALLOWED", {})
    check_constants({"RECIPE": recipe}, allowed)
    values = choose_by_recipe(script, recipe, values) | values
    is_trained = not quick and values.get("PRETRAINED", script.get("PRETRAINED")) is not False
    if RECIPES[recipe]["HEAD_START"] == "ridge" and not is_trained:
        raise InputError(
            f"--recipe {recipe}: starts from pretrained weights, which --quick and "
            "--pretrained false leave out"
        )
    for name, value in values.items():
        if name not in script or value != script[name]:
            print(f"{name} = {value!r}")
    script.update({name: value for name, value in values.items() if name in script})
    check_constants(script, allowed)
    settled = recipe_of(script)
    if settled.get("NEIGHBOURHOOD") and settled.get("EPOCHS"):
        raise InputError(
            f"--epochs {settled['EPOCHS']}: a network in training sees single patches, without the "
            "neighbourhood of recipe best: add --neighbourhood false (in 20), or leave epochs out"
        )


def choose_by_recipe(script, recipe, given):
    """{name: value} of what a recipe changes; tells of constants that were edited against it."""
    chosen = {}
    for name, value in RECIPES[recipe].items():
        if name in given or value == PAPER[name]:
            continue
        if name in script and script[name] != PAPER[name]:
            print(f"{name} = {script[name]!r} as edited, in place of {value!r} of recipe {recipe}")
        else:
            chosen[name] = value
    return chosen


def check_constants(script, allowed):
    """InputError where a constant has a value that `allowed` {name: choices} leaves out, or one of
    another kind, as it may be edited to: REFIT = "false" would be true.
    """
    for name in script.keys() & allowed.keys():
        value, choices = script[name], allowed[name]
        kind = type(choices[-1])
        if kind is tuple:
            expected = f"several in brackets, as {choices[-1]}"
        elif kind in (str, bool):
            expected = f"one of {', '.join(map(str, choices))}"
        else:
            whole = ", without decimals" if kind is int else ""
            expected = f"a number from {choices[0]} to {choices[-1]}{whole}"
        if not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(f"{name} = {value!r} in the script: expected {expected}")
        fits = value in choices if kind is str else choices[0] <= value <= choices[-1]
        if kind is not tuple and not fits:
            raise InputError(f"{flag_of(name)} {value}: expected {expected}")


# ------------------------------------------------------------------------ start and end of a script
def check_command(path, *, files=(), manifest=False, dataset=False):
    """Answer --help, and end the process with 2 where the command line of the script at `path`
    holds a mistake, before torch is loaded.

    What the constants `files` name must be there; with `manifest` the data root must have a
    slides.csv, and with `dataset` it must have been through script 19.
    """
    prepare_process()
    try:
        script = read_script(path)
        script |= parse_command(script, sys.argv[1:])
        check_constants(script, ALLOWED | script.get("ALLOWED", {}))
        for name in files:
            if script[name] and not Path(script[name]).exists():
                raise InputError(f"{flag_of(name)} {script[name]}: no such file or folder")
        if manifest and not (script["FROM_SPACERANGER"] or script["FROM_HEST"]):  # They write it.
            find_manifest(script["DATA_ROOT"])
        if dataset and not script["QUICK"]:  # --quick makes its slides.
            find_dataset(script["DATA_ROOT"])
    except InputError as error:
        end_with(error)
    except OSError as error:  # of a folder in which nobody may look, or a name that is too long
        end_if_explained(error)
        end_with(error)
    choose_waiting()
    # Until run_script: packages are half a million objects that stay, and to look through them for
    # garbage again and again takes a quarter of the time in which they load.
    gc.disable()


def prepare_process():
    """Draw figures without a screen, and print what the terminal cannot show as a question mark: a
    run must not end at its last line.
    """
    os.environ["MPLBACKEND"] = "agg"  # Read when matplotlib is loaded.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def choose_waiting():
    """Have OpenMP's threads sleep when they wait for each other: at once beside busy processes,
    else soon. Nothing changes where the user has said how they wait.

    As they come, they spin for milliseconds, and beside a busy process that takes the core from
    the very thread that is waited for. GNU's OpenMP, which torch brings, reads this when it loads.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    if count_busy() + count_cores() > os.cpu_count():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def count_cores():
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Linux alone tells.
        return os.cpu_count()


def count_busy(samples=5, pause=0.01):
    """How many threads of other processes want a core now, by the least of some samples, since any
    program wakes for a moment; 0 where /proc/loadavg does not tell.
    """
    found = []
    for _ in range(samples):
        try:
            running = Path("/proc/loadavg").read_text().split()[3].split("/")[0]
            found.append(int(running) - 1)  # without this one
        except (OSError, ValueError, IndexError):
            return 0
        if found[-1] <= 0:  # There is no less, and an idle machine need not wait for it.
            return 0
        time.sleep(pause)
    return min(found)


def describe_waiting():
    """How OpenMP's threads wait in this process: its environment variable."""
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    return "OpenMP as it comes"


def read_script(path):
    """{name: value} of a script's docstring, constants and ALLOWED. They are read and not run, so
    that a value must be written out: else InputError.
    """
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    script = {"__file__": path, "__doc__": ast.get_docstring(tree)}
    constants = read_comments(script)
    for node in tree.body:
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            if name in constants or name == "ALLOWED":
                try:
                    script[name] = ast.literal_eval(node.value)
                except ValueError:
                    raise InputError(
                        f"{name} = {ast.unparse(node.value)} in {Path(path).name}: expected a "
                        "value that is written out, as 0.0003 for 3 * 1e-4"
                    ) from None
    return script


def find_manifest(data_root):
    """The slides.csv of a data root. InputError with how to make it where there is none."""
    path = Path(data_root, "slides.csv")
    if not path.is_file():
        raise InputError(
            f"no {path}: make it with 17_download_data.py or 18_simulate_slides.py, or with "
            "--from-spaceranger or --from-hest, or write it by hand"
        )
    return path


def find_dataset(data_root):
    """The folder that 19 has made in a data root. InputError with its command where it is not."""
    folder = Path(data_root, "dataset")
    if not (folder / "meta.json").is_file():
        command = f"python 19_make_patches_and_csv.py --data-root {data_root}"
        raise InputError(f"no meta.json in {folder}: run {command} first")
    return folder


def end_with(error):
    """Print an error as one line, whatever a library's message held, and end the process with 2."""
    print("error:", *str(error).split(), file=sys.stderr)
    sys.exit(2)


def run_script(script):
    """Apply the command line to a script's globals and call its main().

    Ends the process with 2 on an InputError, a full disk, a limit of the system or the loss of
    another process of torchrun's, with 130 on Ctrl-C. Of torchrun's processes the first one prints.
    """
    provide_caches()
    gc.freeze()  # What has been loaded stays.
    gc.enable()
    screen = open(os.devnull, "w") if RANK else sys.stdout  # noqa: SIM115 - open to the end
    try:
        with ending_at_signals(), redirect_stdout(screen):
            override_constants(script, sys.argv[1:])
            script["main"]()
    except InputError as error:
        end_with(error)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        end_if_explained(error)
        raise
    finally:
        gc.unfreeze()  # Else some packages tell at the end that objects are left.


def end_if_explained(error):
    """End the process with 2 and one line where an exception comes from outside this program."""
    reason = explain(error)
    if reason is not None:
        end_with(f"{reason} run the same command again")


INTERRUPTED = "interrupted: run the same command again"
GRACE = 3  # seconds from a signal to the end, for what is left to be tidied up


@contextmanager
def ending_at_signals():
    """Have SIGTERM, by which torchrun and batch systems end a process, be the same as Ctrl-C, and
    either end it soon.

    KeyboardInterrupt is not raised as long as the process waits inside a library, as for another
    rank; a thread hears of the signal all the same.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    heard, noted = os.pipe()
    os.set_blocking(noted, False)
    before = signal.set_wakeup_fd(noted)
    is_over = threading.Event()
    threading.Thread(target=end_late, args=(heard, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        signal.set_wakeup_fd(before)
        os.close(noted)


def end_late(heard, is_over):
    """End the process if it has not ended by itself GRACE seconds after a signal."""
    with open(heard, "rb", buffering=0) as file:
        number = file.read(1)  # Nothing, once the other end is closed.
    if number and not is_over.wait(GRACE):
        print(INTERRUPTED, file=sys.stderr, flush=True)
        os._exit(130)


def provide_caches():
    """Have libraries keep their files in a temporary folder where there is no home to write to, as
    in containers: numba would refuse to be imported.
    """
    if can_write_at_home():
        return
    folder = tempfile.mkdtemp(prefix="caches-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME"):
        os.environ.setdefault(name, str(Path(folder, name.lower())))


def can_write_at_home():
    """Whether there is a folder for caches where libraries look for it."""
    try:
        usual = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        Path(usual).mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that is no folder, or nobody's
        return False
    return os.access(usual, os.W_OK)


# What the system has no more of, by the number of its error, and what to do about it.
LIMITS = {
    errno.ENOSPC: "no space left on the disk: free some and",
    errno.EDQUOT: "the disk quota is used up: free some of it and",
    errno.EFBIG: "a file is larger than the system allows: raise the limit (ulimit -f) and",
    errno.ENOMEM: "not enough memory: give the process more, or the run a smaller batch, and",
}
# What a user may not do there, by the number of its error.
DENIALS = (errno.EACCES, errno.EPERM, errno.EROFS)
# How torch says so, which raises plain RuntimeErrors; CUDA's and Python's allocators.
NO_MEMORY = ("DefaultCPUAllocator", "out of memory", "can't start new thread")


def explain(error):
    """What outside this program an exception comes from: a full disk, a quota or limit that is
    used up, a file or folder without permission, a process that ended; else None.
    """
    chain = [error]  # torch, HDF5 and Pillow raise others before or after the disk's own
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    for raised in reversed(chain):
        if isinstance(raised, OSError):
            for number, reason in LIMITS.items():
                # HDF5 gives no number.
                if number == raised.errno or os.strerror(number) in str(raised):
                    return reason
            if raised.errno in DENIALS:
                named = re.search("name = '(.*?)'", str(raised))  # as HDF5 says it
                place = os.fsdecode(raised.filename or (named[1] if named else str(raised)))
                cause = os.strerror(raised.errno)
                return f"{place}: no permission ({cause}): change that, or the place, and"
    first = chain[-1]
    message = str(first)
    if isinstance(first, MemoryError) or any(words in message for words in NO_MEMORY):
        return f"{LIMITS[errno.ENOMEM].removesuffix(' and')} ({message or 'MemoryError'}) and"
    distributed = sys.modules.get("torch.distributed")  # If it is not loaded, it raised nothing.
    of_another = distributed is not None and isinstance(first, distributed.DistError)
    if of_another or "gloo/" in str(first):  # gloo's own errors are plain RuntimeErrors.
        return f"another process of this run ended ({str(first).splitlines()[0]}):"
    return None


def call_script(name, *flags):
    """Run another numbered script in this process, which ends with it where it is refused."""
    print("$ python", name, *flags, flush=True)
    path = str(Path(__file__).parent.with_name(name))
    before = sys.argv
    sys.argv = [path, *flags]
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = before


def hold_folder(folder):
    """Keep other processes, but torchrun's of one run, out of a folder until this one ends."""
    if RANK:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Left open, because closing it gives the lock back.
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(
            f"{folder}: no folder to write to ({error.strerror}): choose another one"
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(
            f"{folder}: another process is writing there: wait until it ends, or choose another "
            "folder"
        ) from None
    except OSError as error:  # of a file system without locks, as NFS and Lustre may be mounted
        warn_of_no_locks(folder, error.strerror)


@functools.cache  # so that it is said once
def warn_of_no_locks(folder, reason):
    """Print that two runs on a folder would not notice each other."""
    print(
        f"warning: {folder}: its file system has no locks ({reason}): two runs at once are not "
        "kept apart, so start one at a time"
    )
