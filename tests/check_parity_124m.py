"""The big check, run by hand: a random GPT-2 of full size (124M) against transformers, on the current backend.

    python tests/check_parity_124m.py [--prompt 16] [--new 32] [--seed 0]

Makes the model with transformers (all weights random, rounded to fp16), converts it with data/download_gpt2.py, and
compares the logits at every position of a prompt and a run of greedy tokens. Needs 3 GB of memory, 800 MB on the disk
while it runs, and some minutes. Exit code 1 if anything disagrees.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ch14")]

import numpy as np  # noqa: E402
from make_models import make_hf_model  # noqa: E402

import common  # noqa: E402  (before numba.cuda)
from ch14_mini_llm.naive.gpt2 import GPT2  # noqa: E402
from common.backend import describe  # noqa: E402
from common.trace import summarize  # noqa: E402

GPT2_124M = dict(n_layer=12, n_head=12, d_model=768, n_ctx=1024, vocab_size=50257)
RELATIVE = 1e-4  # of the largest logit of a position
NEAR_TIE = 1e-3  # logits this close may be ranked either way


def seconds_of(step):
    """Wall times in seconds of 5 calls of ``step``, after one that is not counted."""
    step()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def main():
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default 16)")
    parser.add_argument("--new", type=int, default=32, help="greedy tokens to compare (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the prompt")
    options = parser.parse_args()
    facts = describe(common.choice)
    print(f"backend {facts['backend']}, {facts['device']}; numba {facts['numba']}, numpy {facts['numpy']}", flush=True)

    import torch

    with tempfile.TemporaryDirectory() as folder:
        path, theirs = make_hf_model(folder, seed=options.seed, **GPT2_124M)
        start = time.perf_counter()
        ours = GPT2.from_file(path, max_length=options.prompt + options.new)
        print(
            f"loaded {ours.config.n_parameters / 1e6:.1f}M weights in {time.perf_counter() - start:.2f} s", flush=True
        )

    prompt = np.random.default_rng(options.seed).integers(0, ours.config.vocab_size, options.prompt).tolist()
    ours.forward(prompt)  # compiles
    found = ours.logits_all(prompt)
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt])).logits[0].numpy()
    errors = np.abs(found - expected).max(axis=1) / np.abs(expected).max(axis=1)

    tokens, times = list(prompt), []
    for _ in range(options.new):
        start = time.perf_counter()
        tokens.append(ours.forward(tokens))
        times.append(time.perf_counter() - start)
    with torch.no_grad():
        rows = theirs(torch.tensor([tokens])).logits[0, options.prompt - 1 : -1].numpy()
    top = np.sort(rows, axis=1)[:, -2:]
    chosen = rows[np.arange(options.new), tokens[options.prompt :]]
    equal = chosen == top[:, 1]
    excused = ~equal & (top[:, 1] - top[:, 0] < NEAR_TIE) & (top[:, 1] - chosen < NEAR_TIE)

    with torch.no_grad():
        steps = seconds_of(lambda: ours.forward(prompt))
        their_steps = seconds_of(lambda: theirs(torch.tensor([prompt])))

    print(f"\n{'position':>8}  {'max relative error':>18}")
    for position, error in enumerate(errors):
        print(f"{position:>8}  {error:18.2e}")
    print(f"\nmax relative error of the logits        {errors.max():.2e} (limit {RELATIVE:.0e})")
    print(f"greedy tokens equal                     {equal.sum()} of {options.new}, {excused.sum()} more are near ties")
    print(f"smallest gap between the best two       {(top[:, 1] - top[:, 0]).min():.2e}")
    print(f"seconds a token over the prompt         {min(steps):.3f} best, {np.median(steps):.3f} median of 5")
    print(
        f"the same, transformers without a cache  {min(their_steps):.3f} best, {np.median(their_steps):.3f} median of 5"
    )
    print(f"seconds a token while it grew           {np.mean(times):.3f} mean")
    print("\nwhere the time of a step goes (median of 5)")
    traces = [summarize(ours.trace_step(prompt)) for _ in range(5)]
    spent = {first.kernel: (first.name, count) for first, count, _ in traces[0]}
    medians = {k: np.median([ms for t in traces for first, _, ms in t if first.kernel is k]) for k in spent}
    for kernel, ms in sorted(medians.items(), key=lambda item: -item[1]):
        name, count = spent[kernel]
        print(f"{name:>28}  {count:>3} launches  {ms:9.2f} ms  {100 * ms / sum(medians.values()):5.1f} %")

    good = errors.max() < RELATIVE and bool((equal | excused).all())
    print("\nagree" if good else "\nDISAGREE")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
