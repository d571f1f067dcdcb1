"""The one device of the CPU backend, number 0, and its context: what it is called, how many cores, which limits."""

import contextlib
import functools
from collections import namedtuple

from . import machine, streams

MemoryInfo = namedtuple("MemoryInfo", "free total")

# The limits a kernel meets are those of compute capability 8.0, so that what fits here also fits a GPU.
# Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 8,
    "COMPUTE_CAPABILITY_MINOR": 0,
    "WARP_SIZE": 32,
    "MAX_THREADS_PER_BLOCK": 1024,
    "MAX_BLOCK_DIM_X": 1024,
    "MAX_BLOCK_DIM_Y": 1024,
    "MAX_BLOCK_DIM_Z": 64,
    "MAX_GRID_DIM_X": 2**31 - 1,
    "MAX_GRID_DIM_Y": 65535,
    "MAX_GRID_DIM_Z": 65535,
    "MAX_SHARED_MEMORY_PER_BLOCK": 48 * 1024,
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 * 1024,
    "MAX_THREADS_PER_MULTIPROCESSOR": 2048,
    "TOTAL_CONSTANT_MEMORY": 64 * 1024,
    "CAN_MAP_HOST_MEMORY": 1,
    "UNIFIED_ADDRESSING": 1,
    "MANAGED_MEMORY": 1,
    "INTEGRATED": 1,
    "ASYNC_ENGINE_COUNT": 0,
    "CONCURRENT_KERNELS": 0,
    "COOPERATIVE_LAUNCH": 0,
    "KERNEL_EXEC_TIMEOUT": 0,
    "TCC_DRIVER": 0,
}


class Device:
    """The CPU as a device, number 0. Also a context manager: ``with cuda.gpus[0]:``.

    ``compute_capability`` is (8, 0), chosen because programs compare it to learn what kernels may use: the backend
    runs what a device of that level runs in plain Numba kernels (shuffles and votes with masks, ``match``, float16,
    all atomics), not less as (0, 0) would say. It says nothing about speed. ``MULTIPROCESSOR_COUNT`` is the number
    of cores this process may use; the other limits are those of compute capability 8.0.
    """

    id = 0
    compute_capability = (8, 0)
    uuid = "CPU-00000000-0000-0000-0000-000000000000"
    supports_float16 = True
    supports_bfloat16 = False
    supports_fp8 = False

    @functools.cached_property
    def name(self):
        """Processor and cores, such as ``"CPU (AMD EPYC, 2 cores)"``."""
        return machine.device_name()

    @functools.cached_property
    def MULTIPROCESSOR_COUNT(self):
        """Cores this process may use (int)."""
        return machine.cpu_count()

    def __getattr__(self, attribute):
        if attribute in _ATTRIBUTES:
            return _ATTRIBUTES[attribute]
        known = ", ".join(sorted([*_ATTRIBUTES, "MULTIPROCESSOR_COUNT"])) if attribute.isupper() else ""
        raise AttributeError(
            f"the CPU backend's device has no attribute {attribute!r}" + (f"; it has {known}" if known else "")
        )

    def __repr__(self):
        return f"<CPU backend device {self.id} '{self.name}'>"

    __str__ = __repr__

    def __enter__(self):
        return None  # numba-cuda's gives nothing either

    def __exit__(self, *error):
        return None

    def get_primary_context(self):
        """The one :class:`Context`."""
        return _CONTEXT

    def reset(self):
        """Free what the device holds: nothing, arrays live as long as something refers to them."""


class Context:
    """The state of the device: ``cuda.current_context()``."""

    def __init__(self, device):
        self.device = device

    def get_memory_info(self):
        """``MemoryInfo(free, total)`` of the machine's memory in bytes, a container's limit included."""
        return MemoryInfo(*machine.memory_info())

    def synchronize(self):
        """See :func:`synchronize`."""

    def reset(self):
        """See :meth:`Device.reset`."""

    def push(self):
        """Nothing to do: there is one context."""

    def pop(self):
        """Nothing to do: there is one context."""

    def defer_cleanup(self):
        """See :func:`defer_cleanup`."""
        return contextlib.nullcontext()

    create_stream = staticmethod(streams.stream)
    create_event = staticmethod(streams.event)
    get_default_stream = staticmethod(streams.default_stream)
    get_legacy_default_stream = staticmethod(streams.legacy_default_stream)
    get_per_thread_default_stream = staticmethod(streams.per_thread_default_stream)
    create_external_stream = staticmethod(streams.external_stream)

    def __repr__(self):
        return f"<Context of {self.device!r}>"


class _DeviceList(tuple):
    """``cuda.gpus``: a sequence of one device."""

    __slots__ = ()

    @property
    def current(self):
        """The device in use."""
        return self[0]

    def __str__(self):
        return ", ".join(map(str, self))


_DEVICE = Device()
_CONTEXT = Context(_DEVICE)
gpus = _DeviceList([_DEVICE])


def current_context(devnum=None):
    """The :class:`Context` of device ``devnum`` (None or 0; ``IndexError`` otherwise)."""
    return select_device(devnum or 0).get_primary_context()


def select_device(device_id):
    """Use device ``device_id`` and return it; the CPU backend has one, number 0 (``IndexError`` otherwise)."""
    if int(device_id) != 0:
        raise IndexError(f"device {device_id} does not exist: the CPU backend has one device, number 0")
    return _DEVICE


def get_current_device():
    """The :class:`Device` in use."""
    return _DEVICE


def list_devices():
    """All devices: ``cuda.gpus``."""
    return gpus


def synchronize():
    """Wait for all work on the device; every call has already finished its own."""


def close():
    """Drop all contexts: nothing to do."""


def detect():
    """Print the device found and return True."""
    print(f"Found {len(gpus)} device (CPU backend, no GPU)")
    for device in gpus:
        print(f"id {device.id}    {device.name}    [SUPPORTED]")
        print(f"    Compute Capability (features, not speed): {device.compute_capability[0]}.0")
        print(f"    UUID: {device.uuid}")
    return True


def is_available():
    """True: kernels can be launched."""
    return True


def is_supported_version():
    """True: there is no CUDA runtime whose version could be unsupported."""
    return True


def cuda_error():
    """None: there was no error at start."""
    return None


def is_float16_supported():
    """True."""
    return _DEVICE.supports_float16


def is_bfloat16_supported():
    """False: neither NumPy nor the CPU backend has bfloat16."""
    return _DEVICE.supports_bfloat16


def is_fp8_supported():
    """False: neither NumPy nor the CPU backend has 8-bit floats."""
    return _DEVICE.supports_fp8


def defer_cleanup():
    """A context manager that on a GPU puts off freeing memory; here it does nothing."""
    return contextlib.nullcontext()


def require_context(fn):
    """A decorator that on a GPU makes sure of a context; here it returns ``fn``."""
    return fn


def profile_start():
    """Start the GPU profiler: nothing to do."""


def profile_stop():
    """Stop the GPU profiler: nothing to do."""


@contextlib.contextmanager
def profiling():
    """A context manager around :func:`profile_start` and :func:`profile_stop`."""
    profile_start()
    yield
    profile_stop()
