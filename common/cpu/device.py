"""The host side of ``numba.cuda`` on a machine without a GPU: arrays, streams, events and the one device, the CPU.

Names, signatures and behaviour follow numba-cuda 0.30. A program calls these functions as ``cuda.to_device(...)`` and
so on. Streams and events are in :mod:`.streams`, the device and its context in :mod:`.context`, the array class in
:mod:`.arrays`; this module makes arrays, turns launch arguments into NumPy arrays, and gathers every public name.
"""

import contextlib

import numpy as np

from . import fresh
from .arrays import (
    DeviceNDArray,
    ManagedNDArray,
    MappedNDArray,
    allocate,
    checking,
    fill_with_poison,
    sentry_contiguous,
)
from .context import (
    Context,
    Device,
    MemoryInfo,
    close,
    cuda_error,
    current_context,
    defer_cleanup,
    detect,
    get_current_device,
    gpus,
    is_available,
    is_bfloat16_supported,
    is_float16_supported,
    is_fp8_supported,
    is_supported_version,
    list_devices,
    profile_start,
    profile_stop,
    profiling,
    require_context,
    select_device,
    synchronize,
)
from .streams import (
    Event,
    Stream,
    check_stream,
    default_stream,
    event,
    event_elapsed_time,
    external_stream,
    legacy_default_stream,
    per_thread_default_stream,
    stream,
)

__all__ = [
    "Context", "Device", "DeviceNDArray", "Event", "In", "InOut", "ManagedNDArray", "MappedNDArray", "MemoryInfo",
    "Out", "Stream", "as_cuda_array", "check_stream", "close", "cuda_error", "current_context", "default_stream",
    "defer_cleanup", "detect", "device_array", "device_array_like", "event", "event_elapsed_time", "external_stream",
    "from_cuda_array_interface", "get_current_device", "gpus", "host_view", "is_available", "is_bfloat16_supported",
    "is_cuda_array", "is_float16_supported", "is_fp8_supported", "is_supported_version", "legacy_default_stream",
    "list_devices", "managed_array", "mapped", "mapped_array", "mapped_array_like", "open_ipc_array",
    "per_thread_default_stream", "pinned", "pinned_array", "pinned_array_like", "profile_start", "profile_stop",
    "profiling", "require_context", "select_device", "stream", "synchronize", "to_device",
]  # fmt: skip


# --- arrays ---------------------------------------------------------------------------------------------------------


def to_device(obj, stream=0, copy=True, to=None):
    """Copy an array (or anything ``np.asarray`` takes) to a new :class:`DeviceNDArray` of the same shape and dtype.

    A device array is returned as it is. ``copy=False`` only allocates; ``to`` is an existing device array to fill
    instead. Raises ``ValueError`` if the host array is not contiguous, ``TypeError`` for records and objects.
    """
    check_stream(stream)
    if to is not None:
        if copy:
            to.copy_to_device(obj, stream=stream)
        return to
    if isinstance(obj, DeviceNDArray):
        return obj
    _refuse_gpu_memory(obj)
    host = np.asarray(obj)
    sentry_contiguous(host)
    made = DeviceNDArray(allocate(host.shape, host.dtype, host.strides), stream)
    if copy:
        made.copy_to_device(host, stream=stream)
    return made


def device_array(shape, dtype=np.float64, strides=None, order="C", stream=0):
    """A new uninitialised :class:`DeviceNDArray`. ``shape``: int or ints; ``strides``: bytes; ``order``: "C" or "F".

    With ``MINI_CHECK=1`` in the environment the contents are NaN (floats) or 0xA5 bytes (integers).
    """
    made = DeviceNDArray(allocate(shape, dtype, strides, order), check_stream(stream))
    fresh.made(made.host)
    return made


def device_array_like(ary, stream=0):
    """A new uninitialised device array with the shape, dtype and memory order of ``ary``."""
    return device_array(ary.shape, ary.dtype, **_layout_of(ary), stream=stream)


def pinned_array(shape, dtype=np.float64, strides=None, order="C"):
    """A new uninitialised ``np.ndarray``; on a GPU its memory is page-locked, which makes copies fast."""
    return allocate(shape, dtype, strides, order)


def pinned_array_like(ary):
    """A new uninitialised pinned array with the shape, dtype and memory order of ``ary``."""
    return pinned_array(ary.shape, ary.dtype, **_layout_of(ary))


def mapped_array(shape, dtype=np.float64, strides=None, order="C", stream=0, portable=False, wc=False):
    """A new uninitialised host array that kernels read and write in place. ``portable`` and ``wc`` change nothing."""
    made = allocate(shape, dtype, strides, order).view(MappedNDArray)
    made.stream = check_stream(stream)
    return made


def mapped_array_like(ary, stream=0, portable=False, wc=False):
    """A new uninitialised mapped array with the shape, dtype and memory order of ``ary``."""
    return mapped_array(ary.shape, ary.dtype, **_layout_of(ary), stream=stream, portable=portable, wc=wc)


def managed_array(shape, dtype=np.float64, strides=None, order="C", stream=0, attach_global=True):
    """A new uninitialised host array in managed memory; here the same as a mapped one."""
    made = allocate(shape, dtype, strides, order).view(ManagedNDArray)
    made.stream = check_stream(stream)
    return made


@contextlib.contextmanager
def pinned(*arylist):
    """A context manager that page-locks host arrays on a GPU; here it only checks that they could be."""
    for ary in arylist:
        _check_lockable(ary, "pinned")
    yield


