"""What numba-cuda leaves to do on a GPU: indices known to be positive, integers that wrap round, and compiled kernels
kept on disk. How kernels are launched is in `launching`."""

import functools
import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


RANGES = {  # of the registers that say where a thread is: from … to below; CUDA Programming Guide, compute capabilities
    "tid.x": (0, 1024), "tid.y": (0, 1024), "tid.z": (0, 64), "laneid": (0, 32),
    "ntid.x": (1, 1025), "ntid.y": (1, 1025), "ntid.z": (1, 65),
    "ctaid.x": (0, 2**31 - 1), "ctaid.y": (0, 65535), "ctaid.z": (0, 65535),
    "nctaid.y": (1, 65536), "nctaid.z": (1, 65536),
}  # fmt: skip


def tell_ranges():
    """Have numba-cuda tell the compiler what values ``threadIdx``, ``blockIdx`` and so on can have.

    An index below 0 counts from the end in Python, and each access checks for that: some five instructions, more than
    most addresses need. An index made of registers that are never negative needs no check, nor a division of it the
    extra steps of a negative number; but the compiler has to know. Costs nothing, changes no result.
    """
    from numba.cuda import nvvmutils

    original = nvvmutils.call_sreg

    @functools.wraps(original)
    def call_sreg(builder, name):
        value = original(builder, name)
        if name in RANGES:
            bounds = [value.type(bound) for bound in RANGES[name]]
            value.set_metadata("range", builder.module.add_metadata(bounds))
        return value

    nvvmutils.call_sreg = call_sreg


def wrap_integers():
    """Have signed integers wrap round when they overflow, as on the CPU backend and in NumPy.

    Numba tells the compiler that they never do, and a compiler that also knows the range of an index takes it at its
    word: ``np.int64(i) * 6364136223846793005 % n``, a hash, was taken to be positive (found by the random kernels).
    """
    from numba.cuda.cpython import numbers

    numbers._int_arith_flags = lambda result_type: []


def tell_compiler():
    """What changes the code of a kernel: :func:`tell_ranges` and :func:`wrap_integers`."""
    tell_ranges()
    wrap_integers()


def install():
    """All of this, and `common.launching`."""
    from . import launching

    tell_compiler()
    keep_compiled()
    launching.install()


def keep_compiled():
    """Have numba-cuda keep the compiled kernels of ``chapters/`` on disk: a second start compiles nothing.

    numba-cuda recognises a kernel by its own file alone; a device function from another may have changed. So the
    folder, in ``MINI_CACHE_DIR`` or ``~/.cache/kernel-by-kernel``, is named after all sources of the book.
    """
    from numba.cuda.core import config
    from numba.cuda.dispatcher import CUDADispatcher

    home = Path(os.environ.get("MINI_CACHE_DIR") or Path.home() / ".cache" / "kernel-by-kernel")
    config.CACHE_DIR = config.CACHE_DIR or str(home / "gpu" / _sources_hash())
    original = CUDADispatcher.__init__

    @functools.wraps(original)
    def init(self, py_func, targetoptions, *args, **options):
        original(self, py_func, targetoptions, *args, **options)
        if not targetoptions.get("device") and Path(py_func.__code__.co_filename).is_relative_to(ROOT / "chapters"):
            self.enable_caching()

    CUDADispatcher.__init__ = init


@functools.cache
def _sources_hash():
    """16 hexadecimal digits that change with any source of the book that a kernel may be made of."""
    digest = hashlib.sha256()
    for folder in ("common", "chapters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
