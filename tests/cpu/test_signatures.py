"""Explicit signatures, and the arguments of a launch: values and errors are those read off a GPU."""

import numpy as np
import pytest
from numba import cuda, types

import common


def run(kernel, *args, out=None, config=(1, 4)):
    """The first element of what a kernel leaves in its first argument, 8 float64 unless ``out`` is given."""
    out = cuda.to_device(np.zeros(8) if out is None else out)
    kernel[config](out, *args)
    return out.copy_to_host().tolist()


def store(out, v):
    out[0] = v


def half(out, v):
    out[0] = v / 2


@pytest.mark.parametrize("signature", [
    "void(float64[:], float32)", types.void(types.float64[:], types.float32), (types.float64[:], types.float32),
    ["void(float64[:], float32)"], [(types.float64[:], types.float32)], "(float64[:], float32)",
], ids=str)  # fmt: skip
def test_all_ways_to_write_a_signature(signature):
    assert run(cuda.jit(signature)(store), 0.1)[0] == np.float32(0.1)


@pytest.mark.parametrize("kind, given, expected", [
    ("float32", 3, 3.0), ("float32", np.float64(0.1), np.float32(0.1)), ("float32", True, 1.0),
    ("float16", 0.1, np.float16(0.1)), ("float64", np.float32(0.5), 0.5),
    ("int32", 2**31, -(2**31)), ("int32", -(2**31) - 1, 2**31 - 1), ("int32", 2**40 + 5, 5), ("int32", np.int64(7), 7),
    ("int32", True, 1), ("int32", np.uint64(2**63), 0), ("uint8", -1, 255), ("int8", 200, -56), ("uint64", -1, 2.0**64),
    ("boolean", 2, 1.0), ("boolean", 0, 0.0), ("boolean", np.True_, 1.0),
])  # fmt: skip
def test_scalars_are_converted_at_the_launch(kind, given, expected):
    assert run(cuda.jit(f"void(float64[:], {kind})")(store), given)[0] == expected


@pytest.mark.parametrize("kind, given", [
    ("int32", 1.5), ("int32", np.float32(2)), ("int32", None), ("float32", "1"), ("float32", 1j), ("int64", 2.0),
])  # fmt: skip
def test_what_ctypes_does_not_convert_is_a_type_error(kind, given):
    kernel = cuda.jit(f"void(float64[:], {kind})")(store)
    with pytest.raises(TypeError):
        run(kernel, given)


def test_a_narrow_scalar_stays_narrow():
    @cuda.jit("void(int64[:], uint32)")
    def inverted(out, v):
        out[0] = ~v

    assert run(inverted, 0, out=np.zeros(1, np.int64)) == [4294967295]

    @cuda.jit("void(int64[:], int32)")
    def zeros(out, v):
        out[0] = cuda.clz(v)

    assert run(zeros, 0x00100000, out=np.zeros(1, np.int64)) == [11]


def count(out):
    i = cuda.threadIdx.x
    out[i] = i + 1


def first(out):
    if cuda.threadIdx.x == 0:
        out[0] = 1.5


@pytest.mark.parametrize("kernel, kind, out, expected", [
    (count, "int32[:]", np.full(4, -1, np.int64), [-(2**32) + 1 + i for i in range(4)]),
    (count, "int32[::1]", np.full(4, -1, np.int64), [2 * 2**32 + 1, 4 * 2**32 + 3, -1, -1]),
    (first, "float32[:]", np.zeros(4, np.int32), [0x3FC00000, 0, 0, 0]),
    (count, "int64[:]", np.full(4, -1, np.int64), [1, 2, 3, 4]),
    (count, "int64[::1]", np.full(4, -1, np.int64), [1, 2, 3, 4]),
])  # fmt: skip
def test_an_array_of_another_type_is_read_as_the_signature_says(kernel, kind, out, expected):
    assert run(cuda.jit(f"void({kind})")(kernel), out=out) == expected


LIST = ["void(float64[:], int32)", "void(float64[:], float32)"]


def test_of_several_signatures_the_one_that_fits_is_taken():
    kernel = cuda.jit(LIST)(half)
    assert run(kernel, np.int32(4))[0] == 2.0
    assert run(kernel, np.int8(3))[0] == 1.5
    assert run(kernel, np.float32(0.1))[0] == float(np.float32(0.1)) / 2


@pytest.mark.parametrize("given", [3, 1.5, np.float64(0.1), True, np.uint32(5), 1j], ids=repr)
def test_none_or_several_that_fit_equally_well_are_a_type_error(given):
    with pytest.raises(TypeError):
        run(cuda.jit(LIST)(half), given)
    with pytest.raises(TypeError):
        run(cuda.jit(LIST)(half), np.int32(1), out=np.zeros(8, np.float32))


