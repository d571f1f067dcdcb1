"""Batches of requests on the engine: continuous against static, the size of a block, and how many run at once.

    python benchmarks/batching.py [--engine kv|fast] [--weights FILE | --random] [--requests N] [--max_batch N]
                                  [--repeats 3] [--out benchmarks/results]
    python benchmarks/batching.py --plot        # draws what was measured, and writes the tables of the pages

Prints the figures and writes them to ``<out>/<device>/batching.json``. Three questions, each in one run:

- *static*: the same requests (prompts of 4 to 64 tokens, 4 to 128 new ones, evenly drawn from a seed) in continuous and
  in static batches, in turn. Afterwards the tokens of both are compared: they must be equal. (On the level ``fast``
  those of a run of each that is deterministic, since bits may depend on the number of rows in the runs that are timed.)
- *blocks*: requests of the same mix with blocks of 4 to 256 tokens and room for all: tokens a second. What does not
  depend on a device is counted with the scheduler alone: places in owned blocks that hold no token, in the mean over
  the steps; sequences that run at once where a pool of the same bytes is all there is; tokens of the prompts that the
  prefix cache has, of requests that begin with the same 100 tokens.
- *sequences*: 1 to 32 requests of one length at once: tokens a second, and the time that the median step spends in the
  scheduler and in describing its rows to the device (launches not counted).

Figures of time are medians over the rounds, with the lowest and the highest. Exit codes: 0 all measured; 1 continuous
and static batches disagree (nothing is written); 2 bad arguments.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before numba.cuda)

# isort: split
from numba import cuda  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.ladders import RESULTS, device_folder  # noqa: E402
from benchmarks.random_gpt2 import GPT2_124M, random_weights  # noqa: E402
from ch14_mini_llm.cache.pages import block_bytes  # noqa: E402
from ch14_mini_llm.cache.pool import BlockPool  # noqa: E402
from ch14_mini_llm.cache.radix import RadixCache  # noqa: E402
from ch14_mini_llm.engine.engine import Engine  # noqa: E402
from ch14_mini_llm.engine.models import MODELS  # noqa: E402
from ch14_mini_llm.engine.request import Request  # noqa: E402
from ch14_mini_llm.engine.scheduler import Scheduler  # noqa: E402
from ch14_mini_llm.engine.sequence import Sequence  # noqa: E402
from ch14_mini_llm.engine.sizes import LEVELS  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import DATA_DIR, load_weights  # noqa: E402
from common import bench  # noqa: E402

SEED = 14
PROMPT, NEW = (4, 64), (4, 128)  # tokens, from … to
BLOCK_SIZES = (4, 8, 16, 32, 64, 128, 256)
POOL_TOKENS = 8192  # of the pool whose bytes are fixed
COUNTED = 200  # requests that are counted with the scheduler alone
PREFIX, TAIL, SHARING = 100, 8, 16  # tokens that requests share, tokens after them, requests
AT_ONCE = (1, 2, 4, 8, 16, 32)
LENGTH = (16, 64)  # of the requests that run at once: prompt, new tokens
DEFAULTS = {"cpu": ("kv", 32, 8), "gpu": ("fast", 256, 32)}  # level, requests, max_batch


class Different(Exception):
    """Continuous and static batches gave different tokens."""


def mix(n, vocab_size, seed=SEED):
    """``n`` requests of random tokens and lengths; the same ones for the same seed."""
    rng = random.Random(seed)
    lengths = [(rng.randint(*PROMPT), rng.randint(*NEW)) for _ in range(n)]
    return [Request([rng.randrange(vocab_size) for _ in range(prompt)], new) for prompt, new in lengths]


def measure(model, level, name, requests, max_batch, repeats, progress=lambda text: None):
    """All figures as a dict for JSON; progress(text) is called `rounds` times. Raises `Different`."""
    load = [digits(os.getloadavg()[0])] if hasattr(os, "getloadavg") else None  # of the machine: was it quiet?
    progress("warming up")
    timed(model, mix(max_batch, model.vocab_size), level=level, max_batch=max_batch)
    result = {
        "device": bench.device_name(), "backend": common.BACKEND, "level": level, "model": name,
        "layers": len(model.layers), "d_model": model.d_model, "seed": SEED, "prompt": PROMPT, "new": NEW,
        "repeats": repeats, "static": compare(model, level, requests, max_batch, repeats, progress),
        "blocks": blocks(model, level, requests, max_batch, repeats, progress),
        "sequences": at_once(model, level, repeats, progress),
    }  # fmt: skip
    return result | {"load": load and [*load, digits(os.getloadavg()[0])], "cores": os.cpu_count()}


def rounds(repeats):
    """How often `measure` calls its ``progress``."""
    return 1 + repeats * (2 + len(BLOCK_SIZES) + len(AT_ONCE))


def ready(model, requests, **options):
    """A new engine; one with graphs has recorded those that ``requests`` need."""
    engine = Engine(model, prefix_cache=False, **options)
    if options["level"] == "fast":
        engine.run(requests)
    cuda.synchronize()
    return engine


def timed(model, requests, **options):
    """``(seconds, results, engine, counts)`` of an engine that runs ``requests``; counts: this run's steps and rows."""
    engine = ready(model, requests, **options)
    before = engine.stats()
    start = time.perf_counter()
    results = engine.run(requests)  # whose last token the host has, so the device is done
    seconds = time.perf_counter() - start
    after = engine.stats()
    counts = {name: after[name] - before[name] for name in ("steps", "rows", "padding_rows")}
    errors = [result.error for result in results if result.error]
    if errors:
        raise RuntimeError(f"a request failed: {errors[0]}")
    return seconds, results, engine, counts


