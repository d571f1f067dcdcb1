"""Tests of the oracle itself, against NumPy and against answers worked out by hand, and of the random kernels.

The kernels here are plain functions: the oracle needs no decorator, and nothing of the backend under test is used.
"""
import math
import operator
import re
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests import fuzz_cases, oracle
from tests.fuzz.features import FEATURES_OF_KINDS
from tests.fuzz_cases import Case, check_valid, compare, failure_of, load_case, oracle_args, run_case, shrink, stub_cuda
from tests.fuzz_kernels import DEFAULT_KINDS, FEATURES, GPU_KINDS, KINDS, STATEMENTS, features_of, generate
from tests.oracle import OracleError, run

cuda = types.ModuleType("cuda")     # the oracle looks at names, never into the module
TILE = 8
FULL = 0xFFFFFFFF


def device(function):
    return types.SimpleNamespace(py_func=function)


def launch(kernel, grid, block, *args, **options):
    """Runs a kernel in both thread orders and in checked mode: the answer must not depend on them."""
    copies = [[a.copy() if isinstance(a, np.ndarray) else a for a in args] for _ in range(2)]
    run(kernel, grid, block, args, **options)
    run(kernel, grid, block, copies[0], backwards=True, **options)
    run(kernel, grid, block, copies[1], checked=True, **options)
    for other in copies:
        for a, b in zip(args, other):
            np.testing.assert_array_equal(a, b)


def evaluate(expression, **values):
    """The value and the type code of an expression in a kernel."""
    program = oracle._Program(oracle._load, oracle._store)
    names = ", ".join(values)
    source = f"def f({names}):\n    return {expression}\n"
    path = Path(fuzz_cases.load_case(Case(0, source, (1,), (1,), 0, ())).__file__)
    scope = {"math": math, "np": np, "cuda": cuda}
    exec(compile(source, str(path), "exec"), scope)
    generator = program.compile(scope["f"])(None, (), *(oracle._canon(v) for v in values.values()))
    with np.errstate(all="ignore"):
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value, oracle._CODE.get(type(stop.value))
    raise AssertionError("the expression suspended")


# ---------------------------------------------------------------------------------------------------------------------
# Types and arithmetic
# ---------------------------------------------------------------------------------------------------------------------
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
             "%": operator.mod, "&": operator.and_, "<<": operator.lshift, ">>": operator.rshift}


@pytest.mark.parametrize("op", OPERATORS)
def test_result_types_are_those_numba_infers(op):
    from numba import types as nb
    from numba.core.registry import cpu_target

    context = cpu_target.typing_context
    context.refresh()
    known = {"b1": nb.boolean, "i1": nb.int8, "u1": nb.uint8, "i2": nb.int16, "u2": nb.uint16, "i4": nb.int32,
             "u4": nb.uint32, "i8": nb.int64, "u8": nb.uint64, "f4": nb.float32, "f8": nb.float64}
    for a, ta in known.items():
        for b, tb in known.items():
            if "f" in a + b and op in "&<<>>":
                continue
            expected = context.resolve_function_type(OPERATORS[op], (ta, tb), {}).return_type
            assert known[oracle._arith_type(op, a, b)] == expected, (a, op, b)


def test_result_types_of_float16_are_those_of_numba_cuda():
    # what numba-cuda 0.30.4 infers: f16 with int8 and bool stays f16 where an operator of its own exists
    others = ["b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"]
    for op in "+-*/":
        assert [oracle._arith_type(op, "f2", t) for t in others] == [
            "f2", "f2", "f4", "f4", "f8", "f8", "f8", "f8", "f8", "f2", "f4", "f8"]
    for op in ("//", "%"):
        assert [oracle._arith_type(op, "f2", t) for t in others] == [
            "f4", "f4", "f4", "f4", "f8", "f8", "f8", "f8", "f8", "f4", "f4", "f8"]


def test_common_types_of_min_and_max():
    # rows and columns: i1 u1 i4 i8 u4 u8 f2 f4 f8, as numba-cuda 0.30.4 infers max(a, b)
    codes = ["i1", "u1", "i4", "i8", "u4", "u8", "f2", "f4", "f8"]
    table = """i1 i2 i4 i8 i8 f8 f2 f4 f8
               i2 u1 i4 i8 u4 u8 f2 f4 f8
               i4 i4 i4 i8 i8 f8 f8 f8 f8
               i8 i8 i8 i8 i8 f8 f8 f8 f8
               i8 u4 i8 i8 u4 u8 f8 f8 f8
               f8 u8 f8 f8 u8 u8 f8 f8 f8
               f2 f2 f8 f8 f8 f8 f2 f4 f8
               f4 f4 f8 f8 f8 f8 f4 f4 f8
               f8 f8 f8 f8 f8 f8 f8 f8 f8"""
    for a, row in zip(codes, table.splitlines()):
        assert [oracle._unify(a, b) for b in codes] == row.split(), a


i32, u32, f32, f16 = np.int32, np.uint32, np.float32, np.float16


