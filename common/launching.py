"""How a kernel is launched on a GPU: the one place where numba-cuda's own way is changed.

numba-cuda launches through two methods, ``CUDADispatcher.call`` (which kernel) and ``_Kernel.launch`` (what it was
compiled to). `install` puts its own in their place, once, and these can do what numba-cuda cannot:

* launch with more than 48 KiB of dynamic shared memory, as the CPU backend does (`allow_shared`);
* report each launch, before and after it (`watched`, for `common.trace`);
* launch on another stream than the caller's, and launch kernels that may begin before the one in front has ended
  (`launches_on`, for `common.graph`).

Source: CUDA Programming Guide, "Programmatic Dependent Launch", and the driver's ``cuLaunchKernelEx``.
"""

import ctypes
import functools
import threading
from contextlib import contextmanager

PLAIN_SHARED = 40 * 1024  # a block may have 48 KiB without asking, those that the kernel declares included


class LaunchError(RuntimeError):
    """The CUDA driver did not launch a kernel; the message has its own word for it."""


class _Thread(threading.local):
    dispatcher = None  # whose launch is under way: numba-cuda may hand it on to a specialised copy of the kernel
    stream = None  # what `launches_on` asked for
    dependent = False


_here = _Thread()
_watchers = []  # (before, after), see `watched`


def install():
    """Replace numba-cuda's two methods."""
    from numba.cuda.dispatcher import CUDADispatcher, _Kernel

    call_original, launch_original = CUDADispatcher.call, _Kernel.launch

    @functools.wraps(call_original)
    def call(self, args, launch_config):
        if _here.dispatcher is not None:
            return call_original(self, args, launch_config)
        _here.dispatcher = self
        try:
            return call_original(self, args, launch_config)
        finally:
            _here.dispatcher = None

    @functools.wraps(launch_original)
    def launch(self, args, griddim, blockdim, stream=0, sharedmem=0):
        stream = stream if _here.stream is None else _here.stream
        allow_shared(self, sharedmem)
        watchers = list(_watchers)
        noted = [before(stream) for before, _ in watchers]
        if _here.dependent and _waits(self):
            _launch_dependent(self, args, griddim, blockdim, stream, sharedmem)
        else:
            launch_original(self, args, griddim, blockdim, stream, sharedmem)
        for (_, after), note in zip(watchers, noted):
            after(note, _here.dispatcher, tuple(griddim), tuple(blockdim), stream, args)

    CUDADispatcher.call, _Kernel.launch = call, launch


@contextmanager
def watched(before, after):
    """Within it, ``before(stream)`` is called before each launch, in whatever thread, and ``after(note, kernel, grid,
    block, stream, args)`` after it. note: what ``before`` returned. kernel: the object that ``@cuda.jit`` made."""
    watcher = before, after
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def launches_on(stream, dependent=False):
    """Within it, this thread launches every kernel on ``stream``: work on the default stream cannot be recorded.

    dependent: launch the kernels that call ``griddep_wait`` as dependents of the one in front.
    """
    from numba.cuda.cudadrv.driver import _to_core_stream

    outer = _here.stream, _here.dependent
    _here.stream, _here.dependent = _to_core_stream(stream), dependent
    try:
        yield
    finally:
        _here.stream, _here.dependent = outer


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


def _waits(kernel):
    """Whether a compiled kernel calls ``griddep_wait``: seen from its LLVM code, which is at hand, unlike PTX."""
    if not hasattr(kernel, "_waits_for_last"):
        kernel._waits_for_last = "griddepcontrol.wait" in kernel._codelibrary.get_llvm_str()
    return kernel._waits_for_last


def _launch_dependent(kernel, args, griddim, blockdim, stream, sharedmem):
    """What numba-cuda's ``_Kernel.launch`` does, with the attribute of a dependent launch, which it cannot set."""
    from cuda.bindings import driver

    handle, values = int(stream.handle), []
    for kind, value in zip(kernel.argument_types, args):
        kernel._prepare_args(kind, value, handle, [], values)
    values = [value if isinstance(value, ctypes._SimpleCData) else ctypes.c_int64(int(value)) for value in values]
    places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = griddim
    config.blockDimX, config.blockDimY, config.blockDimZ = blockdim
    config.sharedMemBytes, config.hStream = sharedmem, driver.CUstream(handle)
    config.attrs, config.numAttrs = [attribute], 1
    function = driver.CUfunction(int(kernel._codelibrary.get_cufunc().kernel.handle))
    (answer,) = driver.cuLaunchKernelEx(config, function, ctypes.addressof(places), 0)
    if answer != driver.CUresult.CUDA_SUCCESS:
        raise LaunchError(f"the CUDA driver answered {answer.name} to the launch of {kernel.entry_name}")
