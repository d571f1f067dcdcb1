"""The host side of the CPU backend, by what numba-cuda 0.30 does with the same calls."""

import asyncio
import math
import os
import re
import time
import warnings

import numpy as np
import pytest

from common.cpu import arrays, machine
from common.cpu import device as cuda

SIZES = [0, 1, 31, 33, 127, 1025]
SHAPES = [(0,), (1,), (31,), (1025,), (), (3, 0), (7, 33), (1, 127), (31, 1), (2, 3, 5)]
DTYPES = [np.float16, np.float32, np.float64, np.int8, np.uint16, np.int32, np.uint64, np.bool_, np.complex64]


def counted(shape, dtype=np.float32):
    return np.arange(math.prod(shape)).reshape(shape).astype(dtype)


def address(array):
    return array.__array_interface__["data"][0]


# --- to the device and back -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape, dtype):
    host = counted(shape, dtype)
    array = cuda.to_device(host)
    assert (array.shape, array.dtype, array.strides) == (host.shape, host.dtype, host.strides)
    assert (array.ndim, array.size, array.nbytes) == (host.ndim, host.size, host.nbytes)
    back = array.copy_to_host()
    assert type(back) is np.ndarray and back.dtype == host.dtype
    np.testing.assert_array_equal(back, host)


def test_device_memory_is_separate_from_the_host():
    host = counted((33,))
    array = cuda.to_device(host)
    host[:] = -1
    np.testing.assert_array_equal(array.copy_to_host(), counted((33,)))
    back = array.copy_to_host()
    back[:] = -2
    np.testing.assert_array_equal(array.copy_to_host(), counted((33,)))
    np.asarray(array)[:] = -3
    np.testing.assert_array_equal(np.asarray(array), counted((33,)))


def test_to_device_takes_lists_numbers_and_fortran_order():
    assert cuda.to_device([1, 2, 3]).copy_to_host().tolist() == [1, 2, 3]
    assert cuda.to_device(2.5).shape == ()
    fortran = np.asfortranarray(counted((3, 5)))
    array = cuda.to_device(fortran)
    assert array.is_f_contiguous() and not array.is_c_contiguous()
    assert array.flags == {"C_CONTIGUOUS": False, "F_CONTIGUOUS": True}
    back = array.copy_to_host()
    assert back.flags.f_contiguous
    np.testing.assert_array_equal(back, fortran)


def test_to_device_gives_a_device_array_back_as_it_is():
    array = cuda.to_device(counted((5,)))
    assert cuda.to_device(array) is array


def test_to_device_into_an_existing_array():
    target = cuda.device_array(33, np.float32)
    assert cuda.to_device(counted((33,)), to=target) is target
    np.testing.assert_array_equal(target.copy_to_host(), counted((33,)))
    assert cuda.to_device(np.zeros(33, np.float32), copy=False, to=target) is target
    np.testing.assert_array_equal(target.copy_to_host(), counted((33,)))


def test_to_device_keeps_a_broadcast_array_small():
    host = np.broadcast_to(counted((5,)), (1000, 5))
    array = cuda.to_device(host)
    assert array.strides == (0, 4) and array.alloc_size == 20
    np.testing.assert_array_equal(array.copy_to_host(), host)


@pytest.mark.parametrize(
    "host", [counted((10,))[::2], counted((10,))[::-1], counted((4, 6))[:, :3], counted((2, 3, 5)).transpose(1, 0, 2)]
)
def test_to_device_refuses_arrays_that_are_not_contiguous(host):
    with pytest.raises(ValueError, match="ascontiguousarray"):
        cuda.to_device(host)


@pytest.mark.parametrize("host", [np.array([None]), np.array(["a"]), np.zeros(3, [("x", "f4"), ("y", "i4")])])
def test_to_device_refuses_objects_strings_and_records(host):
    with pytest.raises(TypeError, match="not supported"):
        cuda.to_device(host)


def test_gpu_memory_is_refused_with_a_fix():
    class OnGpu:
        __cuda_array_interface__ = {"shape": (1,), "typestr": "<f4", "data": (0, False), "version": 3}

    for use in (cuda.to_device, cuda.as_cuda_array, cuda.host_view):
        with pytest.raises(TypeError, match="MINI_BACKEND=gpu"):
            use(OnGpu())
    assert cuda.is_cuda_array(OnGpu())


