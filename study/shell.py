"""The start and the end of a script.

Needs no package but Python itself, as errors, ranks, files, hashes, constants and recipes, so that
--help and what is wrong in a command are told at once: torch and its company take five seconds to
load.
"""

import atexit
import gc
import io
import os
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from study import constants, errors
from study.errors import InputError
from study.ranks import RANK
from study.recipes import ALLOWED

SPINS = 3000  # of an OpenMP thread that waits on an idle machine; as it comes, some 300,000

# HDF5 locks every file that it opens, which some file systems cannot do. Nothing is lost without
# it: files get their name when they are whole, and files.hold_folder keeps other runs out. The
# variable is read when h5py is loaded; every script imports this module first.
os.environ["HDF5_USE_FILE_LOCKING"] = "FALSE"


# -------------------------------------------------------------------------------------------- start
def check_command(path, *, files=(), manifest=False, dataset=False):
    """Answer --help, and end the process with 2 where the command line of the script at `path`
    holds a mistake, before torch is loaded.

    What the constants `files` name must be there; with `manifest` the data root must have a
    slides.csv, and with `dataset` it must have been through script 19.
    """
    prepare_process()
    try:
        script = constants.read_script(path)
        script |= constants.parse_command(script, sys.argv[1:])
        constants.check_constants(script, ALLOWED | script.get("ALLOWED", {}))
        for name in files:
            if script[name] and not Path(script[name]).exists():
                raise InputError(
                    f"{constants.flag_of(name)} {script[name]}: no such file or folder"
                )
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


# ---------------------------------------------------------------------------------------------- end
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
            constants.override_constants(script, sys.argv[1:])
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
    reason = errors.explain(error)
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
