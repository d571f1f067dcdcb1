"""The module that takes the place of ``numba.cuda`` where there is no GPU."""

import sys
import types as pytypes

import numba

from . import device, runtime
from .errors import KernelError
from .launch import Dispatcher
from .stubs import build_stubs


def jit(func_or_sig=None, device=False, inline="never", link=(), debug=None, opt=None, cache=False, **options):
    """Decorator for kernels and device functions, as ``numba.cuda.jit``.

    An explicit signature is accepted and not needed: types come from the arguments of the first launch. ``debug``,
    ``opt``, ``cache``, ``fastmath``, ``lineinfo``, ``max_registers`` are accepted and change nothing here.
    """
    import types as pytypes

    if isinstance(func_or_sig, pytypes.FunctionType):
        return Dispatcher(func_or_sig, device=device)
    if isinstance(func_or_sig, Dispatcher):
        return func_or_sig
    return lambda function: Dispatcher(function, device=device)


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
