"""What ``make bench CH=07`` measures: sums, row maxima, layer norm and RMS norm."""

import numpy as np

from chapters.ch07_warp_reduce import argmax as ch07_argmax
from chapters.ch07_warp_reduce import kernels as ch07
from chapters.ch07_warp_reduce import norms, rmsnorm
from common.bench import Ladder

EPS = np.float32(1e-5)
ROWS_CPU = [(16, 768), (4096, 1024)]
ROWS_GPU = [(1024, 768), (65536, 768), (16384, 4096)]


def _numbers(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def _norm_inputs(rng, shape):
    rows, cols = shape
    weight, bias = _numbers(rng, 2, cols)
    x = _numbers(rng, rows, cols)
    return {"x": x, "weight": weight, "bias": bias, "out": np.zeros_like(x), "rows": rows, "cols": cols}


def _numpy_layernorm(a):
    centred = a.x - a.x.mean(1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + EPS)
    a.out[...] = normal * a.weight + a.bias


def _numpy_rmsnorm(a):
    a.out[...] = a.x / np.sqrt((a.x**2).mean(1, keepdims=True) + EPS) * a.weight


def _torch_layernorm(a):
    import torch

    a.out = torch.nn.functional.layer_norm(a.x, (a.cols,), a.weight, a.bias, float(EPS))


def _torch_rmsnorm(a):
    import torch

    a.out = torch.nn.functional.rms_norm(a.x, (a.cols,), a.weight, float(EPS))


LADDERS = [
    Ladder(
        name="sum",
        title="Sum of n floats",
        unit="GB/s",
        sizes={"cpu": [1 << 16, 1 << 24], "gpu": [1 << 20, 1 << 24, 1 << 28]},
        make=lambda rng, n: {"x": _numbers(rng, n), "out": np.zeros(1, np.float32), "n": n},
        work=lambda n: 4 * n,
        versions={
            kernel.__name__: lambda a, kernel=kernel: kernel[ch07.sum_launch(a.n)](a.x, a.out, a.n)
            for kernel in (
                ch07.sum_v1_shared_tree,
                ch07.sum_v2_warp_shuffle,
                ch07.sum_v3_warp_then_block,
                ch07.sum_v4_float4,
            )
        },
        expected=lambda a: np.array([ch07.sum_reference(a.x)]),
        library={
            "cpu": ("NumPy", lambda a: np.sum(a.x, out=a.out[0:1], keepdims=True)),
            "gpu": ("torch", lambda a: a.out.copy_(a.x.sum())),
        },
        tolerance=1e-3,  # of the sum, which is small: positive and negative numbers cancel
    ),
    Ladder(
        name="row_max",
        title="Largest element of each row",
        unit="GB/s",
        sizes={"cpu": ROWS_CPU, "gpu": ROWS_GPU},
        make=lambda rng, s: {"x": _numbers(rng, *s), "out": np.zeros(s[0], np.float32), "rows": s[0], "cols": s[1]},
        work=lambda s: 4 * s[0] * s[1],
        versions={
            kernel.__name__: lambda a, kernel=kernel: kernel[ch07_argmax.row_max_launch(a.rows, a.cols)](
                a.x, a.out, a.cols
            )
            for kernel in (
                ch07_argmax.row_max_v1_shared_tree,
                ch07_argmax.row_max_v2_warp_shuffle,
                ch07_argmax.row_max_v3_float4,
            )
        },
        expected=lambda a: ch07_argmax.row_max_reference(a.x),
        library={
            "cpu": ("NumPy", lambda a: np.max(a.x, axis=1, out=a.out)),
            "gpu": ("torch", lambda a: a.out.copy_(a.x.amax(1))),
        },
        tolerance=0,
    ),
    Ladder(
        name="layernorm",
        title="Layer norm of (rows, d_model)",
        unit="GB/s",
        sizes={"cpu": ROWS_CPU, "gpu": ROWS_GPU},
        make=_norm_inputs,
        work=lambda s: 8 * s[0] * s[1],
        versions={
            kernel.__name__: lambda a, kernel=kernel, launch=launch: kernel[launch(a.rows, a.cols)](
                a.x, a.weight, a.bias, a.out, a.cols, EPS
            )
            for kernel, launch in (
                (norms.layernorm_v1_two_pass, norms.layernorm_launch),
                (norms.layernorm_v2_one_pass, norms.layernorm_launch),
                (norms.layernorm_v3_shared_row, norms.layernorm_launch),
                (norms.layernorm_v4_registers, lambda rows, cols: norms.registers_launch(rows, cols, "layernorm")),
            )
        },
        expected=lambda a: norms.layernorm_reference(a.x, a.weight, a.bias, EPS),
        library={"cpu": ("NumPy", _numpy_layernorm), "gpu": ("torch", _torch_layernorm)},
    ),
    Ladder(
        name="rmsnorm",
        title="RMS norm of (rows, d_model)",
        unit="GB/s",
        sizes={"cpu": ROWS_CPU, "gpu": ROWS_GPU},
        make=_norm_inputs,
        work=lambda s: 8 * s[0] * s[1],
        versions={
            kernel.__name__: lambda a, kernel=kernel, launch=launch: kernel[launch(a.rows, a.cols)](
                a.x, a.weight, a.out, a.cols, EPS
            )
            for kernel, launch in (
                (rmsnorm.rmsnorm_v1_two_reads, rmsnorm.rmsnorm_launch),
                (rmsnorm.rmsnorm_v2_shared_row, rmsnorm.rmsnorm_launch),
                (rmsnorm.rmsnorm_v3_registers, lambda rows, cols: norms.registers_launch(rows, cols, "rmsnorm")),
            )
        },
        expected=lambda a: rmsnorm.rmsnorm_reference(a.x, a.weight, EPS),
        library={"cpu": ("NumPy", _numpy_rmsnorm), "gpu": ("torch", _torch_rmsnorm)},
    ),
]
QUICK = {"sum": [1 << 20], "row_max": [(1024, 1024)], "layernorm": [(1024, 768)], "rmsnorm": [(1024, 768)]}
