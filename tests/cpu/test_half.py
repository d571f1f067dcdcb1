"""float16 on Numba's CPU target: every value, every cast, arithmetic to the last bit, numba-cuda's result types."""

import math
import operator
import os
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import types
from numba.core.registry import cpu_target

from common.cpu import half, scalars
from common.cpu.halfmath import FP16

jit = numba.njit(error_model="numpy", fastmath={"contract"}, nogil=True)
f16, f32 = np.float16, np.float32
ALL = np.arange(65536, dtype=np.uint16).view(f16)
HAS_F16C = "+f16c" in cpu_target.target_context.codegen().magic_tuple()[2]
ROOT = Path(__file__).resolve().parents[2]

# numba-cuda 0.30's result types of float16 with each of these
OTHERS = (types.int8, types.uint8, types.int16, types.uint16, types.int32, types.uint32, types.int64, types.uint64,
          types.boolean, types.float16, types.float32, types.float64)
H, F, D = types.float16, types.float32, types.float64
ARITHMETIC = (H, F, F, D, D, D, D, D, H, H, F, D)  # + - * /
MODULO = (F, F, F, D, D, D, D, D, F, F, F, D)  # // %


@jit
def convert(x, out):
    for i in range(x.size):
        out[i] = x[i]


def converted(x, dtype):
    out = np.empty(x.shape, dtype)
    convert(x, out)
    return out


def random_halves(n, seed):
    return np.random.default_rng(seed).integers(0, 65536, n).astype(np.uint16).view(f16)


def result_type(function, *args):
    context = cpu_target.typing_context
    context.refresh()
    return context.resolve_function_type(context.resolve_value_type(function), args, {}).return_type


# --- casts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_half_widens_exactly(dtype):
    np.testing.assert_array_equal(converted(ALL, dtype), ALL.astype(dtype))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_every_half_to_an_integer_rounds_to_nearest_and_saturates(dtype):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    with np.errstate(invalid="ignore"):
        rounded = np.rint(ALL.astype(np.float64))
    nan = 2**63 % 2**64 if np.dtype(dtype).itemsize == 8 else 0
    expected = [nan if math.isnan(r) else low if r <= low else high if r >= high else int(r) for r in rounded]
    expected = np.array([v % 2**64 for v in expected], np.uint64).astype(dtype)
    np.testing.assert_array_equal(converted(ALL, dtype), expected)


def test_every_half_to_bool_and_as_a_condition():
    @jit
    def condition(x, out):
        for i in range(x.size):
            out[i] = 1 if x[i] else 0

    np.testing.assert_array_equal(converted(ALL, np.bool_), ALL != 0)
    out = np.empty(ALL.size, np.int8)
    condition(ALL, out)
    np.testing.assert_array_equal(out, ALL != 0)


def test_float32_to_half_rounds_like_numpy():
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 2**32, 300_000, dtype=np.uint64).astype(np.uint32)
    bits[:150_000] = rng.integers(0x33000000 - 0x800000, 0x47900000, 150_000)  # where float16 lives
    edges = np.array([65519.996, 65520, 65535, 2**-24, 2**-25, 3 * 2**-26, np.inf, -0.0], f32)
    x = np.concatenate([bits.view(f32), edges])
    got = converted(x, f16)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, x.astype(f16))
    assert got[-1] == 0 and np.signbit(got[-1])


def test_float64_to_half_rounds_once():
    grid = np.sort(ALL[np.isfinite(ALL)].astype(np.float64))
    middle = (grid[1:] + grid[:-1]) / 2  # ties; one step beside them, float32 sees a tie where there is none
    x = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf),
                        [65520.0, np.nextafter(65520.0, 0), 1e300, -1e300, 1e-300, np.inf, -np.inf, np.nan, 2.0**-25]])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(converted(x, f16), x.astype(f16))
        assert (converted(x, f16) != x.astype(f32).astype(f16)).sum() > 1000  # the test can tell


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"])
def test_integers_to_half(dtype):
    rng = np.random.default_rng(6)
    x = np.concatenate([np.arange(-70_000, 70_000), rng.integers(-(2**62), 2**62, 1000), [2**24 + 1, 2**63 - 1]])
    x = x.astype(dtype)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(converted(x, f16), x.astype(np.float64).astype(f16))


