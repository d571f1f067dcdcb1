"""The scalar functions of the CPU backend: vectorised float32 math, bit counting, min and max, libdevice."""

import math
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import types
from numba.core.registry import cpu_target

from common.cpu import half, scalars  # noqa: F401 (half: float16)
from common.cpu.libdevice import LIBDEVICE

jit = numba.njit(error_model="numpy", fastmath={"contract"}, nogil=True)
f32 = np.float32
ROOT = Path(__file__).resolve().parents[2]


def loop(function):
    """A compiled loop out[i] = function(x[i])."""

    @jit
    def run(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    return run


def result_type(function, *args):
    """The type that Numba's inference gives the call, or None."""
    context = cpu_target.typing_context
    context.refresh()
    try:
        return context.resolve_function_type(context.resolve_value_type(function), args, {}).return_type
    except (numba.TypingError, AttributeError):
        return None


# --- vectorised float32 ---------------------------------------------------------------------------------------------

# name: (largest error in units in the last place, where the function is most interesting)
VECTOR = {
    "exp": (1.5, (-105, 90)), "exp2": (1.5, (-152, 130)), "log": (1.5, (0, 4)), "log2": (2.5, (0, 4)),
    "log10": (2.5, (0, 4)), "tanh": (1.5, (-10, 10)), "erf": (2.0, (-5, 5)), "sin": (1.7, (-50, 50)),
    "cos": (1.7, (-50, 50)),
}
NUMPY = {name: getattr(np, name, None) or np.vectorize(math.erf) for name in VECTOR}
SPECIALS = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -1, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38,
                     88.72284, 88.7229, -103.97, -104.1, -87.4, 0.625, 127.99999, 128, -149, -150.1], f32)


