"""The engine in one run on one device, beside a compiled static batch in torch and transformers' continuous batching.

    python benchmarks/engine.py [--only decode,requests,sampling,prefix,gap,deterministic,run] [--sequences 1,8,32]
                                [--peers compiled,tuned,transformers] [--engine kv|fast] [--weights FILE]
                                [--repeats 3] [--out benchmarks/results]

Prints the figures and writes them to ``<out>/<device>/engine.json``. On a GPU it is the level ``fast`` and GPT-2's size
(124M) with random weights, on which the time does not depend; without one the level ``kv``, the tiny model, and sizes
that show that it works. `SIZES` has all numbers of a question:

- *decode*: tokens a second while n sequences decode, and the share of the floor: the time that the device's own copy
  would take for the bytes of a step, weights once and each sequence's keys and values, all in float16.
- *requests*: many requests at once, of mixed prompts. The same number of new tokens for each: how much of the rate of
  decoding is left; different numbers: how many times the tokens a second of static batches.
- *sampling*: the rate of decoding with top-k and top-p over that of the most likely token.
- *prefix*: requests that begin alike: time to the first token and tokens a second with the prefix cache over without.
- *gap*: a long prompt arrives while others decode: the longest time between two tokens of theirs over the median.
- *deterministic*: the rate of decoding with ``deterministic=True`` over that without.
- *run*: what ``run.py`` says of itself, in a process of its own, over decoding one sequence here.

How a time is taken: what is timed has run before until all its graphs are recorded, which a step's is the second time
it occurs. Decoding is timed from the moment that the host has a token of every sequence to the last at which all still
go on, so prompts are not in it. Figures are medians over the repeats, with the lowest and the highest. Afterwards a few
sequences of each are looked up in a float32 forward pass of torch: their tokens must be those that it would take.

Exit codes: 0 all measured; 1 something failed or made wrong tokens (its error stands in the table and in the file, the
rest is measured); 2 bad arguments.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before numba.cuda)

# isort: split
import numpy as np  # noqa: E402
from numba import cuda  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import batched_peers, peers, start_time  # noqa: E402
from benchmarks.gpt2 import GPT2_124M, _brief, _digits, _free, _names, _packages, _summary, weight_bytes  # noqa: E402
from benchmarks.ladders import RESULTS, device_folder  # noqa: E402
from ch14_mini_llm.engine.engine import UPLOADS, Engine  # noqa: E402
from ch14_mini_llm.engine.request import Request, Sampling  # noqa: E402
from ch14_mini_llm.engine.sizes import LEVELS  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import DATA_DIR, load_weights, save_weights  # noqa: E402
from common import bench  # noqa: E402

SEED = 14
SIZES = {
    "gpu": {
        "decode": {"sequences": (1, 8, 32, 64, 128, 256), "prompt": 128, "new": 200, "idle": 32},
        "requests": {"requests": 256, "prompt": (16, 256), "new": 128, "mixed": (16, 256)},
        "sampling": {"sequences": (1, 32)},
        "prefix": {"requests": 64, "shared": 512, "own": 16, "new": 32},
        "gap": {"sequences": 16, "prompt": 1000, "new": 8},
        "deterministic": {},
        "run": {"new": 512},
    },
    "cpu": {
        "decode": {"sequences": (1, 4), "prompt": 16, "new": 12, "idle": 4},
        "requests": {"requests": 8, "prompt": (4, 16), "new": 8, "mixed": (2, 12)},
        "sampling": {"sequences": (1, 4)},
        "prefix": {"requests": 4, "shared": 64, "own": 4, "new": 4},
        "gap": {"sequences": 4, "prompt": 100, "new": 4},
        "deterministic": {},
        "run": {"new": 32},
    },
}  # fmt: skip
DRAWS = {"top_k": {"temperature": 1.0, "top_k": 40}, "top_p": {"temperature": 1.0, "top_p": 0.95}}
CHECKED = 4  # sequences of each figure whose tokens are judged
GAP = 0.1  # how far the logit of a chosen token may be from the largest: float16 rounds, and a wrong token is far off
WARM = {"kv": 1, "fast": 2}  # runs before those that are timed


class Wrong(Exception):
    """Tokens that a float32 forward pass would not take."""


class Run:
    """What became of requests on an engine: of each, in order, ``tokens`` and the time at which each one came.

    start: when they were submitted; end: the last token. later: (steps, a request submitted when so many have run).
    """

    def __init__(self, engine, requests, later=None):
        cuda.synchronize()
        self.start = time.perf_counter()
        ids, log = [engine.submit(request) for request in requests], []
        while not engine.idle:
            if later and len(log) == later[0]:
                ids.append(engine.submit(later[1]))
            log.append((engine.step(), time.perf_counter()))
        places = {id: i for i, id in enumerate(ids)}
        self.tokens, self.stamps = ([[] for _ in ids] for _ in range(2))
        for outputs, stamp in log:
            for output in outputs:
                if output.finish_reason not in (None, "length"):
                    raise RuntimeError(f"a request ended with {output.finish_reason!r}: {output.error}")
                self.tokens[places[output.id]] += output.tokens
                self.stamps[places[output.id]] += [stamp] * len(output.tokens)
        self.end = max(stamps[-1] for stamps in self.stamps)
        self.rate = sum(map(len, self.tokens)) / (self.end - self.start)  # prompts included


class Bench:
    """A model on the device, and what the questions share. progress(text): called before each measurement."""

    def __init__(self, config, tensors, level, sizes, repeats=3, peers=(), weights=None, progress=lambda text: None):
        self.config, self.tensors, self.level, self.sizes = config, tensors, level, sizes
        self.repeats, self.peers, self.weights, self.progress = repeats, peers, weights, progress
        self.device = "cuda" if common.BACKEND == "gpu" else "cpu"
        self.copy, self.model = bench.copy_bandwidth(), UPLOADS[level](config, tensors)
        self.judge, self._rates = batched_peers.Judge(config, tensors, self.device), {}

    def engine(self, **options):
        """A new engine; without a prefix cache, so that the same requests take the same time again."""
        gc.collect()  # the last one's pages
        return Engine(self.model, level=self.level, **{"prefix_cache": False, **options})

    def prompt(self, length, *seed):
        """``length`` random tokens, the same for the same numbers ``seed``."""
        return np.random.default_rng([SEED, *seed]).integers(0, self.config.vocab_size, length).tolist()

    def timed(self, engine, requests):
        """`Run`s of the same ``requests``, after some that are not counted."""
        for _ in range(WARM[self.level]):
            Run(engine, requests)
        return [Run(engine, requests) for _ in range(self.repeats)]

    def check(self, prompts, tokens, among=1):
        """The largest gap of a few of these sequences, see `Judge`. Raises `Wrong` if rounding does not explain it."""
        chosen = sorted({round(i) for i in np.linspace(0, len(prompts) - 1, CHECKED)})
        gap = max(self.judge.gap(prompts[i], tokens[i], among) for i in chosen)
        if not gap <= GAP:
            raise Wrong(f"wrong tokens: a logit is {gap:.3g} below the one that float32 takes; {GAP} is rounding")
        return _digits(gap)

    def requests(self, n, draw=None):
        """``n`` requests of the question *decode*."""
        size = self.sizes["decode"]
        prompts = [self.prompt(size["prompt"], i) for i in range(n)]
        draws = [draw and Sampling(seed=i, **DRAWS[draw]) for i in range(n)]
        return [Request(prompt, size["new"], sampling) for prompt, sampling in zip(prompts, draws)]

    def rate(self, n, draw=None, deterministic=False):
        """The rate of decoding ``n`` sequences, measured once: ``tokens_s``, ``context`` (keys of a row, in the mean) and
        ``worst_gap``. Raises `Wrong`."""
        key = n, draw, deterministic
        if key not in self._rates:
            self.progress(" ".join([f"{n} at once", draw or "", "deterministic" if deterministic else ""]).strip())
            requests = self.requests(n, draw)
            runs = self.timed(self.engine(max_batch=n, deterministic=deterministic), requests)
            if draw and any(run.tokens != runs[0].tokens for run in runs):
                raise Wrong(f"wrong tokens: with {draw} and the same seeds, {n} sequences are not the same again")
            rates, made = zip(*(batched_peers.steady(run.stamps) for run in runs))
            found = {"tokens_s": _summary(rates), "context": _digits(len(requests[0].tokens) + made[0])}
            if draw != "top_p":  # of which the cut is a matter of rounding
                among = DRAWS[draw]["top_k"] if draw else 1
                found["worst_gap"] = self.check([one.tokens for one in requests], runs[0].tokens, among)
            self._rates[key] = found
        return self._rates[key]

    def share(self, n, context, tokens_s):
        """Which share of a step's time the device's own copy would take for its bytes."""
        head = self.model.n_kv_head * self.model.head_dim
        n_bytes = weight_bytes(self.config) + n * context * 2 * self.config.n_layer * head * 2
        return _digits(n_bytes / (self.copy * 1e9) * tokens_s / n)


# --- the questions ---------------------------------------------------------------------------------------------------


def attempt(row, work):
    """``row`` and what ``work()`` returns, or its error: what fails must not cost the other figures."""
    try:
        return row | {"error": None} | work()
    except Exception as error:
        traceback.print_exc()
        return row | {"error": _brief(error)}
    finally:
        _free()


def decode(b, sequences, prompt, new, idle):
    """How fast n sequences decode: ours, then the peers."""
    rows = [{"name": "engine", "sequences": n, "error": None, **b.rate(n)} for n in sequences]
    theirs = {}
    if set(b.peers) & set(batched_peers.SETTINGS):
        theirs[batched_peers.StaticBatch.name] = lambda prompts: batched_peers.static_row(b, prompts, new)
    if "transformers" in b.peers:
        pairs = lambda prompts: [(tokens, new) for tokens in prompts]
        theirs[batched_peers.PagedTransformers.name] = lambda prompts: batched_peers.paged_row(b, pairs(prompts), True)
    for name, measure_row in theirs.items():
        for n in sequences:
            prompts = [request.tokens for request in b.requests(n)]
            row = {"name": name, "sequences": n, "context": prompt + new / 2}
            rows.append(attempt(row, lambda prompts=prompts, measure_row=measure_row: measure_row(prompts)))
    for row in rows:
        if not row["error"]:
            row["share"] = b.share(row["sequences"], row["context"], row["tokens_s"][0])
    return {"rows": rows, "idle": idle_share(b, idle)}


def idle_share(b, n):
    """The share of a step of ``n`` sequences in which the device has nothing to do; None where steps are no graphs."""
    if common.BACKEND != "gpu" or b.level != "fast":
        return None
    engine, requests = b.engine(max_batch=n), b.requests(n)
    b.progress(f"{n} at once, a step's graph")
    b.timed(engine, requests)
    for request in requests:
        engine.submit(request)
    made = 0
    while made < n * requests[0].max_new // 2:  # half-way, as in the mean of what the rate is taken of
        made += sum(len(output.tokens) for output in engine.step())
    cuda.synchronize()
    graphs = {shape.rows: graph for shape, graph in engine.runner._graphs.items() if shape.single and graph is not None}
    device = statistics.median(graphs[max(graphs)].seconds() for _ in range(5))  # moves rows on: this engine has had it
    step = n / b.rate(n)["tokens_s"][0]
    return {"sequences": n, "device_ms": _digits(1e3 * device), "step_ms": _digits(1e3 * step), "share": _digits(1 - device / step)}


def requests(b, requests, prompt, new, mixed):
    """Requests of mixed lengths, submitted at once, all of which may run at once."""
    rng = np.random.default_rng(SEED)
    draw = lambda low, high: [int(value) for value in rng.integers(low, high + 1, requests)]
    prompts = [b.prompt(length, 1, i) for i, length in enumerate(draw(*prompt))]
    alike, others = ([Request(*one) for one in zip(prompts, news)] for news in ([new] * requests, draw(*mixed)))
    rates, rows = {}, []
    for name, asked, static in ("alike", alike, False), ("continuous", others, False), ("static", others, True):
        b.progress(f"{requests} requests, {name}")
        runs = b.timed(b.engine(max_batch=requests, static=static), asked)
        rates[name] = [run.rate for run in runs]
        gap = b.check(prompts, runs[0].tokens)
        rows.append({"name": name, "error": None, "tokens_s": _summary(rates[name]), "worst_gap": gap})
    if "transformers" in b.peers:
        pairs = [(one.tokens, one.max_new) for one in others]
        row = {"name": batched_peers.PagedTransformers.name}
        rows.append(attempt(row, lambda: batched_peers.paged_row(b, pairs)))
    decoding = b.rate(requests)["tokens_s"][0]
    return {
        "max_batch": requests, "rows": rows, "over_decode": _digits(rows[0]["tokens_s"][0] / decoding),
        "over_static": _summary([ours / theirs for ours, theirs in zip(rates["continuous"], rates["static"])]),
    }  # fmt: skip


def sampling(b, sequences):
    """What it costs to draw."""
    rows = []
    for draw in DRAWS:
        for n in sequences:
            found, greedy = b.rate(n, draw), b.rate(n)
            ratio = _digits(found["tokens_s"][0] / greedy["tokens_s"][0])
            rows.append({"name": draw, "sequences": n, "tokens_s": found["tokens_s"], "over_greedy": ratio})
    return {"rows": rows}


def prefix(b, requests, shared, own, new):
    """Requests that begin alike, behind one that has left its keys and values in the cache."""
    rows, common_part = [], b.prompt(shared, 2)
    for cached in True, False:
        b.progress(f"{requests} requests that begin alike, {'with' if cached else 'without'} the prefix cache")
        engine, runs = b.engine(max_batch=requests, prefix_cache=cached), []
        Run(engine, [Request(common_part, 1)])
        for number in range(WARM[b.level] + b.repeats):  # each with new ends, or the cache would have them as well
            asked = [Request(common_part + b.prompt(own, 3, number, i), new) for i in range(requests)]
            hits = engine.stats()["prefix_cache_hits"]
            runs.append(Run(engine, asked))
            hits = (engine.stats()["prefix_cache_hits"] - hits) / requests
        runs = runs[WARM[b.level] :]
        first = [1e3 * statistics.mean(stamps[0] - run.start for stamps in run.stamps) for run in runs]
        gap = b.check([one.tokens for one in asked], runs[-1].tokens)
        rows.append({"prefix_cache": cached, "cached_tokens": _digits(hits), "first_token_ms": _summary(first),
                     "tokens_s": _summary([run.rate for run in runs]), "worst_gap": gap})  # fmt: skip
    ratios = {f"{key}_ratio": _digits(rows[0][key][0] / rows[1][key][0]) for key in ("first_token_ms", "tokens_s")}
    return {"rows": rows, **ratios}


def gap(b, sequences, prompt, new):
    """A long prompt that arrives when sequences have made half of their tokens. timeline: of the last run, a step each."""
    b.progress("a long prompt in between")
    asked, late = b.requests(sequences), Request(b.prompt(prompt, 4), new)
    engine, worst, median = b.engine(max_batch=sequences + 1), [], []
    for number in range(WARM[b.level] + b.repeats):
        steps, begun = [], time.perf_counter()
        engine.on_step = lambda plan, outputs, steps=steps: steps.append((time.perf_counter(), plan))
        run = Run(engine, asked, later=(asked[0].max_new // 2, late))
        if number >= WARM[b.level]:
            gaps = [1e3 * (after - before) for stamps in run.stamps[:-1] for before, after in zip(stamps, stamps[1:])]
            worst.append(max(gaps))
            median.append(statistics.median(gaps))
    ends, plans = zip(*steps)
    kinds = ["none" if plan is None else _kind(plan) for plan in plans]
    timeline = {
        "ms": [_digits(1e3 * (end - start)) for start, end in zip((begun, *ends), ends)],
        "rows": [plan.rows if plan is not None else 0 for plan in plans], "kinds": kinds,
    }  # fmt: skip
    return {
        "worst_ms": _summary(worst), "median_ms": _summary(median),
        "ratio": _summary([most / usual for most, usual in zip(worst, median)]),
        "worst_gap": b.check([one.tokens for one in (*asked, late)], run.tokens),
        "timeline": {name: " ".join(map(str, values)) for name, values in timeline.items()},  # a line of the file each
    }  # fmt: skip


def _kind(plan):
    """What a step runs over: "decode", "prompt", or both, "mixed"."""
    prompts = {part.start < part.sequence.n_prompt for part in plan.parts}
    return "mixed" if len(prompts) == 2 else "prompt" if prompts.pop() else "decode"


def deterministic(b):
    """What it costs that a request's tokens do not depend on who runs beside it."""
    rows = []
    for n in b.sizes["decode"]["sequences"]:
        found, usual = b.rate(n, deterministic=True), b.rate(n)
        ratio = _digits(found["tokens_s"][0] / usual["tokens_s"][0])
        rows.append({"sequences": n, "tokens_s": found["tokens_s"], "over_default": ratio})
    return {"rows": rows}


