"""Measure chapters' ladders beside the library, in one run: ``make bench CH=09``, or ``make bench`` for all chapters.

    python benchmarks/ladders.py 04 09 [--out benchmarks/results] [--rounds 7]

Prints each table and writes the raw figures to ``<out>/<device>/chNN.json``, from which ``make plots`` draws the plots
and the tables in the lessons. What is measured stands in each chapter's ``bench.py``; how, in ``common/bench.py``.
Exit codes: 0 all measured, 1 a version gave a wrong result (nothing of its chapter is written), 2 no such chapter.
"""

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before numba.cuda)

# isort: split
from tqdm import tqdm  # noqa: E402

from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from common import bench  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def benchable():
    """{"04": "chapters.ch04_memory.bench", …}: the chapters that have something to measure, in order."""
    found = sorted(ROOT.glob("chapters/ch??_*/bench.py"))
    return {path.parent.name[2:4]: f"chapters.{path.parent.name}.bench" for path in found}


def device_folder():
    """The folder of this machine's results: ``cpu``, or the GPU's name, such as ``h200``."""
    if common.BACKEND == "cpu":
        return "cpu"
    words = re.sub(r"NVIDIA|GeForce|Tesla|Quadro|\d+GB|HBM\d\w*|PCIe|SXM\d*", " ", bench.device_name())
    return "-".join(re.findall(r"[a-z0-9]+", words.lower())) or "gpu"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/ladders.py", description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", metavar="CH", help="chapter numbers such as 04; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    parser.add_argument("--rounds", type=int, default=bench.ROUNDS, help=f"batches timed a version ({bench.ROUNDS})")
    options = parser.parse_args(argv)
    known = benchable()
    wanted = [chapter.removeprefix("ch").zfill(2) for chapter in options.chapters] or list(known)
    for chapter in wanted:
        if chapter not in known:
            parser.error(f"chapter {chapter} has nothing to measure; those that have: {', '.join(known)}")
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds}: at least 1")
    folder = options.out / device_folder()
    try:
        for chapter in wanted:
            make_output(folder / f"ch{chapter}.json", "--out")
    except FileError as error:
        parser.error(str(error))
    failed = 0
    for chapter in wanted:
        ladders = importlib.import_module(known[chapter]).LADDERS
        with tqdm(total=1 + sum(len(ladder.sizes.get(common.BACKEND, [])) for ladder in ladders), disable=None) as bar:

            def progress(text, bar=bar, chapter=chapter):
                bar.set_description(f"ch{chapter} {text}")
                bar.update()

            try:
                result = bench.measure(ladders, progress, rounds=options.rounds)
            except bench.WrongResult as error:
                print(f"ch{chapter}: {error}", file=sys.stderr)
                failed += 1
                continue
        for ladder in result["ladders"]:
            print(f"\n{bench.format_table(result, ladder)}", flush=True)
        path = folder / f"ch{chapter}.json"
        write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(f"\nwritten: {path}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
