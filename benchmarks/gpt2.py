"""GPT-2 on one device, in one run: our levels (naive, with a cache, fast) beside transformers and torch.compile.

    python benchmarks/gpt2.py [--weights FILE] [--levels naive,kv,fast]
                              [--peers eager,static,compiled,tuned] [--tokens 256] [--prompt 16]
                              [--out benchmarks/results] [--skip-prefill]

Prints a table and writes the raw figures to ``<out>/<device>/gpt2.json``, from which ``benchmarks/gpt2_plot.py`` draws.
Without ``--weights`` the model on a GPU has the size of GPT-2 (124M) and random weights, on which the time does not
depend; without a GPU it is the tiny one in ``data/``.

How a time is taken: all models hold the same weights and follow the same random prompt, one model on the device at a
time, at batch 1, always with the most likely token. *Decoding* is the wall clock from the moment the host has the first
new token to that when it has the last and the device is done, after one generation that is not counted; *prefill* is
the wall clock from the ids of a prompt to the id that follows it. Figures are medians, with the lowest and the highest
beside them. Afterwards the tokens made are compared with those of the first level, and looked up in a float32 forward
pass of torch: how far their logits are from the largest.

Exit codes: 0 all measured, 1 a model failed (its error stands in the table and in the file, the others are measured).
"""

import argparse
import gc
import importlib.metadata
import json
import statistics
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before numba.cuda)

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
from numba import cuda  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import peers as other  # noqa: E402
from benchmarks.ladders import RESULTS, device_folder  # noqa: E402
from benchmarks.random_gpt2 import GPT2_124M, random_weights  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from ch14_mini_llm.levels.generate import generate  # noqa: E402
from ch14_mini_llm.model.config import LlamaConfig  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import DATA_DIR, load_weights  # noqa: E402
from common import bench  # noqa: E402

LEVELS = ("naive", "kv", "fast")
PREFILL = (128, 512, 1024)  # tokens
REPEATS = {"decode": 5, "prefill": 10}
SLOW = "naive"  # runs everything again for each token, so it makes fewer tokens and is measured fewer times
SLOW_TOKENS, SLOW_REPEATS = 32, 3


def make_level(level, config, tensors):
    """Our model of one level, on the device."""
    from ch14_mini_llm.levels import make_engine

    return make_engine(level, config, tensors)


class OurModel:
    """A level of ours with the functions of a peer."""

    def __init__(self, level, config, tensors):
        self.model = make_level(level, config, tensors)
        self.note = f"all runs again for each token, so it makes {SLOW_TOKENS} at most" if level == SLOW else None

    def reserve(self, max_length):
        """Nothing: ours take time for the tokens that are there, whatever there is room for."""

    def prefill(self, tokens):
        """The id after the prompt ``tokens``."""
        return self.model.prefill(tokens)

    def start(self, tokens, max_new):
        """(the first new id, a function that makes the other ``max_new - 1`` and returns them as a list)."""
        made = generate(self.model, tokens, max_new)
        return next(made), lambda: list(made)


class TheirModel:
    """A peer; functions as for `OurModel`."""

    def __init__(self, make, config, tensors):
        self.model = make(config, tensors, device="cuda" if common.BACKEND == "gpu" else "cpu")
        self.reserve, self.prefill = self.model.reserve, self.model.prefill

    @property
    def note(self):
        """What must be said about its figures, or None."""
        return self.model.note

    def start(self, tokens, max_new):
        """As `OurModel.start`."""
        first = self.model.prefill(tokens)
        return first, lambda: self.model.decode(first, max_new - 1)


