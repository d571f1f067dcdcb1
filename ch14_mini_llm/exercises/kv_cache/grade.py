"""The checks of ch14/kv_cache: see `common.grade`. The oracle is a GPT-2 in NumPy that keeps all keys and values."""

import math
import time

import numpy as np
import pytest

from common import BACKEND
from common.grade import check, gpt2_oracle, same

SIZES = {
    "small": dict(n_layer=2, n_head=2, d_model=64, d_ff=128, n_ctx=40, vocab_size=211),
    "deep": dict(n_layer=4, n_head=1, d_model=32, d_ff=128, n_ctx=33, vocab_size=97),
    "wide": dict(n_layer=1, n_head=4, d_model=128, d_ff=512, n_ctx=48, vocab_size=509),
    "slow": dict(n_layer=2, n_head=4, d_model=256, d_ff=1024, n_ctx=512, vocab_size=512),
}
if BACKEND == "gpu":  # launches cost the same with a cache or without: few of them, and long ones
    SIZES["slow"] = dict(n_layer=1, n_head=16, d_model=1024, d_ff=4096, n_ctx=3072, vocab_size=512)
NEAR = dict(rtol=2e-4, atol=2e-4)
WEIGHTS = {name: gpt2_oracle.weights(sizes, len(name)) for name, sizes in SIZES.items()}


def oracle(name, tokens):
    """(logits of the last position, K, V) for tokens; K, V: (n_layer, n_head, T, head_dim), in float64."""
    logits, keys, values = gpt2_oracle.oracle(SIZES[name], WEIGHTS[name], tokens)
    return logits[-1], keys, values


def prompt(name, n, seed=0):
    return gpt2_oracle.prompt(SIZES[name], n, seed)


def made(student, name):
    student.call("make", name, SIZES[name], WEIGHTS[name], SIZES[name]["n_ctx"], on=f"the model {name!r}")


def verify(answer, name, tokens, on, hint):
    """A step's answer: the next token, the caches and the length must be those of ``tokens``."""
    (token, k_cache, v_cache, length), T = answer.value, len(tokens)
    logits, keys, values = oracle(name, tokens)
    n_layer, n_head, _, head_dim = keys.shape
    shape = (n_layer, n_head, SIZES[name]["n_ctx"], head_dim)
    check(isinstance(token, int), f"a RequestError: {token}, on {on}", hint)
    for what, cache, expected in (("K_cache", k_cache, keys), ("V_cache", v_cache, values)):
        mine = getattr(cache, "shape", None)
        check(mine == shape, f"{what} has the shape {mine}, expected {shape}, on {on}", hint)
        for layer in range(n_layer):
            got, about = cache[layer, :, :T], hint
            others = [one for one in range(n_layer) if one != layer]
            if not got.any() or any(np.allclose(got, expected[other], **NEAR) for other in others):
                about = "layers"
            elif layer and hint == "position":  # the layer before has the right keys: its attention went wrong
                about = "attention"
            same(got, expected[layer], f"{what}[{layer}, :, :{T}]", on, **NEAR, hint=about)
    check(length == T, f"length is {length}, but {T} tokens are in the cache, on {on}", hint)
    order = np.argsort(-logits)
    close = logits[order[0]] - logits[order[1]] < 1e-3
    check(close or token == order[0], f"the next token is {token}, expected {order[0]}, on {on}", hint)


@pytest.mark.parametrize("name, n", [("small", 5), ("deep", 1), ("small", 40), ("wide", 17)])
def test_prefill(student, name, n):
    made(student, name)
    tokens, on = prompt(name, n), f"the model {name!r}, a prompt of {n} tokens"
    verify(student.call("prefill", name, tokens, on=on), name, tokens, on, "prefill")


@pytest.mark.parametrize("name, n", [("small", 3), ("deep", 16), ("wide", 1), ("small", 35)])
def test_decode(student, name, n):
    made(student, name)
    tokens = prompt(name, n, seed=1)
    student.call("prefill", name, tokens, on=f"the model {name!r}, a prompt of {n} tokens")
    for step in range(1, 5):
        tokens.append(prompt(name, 1, seed=step)[0])
        on = f"the model {name!r}, step {step} after a prompt of {n} tokens"
        verify(student.call("decode", name, tokens[-1], on=on), name, tokens, on, "position")


def likely(name, tokens, got, on):
    """Every new token must be a most likely one after those in front of it; one pass of the oracle says all."""
    logits = gpt2_oracle.oracle(SIZES[name], WEIGHTS[name], [*tokens, *got[:-1]])[0][len(tokens) - 1 :]
    for step, (token, row) in enumerate(zip(got, logits)):
        expected = f"new token {step} is {token}, expected {row.argmax()}, on {on}"
        check(0 <= token < len(row) and row[token] > row.max() - 1e-3, expected, "position")