def compare(model, level, requests, max_batch, repeats, progress):
    """Continuous against static batches."""
    kinds = {"continuous": {}, "static": {}}
    times, tokens = {kind: [] for kind in kinds}, {}
    for _ in range(repeats):
        for kind, row in kinds.items():
            progress(kind)
            options = {"level": level, "max_batch": max_batch, "static": kind == "static"}
            seconds, results, engine, counts = timed(model, requests, **options)
            times[kind].append(seconds)
            tokens[kind] = [result.tokens for result in results]
            row |= counts
    if level == "fast":
        for kind in kinds:
            options = {"level": level, "max_batch": max_batch, "static": kind == "static", "deterministic": True}
            tokens[kind] = [result.tokens for result in timed(model, requests, **options)[1]]
    if tokens["continuous"] != tokens["static"]:
        raise Different(f"of {len(requests)} requests, some have other tokens in a static batch")
    n_new = sum(map(len, tokens["static"]))
    for kind, row in kinds.items():
        row["tokens_s"] = summary([n_new / seconds for seconds in times[kind]])
        row["padding_share"] = digits(row["padding_rows"] / row["rows"])
    ratios = [slow / fast for fast, slow in zip(times["continuous"], times["static"])]
    return {
        "requests": len(requests), "max_batch": max_batch, "max_rows": engine.scheduler.max_rows,
        "prompt_tokens": sum(len(request.tokens) for request in requests), "new_tokens": n_new,
        "rows": [{"name": kind, **row} for kind, row in kinds.items()], "ratio": summary(ratios),
    }  # fmt: skip


