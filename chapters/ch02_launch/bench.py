"""What ``make bench CH=02`` measures: the same small kernel on less and less data, until only the launch is left."""

import numpy as np

from chapters.ch02_launch.kernels import blocks_for, double_reference, double_v1_unguarded, double_v2_guarded
from common.bench import Ladder

THREADS = 256


def _numpy_double(a):
    with np.errstate(over="ignore"):  # timed, it doubles the same numbers again and again, until they are infinite
        np.multiply(a.out, 2, out=a.out)


LADDERS = [
    Ladder(
        name="double",
        title="Doubling n floats in place",
        unit="GB/s",
        sizes={"cpu": [1 << 10, 1 << 16, 1 << 20, 1 << 24], "gpu": [1 << 10, 1 << 16, 1 << 22, 1 << 27]},
        make=lambda rng, n: {"out": rng.standard_normal(n, dtype=np.float32), "n": n},
        work=lambda n: 8 * n,  # every float is read and written
        versions={
            # the unguarded version may only be measured because every size is a multiple of the block
            "double_v1_unguarded": lambda a: double_v1_unguarded[a.n // THREADS, THREADS](a.out),
            "double_v2_guarded": lambda a: double_v2_guarded[blocks_for(a.n, THREADS), THREADS](a.out, a.n),
        },
        expected=lambda a: double_reference(a.out),
        library={"cpu": ("NumPy", _numpy_double), "gpu": ("`torch` mul_", lambda a: a.out.mul_(2))},
        tolerance=0,
    ),
]
QUICK = {"double": [1 << 10, 1 << 16, 1 << 22]}  # for the demo