def run(b, new):
    """`run.py` in a process of its own, with what it needs to load and to record in its times."""
    with tempfile.TemporaryDirectory() as folder:
        weights = b.weights or Path(folder, "weights.bin")
        if b.weights is None:
            save_weights(weights, b.config, b.tensors)
        arguments = [f"--engine={b.level}", f"--weights={Path(weights).resolve()}", f"--max_new={new}", "--ignore_eos"]
        arguments.append("--tokens=" + ",".join(map(str, b.prompt(4, 5))))
        told = []
        for _ in range(1 + b.repeats):  # the first may have to compile
            b.progress("run.py")
            told.append(json.loads(start_time._run("ch14_mini_llm/run.py", *arguments, "--json")))
    rates, firsts = ([one[key] for one in told[1:]] for key in ("tokens_per_s", "first_token_s"))
    tokens = told[-1]["tokens"]
    return {
        "tokens_s": _summary(rates), "first_token_ms": _summary([1e3 * seconds for seconds in firsts]),
        "over_decode": _digits(statistics.median(rates) / b.rate(1)["tokens_s"][0]),
        "worst_gap": b.check([tokens[:4]], [tokens[4:]]),
    }  # fmt: skip


ASKED = {question.__name__: question for question in (decode, requests, sampling, prefix, gap, deterministic, run)}