def test_as_cuda_array_shares_memory():
    array = cuda.to_device(counted((5,)))
    other = cuda.as_cuda_array(array)
    other[0] = 9
    assert array[0] == 9 and other is not array
    assert cuda.is_cuda_array(array) and not cuda.is_cuda_array(np.zeros(1))
    with pytest.raises(TypeError, match="cuda array interface"):
        cuda.as_cuda_array(np.zeros(1))


# --- allocation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float64])
def test_allocations_are_aligned_to_64_bytes(size, dtype):
    for make in (cuda.device_array, cuda.pinned_array, cuda.mapped_array, cuda.managed_array):
        made = make(size, dtype)
        assert address(getattr(made, "host", made)) % 64 == 0 and made.shape == (size,)
    assert address(cuda.to_device(np.zeros(size, dtype)).host) % 64 == 0


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (2, 3, 5), (1, 7), (0, 3), ()])
def test_device_array_orders(shape, order):
    array = cuda.device_array(shape, np.int16, order=order)
    assert array.alloc_size == array.nbytes == 2 * math.prod(shape)
    if array.size:
        assert array.strides == np.empty(shape, np.int16, order=order).strides


def test_device_array_defaults_and_forms_of_shape():
    assert cuda.device_array(3).dtype == np.float64
    assert cuda.device_array([np.int64(2), 3]).shape == (2, 3)
    strided = cuda.device_array((3, 4), np.float32, strides=(64, 4))
    assert strided.strides == (64, 4) and strided.alloc_size == 2 * 64 + 16
    strided[:] = 1
    assert strided.copy_to_host().sum() == 12


@pytest.mark.parametrize("shape", [3.0, (2, 3.0), "ab", None, np.float32(3), np.int64(3)])
def test_device_array_refuses_shapes_that_are_not_ints(shape):
    with pytest.raises(TypeError, match=re.escape(repr(shape))):
        cuda.device_array(shape)


def test_device_array_refuses_other_bad_arguments():
    with pytest.raises(ValueError, match=r"\(2, -1\)"):
        cuda.device_array((2, -1))
    with pytest.raises(ValueError, match="'K'"):
        cuda.device_array(3, order="K")
    with pytest.raises(ValueError, match="strides"):
        cuda.device_array((2, 3), strides=(4,))
    with pytest.raises(TypeError, match="np.float32"):
        cuda.device_array(3, dtype="no such type")
    with pytest.raises(TypeError, match="cuda.stream"):
        cuda.device_array(3, stream=5)


@pytest.mark.parametrize(
    "ary",
    [
        counted((3, 5)),
        np.asfortranarray(counted((3, 5))),
        counted((2, 3, 5)).transpose(1, 0, 2),
        counted((2, 3, 5)).transpose(2, 0, 1),
        counted((10,))[::2],
        counted(()),
    ],
)
def test_like_functions_keep_shape_dtype_and_order(ary):
    expected = np.empty_like(ary).strides
    for like in (cuda.device_array_like, cuda.pinned_array_like, cuda.mapped_array_like):
        made = like(ary)
        assert (made.shape, made.dtype, made.strides) == (ary.shape, ary.dtype, expected)
    packed = cuda.to_device(np.array(ary, order="C"))
    assert cuda.device_array_like(packed).strides == packed.strides


def test_checked_mode_fills_new_arrays(monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    for dtype in (np.float16, np.float32, np.float64, np.complex64):
        assert np.isnan(cuda.device_array(33, dtype).copy_to_host()).all()
    assert (cuda.device_array(33, np.int32).copy_to_host() == np.int32(-0x5A5A5A5B)).all()
    assert (cuda.device_array((3, 5), np.uint8, order="F").copy_to_host() == 0xA5).all()
    assert cuda.device_array(5, np.bool_).copy_to_host().all()
    assert np.isnan(cuda.pinned_array(5)).all() and np.isnan(cuda.to_device(np.zeros(5), copy=False).host).all()
    assert cuda.to_device(np.zeros(5)).copy_to_host().sum() == 0
    monkeypatch.setenv("MINI_CHECK", "0")
    assert not arrays.checking()


# --- copies between existing arrays -----------------------------------------------------------------


def test_copy_to_host_into_an_array():
    array = cuda.to_device(counted((7, 33)))
    target = np.zeros((7, 33), np.float32)
    assert array.copy_to_host(target) is target
    np.testing.assert_array_equal(target, counted((7, 33)))
    flat = np.zeros((1, 31, 1), np.float32)  # axes of length 1 do not count
    cuda.to_device(counted((31,))).copy_to_host(flat)
    np.testing.assert_array_equal(flat.ravel(), counted((31,)))


def test_copy_to_host_of_a_strided_view():
    array = cuda.to_device(counted((10,)))[1::3]
    back = array.copy_to_host()
    assert back.tolist() == [1, 4, 7] and back.strides == (12,)
    whole = np.full(10, -1, np.float32)
    array.copy_to_host(whole[1::3])
    assert whole.tolist() == [-1, 1, -1, -1, 4, -1, -1, 7, -1, -1]


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (np.zeros((7, 33), np.float64), TypeError, "incompatible dtype: float32 vs. float64"),
        (np.zeros((33, 7), np.float32), ValueError, "incompatible shape"),
        (np.zeros((7, 33), np.float32, order="F"), ValueError, "incompatible strides"),
        (np.zeros((7, 66), np.float32)[:, ::2], ValueError, "incompatible strides"),
        ([0.0], TypeError, "NumPy array"),
    ],
)
def test_copy_to_host_refuses_arrays_that_do_not_fit(target, error, words):
    with pytest.raises(error, match=words):
        cuda.to_device(counted((7, 33))).copy_to_host(target)


