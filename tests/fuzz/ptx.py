"""Does numba-cuda take a random kernel? Compiling to PTX needs no GPU, only numba-cuda and ``MINI_BACKEND=ptx``."""

import inspect
import types
from contextlib import contextmanager

from tests.fuzz_cases import load_case


@contextmanager
def _kernels_kept_back(cuda):
    """A kernel with signatures is compiled at its decorator, for the GPU in the machine: keep it and its signatures."""
    original = cuda.jit

    def jit(given=None, **options):
        if options.get("device") or given is None or inspect.isfunction(given):
            return original(given, **options)
        signatures = given if isinstance(given, list) else [given]
        return lambda function: types.SimpleNamespace(py_func=function, signatures=signatures)

    cuda.jit = jit
    try:
        yield
    finally:
        cuda.jit = original


def compile_case(case, cc):
    """Compile the case's kernel, for each of its signatures, to PTX and machine code; returns the texts of PTX.

    cc is a compute capability such as (8, 0). Raises whatever numba-cuda or the assembler says.
    """
    import numba
    from numba import cuda
    from numba.cuda.core import sigutils

    from common.ptx_check import _stand_in_device, assemble

    _stand_in_device(cc)
    with _kernels_kept_back(cuda):
        kernel = load_case(case).kernel
    signatures = getattr(kernel, "signatures", None)
    if not isinstance(kernel, types.SimpleNamespace) or not signatures:
        signatures = [tuple(map(numba.typeof, case.make_args()))]
    texts = []
    for signature in signatures:
        parameters, _ = sigutils.normalize_signature(signature)
        ptx, _ = cuda.compile_ptx(kernel.py_func, parameters, cc=cc)
        if ".extern .func" not in ptx:  # float16 operators lie in a library that numba-cuda links at a launch
            assemble(ptx, cc)
        texts.append(ptx)
    return texts