def measure(config, tensors, level, sizes, only, progress=lambda text: None, **options):
    """The figures of the questions ``only`` as a dict for JSON; a question's has the key ``error``, None if all is well.

    config, tensors: as `load_weights` gives them. sizes: of each question, see `SIZES`. options: see `Bench`.
    """
    load = [_digits(os.getloadavg()[0])] if hasattr(os, "getloadavg") else None  # of the machine: was it quiet?
    progress("device copy")
    b = Bench(config, tensors, level, sizes, progress=progress, **options)
    found = {name: attempt(sizes[name], lambda name=name: ASKED[name](b, **sizes[name])) for name in only}
    return {
        "device": bench.device_name(), "backend": common.BACKEND, "level": level, "packages": _packages(),
        "config": asdict(config), "n_parameters": config.n_parameters, "repeats": b.repeats, "copy_gb_s": b.copy,
        "weight_bytes": weight_bytes(config), **found,
        "load": load and [*load, _digits(os.getloadavg()[0])], "cores": os.cpu_count(),
    }  # fmt: skip


def errors(result):
    """The errors of a `measure`: of questions, and of peers within them."""
    asked = [result[name] for name in ASKED if name in result]
    return [one["error"] for question in asked for one in (question, *question.get("rows", [])) if one.get("error")]


