"""What ``make bench CH=11`` measures: causal attention as a whole, and its two products.

A size is (heads, tokens, head_dim). Scores are measured with their softmax: -inf in a result cannot be compared.
"""

import math

import numpy as np

from chapters.ch10_softmax.kernels import softmax_launch, softmax_reference, softmax_row
from chapters.ch11_attention import kernels as ch11
from common.bench import Ladder

SIZES = {
    "cpu": [(12, 64, 64), (12, 512, 64)],
    "gpu": [(12, 64, 64), (12, 512, 64), (12, 2048, 64)],
}


def _normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def _mask(n_tokens):
    """0 where a token may look, -inf where it may not: what a library adds to the scores."""
    return np.triu(np.full((n_tokens, n_tokens), -np.inf, np.float32), 1)


def _sizes(size):
    n_head, n_tokens, head_dim = size
    scale = np.float32(1 / math.sqrt(head_dim))
    return {"n_head": n_head, "n_tokens": n_tokens, "head_dim": head_dim, "scale": scale}


# --- the three stages together ---------------------------------------------------------------------------------------


def _attention(rng, size):
    n_head, n_tokens, head_dim = size
    arrays = {name: _normal(rng, *size) for name in "qkv"}
    scores = np.zeros((n_head, n_tokens, n_tokens), np.float32)
    out = np.zeros((n_tokens, n_head * head_dim), np.float32)
    return {**arrays, "scores": scores, "mask": _mask(n_tokens), "out": out, **_sizes(size)}


def _scores_and_softmax(a, kernel, scores):
    """Scores by ``kernel``, then softmax, in the array ``scores`` (heads, tokens, tokens)."""
    kernel[ch11.attention_scores_launch(a.n_tokens, a.n_head)](a.q, a.k, scores, a.n_tokens, a.head_dim, a.scale)
    rows = scores.reshape(a.n_head * a.n_tokens, a.n_tokens)
    softmax_row[softmax_launch(a.n_head * a.n_tokens)](rows, rows, a.n_tokens)


def _values(a, kernel, probs):
    launch = ch11.attention_values_launch(a.n_tokens, a.n_head, a.head_dim)
    kernel[launch](probs, a.v, a.out, a.n_tokens, a.n_head, a.head_dim)


def _mha_v1_stages(a):
    _scores_and_softmax(a, ch11.attention_scores_v1_naive, a.scores)
    _values(a, ch11.attention_values_v1_naive, a.scores)


def _numpy_probs(a, out):
    scores = np.matmul(a.q, a.k.transpose(0, 2, 1), out=out)
    scores *= a.scale
    scores += a.mask
    scores -= scores.max(2, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(2, keepdims=True)


def _numpy_values(a, probs):
    a.out.reshape(a.n_tokens, a.n_head, a.head_dim)[...] = np.matmul(probs, a.v).transpose(1, 0, 2)


def _numpy_attention(a):
    _numpy_probs(a, a.scores)
    _numpy_values(a, a.scores)


def _torch_attention(a):
    import torch

    # [None]: its fused kernels want a dimension for the batch
    out = torch.nn.functional.scaled_dot_product_attention(a.q[None], a.k[None], a.v[None], is_causal=True)
    a.out = out[0].transpose(0, 1).reshape(a.out.shape)


def _attention_flops(size):
    """Of both products, for the pairs of tokens that count: (t + 1) of them for token t."""
    n_head, n_tokens, head_dim = size
    return 2 * n_head * head_dim * n_tokens * (n_tokens + 1)


# --- each product alone ----------------------------------------------------------------------------------------------


def _torch_probs(a):
    import torch

    scores = torch.baddbmm(a.mask, a.q, a.k.transpose(1, 2), alpha=float(a.scale))
    torch.softmax(scores, 2, out=a.out)


def _probs_for_values(rng, size):
    n_head, n_tokens, head_dim = size
    probs = np.tril(rng.random((n_head, n_tokens, n_tokens), np.float32))
    probs /= probs.sum(2, keepdims=True)
    out = np.zeros((n_tokens, n_head * head_dim), np.float32)
    return {"probs": probs, "v": _normal(rng, *size), "out": out, **_sizes(size)}


def _torch_values(a):
    import torch

    heads = a.out.view(a.n_tokens, a.n_head, a.head_dim).transpose(0, 1)  # where each head's columns are in out
    torch.bmm(a.probs, a.v, out=heads)


def _probs(rng, size):
    n_head, n_tokens, _ = size
    out = np.zeros((n_head, n_tokens, n_tokens), np.float32)
    return {"q": _normal(rng, *size), "k": _normal(rng, *size), "mask": _mask(n_tokens), "out": out, **_sizes(size)}


def _probs_expected(a):
    scores = ch11.attention_scores_reference(a.q, a.k, a.scale)
    return softmax_reference(scores.reshape(-1, a.n_tokens)).reshape(scores.shape)


LADDERS = [
    Ladder(
        name="attention",
        title="Causal attention, heads × tokens × head_dim",
        unit="GFLOP/s",
        share="library",
        sizes=SIZES,
        make=_attention,
        work=_attention_flops,
        versions={
            "the stages in their v1": _mha_v1_stages,
            "mha_naive": lambda a: ch11.mha_naive(a.q, a.k, a.v, a.scores, a.out, a.n_tokens, a.n_head, a.head_dim),
        },
        expected=lambda a: ch11.mha_reference(a.q, a.k, a.v),
        library={
            "cpu": ("NumPy, step by step", _numpy_attention),
            "gpu": ("`torch` scaled_dot_product_attention", _torch_attention),
        },
        tolerance=1e-4,
    ),
    Ladder(
        name="scores",
        title="Scores and their softmax: bytes of q, k and one matrix of scores, heads × tokens × head_dim",
        unit="GB/s",
        sizes=SIZES,
        make=_probs,
        work=lambda s: 4 * s[0] * s[1] * (s[1] + 2 * s[2]),
        versions={
            "attention_scores_v1_naive": lambda a: _scores_and_softmax(a, ch11.attention_scores_v1_naive, a.out),
            "attention_scores_v2_tiled": lambda a: _scores_and_softmax(a, ch11.attention_scores_v2_tiled, a.out),
        },
        expected=_probs_expected,
        library={
            "cpu": ("NumPy, step by step", lambda a: _numpy_probs(a, a.out)),
            "gpu": ("`torch` baddbmm, softmax", _torch_probs),
        },
        tolerance=1e-4,
    ),
    Ladder(
        name="values",
        title="Weighted sum of v: bytes of half a matrix of probabilities, v and out, heads × tokens × head_dim",
        unit="GB/s",
        sizes=SIZES,
        make=_probs_for_values,
        work=lambda s: 4 * s[0] * s[1] * ((s[1] + 1) / 2 + 2 * s[2]),
        versions={
            "attention_values_v1_naive": lambda a: _values(a, ch11.attention_values_v1_naive, a.probs),
            "attention_values_v2_tiled": lambda a: _values(a, ch11.attention_values_v2_tiled, a.probs),
        },
        expected=lambda a: ch11.attention_values_reference(a.probs, a.v),
        library={
            "cpu": ("`numpy.matmul`", lambda a: _numpy_values(a, a.probs)),
            "gpu": ("`torch.bmm`", _torch_values),
        },
        tolerance=1e-4,
    ),
]
QUICK = {name: [(12, 64, 64), (12, 256, 64)] for name in ("attention", "scores", "values")}  # for the demo