# --- operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_arithmetic_is_exact_to_the_last_bit(op):
    @jit
    def apply(a, b, out):
        for i in range(a.size):
            out[i] = op(a[i], b[i])

    a, b = random_halves(400_000, 7), random_halves(400_000, 8)
    out = np.empty_like(a)
    apply(a, b, out)
    with np.errstate(all="ignore"):
        expected = op(a, b)
    np.testing.assert_array_equal(out, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(out[numbers]), np.signbit(expected[numbers]))


def test_sign_operators_comparisons_and_minmax():
    low, high = scalars.BUILTIN["min"], scalars.BUILTIN["max"]

    @jit
    def compare(a, b, out):
        for i in range(a.size):
            x, y = a[i], b[i]
            out[0, i], out[1, i], out[2, i] = x < y, x <= y, x > y
            out[3, i], out[4, i], out[5, i] = x >= y, x == y, x != y

    @jit
    def signs(a, b, out):
        for i in range(a.size):
            out[0, i], out[1, i], out[2, i] = -a[i], abs(a[i]), +a[i]
            out[3, i], out[4, i] = low(a[i], b[i]), high(a[i], b[i])

    a, b = random_halves(50_001, 9), random_halves(50_001, 10)
    b[::5] = a[::5]
    got = np.empty((6, a.size), np.bool_)
    compare(a, b, got)
    for row, op in enumerate((operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne)):
        np.testing.assert_array_equal(got[row], op(a, b))
    got = np.empty((5, a.size), f16)
    signs(a, b, got)
    np.testing.assert_array_equal(got[0].view(np.uint16), a.view(np.uint16) ^ 0x8000)
    np.testing.assert_array_equal(got[1].view(np.uint16), a.view(np.uint16) & 0x7FFF)
    np.testing.assert_array_equal(got[2].view(np.uint16), a.view(np.uint16))
    np.testing.assert_array_equal(got[3], np.where(b < a, b, a))  # numba-cuda: Python's rule for float16
    np.testing.assert_array_equal(got[4], np.where(b > a, b, a))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv", "iadd", "isub", "imul", "itruediv"])
def test_result_types_of_arithmetic_are_those_of_numba_cuda(name):
    op = getattr(operator, name)
    assert tuple(result_type(op, H, t) for t in OTHERS) == ARITHMETIC
    assert tuple(result_type(op, t, H) for t in OTHERS) == ARITHMETIC


def test_result_types_of_the_other_operators_are_those_of_numba_cuda():
    for op in (operator.floordiv, operator.mod):
        assert tuple(result_type(op, H, t) for t in OTHERS) == MODULO
        assert tuple(result_type(op, t, H) for t in OTHERS) == MODULO
    assert tuple(result_type(operator.pow, H, t) for t in OTHERS) == (F,) * 11 + (D,)
    assert {result_type(operator.lt, H, t) for t in OTHERS} == {types.boolean}
    for function in (abs, operator.neg, operator.pos, float):
        assert result_type(function, H) == H
    assert result_type(int, H) == types.int64
    assert result_type(operator.mul, H, types.literal(2)) == result_type(operator.mul, H, D) == D


def test_mixed_arithmetic_and_python_operators():
    @jit
    def mixed(h, f, d, i):
        return h + f, h * d, h - i, h // f, h % f, h**2, f / h, np.float32(h) * f, h + h * h

    h, f, d, i = f16(2.75), f32(1.5), 0.1, np.int32(3)
    expected = (h + f, float(h) * d, float(h) - 3, f32(1), f32(1.25), f32(2.75**2), f / f32(h), f32(2.75) * f,
                h + h * h)
    assert mixed(h, f, d, i) == tuple(map(float, expected))


def test_division_by_zero_follows_the_error_model():
    def divide(a, b):
        return a / b

    assert jit(divide)(f16(1), f16(0)) == np.inf
    with pytest.raises(ZeroDivisionError):
        numba.njit(divide)(f16(1), f16(0))


# --- values, arrays, constants --------------------------------------------------------------------------------------

THIRD = f16(1 / 3)