def test_copy_to_host_refuses_read_only_targets_and_negative_strides():
    array = cuda.to_device(counted((5,)))
    target = np.zeros(5, np.float32)
    target.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        array.copy_to_host(target)
    with pytest.raises(NotImplementedError, match="negative strides"):
        array[::-1].copy_to_host()
    assert array[:1][::-1].copy_to_host().tolist() == [0]


def test_copy_to_device():
    array = cuda.device_array((7, 33), np.float32)
    array.copy_to_device(counted((7, 33)))
    np.testing.assert_array_equal(array.copy_to_host(), counted((7, 33)))
    array.copy_to_device(np.asfortranarray(counted((7, 33)) + 1))  # packed in this array's order
    np.testing.assert_array_equal(array.copy_to_host(), counted((7, 33)) + 1)
    array.copy_to_device(counted((7, 66))[:, ::2])
    np.testing.assert_array_equal(array.copy_to_host(), counted((7, 66))[:, ::2])
    array.copy_to_device(cuda.to_device(counted((7, 33)) + 2))
    np.testing.assert_array_equal(array.copy_to_host(), counted((7, 33)) + 2)
    array[2].copy_to_device(np.zeros(33, np.float32))
    assert array.copy_to_host().sum(axis=1).argmin() == 2
    before = array.copy_to_host()
    array.copy_to_device(np.zeros(0, np.float32))  # numba-cuda: nothing to do
    np.testing.assert_array_equal(array.copy_to_host(), before)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (np.zeros((7, 33)), TypeError, "incompatible dtype: float32 vs. float64.*astype"),
        (np.zeros((7, 32), np.float32), ValueError, "incompatible shape"),
        ([1.0], TypeError, "list"),
    ],
)
def test_copy_to_device_refuses_arrays_that_do_not_fit(source, error, words):
    with pytest.raises(error, match=words):
        cuda.device_array((7, 33), np.float32).copy_to_device(source)


def test_copy_to_device_refuses_a_target_with_gaps_and_another_order():
    array = cuda.device_array((6, 6), np.float32)
    with pytest.raises(ValueError, match="contiguous"):
        array[:, ::2].copy_to_device(np.zeros((6, 3), np.float32))
    with pytest.raises(ValueError, match="contiguous"):
        cuda.device_array((6, 3), np.float32).copy_to_device(array[:, ::2])
    with pytest.raises(ValueError, match="strides"):
        array.copy_to_device(cuda.device_array((6, 6), np.float32, order="F"))


# --- elements, slices, views ------------------------------------------------------------------------


def test_elements_are_numpy_scalars():
    host = counted((7, 33))
    array = cuda.to_device(host)
    for index in ((0, 0), (6, 32), (-1, -33), (np.int64(3), 5)):
        assert array[index] == host[index] and type(array[index]) is np.float32
    one = cuda.to_device(np.float64(2.5))
    assert one[()] == 2.5 and type(one[()]) is np.float64
    assert [type(value) for value in cuda.to_device(counted((3,)))] == [np.float32] * 3