# --- the table -------------------------------------------------------------------------------------------------------


def format_table(result):
    """The figures of `measure` for a terminal."""
    lines = [
        f"{result['device']}, {result['model']}, level {result['level']}: medians of {result['repeats']}",
        f"the floor is the device's own copy, {bench.short(result['copy_gb_s'])} GB/s, of what a step must read: "
        f"{result['weight_bytes'] / 1e6:.4g} MB of weights, and each sequence's keys and values",
    ]
    for name in ASKED:
        if name in result:
            question = result[name]
            found = [f"failed: {question['error']}"] if question["error"] else LINES[name](question)
            lines += [f"  {name if i == 0 else '':14}{line}" for i, line in enumerate(found)]
    return "\n".join(lines)


def _row(row, ending=""):
    """A row of rates; ending: what else there is to say of it, if it has not failed."""
    said = f"failed: {row['error']}" if row.get("error") else "{:9.1f} tokens/s".format(row["tokens_s"][0]) + ending
    number = f"{row['sequences']:4} at once" if "sequences" in row else ""
    return f"{row.get('name', ''):34}{number:13}{said}"


LINES = {  # of a question's figures
    "decode": lambda found: [
        *(_row(row, f", {100 * row.get('share', 0):5.1f} % of the floor") for row in found["rows"]),
        *([f"of a step of {found['idle']['sequences']}, the device is idle {100 * found['idle']['share']:.1f} %"]
          if found["idle"] else []),
    ],
    "requests": lambda found: [
        *map(_row, found["rows"]),
        f"alike: {found['over_decode']:.2f} of the rate of decoding {found['max_batch']}; "
        "continuous is {:.2f} ({:.2f} … {:.2f}) times as fast as static".format(*found["over_static"]),
    ],
    "sampling": lambda found: [_row(row, f", {row['over_greedy']:.2f} of greedy") for row in found["rows"]],
    "prefix": lambda found: [
        *(_row(row, ", first token after {:.4g} ms".format(row["first_token_ms"][0])) for row in found["rows"]),
        f"first token after {found['first_token_ms_ratio']:.2f} of the time, {found['tokens_s_ratio']:.2f} times the rate",
    ],
    "gap": lambda found: ["{:.4g} ms at worst, {:.4g} in the median: {:.2f} times".format(
        found["worst_ms"][0], found["median_ms"][0], found["ratio"][0])],
    "deterministic": lambda found: [_row(row, f", {row['over_default']:.2f} of the default") for row in found["rows"]],
    "run": lambda found: [_row(found, ", {:.2f} of decoding one here, first token after {:.4g} ms".format(
        found["over_decode"], found["first_token_ms"][0]))],
}  # fmt: skip