@contextlib.contextmanager
def mapped(*arylist, stream=0):
    """A context manager that gives device arrays sharing the memory of host arrays: one, or a list of several."""
    check_stream(stream)
    for ary in arylist:
        _check_lockable(ary, "mapped")
    arrays = [DeviceNDArray(ary.view(np.ndarray), stream) for ary in arylist]
    yield arrays[0] if len(arrays) == 1 else arrays


def as_cuda_array(obj, sync=True):
    """A device array that shares the memory of ``obj``, which must be in this device's memory (``TypeError``)."""
    if isinstance(obj, DeviceNDArray):
        return DeviceNDArray(obj.host, obj.stream)
    _refuse_gpu_memory(obj)
    raise TypeError(f"*obj* doesn't implement the cuda array interface: {type(obj).__name__}; use cuda.to_device(obj)")


def is_cuda_array(obj):
    """Whether ``obj`` is a device array or has the ``__cuda_array_interface__`` attribute."""
    return isinstance(obj, DeviceNDArray) or hasattr(obj, "__cuda_array_interface__")


def from_cuda_array_interface(desc, owner=None, sync=True):
    """Not on the CPU backend (``NotImplementedError``): the interface describes memory of a GPU."""
    raise NotImplementedError("__cuda_array_interface__ describes memory of a GPU, and the CPU backend has none")


def open_ipc_array(handle, shape, dtype, strides=None, offset=0):
    """Not on the CPU backend (``NotImplementedError``): IPC handles are a GPU driver's."""
    raise NotImplementedError("IPC handles belong to a GPU driver; use multiprocessing.shared_memory on the CPU")


# --- kernel arguments -----------------------------------------------------------------------------------------------


class InOut:
    """Marks a kernel argument that is copied to the device before a launch and back after it (the default)."""

    def __init__(self, value):
        self.value = value


class In(InOut):
    """Marks a kernel argument that is only copied to the device: what the kernel writes to it is lost."""


class Out(InOut):
    """Marks a kernel argument that is only copied back: the kernel must not read it before writing."""


def host_view(arg):
    """The value a compiled kernel gets for a launch argument.

    - a device array: the ``np.ndarray`` underneath;
    - a NumPy array: itself (a mapped or managed one as a plain view), so that the kernel's writes are visible after
      the launch, as they are on a GPU after the copy back; it must be contiguous (``ValueError``), read-only stays;
    - a torch tensor in CPU memory, or an object with ``__array_interface__``: an array that shares its memory;
    - numbers, bools and NumPy scalars: themselves; a tuple: each of its items;
    - ``cuda.In(a)`` with a host array: a copy; with ``MINI_CHECK=1``, ``cuda.Out(a)`` with a host array: ``a`` filled
      with NaN or 0xA5 bytes, since what a kernel leaves unwritten is garbage on a GPU.

    Anything else raises ``TypeError``.
    """
    if type(arg) is DeviceNDArray:
        return arg.host
    if isinstance(arg, np.ndarray):
        sentry_contiguous(arg)
        return arg if type(arg) is np.ndarray else arg.view(np.ndarray)
    if isinstance(arg, (bool, int, float, complex, np.generic)):
        return arg
    if isinstance(arg, tuple):
        items = [host_view(item) for item in arg]
        return type(arg)(*items) if hasattr(arg, "_fields") else tuple(items)
    if isinstance(arg, InOut):
        inner = host_view(arg.value)
        if isinstance(inner, np.ndarray) and type(arg.value) is not DeviceNDArray:
            if type(arg) is In:
                return inner.copy(order="K")
            if type(arg) is Out and checking():
                fill_with_poison(inner)
        return inner
    _refuse_gpu_memory(arg)
    if hasattr(arg, "__array_interface__"):
        return host_view(np.asarray(arg))
    if any(base.__module__.partition(".")[0] == "torch" for base in type(arg).__mro__) and hasattr(arg, "numpy"):
        return host_view(arg.numpy())  # shares memory; other libraries' numpy() may copy
    raise TypeError(f"a kernel argument must be an array, a number or a tuple of them, got {type(arg).__name__}")


# --- helpers --------------------------------------------------------------------------------------------------------


def _layout_of(ary):
    """The ``strides`` and ``order`` that make a contiguous array in the memory order of ``ary``."""
    if ary.flags["F_CONTIGUOUS"] and not ary.flags["C_CONTIGUOUS"]:
        return {"strides": None, "order": "F"}
    if ary.flags["C_CONTIGUOUS"] or ary.ndim <= 1:
        return {"strides": None, "order": "C"}
    # A permuted array keeps its permutation: the axis with the smallest stride stays the fastest.
    strides, step = [0] * ary.ndim, ary.dtype.itemsize
    for axis in sorted(range(ary.ndim), key=lambda axis: ary.strides[axis]):
        strides[axis] = step
        step *= ary.shape[axis]
    return {"strides": tuple(strides), "order": "C"}


def _check_lockable(ary, verb):
    if not isinstance(ary, np.ndarray):
        raise TypeError(f"only NumPy arrays can be {verb}, got {type(ary).__name__}")
    sentry_contiguous(ary)


def _refuse_gpu_memory(obj):
    """Raise ``TypeError`` if ``obj`` holds memory of a real GPU, which the CPU backend cannot read."""
    device = getattr(obj, "device", "cpu")
    on_gpu = getattr(device, "type", "cpu") not in ("cpu", None) if hasattr(obj, "numpy") else False
    if on_gpu or hasattr(obj, "__cuda_array_interface__"):
        raise TypeError(
            f"this {type(obj).__name__} is in GPU memory, and the CPU backend runs on the host: move it to the CPU "
            "first (for a torch tensor .cpu()), or set MINI_BACKEND=gpu"
        )
