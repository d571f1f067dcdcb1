"""What ``make bench CH=10`` measures: the softmax ladder and log-sum-exp."""

import numpy as np

from chapters.ch10_softmax import kernels as ch10
from common.bench import Ladder

SHAPES = {"cpu": [(1024, 64), (4096, 1024)], "gpu": [(262144, 128), (65536, 1024), (16384, 4096), (4096, 16384)]}


def _rows(rng, shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    return {"x": x, "out": np.zeros_like(x), "rows": shape[0], "cols": shape[1]}


def _numpy_softmax(a):
    e = np.exp(a.x - a.x.max(1, keepdims=True))
    np.divide(e, e.sum(1, keepdims=True), out=a.out)


def _torch_softmax(a):
    import torch

    a.out = torch.softmax(a.x, 1)


def _torch_logsumexp(a):
    import torch

    torch.logsumexp(a.x, 1, out=a.out)


def _numpy_logsumexp(a):
    largest = a.x.max(1, keepdims=True)
    a.out[...] = np.log(np.exp(a.x - largest).sum(1)) + largest[:, 0]


def _per_row(kernel):
    return lambda a: kernel[ch10.softmax_launch(a.rows)](a.x, a.out, a.cols)


LADDERS = [
    Ladder(
        name="softmax",
        title="Softmax of each row of (rows, columns)",
        unit="GB/s",
        sizes=SHAPES,
        make=_rows,
        work=lambda s: 8 * s[0] * s[1],
        versions={
            "softmax_v1_naive": _per_row(ch10.softmax_v1_naive),
            "softmax_v2_stable": _per_row(ch10.softmax_v2_stable),
            "softmax_v3_online": _per_row(ch10.softmax_v3_online),
            "softmax_v4_warp_per_row": lambda a: ch10.softmax_v4_warp_per_row[ch10.softmax_warp_launch(a.rows)](
                a.x, a.out, a.cols
            ),
            "softmax_v5_registers": lambda a: ch10.softmax_v5_registers[ch10.softmax_registers_launch(a.rows, a.cols)](
                a.x, a.out, a.cols
            ),
        },
        expected=lambda a: ch10.softmax_reference(a.x),
        library={"cpu": ("NumPy", _numpy_softmax), "gpu": ("torch", _torch_softmax)},
    ),
    Ladder(
        name="logsumexp",
        title="log-sum-exp of each row of (rows, columns)",
        unit="GB/s",
        sizes={"cpu": [(4096, 1024)], "gpu": [(65536, 1024), (16384, 4096)]},
        make=lambda rng, s: _rows(rng, s) | {"out": np.zeros(s[0], np.float32)},
        work=lambda s: 4 * s[0] * s[1],
        versions={"logsumexp_row": lambda a: ch10.logsumexp_row[ch10.logsumexp_launch(a.rows)](a.x, a.out, a.cols)},
        expected=lambda a: ch10.logsumexp_reference(a.x),
        library={"cpu": ("NumPy", _numpy_logsumexp), "gpu": ("torch", _torch_logsumexp)},
    ),
]
QUICK = {"softmax": [(1024, 64), (1024, 1024)], "logsumexp": [(1024, 1024)]}
