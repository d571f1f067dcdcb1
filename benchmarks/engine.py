"""The engine on one device, in one run, compared with a compiled static batch and transformers' continuous batching.

    python benchmarks/engine.py [--only decode,requests,sampling,prefix,gap,deterministic,run] [--sequences 1,8,32]
                                [--peers compiled,tuned,transformers] [--engine kv|fast] [--weights FILE]
                                [--shape smollm2-135m|llama-3.2-1b|llama-2-7b] [--repeats 3] [--out benchmarks/results]

Prints the figures and writes them to ``<out>/<device>/engine.json``. On a GPU it takes the level ``fast`` and GPT-2's
size (124M) with random weights, on which the time does not depend; without one the level ``kv``, the tiny model, and
sizes that only show that it works. ``--shape``: a published Llama's size instead, with random weights made on the GPU;
by default how fast one sequence decodes, in ``engine_<shape>.json``. `SIZES` has the numbers of each question:

- *decode*: tokens a second while n sequences decode, and the share of the floor: the time that the device's own copy
  takes for the bytes of a step, the weights once and each sequence's keys and values, all in float16.
- *requests*: prompts of mixed lengths, all at once. With equally many new tokens: what is left of the rate of decoding;
  with different numbers: how many times the rate of static batches.
- *sampling*: the rate of decoding with top-k and with top-p over that with the most likely token.
- *prefix*: requests that begin alike: time to the first token, and rate, with the prefix cache over without.
- *gap*: a long prompt arrives while others decode: the longest time between two tokens of theirs over the median.
- *deterministic*: the rate of decoding with ``deterministic=True`` over that without.
- *run*: what ``run.py`` says of itself, in a process of its own, over decoding one sequence here.

How a time is taken: what is timed has run before, until the graphs of its steps are recorded, the second time that each
occurs. The clock of decoding runs from the moment at which the host has a token of every sequence to the last at which
all still go on; prompts are not in it. Figures are medians over the repeats, with the lowest and the highest.
Afterwards some sequences are looked up in a float32 forward pass of torch: it must take the same tokens.

Exit codes: 0 all measured; 1 something failed, or made wrong tokens (its error stands in the table and in the file, the
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
import torch  # noqa: E402
from numba import cuda  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import batched_peers as batched  # noqa: E402
from benchmarks import start_time  # noqa: E402
from benchmarks.gpt2 import GPT2_124M, _brief, _digits, _free, _names, _numbers, _packages, _summary, weight_bytes  # noqa: E402
from benchmarks.ladders import RESULTS, device_folder  # noqa: E402
from benchmarks.random_gpt2 import random_weights  # noqa: E402
from benchmarks.torch_llama import SHAPES, random_llama, to_numba  # noqa: E402
from ch14_mini_llm.engine.engine import Engine  # noqa: E402
from ch14_mini_llm.engine.models import MODELS  # noqa: E402
from ch14_mini_llm.engine.request import Request, Sampling  # noqa: E402
from ch14_mini_llm.engine.sizes import LEVELS  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.upload import llama_float16  # noqa: E402
from ch14_mini_llm.model.weights import DATA_DIR, load_weights, save_weights  # noqa: E402
from ch14_mini_llm.start import calm_collector  # noqa: E402
from common import bench  # noqa: E402

SEED = 14
SIZES = {  # of the questions; prompt, new: tokens, or from … to
    "gpu": {
        "decode": {"sequences": (1, 8, 32, 64, 128, 256), "prompt": 128, "new": 200, "idle_at": 32},
        "requests": {"requests": 256, "prompt": (16, 256), "new": 128, "mixed": (16, 256)},
        "sampling": {"sequences": (1, 32)},
        "prefix": {"requests": 64, "shared": 512, "own": 16, "new": 32},
        "gap": {"sequences": 16, "prompt": 1000, "new": 8},
        "deterministic": {},
        "run": {"new": 512},
    },
    "cpu": {
        "decode": {"sequences": (1, 4), "prompt": 16, "new": 10, "idle_at": 4},
        "requests": {"requests": 6, "prompt": (4, 16), "new": 6, "mixed": (2, 12)},
        "sampling": {"sequences": (4,)},
        "prefix": {"requests": 4, "shared": 64, "own": 4, "new": 2},
        "gap": {"sequences": 4, "prompt": 100, "new": 2},
        "deterministic": {},
        "run": {"new": 16},
    },
}  # fmt: skip
DRAWS = {"top_k": {"temperature": 1.0, "top_k": 40}, "top_p": {"temperature": 1.0, "top_p": 0.95}}
CHECKED = 4  # sequences of each figure whose tokens are judged
GAP = 0.1  # how far the logit of a chosen token may be below the largest: float16 rounds, a wrong token is far off
WARM = {"kv": 1, "fast": 2}  # runs before those that are timed


class Wrong(Exception):
    """Tokens that a float32 forward pass would not take."""


class Run:
    """What became of requests on an engine: of each, in order, ``tokens`` and ``stamps``, the times at which they came.

    start: the time at which they were submitted. rate: tokens a second from then to the last token. later: (number of
    steps, a request that is submitted when so many have run). Raises RuntimeError if a request fails.
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
        self.rate = sum(map(len, self.tokens)) / (max(stamps[-1] for stamps in self.stamps) - self.start)