@pytest.mark.parametrize("expression, values, expected, code", [
    ("a + b", {"a": i32(2**31 - 1), "b": i32(1)}, 2**31, "i8"),                     # int32 + int32 is an int64
    ("a * a", {"a": 2**32 + 3}, 6 * 2**32 + 9, "i8"),                               # wraps: 2**64 is gone
    ("a + 1", {"a": 2**63 - 1}, -2**63, "i8"),
    ("-a", {"a": -2**63}, -2**63, "i8"),
    ("a // b", {"a": -7, "b": 2}, -4, "i8"), ("a % b", {"a": -7, "b": 3}, 2, "i8"),
    ("a % b", {"a": 7, "b": -3}, -2, "i8"),
    ("a // b", {"a": 5, "b": 0}, 0, "i8"), ("a % b", {"a": 5, "b": 0}, 0, "i8"),    # no trap on a GPU: 0
    ("a // b", {"a": -2**63, "b": -1}, 0, "i8"),
    ("a / b", {"a": 1, "b": 4}, 0.25, "f8"), ("a / b", {"a": 1, "b": 0}, math.inf, "f8"),
    ("a / b", {"a": i32(3), "b": i32(2)}, 1.5, "f8"),
    ("a * b", {"a": f32(0.1), "b": 3}, float(f32(0.1)) * 3, "f8"),                  # float32 * int64 is a float64
    ("a * b", {"a": f32(0.1), "b": f32(3)}, f32(0.1) * f32(3), "f4"),
    ("a * 2.0", {"a": f32(0.1)}, float(f32(0.1)) * 2, "f8"),                        # a float literal is a float64
    ("a + b", {"a": f16(0.1), "b": f16(1)}, f16(0.1) + f16(1), "f2"),
    ("a + b", {"a": u32(2**32 - 1), "b": u32(1)}, 2**32, "u8"),                     # uint32 + uint32 is a uint64
    ("a - b", {"a": u32(0), "b": u32(1)}, 2**64 - 1, "u8"),
    ("a - 1", {"a": u32(0)}, -1, "i8"),                                             # ... with an int64 an int64
    ("a * b", {"a": np.uint64(2**63), "b": 3}, -2**63, "i8"),
    ("a / b", {"a": np.uint64(2**63), "b": 2}, 2.0**62, "f8"),
    ("-a", {"a": u32(1)}, 2**32 - 1, "u8"), ("-a", {"a": np.int8(-128)}, -128, "i8"),    # in the operand's width,
    ("-a", {"a": np.uint8(3)}, 253, "u8"), ("~a", {"a": u32(0)}, 2**32 - 1, "u8"),       # ... then 64 bits wide
    ("~a", {"a": i32(5)}, -6, "i8"), ("~a", {"a": True}, False, "b1"), ("-a", {"a": True}, -1, "i8"),
    ("a + a", {"a": True}, 2, "i8"), ("a & b", {"a": True, "b": False}, False, "b1"), ("a & 3", {"a": True}, 1, "i8"),
    ("a << 40", {"a": i32(1)}, 2**40, "i8"), ("a << 63", {"a": 1}, -2**63, "i8"), ("a >> 3", {"a": -9}, -2, "i8"),
    ("a >> 1", {"a": u32(2**32 - 1)}, 2**31 - 1, "u8"),
    ("a ** 3", {"a": -3}, -27, "i8"), ("a ** b", {"a": 3, "b": 41}, -420491770248316829, "i8"),
    ("a ** 2", {"a": 94906267}, 9007199515875289, "i8"),                            # exact: more than a float64 holds
    ("a ** 1", {"a": 2**63 - 1}, 2**63 - 1, "i8"), ("a ** b", {"a": 0, "b": -1}, -2**63, "i8"),
    ("a ** b", {"a": np.uint8(2), "b": np.uint8(63)}, 2**63, "u8"),
    ("a ** -1", {"a": 2}, 0, "i8"), ("2 ** -1", {}, 0.5, "f8"), ("a ** 2", {"a": f32(1.5)}, 2.25, "f4"),
    ("a ** 0.5", {"a": 9}, 3.0, "f8"), ("1 << 70 >> 68", {}, 4, "i8"),              # CPython folds literals
    ("a // 2.0", {"a": -7}, -4.0, "f8"), ("a % 2.5", {"a": -1.0}, 1.5, "f8"),
    ("a % b", {"a": f32(-1), "b": f32(2.5)}, 1.5, "f4"),
    ("-7 // 2", {}, -4, "i8"), ("-9223372036854775808 + 0", {}, -2**63, "i8"),
    ("a < b", {"a": -1, "b": np.uint64(2**64 - 1)}, True, "b1"), ("1 < a < 3", {"a": 2}, True, "b1"),
    ("1 < a < 3 <= a", {"a": 2}, False, "b1"), ("a == b", {"a": f32(0.1), "b": 0.1}, False, "b1"),
    ("a and b", {"a": 0, "b": 5}, 0, "i8"), ("a or b", {"a": 0, "b": 5}, 5, "i8"), ("not a", {"a": 0.0}, True, "b1"),
    ("a if b else c", {"a": 1, "b": f32(0), "c": 2.5}, 2.5, "f8"),
    ("int(a)", {"a": -2.9}, -2, "i8"), ("int(a)", {"a": i32(4)}, 4, "i4"), ("int(a)", {"a": True}, 1, "i8"),
    ("float(a)", {"a": f32(2)}, 2.0, "f4"), ("float(a)", {"a": i32(2)}, 2.0, "f8"), ("bool(a)", {"a": 7}, True, "b1"),
    ("np.int8(a)", {"a": 200}, -56, "i1"), ("np.uint8(a)", {"a": -1}, 255, "u1"),
    ("np.int32(a)", {"a": 2**31}, -2**31, "i4"),
    ("np.float32(a)", {"a": 0.1}, f32(0.1), "f4"), ("np.uint32(a)", {"a": 3.9}, 3, "u4"),
    ("min(a, b)", {"a": i32(3), "b": 5}, 3, "i8"), ("max(a, b)", {"a": f32(3), "b": 5.0}, 5.0, "f8"),
    ("max(a, 2, 2.5)", {"a": i32(1)}, 2.5, "f8"), ("max(a, b)", {"a": math.nan, "b": 1.0}, 1.0, "f8"),
    ("abs(a)", {"a": i32(-3)}, 3, "i4"), ("abs(a)", {"a": f32(-0.5)}, 0.5, "f4"),
    ("round(a)", {"a": 2.5}, 2, "i8"), ("round(a)", {"a": -3.5}, -4, "i8"), ("round(a, 1)", {"a": 2.25}, 2.2, "f8"),
    ("math.sqrt(a)", {"a": f32(2)}, np.sqrt(f32(2)), "f4"), ("math.sqrt(a)", {"a": 9}, 3.0, "f8"),
    ("math.floor(a)", {"a": f32(-1.5)}, -2.0, "f4"), ("math.ceil(a)", {"a": 1.2}, 2.0, "f8"),   # floats in CUDA
    ("math.exp(a)", {"a": f32(1)}, f32(math.e), "f4"), ("math.log(a)", {"a": 0.0}, -math.inf, "f8"),
    ("math.pow(a, 2)", {"a": f32(3)}, 9.0, "f8"), ("math.fmod(a, b)", {"a": -7.0, "b": 3.0}, -1.0, "f8"),
    ("math.atan2(a, b)", {"a": f32(1), "b": f32(1)}, f32(math.pi / 4), "f4"), ("math.pi", {}, math.pi, "f8"),
    ("math.isnan(a)", {"a": math.nan}, True, "b1"), ("math.erf(a)", {"a": 0.5}, math.erf(0.5), "f8"),
    ("cuda.popc(a)", {"a": -1}, 64, "i8"), ("cuda.popc(a)", {"a": i32(-1)}, 32, "i4"),
    ("cuda.clz(a)", {"a": i32(1)}, 31, "i4"),
    ("cuda.clz(a)", {"a": 1}, 63, "i8"), ("cuda.clz(a)", {"a": 0}, 64, "i8"), ("cuda.ffs(a)", {"a": 12}, 3, "u4"),
    ("cuda.ffs(a)", {"a": 0}, 0, "u4"), ("cuda.brev(a)", {"a": u32(1)}, 2**31, "u4"),
    ("cuda.brev(a)", {"a": 1}, 2**31, "u4"),
    ("cuda.brev(a)", {"a": np.uint64(1)}, 2**63, "u8"), ("cuda.selp(a > 0, a, b)", {"a": -1, "b": 4}, 4, "i8"),
    ("cuda.fma(a, a, b)", {"a": 1 + 2.0**-30, "b": -1.0}, 2.0**-29 + 2.0**-60, "f8"),           # rounded once
    ("cuda.fma(a, a, b)", {"a": f32(1 + 2.0**-13), "b": f32(-1)}, 2.0**-12 + 2.0**-26, "f4"),
    ("cuda.libdevice.rsqrtf(a)", {"a": 4.0}, 0.5, "f4"), ("cuda.libdevice.fast_expf(a)", {"a": 0.0}, 1.0, "f4"),
])
def test_expression(expression, values, expected, code):
    value, kind = evaluate(expression, **values)
    assert value == expected and kind == code


@pytest.mark.parametrize("expression, values, message", [
    ("a << b", {"a": 1, "b": 64}, "shift by 64"), ("a >> b", {"a": 1, "b": -1}, "shift by -1"),
    ("int(a)", {"a": math.nan}, "nan is converted"), ("int(a)", {"a": 1e19}, "does not fit int64"),
    ("np.uint32(a)", {"a": -1.0}, "does not fit uint32"), ("a & b", {"a": 1.5, "b": 1}, "needs integers"),
    ("cuda.selp(a > 0, a, b)", {"a": 1, "b": i32(4)}, "same type"), ("undefined(a)", {"a": 1}, "not known"),
    ("[x for x in (1, 2)]", {}, "not known"), ("max(a, True)", {"a": 1}, "bools"),
])
def test_undefined_expression(expression, values, message):
    with pytest.raises(OracleError, match=message):
        evaluate(expression, **values)