def test_constructor_constants_float_and_int():
    @jit
    def make(x, n):
        return np.float16(x), np.float16(n), float(np.float16(x)), int(np.float16(x)), THIRD, np.float16(0.1)

    got = make(2049.0, -7)
    assert got == (2048.0, -7.0, 2048.0, 2048, float(THIRD), float(f16(0.1)))
    kinds = [str(t) for t in make.nopython_signatures[0].return_type]
    assert kinds == ["float16", "float16", "float16", "int64", "float16", "float16"]
    assert jit(lambda: int(np.float16(2.5)) + int(np.float16(3.5)))() == 2 + 4  # to nearest, ties to even


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (2, 3, 2, 3)])
def test_arrays_of_one_to_four_dimensions(shape):
    ndim = len(shape)
    index, last = (1,) * ndim, (-1,) * ndim

    @jit
    def move(a, b):
        b[index] = a[last] + a[index]
        b[last] = np.float32(1.1)

    a = random_halves(int(np.prod(shape)), 11).reshape(shape)
    a[np.isnan(a)] = 1
    for source in (a, np.asfortranarray(a), a[::-1]):
        b = np.zeros(shape, f16)
        move(source, b)
        assert b[last] == f16(1.1)
        with np.errstate(over="ignore", invalid="ignore"):
            np.testing.assert_array_equal(b[index], source[last] + source[index])


def test_float16_as_the_dtype_of_an_allocation():
    @jit
    def allocate(n):
        a, b, c = np.zeros(n, np.float16), np.empty((n, 2), np.float16), np.ones(n, np.float16)
        a[1] = np.float16(2.5)
        a[1] += c[0]
        c[2] = 3
        c[0] = True
        b[:, :] = a[1]
        return a, b, c

    a, b, c = allocate(3)
    assert a.dtype == b.dtype == c.dtype == f16
    assert a.tolist() == [0, 3.5, 0] and (b == 3.5).all() and c.tolist() == [1, 1, 3]


def test_half_view_shares_memory():
    view = half.half_view

    @jit
    def double(bits):
        x = view(bits)
        for i in range(x.shape[0]):
            for j in range(x.shape[1]):
                x[i, j] = x[i, j] + x[i, j]
        return x

    x = np.arange(35, dtype=f16).reshape(5, 7)
    got = double(x.view(np.uint16)[::2, ::-1])
    assert got.dtype == f16 and np.shares_memory(got, x)
    expected = np.arange(35.0).reshape(5, 7)
    expected[::2] *= 2
    np.testing.assert_array_equal(x, expected)
    np.testing.assert_array_equal(got, expected[::2, ::-1])
    with pytest.raises(numba.TypingError, match="needs a uint16 array.*pass x.view"):
        double(np.zeros((1, 1), np.int16))


def test_loops_over_half_arrays_vectorise():
    @jit
    def scale(x, out):
        for i in range(x.size):
            out[i] = np.float32(x[i]) * np.float32(2)

    out = np.empty(1025, f32)
    scale(random_halves(1025, 12), out)
    assert "x half>" in next(iter(scale.inspect_llvm().values()))
    if HAS_F16C:
        assembly = next(iter(scale.inspect_asm().values()))
        wide = [line for line in assembly.splitlines() if "vcvtph2ps" in line and ("%ymm" in line or "%zmm" in line)]
        assert wide, "no packed vcvtph2ps"


# --- cuda.fp16 and math ---------------------------------------------------------------------------------------------


def apply_all(names, *arrays):
    """{name: out} of each FP16 function, elementwise over float16 arrays."""
    args = ", ".join("xyz"[: len(arrays)])
    items = ", ".join(f"{a}[i]" for a in "xyz"[: len(arrays)])
    body = "".join(f"        {n}_[i] = {n}({items})\n" for n in names)
    source = f"def run({args}, {', '.join(n + '_' for n in names)}):\n    for i in range(x.size):\n{body}"
    scope = {n: FP16[n] for n in names}
    exec(source, scope)
    outs = [np.empty(arrays[0].size, f16) for _ in names]
    jit(scope["run"])(*arrays, *outs)
    return dict(zip(names, outs))


