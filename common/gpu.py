"""What numba-cuda leaves to do on a GPU: indices known to be positive, integers that wrap round, more than 48 KiB of
shared memory, and compiled kernels kept on disk."""

import functools
import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLAIN_SHARED = 40 * 1024  # a block may have 48 KiB without asking, those that the kernel declares included


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
    """All of this; and let launches ask for more than 48 KiB of dynamic shared memory, as the CPU backend does.

    CUDA wants each kernel to be told beforehand; numba-cuda has no way to do so, and answers "invalid argument".
    """
    from numba.cuda.dispatcher import _Kernel

    tell_compiler()
    keep_compiled()
    original = _Kernel.launch

    @functools.wraps(original)
    def launch(self, args, griddim, blockdim, stream=0, sharedmem=0):
        allow_shared(self, sharedmem)
        return original(self, args, griddim, blockdim, stream, sharedmem)

    _Kernel.launch = launch


def allow_shared(kernel, n_bytes):
    """Let a compiled kernel have ``n_bytes`` of dynamic shared memory. Raises ValueError if a block cannot have it."""
    if n_bytes <= PLAIN_SHARED or n_bytes <= getattr(kernel, "_shared_allowed", 0):
        return
    from cuda.bindings import driver
    from numba import cuda

    handle = driver.CUkernel(int(kernel._codelibrary.get_cufunc().kernel.handle))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    device = driver.CUdevice(cuda.get_current_device().id)
    (answer,) = driver.cuKernelSetAttribute(attribute, n_bytes, handle, device)
    if answer != driver.CUresult.CUDA_SUCCESS:
        raise ValueError(
            f"{n_bytes} bytes of shared memory, more than a block of this device can have ({answer.name}): "
            "launch a version with smaller tiles"
        )
    kernel._shared_allowed = n_bytes


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