@pytest.mark.parametrize(
    "index",
    [
        2, -1, slice(None), slice(1, 5), slice(None, None, 2), slice(5, 1, -2), slice(4, 4), slice(-3, None),
        (1, slice(2, 7)), (slice(None), 3), (slice(1, None, 3), slice(None, None, -1)), (slice(0, 1), slice(0, 1)), (),
    ],
)  # fmt: skip
def test_slices_are_views_with_numpy_shapes(index):
    host = counted((7, 33))
    array = cuda.to_device(host)
    view = array[index]
    assert (view.shape, view.strides) == (host[index].shape, host[index].strides)
    np.testing.assert_array_equal(view.host, host[index])
    view[:] = -1
    host[index] = -1
    np.testing.assert_array_equal(array.copy_to_host(), host)


def test_rows_of_a_device_array():
    array = cuda.to_device(counted((3, 5)))
    assert [row.copy_to_host().tolist() for row in array] == counted((3, 5)).tolist()
    assert len(array) == 3
    with pytest.raises(TypeError, match="0-dimensional"):
        len(cuda.to_device(1.0))


@pytest.mark.parametrize("index", [7, -8, (0, 33), (0, 0, 0)])
def test_indices_outside_the_array(index):
    array = cuda.to_device(counted((7, 33)))
    with pytest.raises(IndexError):
        array[index]
    with pytest.raises(IndexError):
        array[index] = 0


@pytest.mark.parametrize("index", [[0, 1], np.array([True] * 7), 1.0, None, ..., "x", (0, [1])])
def test_only_integers_and_slices_index(index):
    array = cuda.to_device(counted((7, 33)))
    with pytest.raises(TypeError, match="integers and slices"):
        array[index]
    with pytest.raises(TypeError, match="integers and slices"):
        array[index] = 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (slice(None), 2.5),
        ((3, 4), 7),
        ((3, 4), np.float64(7.25)),
        (2, counted((33,)) * 2),
        (slice(1, 3), counted((2, 33))),
        (slice(1, 3), counted((33,), np.int64)),
        ((slice(None), 0), counted((7,), np.float64)),
        ((slice(None), slice(0, 1)), counted((7, 1))),
        ((slice(None, None, 2), slice(None, None, 3)), -1),
        (slice(3, 3), 5),
        ((0, slice(0, 3)), [1, 2, 3]),
    ],
)
def test_assignment(key, value):
    host = counted((7, 33))
    array = cuda.to_device(host)
    host[key] = value
    array[key] = value
    np.testing.assert_array_equal(array.copy_to_host(), host)
    on_device = cuda.to_device(counted((7, 33)))
    on_device[key] = cuda.to_device(np.asarray(value))
    np.testing.assert_array_equal(on_device.copy_to_host(), host)


def test_assignment_converts_like_a_kernel():
    array = cuda.to_device(np.zeros(4, np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array[:] = np.array([1.9, 255.0, 2.0, 3.0])
        array[3] = 259
    assert array.copy_to_host().tolist() == [1, 255, 2, 3]


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (np.zeros(5, np.float32), ValueError, "size 5 to array axis 1 with dimension 33"),
        (np.zeros((1, 7, 33), np.float32), ValueError, "3-D array to 2-D"),
        (np.zeros(66, np.float32)[::2], ValueError, "ascontiguousarray"),
        (1j, TypeError, "complex128"),
        ("text", TypeError, "assign"),
    ],
)
def test_assignment_refuses_what_does_not_fit(value, error, words):
    array = cuda.to_device(counted((7, 33)))
    with pytest.raises(error, match=words):
        array[:] = value
    np.testing.assert_array_equal(array.copy_to_host(), counted((7, 33)))


def test_getitem_and_setitem_with_a_stream():
    stream = cuda.stream()
    array = cuda.to_device(counted((5,)))
    array.setitem(2, 9, stream=stream)
    assert array.getitem(2, stream=stream) == 9
    assert array.getitem(slice(1, 3), stream=stream).stream is stream
    bound = array.bind(stream)
    assert bound.stream is stream and bound[1:].stream is stream and array.stream == 0
    bound[0] = 4
    assert array[0] == 4


def test_reshape_shares_memory():
    array = cuda.to_device(counted((6, 4)))
    for arguments in ((24,), (-1,), ((2, 12),), ([3, 8],), (2, 3, -1), (6, 4)):
        view = array.reshape(*arguments)
        np.testing.assert_array_equal(view.copy_to_host(), counted((6, 4)).reshape(*arguments))
        assert address(view.host) == address(array.host)
    view[0, 0] = -5
    assert array[0, 0] == -5
    with pytest.raises(ValueError):
        array.reshape(5, 5)
    with pytest.raises(ValueError, match="'K'"):
        array.reshape(24, order="K")