def test_elementary_functions_over_every_half():
    exact = {"hexp": np.exp, "hexp2": np.exp2, "hexp10": lambda x: 10.0**x, "hlog": np.log, "hlog2": np.log2,
             "hlog10": np.log10, "hsin": np.sin, "hcos": np.cos, "htanh": np.tanh, "hsqrt": np.sqrt,
             "hrsqrt": lambda x: 1 / np.sqrt(x), "hrcp": lambda x: 1 / x, "hceil": np.ceil, "hfloor": np.floor,
             "htrunc": np.trunc, "hrint": np.rint}
    with np.errstate(all="ignore"):
        for name, got in apply_all(list(exact), ALL).items():
            expected = exact[name](ALL.astype(np.float64)).astype(f16)
            np.testing.assert_array_equal(np.isnan(got), np.isnan(expected), err_msg=name)
            steps = np.abs(got.view(np.int16).astype(np.int32) - expected.view(np.int16))[~np.isnan(expected)]
            assert steps.max() <= 1, name  # one unit in the last place
            assert (steps > 0).mean() < 0.002, name  # and hardly ever


def test_arithmetic_functions():
    a, b = random_halves(200_000, 13), random_halves(200_000, 14)
    with np.errstate(all="ignore"):
        got = apply_all(["hadd", "hsub", "hmul", "hdiv", "hmax", "hmin", "__hmax_nan", "__hmin_nan", "__hadd_sat"],
                        a, b)
        for name, op in (("hadd", np.add), ("hsub", np.subtract), ("hmul", np.multiply), ("hdiv", np.divide),
                         ("hmax", np.fmax), ("hmin", np.fmin), ("__hmax_nan", np.maximum), ("__hmin_nan", np.minimum)):
            np.testing.assert_array_equal(got[name], op(a, b), err_msg=name)
        np.testing.assert_array_equal(got["__hadd_sat"], np.nan_to_num(np.clip(a + b, 0, 1), nan=0))
    got = apply_all(["hneg", "habs"], ALL)
    np.testing.assert_array_equal(got["hneg"].view(np.uint16), ALL.view(np.uint16) ^ 0x8000)
    np.testing.assert_array_equal(got["habs"].view(np.uint16), ALL.view(np.uint16) & 0x7FFF)


def test_hfma_rounds_once():
    a, b, c = (random_halves(30_000, seed) for seed in (15, 16, 17))
    # a product that is a tie of two float16, moved off it by a little that float32 would lose
    a[:2], b[:2], c[:2] = f16(1025 / 1024), f16(1.5), (f16(2.0**-24), f16(-(2.0**-24)))
    with np.errstate(all="ignore"):
        got = apply_all(["hfma", "__hfma_relu"], a, b, c)
        in_float64 = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(got["hfma"]), np.isnan(in_float64))
    np.testing.assert_array_equal(got["__hfma_relu"], np.where(got["hfma"] < 0, f16(0), got["hfma"]))
    checked = 0
    for x, y, z, h in zip(a, b, c, got["hfma"]):
        if not np.isfinite([x, y, z]).all() or abs(h) > 60000:
            continue
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(h)) - exact)
        for neighbour in (np.nextafter(h, f16(np.inf)), np.nextafter(h, f16(-np.inf))):
            other = abs(Fraction(float(neighbour)) - exact)
            even = h.view(np.uint16) % 2 == 0
            assert error < other or (error == other and even), (x, y, z, h)
        checked += 1
    assert checked > 10_000


def test_predicates_and_conversions():
    names = ("heq", "hne", "hlt", "hle", "hgt", "hge", "__hequ", "__hltu", "__hneu")
    heq, hne, hlt, hle, hgt, hge, hequ, hltu, hneu = (FP16[n] for n in names)
    nan, inf = FP16["__hisnan"], FP16["__hisinf"]

    @jit
    def compare(a, b):
        return (heq(a, b), hne(a, b), hlt(a, b), hle(a, b), hgt(a, b), hge(a, b), hequ(a, b), hltu(a, b), hneu(a, b),
                nan(a), inf(a))

    assert compare(f16(1), f16(2)) == (False, True, True, True, False, False, False, True, True, False, 0)
    assert compare(f16(np.nan), f16(2)) == (False,) * 6 + (True,) * 4 + (0,)
    assert compare(f16(-np.inf), f16(-np.inf))[-1] == -1 and compare(f16(np.inf), f16(0))[-1] == 1
    rz, rd, ru, rn = (FP16[f"__half2int_{mode}"] for mode in ("rz", "rd", "ru", "rn"))
    char = FP16["__half2char_rz"]
    to_bits, from_bits, from_int = FP16["__half_as_ushort"], FP16["__ushort_as_half"], FP16["__int2half_rn"]

    @jit
    def conversions(x):
        return rz(x), rd(x), ru(x), rn(x), char(x), to_bits(x), from_bits(np.uint16(0x3C00)), from_int(2049)

    assert conversions(f16(-2.5)) == (-2, -3, -2, -2, -2, 0xC100, 1.0, 2048.0)
    assert conversions(f16(300.75))[:5] == (300, 300, 301, 301, 127)


