"""Casts of floats out of an integer's range, shifts by many places, round: what an H200 gives, both backends give."""

import math

import numpy as np
import pytest
from numba import cuda

KINDS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
LOW, HIGH = -(2**63), 2**63 - 1
CASTS = {  # a float, and what is stored of it in arrays of KINDS
    0.5: [0, 0, 0, 0, 0, 0, 0, 0],
    -0.5: [0, 0, 0, 0, 0, 0, 0, 0],
    -1.5: [-1, 0, -1, 0, -1, 0, -1, 0],
    127.9: [127, 127, 127, 127, 127, 127, 127, 127],
    128.0: [-128, 128, 128, 128, 128, 128, 128, 128],
    -129.0: [127, 0, -129, 0, -129, 0, -129, 0],
    255.9: [-1, 255, 255, 255, 255, 255, 255, 255],
    300.0: [44, 44, 300, 300, 300, 300, 300, 300],
    -300.0: [-44, 0, -300, 0, -300, 0, -300, 0],
    32768.0: [-1, 0, 32767, 32768, 32768, 32768, 32768, 32768],
    -32769.0: [0, 0, -32768, 0, -32769, 0, -32769, 0],
    70000.0: [-1, 255, 32767, 65535, 70000, 70000, 70000, 70000],
    -70000.0: [0, 0, -32768, 0, -70000, 0, -70000, 0],
    2147483648.0: [-1, 255, 32767, 65535, 2147483647, 2147483648, 2147483648, 2147483648],
    -2147483904.0: [0, 0, -32768, 0, -2147483648, 0, -2147483904, 0],
    4294967296.0: [-1, 255, 32767, 65535, 2147483647, 4294967295, 4294967296, 4294967296],
    1e20: [-1, 255, 32767, 65535, 2147483647, 4294967295, HIGH, 2**64 - 1],
    -1e20: [0, 0, -32768, 0, -2147483648, 0, LOW, 0],
    math.inf: [-1, 255, 32767, 65535, 2147483647, 4294967295, HIGH, 2**64 - 1],
    -math.inf: [0, 0, -32768, 0, -2147483648, 0, LOW, 0],
}
NAN = {  # by the type that is cast
    np.float32: [0, 0, 0, 0, 0, 0, LOW, 2**63],
    np.float64: [0, 0, -32768, 32768, -2147483648, 2147483648, LOW, 2**63],
}


@cuda.jit
def cast_by_storing(x, i1, u1, i2, u2, i4, u4, i8, u8):
    i = cuda.grid(1)
    if i < x.size:
        v = x[i]
        i1[i] = v
        u1[i] = v
        i2[i] = v
        u2[i] = v
        i4[i] = v
        u4[i] = v
        i8[i] = v
        u8[i] = v


@cuda.jit
def cast_by_calling(x, i2, u2, i4, u4, i8, u8, whole):
    i = cuda.grid(1)
    if i < x.size:
        v = x[i]
        i2[i] = np.int16(v)
        u2[i] = np.uint16(v)
        i4[i] = np.int32(v)
        u4[i] = np.uint32(v)
        i8[i] = np.int64(v)
        u8[i] = np.uint64(v)
        whole[i] = int(v)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_casts(dtype):
    values, expected = [*CASTS, math.nan], [*CASTS.values(), NAN[dtype]]
    x = cuda.to_device(np.array(values, dtype))
    stored = [cuda.to_device(np.zeros(len(values), kind)) for kind in KINDS]
    cast_by_storing[1, 32](x, *stored)
    for column, kind in enumerate(KINDS):
        assert stored[column].copy_to_host().tolist() == [row[column] for row in expected], kind
    called = [cuda.to_device(np.zeros(len(values), kind)) for kind in [*KINDS[2:], np.int64]]
    cast_by_calling[1, 32](x, *called)
    for column, out in enumerate(called, start=2):
        column = 6 if column == 8 else column
        assert out.copy_to_host().tolist() == [row[column] for row in expected]


@cuda.jit
def shift(x, places, left, right, left_again):
    i = cuda.grid(1)
    if i < x.size:
        left[i] = x[i] << places[i]
        right[i] = x[i] >> places[i]
        v = x[i]
        v <<= places[i]
        left_again[i] = v


PLACES = [0, 1, 31, 32, 33, 63, 64, 65, 127, 200, -1, -64, 2**32, 2**32 + 1]


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint32, np.int64, np.uint64])
def test_shifts(dtype):
    """A GPU reads the lower 32 bits of the number of places, without a sign; 64 and more shift everything out."""
    info = np.iinfo(dtype)
    values = [1, info.max, info.min, 100] + ([-1] if info.min else [])
    kind = np.uint64 if info.min == 0 else np.int64
    x, places = (np.array(a).ravel() for a in np.meshgrid(np.array(values, dtype), np.array(PLACES), indexing="ij"))
    outs = [cuda.to_device(np.zeros(x.size, kind)) for _ in range(3)]
    shift[3, 32](cuda.to_device(x), cuda.to_device(places), *outs)
    wrap = lambda v: v % 2**64 if info.min == 0 else (v + 2**63) % 2**64 - 2**63
    pairs = [(int(v), int(p) % 2**32) for v, p in zip(x, places)]
    left = [wrap(v << p) if p < 64 else 0 for v, p in pairs]
    assert outs[0].copy_to_host().tolist() == left
    assert outs[2].copy_to_host().tolist() == left
    assert outs[1].copy_to_host().tolist() == [v >> min(p, 64) for v, p in pairs]


@cuda.jit
def rounds(x, whole, one, tens, many):
    i = cuda.grid(1)
    if i < x.size:
        whole[i] = round(x[i])
        one[i] = round(x[i], 1)
        tens[i] = round(x[i], -1)
        many[i] = round(x[i], 20)


def test_round():
    """``round(x, digits)`` goes by way of an int64 on a GPU, which 20 digits do not fit in."""
    x = np.array([0.5, 1.5, -2.5, 0.05, 2.675, 15.0, -25.0, 1.8e19, math.inf])
    outs = [cuda.to_device(np.zeros(x.size, kind)) for kind in (np.int64, *[np.float64] * 3)]
    rounds[1, 32](cuda.to_device(x), *outs)
    whole, one, tens, many = (out.copy_to_host() for out in outs)
    assert whole.tolist() == [0, 2, -2, 0, 3, 15, -25, HIGH, HIGH]
    np.testing.assert_array_equal(one[:7], [0.5, 1.5, -2.5, 0.0, 2.7, 15.0, -25.0])
    np.testing.assert_array_equal(tens[:7], [0, 0, 0, 0, 0, 20, -20])
    np.testing.assert_array_equal(many[4:7], [2.0**63 / 1e20, 2.0**63 / 1e20, -(2.0**63) / 1e20])
    assert one[8] == tens[8] == many[8] == math.inf