def test_reshape_never_copies():
    array = cuda.to_device(counted((6, 4)))
    with pytest.raises(NotImplementedError, match="require copy"):
        array[:, :3].reshape(18)
    with pytest.raises(NotImplementedError, match="require copy"):
        array.reshape(24, order="F")
    assert array[::2].reshape(3, 2, 2).copy_to_host().tolist() == counted((6, 4))[::2].reshape(3, 2, 2).tolist()


def test_ravel_and_squeeze():
    array = cuda.to_device(counted((3, 5)))
    assert array.ravel().copy_to_host().tolist() == list(range(15))
    fortran = cuda.to_device(np.asfortranarray(counted((3, 5))))
    for order in "FA":
        np.testing.assert_array_equal(fortran.ravel(order=order).copy_to_host(), counted((3, 5)).ravel(order="F"))
    for array_, order in ((fortran, "C"), (array, "F"), (array[:, ::2], "C")):
        with pytest.raises(NotImplementedError, match="non-contiguous"):
            array_.ravel(order=order)
    ones = cuda.to_device(counted((1, 5, 1)))
    assert ones.squeeze().shape == (5,) and ones.squeeze(axis=0).shape == (5, 1)
    with pytest.raises(ValueError):
        ones.squeeze(axis=1)


def test_view_as_another_dtype():
    host = counted((3, 4), np.float32)
    array = cuda.to_device(host)
    for dtype in (np.int32, np.float16, np.uint8, np.float64, np.complex64):
        np.testing.assert_array_equal(array.view(dtype).copy_to_host(), host.view(dtype))
    array.view(np.int32)[0, 0] = np.float32(2.5).view(np.int32)
    assert array[0, 0] == 2.5
    with pytest.raises(ValueError, match="C-contiguous"):
        array[:, ::2].view(np.uint8)
    with pytest.raises(ValueError, match="divisor"):
        cuda.to_device(counted((3, 5), np.float32)).view(np.float64)


def test_transpose_is_a_contiguous_copy():
    array = cuda.to_device(counted((7, 33)))
    for moved in (array.T, array.transpose(), array.transpose((1, 0))):
        assert moved.is_c_contiguous() and moved.shape == (33, 7)
        np.testing.assert_array_equal(moved.copy_to_host(), counted((7, 33)).T)
    array.T[0, 0] = 99
    assert array[0, 0] == 0
    assert array.transpose((0, 1)) is array
    with pytest.raises(NotImplementedError, match="non-2D"):
        cuda.to_device(counted((2, 3, 4))).transpose()
    with pytest.raises(ValueError, match="axes"):
        array.transpose((0, 2))


@pytest.mark.parametrize(("size", "section"), [(10, 3), (9, 3), (1, 5), (0, 4), (127, 31)])
def test_split(size, section):
    host = counted((size,))
    array = cuda.to_device(host)
    parts = list(array.split(section))
    assert [part.size for part in parts] == [min(section, size - i) for i in range(0, size, section)]
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.float32), *map(np.asarray, parts)]), host)
    for part in parts:
        part[:] = -1
    assert (array.copy_to_host() == -1).all()


def test_split_refuses_what_numba_cuda_refuses():
    array = cuda.to_device(counted((4, 4)))
    for bad, section in ((array, 2), (array[:, 0], 2), (array[0], 0)):
        with pytest.raises(ValueError):
            list(bad.split(section))


def test_numpy_functions_copy_to_the_host():
    array = cuda.to_device(counted((5,)))
    assert np.asarray(array, dtype=np.int64).dtype == np.int64
    assert np.sum(array) == 10
    with pytest.raises(ValueError, match="copy"):
        array.__array__(copy=False)
    with pytest.raises(TypeError):
        array + 1
    assert re.search(r"shape=\(5,\).*float32", repr(array))


# --- pinned, mapped, managed ------------------------------------------------------------------------


def test_pinned_mapped_and_managed_arrays_are_numpy_arrays():
    assert type(cuda.pinned_array((3, 5), np.float32)) is np.ndarray
    for make in (cuda.mapped_array, cuda.managed_array):
        array = make((3, 5), np.float32)
        assert isinstance(array, np.ndarray)
        array[:] = counted((3, 5))
        view = cuda.host_view(array)
        assert type(view) is np.ndarray and address(view) == address(array)
        copy = array.copy_to_host()
        array[:] = 0
        np.testing.assert_array_equal(copy, counted((3, 5)))
        array.copy_to_device(counted((3, 5)) + 1)
        assert array[2, 4] == 15
    stream = cuda.stream()
    assert cuda.mapped_array(3, stream=stream).stream is stream


