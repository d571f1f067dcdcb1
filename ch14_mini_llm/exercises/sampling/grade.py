"""The checks of ch14/sampling: see `common.grade`. Text is compared with a GPT-2 in NumPy, draws with exact numbers."""

import math

import numpy as np
import pytest

from chapters.ch13_llm_ops.sampling import draw_reference, uniform_reference, weights_reference
from common.grade import check, gpt2_oracle, random

SIZES = dict(n_layer=1, n_head=2, d_model=64, d_ff=128, n_ctx=64, vocab_size=211)
WEIGHTS = gpt2_oracle.weights(SIZES, wte=0.2, wpe=0.5)
DRAWS = 4000


def numbers(n, seed=0):
    return random(seed).standard_normal(n).astype(np.float32)


def told(n, temperature, k, seed, steps):
    return f"{n} logits, temperature {temperature:g}, top_k {k}, seed {seed}, {steps} draws"


def drawn(student, logits, temperature, k, seed, steps):
    """(tokens, the answer, the input in words); all tokens are ids."""
    on = told(len(logits), temperature, k, seed, steps)
    answer = student.call("draws", logits, temperature, k, seed, steps, on=on, hint="arguments")
    tokens = answer.value[0]
    check((tokens != -7).all(), f"draw {int(np.argmax(tokens == -7))} left next_token as it was, on {on}", "written")
    wrong = (tokens < 0) | (tokens >= len(logits))
    at = int(wrong.argmax())
    check(not wrong.any(), f"draw {at} gave {tokens[at]}, on {on}", "k" if tokens[at] == -1 else "arguments")
    return tokens, answer, on


def test_kernels(student):
    tokens, answer, on = drawn(student, numbers(300), 0.8, 40, 1, 3)
    # the given loop makes two arrays, and reads one token a draw
    copied = max(answer.value[1], answer.copied - 3)
    check(copied == 0, f"your sampler copied {copied} elements to the host, on {on}", "device")
    ran = [one["kernel"] for one in answer.launches]
    check(ran == ["filter_logits", "draw_token"] * 3, f"launched were {', '.join(ran) or 'no kernels'}, on {on}")
    for one in answer.launches[::2]:
        share = one["arguments"][5]
        check(share >= 1, f"filter_logits was given p = {share!r}, which drops tokens that top_k keeps, on {on}", "p")
    more = student.call("draws", numbers(300), 0.8, 40, 1, 6, on=told(300, 0.8, 40, 1, 6)).made
    check(more == answer.made, f"3 draws make {answer.made} arrays on the device, 6 draws {more}", "once")
    on = "5 tokens after a prompt of 9, in a model"
    student.call("make", "model", SIZES, WEIGHTS, on="making the model")
    answer = student.call("text", "model", gpt2_oracle.prompt(SIZES, 9), 5, 0.8, 40, 1, on=on)
    copied = max(answer.value[1], answer.copied)
    check(copied == 5, f"{copied} elements came to the host, not one for each token, on {on}", "device")
    count = sum(one["kernel"] == "draw_token" for one in answer.launches)
    check(count == 5, f"draw_token was launched {count} times, on {on}", "device")


@pytest.mark.parametrize("n, temperature, k", [(300, 0.8, 40), (300, 1, 40), (50, 0.8, 1), (50, 1, 3), (45, 1, 45)])
def test_largest(student, n, temperature, k):
    logits = numbers(n, seed=k) * np.float32(0.3)
    tokens, _, on = drawn(student, logits, temperature, k, 3, 3000 if temperature == 1 else 300)
    strangers = np.setdiff1d(tokens, np.argsort(-logits, kind="stable")[:k])
    if len(strangers):
        rank = int((logits > logits[strangers[0]]).sum()) + 1
        check(False, f"token {strangers[0]} was drawn, which is only number {rank} in order of logits, on {on}", "k")
    if temperature == 1:  # and logits that are nearly alike: each that stays comes often
        count = len(np.unique(tokens))
        check(count == k, f"only {count} of {k} tokens were ever drawn, on {on}", "step" if count == 1 else "k")