def measure(
    config, tensors, levels, peers, new_tokens=256, prompt_tokens=16, skip_prefill=False, progress=lambda text: None
):
    """Time levels and peers (names in `LEVELS` and `peers.PEERS`) on this machine; returns a dict for JSON.

    Keys: ``device``, ``backend``, ``packages``, ``config``, ``n_parameters``, ``prompt_tokens``, ``new_tokens``,
    ``copy_gb_s`` (the device's own copy, bytes read plus written), ``weight_bytes`` (what a token must read, in
    fp16), ``ceiling_tokens_s`` (one by the other), ``reference`` (the level that tokens are compared with), ``rows``.
    A row: ``name``, ``kind`` ("level" or "peer"), ``error`` (None, or what failed), ``note``, ``new_tokens`` and
    ``repeats`` of its own, ``tokens_s`` [median, lowest, highest], ``share`` of the ceiling, ``prefill`` [{``size``,
    ``tokens``: the size, or one less where a model must have room for the next, ``ms`` [median, lowest, highest],
    ``repeats``}], ``tokens`` (the ids made, as text) and ``check`` {``compared``: how many were compared with the
    reference's, ``first_difference``: index or None, ``worst_gap``: see `peers.logit_gaps`, ``worst_gap_at``: its
    index}. A row that failed has only what was measured before.

    progress(text): called before each step, `steps` times if nothing fails.
    """
    progress("device copy")
    copy = bench.copy_bandwidth()
    n_bytes = weight_bytes(config)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, config.vocab_size, prompt_tokens).tolist()
    rows = []
    for kind, names in (("level", levels), ("peer", peers)):
        for name in names:
            row = {
                "name": name if kind == "level" else other.PEERS[name].name,
                "kind": kind,
                "error": None,
                "note": None,
                "new_tokens": min(new_tokens, SLOW_TOKENS) if name == SLOW else new_tokens,
                "repeats": SLOW_REPEATS if name == SLOW else REPEATS["decode"],
            }
            rows.append(row)
            try:
                _measure_one(row, name, config, tensors, prompt, skip_prefill, progress)
            except Exception as error:  # one model that fails must not cost the others' figures
                traceback.print_exc()
                row["error"] = _brief(error)
            _free()
            if row.get("tokens_s"):
                row["share"] = _digits(row["tokens_s"][0] * n_bytes / (copy * 1e9))
    progress("checking the tokens")
    reference = next((row for row in rows if row["kind"] == "level" and row.get("tokens")), None)
    for row in rows:
        if row.get("tokens"):
            _check(row, reference, config, tensors, prompt)
    for row in rows:
        if row.get("tokens"):
            row["tokens"] = " ".join(map(str, row["tokens"]))  # one line of the file, not one an id
    return {
        "device": bench.device_name(),
        "backend": common.BACKEND,
        "packages": _packages(),
        "config": asdict(config),
        "n_parameters": config.n_parameters,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "copy_gb_s": copy,
        "weight_bytes": n_bytes,
        "ceiling_tokens_s": _digits(copy * 1e9 / n_bytes),
        "reference": reference and reference["name"],
        "rows": rows,
    }


def steps(config, levels, peers, skip_prefill=False):
    """How often `measure` calls its ``progress``."""
    return 2 + (len(levels) + len(peers)) * (2 + (0 if skip_prefill else len(prefill_sizes(config))))


def weight_bytes(config):
    """Bytes that any model with fp16 weights reads for a token: all but embeddings of which it is a row.

    A tied embedding of tokens counts once: the head reads all of it. Keys and values come on top, after 272 tokens of
    GPT-2's 124M another 4 %.
    """
    if isinstance(config, LlamaConfig):
        return 2 * (config.n_parameters - (0 if config.tied_head else config.vocab_size * config.d_model))
    return 2 * (config.n_parameters - config.n_ctx * config.d_model)


def prefill_sizes(config):
    """Lengths in tokens of the prompts to time."""
    return [n for n in PREFILL if n <= config.n_ctx] or [config.n_ctx]