@pytest.mark.parametrize("name", VECTOR)
def test_float32_function_is_accurate_everywhere_and_vectorised(name):
    limit, (low, high) = VECTOR[name]
    bits = np.random.default_rng(1).integers(0, 2**32, 100_001, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate([bits.view(f32), np.linspace(low, high, 100_003, dtype=f32), SPECIALS])
    got = np.empty_like(x)
    run = loop(scalars.MATH[name])
    run(x, got)
    with np.errstate(all="ignore"):
        exact = NUMPY[name](x.astype(np.float64))
        rounded = exact.astype(f32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(rounded))
    np.testing.assert_array_equal(got[np.isinf(rounded)], rounded[np.isinf(rounded)])
    finite = np.isfinite(rounded)
    assert np.isfinite(got[finite]).all()
    unit = np.spacing(np.abs(rounded[finite])).astype(np.float64)
    error = np.abs(got[finite].astype(np.float64) - exact[finite]) / unit
    worst = int(error.argmax())
    assert error[worst] <= limit, f"{name}({x[finite][worst]!r}) is {error[worst]:.2f} units off"
    if name in ("tanh", "erf", "sin"):
        assert np.signbit(got[x.size - SPECIALS.size + 1]), "f(-0.0) must be -0.0"
    code = next(iter(run.inspect_llvm().values()))
    assert "x float>" in code, f"the loop over {name} was not vectorised"


def test_float32_exp_is_several_times_faster_than_the_c_library():
    x = np.linspace(-10, 10, 200_000, dtype=f32)
    out = np.empty_like(x)

    def best(run):
        run(x, out)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            run(x, out)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(loop(math.exp)) > 3 * best(loop(scalars.exp))  # 10 to 20 times on AVX2 and wider


# --- types and values of the math module ----------------------------------------------------------------------------

I8, U8, I16, I32, I64, U64 = types.int8, types.uint8, types.int16, types.int32, types.int64, types.uint64
F16, F32, F64, BOOL = types.float16, types.float32, types.float64, types.boolean
# numba-cuda 0.30's answers for (int8, uint64, bool, float16, float32, float64)
UNARY_TYPES = {
    **{n: (F64, F64, F64, F16, F32, F64) for n in ("ceil", "cos", "exp", "exp2", "fabs", "floor", "log", "log10",
                                                   "log2", "sin", "sqrt", "trunc")},
    **{n: (F64, F64, F64, F32, F32, F64) for n in ("tanh", "erf")},
}


@pytest.mark.parametrize("name", UNARY_TYPES)
def test_result_types_of_math_functions_are_those_of_numba_cuda(name):
    got = tuple(result_type(scalars.MATH[name], t) for t in (I8, U64, BOOL, F16, F32, F64))
    assert got == UNARY_TYPES[name]


@pytest.mark.parametrize("name, args, expected", [
    ("pow", (F32, F32), F32), ("pow", (F32, I32), F32), ("pow", (F32, I64), F64), ("pow", (F64, I32), F64),
    ("pow", (I32, I32), F64), ("pow", (I8, I8), F32), ("fmod", (F32, F32), F32), ("fmod", (I32, I32), F64),
    ("modf", (F32,), types.UniTuple(F32, 2)), ("modf", (I64,), types.UniTuple(F64, 2)), ("ldexp", (F32, I32), F32),
    ("frexp", (F32,), types.Tuple((F32, I32))), ("remainder", (F32, F64), F64), ("nextafter", (F32, F32), F32),
])
def test_result_types_of_functions_of_two_values(name, args, expected):
    assert result_type(scalars.MATH[name], *args) == expected


def test_values_in_float64_and_of_integers_match_python():
    m = scalars.MATH
    exp, log, tanh, erf, sin, cos, sqrt = (m[n] for n in ("exp", "log", "tanh", "erf", "sin", "cos", "sqrt"))
    floor, ceil, trunc, fabs = (m[n] for n in ("floor", "ceil", "trunc", "fabs"))
    fmod, modf, frexp, ldexp, remainder, nextafter, pow_ = (
        m[n] for n in ("fmod", "modf", "frexp", "ldexp", "remainder", "nextafter", "pow"))

    @jit
    def many(x, n):
        return (exp(x), log(x), tanh(x), erf(x), sin(x), cos(x), sqrt(x), floor(-x), ceil(-x), trunc(-x), fabs(-x),
                exp(n), sqrt(n), floor(n), fmod(-x, 0.7), remainder(x, 0.7), nextafter(x, 9.0), pow_(x, 2.5),
                pow_(x, n), ldexp(x, n)) + modf(-x) + frexp(x)

    x, n = 3.6, 3
    expected = [f(x) for f in (math.exp, math.log, math.tanh, math.erf, math.sin, math.cos, math.sqrt)]
    expected += [-4.0, -3.0, -3.0, 3.6, math.exp(3), math.sqrt(3), 3.0, math.fmod(-x, 0.7), math.remainder(x, 0.7),
                 math.nextafter(x, 9.0), x**2.5, x**3, math.ldexp(x, 3), *math.modf(-x), *math.frexp(x)]
    np.testing.assert_allclose(many(x, np.int32(n)), expected, rtol=1e-15)
    got32 = many(f32(x), np.int32(n))
    np.testing.assert_allclose(got32, expected, rtol=1e-5)  # fmod and remainder lose digits of float32(3.6)


def test_every_math_function_of_numba_cuda_has_a_type():
    assert set(scalars.MATH) < scalars.CUDA_MATH and "gcd" not in scalars.CUDA_MATH
    for name in scalars.CUDA_MATH:
        function = scalars.MATH.get(name) or getattr(math, name)
        assert result_type(function, F32) or result_type(function, F32, F32) or result_type(function, F32, I32), name


def test_modf_and_pow_at_the_edges():
    modf, power = scalars.MATH["modf"], scalars.MATH["pow"]

    @jit
    def both(x, n):
        return modf(x), power(x, n)

    for x in (np.inf, -np.inf, -0.0, -2.0):
        (fraction, whole), _ = both(f32(x), np.int32(2))
        assert (fraction, whole) == math.modf(x) and math.copysign(1, fraction) == math.copysign(1, x)
    assert math.isnan(both(f32(np.nan), np.int32(1))[0][0])
    odd = np.int32(2**24 + 1)  # float32 cannot hold this exponent; rounded, it would be even
    assert both(f32(-1), odd)[1] == -1.0


# --- bits, fma, selp ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64", "int8", "uint16"])
def test_popc_and_clz(dtype):
    popc, clz = scalars.CUDA_SCALAR["popc"], scalars.CUDA_SCALAR["clz"]

    @jit
    def both(x, p, c):
        for i in range(x.size):
            p[i], c[i] = popc(x[i]), clz(x[i])

    width = np.dtype(dtype).itemsize * 8
    rng = random.Random(width)
    values = [0, 1, 2**width - 1, 2 ** (width - 1)] + [rng.getrandbits(rng.randint(1, width)) for _ in range(127)]
    x = np.array(values, f"uint{width}").astype(dtype)
    p, c = np.empty(x.size, np.int64), np.empty(x.size, np.int64)
    both(x, p, c)
    np.testing.assert_array_equal(p, [v.bit_count() for v in values])
    np.testing.assert_array_equal(c, [width - v.bit_length() for v in values])
    ty = numba.from_dtype(x.dtype)
    assert result_type(popc, ty) == result_type(clz, ty) == ty


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_ffs_and_brev(dtype):
    ffs, brev = scalars.CUDA_SCALAR["ffs"], scalars.CUDA_SCALAR["brev"]

    @jit
    def both(x, f, b):
        for i in range(x.size):
            f[i], b[i] = ffs(x[i]), brev(x[i])

    width = np.dtype(dtype).itemsize * 8
    rng = random.Random(width)
    values = [0, 1, 2**width - 1, 2 ** (width - 1)] + [rng.getrandbits(width) << rng.randint(0, 31) & (2**width - 1)
                                                       for _ in range(127)]
    x = np.array(values, f"uint{width}").astype(dtype)
    f, b = np.empty(x.size, np.int64), np.empty(x.size, np.uint64)
    both(x, f, b)
    np.testing.assert_array_equal(f, [(v & -v).bit_length() for v in values])
    # numba-cuda has brev for uint32 and uint64; it takes an int64 for the former and reverses its low half
    used = 64 if dtype == "uint64" else 32
    np.testing.assert_array_equal(b, np.array([int(f"{v % 2**used:0{used}b}"[::-1], 2) for v in values], np.uint64))
    assert result_type(ffs, numba.typeof(x[0])) == types.uint32
    assert result_type(brev, numba.typeof(x[0])) == (types.uint64 if used == 64 else types.uint32)


def test_ffs_of_a_short_integer_is_refused():
    ffs = scalars.CUDA_SCALAR["ffs"]

    @jit
    def call(x):
        return ffs(x)

    assert call(np.int32(12)) == 3
    with pytest.raises(numba.TypingError, match=r"ffs\(int8\) is not supported.*int32"):
        call(np.int8(12))


def test_fma_rounds_once():
    fma = scalars.CUDA_SCALAR["fma"]

    @jit
    def call(x, y, z):
        return fma(x, y, z)

    e = f32(2.0**-12)
    assert call(f32(1) + e, f32(1) + e, -(f32(1) + 2 * e)) == f32(2.0**-24)  # a separate multiplication would give 0
    d = 2.0**-27
    assert call(1 + d, 1 + d, -(1 + 2 * d)) == 2.0**-54
    assert result_type(fma, F32, F32, F32) == F32 and result_type(fma, F32, F64, F32) == F64


def test_selp_cbrt_and_nanosleep():
    selp, cbrt, nanosleep = (scalars.CUDA_SCALAR[n] for n in ("selp", "cbrt", "nanosleep"))

    @jit
    def call(x, a, b):
        nanosleep(np.uint32(100))
        return selp(x < 2.0, a, b), cbrt(x)

    assert call(1.0, 3, 4) == (3, 1.0)
    assert call(f32(27), f32(3), f32(4)) == (4.0, 3.0)
    assert result_type(selp, BOOL, F32, F32) == F32
    assert result_type(selp, BOOL, F32, F64) is None
    assert result_type(selp, I32, F32, F32) is None
    assert result_type(cbrt, F32) == F32


def test_an_unsupported_type_or_number_of_arguments_is_named_in_the_error():
    @jit
    def call(x):
        return scalars.popc(x)

    with pytest.raises(numba.TypingError, match="popc.*complex128.*not supported.*int32"):
        call(1j)
    exp = scalars.exp
    with pytest.raises(numba.TypingError, match=r"exp\(\) takes 1 argument, not 2"):
        jit(lambda x: exp(x, x))(1.0)


# --- min and max ----------------------------------------------------------------------------------------------------


def test_min_and_max_ignore_a_nan_of_two_floats_and_follow_python_otherwise():
    low, high = scalars.BUILTIN["min"], scalars.BUILTIN["max"]

    @jit
    def two(a, b):
        return low(a, b), high(a, b)

    @jit
    def three(a, b, c):
        return low(a, b, c), high(a, b, c), high((a, b, c))

    nan32, one32 = f32(np.nan), f32(1)
    for a, b in ((nan32, one32), (one32, nan32), (np.nan, one32), (nan32, 1.0), (np.nan, 1.0), (1.0, np.nan)):
        assert two(a, b) == (1.0, 1.0)
    assert two(f32(2), f32(3)) == (2, 3) and two(-np.inf, np.inf) == (-np.inf, np.inf)
    assert two(0, nan32) == (0.0, 0.0)  # integer and float: the nan behind loses
    assert all(math.isnan(v) for v in two(nan32, 0))  # the nan in front stays
    assert two(3, -4) == (-4, 3) and two(np.uint8(200), np.int8(-1)) == (-1, 200)
    assert three(f32(3), f32(1), f32(2)) == (1, 3, 3)
    assert three(one32, nan32, f32(2)) == (1, 2, 2)
    assert all(math.isnan(v) for v in three(nan32, one32, f32(2)))


@pytest.mark.parametrize("a, b, expected", [
    (F32, F32, F32), (F32, F64, F64), (F32, I32, F64), (F32, I16, F32), (I32, I64, I64), (U8, I8, I16), (I64, U64, F64),
    (F16, F16, F16), (F16, I8, F16), (F16, F32, F32), (F16, I32, F64), (BOOL, I32, I32), (BOOL, BOOL, BOOL)])
def test_types_of_min_and_max(a, b, expected):
    assert result_type(scalars.max2, a, b) == result_type(scalars.min2, b, a) == expected
    assert result_type(scalars.max2, a, b, b) == expected


def test_max_vectorises_over_lanes_and_in_a_reduction():
    high = scalars.BUILTIN["max"]

    @jit
    def lanes(a, b, out):
        for i in range(a.size):
            out[i] = high(a[i], b[i])

    @jit
    def reduction(a):
        m = f32(-np.inf)
        for i in range(a.size):
            m = high(m, a[i])
        return m

    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 1025)).astype(f32)
    a[[3, 700]] = np.nan
    out = np.empty_like(a)
    lanes(a, b, out)
    np.testing.assert_array_equal(out, np.fmax(a, b))
    assert reduction(a) == np.nanmax(a)
    for run in (lanes, reduction):
        assert "x float>" in next(iter(run.inspect_llvm().values()))


