"""The big check of the fast level, run by hand: a random GPT-2 of full size (124M), on the current backend.

    python tests/check_levels_124m.py [--lengths 1,2,15,16,17,511,1023] [--new 32] [--seed 0]

For each length: the logits after the prompt beside those of the naive level, a run of greedy tokens (equal, or the
first difference a near tie), the logits of the last step, and that two runs are bit-equal. Then: replays of the graph
against the same launches made one by one, the 1024th position, and the refusal of the 1025th. Exit code 1 if anything
disagrees. On a GPU it takes half a minute, without one many.
"""

import argparse
import functools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import common  # noqa: E402  (before numba.cuda)
from benchmarks.gpt2 import GPT2_124M  # noqa: E402
from benchmarks.random_gpt2 import random_weights  # noqa: E402
from ch14_mini_llm.engine.request import RequestError  # noqa: E402
from ch14_mini_llm.levels import make_engine  # noqa: E402
from ch14_mini_llm.levels.generate import generate  # noqa: E402
from common.backend import describe  # noqa: E402

RELATIVE = 2e-2  # of the largest logit
NEAR_TIE = 2e-2  # of the largest logit: two logits this close may be ranked either way


def relative(found, expected):
    """Largest difference, as a share of the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check_length(naive, fast, tokens, new):
    """A line of the table, and whether all of it holds."""
    naive.prefill(tokens)
    logits = naive.logits.copy_to_host()
    fast.prefill(tokens)
    prompt_error = relative(fast.logits.copy_to_host(), logits)
    made, again = (list(generate(fast, tokens, new)) for _ in range(2))
    step_logits = fast.logits.copy_to_host()
    naive.prefill(tokens + made[:-1])
    step_error = relative(step_logits, naive.logits.copy_to_host())
    differs, gap = None, 0.0
    for i, token in enumerate(made):
        expected = naive.prefill(tokens + made[:i])
        if token != expected:
            logits = naive.logits.copy_to_host()
            differs, gap = i, float((logits[expected] - logits[token]) / np.abs(logits).max())
            break
    good = max(prompt_error, step_error) <= RELATIVE and gap <= NEAR_TIE and made == again
    greedy = f"{new} equal" if differs is None else f"differ at {differs}, gap {gap:.1e}"
    line = f"{len(tokens):>7}  {prompt_error:>9.1e}  {step_error:>9.1e}  {greedy:<24}  {made == again}"
    return line, good


def check_graph(fast, tokens, steps):
    """Whether replays leave the very bits that eager launches leave."""
    runner, runs = fast.engine.runner, []
    run = runner.run
    for record in (False, True):
        runner.run = functools.partial(run, record=record)
        made = list(fast.stream(tokens, steps))
        runs.append([made, fast.logits.copy_to_host()])
    runner.run = run
    return all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))


def main():
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1,2,15,16,17,511,1023", help="prompt lengths")
    parser.add_argument("--new", type=int, default=32, help="greedy tokens to compare (fewer at the context's end)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the prompts")
    options = parser.parse_args()
    facts = describe(common.choice)
    print(f"backend {facts['backend']}, {facts['device']}; numba {facts['numba']}, numpy {facts['numpy']}", flush=True)
    config, tensors = GPT2_124M, random_weights(GPT2_124M, options.seed, std=0.06)  # 0.02 makes all logits alike
    naive, fast = make_engine("naive", config, tensors), make_engine("fast", config, tensors)

    rng = np.random.default_rng(options.seed)
    good = True
    print(f"{'prompt':>7}  {'logits':>9}  {'last step':>9}  {'greedy tokens':<24}  two runs equal")
    for length in map(int, options.lengths.split(",")):
        tokens = rng.integers(0, config.vocab_size, length).tolist()
        line, holds = check_length(naive, fast, tokens, min(options.new, config.n_ctx - length))
        good &= holds
        print(line, flush=True)

    tokens = rng.integers(0, config.vocab_size, 1024).tolist()
    replayed = check_graph(fast, tokens[:100], 200)
    print(f"200 replays bit-equal to eager launches  {replayed}")
    naive.prefill(tokens)
    expected = naive.logits.copy_to_host()
    fast.prefill(tokens)
    last = relative(fast.logits.copy_to_host(), expected)
    print(f"logits of the 1024th position            {last:.1e}")
    try:
        generate(fast, tokens, 1)
        refused = False
    except RequestError as error:
        refused = True
        print(f"position 1025                            refused: {error}")
    good &= replayed and refused and last <= RELATIVE
    print("\nagree" if good else "\nDISAGREE")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