def test_math_of_a_half_is_a_half():
    exp, log, sqrt, floor, tanh = (scalars.MATH[n] for n in ("exp", "log", "sqrt", "floor", "tanh"))

    @jit
    def call(x):
        return exp(x), log(x), sqrt(x), floor(x), tanh(x)

    got = call(f16(2.5))
    kinds = [str(t) for t in call.nopython_signatures[0].return_type]
    assert kinds == ["float16"] * 4 + ["float32"]  # numba-cuda promotes tanh
    assert got[:4] == tuple(float(f16(v)) for v in (math.exp(2.5), math.log(2.5), math.sqrt(2.5), 2))


# --- registration ---------------------------------------------------------------------------------------------------


def test_ordinary_numba_is_typed_as_before():
    """Every operator on every pair of other types has the same result type before and after the import."""
    code = textwrap.dedent("""
        import importlib, operator
        from numba import types
        from numba.core.registry import cpu_target
        context = cpu_target.typing_context
        others = [types.int8, types.uint8, types.int16, types.int32, types.uint64, types.boolean, types.float32,
                  types.float64, types.complex64, types.literal(2)]
        names = "add sub mul truediv floordiv eq ne lt iadd imul itruediv".split()

        def kind(function, *args):
            try:
                return str(context.resolve_function_type(context.resolve_value_type(function), args, {}).return_type)
            except Exception as error:
                return type(error).__name__

        def table():
            context.refresh()
            rows = [kind(getattr(operator, n), a, b) for n in names for a in others for b in others]
            return rows + [kind(f, a) for f in (abs, operator.neg, operator.pos, float, int, bool) for a in others]

        before = table()
        from common.cpu import half
        after = table()
        importlib.reload(half)
        assert before == after and len(before) > 1000, "types changed"
        import numba, numpy as np
        assert numba.njit(lambda x, y: x + y)(np.float32(1), 2.5) == 3.5
        assert numba.njit(lambda x: -x)(np.float16(1.5)) == -1.5
        print("same")
    """)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "same", done.stderr


def test_nothing_of_it_reaches_numbas_shared_registry():
    """numba-cuda takes over what others than Numba have registered there, and would emit it on a GPU."""
    from numba.core.imputils import builtin_registry

    registered = [entry[0] for kind in ("functions", "getattrs", "casts") for entry in getattr(builtin_registry, kind)]
    assert len(registered) > 100
    assert not [code for code in registered if code.__module__.startswith("common.")]



@pytest.mark.skipif(not HAS_F16C, reason="no F16C that could be left out")
def test_a_processor_without_half_instructions_gets_the_same_values():
    code = textwrap.dedent("""
        import numba, numpy as np
        from common.cpu import half

        @numba.njit(error_model="numpy")
        def convert(x, out):
            for i in range(x.size):
                out[i] = x[i]

        everything = np.arange(65536, dtype=np.uint16).view(np.float16)
        wide = np.empty(65536, np.float32)
        convert(everything, wide)
        np.testing.assert_array_equal(wide, everything.astype(np.float32))
        assert "vcvtph2ps" not in "".join(convert.inspect_asm().values())
        grid = np.sort(wide[np.isfinite(wide)])
        middle = ((grid[1:].astype(np.float64) + grid[:-1]) / 2)
        for x in (middle.astype(np.float32), np.nextafter(middle.astype(np.float32), np.float32(np.inf)), middle,
                  np.array([np.inf, -np.inf, np.nan, 65519.996, 65520, 1e30, 1e-30, -0.0], np.float32)):
            narrow = np.empty(x.size, np.float16)
            convert(x, narrow)
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(narrow, x.astype(np.float16))
        print("same")
    """)
    env = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "same", done.stderr


def test_the_model_refuses_floats_it_does_not_know():
    with pytest.raises(NotImplementedError):
        half.FloatModel(cpu_target.target_context.data_model_manager, types.Float("float80"))