# --- libdevice ------------------------------------------------------------------------------------------------------


def compile_all(table, signature):
    """One compiled function of `signature` ("x, y") that returns what every function of `table` gives, as a tuple."""
    scope = dict(table)
    exec(f"def run({signature}):\n    return (" + "".join(f"{n}({signature}), " for n in table) + ")\n", scope)
    return jit(scope["run"])


def call_all(table, args, signature):
    """{name: value} of every function of `table`, called with `args`."""
    return dict(zip(table, compile_all(table, signature)(*args), strict=True))


def erfc_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


ONE_FLOAT = {
    "acos": math.acos, "acosh": None, "asin": math.asin, "asinh": math.asinh, "atan": math.atan, "atanh": math.atanh,
    "cbrt": np.cbrt, "ceil": math.ceil, "cos": math.cos, "cosh": math.cosh, "erf": math.erf, "erfc": math.erfc,
    "exp": math.exp, "exp10": lambda x: 10.0**x, "exp2": np.exp2, "expm1": math.expm1, "fabs": abs,
    "floor": math.floor, "lgamma": math.lgamma, "log": math.log, "log10": math.log10, "log1p": math.log1p,
    "log2": math.log2, "nearbyint": round, "normcdf": erfc_cdf, "rcbrt": lambda x: 1 / np.cbrt(x), "rint": round,
    "round": round, "rsqrt": lambda x: x**-0.5, "sin": math.sin,
    "sinh": math.sinh, "sqrt": math.sqrt, "tan": math.tan, "tanh": math.tanh, "tgamma": math.gamma, "trunc": math.trunc,
}
TWO_FLOATS = {"atan2": math.atan2, "copysign": math.copysign, "fdim": lambda x, y: max(x - y, 0.0), "fmax": max,
              "fmin": min, "fmod": math.fmod, "hypot": math.hypot, "nextafter": None, "pow": math.pow,
              "remainder": math.remainder}