def _measure_one(row, name, config, tensors, prompt, skip_prefill, progress):
    """Fill ``row`` for one model, which lives on the device no longer than this function."""
    progress(f"{row['name']}: loading")
    if row["kind"] == "level":
        model = OurModel(name, config, tensors)
    else:
        model = TheirModel(other.PEERS[name], config, tensors)
    n = row["new_tokens"]
    model.reserve(len(prompt) + n)
    progress(f"{row['name']}: {n} tokens")
    _decode(model, prompt, n, config)  # compiles, and warms up
    rates = []
    for _ in range(row["repeats"]):
        seconds, row["tokens"] = _decode(model, prompt, n, config)
        rates.append((n - 1) / seconds)
    row["tokens_s"] = _summary(rates)
    row["note"] = model.note
    row["prefill"] = []
    for size in [] if skip_prefill else prefill_sizes(config):
        progress(f"{row['name']}: prompt of {size}")
        repeats = SLOW_REPEATS if name == SLOW else REPEATS["prefill"]
        tokens, times = _prefill(model, size, config, repeats)
        ms = _summary([1e3 * t for t in times])
        row["prefill"].append({"size": size, "tokens": tokens, "ms": ms, "repeats": repeats})


def _decode(model, prompt, n, config):
    """(seconds from the first of ``n`` new tokens to the last, the tokens)."""
    first, others = model.start(prompt, n)
    # The host has the first token, so all before it is done. To wait for the device here would give time away: a level
    # may have launched the next steps already, and they must not run before the clock does.
    start = time.perf_counter()
    made = others()
    cuda.synchronize()  # torch and Numba share the device's context: this waits for both
    seconds = time.perf_counter() - start
    tokens = [int(token) for token in (first, *made)]
    if len(tokens) != n or not all(0 <= token < config.vocab_size for token in tokens):
        raise RuntimeError(f"{n} ids below {config.vocab_size} were to be made, not {tokens}")
    return seconds, tokens


def _prefill(model, size, config, repeats):
    """(tokens of the prompt, seconds of each repeat); one token less where the model must have room for the next."""
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, size).tolist()
    model.reserve(size)
    try:
        model.prefill(tokens)
    except ValueError:
        if size < config.n_ctx:
            raise
        size, tokens = size - 1, tokens[:-1]
        model.prefill(tokens)
    if repeats > SLOW_REPEATS:
        model.prefill(tokens)  # a second warm-up, where it costs little
    times = []
    for _ in range(repeats):
        cuda.synchronize()
        start = time.perf_counter()
        model.prefill(tokens)
        cuda.synchronize()
        times.append(time.perf_counter() - start)
    return size, times


def _check(row, reference, config, tensors, prompt):
    """Give ``row``, which made tokens, its ``check``; reference: the row to compare with, or None."""
    pairs = list(zip(row["tokens"], reference["tokens"] if reference else []))
    try:
        gaps = other.logit_gaps(config, tensors, prompt, row["tokens"], "cuda" if common.BACKEND == "gpu" else "cpu")
    except Exception as error:  # a device that a failed kernel left behind, say: the times are still worth a file
        traceback.print_exc()
        row["error"] = row["error"] or _brief(error)
        return
    row["check"] = {
        "compared": len(pairs),
        "first_difference": next((i for i, (a, b) in enumerate(pairs) if a != b), None),
        "worst_gap": _digits(float(gaps.max())),
        "worst_gap_at": int(gaps.argmax()),
    }