class Bench:
    """A model on the device, and what the questions share.

    sizes: of each question, as in `SIZES`. peers: of `batched_peers.PEERS`. weights: the model's file, None if there is
    none. progress(text): called before each measurement.
    """

    def __init__(self, config, tensors, level, sizes, repeats=3, peers=(), weights=None, progress=lambda text: None):
        self.config, self.tensors, self.level, self.sizes = config, tensors, level, sizes
        self.repeats, self.peers, self.weights, self.progress = repeats, peers, weights, progress
        self.device = "cuda" if common.BACKEND == "gpu" else "cpu"
        self.copy = bench.copy_bandwidth()
        if isinstance(next(iter(tensors.values())), torch.Tensor):
            self.model = llama_float16(config, tensors, to_device=to_numba)
        else:
            self.model = MODELS[level](config, tensors)
        self.judge, self._rates = batched.Judge(config, tensors, self.device), {}
        gc.collect()
        calm_collector()  # as run.py does

    def engine(self, **options):
        """A new engine; without a prefix cache, so that the same requests take the same time again."""
        gc.collect()  # the last one's pages
        return Engine(self.model, level=self.level, **{"prefix_cache": False, **options})

    def prompt(self, length, *seed):
        """``length`` random tokens; for the same numbers ``seed`` the same."""
        return np.random.default_rng([SEED, *seed]).integers(0, self.config.vocab_size, length).tolist()

    def requests(self, n, draw=None):
        """``n`` requests of the question *decode*; draw: of `DRAWS`, or None for the most likely token."""
        size = self.sizes["decode"]
        draws = [Sampling(seed=i, **DRAWS[draw]) if draw else None for i in range(n)]
        return [Request(self.prompt(size["prompt"], i), size["new"], sampling) for i, sampling in enumerate(draws)]

    def timed(self, engine, requests):
        """The `Run`s of the same ``requests`` that count, after some that do not."""
        return [Run(engine, requests) for _ in range(WARM[self.level] + self.repeats)][WARM[self.level] :]

    def check(self, prompts, tokens, among=1):
        """The largest gap of some of these sequences, see `Judge`. Raises `Wrong` if it is more than rounding."""
        chosen = sorted({round(i) for i in np.linspace(0, len(prompts) - 1, CHECKED)})
        gap = max(self.judge.gap(prompts[i], tokens[i], among) for i in chosen)
        if not gap <= GAP:
            raise Wrong(f"wrong tokens: a logit is {gap:.3g} below that of float32's token; rounding is {GAP} at most")
        return _digits(gap)

    def rate(self, n, draw=None, deterministic=False):
        """How fast ``n`` sequences decode, measured once: ``tokens_s``, ``context`` (keys that a row sees, in the mean)
        and ``worst_gap``. Raises `Wrong`."""
        key = n, draw, deterministic
        if key not in self._rates:
            self.progress(" ".join(filter(None, [f"{n} at once", draw, deterministic and "deterministic"])))
            requests = self.requests(n, draw)
            prompts = [request.tokens for request in requests]
            runs = self.timed(self.engine(max_batch=n, deterministic=deterministic), requests)
            if (draw or deterministic) and any(run.tokens != runs[0].tokens for run in runs):
                raise Wrong(f"wrong tokens: {n} sequences, {draw or 'deterministic'}, are not the same again")
            rates, made = zip(*(batched.steady(run.stamps) for run in runs))
            found = {"tokens_s": _summary(rates), "context": _digits(len(prompts[0]) + made[0])}
            if draw != "top_p":  # with random weights it leaves most of the vocabulary
                among = DRAWS[draw]["top_k"] if draw else 1
                found["worst_gap"] = self.check(prompts, runs[-1].tokens, among)
            self._rates[key] = found
        return self._rates[key]

    def share(self, n, context, tokens_s):
        """The share of a step's time that the device's own copy takes for its bytes."""
        cached = context * 2 * self.config.n_layer * self.model.n_kv_head * self.model.head_dim * 2
        return _digits((weight_bytes(self.config) + n * cached) / (self.copy * 1e9) * tokens_s / n)