@pytest.mark.parametrize("suffix, dtype, rtol", [("", np.float64, 1e-14), ("f", f32, 3e-6)])
def test_libdevice_floating_point(suffix, dtype, rtol):
    names = {n + suffix: f for n, f in ONE_FLOAT.items() if f}
    if suffix:
        names |= {f"fast_{n}f": ONE_FLOAT[n] for n in ("cos", "exp", "log", "log10", "log2", "sin", "tan")}
    x, y = dtype(0.71), dtype(0.25)
    for name, value in call_all({n: LIBDEVICE[n] for n in names}, (x,), "x").items():
        assert value == pytest.approx(names[name](float(x)), rel=rtol), name
    names = {n + suffix: f for n, f in TWO_FLOATS.items() if f}
    for name, value in call_all({n: LIBDEVICE[n] for n in names}, (x, y), "x, y").items():
        assert value == pytest.approx(names[name](float(x), float(y)), rel=rtol), name
    arg = types.float32 if suffix else types.float64
    assert {result_type(LIBDEVICE[n + suffix], arg) for n in ONE_FLOAT} == {arg}


def test_libdevice_special_cases():
    a = LIBDEVICE
    names = ("roundf", "rintf", "saturatef", "isnanf", "isinff", "finitef", "signbitf", "rsqrtf", "float_as_int",
             "float2half_rn", "frcp_rn", "sincosf", "modff", "frexpf")
    run = call_all({n: a[n] for n in names}, (f32(-2.5),), "x")
    assert run["roundf"] == -3 and run["rintf"] == -2 and run["saturatef"] == 0 and run["signbitf"] == 1
    assert (run["isnanf"], run["isinff"], run["finitef"]) == (0, 0, 1) and math.isnan(run["rsqrtf"])
    assert run["float_as_int"] == f32(-2.5).view(np.int32) and run["float2half_rn"] == np.float16(-2.5).view(np.int16)
    assert run["frcp_rn"] == f32(1) / f32(-2.5) and run["modff"] == (-0.5, -2.0) and run["frexpf"] == (-0.625, 2)
    assert run["sincosf"] == pytest.approx((math.sin(-2.5), math.cos(-2.5)), rel=1e-6)
    sat, half2float, powi = a["saturatef"], a["half2float"], a["powif"]
    fmax, add_rn, mul_rn = a["fmaxf"], a["fadd_rn"], a["fmul_rn"]

    @jit
    def call(nan, h, x):
        return sat(nan), sat(f32(3)), half2float(h), powi(x, 3), fmax(nan, x)

    x = f32(1.1)
    assert call(f32(np.nan), np.float16(1.5).view(np.int16), x) == (0.0, 1.0, 1.5, f32(float(x) ** 3), x)
    e = f32(2.0**-12)
    one = jit(lambda y, z: add_rn(mul_rn(y, y), z))
    assert one(f32(1) + e, -(f32(1) + 2 * e)) == 0.0  # the _rn forms are not fused into an fma