def test_pinned_and_mapped_contexts():
    host, other = counted((5,)), counted((3,))
    with cuda.pinned(host, other) as nothing:
        assert nothing is None
    with cuda.mapped(host) as array:
        array[0] = 7
    assert host[0] == 7
    with cuda.mapped(host, other, stream=cuda.stream()) as (first, second):
        second[1] = 8
        assert first.shape == (5,)
    assert other[1] == 8
    with pytest.raises(TypeError, match="list"), cuda.pinned([1, 2]):
        pass
    with pytest.raises(ValueError, match="contiguous"), cuda.mapped(host[::2]):
        pass


# --- kernel arguments -------------------------------------------------------------------------------


def test_host_view_shares_memory():
    host = counted((5,))
    assert cuda.host_view(host) is host
    array = cuda.to_device(host)
    assert cuda.host_view(array) is array.host
    view = cuda.host_view(array[1:3])
    view[:] = -1
    assert array.copy_to_host().tolist() == [0, -1, -1, 3, 4]
    fortran = np.asfortranarray(counted((3, 5)))
    assert cuda.host_view(fortran) is fortran
    read_only = np.broadcast_to(np.float32(1), (3, 5))
    assert cuda.host_view(read_only) is read_only and not cuda.host_view(read_only).flags.writeable


@pytest.mark.parametrize("value", [3, 2.5, True, 1j, np.float32(2), np.int8(-1), np.bool_(True)])
def test_host_view_of_numbers(value):
    assert cuda.host_view(value) is value


def test_host_view_of_tuples():
    array = cuda.to_device(counted((5,)))
    got = cuda.host_view((array, 3, (2.5,)))
    assert got[0] is array.host and got[1:] == (3, (2.5,))


def test_host_view_of_foreign_arrays():
    class Foreign:
        def __init__(self, array):
            self.array = array
            self.__array_interface__ = array.__array_interface__

    host = counted((5,))
    cuda.host_view(Foreign(host))[0] = 9
    assert host[0] == 9

    class Tensor:  # as torch's, which has no __array_interface__
        def __init__(self, array, device="cpu"):
            self.array, self.device = array, type("device", (), {"type": device})()

        def numpy(self):
            return self.array

    Tensor.__module__ = "torch"
    cuda.host_view(Tensor(host))[1] = 8
    assert host[1] == 8
    with pytest.raises(TypeError, match=r"\.cpu\(\)"):
        cuda.host_view(Tensor(host, "cuda"))


@pytest.mark.parametrize("value", [[1, 2], "text", None, object(), {"a": 1}])
def test_host_view_refuses_other_types(value):
    with pytest.raises(TypeError, match=type(value).__name__):
        cuda.host_view(value)


def test_host_view_refuses_arrays_that_are_not_contiguous():
    with pytest.raises(ValueError, match="ascontiguousarray"):
        cuda.host_view(counted((10,))[::2])


def test_in_out_and_inout(monkeypatch):
    host = counted((5,))
    copy = cuda.host_view(cuda.In(host))
    copy[:] = -1
    assert host[0] == 0 and copy is not host
    assert cuda.host_view(cuda.InOut(host)) is host and cuda.host_view(cuda.Out(host)) is host
    assert host[4] == 4
    array = cuda.to_device(host)
    for mark in (cuda.In, cuda.Out, cuda.InOut):  # a device array is never copied
        assert cuda.host_view(mark(array)) is array.host
    monkeypatch.setenv("MINI_CHECK", "1")
    assert np.isnan(cuda.host_view(cuda.Out(host))).all()


# --- streams and events -----------------------------------------------------------------------------


def test_streams():
    stream = cuda.stream()
    assert stream and cuda.default_stream() and int(stream) != int(cuda.stream())
    assert "Default" in repr(cuda.default_stream()) and str(int(stream)) in repr(stream)
    assert int(cuda.legacy_default_stream()) == 1 and int(cuda.per_thread_default_stream()) == 2
    stream.synchronize()
    array = cuda.to_device(counted((5,)), stream=stream)
    assert array.stream is stream
    with stream.auto_synchronize() as same:
        assert same is stream
        back = array.copy_to_host(stream=stream)
    assert back.tolist() == [0, 1, 2, 3, 4]
    cuda.synchronize()
    with pytest.raises(NotImplementedError, match="1234"):
        cuda.external_stream(1234)


