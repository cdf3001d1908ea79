"""Time and memory of script 26 on a whole slide, 26,000 x 25,400 px in JPEG tiles, without
positions.

Question   Does a slide of real size stay within 1 GB of memory?
Reads      WEIGHTS, of a run on simulated slides
Writes     <OUT>/prediction.csv and machine.json; a slide made for it under OUT (2.3 GB, removed at
           the end)
Prints     spots, seconds and peak memory of 26
Command    python benchmarks/measure_prediction.py --weights weights.safetensors

Memory is what the kernel cannot drop (RssAnon). Pages of memory-mapped patches are the file's own.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import shell

if __name__ == "__main__":  # Mistakes are told before the imports, which take long.
    shell.check_command(__file__, files=("WEIGHTS",))


import shutil

import pandas as pd
from compare_stages import HEIGHT, WIDTH, describe_machine, make_slides
from measure_growth import watch

# ---------------------------------------------------------------------------------------- constants
OUT = "runs/benchmarks"
WEIGHTS = ""  # weights.safetensors of a run
# --------------------------------------------------------------------------------------------------


def main():
    out, work = Path(OUT), Path(OUT, "work-prediction")
    if not Path(WEIGHTS).is_file():
        raise shell.InputError(
            f"--weights {WEIGHTS}: no such file; expected weights.safetensors of a run"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        slide = make_slides(work, ("contiguous", "jpeg_tiles"))["jpeg_tiles"]
        options = ["--weights", WEIGHTS, "--image", slide, "--um-per-px", 0.304]
        options += ["--out", work / "run"]
        seconds, peak, _ = watch(REPOSITORY / "26_predict_slide.py", *options)
        spots = len(pd.read_csv(work / "run" / "predictions.csv", usecols=["id"]))
    finally:
        shutil.rmtree(work)
    line = {"slide": f"{HEIGHT} x {WIDTH}", "spots": spots, "seconds": seconds, "GB": peak}
    table = pd.DataFrame([line])
    print(table.to_string(index=False, float_format="{:.2f}".format))
    shell.save_csv(out / "prediction.csv", table)
    shell.save_json(out / "machine.json", describe_machine())


if __name__ == "__main__":
    shell.run_script(globals())