@pytest.mark.parametrize("name", ["small", "deep", "wide"])
def test_same_tokens(student, name):
    made(student, name)
    n_ctx = SIZES[name]["n_ctx"]
    for n in (1, 16, 17, n_ctx - 1):
        tokens, count = prompt(name, n, seed=2), min(12, n_ctx - n + 1)
        on = f"the model {name!r}, a prompt of {n} tokens, {count} new ones"
        got = student.call("generate", name, tokens, count, on=on).value
        likely(name, tokens, got, on)


def rows(answer):
    """Rows that each matrix product of an answer was given."""
    products = [one for one in answer.launches if one["kernel"].startswith(("matmul", "gemm"))]
    return [one["arguments"][3] for one in products]


def test_no_recomputation(student):
    made(student, "small")
    tokens, layers = prompt("small", 20, seed=3), SIZES["small"]["n_layer"]
    answer = student.call("prefill", "small", tokens, on="a prompt of 20 tokens")
    enough = 20 * 4 * layers  # four products in each layer
    seen = f"{sum(rows(answer))} rows went through matrix products for a prompt of 20 tokens; {enough} are enough"
    check(sum(rows(answer)) <= enough, seen, "rows")
    for step in range(3):
        on = f"step {step + 1} after a prompt of 20 tokens"
        answer = student.call("decode", "small", 7, on=on)
        most = max(rows(answer), default=1)
        check(most == 1, f"a matrix product was given {most} rows for one new token, on {on}", "rows")
        check(len(rows(answer)) <= 4 * layers, f"{len(rows(answer))} matrix products, on {on}", "rows")
        count = len(answer.launches)
        check(count > 4 * layers, f"only {count} kernels were launched, on {on}", "own-work")


def test_full(student):
    made(student, "deep")
    n_ctx = SIZES["deep"]["n_ctx"]
    tokens = prompt("deep", n_ctx - 1, seed=4)
    student.call("prefill", "deep", tokens, on=f"a prompt of {n_ctx - 1} tokens")
    on = f"token {n_ctx} of at most {n_ctx}"
    verify(student.call("decode", "deep", 5, on=on), "deep", [*tokens, 5], on, "full")
    on = f"token {n_ctx + 1} of at most {n_ctx}"
    token, k_cache, v_cache, length = student.call("decode", "deep", 6, on=on).value
    check(isinstance(token, str), f"no RequestError, but the token {token}, on {on}", "full")
    check(str(n_ctx) in token, f"the error does not name the limit {n_ctx}: {token!r}, on {on}", "full")
    _, keys, values = oracle("deep", [*tokens, 5])
    same(k_cache, keys, "K_cache after the error", on, **NEAR, hint="full")
    same(v_cache, values, "V_cache after the error", on, **NEAR, hint="full")
    check(length == n_ctx, f"length is {length} after the error, on {on}", "full")


def test_again(student):
    made(student, "small")
    student.call("prefill", "small", prompt("small", 25, seed=5), on="a prompt of 25 tokens")
    tokens, on = prompt("small", 4, seed=6), "a prompt of 4 tokens after one of 25"
    verify(student.call("prefill", "small", tokens, on=on, hint="again"), "small", tokens, on, "again")
    on = "a step " + on
    verify(student.call("decode", "small", 9, on=on, hint="again"), "small", [*tokens, 9], on, "again")


def test_speed(student):
    made(student, "slow")
    tokens, count = prompt("slow", SIZES["slow"]["n_ctx"] - 62, seed=7), 32
    on = f"{count} tokens after a prompt of {len(tokens)}"
    least = 1.5 if BACKEND == "gpu" else 3
    seconds = {"generate": math.inf, "generate_without": math.inf}
    for function in seconds:
        student.call(function, "slow", tokens, 2, on=on)  # the first launches of all kernels
    for _ in range(3):  # the least counts: what else the machine does only adds to it
        for function in seconds:
            start = time.perf_counter()
            answer = student.call(function, "slow", tokens, count, on=on)
            # without a GPU, the processor's time: the clock on the wall also counts what others do
            taken = time.perf_counter() - start if BACKEND == "gpu" else answer.seconds
            seconds[function] = min(seconds[function], taken)
            if function == "generate" and BACKEND == "cpu":  # a longer text than above
                likely("slow", tokens, answer.value, on)
        ratio = seconds["generate_without"] / seconds["generate"]
        if ratio >= least:
            break
    student.note = f"{ratio:.1f} times as fast as without a cache: {on}"
    check(ratio >= least, f"{ratio:.1f} times as fast as without a cache, on {on}", "rows")