@pytest.mark.parametrize("bad", [1, "stream", object()])
def test_bad_streams_are_refused_everywhere(bad):
    array = cuda.to_device(counted((5,)))
    for use in (
        lambda: cuda.to_device(counted((5,)), stream=bad),
        lambda: array.copy_to_host(stream=bad),
        lambda: array.copy_to_device(counted((5,)), stream=bad),
        lambda: array.bind(bad),
        lambda: cuda.event().record(bad),
        lambda: cuda.event().wait(bad),
    ):
        with pytest.raises(TypeError, match="Expected a Stream object or 0"):
            use()


def test_stream_callbacks():
    stream, seen = cuda.stream(), []
    stream.add_callback(lambda *arguments: seen.append(arguments), "extra")
    assert seen == [(stream, 0, "extra")]
    with pytest.warns(UserWarning, match="callback: division by zero"):
        stream.add_callback(lambda *_: 1 / 0)


def test_async_done():
    stream = cuda.stream()

    async def wait():
        return await stream.async_done()

    assert asyncio.run(wait()) is stream
    with pytest.raises(RuntimeError):
        stream.async_done()


def test_events_measure_milliseconds():
    start, end = cuda.event(), cuda.event(timing=True)
    start.record()
    time.sleep(0.02)
    end.record(stream=cuda.stream())
    end.synchronize()
    end.wait()
    assert start.query() and end.query()
    elapsed = cuda.event_elapsed_time(start, end)
    assert isinstance(elapsed, float) and 19 < elapsed < 2000
    assert start.elapsed_time(end) == elapsed and end.elapsed_time(start) == -elapsed
    end.record()
    assert cuda.event_elapsed_time(start, end) > elapsed  # the last record counts


def test_events_without_a_time():
    recorded, unrecorded, untimed = cuda.event(), cuda.event(), cuda.event(timing=False)
    recorded.record()
    untimed.record()
    with pytest.raises(RuntimeError, match="end event was never recorded"):
        cuda.event_elapsed_time(recorded, unrecorded)
    with pytest.raises(RuntimeError, match="start event was never recorded"):
        cuda.event_elapsed_time(unrecorded, recorded)
    with pytest.raises(RuntimeError, match="timing=False"):
        untimed.elapsed_time(recorded)
    with pytest.raises(TypeError, match="start event is of type int"):
        cuda.event_elapsed_time(0, recorded)


# --- the device -------------------------------------------------------------------------------------


def test_the_device():
    device = cuda.get_current_device()
    assert device.id == 0 and device.name.startswith("CPU (")
    assert device.compute_capability == (8, 0)
    assert (device.COMPUTE_CAPABILITY_MAJOR, device.COMPUTE_CAPABILITY_MINOR) == device.compute_capability
    assert device.WARP_SIZE == 32 and device.MAX_THREADS_PER_BLOCK == 1024
    assert (device.MAX_BLOCK_DIM_X, device.MAX_BLOCK_DIM_Y, device.MAX_BLOCK_DIM_Z) == (1024, 1024, 64)
    assert (device.MAX_GRID_DIM_X, device.MAX_GRID_DIM_Y, device.MAX_GRID_DIM_Z) == (2147483647, 65535, 65535)
    assert device.MAX_SHARED_MEMORY_PER_BLOCK == 49152
    assert device.MULTIPROCESSOR_COUNT == machine.cpu_count()
    assert f"{device.MULTIPROCESSOR_COUNT} core" in device.name and device.name in repr(device)
    assert isinstance(device.uuid, str)
    device.reset()
    with pytest.raises(AttributeError, match="CLOCK_RATE.*WARP_SIZE"):
        _ = device.CLOCK_RATE
    with pytest.raises(AttributeError, match="nonsense"):
        _ = device.nonsense


def test_device_list():
    device = cuda.get_current_device()
    assert len(cuda.gpus) == 1 and list(cuda.gpus) == [device] and cuda.gpus[0] is device
    assert cuda.gpus.current is device and cuda.list_devices() is cuda.gpus
    with cuda.gpus[0]:
        assert cuda.select_device(0) is device
    with pytest.raises(IndexError):
        cuda.gpus[1]
    for ask in (cuda.select_device, cuda.current_context):
        with pytest.raises(IndexError, match="device 1"):
            ask(1)
    cuda.close()
    assert cuda.get_current_device() is device