def test_lazy_operators_and_single_evaluation():
    def kernel(out, x):
        i = cuda.grid(1)
        out[i] = 1 if i < x.size and x[i] > 0 else 2
        if i >= x.size or x[i] == 3:
            out[i] += 10
        out[i] += 100 if 0 <= i + cuda.atomic.add(out, 8, 1) - i < 50 else 0    # the middle is evaluated once

    out = np.zeros(9, np.int32)
    run(kernel, 1, 8, (out, np.array([3, -1, 5], np.float32)))
    assert out.tolist() == [111, 102, 101, 112, 112, 112, 112, 112, 8]


def test_stores_cast_like_c():
    def kernel(i8, u8, i32, f32, f16, b, x):
        i8[0], u8[0], i32[0], f32[0], f16[0], b[0] = 300, -1, x, 1 / 3, x / 3, x
        i32[1] = -x
        i32[2] = 2**32 + 7
        b[1] = x - 2.75

    arrays = [np.zeros(3, t) for t in ("int8", "uint8", "int32", "float32", "float16", "bool")]
    launch(kernel, 1, 1, *arrays, 2.75)
    i8, u8, i32, f32, f16, b = arrays
    assert (i8[0], u8[0], i32.tolist(), b.tolist()) == (44, 255, [2, -2, 7], [True, False, False])
    assert f32[0] == np.float32(1 / 3) and f16[0] == np.float16(2.75 / 3)


def test_statements():
    def kernel(out, n):
        total = 0
        for i in range(n):
            if i == 3:
                continue
            if i == 7:
                break
            total += i
        else:
            total = -1
        out[0], out[1] = total, i
        a, b = 1, 2
        a, b = b, a
        out[2] = 10 * a + b
        k = 100
        while k > 3:
            k //= 3
            if k == 11:
                k -= 1
        out[3] = k
        (c, d), e = (4, 5), out[2]
        out[4] = c * d + e
        out[5] = out[6] = k
        out[6] -= 5
        out[-1] = 42
        for k in (5, 7):
            out[7] += k
        for j in range(10, 0, -3):
            out[8] = out[8] * 100 + j
        if not n:
            z = 1
        elif n < 0:
            z = 2
        else:
            z = 3
        out[9] = z

    out = np.zeros(11, np.int64)
    launch(kernel, 1, 1, out, np.int32(20))
    assert out.tolist() == [0 + 1 + 2 + 4 + 5 + 6, 7, 21, 3, 41, 3, -2, 12, 10070401, 3, 42]