def blocks(model, level, requests, max_batch, repeats, progress):
    """Sizes of a block: figures of time with half of the requests, and what the scheduler can count."""
    requests = requests[: max(1, len(requests) // 2)]
    times = {size: [] for size in BLOCK_SIZES}
    for _ in range(repeats):
        for size in BLOCK_SIZES:
            progress(f"blocks of {size}")
            times[size].append(timed(model, requests, level=level, max_batch=max_batch, block_size=size)[0])
    n_new, counted = sum(request.max_new for request in requests), mix(COUNTED, model.vocab_size)
    rows = []
    for size in BLOCK_SIZES:
        rows.append({"block_size": size, "tokens_s": summary([n_new / seconds for seconds in times[size]])})
        rows[-1] |= occupancy(counted, size) | {"prefix_hits": prefix_hits(size, model.vocab_size)}
    return {
        "requests": len(requests), "max_batch": max_batch, "counted": COUNTED, "pool_tokens": POOL_TOKENS,
        "pool_bytes": POOL_TOKENS // 4 * block_bytes(model, 4, LEVELS[level]), "shared_prefix": PREFIX,
        "sharing": SHARING, "rows": rows,
    }  # fmt: skip


def sequence_of(number, request):
    return Sequence(number, list(request.tokens), request.max_new, number)


def occupancy(requests, block_size):
    """What becomes of a pool of `POOL_TOKENS` places, counted with the scheduler alone.

    unused_share: places of owned blocks without a token. held: sequences that run at once, in the mean over the steps
    in which others wait, of which only the pool can be the reason. preemptions: of all requests.
    """
    pool = BlockPool(POOL_TOKENS // block_size)
    scheduler = Scheduler(pool, None, block_size, max_batch=len(requests), max_rows=4 * len(requests))
    sequences = [sequence_of(number, request) for number, request in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    unused, held = [], []
    while (plan := scheduler.next()) is not None:
        owned = sum(len(sequence.blocks) for sequence in scheduler.running) * block_size
        scheduler.settle()
        unused.append(1 - sum(sequence.n_computed for sequence in scheduler.running) / owned)
        if scheduler.waiting:
            held.append(len(scheduler.running))
        scheduler.done(plan, [0 for part in plan.parts if part.samples])
    return {
        "blocks": pool.n_blocks, "unused_share": digits(statistics.mean(unused)),
        "held": digits(statistics.mean(held)) if held else None,
        "preemptions": sum(sequence.preemptions for sequence in sequences),
    }  # fmt: skip


def prefix_hits(block_size, vocab_size):
    """Prompt tokens that each of `SHARING` - 1 requests has from the prefix cache, after a first one."""
    pool = BlockPool(-(-(PREFIX + TAIL + 1) // block_size) * (SHARING + 1))
    scheduler = Scheduler(pool, RadixCache(pool, block_size), block_size, SHARING, SHARING * (PREFIX + TAIL + 1))
    rng, hits = random.Random(SEED), 0
    prefix = [rng.randrange(vocab_size) for _ in range(PREFIX)]
    for number in range(SHARING):
        tail = [rng.randrange(vocab_size) for _ in range(TAIL)]
        sequence = sequence_of(number, Request(prefix + tail, 1))
        scheduler.add(sequence)
        while (plan := scheduler.next()) is not None:
            scheduler.done(plan, [0 for part in plan.parts if part.samples])
        hits += sequence.n_cached
    return digits(hits / (SHARING - 1))


def at_once(model, level, repeats, progress):
    """How the speed grows with the sequences that run at once, and what the host does a step."""
    rng = random.Random(SEED)
    requests = [Request([rng.randrange(model.vocab_size) for _ in range(LENGTH[0])], LENGTH[1]) for _ in range(32)]
    rates, host = ({n: [] for n in AT_ONCE} for _ in range(2))
    for _ in range(repeats):
        for n in AT_ONCE:
            progress(f"{n} at once")
            engine = ready(model, requests[:n], level=level, max_batch=n)
            work = HostWork(engine)
            start = time.perf_counter()
            results = engine.run(requests[:n])
            rates[n].append(sum(len(result.tokens) for result in results) / (time.perf_counter() - start))
            host[n].append(1e6 * statistics.median(work.steps))
    rows = [{"sequences": n, "tokens_s": summary(rates[n]), "host_us": summary(host[n])} for n in AT_ONCE]
    return {"prompt_tokens": LENGTH[0], "new_tokens": LENGTH[1], "rows": rows}


class HostWork:
    """Seconds that each step of an engine spends in the scheduler and in describing its rows: ``steps``."""

    def __init__(self, engine):
        self.steps = []
        self._around(engine.scheduler, "next", begins=True)
        self._around(engine.runner, "prepare")
        self._around(engine.scheduler, "done")

    def _around(self, owner, name, begins=False):
        method = getattr(owner, name)

        def counted(*arguments):
            if begins:
                self.steps.append(0.0)
            start = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.steps[-1] += time.perf_counter() - start

        setattr(owner, name, counted)


def summary(values):
    """[median, lowest, highest]"""
    return [digits(f(values)) for f in (statistics.median, min, max)]


def digits(value):
    return float(f"{value:.4g}")


def format_table(result):
    """The figures of `measure` for a terminal."""
    lines = [f"{result['device']}, {result['model']}, level {result['level']}: medians of {result['repeats']}"]
    for row in result["static"]["rows"]:
        lines.append(
            f"  {row['name']:12}{row['tokens_s'][0]:9.1f} tokens/s {row['steps']:6} steps {row['rows']:7} rows, "
            f"{100 * row['padding_share']:.0f} % padding"
        )
    lines.append("  continuous is {:.2f} ({:.2f} … {:.2f}) times as fast".format(*result["static"]["ratio"]))
    for row in result["blocks"]["rows"]:
        lines.append(
            f"  blocks of {row['block_size']:3}{row['tokens_s'][0]:9.1f} tokens/s, {100 * row['unused_share']:4.1f} % "
            f"unused, {row['held'] or 0:5.1f} sequences in the pool, {row['prefix_hits']:.0f} tokens shared"
        )
    for row in result["sequences"]["rows"]:
        rate, host = row["tokens_s"][0], row["host_us"][0]
        lines.append(f"  {row['sequences']:3} at once {rate:9.1f} tokens/s, host {host:7.1f} µs a step")
    return "\n".join(lines)


def load(options):
    """``(model, its name)`` as the options say."""
    if options.random:
        config, tensors, name = GPT2_124M, random_weights(GPT2_124M), "GPT-2 124M, random weights"
    else:
        path = options.weights or DATA_DIR / "tiny-gpt2.bin"
        (config, tensors), name = load_weights(path), path.name
    return MODELS[options.engine](config, tensors), name


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/batching.py", description=__doc__.split("\n")[0])
    level, requests, max_batch = DEFAULTS[common.BACKEND]
    parser.add_argument("--engine", choices=list(LEVELS), default=level, help=f"the level ({level})")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a weight file (data/tiny-gpt2.bin)")
    parser.add_argument("--random", action="store_true", help="instead: GPT-2's size (124M) and random weights")
    parser.add_argument("--requests", type=int, default=requests, help=f"of random lengths ({requests})")
    parser.add_argument("--max_batch", type=int, default=max_batch, help=f"of them at a time ({max_batch})")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts (3)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    parser.add_argument("--plot", action="store_true", help="measure nothing; draw and write what was measured")
    options = parser.parse_args(argv)
    if options.plot:
        from benchmarks.batching_plot import draw_all

        try:
            for path in draw_all(options.out):
                print(path)
        except FileNotFoundError as error:
            parser.error(str(error))
        return
    for name in ("requests", "max_batch", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)}: at least 1")
    if options.weights and options.random:
        parser.error("--weights and --random are both given; give one of them")
    path = options.out / device_folder() / "batching.json"
    try:
        make_output(path, "--out")
        model, name = load(options)
    except (FileError, WeightsError) as error:
        parser.error(str(error))
    if model.n_ctx < max(PROMPT[1] + NEW[1], BLOCK_SIZES[-1]):
        parser.error(f"--weights={name}: a context of {model.n_ctx} is too short; {BLOCK_SIZES[-1]} is needed")
    with tqdm(total=rounds(options.repeats), disable=None) as bar:

        def progress(text):
            bar.set_description(text)
            bar.update()

        try:
            requests = mix(options.requests, model.vocab_size)
            result = measure(model, options.engine, name, requests, options.max_batch, options.repeats, progress)
        except Different as error:
            raise SystemExit(f"batching.py: {error}") from None
    print(format_table(result))
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