def test_context():
    context = cuda.current_context()
    assert context.device is cuda.get_current_device() and cuda.current_context(0) is context
    free, total = context.get_memory_info()
    assert 0 < free <= total and context.get_memory_info().total == total
    array = cuda.to_device(counted((5,)))
    context.synchronize()
    context.reset()
    assert array[4] == 4
    assert isinstance(context.create_stream(), cuda.Stream) and isinstance(context.create_event(), cuda.Event)
    with context.defer_cleanup(), cuda.defer_cleanup(), cuda.profiling():
        cuda.profile_start()
        cuda.profile_stop()


def test_availability(capsys):
    assert cuda.is_available() and cuda.is_supported_version() and cuda.cuda_error() is None
    assert cuda.is_float16_supported() and not cuda.is_bfloat16_supported() and not cuda.is_fp8_supported()
    assert cuda.detect() is True
    assert cuda.get_current_device().name in capsys.readouterr().out

    @cuda.require_context
    def function():
        return 3

    assert function() == 3


def test_gpu_only_functions_say_so():
    with pytest.raises(NotImplementedError, match="IPC"):
        cuda.open_ipc_array(b"", 3, np.float32)
    with pytest.raises(NotImplementedError, match="GPU"):
        cuda.from_cuda_array_interface({})


def test_every_public_name_is_there():
    assert all(getattr(cuda, name).__doc__ for name in cuda.__all__ if name != "gpus")
    assert len(set(cuda.__all__)) == len(cuda.__all__)


# --- the machine ------------------------------------------------------------------------------------


def test_cpu_count_is_what_this_process_may_use():
    assert 1 <= machine.cpu_count() <= os.cpu_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity masks")
def test_cpu_count_follows_the_affinity_mask():
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert machine.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, mask)


def test_cgroup_limits_version_2(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    inner = tmp_path / "root" / "outer" / "inner"
    inner.mkdir(parents=True)
    root = tmp_path / "root"
    assert machine.cgroup_cpu_quota(membership, root) is None
    (inner / "cpu.max").write_text("max 100000\n")
    (inner / "memory.max").write_text("max\n")
    assert machine.cgroup_cpu_quota(membership, root) is None
    assert machine.cgroup_memory_limit(membership, root) is None
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("300\n")
    assert machine.cgroup_cpu_quota(membership, root) == 1.5
    assert machine.cgroup_memory_limit(membership, root) == (700, 1000)


def test_cgroup_limits_version_1(tmp_path):
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n")
    cpu, memory = tmp_path / "cpu" / "box", tmp_path / "memory" / "box"
    cpu.mkdir(parents=True)
    memory.mkdir(parents=True)
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (memory / "memory.usage_in_bytes").write_text("10\n")
    assert machine.cgroup_cpu_quota(membership, tmp_path) is None
    assert machine.cgroup_memory_limit(membership, tmp_path) is None
    (cpu / "cpu.cfs_quota_us").write_text("250000\n")
    (memory / "memory.limit_in_bytes").write_text("4096\n")
    assert machine.cgroup_cpu_quota(membership, tmp_path) == 2.5
    assert machine.cgroup_memory_limit(membership, tmp_path) == (4086, 4096)


def test_cpu_quota_limits_the_count(monkeypatch):
    monkeypatch.setattr(machine, "cgroup_cpu_quota", lambda: 0.5)
    assert machine.cpu_count() == 1


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("AMD EPYC 7B13 64-Core Processor", "AMD EPYC 7B13 64-Core Processor"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel Xeon"),
        ("Intel(R) Core(TM) i7-8550U CPU @ 1.80GHz", "Intel Core i7-8550U"),
    ],
)
def test_cpu_name_is_readable(monkeypatch, raw, clean):
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setattr(machine, "_read", lambda path: f"processor\t: 0\nmodel name\t: {raw}\nflags\t: fpu\n")
    assert machine.cpu_name.__wrapped__() == clean


def test_memory_on_macos_is_read_from_vm_stat():
    text = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:  100.\nPages active:  7.\n"
    text += "Pages inactive:  20.\nPages speculative:  3.\nPages wired down:  5.\n"
    assert machine._free_from_vm_stat(text) == 123 * 16384
    with pytest.raises(NotImplementedError):
        machine._free_from_vm_stat("")


def test_memory_on_linux_is_read_from_meminfo():
    assert machine._memory_from_meminfo("MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:  40 kB\n") == (40960, 102400)
    assert machine._memory_from_meminfo("MemTotal:  100 kB\nMemFree:  10 kB\n") == (10240, 102400)