@pytest.mark.parametrize("signature, words", [
    ("int32(float64[:], float32)", "void"), ("void(float64[:])", "1 argument"),
    ("(float64[:], float32, int32)", "3 argument"),
])  # fmt: skip
def test_a_signature_that_cannot_be_is_refused_at_the_decorator(signature, words):
    with pytest.raises(TypeError, match=words):
        cuda.jit(signature)(store)


def names_nothing(out):
    out[0] = not_there  # noqa: F821


def stores_text(out):
    out[0] = "a"


def shape_of_an_argument(out):
    tile = cuda.shared.array(out.size, np.float32)
    out[0] = tile[0]


@pytest.mark.parametrize("function", [names_nothing, stores_text, shape_of_an_argument])
def test_errors_come_at_the_decorator(function):
    with pytest.raises(Exception) as caught:
        cuda.jit("void(float64[:])")(function)
    assert type(caught.value).__name__ in ("CompileError", "KernelTypeError", "TypingError")


def test_globals_are_frozen_at_the_decorator(monkeypatch):
    monkeypatch.setitem(globals(), "LEVEL", 1)

    @cuda.jit("void(float64[:])")
    def kernel(out):
        out[0] = LEVEL  # noqa: F821

    @cuda.jit("int32(int32)", device=True)
    def helper(x):
        return x + LEVEL  # noqa: F821

    monkeypatch.setitem(globals(), "LEVEL", 9)
    monkeypatch.setitem(globals(), "helper", helper)

    @cuda.jit
    def calls(out):
        out[0] = helper(0)

    assert run(kernel)[0] == 1
    assert run(calls)[0] == 1


# --- device functions -------------------------------------------------------------------------------------------------


def halved(v):
    return v / 2


def same(v):
    return v


def random_step(x):
    return x * 1664525 + 1013904223


@pytest.mark.parametrize("signature, function, given, expected", [
    ("int32(int32)", halved, 7, 3), ("int32(int32)", halved, 7.9, 3), ("int32(int32)", halved, -7, -3),
    ("int8(int32)", same, 300, 44), ("(int32,)", halved, 7.9, 3.5), ("boolean(int32)", same, 256, 1),
    ("float32(float32)", same, 0.1, np.float32(0.1)), ("uint32(uint32)", random_step, 12345, 87628868),
    (["int32(int32)", "float32(float32)"], halved, 7, 3), (["int32(int32)", "float32(float32)"], halved, 7.5, 3),
    (["int32(int32)", "float32(float32)"], halved, np.float32(7.5), 3.75),
])  # fmt: skip
def test_arguments_and_results_of_device_functions_are_cast(signature, function, given, expected):
    inner = cuda.jit(signature, device=True)(function)

    @cuda.jit
    def kernel(out):
        out[0] = inner(given)

    assert run(kernel)[0] == expected


@cuda.jit("uint32(uint32)", device=True)
def step(x):
    return x * 1664525 + 1013904223


@cuda.jit("int32(int32)", device=True)
def sum_of_lanes(x):
    half = x / 2
    return half + cuda.shfl_xor_sync(0xFFFFFFFF, x, 1)


@cuda.jit("int32(int32, int32)", device=True)
def packed(a, b):
    return (a << 8) | b


@cuda.jit("float64(float64[:])", device=True)
def of_an_array(v):
    return v[1] + 1


def test_casts_in_device_functions_of_all_kinds():
    """Called twice; with a shuffle, so that it is compiled into the kernel; with floats for integers; with an array."""

    @cuda.jit
    def kernel(out, x):
        out[0] = step(step(12345))
        out[1] = sum_of_lanes(x + 0.75)
        out[2] = packed(1.0, 2.0)
        out[3] = of_an_array(out)

    out = cuda.to_device(np.zeros(8))
    kernel[1, 32](out, 7)
    assert out.copy_to_host().tolist()[:3] == [71072467, 10, 258]  # int32(7 / 2 + 7)


@cuda.jit("int32(int32)", device=True)
def cut(v):
    return v / 2


@cuda.jit("uint8(int32)", device=True)
def wrapped(v):
    return cut(v) * 3


@cuda.jit("float64(int32)", device=True)
def of_both(x):
    return cut(x) + 0.25 + wrapped(x)


def test_casts_of_device_functions_that_others_call():
    @cuda.jit
    def kernel(out):
        out[0] = of_both(201)

    assert run(kernel)[0] == 100.25 + 300 - 256


@pytest.mark.parametrize("check", ["0", "1"])
def test_casts_are_the_same_in_checked_mode(monkeypatch, check):
    monkeypatch.setenv("MINI_CHECK", check)

    @cuda.jit("int16(int32[:], float32)", device=True)
    def place(table, x):
        return table[0] + x

    @cuda.jit
    def kernel(out, table):
        out[0] = place(table, 0.75)

    out = cuda.to_device(np.zeros(1))
    kernel[1, 1](out, cuda.to_device(np.array([70000], np.int32)))
    assert out.copy_to_host()[0] == 32767  # 70000.75 as an int16: see the test of casts