def attempt(row, work):
    """``row`` and what ``work()`` returns, or its error: what fails must not cost the other figures."""
    try:
        return row | {"error": None} | work()
    except Exception as error:
        traceback.print_exc()
        return row | {"error": _brief(error)}
    finally:
        _free()


# --- the questions ---------------------------------------------------------------------------------------------------


def decode(b, sequences, prompt, new, idle_at):
    """How fast n sequences decode: ours, then the peers."""
    rows = [attempt({"name": "engine", "sequences": n}, lambda n=n: b.rate(n)) for n in sequences]
    theirs = {}
    if set(b.peers) & set(batched.SETTINGS):
        theirs[batched.StaticBatch.name] = lambda prompts: batched.static_row(b, prompts, new)
    if "transformers" in b.peers:
        pairs = lambda prompts: [(tokens, new) for tokens in prompts]
        theirs[batched.PagedTransformers.name] = lambda prompts: batched.paged_row(b, pairs(prompts), decoding=True)
    for name, work in theirs.items():
        for n in sequences:
            prompts = [request.tokens for request in b.requests(n)]
            row = {"name": name, "sequences": n, "context": prompt + new / 2}
            rows.append(attempt(row, lambda work=work, prompts=prompts: work(prompts)))
    for row in rows:
        if not row["error"]:
            row["share"] = b.share(row["sequences"], row["context"], row["tokens_s"][0])
    found = {"rows": rows, "idle": None}
    if b.level == "fast":  # whose steps are graphs
        found["idle"] = attempt({"name": "the graph of a step", "sequences": idle_at}, lambda: idle(b, idle_at))
    return found


