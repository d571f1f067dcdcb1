"""The module that takes the place of ``numba.cuda`` where there is no GPU."""

import sys
import types as pytypes

import numba
from numba.core.errors import DeprecationError

from . import device, runtime
from .errors import KernelError
from .launch import MAX_THREADS, Dispatcher
from .signatures import is_signature
from .stubs import build_stubs

OPTIONS = {  # of a kernel, besides those that jit's own parameters name
    "fastmath", "extensions", "max_registers", "lto", "forceinline", "shared_memory_carveout",
}  # fmt: skip


def jit(
    func_or_sig=None, device=False, inline="never", link=(), debug=None, opt=None, lineinfo=False, cache=False,
    launch_bounds=None, **options,
):  # fmt: skip
    """Decorator for kernels and device functions, as ``numba.cuda.jit``.

    An explicit signature (a string, a Numba signature, a tuple of types, or a list of these) means what it means on a
    GPU, see `signatures`; without one, types come from the arguments of each launch. ``debug=True`` reports divisions
    by zero; ``launch_bounds`` limits the threads of a block. ``opt``, ``cache``, ``fastmath``, ``lineinfo``,
    ``max_registers`` and the like are accepted and change nothing here. What numba-cuda refuses is refused.
    """
    for name in ("argtypes", "restype", "bind"):
        if options.get(name) is not None:
            raise DeprecationError(f"{name} of cuda.jit is deprecated: give a signature in the first place")
    if options.get("boundscheck"):
        raise NotImplementedError("bounds checking is not supported for CUDA; here, MINI_CHECK=1 checks every index")
    unknown = sorted(options.keys() - OPTIONS - {"argtypes", "restype", "bind", "boundscheck"})
    if unknown and not device:
        raise TypeError(f"cuda.jit got an unexpected keyword argument {unknown[0]!r}")
    if link:
        raise NotImplementedError("link= names CUDA code, which the CPU backend cannot run; a GPU links it")
    bounds = launch_bounds if isinstance(launch_bounds, tuple) else (launch_bounds or MAX_THREADS,)
    if len(bounds) > 3:
        raise ValueError(f"Got {len(bounds)} launch bounds: {bounds}; a tuple of at most 3 is needed")
    signatures = func_or_sig if is_signature(func_or_sig) else None

    def decorate(function):
        if isinstance(function, Dispatcher):
            return function
        checked = bool(debug) and not options.get("fastmath")  # fast division does not look for zeros
        return Dispatcher(function, device, signatures, checked, min(bounds[0], MAX_THREADS))

    return decorate if func_or_sig is None or signatures is not None else decorate(func_or_sig)


def build():
    """The stand-in module, with all names of ``numba.cuda`` that this backend has."""
    module = pytypes.ModuleType("numba.cuda", "Kernel by Kernel's CPU backend in the place of numba.cuda.")
    module.__path__ = []  # so that `from numba.cuda import …` and `import numba.cuda.libdevice` find it
    for key in device.__all__:
        setattr(module, key, getattr(device, key))
    for key, value in build_stubs(tuple(runtime.FP16), tuple(runtime.LIBDEVICE)).items():
        setattr(module, key, value)
    module.jit, module.KernelError = jit, KernelError
    module.is_cpu_backend = True
    return module


def install():
    """Put the stand-in where ``from numba import cuda`` finds it. Returns the module."""
    present = sys.modules.get("numba.cuda")
    if present is not None and getattr(present, "is_cpu_backend", False):
        return present
    module = build()
    sys.modules["numba.cuda"] = module
    sys.modules["numba.cuda.libdevice"] = module.libdevice
    numba.cuda = module
    return module
