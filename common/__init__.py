"""The ground floor: import this before Numba's ``cuda`` and it picks where kernels run.

``MINI_BACKEND=gpu|cpu|auto`` decides by hand; ``auto``, the default, takes the GPU where the driver and a device
answer. After ``import common``, ``from numba import cuda`` gives numba-cuda on a GPU, and our CPU backend elsewhere.
"""

import importlib
import os
import sys
import warnings

from .backend import BackendError, choose

__all__ = ["BACKEND", "BackendError", "choice", "memory_report", "sanitize"]

choice = choose()
BACKEND = choice.name
if getattr(choice, "warning", None):
    warnings.warn(choice.warning, stacklevel=2)

# Lessons launch small grids on purpose; numba-cuda would warn at each that they do not fill the GPU.
os.environ.setdefault("NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS", "0")

if BACKEND == "cpu":
    from .cpu.cuda_module import install as _install

    if "numba.cuda" in sys.modules and not getattr(sys.modules["numba.cuda"], "is_cpu_backend", False):
        warnings.warn(
            "numba.cuda was imported before common: kernels defined before now do not use the CPU backend. "
            "Put `import common` first.",
            stacklevel=2,
        )
    _install()
elif BACKEND == "gpu":
    from .gpu import install as _install

    _install()
elif BACKEND == "ptx":
    from .gpu import tell_compiler as _tell_compiler

    _tell_compiler()


def __getattr__(name):
    # Looked up late: `python -m common.sanitize` and `python -m common.memory` must be the first to import these.
    if name == "sanitize":
        return importlib.import_module("common.sanitize")
    if name == "memory_report":
        return importlib.import_module("common.memory").memory_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