@pytest.mark.parametrize("temperature", [0.8, 0.3, 2.0])
def test_temperature(student, temperature):
    n, k = 64, 12
    logits = numbers(n, seed=5)
    tokens, _, on = drawn(student, logits, temperature, k, 7, DRAWS)
    kept = np.argsort(-logits, kind="stable")[:k]
    weights = np.exp((logits[kept].astype(np.float64) - logits.max()) / temperature)
    expected = DRAWS * weights / weights.sum()
    seen = np.bincount(tokens, minlength=n)[kept]
    distance = ((seen - expected) ** 2 / expected).sum()
    worst = int((np.abs(seen - expected) / np.sqrt(expected)).argmax())
    counts = f"token {kept[worst]} was drawn {seen[worst]} times of {DRAWS}, expected {expected[worst]:.0f}"
    # chi-square with 11 degrees of freedom: above 45 once in 200 000 fair trials
    hint = "step" if len(np.unique(tokens)) == 1 else "temperature"
    check(distance < 45, f"{counts} (chi-square {distance:.0f}, allowed 45), on {on}", hint)


def sequence(logits, temperature, k, seed, steps, first=0):
    """The tokens that chapter 13's kernels draw, by their references."""
    weights = weights_reference(logits, temperature, k)
    return [draw_reference(weights, uniform_reference(seed, first + step)) for step in range(steps)]


def test_seed(student):
    logits, temperature, k, steps = numbers(300, seed=9), 1.0, 40, 64
    for seed in (1, 2, 2**63 + 5):
        tokens, _, on = drawn(student, logits, temperature, k, seed, steps)
        right = sequence(logits, temperature, k, seed, steps)
        check(len(np.unique(tokens)) > 5, f"only {len(np.unique(tokens))} different tokens came, on {on}", "step")
        if list(tokens) != right:
            late = any(list(tokens) == sequence(logits, temperature, k, seed, steps, first) for first in range(1, 4))
            at = int(np.argmax(tokens != right))
            wrong = f"draw {at} gave {tokens[at]}, expected {right[at]}, which is step {at} of the seed, on {on}"
            check(False, wrong, "step" if late else "seed")
    student.call("make", "model", SIZES, WEIGHTS, on="making the model")
    prompt, count = gpt2_oracle.prompt(SIZES, 10), 20
    write = lambda seed: student.call("text", "model", prompt, count, 0.8, 40, seed, on=f"seed {seed}").value[0]
    one, again, other = write(1), write(1), write(2)
    on = f"{count} tokens after a prompt of 10, in a model"
    check(one == again, f"seed 1 gave {one} first and {again} then, on {on}", "seed")
    check(one != other, f"seeds 1 and 2 gave the same text, on {on}", "seed")
    logits = gpt2_oracle.oracle(SIZES, WEIGHTS, [*prompt, *one[:-1]])[0][-count:]
    for step, token in enumerate(one):
        rank = int((logits[step] > logits[step][token] + 1e-3).sum()) + 1
        check(rank <= 40, f"new token {step + 1} is number {rank} in order of logits, top_k 40, on {on}", "k")


def test_settings(student):
    for temperature in (0.0, -0.5, math.inf, math.nan):
        refused(student, temperature, 40, "temperature", temperature)
    for k in (0, -3, 212):
        refused(student, 0.8, k, "top_k", k)
    for temperature, k in ((0.01, 1), (100.0, 211)):
        on = f"temperature {temperature:g}, top_k {k}, a vocabulary of 211"
        text = student.call("refusal", 211, temperature, k, on=on).value
        check(text is None, f"a RequestError: {text}, on {on}", "settings")


def refused(student, temperature, k, name, value):
    """The settings must give a RequestError that names the one that is wrong."""
    on = f"temperature {temperature:g}, top_k {k}, a vocabulary of 211"
    text = student.call("refusal", 211, temperature, k, on=on, hint="settings").value
    check(text is not None, f"no RequestError for {name} = {value}, on {on}", "settings")
    check(name in text, f"the RequestError does not say that it is about {name}: {text!r}, on {on}", "settings")
    if value == 212:
        check("211" in text, f"the RequestError does not name the limit 211: {text!r}, on {on}", "settings")
