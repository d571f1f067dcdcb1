"""Seconds from the start of a program to the first token it writes, each time in a new process.

    python benchmarks/start_time.py [--engines naive,kv,fast] [--weights FILE] [--repeats 5] [--out benchmarks/results]

Prints a table and writes ``<out>/<device>/start.json``. Compiled kernels are kept on disk (see the README), so each
engine is started once before, uncounted: what is measured is an ordinary start. Without ``--weights`` the model on a
GPU has the size of GPT-2 (124M) and random weights, from a file that this writes; without a GPU it is the tiny one in
``data/``. *Import* is the time of importing the engine's module in a process that does nothing else.
Exit codes: 0 all measured, 1 a program failed (its error is printed), 2 bad arguments.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before numba.cuda)

# isort: split
from tqdm import tqdm  # noqa: E402

from benchmarks.gpt2 import GPT2_124M, LEVELS, _names, _summary  # noqa: E402
from benchmarks.ladders import RESULTS, device_folder  # noqa: E402
from benchmarks.random_gpt2 import random_weights  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from ch14_mini_llm.model.weights import DATA_DIR, save_weights  # noqa: E402
from common import bench  # noqa: E402

MODULES = {"naive": "naive.gpt2", "kv": "levels.single", "fast": "levels.single"}
IMPORT = "import time; start = time.perf_counter(); import ch14_mini_llm.{}; print(time.perf_counter() - start)"


class ProgramFailed(RuntimeError):
    """A measured program ended with an error; the message is the last line it wrote."""


def _run(*arguments):
    """What ``python arguments`` prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise ProgramFailed((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return done.stdout


def first_token_s(engine, weights):
    """Seconds from the start of ``run.py`` to its first token, with its engine and weight file."""
    told = _run("ch14_mini_llm/run.py", f"--engine={engine}", f"--weights={weights}", "--max_new=2", "--json")
    return json.loads(told)["first_token_from_program_start_s"]


def measure(engines, weights, repeats, progress=lambda text: None):
    """A dict for JSON: ``device``, ``backend``, ``weights``, ``repeats``, and ``rows`` of ``engine``, ``import_s`` and
    ``first_token_s``, each [median, lowest, highest]. progress(text): called ``repeats + 1`` times an engine.

    Raises `ProgramFailed`.
    """
    rows = []
    for engine in engines:
        progress(f"{engine}, first start")
        first_token_s(engine, weights)
        imports, firsts = [], []
        for _ in range(repeats):
            progress(engine)
            imports.append(float(_run("-c", IMPORT.format(MODULES[engine]))))
            firsts.append(first_token_s(engine, weights))
        rows.append({"engine": engine, "import_s": _summary(imports), "first_token_s": _summary(firsts)})
    found = {"device": bench.device_name(), "backend": common.BACKEND, "weights": weights.name, "repeats": repeats}
    return {**found, "rows": rows}


def format_table(result):
    """The figures of `measure` as a table for a terminal."""
    lines = [f"{result['device']}, {result['weights']}: seconds, median of {result['repeats']} (lowest … highest)"]
    for row in result["rows"]:
        cells = ["{:.2f} ({:.2f} … {:.2f})".format(*row[key]) for key in ("import_s", "first_token_s")]
        lines.append(f"  {row['engine']:6}  import {cells[0]}   first token {cells[1]}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/start_time.py", description=__doc__.split("\n")[0])
    parser.add_argument("--engines", type=_names(LEVELS), default=list(LEVELS), help=f"of {','.join(LEVELS)}")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a weight file; by default as gpt2.py has it")
    parser.add_argument("--repeats", type=int, default=5, help="starts that count, of each engine (5)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    options = parser.parse_args(argv)
    if options.repeats < 1 or not options.engines:
        parser.error(f"--repeats={options.repeats} --engines={','.join(options.engines)}: at least one of each")
    if options.weights and not options.weights.is_file():
        parser.error(f"--weights={options.weights}: no such file; data/download_gpt2.py makes one")
    path = options.out / device_folder() / "start.json"
    try:
        make_output(path, "--out")
    except FileError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        weights = options.weights and options.weights.resolve()
        if not weights and common.BACKEND == "gpu":
            weights = Path(folder, "gpt2-124m-random.bin")
            save_weights(weights, GPT2_124M, random_weights(GPT2_124M))
        weights = weights or DATA_DIR / "tiny-gpt2.bin"
        with tqdm(total=len(options.engines) * (options.repeats + 1), disable=None) as bar:

            def progress(text):
                bar.set_description(text)
                bar.update()

            try:
                result = measure(options.engines, weights, options.repeats, progress)
            except ProgramFailed as error:
                print(f"error: a program that was to be measured failed: {error}", file=sys.stderr)
                raise SystemExit(1) from None
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{format_table(result)}\n\nwritten: {path}")


if __name__ == "__main__":
    main()