def idle(b, n):
    """For which share of a step of ``n`` sequences the device has nothing to do, as they make half of their tokens."""
    b.progress(f"{n} at once, the graph of a step")
    engine, requests, made = b.engine(max_batch=n), b.requests(n), 0
    b.timed(engine, requests)
    shapes, stamps, run_shape = [], [], engine.runner.run
    engine.runner.run = lambda shape, *rest: shapes.append(shape) or run_shape(shape, *rest)
    for request in requests:
        engine.submit(request)
    while made < n * requests[0].max_new // 2:
        made += sum(len(output.tokens) for output in engine.step())
        stamps.append(time.perf_counter())
    cuda.synchronize()
    graph = engine.runner._graphs[shapes[-1]]
    device = statistics.median(graph.seconds() for _ in range(5))  # it moves the rows on: nobody takes them further
    step = float(np.median(np.diff(stamps[len(stamps) // 2 :])))  # of those before, which have about as many keys
    return {"step_ms": _digits(1e3 * step), "graph_ms": _digits(1e3 * device), "idle_share": _digits(1 - device / step)}


def requests(b, requests, prompt, new, mixed):
    """Prompts of mixed lengths, submitted at once; all may run at once."""
    rng = np.random.default_rng(SEED)
    draw = lambda low, high: rng.integers(low, high + 1, requests).tolist()
    prompts = [b.prompt(length, 1, i) for i, length in enumerate(draw(*prompt))]
    alike, others = ([Request(*one) for one in zip(prompts, news)] for news in ([new] * requests, draw(*mixed)))
    rates, rows = {}, []
    for name, asked, static in ("alike", alike, False), ("continuous", others, False), ("static", others, True):
        b.progress(f"{requests} requests, {name}")
        engine = b.engine(max_batch=requests, static=static)
        runs = b.timed(engine, asked)
        rates[name] = [run.rate for run in runs]
        computed = round(engine.stats()["rows"] / (WARM[b.level] + b.repeats))
        found = {"tokens_s": _summary(rates[name]), "rows": computed, "worst_gap": b.check(prompts, runs[-1].tokens)}
        rows.append({"name": name, "error": None} | found)
        del engine
    if "transformers" in b.peers:
        pairs = [(one.tokens, one.max_new) for one in others]
        rows.append(attempt({"name": batched.PagedTransformers.name}, lambda: batched.paged_row(b, pairs)))
    return {
        "rows": rows, "over_decode": _digits(rows[0]["tokens_s"][0] / b.rate(requests)["tokens_s"][0]),
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
    rows, alike = [], b.prompt(shared, 2)
    for cached in True, False:
        b.progress(f"{requests} requests that begin alike, {'with' if cached else 'without'} the prefix cache")
        engine, runs = b.engine(max_batch=requests, prefix_cache=cached), []
        Run(engine, [Request(alike, 1)])
        for number in range(WARM[b.level] + b.repeats):  # each time with other ends, or the cache would have them too
            asked = [Request(alike + b.prompt(own, 3, number, i), new) for i in range(requests)]
            before = engine.stats()["prefix_cache_hits"]
            runs.append(Run(engine, asked))
        hits = _digits((engine.stats()["prefix_cache_hits"] - before) / requests)
        runs = runs[WARM[b.level] :]
        first = _summary([1e3 * statistics.mean(times[0] - run.start for times in run.stamps) for run in runs])
        rates, gap = _summary([run.rate for run in runs]), b.check([one.tokens for one in asked], runs[-1].tokens)
        row = {"name": "with the cache" if cached else "without", "cached_tokens": hits, "worst_gap": gap}
        rows.append(row | {"tokens_s": rates, "first_token_ms": first})
    ratios = {f"{key}_ratio": _digits(rows[0][key][0] / rows[1][key][0]) for key in ("first_token_ms", "tokens_s")}
    return {"rows": rows, **ratios}


def gap(b, sequences, prompt, new):
    """A long prompt that arrives when the others have made half of their tokens. timeline: of the last run's steps."""
    b.progress("a long prompt in between")
    asked, late = b.requests(sequences), Request(b.prompt(prompt, 4), new)
    engine, worst, usual = b.engine(max_batch=sequences + 1), [], []
    for _ in range(WARM[b.level] + b.repeats):
        steps = []
        engine.on_step = lambda plan, outputs, steps=steps: steps.append((time.perf_counter(), plan))
        run = Run(engine, asked, later=(asked[0].max_new // 2, late))
        others = run.stamps[:-1]
        start = max(times[0] for times in others)  # their own prompts are behind them
        gaps = [1e3 * (t - s) for times in others for s, t in zip(times, times[1:]) if s >= start]
        worst.append(max(gaps))
        usual.append(statistics.median(gaps))
    worst, usual = worst[WARM[b.level] :], usual[WARM[b.level] :]
    ends, plans = zip(*steps)
    timeline = {  # of each call of the engine: how long it took, and what it launched, to be read by the next on a GPU
        "ms": [_digits(1e3 * (end - begun)) for begun, end in zip((run.start, *ends), ends)],
        "rows": [plan.rows if plan is not None else 0 for plan in plans], "kinds": map(_kind, plans),
    }  # fmt: skip
    return {
        "worst_ms": _summary(worst), "median_ms": _summary(usual),
        "ratio": _summary([most / median for most, median in zip(worst, usual)]),
        "worst_gap": b.check([one.tokens for one in (*asked, late)], run.tokens),
        "timeline": {name: " ".join(map(str, values)) for name, values in timeline.items()},  # a line of the file each
    }  # fmt: skip


def _kind(plan):
    """What a step runs over: "decode", "prompt", both ("mixed"), or nothing ("none")."""
    kinds = {part.start < part.sequence.n_prompt for part in plan.parts} if plan is not None else ()
    return ("none", "prompt" if True in kinds else "decode", "mixed")[len(kinds)]


def deterministic(b):
    """What it costs that a request's tokens do not depend on who runs beside it."""
    rows = []
    for n in b.sizes["decode"]["sequences"]:
        found, usual = b.rate(n, deterministic=True), b.rate(n)
        ratio = _digits(found["tokens_s"][0] / usual["tokens_s"][0])
        rows.append({"sequences": n, "tokens_s": found["tokens_s"], "over_default": ratio})
    return {"rows": rows}


def run(b, new):
    """`run.py` in a process of its own, behind a prompt of 4 tokens; it records its graphs in the time it shows."""
    reports, prompt = [], b.prompt(4, 5)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(b.weights or Path(folder, "weights.bin")).resolve()
        if not b.weights:
            save_weights(weights, b.config, b.tensors)
        arguments = [f"--engine={b.level}", f"--weights={weights}", f"--tokens={','.join(map(str, prompt))}"]
        for number in range(1 + b.repeats):  # the first may have to compile
            b.progress(f"run.py, start {number + 1}")
            said = start_time._run("ch14_mini_llm/run.py", *arguments, f"--max_new={new}", "--ignore_eos", "--json")
            reports.append(json.loads(said))
    rates, firsts = ([report[key] for report in reports[1:]] for key in ("tokens_per_s", "first_token_s"))
    return {
        "tokens_s": _summary(rates), "first_token_ms": _summary([1e3 * seconds for seconds in firsts]),
        "over_decode": _digits(statistics.median(rates) / b.rate(1)["tokens_s"][0]),
        "worst_gap": b.check([prompt], [reports[-1]["tokens"][len(prompt) :]]),
    }  # fmt: skip


ASKED = {question.__name__: question for question in (decode, requests, sampling, prefix, gap, deterministic, run)}


def measure(config, tensors, level, sizes, only, progress=lambda text: None, **options):
    """The figures of the questions ``only`` as a dict for JSON: of each its sizes, ``error`` (None, or what failed) and
    what was found.

    config, tensors: as `load_weights` gives them. sizes: see `SIZES`. progress, options: see `Bench`.
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
    """The errors in a `measure`: of whole questions, and of rows."""
    return [row["error"] for name in ASKED if name in result for row in _rows(result[name]) if row.get("error")]


def _rows(question):
    """What a question says, a line each: its rows, and at last what it says of all."""
    return [*question.get("rows", []), *filter(None, [question.get("idle")]), question]


# --- the table -------------------------------------------------------------------------------------------------------

SAID = {  # of a row, or of a question; of three figures the first, which is the median
    "tokens_s": "{:9.1f} tokens/s", "share": "{:.1%} of the floor", "setting": "{}", "over_greedy": "{:.2f} of greedy",
    "over_default": "{:.2f} of the default", "first_token_ms": "first token after {:.4g} ms",
    "graph_ms": "{:.4g} ms on the device", "idle_share": "which is idle {:.1%} of the time",
    "over_decode": "{:.2f} of the rate of decoding", "over_static": "continuous {:.2f} times as fast as static",
    "first_token_ms_ratio": "the cache: {:.2f} of the time to a first token", "tokens_s_ratio": "{:.2f} of the rate",
    "median_ms": "{:.4g} ms between two tokens", "worst_ms": "{:.4g} at worst", "ratio": "{:.2f} times that",
    "note": "{}", "error": "failed: {}",
}  # fmt: skip


def format_table(result):
    """The figures of `measure` for a terminal."""
    lines = [
        f"{result['device']}, {result['model']}, level {result['level']}: medians of {result['repeats']}",
        f"the floor is {result['weight_bytes'] / 1e6:.4g} MB of weights and each sequence's keys and values, at the "
        f"{bench.short(result['copy_gb_s'])} GB/s of the device's own copy",
    ]
    for name in ASKED:
        for number, row in enumerate(_rows(result[name]) if name in result else ()):
            at_once = f"{row['sequences']:4} at once" if isinstance(row.get("sequences"), int) else ""
            found = {key: row[key] for key in SAID if row.get(key) is not None}
            words = [SAID[key].format(value[0] if isinstance(value, list) else value) for key, value in found.items()]
            if words:
                lines.append(f"  {'' if number else name:14}{row.get('name', ''):34}{at_once:13}{', '.join(words)}")
    return "\n".join(lines)


# --- the program -----------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/engine.py", description=__doc__.split("\n")[0])
    sizes, known = SIZES[common.BACKEND], batched.PEERS
    level, repeats = ("fast", 3) if common.BACKEND == "gpu" else ("kv", 1)
    parser.add_argument("--only", type=_names(ASKED), help=f"questions, of {','.join(ASKED)}; or all")
    parser.add_argument("--sequences", type=_numbers, metavar="N,…", help="how many decode at once, for other numbers")
    parser.add_argument("--peers", type=_names(known), help=f"of {','.join(known)}; or none; by default all")
    parser.add_argument("--engine", choices=list(LEVELS), default=level, help=f"the level ({level})")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a weight file; by default 124M random "
                        "weights on a GPU, without one the tiny model")
    parser.add_argument("--shape", choices=list(SHAPES), help="a Llama of this size; asks for --engine=fast")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"runs that count, of each figure ({repeats})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    options = parser.parse_args(argv)
    if options.shape:
        defaults, name = (["decode"], [*batched.SETTINGS]), f"engine_{options.shape}.json"
        sizes = sizes | {"decode": sizes["decode"] | {"sequences": (1,), "idle_at": 1}}
    else:
        defaults, name = ([*ASKED], [*known]), "engine.json"
    options.only = defaults[0] if options.only is None else options.only
    options.peers = defaults[1] if options.peers is None else options.peers
    if options.shape and (options.weights or options.engine != "fast" or "run" in options.only):
        parser.error("--shape brings its own weights, on the level fast, which run.py knows nothing of: leave out "
                     "--weights, --engine and the question run")
    if options.shape and "transformers" in options.peers:
        parser.error(f"--peers={','.join(options.peers)}: with --shape there are only {','.join(batched.SETTINGS)}")
    if options.repeats < 1 or not options.only:
        parser.error(f"--repeats={options.repeats} --only={','.join(options.only)}: at least one of each")
    if options.sequences:
        sizes = sizes | {"decode": sizes["decode"] | {"sequences": options.sequences}}
    weights = options.weights or (None if common.BACKEND == "gpu" or options.shape else DATA_DIR / "tiny-gpt2.bin")
    path = options.out / device_folder() / name
    try:
        make_output(path, "--out")
        if options.shape:
            config = SHAPES[options.shape]
            tensors = random_llama(config, "cuda" if common.BACKEND == "gpu" else "cpu")
        else:
            config, tensors = load_weights(weights) if weights else (GPT2_124M, random_weights(GPT2_124M))
    except (FileError, WeightsError) as error:
        parser.error(str(error))
    if common.BACKEND == "cpu":
        torch.set_num_threads(1)  # its threads and those of our kernels would wait for one another
    with tqdm(disable=None) as bar:

        def progress(text):
            bar.set_description(text)
            bar.update()

        what = {"repeats": options.repeats, "peers": options.peers, "weights": weights}
        result = measure(config, tensors, options.engine, sizes, options.only, progress, **what)
    result = {"model": weights.name if weights else f"{options.shape or 'GPT-2 124M'}, random weights", **result}
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"\n{format_table(result)}\n\nwritten: {path}")
    raise SystemExit(1 if errors(result) else 0)


if __name__ == "__main__":
    main()