@pytest.mark.parametrize("source, dtype", [("float", f32), ("double", np.float64)])
def test_libdevice_conversions_saturate_and_round_as_named(source, dtype):
    rounding = {"rn": np.rint, "rd": np.floor, "ru": np.ceil, "rz": np.trunc}
    names = [f"{source}2{target}_{mode}" for target in ("int", "uint", "ll", "ull") for mode in rounding]
    table = {name: LIBDEVICE[name] for name in names}
    run = compile_all(table, "x")
    for v in (2.5, -2.5, 3.5, 1e30, -1e30, np.nan, -0.7):
        for name, value in zip(table, run(dtype(v)), strict=True):
            target, mode = name[len(source) + 1:].split("_")
            wide, width = target.endswith("ll"), 64 if target.endswith("ll") else 32
            low, high = (0, 2**width - 1) if target.startswith("u") else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
            if math.isnan(v):
                expected = 0 if source == "float" and not wide else 2 ** (width - 1)
            else:
                r = float(rounding[mode](dtype(v)))
                expected = low if r < low else high if r > high else int(r)
            assert value % 2**width == expected % 2**width, (name, v)  # unsigned results travel as signed ones


def test_libdevice_integers():
    a, b = -1234567, 987654321
    names = ("max", "min", "umax", "umin", "mulhi", "umulhi", "hadd", "rhadd", "uhadd")
    got = call_all({n: LIBDEVICE[n] for n in names}, (np.int32(a), np.int32(b)), "x, y")
    ua = a % 2**32
    assert got == {"max": b, "min": a, "umax": a, "umin": b, "mulhi": (a * b) >> 32, "umulhi": (ua * b) >> 32,
                   "hadd": (a + b) >> 1, "rhadd": (a + b + 1) >> 1, "uhadd": ((ua + b) >> 1) - 2**32 * ((ua + b) >> 32)}
    c, d = -(2**60) - 5, 2**61 + 7
    got = call_all({n: LIBDEVICE[n] for n in ("llmax", "llmin", "ullmax", "mul64hi", "umul64hi")}, (c, d), "x, y")
    assert got == {"llmax": d, "llmin": c, "ullmax": c, "mul64hi": (c * d) >> 64, "umul64hi": ((c % 2**64) * d) >> 64}
    got = call_all({n: LIBDEVICE[n] for n in ("popc", "clz", "ffs", "brev", "abs")}, (np.int32(12),), "x")
    assert got == {"popc": 2, "clz": 28, "ffs": 3, "brev": 0x30000000, "abs": 12}
    got = call_all({n: LIBDEVICE[n] for n in ("popcll", "clzll", "ffsll", "brevll", "llabs")}, (12,), "x")
    assert got == {"popcll": 2, "clzll": 60, "ffsll": 3, "brevll": 0x3000000000000000, "llabs": 12}
    assert result_type(LIBDEVICE["clzll"], I64) == I32


# --- on disk --------------------------------------------------------------------------------------------------------


def test_a_cached_function_is_found_again_by_the_next_process(tmp_path):
    (tmp_path / "cached_module.py").write_text(textwrap.dedent("""
        import numba, numpy as np
        from common.cpu import atomics, half, scalars
        exp, high, sin, add = scalars.exp, scalars.BUILTIN["max"], scalars.sin, atomics.ATOMIC["add"]

        @numba.njit(error_model="numpy", fastmath={"contract"}, nogil=True, cache=True)
        def run(x, h, out):
            for i in range(x.size):
                out[i] = high(exp(x[i]), sin(x[i])) + np.float32(h[i])
            return add(out, 0, 1.0)
    """))
    main = textwrap.dedent("""
        import numpy as np, cached_module as m
        x, out = np.zeros(9, np.float32), np.zeros(9, np.float32)
        print(m.run(x, np.ones(9, np.float16), out), out[0], sum(m.run.stats.cache_hits.values()))
    """)
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for hits in (0, 1):
        done = subprocess.run([sys.executable, "-c", main], env=env, capture_output=True, text=True, timeout=120)
        assert done.stdout.split() == ["2.0", "3.0", str(hits)], done.stderr