def recursive(n):
    if n <= 1:
        return 1
    return n * factorial(n - 1)


factorial = cuda.jit("int64(int64)", device=True)(recursive) if common.BACKEND == "cpu" else None


@cuda.jit(device=True)
def sum_to(n):
    if n <= 0:
        return 0
    return n + sum_to(n - 1)


@cuda.jit(device=True)
def is_even(n):
    if n == 0:
        return True
    return is_odd(n - 1)


@cuda.jit(device=True)
def is_odd(n):
    if n == 0:
        return False
    return is_even(n - 1)


def test_recursion_with_the_same_types_runs():
    @cuda.jit
    def kernel(out, x):
        i = cuda.threadIdx.x
        out[i] = sum_to(x[i]) + sum_to(np.int64(4))

    out = cuda.to_device(np.zeros(4))
    kernel[1, 4](out, cuda.to_device(np.arange(4)))
    assert out.copy_to_host().tolist() == [10, 11, 13, 16]


def test_other_recursion_is_refused():
    """numba-cuda 0.30 does not compile it either: an int32 or a literal becomes an int64 at the next step."""

    @cuda.jit
    def of_a_literal(out):
        out[0] = sum_to(5)

    @cuda.jit
    def of_an_int32(out):
        out[0] = sum_to(np.int32(out[1]))

    @cuda.jit
    def mutual(out):
        out[0] = is_even(np.int64(4))

    for kernel in (of_a_literal, of_an_int32, mutual):
        with pytest.raises(Exception, match="calls itself|insert_unresolved_ref"):
            run(kernel)


# --- launches ---------------------------------------------------------------------------------------------------------


@cuda.jit
def one(out):
    out[0] = 1


@pytest.mark.parametrize("config, error", [
    ((512 / 256, 256), TypeError), (("1", 4), TypeError), ((1, 4.0), TypeError), (((1, 1, 1, 1), 4), ValueError),
    ((1, (2, 2, 2, 2)), ValueError), ((0, 4), ValueError), ((1, 0), ValueError), ((-1, 4), ValueError),
    ((None, 4), ValueError), ((1, 4, "abc"), TypeError), ((1, 4, 1.5), TypeError), ((1, 1025), Exception),
    ((1, 4, 0, -1), Exception), ((2**31, 1), Exception), (((1, 65536), 1), Exception),
], ids=str)  # fmt: skip
def test_a_launch_that_a_gpu_refuses(config, error):
    with pytest.raises(error):
        run(one, config=config)


def test_forall():
    def count(n, **options):
        out = cuda.to_device(np.zeros(4))
        one.forall(n, **options)(out)
        return out.copy_to_host()[0]

    assert count(3) == 1 and count(1, tpb=32) == 1
    assert count(0) == 0  # nothing is launched
    with pytest.raises(ValueError, match="-5"):
        one.forall(-5)
    with pytest.raises(TypeError):
        cuda.jit(one.py_func).forall(2.5)(cuda.to_device(np.zeros(4)))


def test_launch_bounds():
    for bounds in (32, (32,), (32, 2), (32, 2, 1)):
        kernel = cuda.jit(launch_bounds=bounds)(one.py_func)
        assert run(kernel, config=(1, 32))[0] == 1
        with pytest.raises(Exception, match="32|INVALID_VALUE"):
            run(kernel, config=(1, 64))
    with pytest.raises(ValueError, match="4 launch bounds"):
        run(cuda.jit("void(float64[:])", launch_bounds=(32, 2, 1, 1))(one.py_func))


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize("operation, plain", [("/", np.inf), ("//", None), ("%", None)])
@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8])
def test_divisions_by_zero(tmp_path, operation, plain, dtype, debug):
    """With ``debug=True`` they end the launch with an error; without it, x / 0 is inf and the rest undefined."""
    path = tmp_path / "divides.py"
    path.write_text(f"def divides(out, b):\n    i = cuda.threadIdx.x\n    out[i] = (i + 1) {operation} b[i]\n")
    names = {"cuda": cuda}
    exec(compile(path.read_text(), path, "exec"), names)
    kernel = cuda.jit(debug=debug, opt=not debug)(names["divides"])
    divisors = cuda.to_device(np.array([1, 1, 0, 1], dtype))
    if debug:
        with pytest.raises(ZeroDivisionError):
            run(kernel, divisors)
        run(kernel, cuda.to_device(np.ones(4, dtype)))
    else:
        out = run(kernel, divisors)
        assert plain is None or out[2] == plain


def test_wrong_options():
    with pytest.raises(TypeError):
        run(cuda.jit(nonsense=3)(one.py_func))
    with pytest.raises(NotImplementedError):
        cuda.jit(boundscheck=True)(one.py_func)
