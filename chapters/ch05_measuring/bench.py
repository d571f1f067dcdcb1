"""What ``make bench CH=05`` measures: the roofline, chains with few warps, and a copy at falling occupancy."""

import numpy as np
from numba import cuda

from chapters import BACKEND
from chapters.ch03_indexing.kernels import blocks_1d
from chapters.ch04_memory import kernels as ch04
from chapters.ch05_measuring import kernels as ch05
from common.bench import Ladder

ONE = np.float32(1)  # a step is y = 1 * y + 1: exact in whole numbers, so that one step more or less is seen
ROOFLINE_N = 1 << 26 if BACKEND == "gpu" else 1 << 20
FEW_N, FEW_STEPS = (1 << 22 if BACKEND == "gpu" else 1 << 16), 2048
OCCUPANCY_N = 1 << 26 if BACKEND == "gpu" else 1 << 24
SMALL_BLOCK = 64  # threads: even the largest block of shared memory leaves room for some of them

CHAINS = [ch05.fma_chain_v1_one, ch05.fma_chain_v2_four, ch05.fma_chain_v3_float4, ch05.fma_chain_v4_unrolled]


def _whole_numbers(rng, n):
    return {"x": rng.integers(-8, 9, n).astype(np.float32), "out": np.zeros(n, np.float32), "n": n}


def _few(rng, threads):
    blocks = cuda.get_current_device().MULTIPROCESSOR_COUNT  # one block each
    return {**_whole_numbers(rng, FEW_N), "launch": ch05.fma_chain_few_launch(threads, blocks)}


def _copy(kernel, floats_a_thread):
    def launch(a):
        grid, block = blocks_1d(-(-a.n // floats_a_thread), SMALL_BLOCK)
        kernel[grid, block, 0, a.kib << 10](a.x, a.out, a.n)  # the kernel does not use that shared memory

    return launch


LADDERS = [
    Ladder(
        name="roofline",
        title="Multiply-add chains: operations a second, by steps a float",
        unit="GFLOP/s",
        sizes={"cpu": [1, 16, 256], "gpu": [1, 4, 16, 64, 256, 1024]},
        make=lambda rng, steps: {**_whole_numbers(rng, ROOFLINE_N), "steps": steps},
        work=lambda steps: ch05.FLOPS_PER_STEP * steps * ROOFLINE_N,
        versions={
            kernel.__name__: lambda a, kernel=kernel: kernel[ch05.fma_chain_launch(a.n)](
                a.x, a.out, ONE, ONE, a.steps, a.n
            )
            for kernel in CHAINS
        },
        expected=lambda a: a.x + a.steps,
        tolerance=0,
        share="library",
    ),
    Ladder(
        name="few_warps",
        title="The same with one block a multiprocessor: operations a second, by threads in it",
        unit="GFLOP/s",
        sizes={"cpu": [128, 1024], "gpu": [128, 256, 512, 1024]},
        make=_few,
        work=lambda threads: ch05.FLOPS_PER_STEP * FEW_STEPS * FEW_N,
        versions={
            kernel.__name__: lambda a, kernel=kernel: kernel[a.launch](a.x, a.out, ONE, ONE, FEW_STEPS, a.n)
            for kernel in CHAINS
        },
        expected=lambda a: a.x + FEW_STEPS,
        tolerance=0,
        share="library",
    ),
    Ladder(
        name="occupancy",
        title=f"Copy in blocks of {SMALL_BLOCK} threads, by shared memory that each block takes away",
        unit="GB/s",
        sizes={"cpu": [0, 48], "gpu": [0, 8, 16, 32, 48]},
        make=lambda rng, kib: {**_whole_numbers(rng, OCCUPANCY_N), "kib": kib},
        work=lambda kib: 8 * OCCUPANCY_N,
        versions={
            "copy_v1_element": _copy(ch04.copy_v1_element, 1),
            "copy_v2_float4": _copy(ch04.copy_v2_float4, 4),
        },
        expected=lambda a: a.x,
        tolerance=0,
        label=lambda kib: f"{kib} KiB",
    ),
]
QUICK = {"roofline": [1, 16, 256], "few_warps": [256], "occupancy": [0, 48]}  # for the demo
