"""Device arrays of the CPU backend: memory of their own, with the rules of numba-cuda's ``DeviceNDArray``.

A device array never shares memory with the host array it was made from, just as on a GPU: what the host changes after
``to_device`` is not seen by a kernel, and a kernel's result is seen only after ``copy_to_host``. What numba-cuda
refuses (non-contiguous copies, mixed dtypes, fancy indices) is refused here, so that a program which runs here also
runs there. Elements are numbers or bools; records (structured dtypes) are not covered.
"""

import math
import operator
import os

import numpy as np

from . import fresh, guard
from .streams import IN_ORDER, check_stream

POISON_BYTE = 0xA5  # MINI_CHECK=1: every byte of an uninitialised integer; floats become NaN

_NOT_CONTIGUOUS = (
    "Array contains non-contiguous buffer and cannot be transferred as a single memory region "
    "(shape {}, strides {}). Please ensure contiguous buffer with numpy.ascontiguousarray()"
)


def allocate(shape, dtype=np.float64, strides=None, order="C", device=True):
    """A new ``np.ndarray`` with uninitialised contents whose memory starts at a multiple of 64 bytes.

    ``shape`` is an int or a sequence of ints, ``strides`` are bytes, ``order`` is ``"C"`` or ``"F"``. ``device``: it is
    memory that kernels work on, with guards round it (see `guard`). With the environment variable ``MINI_CHECK=1`` its
    contents are NaN for floats and ``0xA5`` bytes for integers, so that a read before the first write shows. Raises
    ``TypeError`` or ``ValueError`` for a bad argument.
    """
    dtype = _check_dtype(dtype)
    shape = _check_shape(shape)
    if not strides:
        if order not in ("C", "F"):
            raise ValueError(f"order must be either 'C' or 'F', got {order!r}")
        strides = _contiguous_strides(shape, dtype.itemsize, order)
    strides = (strides,) if isinstance(strides, (int, np.integer)) else tuple(strides)
    if len(strides) != len(shape):
        raise ValueError(f"strides {strides} do not match the {len(shape)} dimensions of shape {shape}")
    first, end = _extent(shape, strides, dtype.itemsize)
    if device:
        raw, start = guard.memory(end - first)
    else:
        raw = np.empty(end - first + guard.ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % guard.ALIGNMENT
    host = np.ndarray(shape, dtype, buffer=raw, offset=start - first, strides=strides)
    if device and checking():
        fill_with_poison(host)
    return host


# The dict behind os.environ, which is asked at each launch: it answers in a tenth of the time.
_VARIABLES, _CHECK = os.environ._data, os.environ.encodekey("MINI_CHECK")
_OFF = (None, os.environ.encodevalue(""), os.environ.encodevalue("0"))


def checking():
    """Whether the environment variable ``MINI_CHECK`` asks for the checked mode."""
    return _VARIABLES.get(_CHECK) not in _OFF


def fill_with_poison(host):
    """Fill an array with what shows when it is read by mistake: NaN, or bytes of 0xA5 (a bool becomes True)."""
    if host.dtype.kind in "fc":
        host.fill(np.nan)
    elif host.dtype.kind == "b":
        host.fill(True)
    else:
        host.fill(np.frombuffer(bytes([POISON_BYTE]) * host.dtype.itemsize, host.dtype)[0])


class DeviceNDArray:
    """An array in the CPU backend's device memory. Make one with ``cuda.to_device`` or ``cuda.device_array``.

    ``host`` is the ``np.ndarray`` underneath, for the launcher; a program that uses it does not run on a GPU.
    """

    __slots__ = ("host", "stream", "canaries", "__weakref__")
    __cuda_ndarray__ = True

    def __init__(self, host, stream=0):
        self.host = host
        self.stream = stream
        self.canaries = guard.pairs_of(host)

    shape = property(lambda self: self.host.shape, doc="Tuple of ints.")
    strides = property(lambda self: self.host.strides, doc="Tuple of ints: bytes from one element to the next.")
    dtype = property(lambda self: self.host.dtype, doc="The NumPy dtype.")
    ndim = property(lambda self: self.host.ndim, doc="Number of dimensions.")
    size = property(lambda self: self.host.size, doc="Number of elements.")
    nbytes = property(lambda self: self.host.nbytes, doc="Bytes of all elements.")
    T = property(lambda self: self.transpose(), doc="The transposed 2-D array (a copy, as in numba-cuda).")

    @property
    def alloc_size(self):
        """Bytes from the first to the last element, gaps between strided elements included."""
        first, end = _extent(self.shape, self.strides, self.dtype.itemsize)
        return end - first

    @property
    def flags(self):
        """A dict with ``C_CONTIGUOUS`` and ``F_CONTIGUOUS``."""
        return {"C_CONTIGUOUS": self.is_c_contiguous(), "F_CONTIGUOUS": self.is_f_contiguous()}

    def is_c_contiguous(self):
        """Whether the elements lie row after row without gaps."""
        return self.host.flags.c_contiguous

    def is_f_contiguous(self):
        """Whether the elements lie column after column without gaps."""
        return self.host.flags.f_contiguous

    def __repr__(self):
        return f"<DeviceNDArray shape={self.shape} dtype={self.dtype} on the CPU backend>"

    def __len__(self):
        if not self.shape:
            raise TypeError("len() of a 0-dimensional device array")
        return self.shape[0]

    def __array__(self, dtype=None, copy=None):
        """A host copy, so that ``np.asarray(d)`` works; ``copy=False`` raises ``ValueError``."""
        if copy is False:
            raise ValueError("`copy=False` is not supported. A copy is always created.")
        host = self.copy_to_host()
        return host if dtype is None else host.astype(dtype, copy=False)

    # --- copies -------------------------------------------------------------------------------------------------

    def copy_to_host(self, ary=None, stream=0):
        """Copy to ``ary``, or to a new array of the same strides, and return it.

        ``ary`` must have the same dtype (``TypeError``), and the same shape and strides up to axes of length 1
        (``ValueError``). Negative strides raise ``NotImplementedError``, as in numba-cuda.
        """
        check_stream(stream)
        if any(stride < 0 and length > 1 for stride, length in zip(self.strides, self.shape, strict=True)):
            raise NotImplementedError(f"D->H copy not implemented for negative strides: {self.strides}")
        if ary is None:
            ary = allocate(self.shape, self.dtype, self.strides, device=False)
        elif not isinstance(ary, np.ndarray):
            raise TypeError(f"copy_to_host copies into a NumPy array, got {type(ary).__name__}")
        else:
            _check_compatible(self.host, ary)
        if self.size:
            with IN_ORDER:
                np.copyto(ary.squeeze(), self.host.squeeze())
        return ary

    def copy_to_device(self, ary, stream=0):
        """Copy a host array or another device array into this one.

        Raises ``TypeError`` for another dtype (nothing is converted), ``ValueError`` for another shape or where this
        array is not contiguous. A host array that is not contiguous is packed first; an empty one changes nothing.
        """
        check_stream(stream)
        on_device = isinstance(ary, DeviceNDArray)
        source = ary.host if on_device else ary
        if not isinstance(source, (np.ndarray, np.generic)):
            raise TypeError(f"copy_to_device needs a NumPy or device array, got {type(ary).__name__}; np.asarray() it")
        if source.size == 0:
            return
        sentry_contiguous(self.host)
        target, source = _core(self.host), _core(np.asarray(source))
        if on_device:
            sentry_contiguous(source)
        else:
            source = np.asarray(source, order="C" if target.flags.c_contiguous else "F")
        _check_compatible(target, source)
        with IN_ORDER:
            np.copyto(target.squeeze(), source.squeeze())
            fresh.written(target)

    # --- elements and slices ------------------------------------------------------------------------------------

    def __getitem__(self, item):
        return self.getitem(item)

    def getitem(self, item, stream=0):
        """``self[item]``: a NumPy scalar if every axis has an index, otherwise a view that shares this memory.

        Only integers and slices (``TypeError``); ``IndexError`` outside the array.
        """
        check_stream(stream)
        found = self.host[self._index(item)]
        return DeviceNDArray(found, stream or self.stream) if isinstance(found, np.ndarray) else found

    def __setitem__(self, key, value):
        self.setitem(key, value)

    def setitem(self, key, value, stream=0):
        """``self[key] = value``: a number or an array, broadcast and converted to this dtype (C-style, unchecked).

        Raises ``ValueError`` if the shapes do not fit or a host array is not contiguous.
        """
        check_stream(stream)
        target = self.host[(*self._index(key), ...)]  # the ellipsis makes a view even of one element
        if isinstance(value, DeviceNDArray):
            source = value.host
        else:
            source = np.asarray(value)
            sentry_contiguous(source)
        if source.ndim > target.ndim:
            raise ValueError(f"Can't assign {source.ndim}-D array to {target.ndim}-D self")
        for axis in range(-source.ndim, 0):
            if source.shape[axis] not in (1, target.shape[axis]):
                raise ValueError(
                    f"Can't copy sequence with size {source.shape[axis]} to array axis {target.ndim + axis} "
                    f"with dimension {target.shape[axis]}"
                )
        if source.dtype.kind not in "biufcmM" or (source.dtype.kind == "c" and target.dtype.kind != "c"):
            raise TypeError(f"can't assign {source.dtype} to a device array of {target.dtype}")
        with IN_ORDER, np.errstate(all="ignore"):  # a GPU converts without a word
            np.copyto(target, source, casting="unsafe")
            fresh.written(target)

    def _index(self, item):
        """``item`` as a tuple of ints and slices, no longer than ``ndim``."""
        items = item if isinstance(item, tuple) else (item,)
        if len(items) > self.ndim:
            raise IndexError(f"{len(items) - self.ndim} extra indices given: the device array has {self.ndim} axes")
        index = []
        for part in items:
            if not isinstance(part, slice):
                try:
                    part = int(operator.index(part))
                except TypeError:
                    raise TypeError(
                        f"a device array is indexed by integers and slices, got {type(part).__name__}; "
                        "copy_to_host() first for other indices"
                    ) from None
            index.append(part)
        return tuple(index)

    # --- views --------------------------------------------------------------------------------------------------

    def bind(self, stream=0):
        """The same memory, with ``stream`` as the default of later operations."""
        return DeviceNDArray(self.host, check_stream(stream))

    def view(self, dtype):
        """The same bytes read as another dtype; ``ValueError`` if sizes differ and the array is not C-contiguous."""
        dtype = _check_dtype(dtype)
        if dtype.itemsize != self.dtype.itemsize:
            if not self.is_c_contiguous():
                raise ValueError("To change to a dtype of a different size, the array must be C-contiguous")
            if not self.ndim or self.shape[-1] * self.dtype.itemsize % dtype.itemsize:
                raise ValueError(
                    f"When changing to a larger dtype, its size must be a divisor of the total size in bytes of the "
                    f"last axis of the array (shape {self.shape}, {self.dtype} to {dtype})"
                )
        return DeviceNDArray(self.host.view(dtype), self.stream)

    def reshape(self, *newshape, order="C"):
        """A view with another shape (one axis may be -1).

        Raises ``ValueError`` if the sizes differ and ``NotImplementedError`` if the elements would have to move.
        """
        if len(newshape) == 1 and isinstance(newshape[0], (tuple, list)):
            newshape = tuple(newshape[0])
        if order not in ("C", "F", "A"):
            raise ValueError(f"order not C|F|A: {order!r}")
        host = self.host.reshape(newshape, order=order)
        if self.size and not np.may_share_memory(host, self.host):
            raise NotImplementedError(
                f"reshape would require copy: shape {self.shape} with strides {self.strides} to {newshape}"
            )
        return DeviceNDArray(host, self.stream)

    def ravel(self, order="C", stream=0):
        """A 1-D view of a contiguous array; ``NotImplementedError`` if it is not contiguous in ``order``."""
        if order not in ("C", "F", "A"):
            raise ValueError(f"order not C|F|A: {order!r}")
        flags = self.host.flags
        if not ((order in "CA" and flags.c_contiguous) or (order in "FA" and flags.f_contiguous)):
            raise NotImplementedError(f"ravel on non-contiguous array: shape {self.shape}, strides {self.strides}")
        return DeviceNDArray(self.host.reshape(-1, order="A"), check_stream(stream) or self.stream)

    def squeeze(self, axis=None, stream=0):
        """A view without the axes of length one (``ValueError`` for an axis that is longer)."""
        return DeviceNDArray(self.host.squeeze(axis), check_stream(stream) or self.stream)

    def transpose(self, axes=None):
        """The transposed 2-D array in new memory, C-contiguous, as numba-cuda's transpose kernel makes it.

        ``axes`` in their own order give the array itself. Raises ``NotImplementedError`` for other than 2-D arrays.
        """
        if axes and tuple(axes) == tuple(range(self.ndim)):
            return self
        if self.ndim != 2:
            raise NotImplementedError(f"transposing a non-2D DeviceNDArray isn't supported (shape {self.shape})")
        if axes is not None and set(axes) != {0, 1}:
            raise ValueError(f"invalid axes list {axes!r}")
        moved = allocate(self.shape[::-1], self.dtype)
        np.copyto(moved, self.host.T)
        return DeviceNDArray(moved, self.stream)

    def split(self, section, stream=0):
        """Yield 1-D views of ``section`` elements each, the last one maybe shorter."""
        if self.ndim != 1:
            raise ValueError("only support 1d array")
        if self.size and self.strides[0] != self.dtype.itemsize:
            raise ValueError("only support unit stride")
        if section < 1:
            raise ValueError(f"section must be at least 1, got {section}")
        for begin in range(0, self.size, section):
            yield DeviceNDArray(self.host[begin : begin + section], check_stream(stream) or self.stream)


class MappedNDArray(np.ndarray):
    """A host array that a kernel reads and writes in place (``mapped_array``)."""

    stream = 0

    def copy_to_host(self, ary=None, stream=0):
        """See :meth:`DeviceNDArray.copy_to_host`."""
        return DeviceNDArray(self.view(np.ndarray)).copy_to_host(ary, stream)

    def copy_to_device(self, ary, stream=0):
        """See :meth:`DeviceNDArray.copy_to_device`."""
        DeviceNDArray(self.view(np.ndarray)).copy_to_device(ary, stream)


class ManagedNDArray(MappedNDArray):
    """A host array in managed memory (``managed_array``); here the same as a mapped one."""


def sentry_contiguous(host):
    """Raise ``ValueError`` if ``host`` is neither C- nor F-contiguous (axes of stride 0 left out)."""
    flags = host.flags
    if flags.c_contiguous or flags.f_contiguous:
        return
    core = _core(host)
    if not core.flags.c_contiguous and not core.flags.f_contiguous:
        raise ValueError(_NOT_CONTIGUOUS.format(host.shape, host.strides))


def _core(host):
    """``host`` without the repeats of broadcast axes (stride 0)."""
    if 0 not in host.strides or not host.size:
        return host
    return host[(*(0 if stride == 0 else slice(None) for stride in host.strides), ...)]  # an array, also of no axes


def _check_compatible(first, second):
    """numba-cuda's rule for a copy: equal dtype, and equal shape and strides once axes of length 1 are dropped."""
    if first.dtype != second.dtype:
        raise TypeError(
            f"incompatible dtype: {first.dtype} vs. {second.dtype}; a copy does not convert, use .astype() on the host"
        )
    a, b = first.squeeze(), second.squeeze()
    if a.shape != b.shape:
        raise ValueError(f"incompatible shape: {first.shape} vs. {second.shape}")
    if first.size and a.strides != b.strides:
        raise ValueError(f"incompatible strides: {first.strides} vs. {second.strides}; np.ascontiguousarray() may help")


def _check_dtype(dtype):
    try:
        found = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype {dtype!r} is not a NumPy dtype; use np.float32, np.int32, ...") from None
    if found.kind not in "biufcmM":
        raise TypeError(f"dtype {found} is not supported in a device array; use a number type or bool")
    return found


def _check_shape(shape):
    if isinstance(shape, int):
        shape = (shape,)
    try:
        shape = tuple(operator.index(length) for length in shape)
    except TypeError:
        raise TypeError(f"shape must be an integer or tuple of integers, got {shape!r}") from None
    if any(length < 0 for length in shape):
        raise ValueError(f"shape must not have a negative length, got {shape}")
    return shape


def _contiguous_strides(shape, itemsize, order):
    if order == "F":
        return _contiguous_strides(shape[::-1], itemsize, "C")[::-1]
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _extent(shape, strides, itemsize):
    """First and end byte of the elements, counted from element (0, 0, ...); (0, 0) if there are none."""
    if 0 in shape:
        return 0, 0
    spans = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    return sum(span for span in spans if span < 0), sum(span for span in spans if span > 0) + itemsize