def _free():
    """Give back what the last model held on the device: what was compiled for it, and torch's own store of memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _packages():
    """Versions of what the figures depend on."""
    found = bench._packages()
    for name in ("transformers", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _brief(error):
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _summary(values):
    """[median, lowest, highest]"""
    return [_digits(f(values)) for f in (statistics.median, min, max)]


def _digits(value):
    return float(f"{value:.4g}")


# --- the table -------------------------------------------------------------------------------------------------------


def format_table(result):
    """The figures of `measure` as a table for a terminal."""
    prompts = [{entry["size"]: entry["ms"][0] for entry in row.get("prefill") or []} for row in result["rows"]]
    sizes = sorted({size for found in prompts for size in found})
    head = ["", "tokens/s", "lowest … highest", "of the ceiling"]
    head += [f"prompt of {size}" for size in sizes] + ["tokens", "largest gap"]
    table = [head]
    for row, found in zip(result["rows"], prompts):
        name = row["name"] + (f", {row['new_tokens']} new" if row["new_tokens"] != result["new_tokens"] else "")
        cells = [name, "–", "–", "–"]
        if row.get("tokens_s"):
            median, low, high = row["tokens_s"]
            spread = f"{bench.short(low)} … {bench.short(high)}"
            cells[1:] = [bench.short(median), spread, f"{100 * row['share']:.3g} %"]
        cells += [f"{bench.short(found[size])} ms" if size in found else "–" for size in sizes]
        check = row.get("check")
        cells += [_compared(row, result), f"{check['worst_gap']:.2g}"] if check else ["–", "–"]
        table.append(cells)
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = [
        f"GPT-2 with {result['n_parameters'] / 1e6:.3g}M weights ({result.get('weights', 'given')}) on "
        f"{result['device']}, batch 1, {result['new_tokens']} new tokens after a prompt of {result['prompt_tokens']}",
        f"the ceiling is {bench.short(result['ceiling_tokens_s'])} tokens/s: {result['weight_bytes'] / 1e6:.4g} MB of "
        f"fp16 weights a token, at the {bench.short(result['copy_gb_s'])} GB/s of the device's own copy",
    ]
    for row in table:
        lines.append("  " + row[0].ljust(widths[0]) + "".join(f"  {c.rjust(w)}" for c, w in zip(row[1:], widths[1:])))
    for row in result["rows"]:
        lines += [f"  {row['name']}: {row[key]}" for key in ("note", "error") if row[key]]
    return "\n".join(lines)


def _compared(row, result):
    """How a row's tokens compare with the reference's."""
    check = row["check"]
    if not check["compared"]:
        return "–"
    if row["name"] == result["reference"]:
        return "the reference"
    if check["first_difference"] is None:
        return f"all {check['compared']} equal"
    return f"{check['first_difference']} of {check['compared']} equal"


def _numbers(text):
    """For argparse: "1,8" -> (1, 8), all at least 1."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from 1 on, with commas between")
    return tuple(int(part) for part in text.split(","))


def _names(known):
    """A type for argparse: "a,b" -> ["a", "b"], each one of ``known``; "none" or "" -> []."""

    def names(text):
        found = [name for name in text.split(",") if name and name != "none"]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)} (or none)")
        return found

    return names


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/gpt2.py", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a weight file; by default 124M random "
                        "weights on a GPU, without one the tiny model")
    parser.add_argument("--levels", type=_names(LEVELS), default=list(LEVELS), help=f"of {','.join(LEVELS)}; or none")
    parser.add_argument(
        "--peers", type=_names(other.PEERS), default=list(other.PEERS), help=f"of {','.join(other.PEERS)}; or none"
    )
    parser.add_argument("--tokens", type=int, default=256, help="new tokens (256)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (16)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    parser.add_argument("--skip-prefill", action="store_true", help="measure decoding only")
    options = parser.parse_args(argv)
    if options.weights is None and common.BACKEND != "gpu":
        options.weights = DATA_DIR / "tiny-gpt2.bin"
    try:
        config, tensors = load_weights(options.weights) if options.weights else (GPT2_124M, None)
    except WeightsError as error:
        parser.error(str(error))
    if options.tokens < 2 or options.prompt < 1 or options.prompt + options.tokens > config.n_ctx:
        parser.error(
            f"--prompt={options.prompt} --tokens={options.tokens}: at least 1 and 2, and {config.n_ctx} together"
        )
    path = options.out / device_folder() / "gpt2.json"
    try:
        make_output(path, "--out")
    except FileError as error:
        parser.error(str(error))
    tensors = tensors or random_weights(config)
    what = options.levels, options.peers
    with tqdm(total=steps(config, *what, options.skip_prefill), disable=None) as bar:

        def progress(text):
            bar.set_description(text)
            bar.update()

        found = measure(config, tensors, *what, options.tokens, options.prompt, options.skip_prefill, progress)
    weights = options.weights.name if options.weights else "random, standard deviation 0.02, seed 0"
    result = {"weights": weights, **found}
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{format_table(result)}\n\nwritten: {path}")
    raise SystemExit(1 if any(row["error"] for row in result["rows"]) else 0)


if __name__ == "__main__":
    main()