# --- the program -----------------------------------------------------------------------------------------------------


def numbers(text):
    """For argparse: "1,8" -> (1, 8), all at least 1."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from 1 on, with commas between")
    return tuple(int(part) for part in text.split(","))


def longest(sizes, only):
    """Tokens of the longest sequence of the questions ``only``."""
    tokens = {
        "decode": lambda prompt, new, **_: prompt + new, "prefix": lambda shared, own, new, **_: shared + own + new,
        "requests": lambda prompt, new, mixed, **_: prompt[1] + max(new, mixed[1]),
        "gap": lambda prompt, new, **_: prompt + new, "run": lambda new: 4 + new,
    }  # fmt: skip
    return max(tokens[name](**sizes[name]) for name in {"decode", *only} if name in tokens)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/engine.py", description=__doc__.split("\n")[0])
    level, known = "fast" if common.BACKEND == "gpu" else "kv", batched_peers.PEERS
    sizes = {name: dict(size) for name, size in SIZES[common.BACKEND].items()}
    parser.add_argument("--only", type=_names(ASKED), default=list(ASKED), help=f"of {','.join(ASKED)}")
    parser.add_argument("--sequences", type=numbers, metavar="N,…", help="how many decode at once, instead of the usual")
    parser.add_argument("--peers", type=_names(known), default=list(known), help=f"of {','.join(known)}; or none")
    parser.add_argument("--engine", choices=list(LEVELS), default=level, help=f"the level ({level})")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a weight file; by default 124M random "
                        "weights on a GPU, without one the tiny model")
    parser.add_argument("--repeats", type=int, default=3, help="runs that count, of each figure (3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    options = parser.parse_args(argv)
    if options.repeats < 1 or not options.only:
        parser.error(f"--repeats={options.repeats} --only={','.join(options.only)}: at least one of each")
    if options.sequences:
        sizes["decode"]["sequences"] = options.sequences
    weights = options.weights or (None if common.BACKEND == "gpu" else DATA_DIR / "tiny-gpt2.bin")
    path = options.out / device_folder() / "engine.json"
    try:
        make_output(path, "--out")
        config, tensors = load_weights(weights) if weights else (GPT2_124M, peers.random_weights(GPT2_124M))
    except (FileError, WeightsError) as error:
        parser.error(str(error))
    if config.n_ctx < longest(sizes, options.only):
        parser.error(f"--weights: a context of {config.n_ctx} is too short; {longest(sizes, options.only)} is needed")
    with tqdm(total=None, disable=None) as bar:

        def progress(text):
            bar.set_description(text)
            bar.update()

        what = {"repeats": options.repeats, "peers": options.peers, "weights": weights}
        result = measure(config, tensors, options.engine, sizes, options.only, progress, **what)
    result = {"model": weights.name if weights else "GPT-2 124M, random weights", **result}
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{format_table(result)}\n\nwritten: {path}")
    raise SystemExit(1 if errors(result) else 0)


if __name__ == "__main__":
    main()
