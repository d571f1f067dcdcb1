"""What ``make bench CH=04`` measures: copies, strides, layouts and the transpose."""

import numpy as np

from chapters.ch03_indexing.kernels import blocks_1d
from chapters.ch04_memory import kernels as ch04
from chapters.ch04_memory import transpose as transposes
from common.bench import Ladder

STRIDES = [1, 2, 4, 8, 16, 32]


def _numbers(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def _strided(rng, stride, n):
    return {"x": _numbers(rng, n * stride), "out": np.zeros(n, np.float32), "n": n, "stride": stride}


def _particles(rng, n):
    particles = _numbers(rng, n, len(ch04.PARTICLE))
    return {"aos": particles, "soa": np.ascontiguousarray(particles.T), "out": np.zeros(n, np.float32), "n": n}


TRANSPOSES = [
    (transposes.transpose_v1_naive, transposes.transpose_launch),
    (transposes.transpose_v2_tile, transposes.transpose_launch),
    (transposes.transpose_v3_padded, transposes.transpose_launch),
    (transposes.transpose_v4_unrolled, transposes.transpose_launch),
    (transposes.transpose_v5_float4, transposes.transpose_float4_launch),
]

LADDERS = [
    Ladder(
        name="copy",
        title="Copy of n floats",
        unit="GB/s",
        sizes={"cpu": [1 << 16, 1 << 24], "gpu": [1 << 20, 1 << 24, 1 << 28]},
        make=lambda rng, n: {"x": _numbers(rng, n), "out": np.zeros(n, np.float32), "n": n},
        work=lambda n: 8 * n,
        versions={
            "copy_v1_element": lambda a: ch04.copy_v1_element[blocks_1d(a.n)](a.x, a.out, a.n),
            "copy_v2_float4": lambda a: ch04.copy_v2_float4[ch04.copy_float4_launch(a.n)](a.x, a.out, a.n),
        },
        expected=lambda a: a.x,
        library={
            "cpu": ("`numpy.copyto`", lambda a: np.copyto(a.out, a.x)),
            "gpu": ("`torch` copy_", lambda a: a.out.copy_(a.x)),
        },
        tolerance=0,
    ),
    Ladder(
        name="stride",
        title="Copy of every stride-th float: bytes used, by stride",
        unit="GB/s",
        sizes={"cpu": STRIDES, "gpu": STRIDES},
        make=lambda rng, stride: _strided(rng, stride, 1 << 22),
        work=lambda stride: 8 << 22,
        versions={"copy_strided": lambda a: ch04.copy_strided[blocks_1d(a.n)](a.x, a.out, a.n, a.stride)},
        expected=lambda a: a.x[:: a.stride],
        tolerance=0,
    ),
    Ladder(
        name="layout",
        title="Kinetic energy of n particles: bytes used",
        unit="GB/s",
        sizes={"cpu": [1 << 20], "gpu": [1 << 20, 1 << 24]},
        make=_particles,
        work=lambda n: 20 * n,
        versions={
            "kinetic_energy_aos": lambda a: ch04.kinetic_energy_aos[blocks_1d(a.n)](a.aos, a.out, a.n),
            "kinetic_energy_soa": lambda a: ch04.kinetic_energy_soa[blocks_1d(a.n)](a.soa, a.out, a.n),
        },
        expected=lambda a: ch04.kinetic_energy_reference(a.aos),
    ),
    Ladder(
        name="transpose",
        title="Transpose of an n × n matrix",
        unit="GB/s",
        sizes={"cpu": [1024, 4096], "gpu": [1024, 4096, 16384]},
        make=lambda rng, n: {"x": _numbers(rng, n, n), "out": np.zeros((n, n), np.float32), "n": n},
        work=lambda n: 8 * n * n,
        versions={
            kernel.__name__: lambda a, kernel=kernel, launch=launch: kernel[launch(a.n, a.n)](a.x, a.out, a.n, a.n)
            for kernel, launch in TRANSPOSES
        },
        expected=lambda a: a.x.T,
        library={
            "cpu": ("NumPy", lambda a: np.copyto(a.out, a.x.T)),
            "gpu": ("torch", lambda a: a.out.copy_(a.x.T)),
        },
        tolerance=0,
    ),
]
QUICK = {"copy": [1 << 20], "stride": [1, 8, 32], "layout": [1 << 18], "transpose": [1024]}  # for the demo