# ---------------------------------------------------------------------------------------------------------------------
# Indices and memory
# ---------------------------------------------------------------------------------------------------------------------
def test_indices_in_three_dimensions():
    def kernel(out, where):
        x, y, z = cuda.grid(3)
        sx, sy, sz = cuda.gridsize(3)
        linear = (cuda.threadIdx.z * cuda.blockDim.y + cuda.threadIdx.y) * cuda.blockDim.x + cuda.threadIdx.x
        out[z, y, x] = (z * sy + y) * sx + x + (0 if sz == out.shape[0] else 10**6)
        where[z, y, x, 0] = cuda.laneid
        where[z, y, x, 1] = linear % cuda.warpsize
        where[z, y, x, 2] = cuda.blockIdx.x + 10 * cuda.blockIdx.y + 100 * cuda.blockIdx.z + 1000 * cuda.gridDim.y

    shape = (2 * 2, 3 * 3, 2 * 7)
    out, where = np.zeros(shape, np.int64), np.zeros((*shape, 3), np.int32)
    launch(kernel, (2, 3, 2), (7, 3, 2), out, where)
    np.testing.assert_array_equal(out, np.arange(out.size).reshape(shape))
    np.testing.assert_array_equal(where[..., 0], where[..., 1])
    z, y, x = np.indices(shape)
    np.testing.assert_array_equal(where[..., 2], x // 7 + 10 * (y // 3) + 100 * (z // 2) + 3000)


@pytest.mark.parametrize("n", [1, 31, 33, 127, 1025])
def test_grid_stride_loop(n):
    def kernel(x, y, a):
        for i in range(cuda.grid(1), x.shape[0], cuda.gridsize(1)):
            y[i] += a * x[i]

    rng = np.random.default_rng(n)
    x, y = rng.random(n, np.float32), rng.random(n, np.float32)
    expected = y + np.float32(2.5) * x
    launch(kernel, 3, 33, x, y, np.float32(2.5))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("index, ok", [("i - 5", True), ("i - 6", False), ("i + 1", False), ("i", True),
                                       ("i * 1.0", False)])
def test_bounds(index, ok):
    source = f"def kernel(x):\n    i = cuda.threadIdx.x\n    x[{index}] = 1\n"
    module = load_case(Case(0, source, (1,), (5,), 0, ()))
    module.cuda = cuda
    x = np.zeros(5)
    if ok:
        run(module.kernel, 1, 5, (x,))
        assert x.tolist() == [1] * 5
    else:
        with pytest.raises(OracleError, match=r"case_\w+\.py:3: thread \(\d, 0, 0\) of block \(0, 0, 0\): .*index"):
            run(module.kernel, 1, 5, (x,))


def test_views_slices_and_helpers():
    def kernel(x, y):
        row = x[1]
        y[0] = row[-1]
        y[1:3] = x[2, 1:3]
        y[3] = len(x) + x.ndim * 10 + x.size * 100
        y[4:] = 7
        total = 0.0
        for v in row:
            total += v
        y[3] += total

    x, y = np.arange(12.0).reshape(3, 4), np.zeros(6)
    launch(kernel, 1, 1, x, y)
    assert y.tolist() == [7, 9, 10, 1223 + 22, 7, 7]


@pytest.mark.parametrize("shape", [(17, 5, 30), (8, 8, 8), (1, 33, 9)])
def test_tiled_matmul(shape):
    def kernel(a, b, c):
        sa = cuda.shared.array((TILE, TILE), np.float32)
        sb = cuda.shared.array(shape=(TILE, TILE), dtype="float32")
        x, y = cuda.grid(2)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        total = np.float32(0)
        for t in range((a.shape[1] + TILE - 1) // TILE):
            k = t * TILE + tx
            sa[ty, tx] = a[y, k] if y < a.shape[0] and k < a.shape[1] else 0
            if t * TILE + ty < b.shape[0] and x < b.shape[1]:
                sb[ty, tx] = b[t * TILE + ty, x]
            else:
                sb[ty, tx] = 0
            cuda.syncthreads()
            for k in range(TILE):
                total += sa[ty, k] * sb[k, tx]
            cuda.syncthreads()
        if y < c.shape[0] and x < c.shape[1]:
            c[y, x] = total

    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (m, k)).astype(np.float32), rng.integers(-9, 9, (k, n)).astype(np.float32)
    c = np.zeros((m, n), np.float32)
    launch(kernel, (-(-n // TILE), -(-m // TILE)), (TILE, TILE), a, b, c)
    np.testing.assert_array_equal(c, a @ b)


def test_dynamic_shared_arrays_alias():
    def kernel(out, bits):
        i = cuda.threadIdx.x
        floats = cuda.shared.array(0, np.float32)
        ints = cuda.shared.array(0, np.int32)
        floats[i] = i + 0.5
        cuda.syncthreads()
        bits[i] = ints[(i + 1) % 4]
        out[i] = floats.size + ints.shape[0]

    out, bits = np.zeros(4, np.int32), np.zeros(4, np.int32)
    launch(kernel, 1, 4, out, bits, shared_bytes=24)
    assert out.tolist() == [12] * 4
    assert bits.view(np.float32).tolist() == [1.5, 2.5, 3.5, 0.5]


TABLE = np.array([10, 20, 30], np.int32)


def test_local_and_constant_arrays():
    def kernel(out):
        table = cuda.const.array_like(TABLE)
        private = cuda.local.array((2, 2), np.int64)
        i = cuda.threadIdx.x
        for k in range(2):
            private[k, 0] = i
            private[k, 1] = k
        out[i] = table[i] + private[1, 0] + private[1, 1] + TABLE[-1]

    out = np.zeros(3, np.int32)
    launch(kernel, 1, 3, out)
    assert out.tolist() == [41, 52, 63]


def test_unwritten_memory_is_found():
    def kernel(out):
        s = cuda.shared.array(4, np.int32)
        s[cuda.threadIdx.x] = 1
        cuda.syncthreads()
        out[0] = s[3]

    run(kernel, 1, 4, (np.zeros(1),), checked=False)
    with pytest.raises(OracleError, match="before anybody wrote it"):
        run(kernel, 1, 3, (np.zeros(1),), checked=True)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of arrays as values
# ---------------------------------------------------------------------------------------------------------------------
@device
def row_sum(row):
    total = 0.0
    for k in range(row.shape[0]):
        total += row[k]
    return total


@device
def add_to_row(row, value):
    for k in range(len(row)):
        row[k] += value * (k + 1)


def test_rows_of_local_arrays():
    def kernel(out):
        t = cuda.threadIdx.x
        m = cuda.local.array((2, 2), np.float32)
        m[0, 0] = t
        m[0, 1] = t
        out[0, t] = row_sum(m[0])           # 0 2 4 6
        m[0] = 7, 8
        out[1, t] = m[0, 1]
        m[0] = t
        out[2, t] = m[0, 0]
        m[1] = t + 1, t + 2
        row = m[1]
        row[0] += 10
        out[3, t] = m[1, 0] * 100 + row[-1]
        add_to_row(m[0], 5)
        out[4, t] = m[0][0] * 100 + m[0, 1]
        row = m[0] if t > 1 else m[1]
        out[5, t] = row[0]
        a, b = m[1]
        out[6, t] = a * 100 + b

    out = np.zeros((7, 4), np.int64)
    launch(kernel, 1, 4, out)
    assert out.tolist() == [[0, 2, 4, 6], [8] * 4, [0, 1, 2, 3], [1102, 1203, 1304, 1405], [510, 611, 712, 813],
                            [11, 12, 7, 8], [1102, 1203, 1304, 1405]]


def test_parts_of_arrays_of_rank_3():
    def kernel(out, shapes, x):
        m = cuda.local.array((2, 3, 4), np.int16)
        m[:] = 0
        m[0] = 1
        m[1, 2] = 5, 6, 7, 8
        m[1, :, 0] = 2, 3, 70000            # a store casts: 70000 is 4464 in 16 bits
        plane = m[1]
        row = plane[2]
        row[1] = 60
        plane[0:2, 3] = 9
        part = plane[1:, ::2]
        part[0, 1] = -1
        m[0][1][2] += 41
        for i in range(2):
            for j in range(3):
                for k in range(4):
                    out[i, j, k] = m[i, j, k]
        shapes[0], shapes[1], shapes[2] = plane.shape[0], plane.shape[1], len(row)
        shapes[3], shapes[4], shapes[5] = part.shape[0], part.shape[1], part.size * 10 + part.ndim
        shapes[6] = m[:, 1, 1:3].shape[1] * 100 + x[1].shape[0]
        shapes[7] = m[1, 0, ::-1][0] * 100 + m[-1, -1][-1]
        s = cuda.shared.array((2, 2, 2), np.int32)
        s[0] = 3
        s[1] = 4
        corner = s[1, 0]
        corner[1] = x[1, 2]
        shapes[8] = s[1, 0, 1] * 10 + s[0, 1, 1]

    out, shapes = np.zeros((2, 3, 4), np.int64), np.zeros(9, np.int64)
    launch(kernel, 1, 1, out, shapes, np.arange(6).reshape(2, 3))
    assert out[0].tolist() == [[1, 1, 1, 1], [1, 1, 42, 1], [1, 1, 1, 1]]
    assert out[1].tolist() == [[2, 0, 0, 9], [3, 0, -1, 9], [4464, 60, 7, 8]]
    assert shapes.tolist() == [3, 4, 4, 2, 2, 42, 203, 908, 53]


def wrong_length(m):
    m[0] = 1, 2


def two_types(m):
    m[0] = 1, 2.5, 3


def row_out_of_range(m):
    row = m[1]
    row[3] = 1


@pytest.mark.parametrize("kernel, message", [
    (wrong_length, r"a tuple of 2 is assigned to a part of shape \(3,\)"), (two_types, "of several types"),
    (row_out_of_range, "index 3 is out of range for axis 0")])
def test_undefined_uses_of_parts(kernel, message):
    with pytest.raises(OracleError, match=message):
        run(kernel, 1, 1, (np.zeros((2, 3)),))


def test_a_row_is_in_the_shadow_memory_of_its_array():
    def unwritten(out):
        m = cuda.local.array((2, 2), np.int32)
        m[0] = 1
        row = m[1]
        out[0] = row[0]

    def race(out):
        s = cuda.shared.array((2, 40), np.int32)
        row = s[cuda.threadIdx.x // 33]
        row[cuda.threadIdx.x % 33] = 1
        out[cuda.threadIdx.x] = s[0, (cuda.threadIdx.x + 1) % 33]

    with pytest.raises(OracleError, match="before anybody wrote it"):
        run(unwritten, 1, 1, (np.zeros(1),), checked=True)
    with pytest.raises(OracleError, match="race on element|before anybody wrote it"):
        run(race, 1, 40, (np.zeros(40),), checked=True)


# ---------------------------------------------------------------------------------------------------------------------
# Signatures
# ---------------------------------------------------------------------------------------------------------------------
def signed(*signatures):
    return lambda function: types.SimpleNamespace(py_func=function, signatures=list(signatures))


@signed("uint32(uint32)")
def lcg(x):
    return x * 1664525 + 1013904223


@signed("int32(int32)")
def half(v):
    return v / 2


@signed("int32(int32, int32)")
def packed(a, b):
    return (a << 8) | b


@signed("uint8(int8, float32)")
def narrow(a, x):
    a = a * 3
    return a + x


@signed("int32(int32)", "float32(float32)")
def either(v):
    return v / 2


@signed("void(float32[:], uint8)")
def put(row, value):
    row[1] = value


@signed("uint32(uint16)")
def inverted(v):
    return ~v


def test_signatures_of_device_functions():
    def kernel(out, reals):
        out[0] = lcg(lcg(12345))
        out[1] = half(7)
        out[2] = half(-7)
        out[3] = packed(1.0, 2.0)
        out[4] = half(2**32 + 9) + 2**40    # the argument is cut to 32 bits; then the sum is an int64
        out[5] = narrow(45, 2.75)           # 135 + 2.75
        out[6] = inverted(0) - 1            # ~ in 16 bits: 65535
        out[7] = -lcg(0) - 1                # in 32 bits
        reals[0] = either(np.float32(7))
        reals[1] = either(np.int32(7))
        row = cuda.local.array((2, 2), np.float32)
        row[1] = 0
        put(row[1], 300)
        reals[2] = row[1, 1]
        reals[3] = narrow(1, 0.1) / 2

    out, reals = np.zeros(8, np.int64), np.zeros(4)
    launch(kernel, 1, 1, out, reals)
    assert out[:5].tolist() == [71072467, 3, -3, 258, 2**40 + 4]
    assert out[5:].tolist() == [137, 65534, 2**32 - 1013904223 - 1]
    assert reals.tolist() == [3.5, 3.0, 44.0, 1.5]

    def out_of_range(out):
        out[0] = narrow(130, 0.1)           # int8(130) is -126

    with pytest.raises(OracleError, match="-377.89.* does not fit uint8"):
        run(out_of_range, 1, 1, (out,))


def test_signatures_of_kernels():
    def kernel(out, scale, bits):
        out[0] = scale
        out[1] = ~bits
        out[2] = bits * bits

    def answers(signature, *args):
        out = np.zeros(3)
        run(kernel, 1, 1, (out, *args), signatures=[signature])
        return out.tolist()

    assert answers("void(float64[:], float32, uint32)", 0.1, 0) == [0.10000000149011612, 4294967295.0, 0.0]
    assert answers("(float64[:], float64, int32)", 0.1, 0) == [0.1, -1.0, 0.0]
    assert answers("void(float64[::1], int8, uint8)", 200, 300) == [-56.0, 211.0, 1936.0]
    assert answers("void(float64[:], float32, int64)", 3, np.int8(-2)) == [3.0, 1.0, 4.0]
    from numba import float64, int16, uint16, void

    assert answers((float64[:], int16, uint16), 70000, -1) == [4464.0, 0.0, 65535.0 * 65535]
    assert answers(void(float64[:], int16, uint16), 70000, -1) == [4464.0, 0.0, 65535.0 * 65535]
    for signature, args, message in [
        ("void(float64[:], int32, int32)", (1.5, 2), "1.5 is given for a parameter that is int32"),
        ("void(int64[:], int32, int32)", (1, 2), "is given where the signature has"),
        ("void(float64[:], int32)", (1, 2), "3 arguments are given to a signature of 2"),
        ("void(float64[:], int7, int32)", (1, 2), "type int7 of a signature is not known"),
    ]:
        with pytest.raises(OracleError, match=message):
            answers(signature, *args)
    out = np.zeros(3)
    both = ["void(float64[:], int32, int32)", "void(float64[:], float32, uint8)"]
    run(kernel, 1, 1, (out, np.float32(0.5), np.uint8(1)), signatures=both)
    assert out.tolist() == [0.5, 254.0, 1.0]
    with pytest.raises(OracleError, match="no signature matches exactly"):
        run(kernel, 1, 1, (out, 0.5, 1), signatures=both)


# ---------------------------------------------------------------------------------------------------------------------
# Device functions: recursion, returns; constants of every origin
# ---------------------------------------------------------------------------------------------------------------------
@device
def factorial(n):
    if n <= 1:
        return 1
    return n * factorial(n - 1)


@signed("int64(int64)")
def fibonacci(n):
    if n > 1:
        return fibonacci(n - 1) + fibonacci(n - 2)
    return n


@device
def halves(n, x, row):
    if n <= 0:
        return x
    row[n % 2] += n
    return halves(n - 1, x * 0.5, row) + 1.0


def test_recursion():
    def kernel(out):
        t = cuda.threadIdx.x
        row = cuda.local.array((2, 2), np.int64)
        row[1] = 0
        out[t, 0] = factorial(t + 3)
        out[t, 1] = fibonacci(t + 4.5) + fibonacci(7)
        out[t, 2] = halves(t + 1, 8.0, row[1]) * 10
        out[t, 3] = row[1, 0] * 100 + row[1, 1]

    out = np.zeros((3, 4), np.int64)
    launch(kernel, 1, 3, out)
    assert out.tolist() == [[6, 16, 50, 1], [24, 18, 40, 201], [120, 21, 40, 204]]


@device
def leaves_early(x, n):
    if x > 0:
        if x > 10:
            return 1
        for i in range(n):
            if x == i:
                return 10 + i
            while x > 5:
                x -= 1
                if x == 6:
                    return 100 + i
            if x * i == 12:
                return 1000
        return 2
    elif x < -3:
        return 3
    for i in range(n):
        for j in range(n):
            if i * j == -x:
                return 20 + 10 * i + j
    return 4


def test_nested_returns():
    def kernel(out):
        out[cuda.threadIdx.x] = leaves_early(cuda.threadIdx.x - 5, 5)

    out = np.zeros(18, np.int64)
    launch(kernel, 1, 18, out)
    assert out.tolist() == [3, 3, 33, 32, 31, 20, 11, 12, 13, 1000, 2, 2, 100, 100, 100, 100, 1, 1]


class Mode(IntEnum):
    SLOW = 1
    FAST = 4


class Point(NamedTuple):
    x: int
    y: float


package = types.ModuleType("package")
package.inner = types.ModuleType("package.inner")
package.inner.N, package.inner.TABLE, package.inner.Mode = np.int32(7), np.array([5, 6]), Mode
POINT = Point(3, Point(5, 0.25))


@device
def scaled(x):
    return x * package.inner.N


package.inner.scaled = scaled


def test_constants_of_every_origin():
    def kernel(out):
        out[0] = Mode.FAST + 2
        out[1] = out[0] == Mode.FAST + Mode.SLOW + 1
        out[2] = Mode.SLOW.value * 10 + package.inner.Mode.FAST
        out[3] = package.inner.N * 100 + package.inner.TABLE[Mode.SLOW.value]
        out[4] = package.inner.scaled(3)
        out[5] = POINT.x + POINT.y.x + POINT.y.y * 4
        for k in range(Mode.FAST):
            out[6] += k
        mode = Mode.SLOW if out[6] > 100 else Mode.FAST
        out[7] = 1 if mode == Mode.FAST else 2
        out[8] = -Mode.FAST & 6 | Mode.SLOW << 3

    out = np.zeros(9, np.int64)
    launch(kernel, 1, 1, out)
    assert out.tolist() == [6, 1, 14, 706, 21, 9, 6, 1, 12]


# ---------------------------------------------------------------------------------------------------------------------
# Out of range
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value, expected", [
    (0.5, [0] * 8), (-0.5, [0] * 8), (-1.0, [-1, 0, -1, 0, -1, 0, -1, 0]), (255.9, [-1, 255] + [255] * 6),
    (256.0, [0, 0] + [256] * 6), (70000.0, [-1, 255, 32767, 65535] + [70000] * 4),
    (-70000.0, [0, 0, -32768, 0, -70000, 0, -70000, 0]),
    (3e9, [-1, 255, 32767, 65535, 2**31 - 1, 3 * 10**9, 3 * 10**9, 3 * 10**9]),
    (1e10, [-1, 255, 32767, 65535, 2**31 - 1, 2**32 - 1, 10**10, 10**10]),
    (-1e10, [0, 0, -32768, 0, -2**31, 0, -10**10, 0]),
    (1e20, [-1, 255, 32767, 65535, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]),
    (math.inf, [-1, 255, 32767, 65535, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]),
    (-math.inf, [0, 0, -32768, 0, -2**31, 0, -2**63, 0]),
])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_wild_casts_saturate_in_the_register(kind, value, expected):
    def kernel(x, i1, u1, i2, u2, i4, u4, i8, u8):
        i1[0], u1[0], i2[0], u2[0], i4[0], u4[0], i8[0], u8[0] = x, x, x, x, x, x, x, x

    arrays = [np.zeros(1, t) for t in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")]
    run(kernel, 1, 1, (np.dtype(kind).type(value), *arrays), wild=True)
    assert [int(a[0]) for a in arrays] == expected


def test_wild_nans_and_shifts():
    def kernel(out, f4, f8, amounts):
        out[0], out[1], out[2], out[3] = np.int32(f4), np.int8(f4), np.int64(f4), np.int32(f8)
        out[4], out[5], out[6] = np.int16(f8), np.uint32(f8), np.uint8(f8)
        for k in range(amounts.size):
            out[7 + k] = (3 << amounts[k]) + (-5 >> amounts[k]) * 1000

    out = np.zeros(12, np.int64)
    run(kernel, 1, 1, (out, np.float32("nan"), math.nan, np.array([1, 63, 64, -1, 2**32 + 1])), wild=True)
    assert out.tolist() == [0, 0, -2**63, -2**31, -2**15, 2**31, 0, 6 - 3000, 2**63 - 1000, -1000, -1000, 6 - 3000]
    with pytest.raises(OracleError, match="nan is converted"):
        run(kernel, 1, 1, (out, np.float32("nan"), math.nan, np.array([1])))


# ---------------------------------------------------------------------------------------------------------------------
# Barriers, races
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 7, 32, 33, 100])
def test_scan(n):
    def kernel(x):
        s = cuda.shared.array(128, np.int64)
        i = cuda.threadIdx.x
        s[i] = x[i]
        cuda.syncthreads()
        step = 1
        while step < cuda.blockDim.x:
            value = s[i - step] if i >= step else 0
            cuda.syncthreads()
            s[i] += value
            cuda.syncthreads()
            step *= 2
        x[i] = s[i]

    x = np.arange(1, n + 1)
    expected = np.cumsum(x)
    launch(kernel, 1, n, x)
    np.testing.assert_array_equal(x, expected)


def test_voting_barriers_and_returned_threads():
    def kernel(out, n):
        i = cuda.threadIdx.x
        if i >= n:
            return
        out[i, 0] = cuda.syncthreads_count(i % 3 == 0)
        out[i, 1] = cuda.syncthreads_and(i < n)
        out[i, 2] = cuda.syncthreads_or(i > n)
        cuda.syncthreads()

    out = np.full((50, 3), -1, np.int32)
    launch(kernel, 1, 50, out, 40)
    assert (out[:40] == [14, 1, 0]).all() and (out[40:] == -1).all()


def two_sides(out):
    if cuda.threadIdx.x < 3:
        cuda.syncthreads()
    else:
        cuda.syncthreads()


def some_never_come(out):
    if cuda.threadIdx.x < 3:
        cuda.syncthreads()
    cuda.syncthreads()


def different_rounds(out):
    for i in range(2):
        if (cuda.threadIdx.x + i) % 2 == 0:
            cuda.syncthreads()


@device
def barrier():
    cuda.syncthreads()


def different_calls(out):
    if cuda.threadIdx.x < 3:
        barrier()
    else:
        barrier()


def barrier_and_shuffle(out):
    if cuda.threadIdx.x < 3:
        cuda.syncthreads()
    else:
        cuda.shfl_sync(FULL, 1, 0)


@pytest.mark.parametrize("kernel, message", [
    (two_sides, "divergent barrier"), (some_never_come, "divergent barrier"),
    (different_rounds, "another iteration"), (different_calls, "divergent barrier"),
    (barrier_and_shuffle, "lane 0 is named by the mask but waits at"),
])
def test_divergent_barriers(kernel, message):
    with pytest.raises(OracleError, match=message) as error:
        run(kernel, 1, 8, (np.zeros(8),))
    line = int(re.search(r"test_oracle\.py:(\d+)", str(error.value))[1])
    text = Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1]
    assert "syncthreads" in text or "shfl" in text


def racy_reduction(x):
    s = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    s[i] = x[i]
    cuda.syncthreads()
    if i == 0:
        total = np.float32(0)
        for k in range(64):
            total += s[k]
        s[0] = total
    x[i] = s[i]         # the barrier before this line is missing


def racy_neighbour(x):
    s = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    s[i] = x[i]
    x[i] = s[i ^ 1]


def racy_global(x):
    x[cuda.threadIdx.x % 2] = 1


def racy_atomic(x):
    cuda.atomic.add(x, 0, 1)
    if cuda.threadIdx.x == 1:
        x[0] = 5


def warp_shares(x):
    s = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    s[i] = x[i]
    cuda.syncwarp()
    x[i] = s[i ^ 1]


def shuffle_orders_nothing(x):
    s = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    s[i] = x[i]
    x[i] = cuda.shfl_sync(FULL, 1, 0) + s[i ^ 1]


@pytest.mark.parametrize("kernel, race", [
    (racy_reduction, False), (racy_neighbour, True), (racy_global, True), (racy_atomic, True), (warp_shares, False),
    (shuffle_orders_nothing, True)], ids=lambda v: getattr(v, "__name__", None))
def test_races(kernel, race):
    x = np.arange(64, dtype=np.float32)
    if not race:
        run(kernel, 1, 64, (x,), checked=True)
    else:
        with pytest.raises(OracleError, match="race on element|before anybody wrote it"):
            run(kernel, 1, 64, (x,), checked=True)


def test_race_between_blocks():
    def kernel(x, i):
        x[i if i >= 0 else cuda.blockIdx.x] += 1

    run(kernel, 3, 1, (np.zeros(3), -1), checked=True)
    with pytest.raises(OracleError, match="race on element"):
        run(kernel, 3, 1, (np.zeros(3), 2), checked=True)


def test_a_variable_that_was_never_assigned():
    def kernel(x):
        if cuda.threadIdx.x != 2:
            value = 1
        x[cuda.threadIdx.x] = value

    with pytest.raises(OracleError, match=r"test_oracle.py:\d+: thread \(2, 0, 0\).*before it was assigned"):
        run(kernel, 1, 3, (np.zeros(3),))


# ---------------------------------------------------------------------------------------------------------------------
# Warps
# ---------------------------------------------------------------------------------------------------------------------
def test_shuffles():
    def kernel(out, x):
        i = cuda.threadIdx.x
        v = x[i]
        out[0, i] = cuda.shfl_sync(FULL, v, 3)
        out[1, i] = cuda.shfl_sync(-1, v, i + 1)                  # lane 32 is lane 0: five bits count
        out[2, i] = cuda.shfl_up_sync(FULL, v, 2)                 # the lowest lanes keep their own
        out[3, i] = cuda.shfl_down_sync(FULL, v, 5)
        out[4, i] = cuda.shfl_xor_sync(FULL, v, 9)
        out[5, i] = cuda.shfl_down_sync(FULL, cuda.shfl_up_sync(FULL, v, 1), 1)

    x = np.arange(64) ** 2
    out = np.zeros((6, 64), np.int64)
    launch(kernel, 1, 64, out, x)
    i = np.arange(64)
    warp, lane = i // 32 * 32, i % 32
    for row, source in enumerate([warp + 3, warp + (lane + 1) % 32, np.where(lane < 2, i, i - 2),
                                  np.where(lane > 26, i, i + 5), i ^ 9, i]):
        expected = x[source]
        if row == 5:        # the last lane keeps what it had, which came from lane 30
            expected = np.where(lane == 31, x[i - 1], expected)
        np.testing.assert_array_equal(out[row], expected)


def test_votes_and_matches():
    def kernel(out, bits, x):
        i = cuda.threadIdx.x
        bits[0, i] = cuda.ballot_sync(FULL, x[i] > 2)
        bits[1, i] = cuda.match_any_sync(FULL, x[i])
        mask, same = cuda.match_all_sync(FULL, x[i] // 8)
        bits[2, i] = mask
        bits[3, i] = cuda.activemask()
        bits[4, i] = cuda.lanemask_lt()
        out[0, i], out[1, i], out[2, i] = cuda.all_sync(FULL, x[i] >= 0), cuda.any_sync(FULL, x[i] == 3), same
        out[3, i] = cuda.eq_sync(FULL, i >= 32)
        out[4, i] = cuda.eq_sync(FULL, i >= 34)

    n = 40      # the second warp has 8 lanes
    x = (np.arange(n) % 5).astype(np.int32)
    x[35] = 9
    out, bits = np.zeros((5, n), np.bool_), np.zeros((5, n), np.uint32)
    launch(kernel, 1, n, out, bits, x)
    for start, stop in ((0, 32), (32, n)):
        lanes = x[start:stop]
        pack = lambda flags: sum(1 << k for k, f in enumerate(flags) if f)
        assert set(bits[0, start:stop]) == {pack(lanes > 2)}
        assert bits[1, start:stop].tolist() == [pack(lanes == v) for v in lanes]
        everyone = pack(np.ones(stop - start))
        assert set(bits[2, start:stop]) == {everyone if start == 0 else 0}
        assert set(bits[3, start:stop]) == {everyone}
        assert bits[4, start:stop].tolist() == [2**k - 1 for k in range(stop - start)]
    assert out[:, 0].tolist() == [True, True, True, True, True]
    assert out[:, 32].tolist() == [True, True, False, True, False]


def test_ballot_is_an_int32():
    def kernel(out):
        out[0] = cuda.ballot_sync(FULL, True)

    out = np.zeros(1, np.int64)
    run(kernel, 1, 32, (out,))
    assert out[0] == -1


@device
def warp_sum(value):
    for offset in (16, 8, 4, 2, 1):
        value += cuda.shfl_down_sync(FULL, value, offset)
    return value


@device
def block_sum(value, partial):
    total = warp_sum(value)
    if cuda.threadIdx.x % 32 == 0:
        partial[cuda.threadIdx.x // 32] = total
    cuda.syncthreads()
    if cuda.threadIdx.x // 32 == 0:     # one warp goes on alone
        mine = partial[cuda.laneid] if cuda.laneid < cuda.blockDim.x // 32 else np.float32(0)
        total = warp_sum(mine)
    return total


@pytest.mark.parametrize("n", [1, 127, 1025])
def test_block_reduction_with_shuffles(n):
    def kernel(x, out):
        partial = cuda.shared.array(32, np.float32)
        i = cuda.grid(1)
        total = block_sum(x[i] if i < x.size else np.float32(0), partial)
        if cuda.threadIdx.x == 0:
            cuda.atomic.add(out, 0, total)

    x = np.random.default_rng(n).integers(-50, 50, n).astype(np.float32)
    out = np.zeros(1, np.float32)
    launch(kernel, -(-n // 96), 96, x, out)
    assert out[0] == x.sum()


def test_masks_name_who_takes_part():
    def halves(out):
        i = cuda.laneid
        if i < 16:
            out[i] = cuda.shfl_xor_sync(0xFFFF, i, 8)
            cuda.syncwarp(0xFFFF)
        else:
            out[i] = cuda.shfl_sync(0xFFFF0000, i, 20)

    out = np.zeros(32, np.int32)
    launch(halves, 1, 32, out)
    assert out.tolist() == [i ^ 8 for i in range(16)] + [20] * 16

    def groups(out):
        mask = cuda.match_any_sync(FULL, cuda.laneid % 3)
        leader = cuda.ffs(mask) - 1
        out[cuda.laneid] = cuda.shfl_sync(mask, 100 + cuda.laneid, leader) * 100 + cuda.popc(mask)

    launch(groups, 1, 32, out)
    assert out.tolist() == [(100 + i % 3) * 100 + (11 if i % 3 < 2 else 10) for i in range(32)]


def test_a_shuffle_waits_for_lanes_that_come_later():
    def kernel(out):
        i = cuda.laneid
        value = i
        if i < 16:
            value = cuda.shfl_xor_sync(0xFFFF, value, 1)
        out[i] = cuda.shfl_sync(FULL, value, 2)

    out = np.zeros(32, np.int32)
    launch(kernel, 1, 32, out)
    assert set(out) == {3}


def absent_lane(out):
    if cuda.laneid < 16:
        out[0] = cuda.shfl_sync(FULL, 1, 0)
    cuda.syncthreads()


def other_place(out):
    if cuda.laneid < 16:
        out[0] = cuda.all_sync(FULL, True)
    else:
        out[0] = cuda.all_sync(FULL, True)


def not_in_mask(out):
    out[0] = cuda.any_sync(0xFFFF, True)


def reads_absent_lane(out):
    if cuda.laneid < 16:
        out[cuda.laneid] = cuda.shfl_down_sync(0xFFFF, 1, 1)


def reads_returned_lane(out):
    if cuda.laneid == 7:
        return
    out[cuda.laneid] = cuda.shfl_sync(FULL, 1, 7)


def shuffles_a_bool(out):
    out[0] = cuda.shfl_sync(FULL, cuda.laneid > 3, 0)


@pytest.mark.parametrize("kernel, message", [
    (absent_lane, "never completes: lane 16"), (other_place, "never completes"),
    (not_in_mask, "does not name the calling lane 16"), (reads_absent_lane, "does not take part"),
    (reads_returned_lane, "does not take part"), (shuffles_a_bool, "takes int32, int64, float32 and float64")])
def test_undefined_collectives(kernel, message):
    with pytest.raises(OracleError, match=message):
        run(kernel, 1, 32, (np.zeros(32),))


def test_a_shuffle_past_the_last_lane_of_a_ragged_warp_is_harmless_until_used():
    def kernel(x):
        i = cuda.threadIdx.x
        other = cuda.shfl_down_sync(FULL, x[i], 1)
        if i + 1 < 5:
            x[i] += other

    x = np.array([1, 2, 3, 4, 5], np.int32)
    launch(kernel, 1, 5, x)
    assert x.tolist() == [3, 5, 7, 9, 5]


# ---------------------------------------------------------------------------------------------------------------------
# Atomics
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, dtype, start, expected", [
    ("add", "int32", 2**31 - 1, -2**31 + 9), ("sub", "int64", 0, -10), ("max", "int32", 2, 4), ("min", "float32", 2, 0),
    ("max", "float64", np.nan, np.nan), ("nanmax", "float64", np.nan, 4), ("nanmin", "float32", 9, 0),
    ("and_", "uint32", 7, 0), ("or_", "int64", 8, 15), ("xor", "int32", 1, 5), ("add", "float32", 0.5, 10.5),
    ("inc", "uint32", 3, 3), ("dec", "uint32", 1, 1)])
def test_atomics(name, dtype, start, expected):
    source = f"def kernel(x):\n    cuda.atomic.{name}(x, (0, -1), {'4' if name in ('inc', 'dec') else 'cuda.laneid'})\n"
    module = load_case(Case(0, source, (1,), (1,), 0, ()))
    module.cuda = cuda
    x = np.zeros((2, 3), dtype)
    x[0, 2] = start
    launch(module.kernel, 1, 5, x)      # values 0 to 4
    np.testing.assert_array_equal(x[0, 2], np.dtype(dtype).type(expected))
    assert np.count_nonzero(x) <= 1


def test_atomics_return_the_old_value():
    def kernel(x, old):
        i = cuda.threadIdx.x
        old[i, 0] = cuda.atomic.exch(x, i, 7)
        old[i, 1] = cuda.atomic.cas(x, i, 7, i)
        old[i, 2] = cuda.atomic.cas(x, i, 100, 200)
        old[i, 3] = cuda.atomic.add(x, i, 1)
        if i == 0:
            old[i, 4] = cuda.atomic.compare_and_swap(x, 1, 50)

    x, old = np.array([3, 4], np.int32), np.zeros((2, 5), np.int32)
    launch(kernel, 1, 2, x, old)
    assert old.tolist() == [[3, 7, 0, 0, 1], [4, 7, 1, 1, 0]] and x.tolist() == [50, 2]


@pytest.mark.parametrize("name, dtype", [("exch", "float32"), ("inc", "int32"), ("add", "int8"), ("xor", "float64")])
def test_atomics_that_do_not_exist(name, dtype):
    source = f"def kernel(x):\n    cuda.atomic.{name}(x, 0, 1)\n"
    module = load_case(Case(0, source, (1,), (1,), 0, ()))
    module.cuda = cuda
    with pytest.raises(OracleError, match="does not exist"):
        run(module.kernel, 1, 1, (np.zeros(1, dtype),))


# ---------------------------------------------------------------------------------------------------------------------
# The random kernels
# ---------------------------------------------------------------------------------------------------------------------
def test_generated_kernels_are_valid():
    for seed in range(200):
        oracle_args(generate(seed))


def test_generated_kernels_have_no_races_and_no_order():
    for seed in range(1000, 1015):
        check_valid(generate(seed))


def test_every_feature_is_common():
    count = Counter(f for seed in range(400) for f in features_of(generate(seed, features=()).source))
    rare = {f: count[f] for f in FEATURES if count[f] < 20}
    assert not rare, f"of 400 kernels fewer than 5 % contain {rare}"


COMPANIONS = {"iterate": ("rows",), "recursion": ("signatures",), "signatures": ("rows",)}


@pytest.mark.parametrize("kind", FEATURES_OF_KINDS)
def test_every_part_of_a_feature_is_common(kind):
    features, count = (kind, *COMPANIONS.get(kind, ())), Counter()
    for seed in range(150):
        count.update(features_of(generate(seed, 3, features=features).source, FEATURES_OF_KINDS[kind]))
    rare = {f: count[f] for f in FEATURES_OF_KINDS[kind] if count[f] < 6}
    assert not rare, f"of 150 kernels fewer than 4 % contain {rare}"


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_with_a_feature_are_valid(kind):
    for seed in range(2000, 2003):
        check_valid(generate(seed, 3, features=(kind, *COMPANIONS.get(kind, ()))))


def test_features_are_asked_for_by_name():
    assert [generate(s).source == generate(s, features=()).source for s in (3, 4, 5, 6)] == [True, True, False, False]
    assert generate(6) == generate(6, features=DEFAULT_KINDS)
    assert set(GPU_KINDS) < set(KINDS) == set(GPU_KINDS) | {"class_constants", "wild"}
    assert generate(7, features=["rows"]) != generate(7, features=[]) != generate(7, features=["casts"])
    case = generate(7, features=["wild"])
    assert case.wild and Case.from_text(case.to_text()).wild and not generate(7, features=["rows"]).wild
    with pytest.raises(ValueError, match="unknown features .*nonsense.*; known: rows, "):
        generate(0, features=["rows", "nonsense"])


def test_numba_cuda_takes_the_kernels_of_every_feature(tmp_path):
    pytest.importorskip("numba_cuda")
    result = command_line("--seeds", "3000:3005", "--size", "2", "--features", "gpu", "--wild", "--ptx", "sm_80",
                          "--out", str(tmp_path))
    assert result.returncode == 0 and "5 of 5 kernels agree" in result.stdout, result.stdout + result.stderr


def test_what_numba_cuda_refuses_is_a_failure(tmp_path):
    pytest.importorskip("numba_cuda")
    result = command_line("--seeds", "0:2", "--size", "2", "--features", "class_constants", "--ptx", "sm_80",
                          "--out", str(tmp_path))
    assert result.returncode == 1 and "Cannot determine Numba type of" in result.stdout


def test_generation_is_deterministic_and_features_can_be_left_out():
    assert generate(5) == generate(5) != generate(6)
    case = generate(5)
    assert all(np.array_equal(a, b) for a, b in zip(case.make_args(), case.make_args()))
    assert Case.from_text(case.to_text()) == replace(case, source=case.source.rstrip() + "\n")
    without = ("while", "vote_loop", "tree_reduce", "scan", "warp_down", "warp_scan", "butterfly")
    assert set(without) <= set(STATEMENTS)
    for seed in range(30):
        assert " while " not in generate(seed, without=without, features=()).source
    with pytest.raises(ValueError, match="unknown features"):
        generate(0, without=["nonsense"])


def backend_by(change=lambda source: source, fail=None):
    """A backend that is the oracle itself, on a changed source."""
    def backend_run(module, case, args):
        if fail and fail in case.source:
            raise NotImplementedError(f"{case.seed}.py:17: {fail} is not supported")
        with stub_cuda():
            wrong = load_case(replace(case, source=change(case.source)))
        run(wrong.kernel.py_func, case.grid, case.block, args, case.shared_bytes)

    return backend_run


def test_run_case_reports_the_first_difference():
    case = generate(3)
    with stub_cuda():
        run_case(case, backend_by())
        with pytest.raises(AssertionError) as error:
            run_case(case, backend_by(lambda s: s.replace("fi[0, gid] = ", "fi[0, gid] = 1 + ")))
    assert case.source in str(error.value)
    assert re.search(r"fi\[0, 0\] is .* should be .*elements differ", str(error.value))
    wider = [a.astype(np.complex128) if isinstance(a, np.ndarray) else a for a in case.make_args()]
    with pytest.raises(AssertionError, match="became complex128"):
        compare(case, wider, case.make_args())


def test_shrinking_keeps_the_failure_and_little_else():
    case = next(c for c in map(generate, range(100)) if "cuda.popc" in c.source and "FULL," in c.source)
    with stub_cuda():
        backend = backend_by(fail="cuda.popc")
        problem = failure_of(case, backend)
        assert problem.startswith("NotImplementedError")
        small = shrink(case, lambda c: failure_of(c, backend) == problem, rounds=150)
    assert "cuda.popc" in small.source and len(small.source) < len(case.source) / 2
    check_valid(small)


def command_line(*arguments):
    root = Path(__file__).resolve().parent.parent
    return subprocess.run([sys.executable, "-m", "tests.fuzz_kernels", *arguments], cwd=root, capture_output=True,
                          text=True, timeout=300)


def test_command_line(tmp_path):
    result = command_line("--seeds", "0:4", "--out", str(tmp_path / "failures"))
    assert result.returncode == 0 and "4 of 4 kernels agree" in result.stdout
    assert not (tmp_path / "failures").exists()
    for bad in (["--seeds", "5:5"], ["--without", "nonsense"], ["--features", "rows,nonsense"], ["--ptx", "sm_1"]):
        result = command_line(*bad)
        assert result.returncode == 2 and "Traceback" not in result.stderr
