"""A bank of planted bugs, and of correct kernels that look like bugs (near misses), for the sanitizer.

Each bug is a small kernel whose faulty line ends in ``# BUG``; of a race, the second access may be on a line that
ends in ``# OTHER``, and of a barrier or a shuffle that some threads miss, so do the branches that keep them away.
All kernels are plain Numba-CUDA, so that NVIDIA's compute-sanitizer can be asked about the same ones on a GPU:

    python -m tests.planted_bugs                 every case under our sanitizer, as a table (on the CPU backend)
    python -m tests.planted_bugs no_guard        one case and what the sanitizer says about it
    python tests/planted_bugs/on_gpu.py          compute-sanitizer's four tools beside it (on a GPU)
"""

import common  # noqa: F401  (picks the backend, before Numba's cuda is imported)

# isort: split
from . import (  # noqa: F401  (each adds its cases)
    barriers,
    bounds,
    global_races,
    near_memory,
    near_races,
    near_sync,
    overflow,
    shared_races,
    shuffles,
    uninitialized,
)
from .registry import CASES, KINDS, Case, disagreements, functions, marked

__all__ = ["BUGS", "CASES", "KINDS", "NEAR_MISSES", "Case", "disagreements", "functions", "marked"]

BUGS = [case for case in CASES.values() if case.bug]
NEAR_MISSES = [case for case in CASES.values() if not case.bug]
