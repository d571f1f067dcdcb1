"""What ``make bench CH=03`` measures: the additions of this chapter, at the sizes GPT-2 has and beyond."""

import numpy as np

from chapters.ch03_indexing import kernels as ch03
from common.bench import Ladder

VOCAB_SIZE = 50257  # GPT-2's
D_MODEL = 768  # GPT-2 small's
N_HEAD, HEAD_DIM = 12, 64


def _numbers(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def _vectors(rng, n):
    return {"x": _numbers(rng, n), "y": _numbers(rng, n), "out": np.zeros(n, np.float32), "n": n}


def _saxpy(rng, n):
    return {"a": np.float32(-1.7), "x": _numbers(rng, n), "out": _numbers(rng, n), "n": n}


def _numpy_saxpy(a):
    np.add(a.a * a.x, a.out, out=a.out)


def _residual(rng, n_tokens):
    n = n_tokens * D_MODEL
    return {"x": _numbers(rng, n), "branch": _numbers(rng, n), "out": np.zeros(n, np.float32), "n": n}


def _bias(rng, size):
    rows, cols = size
    out = np.zeros(size, np.float32)
    return {"x": _numbers(rng, rows, cols), "bias": _numbers(rng, cols), "out": out, "rows": rows, "cols": cols}


def _embed(rng, n_tokens):
    tokens = rng.permutation(VOCAB_SIZE)[:n_tokens]  # no token twice, so that no row comes from a cache
    return {
        "tokens": tokens.astype(np.int32),
        "wte": _numbers(rng, VOCAB_SIZE, D_MODEL),
        "wpe": _numbers(rng, n_tokens, D_MODEL),
        "out": np.zeros((n_tokens, D_MODEL), np.float32),
        "n": n_tokens,
    }


def _numpy_embed(a):
    np.take(a.wte, a.tokens, axis=0, out=a.out, mode="clip")  # mode="raise" would make a copy of its own
    np.add(a.out, a.wpe, out=a.out)


def _torch_embed(a):
    import torch

    torch.index_select(a.wte, 0, a.tokens, out=a.out)
    a.out.add_(a.wpe)


def _torch_add(x, y, out):
    import torch

    torch.add(x, y, out=out)


def _heads(rng, n_tokens):
    x = _numbers(rng, N_HEAD, n_tokens, HEAD_DIM)
    return {"x": x, "scale": _numbers(rng, N_HEAD), "out": np.zeros_like(x), "n": n_tokens}


def _torch_scale_heads(a):
    import torch

    torch.mul(a.x, a.scale[:, None, None], out=a.out)


LADDERS = [
    Ladder(
        name="vector_add",
        title="Adding two vectors of n floats",
        unit="GB/s",
        sizes={"cpu": [1 << 10, 1 << 16, 1 << 24], "gpu": [1 << 10, 1 << 18, 1 << 22, 1 << 26]},
        make=_vectors,
        work=lambda n: 12 * n,
        versions={
            "vector_add_v1_one_each": lambda a: ch03.vector_add_v1_one_each[ch03.blocks_1d(a.n)](a.x, a.y, a.out, a.n),
            "vector_add_v2_grid_stride": lambda a: ch03.vector_add_v2_grid_stride[ch03.blocks_grid_stride(a.n)](
                a.x, a.y, a.out, a.n
            ),
        },
        expected=lambda a: ch03.vector_add_reference(a.x, a.y),
        library={
            "cpu": ("NumPy", lambda a: np.add(a.x, a.y, out=a.out)),
            "gpu": ("torch", lambda a: _torch_add(a.x, a.y, a.out)),
        },
        tolerance=0,
    ),
    Ladder(
        name="saxpy",
        title="saxpy: y = a x + y on n floats",
        unit="GB/s",
        sizes={"cpu": [1 << 16, 1 << 24], "gpu": [1 << 18, 1 << 22, 1 << 26]},
        make=_saxpy,
        work=lambda n: 12 * n,
        versions={"saxpy": lambda a: ch03.saxpy[ch03.blocks_grid_stride(a.n)](a.a, a.x, a.out, a.n)},
        expected=lambda a: ch03.saxpy_reference(a.a, a.x, a.out),
        library={"cpu": ("NumPy", _numpy_saxpy), "gpu": ("torch", lambda a: a.out.add_(a.x, alpha=float(a.a)))},
        tolerance=1e-6,
    ),
    Ladder(
        name="residual_add",
        title=f"Residual connection of n tokens × {D_MODEL}",
        unit="GB/s",
        sizes={"cpu": [1, 1024], "gpu": [1, 1024, 65536]},
        make=_residual,
        work=lambda n_tokens: 12 * n_tokens * D_MODEL,
        versions={"residual_add": lambda a: ch03.residual_add[ch03.blocks_1d(a.n)](a.x, a.branch, a.out, a.n)},
        expected=lambda a: ch03.residual_add_reference(a.x, a.branch),
        library={
            "cpu": ("NumPy", lambda a: np.add(a.x, a.branch, out=a.out)),
            "gpu": ("torch", lambda a: _torch_add(a.x, a.branch, a.out)),
        },
        tolerance=0,
    ),
    Ladder(
        name="bias_add",
        title="One bias to every row",
        unit="GB/s",
        sizes={"cpu": [(1, 3072), (1024, 3072)], "gpu": [(1, 3072), (1024, 3072), (32768, 3072)]},
        make=_bias,
        work=lambda size: 8 * size[0] * size[1] + 4 * size[1],
        versions={
            "bias_add": lambda a: ch03.bias_add[ch03.blocks_2d(a.rows, a.cols)](a.x, a.bias, a.out, a.rows, a.cols)
        },
        expected=lambda a: ch03.bias_add_reference(a.x, a.bias),
        library={
            "cpu": ("NumPy", lambda a: np.add(a.x, a.bias, out=a.out)),
            "gpu": ("torch", lambda a: _torch_add(a.x, a.bias, a.out)),
        },
        tolerance=0,
    ),
    Ladder(
        name="embed",
        title=f"GPT-2's embedding of n tokens: {D_MODEL} floats from each of two tables",
        unit="GB/s",
        sizes={"cpu": [1, 1024], "gpu": [1, 1024, 32768]},
        make=_embed,
        work=lambda n: 12 * n * D_MODEL + 4 * n,
        versions={
            "embed": lambda a: ch03.embed[ch03.blocks_2d(a.n, D_MODEL)](a.tokens, a.wte, a.wpe, a.out, a.n, D_MODEL)
        },
        expected=lambda a: ch03.embed_reference(a.tokens, a.wte, a.wpe),
        library={"cpu": ("NumPy", _numpy_embed), "gpu": ("`torch` index_select, add_", _torch_embed)},
        tolerance=0,
    ),
    Ladder(
        name="scale_heads",
        title=f"A factor for each of {N_HEAD} heads of n tokens × {HEAD_DIM}",
        unit="GB/s",
        sizes={"cpu": [1, 1024], "gpu": [1, 1024, 65536]},
        make=_heads,
        work=lambda n: 8 * N_HEAD * n * HEAD_DIM + 4 * N_HEAD,
        versions={
            "scale_heads": lambda a: ch03.scale_heads[ch03.blocks_3d(N_HEAD, a.n, HEAD_DIM)](
                a.x, a.scale, a.out, N_HEAD, a.n, HEAD_DIM
            )
        },
        expected=lambda a: ch03.scale_heads_reference(a.x, a.scale),
        library={
            "cpu": ("NumPy", lambda a: np.multiply(a.x, a.scale[:, None, None], out=a.out)),
            "gpu": ("torch", _torch_scale_heads),
        },
        tolerance=0,
    ),
]
QUICK = {  # for the demo
    "vector_add": [1 << 10, 1 << 20],
    "saxpy": [1 << 20],
    "residual_add": [256],
    "bias_add": [(256, 3072)],
    "embed": [256],
    "scale_heads": [256],
}
