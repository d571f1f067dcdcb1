"""What ``make bench CH=06`` measures: the product of square matrices, and of shapes that do not fit the tile."""

import numpy as np

from chapters.ch06_shared_tile import kernels as ch06
from common.bench import Ladder

KERNELS = {
    "matmul_v1_naive": ch06.matmul_v1_naive,
    "matmul_v2_tiled": ch06.matmul_v2_tiled,
    "matmul_v3_any_shape": ch06.matmul_v3_any_shape,
}


def _product(rng, size):
    M, N, K = np.broadcast_to(size, 3).tolist()  # one number is a square
    A = rng.standard_normal((M, K), dtype=np.float32)
    B = rng.standard_normal((K, N), dtype=np.float32)
    return {"A": A, "B": B, "out": np.zeros((M, N), np.float32), "M": M, "N": N, "K": K}


def _flops(size):
    M, N, K = np.broadcast_to(size, 3).tolist()
    return 2 * M * N * K


def _launch(kernel):
    return lambda a: kernel[ch06.matmul_launch(a.M, a.N)](a.A, a.B, a.out, a.M, a.N, a.K)


def _torch_matmul(a):
    import torch

    torch.matmul(a.A, a.B, out=a.out)


def _fits(name, size):
    return name != "matmul_v2_tiled" or not np.any(np.mod(size, ch06.TILE))


def _ladder(name, title, sizes):
    return Ladder(
        name=name,
        title=title,
        unit="GFLOP/s",
        share="library",
        sizes=sizes,
        make=_product,
        work=_flops,
        versions={name: _launch(kernel) for name, kernel in KERNELS.items()},
        expected=lambda a: ch06.matmul_reference(a.A, a.B),
        library={
            "cpu": ("`numpy.matmul`", lambda a: np.matmul(a.A, a.B, out=a.out)),
            "gpu": ("`torch.matmul`", _torch_matmul),
        },
        fits=_fits,
        tolerance=1e-4,
    )


LADDERS = [
    _ladder(
        "matmul",
        "C = A @ B, matrices of n × n",
        {"cpu": [64, 256, 1024], "gpu": [256, 1024, 4096]},
    ),
    _ladder(
        "matmul_shapes",
        "C = A @ B of other shapes, M × N × K",
        {
            "cpu": [(257, 257, 257), (16, 3072, 768), (1, 3072, 768)],
            "gpu": [(1025, 1025, 1025), (16, 3072, 768), (1, 3072, 768)],
        },
    ),
]
QUICK = {"matmul": [64, 512], "matmul_shapes": [(257, 257, 257), (1, 3072, 768)]}  # for the demo
