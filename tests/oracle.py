"""A per-thread interpreter of Numba-CUDA kernels: the truth that the CPU backend is compared with.

``run(kernel.py_func, grid, block, args)`` executes the kernel's Python source once a thread. Every thread is a Python
generator; a barrier, shuffle or vote is a ``yield``, and a scheduler answers it when the threads it waits for have
arrived. Nothing is compiled, split or vectorised, and no code is shared with ``common/cpu``: being slow, simple and
independent is what makes the answer worth comparing with.

Values follow Numba's typing, not NumPy's: ``int32 + int32`` is an int64, ``float32 + int64`` a float64, ``int / int`` a
float64, integers wrap at 64 bits, and a store casts to the array's dtype. Inside the interpreter an int64 is a Python
``int``, a float64 a ``float`` and a bool a ``bool``; every other type is a NumPy scalar. The rules were read off
Numba-CUDA 0.30.4 (``cuda.compile_ptx`` of one-line device functions); ``tests/test_oracle.py`` holds them against
Numba's own inference.

Explicit signatures decide types as on a GPU: ``run(..., signatures=...)`` converts the arguments of a launch, and a
device function with ``signatures`` has its arguments and its result cast.

What differs from a compiler, by nature: a variable that holds an int on one path and a float on another is not unified
beforehand (the values agree, float32/float64 rounding may not), and a variable may be read before it was assigned only
on the paths where Numba would read garbage: that is an OracleError here.
"""
import ast
import enum
import inspect
import math
import operator
import sys
import textwrap
from fractions import Fraction

import numpy as np

WARP = 32
FULL_MASK = 0xFFFFFFFF


class OracleError(Exception):
    """The kernel did something that has no defined result on a GPU; the message names file, line, thread and block."""


# ---------------------------------------------------------------------------------------------------------------------
# Scalars: Numba's types, represented by int, float, bool and NumPy scalars
# ---------------------------------------------------------------------------------------------------------------------
_CODE = {int: "i8", float: "f8", bool: "b1", np.int8: "i1", np.uint8: "u1", np.int16: "i2", np.uint16: "u2",
         np.int32: "i4", np.uint32: "u4", np.int64: "i8", np.uint64: "u8", np.float16: "f2", np.float32: "f4",
         np.float64: "f8", np.bool_: "b1"}
_NP = {"b1": np.bool_, "i1": np.int8, "u1": np.uint8, "i2": np.int16, "u2": np.uint16, "i4": np.int32,
       "u4": np.uint32, "i8": np.int64, "u8": np.uint64, "f2": np.float16, "f4": np.float32, "f8": np.float64}
_I8_MIN, _I8_MAX = -(1 << 63), (1 << 63) - 1


class _Undefined:
    """What a shuffle returns when its source lane takes no part: harmless until somebody looks at it."""

    def _used(self, *_):
        raise OracleError("the value of a shuffle that read a lane which does not take part is used (undefined)")

    __bool__ = __int__ = __float__ = __index__ = __iter__ = _used


_UNDEFINED = _Undefined()


def _code(value):
    code = _CODE.get(type(value))
    if code is None:
        if value is _UNDEFINED:
            value._used()
        raise OracleError(f"a {type(value).__name__} is used where a number is needed")
    return code


def _wrap(value, code):
    """The integer `value` cut to the width of the integer type `code`, as the machine would."""
    bits = 8 * int(code[1])
    value &= (1 << bits) - 1
    if code[0] == "i" and value >> (bits - 1):
        value -= 1 << bits
    return value if code == "i8" else _NP[code](value)


def _cast(value, code):
    """`value` converted to the type `code`: C truncation from float to int, wraparound from int to int."""
    source = _code(value)
    if source == code:
        return value
    if code[0] in "iu":
        return _wrap(_truncated(float(value), code, source) if source[0] == "f" else int(value), code)
    if code == "b1":
        return bool(value)
    if code == "f8":
        return float(value)
    return _NP[code](int(value) if source[0] in "iub" else value)


_wild = False  # run() sets it: what PTX does where LLVM and C define nothing


def _truncated(number, code, source):
    """The integer that a float becomes: its whole part, if the integer type `code` holds it.

    In wild runs what PTX's cvt.rzi gives otherwise: it saturates at the width of the register, which is 16 bits for
    int8 and int16; a NaN is 0, but the highest bit alone where 64 bits are on either side.
    """
    bits = 8 * int(code[1])
    if _wild:
        bits = max(bits, 16)
        if math.isnan(number):
            return 1 << (bits - 1) if "8" in (code[1], source[1]) else 0
    elif not math.isfinite(number):
        raise OracleError(f"{number} is converted to an integer (undefined)")
    low = -(1 << (bits - 1)) if code[0] == "i" else 0
    whole = _saturated(number, low, low + (1 << bits) - 1)
    if not _wild and whole != int(number):
        raise OracleError(f"{number} does not fit {np.dtype(_NP[code]).name} (undefined conversion)")
    return whole


def _saturated(number, low, high):
    """The whole part of a float that is no NaN, or the end of the range low … high that it lies beyond."""
    if math.isinf(number):
        return low if number < 0 else high
    return min(max(int(number), low), high)


def _canon(value):
    """A scalar, array or tuple from outside in the interpreter's representation."""
    if isinstance(value, enum.IntEnum):
        value = int(value)
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (np.int64, np.longlong)) or type(value) is int:
        value = int(value)
        if _I8_MIN <= value <= _I8_MAX:
            return value
        if 0 <= value < 1 << 64:
            return np.uint64(value)
        raise OracleError(f"the integer {value} does not fit 64 bits")
    if isinstance(value, (float, np.float64)):
        return float(value)
    if isinstance(value, tuple):
        return tuple(_canon(v) for v in value)
    if isinstance(value, np.ndarray):
        return _Arr(value, "const")
    return value


def _arith_type(op, a, b):
    """Numba-CUDA's result type of `a op b` for the type codes a and b."""
    if a[0] in "iub" and b[0] in "iub":
        if op == "/":
            return "f8"
        if op in ("<<", ">>"):
            return "u8" if a[0] == "u" else "i8"
        if op in ("&", "|", "^") and a == b == "b1":
            return "b1"
        return "u8" if a[0] == b[0] == "u" else "i8"
    if op in ("<<", ">>", "&", "|", "^"):
        raise OracleError(f"'{op}' needs integers, not {_NP[a].__name__} and {_NP[b].__name__}")
    if "f8" in (a, b):
        return "f8"
    if op == "**" and a[0] == "f":
        return "f4"
    if a[0] == b[0] == "f":
        return "f2" if a == b == "f2" and op in "+-*/" and op != "//" else "f4"
    small, real = (a, b) if b[0] == "f" else (b, a)
    if real == "f2":
        if op in ("+", "-", "*", "/") and small in ("b1", "i1"):
            return "f2"
        return "f4" if small in ("b1", "i1", "u1", "i2") else "f8"
    return "f4" if small in ("b1", "i1", "u1", "i2") else "f8"


def _unify(a, b):
    """Numba's common type of two values that meet in one place (the arguments of min and max)."""
    if a == b:
        return a
    if "b1" in (a, b):
        raise OracleError("min and max do not take bools")
    if a[0] == "f" or b[0] == "f":
        if a[0] == b[0]:
            return max(a, b)
        small, real = (a, b) if b[0] == "f" else (b, a)
        if real == "f2" and small in ("i1", "u1"):
            return "f2"
        return "f4" if real != "f8" and small[1] in "12" else "f8"
    wide = max(int(a[1]), int(b[1]))
    if a[0] == b[0]:
        return f"{a[0]}{wide}"
    signed, unsigned = (a, b) if a[0] == "i" else (b, a)
    if int(signed[1]) > int(unsigned[1]):
        return signed
    return f"i{2 * int(unsigned[1])}" if unsigned != "u8" else "f8"


def _int_pow(code):
    """Numba-CUDA's power of integers: exact, as seen on a GPU, but for exponents above 65536, which floats take."""
    def apply(a, b):
        if b < 0:
            return {0: _I8_MIN, 1: 1, -1: 1 if b % 2 == 0 else -1}.get(a, 0)
        if b <= 0x10000:
            return _wrap(pow(a, b, 1 << 64), code)
        low = _I8_MIN if code == "i8" else 0
        return _saturated(float(np.power(float(a), float(b))), low, low + (1 << 64) - 1)

    return apply


def _shift(op, a, b):
    if not 0 <= b < 64:
        if not _wild:
            raise OracleError(f"a shift by {b} bits (undefined)")
        b = min(b & 0xFFFFFFFF, 64)  # PTX looks at 32 bits of the amount, and clamps it
    return a << b if op == "<<" else a >> b


_INT_OPS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul,
    "//": lambda a, b: 0 if b == 0 or (a == _I8_MIN and b == -1) else a // b,
    "%": lambda a, b: 0 if b == 0 else a % b,
    "&": operator.and_, "|": operator.or_, "^": operator.xor,
    "<<": lambda a, b: _shift("<<", a, b), ">>": lambda a, b: _shift(">>", a, b),
}
_FLOAT_OPS = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide, "//": np.floor_divide,
              "%": np.remainder, "**": np.power}


def _operation(op, a, b):
    """The function of two values of the type codes a and b that computes `a op b`."""
    result = _arith_type(op, a, b)
    if result[0] == "f":
        function, to = _FLOAT_OPS[op], _NP[result]
        if result == "f8":
            return lambda x, y: float(function(np.float64(x), np.float64(y)))
        if op == "**":
            return lambda x, y: to(function(np.float64(x), np.float64(y)))
        return lambda x, y: function(to(x), to(y))
    function = _int_pow(result) if op == "**" else _INT_OPS[op]
    if result == "b1":
        return lambda x, y: bool(function(x, y))
    if result == "i8" and op not in ("<<", ">>") and "u8" not in (a, b):
        def apply(x, y):
            r = function(int(x), int(y))
            return r if _I8_MIN <= r <= _I8_MAX else _wrap(r, "i8")
        return apply
    if op in ("<<", ">>"):
        return lambda x, y: _wrap(function(int(_cast(x, result)), int(y)), result)
    return lambda x, y: _wrap(function(int(_cast(x, result)), int(_cast(y, result))), result)


def _binary_function(op):
    table = {}      # by the types of the operands
    if op in ("+", "-", "*"):
        table[float, float] = {"+": operator.add, "-": operator.sub, "*": operator.mul}[op]

    def apply(a, b):
        types = type(a), type(b)
        if types not in table:
            table[types] = _operation(op, _code(a), _code(b))
        return table[types](a, b)

    return apply


def _compare_function(compare):
    def apply(a, b):
        if type(a) is type(b) is int:
            return compare(a, b)
        if _code(a)[0] == "f" or _code(b)[0] == "f":
            return compare(float(a), float(b))
        return compare(int(a), int(b))

    return apply


_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**",
           ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>"}
_COMPARE = {ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne"}


def _negative(value):
    code = _code(value)
    if code[0] == "f":
        return -value
    return _widened(_wrap(-int(value), "i8" if code == "b1" else code))


def _widened(value):
    """What an operator with one operand does with its result: computed in the operand's width, then 64 bits wide."""
    return _cast(value, "u8" if _code(value)[0] == "u" else "i8")


def _positive(value):
    code = _code(value)
    return value if code[0] == "f" else _widened(value)


def _invert(value):
    code = _code(value)
    if code == "b1":
        return not value
    if code[0] == "f":
        raise OracleError("'~' needs an integer")
    return _widened(_wrap(~int(value), code))


# ---------------------------------------------------------------------------------------------------------------------
# Builtins and math
# ---------------------------------------------------------------------------------------------------------------------
def _extreme(best, float_best):
    def apply(*values):
        values = values[0] if len(values) == 1 and type(values[0]) is tuple else values
        kind = _code(values[0])
        for v in values[1:]:
            kind = _unify(kind, _code(v))
        result = _cast(values[0], kind)
        for v in values[1:]:  # fmin and fmax: a NaN loses
            v = _cast(v, kind)
            result = float_best(result, v) if kind[0] == "f" else best(result, v)
        return _canon(result)

    return apply


def _abs(value):
    code = _code(value)
    return abs(value) if code[0] == "f" else _wrap(abs(int(value)), "i1" if code == "b1" else code)


def _int(value=0):
    code = _code(value)
    if code[0] == "f" or code == "b1":
        return _cast(value, "i8")
    return value


def _float(value=0.0):
    if isinstance(value, str):
        return float(value)
    return value if _code(value)[0] == "f" else float(value)


def _round(value, digits=None):
    code = _code(value)
    if digits is None:
        return _cast(float(np.rint(np.float64(value))), "i8")
    rounded = round(float(value), int(digits))
    return _cast(rounded, "f4" if _arith_type("+", code, "f4") == "f4" else "f8")


def _range(*args):
    codes = {_code(a) for a in args}
    values = range(*(operator.index(a) for a in args))
    if codes == {"i4"}:
        return map(np.int32, values)
    return map(np.uint64, values) if "u8" in codes and len(codes) == 1 else values


def _quiet(function):
    """A function of `math`, with IEEE results where Python raises."""
    def apply(*xs):
        try:
            return function(*xs)
        except ValueError:
            return math.nan
        except OverflowError:
            return math.inf

    return apply


_UNARY_MATH = {name: getattr(np, np_name) for name, np_name in {
    "sqrt": "sqrt", "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log", "log2": "log2", "log10": "log10",
    "log1p": "log1p", "sin": "sin", "cos": "cos", "tan": "tan", "asin": "arcsin", "acos": "arccos", "atan": "arctan",
    "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh",
    "fabs": "fabs", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "degrees": "degrees", "radians": "radians",
    "cbrt": "cbrt", "rint": "rint"}.items()}
_UNARY_MATH |= {name: _quiet(getattr(math, name)) for name in ("erf", "erfc", "gamma", "lgamma")}
_UNARY_MATH |= {"rsqrt": lambda x: 1 / np.sqrt(x), "exp10": lambda x: np.power(10.0, x)}
_HALF_MATH = {"sqrt", "exp", "exp2", "log", "log2", "log10", "sin", "cos", "fabs", "floor", "ceil", "trunc"}
_BINARY_MATH = {"pow": np.power, "fmod": np.fmod, "copysign": np.copysign, "atan2": np.arctan2, "hypot": np.hypot,
                "remainder": _quiet(math.remainder), "fmin": np.fmin, "fmax": np.fmax}


def _math_unary(name):
    function = _UNARY_MATH[name]

    def apply(x):
        code = _code(x)
        kind = code if code in ("f4", "f8") else "f8" if code != "f2" else "f2" if name in _HALF_MATH else "f4"
        return _cast(float(function(np.float64(x))), kind)

    return apply


def _math_binary(name):
    function = _BINARY_MATH[name]

    def apply(x, y):
        a, b = _code(x), _code(y)
        narrow = ("b1", "i1", "u1", "i2", "f2", "f4")
        kind = "f4" if a in narrow and b in narrow else "f8"
        if name in ("atan2", "hypot") and a[0] != "f" and b[0] != "f":
            kind = "f8"
        if name == "pow" and a in narrow and b == "i4":
            kind = "f4"
        return _cast(float(function(np.float64(x), np.float64(y))), kind)

    return apply


def _modf(x):
    kind = "f4" if _code(x) == "f4" else "f8"
    fraction, whole = np.modf(np.float64(x))
    return _cast(float(fraction), kind), _cast(float(whole), kind)


def _frexp(x):
    mantissa, exponent = math.frexp(float(x))
    return _cast(mantissa, "f4" if _arith_type("+", _code(x), "f4") == "f4" else "f8"), np.int32(exponent)


def _ldexp(x, e):
    kind = "f4" if _arith_type("+", _code(x), "f4") == "f4" else "f8"
    return _cast(_quiet(math.ldexp)(float(x), int(e)), kind)


def _fma(a, b, c):
    kind = "f4" if all(_arith_type("+", _code(v), "f4") == "f4" for v in (a, b, c)) else "f8"
    values = [float(_cast(v, kind)) for v in (a, b, c)]
    if not all(map(math.isfinite, values)):
        return _cast(values[0] * values[1] + values[2], kind)
    exact = Fraction(values[0]) * Fraction(values[1]) + Fraction(values[2])
    if not exact:
        return _cast(values[0] * values[1] + values[2], kind)
    near = _quiet(float)(exact)
    if kind == "f8" or not math.isfinite(near):
        return _cast(near, kind)
    guess = np.float32(near)  # rounding twice may miss by one: take the nearest neighbour of the exact value
    around = (guess, np.nextafter(guess, np.float32(-np.inf)), np.nextafter(guess, np.float32(np.inf)))
    return min((g for g in around if np.isfinite(g)), key=lambda g: abs(Fraction(float(g)) - exact), default=guess)


def _bits_of(value):
    code = _code(value)
    if code[0] == "f":
        value = int(value)  # Numba-CUDA converts to int8
        code = "i1"
    code = "i1" if code == "b1" else code
    bits = 8 * int(code[1])
    return code, bits, int(value) & ((1 << bits) - 1)


def _popc(value):
    code, _, bits = _bits_of(value)
    return _wrap(bits.bit_count(), code)


def _clz(value):
    code, width, bits = _bits_of(value)
    return _wrap(width - bits.bit_length(), code)


def _ffs(value):
    bits = _bits_of(value)[2]
    return np.uint32((bits & -bits).bit_length())


def _brev(value):
    width = 64 if _code(value) == "u8" else 32  # an int64 is cut to uint32, as in Numba-CUDA
    bits = int(value) & ((1 << width) - 1)
    reverse = int(f"{bits:0{width}b}"[::-1], 2)
    return np.uint64(reverse) if width == 64 else np.uint32(reverse)


def _selp(test, a, b):
    if _code(a) != _code(b):
        raise OracleError("cuda.selp needs two values of the same type")
    return a if test else b


_HALF = {"hadd": lambda a, b: a + b, "hsub": lambda a, b: a - b, "hmul": lambda a, b: a * b, "hdiv": lambda a, b: a / b,
         "hneg": lambda a: -a, "habs": abs, "hmax": np.fmax, "hmin": np.fmin,
         "hfma": lambda a, b, c: np.float16(np.float64(a) * np.float64(b) + np.float64(c)),
         "heq": operator.eq, "hne": operator.ne, "hlt": operator.lt, "hle": operator.le, "hgt": operator.gt,
         "hge": operator.ge}


def _half(name):
    return lambda *xs: _canon(_HALF[name](*(_cast(x, "f2") for x in xs)))


def _libdevice(name):
    """A libdevice function by its name: `fast_expf` is exp in float32, `rsqrt` 1/sqrt in float64."""
    base = name.removeprefix("fast_")
    single = base.endswith("f") and base not in _UNARY_MATH | _BINARY_MATH
    base, kind = (base[:-1], "f4") if single else (base, "f8")
    if base == "fma":
        function = _fma
    elif base in _UNARY_MATH:
        function = _math_unary(base)
    elif base in _BINARY_MATH:
        function = _math_binary(base)
    else:
        raise OracleError(f"libdevice.{name} is not known to the oracle")
    return lambda *xs: function(*(_cast(x, kind) for x in xs))


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------
class _Arr:
    """A NumPy array with the indexing rules of Numba-CUDA, plus bounds checks.

    `init` is None, or the set of byte addresses that were written so far (shared and local arrays in checked mode).
    """

    __slots__ = ("a", "code", "dynamic", "get", "init", "n", "nd", "space")

    def __init__(self, a, space, init=None, dynamic=False):
        self.a, self.space, self.init, self.dynamic = a, space, init, dynamic
        try:
            self.code = _CODE[a.dtype.type]
        except KeyError:
            raise OracleError(f"arrays of {a.dtype} are not known to the oracle") from None
        self.nd = a.ndim
        self.n = a.shape[0] if a.ndim else 0
        self.get = a.item if self.code in ("i8", "f8", "b1") else a.__getitem__

    shape = property(lambda self: self.a.shape)
    strides = property(lambda self: self.a.strides)
    size = property(lambda self: self.a.size)
    ndim = property(lambda self: self.a.ndim)
    dtype = property(lambda self: self.a.dtype)
    itemsize = property(lambda self: self.a.itemsize)
    nbytes = property(lambda self: self.a.nbytes)
    T = property(lambda self: self.view(self.a.T))

    def __len__(self):
        return self.n

    def view(self, a):
        return _Arr(a, self.space, self.init, self.dynamic)

    def resolve(self, index):
        """The index with negative parts wrapped, and whether it names one element (else a sub-array)."""
        index = index if type(index) is tuple else (index,)
        if len(index) > self.nd:
            raise OracleError(f"{len(index)} indices for an array of {self.nd} dimensions")
        result, element = [], len(index) == self.nd
        for axis, i in enumerate(index):
            if type(i) is slice:
                element = False
                result.append(slice(*(None if p is None else operator.index(p) for p in (i.start, i.stop, i.step))))
                continue
            if i is Ellipsis:
                raise OracleError("'...' as an index is not known to the oracle")
            code = _code(i)
            if code[0] == "f":
                raise OracleError(f"the index {i} is a float")
            n, i = self.a.shape[axis], int(i)
            if not -n <= i < n:
                raise OracleError(f"index {i} is out of range for axis {axis} of the {self.space} array of shape "
                                  f"{self.a.shape}")
            result.append(i + n if i < 0 else i)
        return tuple(result), element

    def keys(self, index):
        """The byte addresses that stand for the element in the shadow tables."""
        address = self.a.__array_interface__["data"][0] + sum(i * s for i, s in zip(index, self.a.strides))
        return range(address, address + self.a.itemsize) if self.dynamic else (address,)


def _load(x, index):
    if type(index) is int and type(x) is _Arr and x.nd == 1 and 0 <= index < x.n:
        return x.get(index)
    if type(x) is tuple:
        return x[index]
    if type(x) is not _Arr:
        raise OracleError(f"a {type(x).__name__} is indexed")
    index, element = x.resolve(index)
    if element:
        return x.a.item(*index) if x.code in ("i8", "f8", "b1") else x.a[index]
    return x.view(x.a[index])


def _store(value, x, index):
    if type(x) is not _Arr:
        raise OracleError(f"an element of a {type(x).__name__} is assigned")
    if x.space == "const":
        raise OracleError("a constant array is written")
    if type(index) is int and x.nd == 1 and 0 <= index < x.n:
        x.a[index] = _cast(value, x.code)
        return
    index, element = x.resolve(index)
    if element:
        x.a[index] = _cast(value, x.code)
    else:
        _store_slice(value, x.view(x.a[index]), _store)


def _store_slice(value, target, store):
    if type(value) is _Arr:
        if value.a.shape != target.a.shape:
            raise OracleError(f"an array of shape {value.a.shape} is assigned to a slice of shape {target.a.shape}")
        for i in np.ndindex(target.a.shape):
            store(_load(value, i), target, i)
    elif type(value) is tuple:
        if target.a.shape != (len(value),):
            raise OracleError(f"a tuple of {len(value)} is assigned to a part of shape {target.a.shape}")
        if len({_code(v) for v in value}) > 1:
            raise OracleError("a tuple of values of several types is assigned to a part of an array")
        for i, v in enumerate(value):
            store(v, target, (i,))
    else:
        for i in np.ndindex(target.a.shape):
            store(value, target, i)


def _iterate(x):
    return (_load(x, i) for i in range(x.n)) if type(x) is _Arr else x


# ---------------------------------------------------------------------------------------------------------------------
# Checked mode: races and uninitialised reads
# ---------------------------------------------------------------------------------------------------------------------
class _Checker:
    """Shadow memory. Two accesses of different threads to one element, at least one of them a write (and not both
    atomic), must be ordered by a block barrier or a syncwarp between them; a shared or local element must be written
    before it is read. Shuffles and votes order nothing, as in CUDA."""

    def __init__(self):
        self.thread = None
        self.cells = {}

    def _ordered(self, stamp, me):
        thread, epoch, clock = stamp
        if thread is me:
            return True
        if thread.block is not me.block:
            return False
        return epoch < me.epoch or (thread.warp is me.warp and me.seen[thread.lane] >= clock)

    def touch(self, x, index, kind):
        me = self.thread
        for key in x.keys(index):
            if x.init is not None:
                if kind == "write":
                    x.init.add(key)
                elif key not in x.init:
                    raise OracleError(f"element {index} of a {x.space} array is read before anybody wrote it")
            if x.space in ("local", "const"):
                continue
            cell = self.cells.setdefault(key, {"read": {}, "write": {}, "atomic": {}})
            against = {"read": ("write", "atomic"), "write": ("read", "write", "atomic"),
                       "atomic": ("read", "write")}[kind]
            for other in against:
                for stamp in cell[other].values():
                    if not self._ordered(stamp, me):
                        raise OracleError(
                            f"race on element {index} of a {x.space} array: {kind} by thread {me.xyz} of block "
                            f"{me.block.xyz}, {other} by thread {stamp[0].xyz} of block {stamp[0].block.xyz}, "
                            "with no barrier between")
            if kind == "write":
                for table in cell.values():
                    table.clear()
            cell[kind][me.uid] = (me, me.epoch, me.seen[me.lane])

    def load(self, x, index):
        if type(x) is _Arr:
            index, element = x.resolve(index)
            if element:
                self.touch(x, index, "read")
        return _load(x, index)

    def store(self, value, x, index):
        if type(x) is _Arr:
            index, element = x.resolve(index)
            if not element:
                return _store_slice(value, x.view(x.a[index]), self.store)
            self.touch(x, index, "write")
        _store(value, x, index)


# ---------------------------------------------------------------------------------------------------------------------
# What a thread sees of `cuda`
# ---------------------------------------------------------------------------------------------------------------------
class _Dim3:
    __slots__ = ("x", "y", "z")

    def __init__(self, x, y, z):
        self.x, self.y, self.z = np.int32(x), np.int32(y), np.int32(z)


class _Warp:
    def __init__(self):
        self.threads = []


class _Block:
    def __init__(self, launch, xyz):
        self.launch, self.xyz = launch, xyz
        self.shared = {}
        checked = launch.checker is not None
        self.dynamic = np.full(launch.shared_bytes, 0xCD, np.uint8)
        self.dynamic_init = set() if checked else None
        self.idx = _Dim3(*xyz)


def _dtype(spec):
    """The NumPy dtype that a NumPy type, a Numba type or a string names."""
    try:
        return np.dtype(spec)
    except TypeError:
        name = {"boolean": "bool"}.get(str(spec), str(spec))
        return np.dtype(name)


class _Thread:
    """One thread: its generator, what it waits for, and the `cuda.*` functions that need to know who calls."""

    def __init__(self, block, warp, uid, linear, xyz):
        self.block, self.warp, self.uid, self.xyz = block, warp, uid, xyz
        self.launch = block.launch
        self.lane = linear % WARP
        self.gen = self.op = self.answer = None
        self.done = False
        self.epoch = 0
        self.seen = [0] * WARP  # per lane of the warp: the latest clock of that lane this thread is ordered after
        self.seen[self.lane] = 1
        self.threadIdx, self.blockIdx = _Dim3(*xyz), block.idx
        self.blockDim, self.gridDim = self.launch.block_dim, self.launch.grid_dim
        self.laneid, self.warpsize = np.int32(self.lane), WARP

    def grid(self, ndim):
        spots = [int(getattr(self.threadIdx, c)) + int(getattr(self.blockIdx, c)) * int(getattr(self.blockDim, c))
                 for c in "xyz"[:ndim]]
        return spots[0] if ndim == 1 else tuple(spots)

    def gridsize(self, ndim):
        sizes = [int(getattr(self.blockDim, c)) * int(getattr(self.gridDim, c)) for c in "xyz"[:ndim]]
        return sizes[0] if ndim == 1 else tuple(sizes)

    def lanemask_lt(self):
        return np.uint32((1 << self.lane) - 1)

    def fence(self):
        return None

    def shared_array(self, site, shape, dtype, alignment=None):
        dtype = _dtype(dtype)
        shape = tuple(map(operator.index, shape)) if isinstance(shape, tuple) else (operator.index(shape),)
        if math.prod(shape) == 0:
            block = self.block
            count = block.dynamic.size // dtype.itemsize
            view = block.dynamic[:count * dtype.itemsize].view(dtype)
            return _Arr(view, "shared", block.dynamic_init, dynamic=True)
        if site not in self.block.shared:
            self.block.shared[site] = self._fresh(shape, dtype, "shared")
        return self.block.shared[site]

    def local_array(self, shape, dtype, alignment=None):
        shape = tuple(map(operator.index, shape)) if isinstance(shape, tuple) else (operator.index(shape),)
        return self._fresh(shape, _dtype(dtype), "local")

    def _fresh(self, shape, dtype, space):
        garbage = np.full(math.prod(shape) * dtype.itemsize, 0xCD, np.uint8).view(dtype).reshape(shape)
        return _Arr(garbage, space, set() if self.launch.checker else None)

    def const_array(self, array):
        return _Arr(array.a if type(array) is _Arr else np.asarray(array), "const")

    def atomic(self, name, array, index, *values):
        if type(array) is not _Arr or array.space == "const":
            raise OracleError(f"cuda.atomic.{name} needs a global or shared array")
        index, element = array.resolve(index)
        if not element:
            raise OracleError(f"cuda.atomic.{name} needs the index of one element")
        if self.launch.checker:
            self.launch.checker.touch(array, index, "atomic")
        code = array.code
        if code not in ("i4", "u4", "i8", "u8") + (
                ("f4", "f8") if name in ("add", "sub", "max", "min", "nanmax", "nanmin") else ()) or (
                name in ("inc", "dec") and code[0] != "u"):
            raise OracleError(f"cuda.atomic.{name} does not exist for {array.a.dtype} arrays")
        old = _load(array, index)
        values = [_cast(v, code) for v in values]
        new = _ATOMIC[name](old, *values)
        if name in ("add", "sub") and code[0] != "f":
            new = _wrap(int(new), code)
        array.a[index] = new
        return old

    def compare_and_swap(self, array, old, value):
        return self.atomic("cas", array, 0, old, value)


def _atomic_extreme(better, missing):
    def apply(old, value):
        if np.isnan(value):
            return old
        if np.isnan(old):
            return value if missing else old
        return better(old, value)

    return apply


_ATOMIC = {
    "add": lambda old, v: old + v if isinstance(old, (float, np.floating)) else int(old) + int(v),
    "sub": lambda old, v: old - v if isinstance(old, (float, np.floating)) else int(old) - int(v),
    "max": _atomic_extreme(max, False), "min": _atomic_extreme(min, False),
    "nanmax": _atomic_extreme(max, True), "nanmin": _atomic_extreme(min, True),
    "and_": operator.and_, "or_": operator.or_, "xor": operator.xor,
    "exch": lambda old, v: v,
    "cas": lambda old, expected, v: v if old == expected else old,
    "inc": lambda old, v: 0 if old >= v else old + type(old)(1),
    "dec": lambda old, v: v if old == 0 or old > v else old - type(old)(1),
}

# name in `cuda` -> names of the parameters; these suspend the thread
_BARRIERS = {"syncthreads": (), "syncthreads_count": ("predicate",), "syncthreads_and": ("predicate",),
             "syncthreads_or": ("predicate",)}
_WARP_OPS = {"syncwarp": ("mask",), "shfl_sync": ("mask", "value", "src_lane"),
             "shfl_up_sync": ("mask", "value", "delta"), "shfl_down_sync": ("mask", "value", "delta"),
             "shfl_xor_sync": ("mask", "value", "lane_mask"), "all_sync": ("mask", "predicate"),
             "any_sync": ("mask", "predicate"), "eq_sync": ("mask", "predicate"), "ballot_sync": ("mask", "predicate"),
             "match_any_sync": ("mask", "value"), "match_all_sync": ("mask", "value")}
_COLLECTIVES = _BARRIERS | _WARP_OPS | {"activemask": ()}
# name in `cuda` -> method of _Thread
_THREAD_METHODS = {"grid": "grid", "gridsize": "gridsize", "lanemask_lt": "lanemask_lt", "threadfence": "fence",
                   "threadfence_block": "fence", "threadfence_system": "fence", "local.array": "local_array",
                   "const.array_like": "const_array", "atomic.compare_and_swap": "compare_and_swap"}
_THREAD_VALUES = ("threadIdx", "blockIdx", "blockDim", "gridDim", "laneid", "warpsize")
_CUDA_PURE = {"popc": _popc, "clz": _clz, "ffs": _ffs, "brev": _brev, "selp": _selp, "fma": _fma,
              "cbrt": _math_unary("cbrt"), "rsqrt": _math_unary("rsqrt")}

_PURE = {min: _extreme(min, np.fmin), max: _extreme(max, np.fmax), abs: _abs, int: _int, float: _float,
         bool: lambda v=False: _cast(v, "b1"), round: _round, range: _range, len: len, enumerate: enumerate, zip: zip,
         print: lambda *a, **k: None, pow: _binary_function("**"), tuple: tuple,
         divmod: lambda a, b: (_binary_function("//")(a, b), _binary_function("%")(a, b)),
         math.modf: _modf, math.frexp: _frexp, math.ldexp: _ldexp,
         math.isnan: lambda x: math.isnan(float(x)), math.isinf: lambda x: math.isinf(float(x)),
         math.isfinite: lambda x: math.isfinite(float(x))}
_PURE |= {getattr(math, n): _math_unary(n) for n in _UNARY_MATH if hasattr(math, n)}
_PURE |= {getattr(math, n): _math_binary(n) for n in _BINARY_MATH if hasattr(math, n)}


# ---------------------------------------------------------------------------------------------------------------------
# Explicit signatures
# ---------------------------------------------------------------------------------------------------------------------
_TYPE_NAMES = {np.dtype(t).name: code for code, t in _NP.items()} | {"boolean": "b1", "void": None, "none": None}
_TYPE_NAMES |= {code: code for code in _NP}


class Signature:
    """The types that a signature names: `result` is a type code or None, `params` are codes or (code, dimensions)."""

    def __init__(self, result, params):
        self.result, self.params = result, tuple(params)

    @classmethod
    def of(cls, given):
        """From what ``cuda.jit`` takes: "int32(int32, float32[:])", a tuple of types, or types called with types."""
        if isinstance(given, str):
            return cls.parse(given)
        if isinstance(given, tuple):
            return cls(None, map(cls.type_of, given))
        return cls(None if given.return_type is None else cls.type_of(given.return_type), map(cls.type_of, given.args))

    @classmethod
    def parse(cls, text):
        tree = ast.parse(text, mode="eval").body
        if isinstance(tree, ast.Call):
            return cls(cls.parsed_type(tree.func), map(cls.parsed_type, tree.args))
        return cls(None, map(cls.parsed_type, tree.elts if isinstance(tree, ast.Tuple) else [tree]))

    @classmethod
    def parsed_type(cls, node):
        if isinstance(node, ast.Subscript):
            return cls.parsed_type(node.value), len(node.slice.elts) if isinstance(node.slice, ast.Tuple) else 1
        if not isinstance(node, ast.Name) or node.id not in _TYPE_NAMES:
            raise OracleError(f"the type {ast.unparse(node)} of a signature is not known to the oracle")
        return _TYPE_NAMES[node.id]

    @classmethod
    def type_of(cls, kind):
        """The type code of a type object: Numba's scalars and arrays, NumPy's types."""
        if hasattr(kind, "ndim") and hasattr(kind, "layout"):
            return cls.type_of(kind.dtype), kind.ndim
        name = getattr(kind, "name", None) or str(kind)
        if name not in _TYPE_NAMES:
            raise OracleError(f"the type {kind} of a signature is not known to the oracle")
        return _TYPE_NAMES[name]

    def exact(self, values):
        return len(values) == len(self.params) and all(map(self.matches, self.params, values))

    @staticmethod
    def matches(kind, value):
        if isinstance(kind, tuple):
            return type(value) is _Arr and (value.code, value.nd) == kind
        return type(value) in _CODE and _CODE[type(value)] == kind

    def convert(self, values):
        """The values as the types of the parameters."""
        if len(values) != len(self.params):
            raise OracleError(f"{len(values)} arguments are given to a signature of {len(self.params)}")
        return [self.converted(*pair) for pair in zip(self.params, values)]

    @classmethod
    def converted(cls, kind, value):
        if isinstance(kind, tuple) or type(value) is _Arr:
            if not isinstance(kind, tuple) or not cls.matches(kind, value):
                raise OracleError(f"{value!r} is given where the signature has {kind}")
            return value
        return _cast(value, kind)


def _chosen(signatures, values):
    """The signature that a call takes: the only one, or the one that matches exactly."""
    if len(signatures) == 1:
        return signatures[0]
    for signature in signatures:
        if signature.exact(values):
            return signature
    raise OracleError("no signature matches exactly; which one is taken is not known to the oracle")


def _typed(function, signatures):
    """A device function whose arguments and result are cast to the types of its signature."""
    def call(thread, path, *values):
        signature = _chosen(signatures, values)
        result = yield from function(thread, path, *signature.convert(values))
        return result if result is None or signature.result is None else _cast(result, signature.result)

    return call


def _at_launch(signatures, values):
    """The arguments of a launch as the kernel's signature wants them: converted by ctypes, which is strict."""
    signature = _chosen(signatures, values)
    for kind, value in zip(signature.params, values):
        if type(kind) is str and type(value) in _CODE:
            code = _CODE[type(value)]
            if kind[0] in "iu" and code[0] == "f" or kind == "b1" and code != "b1":
                raise OracleError(f"{value!r} is given for a parameter that is {np.dtype(_NP[kind]).name}")
    return signature.convert(values)


# ---------------------------------------------------------------------------------------------------------------------
# From the kernel's source to a generator function
# ---------------------------------------------------------------------------------------------------------------------
_MISSING = object()


_PYTHON = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
           ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow, ast.BitAnd: operator.and_,
           ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.LShift: operator.lshift, ast.RShift: operator.rshift}


def _literal(node):
    """The value of an expression of literals: CPython computes `1 << 4` and `2 ** -1` before Numba sees them, by
    Python's rules. None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) in (int, float) else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.BinOp) and type(node.op) in _PYTHON:
        left, right = _literal(node.left), _literal(node.right)
        if left is None or right is None:
            return None
        try:
            value = _PYTHON[type(node.op)](left, right)
        except (ArithmeticError, TypeError, ValueError):
            return None
        return value if type(value) in (int, float) else None
    return None


class _Rewriter(ast.NodeTransformer):
    """Rewrites one function. Names beginning with __o_ are the interpreter's own."""

    def __init__(self, program, function, outer, local_names):
        self.program, self.function, self.outer, self.locals = program, function, outer, local_names
        self.loops = []     # counters of the enclosing loops, part of a collective's identity
        self.temporaries = 0

    # -- helpers
    def fail(self, node, text):
        line = node.lineno + self.function.__code__.co_firstlineno - 1
        raise OracleError(f"{self.function.__code__.co_filename}:{line}: {text}")

    def call(self, name, *args):
        return ast.Call(ast.Name(f"__o_{name}", ast.Load()), list(args), [])

    def temporary(self):
        self.temporaries += 1
        return f"__o_t{self.temporaries}"

    def bind(self, value):
        """A name in the function's globals that holds `value`."""
        name = f"__o_v{len(self.program.namespace)}"
        self.program.namespace[name] = value
        return ast.Name(name, ast.Load())

    def chain(self, node):
        """['cuda', 'atomic', 'add'] of a dotted name that starts at a global, or None."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id not in self.locals and node.id in self.outer:
            return [node.id, *reversed(parts)]
        return None

    def cuda_path(self, node):
        """'atomic.add' for whatever spelling of cuda.atomic.add the kernel uses, else None."""
        parts = self.chain(node)
        if not parts:
            return None
        root, name = self.outer[parts[0]], parts[0]
        module = getattr(root, "__name__", "") if inspect.ismodule(root) else ""
        if module == "numba" and len(parts) > 1 and parts[1] == "cuda":
            return ".".join(parts[2:])
        if name == "cuda" or module.split(".")[-1] == "cuda":
            return ".".join(parts[1:])
        if name == "libdevice" or module.split(".")[-1] == "libdevice":
            return ".".join(["libdevice", *parts[1:]])
        home = self.outer.get("cuda") or sys.modules.get("numba.cuda")
        original = getattr(root, "__name__", name).split(".")[-1]
        for candidate in (name, original):  # from numba.cuda import atomic as at
            if home is not None and not hasattr(root, "bitwidth") \
                    and not isinstance(root, (int, float, tuple, np.generic, np.ndarray)) \
                    and getattr(home, candidate, _MISSING) is root:
                return ".".join([candidate, *parts[1:]])
        return None

    def value_of(self, node):
        """The object that a dotted global names, or _MISSING."""
        parts = self.chain(node)
        if not parts:
            return _MISSING
        value = self.outer[parts[0]]
        for part in parts[1:]:
            if not hasattr(value, part):
                return _MISSING
            value = getattr(value, part)
        return value

    # -- expressions
    def visit_Constant(self, node):
        if type(node.value) is int and not _I8_MIN <= node.value <= _I8_MAX:
            return ast.copy_location(self.bind(_canon(node.value)), node)
        return node

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and node.id not in self.locals and node.id in self.outer:
            path = self.cuda_path(node)
            if path in _THREAD_VALUES:
                return ast.copy_location(ast.Attribute(ast.Name("__o_c", ast.Load()), path, ast.Load()), node)
            return ast.copy_location(self.bind(_canon(self.outer[node.id])), node)
        return node

    def visit_Attribute(self, node):
        path = self.cuda_path(node)
        if path:
            head = path.split(".")[0]
            if head in _THREAD_VALUES:
                result = ast.Name("__o_c", ast.Load())
                for part in path.split("."):
                    result = ast.Attribute(result, part, ast.Load())
                return ast.copy_location(result, node)
        value = self.value_of(node)
        if value is not _MISSING:
            return ast.copy_location(self.bind(_canon(value)), node)
        node.value = self.visit(node.value)
        return node

    def visit_BinOp(self, node):
        op = _BINARY.get(type(node.op))
        if op is None:
            self.fail(node, "this operator is not known to the oracle")
        value = _literal(node)
        if value is not None:
            return self.visit_Constant(ast.copy_location(ast.Constant(value), node))
        left, right = self.visit(node.left), self.visit(node.right)
        return ast.copy_location(self.call("binary" + str(list(_BINARY.values()).index(op)), left, right), node)

    def visit_UnaryOp(self, node):
        value = _literal(node)
        if value is not None:
            return self.visit_Constant(ast.copy_location(ast.Constant(value), node))
        operand = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ast.copy_location(ast.UnaryOp(ast.Not(), operand), node)
        name = {ast.USub: "negative", ast.UAdd: "positive", ast.Invert: "invert"}[type(node.op)]
        return ast.copy_location(self.call(name, operand), node)

    def visit_Compare(self, node):
        values = [self.visit(v) for v in (node.left, *node.comparators)]
        tests, left = [], values[0]
        for k, op in enumerate(node.ops):
            right = values[k + 1]
            again = None
            if k + 1 < len(node.ops):  # a chain evaluates its middle values once
                name = self.temporary()
                right = ast.NamedExpr(ast.Name(name, ast.Store()), right)
                again = ast.Name(name, ast.Load())
            if type(op) in _COMPARE:
                tests.append(self.call(_COMPARE[type(op)], left, right))
            else:
                tests.append(ast.Compare(left, [op], [right]))
            left = again
        result = tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests)
        return ast.copy_location(result, node)

    def visit_Subscript(self, node):
        return ast.copy_location(self.call("load", self.visit(node.value), self.visit(node.slice)), node)

    def visit_Slice(self, node):
        parts = [self.visit(p) if p else ast.Constant(None) for p in (node.lower, node.upper, node.step)]
        return ast.copy_location(self.call("slice", *parts), node)

    def arguments(self, node, names, name):
        """Positional arguments in the order of `names`; missing ones at the end stay missing."""
        given = dict(zip(names, map(self.visit, node.args)))
        given |= {k.arg: self.visit(k.value) for k in node.keywords}
        if len(node.args) > len(names) or set(given) - set(names):
            self.fail(node, f"cuda.{name} takes the arguments ({', '.join(names)})")
        return [given[n] for n in names if n in given]

    def visit_Call(self, node):
        path = self.cuda_path(node.func)
        if path is not None:
            return ast.copy_location(self.cuda_call(node, path), node)
        target = self.value_of(node.func)
        if target is _MISSING and isinstance(node.func, ast.Name) and node.func.id not in self.locals:
            target = getattr(__import__("builtins"), node.func.id, _MISSING)
        if target is _MISSING:
            self.fail(node, f"the call of {ast.unparse(node.func)} is not known to the oracle")
        node.args = [self.visit(a) for a in node.args]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        if hasattr(target, "py_func"):
            callee = ast.Name(self.program.name_of(target), ast.Load())
            path = ast.BinOp(ast.Name("__o_p", ast.Load()), ast.Add(), ast.Tuple([self.site(node)], ast.Load()))
            call = ast.Call(callee, [ast.Name("__o_c", ast.Load()), path, *node.args], node.keywords)
            return ast.copy_location(ast.YieldFrom(call), node)
        known = _PURE.get(target, _MISSING) if target.__hash__ else _MISSING
        if known is _MISSING:
            known = self.conversion(target)
        if known is None:
            self.fail(node, f"the call of {ast.unparse(node.func)} is not known to the oracle")
        return ast.copy_location(ast.Call(self.bind(known), node.args, node.keywords), node)

    @staticmethod
    def conversion(target):
        """np.float32(x), numba.int32(x), np.sqrt(x): a function of the interpreter's scalars, or None."""
        if isinstance(target, np.ufunc):
            name = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "absolute": "abs"}.get(
                target.__name__, target.__name__)
            return _abs if name == "abs" else _math_unary(name) if name in _UNARY_MATH else None
        try:
            code = _CODE.get(_dtype(target).type)
        except (TypeError, ValueError):
            return None
        return code and (lambda value=0: _cast(value, code))

    def site(self, node):
        """What identifies one execution of a collective: its place in the source and the loop iterations it is in."""
        place = ast.Constant((self.function.__qualname__, node.lineno, node.col_offset))
        return ast.Tuple([place, *(ast.Name(c, ast.Load()) for c in self.loops)], ast.Load())

    def cuda_call(self, node, path):
        me = ast.Name("__o_c", ast.Load())
        if path in _COLLECTIVES:
            args = self.arguments(node, _COLLECTIVES[path], path)
            if path == "syncwarp" and not args:
                args = [ast.Constant(FULL_MASK)]
            if len(args) != len(_COLLECTIVES[path]):
                self.fail(node, f"cuda.{path} takes the arguments ({', '.join(_COLLECTIVES[path])})")
            key = ast.Tuple([ast.Constant(path), ast.Name("__o_p", ast.Load()), self.site(node)], ast.Load())
            return ast.Yield(ast.Tuple([key, *args], ast.Load()))
        keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in node.keywords]
        args = [self.visit(a) for a in node.args]
        if path in _CUDA_PURE:
            return ast.Call(self.bind(_CUDA_PURE[path]), args, keywords)
        if path == "shared.array":
            site = ast.Constant((self.function.__qualname__, node.lineno, node.col_offset))
            return ast.Call(ast.Attribute(me, "shared_array", ast.Load()), [site, *args], keywords)
        head, _, tail = path.partition(".")
        if head == "atomic" and tail in _ATOMIC:
            return ast.Call(ast.Attribute(me, "atomic", ast.Load()), [ast.Constant(tail), *args], keywords)
        if path in _THREAD_METHODS:
            return ast.Call(ast.Attribute(me, _THREAD_METHODS[path], ast.Load()), args, keywords)
        if head == "libdevice":
            return ast.Call(self.bind(_libdevice(tail)), args, keywords)
        if head == "fp16" and tail in _HALF:
            return ast.Call(self.bind(_half(tail)), args, keywords)
        self.fail(node, f"cuda.{path} is not known to the oracle")

    # -- statements
    def assign(self, target, value):
        """Statements that give `value` (an expression already rewritten) to `target`."""
        if isinstance(target, ast.Name):
            return [ast.Assign([target], value)]
        if isinstance(target, ast.Subscript):
            return [ast.Expr(self.call("store", value, self.visit(target.value), self.visit(target.slice)))]
        if isinstance(target, (ast.Tuple, ast.List)):
            names = [self.temporary() for _ in target.elts]
            first = ast.Assign([ast.Tuple([ast.Name(n, ast.Store()) for n in names], ast.Store())],
                               self.call("iterate", value))
            result = [first]
            for name, element in zip(names, target.elts):
                result += self.assign(element, ast.Name(name, ast.Load()))
            return result
        self.fail(target, "this assignment is not known to the oracle")

    def located(self, statements, node):
        for s in statements:
            ast.copy_location(s, node)
        return statements

    def visit_Assign(self, node):
        value = self.visit(node.value)
        if len(node.targets) == 1:
            return self.located(self.assign(node.targets[0], value), node)
        name = self.temporary()
        result = [ast.Assign([ast.Name(name, ast.Store())], value)]
        for target in node.targets:
            result += self.assign(target, ast.Name(name, ast.Load()))
        return self.located(result, node)

    def visit_AnnAssign(self, node):
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return self.located(self.assign(node.target, self.visit(node.value)), node)

    def visit_AugAssign(self, node):
        op = "binary" + str(list(_BINARY.values()).index(_BINARY[type(node.op)]))
        if isinstance(node.target, ast.Name):
            value = self.call(op, ast.Name(node.target.id, ast.Load()), self.visit(node.value))
            return self.located([ast.Assign([node.target], value)], node)
        array, index, old = self.temporary(), self.temporary(), self.temporary()
        names = [ast.Name(n, ast.Load()) for n in (array, index, old)]
        result = [ast.Assign([ast.Name(array, ast.Store())], self.visit(node.target.value)),
                  ast.Assign([ast.Name(index, ast.Store())], self.visit(node.target.slice)),
                  ast.Assign([ast.Name(old, ast.Store())], self.call("load", names[0], names[1]))]
        value = self.call(op, names[2], self.visit(node.value))
        return self.located([*result, ast.Expr(self.call("store", value, names[0], names[1]))], node)

    def loop(self, node, head):
        """A loop with a counter, so that a barrier in its third round differs from the same barrier in its second."""
        counter = f"__o_n{len(self.loops)}_{node.lineno}"
        if head == "iter":
            node.iter = ast.copy_location(self.call("iterate", self.visit(node.iter)), node.iter)
        self.loops.append(counter)
        if head == "test":
            node.test = self.visit(node.test)
        body = [ast.AugAssign(ast.Name(counter, ast.Store()), ast.Add(), ast.Constant(1))]
        if head == "iter" and not isinstance(node.target, ast.Name):
            name = self.temporary()
            body += self.assign(node.target, ast.Name(name, ast.Load()))
            node.target = ast.Name(name, ast.Store())
        node.body = self.located(body, node) + self.block(node.body)
        self.loops.pop()
        node.orelse = self.block(node.orelse)
        start = ast.Assign([ast.Name(counter, ast.Store())], ast.Constant(0))
        return [*self.located([start], node), node]

    def visit_For(self, node):
        return self.loop(node, "iter")

    def visit_While(self, node):
        return self.loop(node, "test")

    def block(self, statements):
        result = []
        for s in statements:
            new = self.visit(s)
            result += new if isinstance(new, list) else [new]
        return result

    def visit_If(self, node):
        node.test, node.body, node.orelse = self.visit(node.test), self.block(node.body), self.block(node.orelse)
        return node

    def unsupported(self, node):
        self.fail(node, f"{type(node).__name__} is not known to the oracle")

    visit_FunctionDef = visit_Lambda = visit_Try = visit_With = visit_ListComp = visit_GeneratorExp = unsupported
    visit_Global = visit_Nonlocal = visit_Yield = visit_YieldFrom = visit_DictComp = visit_SetComp = unsupported


class _Program:
    """The generator functions of one kernel and of the device functions it calls."""

    def __init__(self, load, store):
        self.functions, self.names, self.files = {}, {}, set()
        self.namespace = {"__o_load": load, "__o_store": store, "__o_slice": slice, "__o_iterate": _iterate,
                          "__o_negative": _negative, "__o_positive": _positive, "__o_invert": _invert}
        for k, op in enumerate(_BINARY.values()):
            self.namespace[f"__o_binary{k}"] = _binary_function(op)
        for name in _COMPARE.values():
            self.namespace[f"__o_{name}"] = _compare_function(getattr(operator, name))

    def name_of(self, target):
        """The name by which compiled code calls the device function `target`; recursion finds it while it is made."""
        function = target.py_func
        if function not in self.names:
            self.compile(function, getattr(target, "signatures", ()))
        return self.names[function]

    def compile(self, function, signatures=()):
        """The generator function of a Python function, with the casts that its signatures ask for."""
        if function in self.functions:
            return self.functions[function]
        name = self.names[function] = f"__o_f{len(self.names)}"
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        if not isinstance(tree, ast.FunctionDef):
            raise OracleError(f"the source of {function.__name__} is not a function definition")
        outer = dict(function.__globals__)
        if function.__closure__:
            outer |= dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__)))
        local_names = {a.arg for a in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)}
        local_names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        rewriter = _Rewriter(self, function, outer, local_names)
        body = rewriter.block(tree.body)
        # an unreachable yield makes every function a generator, with or without collectives
        body.append(ast.If(ast.Constant(False), [ast.Expr(ast.Yield(None))], []))
        tree.args.args[:0] = [ast.arg("__o_c"), ast.arg("__o_p")]
        tree.args.defaults = [rewriter.visit(d) for d in tree.args.defaults]
        for a in tree.args.args:
            a.annotation = None
        tree.name, tree.body, tree.decorator_list, tree.returns = name, body, [], None
        module = ast.Module([tree], [])
        ast.fix_missing_locations(module)
        ast.increment_lineno(module, function.__code__.co_firstlineno - 1)
        filename = function.__code__.co_filename
        self.files.add(filename)
        exec(compile(module, filename, "exec", dont_inherit=True), self.namespace)
        if signatures:
            self.namespace[name] = _typed(self.namespace[name], [Signature.of(s) for s in signatures])
        self.functions[function] = self.namespace[name]
        return self.namespace[name]


# ---------------------------------------------------------------------------------------------------------------------
# The scheduler
# ---------------------------------------------------------------------------------------------------------------------
class _Launch:
    def __init__(self, grid, block, shared_bytes, checker):
        self.grid, self.block, self.shared_bytes, self.checker = grid, block, shared_bytes, checker
        self.grid_dim, self.block_dim = _Dim3(*grid), _Dim3(*block)


def _mask(value):
    return int(_cast(value, "i8") if _code(value) != "u8" else value) & FULL_MASK


def _lanes(mask):
    return [lane for lane in range(WARP) if mask >> lane & 1]


def _describe(op):
    (name, _, site), *rest = op
    return f"cuda.{name} in {site[0][0]}" + (f" with mask {_mask(rest[0]):#x}" if name in _WARP_OPS else "")


def _shuffle(name, lane, amount, values):
    low = int(amount) & 31  # the hardware reads five bits: shfl_sync from lane 33 reads lane 1
    if name == "shfl_sync":
        source = low
    elif name == "shfl_up_sync":
        source = lane - low if lane >= low else lane
    elif name == "shfl_down_sync":
        source = lane + low if lane + low < WARP else lane
    else:
        source = lane ^ low
    return values.get(source, _UNDEFINED)


def _bit_pattern(value):
    code = _code(value)
    if code in ("b1", "i1", "u1", "i2", "u2", "i4"):
        return int(value)
    return {"f4": np.float32, "f2": np.float32}.get(code, np.float64)(value).tobytes() if code[0] == "f" else int(value)


def _answer_warp(group, mask):
    """Completes a warp collective for the threads in `group`, all waiting with the same mask."""
    name = group[0].op[0][0]
    present = sum(1 << t.lane for t in group)
    if name == "syncwarp":
        latest = [max(t.seen[k] for t in group) for k in range(WARP)]
        for t in group:
            t.seen = latest.copy()
            t.seen[t.lane] += 1
        answers = {t: None for t in group}
    elif name.startswith("shfl"):
        codes = {_code(t.op[2]) for t in group}
        if not codes <= {"i4", "i8", "f4", "f8"}:
            raise OracleError(f"cuda.{name} takes int32, int64, float32 and float64, not {sorted(codes)}")
        values = {t.lane: t.op[2] for t in group}
        answers = {t: _shuffle(name, t.lane, t.op[3], values) for t in group}
    elif name.startswith("match"):
        values = {t: _bit_pattern(t.op[2]) for t in group}
        if name == "match_any_sync":
            answers = {t: _wrap(sum(1 << u.lane for u in group if values[u] == values[t]), "i4") for t in group}
        else:
            same = len(set(values.values())) == 1
            answers = {t: (_wrap(present if same else 0, "i4"), same) for t in group}
    else:
        truth = {t: bool(t.op[2]) for t in group}
        if name == "ballot_sync":
            result = _wrap(sum(1 << t.lane for t in group if truth[t]), "i4")
        else:
            result = {"all_sync": all(truth.values()), "any_sync": any(truth.values()),
                      "eq_sync": len(set(truth.values())) == 1}[name]
        answers = {t: result for t in group}
    for t, answer in answers.items():
        t.op, t.answer = None, answer


def _advance_warp(warp):
    """Completes what can be completed in one warp; True if anything was."""
    groups = {}
    for t in warp.threads:
        if t.op is not None and t.op[0][0] in _WARP_OPS:
            mask = _mask(t.op[1])
            if not mask >> t.lane & 1:
                raise _located(t, f"{_describe(t.op)}: the mask does not name the calling lane {t.lane}")
            groups.setdefault((t.op[0], mask), []).append(t)
    by_lane = {t.lane: t for t in warp.threads if not t.done}
    progress = False
    for (_, mask), group in groups.items():
        if all(by_lane[lane] in group for lane in _lanes(mask) if lane in by_lane):
            try:
                _answer_warp(group, mask)
            except OracleError as error:
                raise _located(group[0], str(error)) from None
            progress = True
    if progress:
        return True
    # activemask answers with the lanes that meet at it once nobody in the warp can get further
    meeting = {}
    for t in warp.threads:
        if t.op is not None and t.op[0][0] == "activemask":
            meeting.setdefault(t.op[0], []).append(t)
    for group in meeting.values():
        lanes = np.uint32(sum(1 << t.lane for t in group))
        for t in group:
            t.op, t.answer = None, lanes
    return bool(meeting)


def _place(thread):
    """file:line where the thread's innermost kernel or device function stands."""
    gen = thread.gen
    while getattr(gen, "gi_yieldfrom", None) is not None:
        gen = gen.gi_yieldfrom
    return f"{gen.gi_code.co_filename}:{gen.gi_frame.f_lineno}" if gen.gi_frame else "?"


def _located(thread, text):
    return OracleError(f"{_place(thread)}: thread {thread.xyz} of block {thread.block.xyz}: {text}")


def _advance_block(threads):
    """Lets all threads pass the barrier they wait at, or raises because they do not meet at one."""
    alive = [t for t in threads if not t.done]
    for t in alive:
        if t.op[0][0] in _WARP_OPS:
            others = [u for u in alive if u.warp is t.warp and _mask(t.op[1]) >> u.lane & 1 and u.op[0] != t.op[0]
                      or u.warp is t.warp and u.op[0] == t.op[0] and _mask(u.op[1]) != _mask(t.op[1])]
            raise _located(t, f"{_describe(t.op)} never completes: lane {others[0].lane} is named by the mask but "
                              f"waits at {_place(others[0])} ({_describe(others[0].op)})")
    first = alive[0]
    for t in alive[1:]:
        if t.op[0] != first.op[0]:
            rounds = " in another iteration or call" if t.op[0][2][0] == first.op[0][2][0] else ""
            raise _located(t, f"divergent barrier: {_describe(t.op)}, but thread {first.xyz} waits at "
                              f"{_place(first)} ({_describe(first.op)}){rounds}")
    name = first.op[0][0]
    answer = None
    if name != "syncthreads":
        votes = [bool(t.op[1]) for t in alive]
        answer = np.int32({"count": sum, "and": all, "or": any}[name.split("_")[1]](votes))
    for t in alive:
        t.op, t.answer = None, answer
        t.epoch += 1


def _run_block(threads, files, checker):
    while True:
        for t in threads:
            if t.done or t.op is not None:
                continue
            if checker:
                checker.thread = t
            try:
                t.op = t.gen.send(t.answer)
            except StopIteration:
                t.done = True
            except Exception as error:
                raise _explain(error, t, files) from error
        warps = {id(t.warp): t.warp for t in threads}.values()
        if sum(_advance_warp(w) for w in warps):  # a sum, not any(): every warp gets its turn
            continue
        if all(t.done for t in threads):
            return
        _advance_block(threads)


def _explain(error, thread, files):
    place, trace = "?", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename in files:
            place = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    if isinstance(error, UnboundLocalError):
        text = f"a variable is read before it was assigned ({error})"
    else:
        text = str(error) if isinstance(error, OracleError) else f"{type(error).__name__}: {error}"
    return OracleError(f"{place}: thread {thread.xyz} of block {thread.block.xyz}: {text}")


def _triple(dim, what):
    dim = (dim,) if np.ndim(dim) == 0 else tuple(dim)
    dim = tuple(int(d) for d in dim) + (1,) * (3 - len(dim))
    if len(dim) != 3 or min(dim) < 1:
        raise OracleError(f"the {what} {dim} needs 1 to 3 positive sizes")
    return dim


def _argument(value):
    if isinstance(value, tuple):
        return tuple(_argument(v) for v in value)
    if hasattr(value, "__array_interface__") and not np.isscalar(value):
        return _Arr(np.asarray(value), "global")
    return _canon(value)


def run(py_func, grid, block, args, shared_bytes=0, *, signatures=(), checked=False, backwards=False, wild=False):
    """Runs the kernel `py_func` for every thread of the launch; arrays in `args` are changed in place.

    py_func       the undecorated Python function of a kernel (``kernel.py_func``); a global with an attribute
                  ``py_func`` is a device function
    grid, block   an int or a tuple of 1 to 3 ints (threads of a warp: 32 consecutive ones, x fastest)
    args          NumPy arrays (or objects with ``__array_interface__``) and scalars; a Python int is an int64, a float
                  a float64, a NumPy scalar keeps its dtype
    shared_bytes  bytes behind every ``cuda.shared.array(0, dtype)``
    signatures    what ``cuda.jit`` was given: strings, tuples of types or types called with types
    checked       also find races (on shared and global arrays) and reads of unwritten shared or local elements
    backwards     run blocks and threads last to first: a kernel whose result depends on the order shows it
    wild          floats that do not fit an integer and shifts by 64 and more give what PTX's instructions give (for
                  values that the compiler does not know: for literals the result is undefined)

    Raises OracleError, naming file, line, thread and block, for what has no defined result on a GPU: an index out of
    range (an index below 0 wraps once, as in Numba), a barrier that not all running threads reach in the same place and
    iteration (threads that returned count as arrived), a warp collective whose mask names a lane that runs elsewhere or
    leaves out the caller, use of a shuffled value from a lane that takes no part, a variable read before it was
    assigned; unless `wild`, a shift by 64 or more, a float that does not fit the integer it is converted to.

    Semantics: Numba-CUDA 0.30.4 and the PTX ISA (shfl.sync, vote.sync, match.sync, barrier.red).
    """
    global _wild
    grid, block = _triple(grid, "grid"), _triple(block, "block")
    checker = _Checker() if checked else None
    program = _Program(checker.load, checker.store) if checked else _Program(_load, _store)
    launch = _Launch(grid, block, int(shared_bytes), checker)
    values = [_argument(a) for a in args]
    if signatures:
        values = _at_launch([Signature.of(s) for s in signatures], values)
    before, _wild = _wild, wild
    try:
        with np.errstate(all="ignore"):
            _run_grid(program, py_func, launch, values, checker, backwards)
    finally:
        _wild = before


def _run_grid(program, py_func, launch, values, checker, backwards):
    grid, block = launch.grid, launch.block
    function = program.compile(py_func)
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    spots = [(x, y, z) for z in range(block[2]) for y in range(block[1]) for x in range(block[0])]
    for number, where in enumerate(reversed(blocks) if backwards else blocks):
        home, threads = _Block(launch, where), []
        for linear, xyz in enumerate(spots):
            if linear % WARP == 0:
                warp = _Warp()
            thread = _Thread(home, warp, number * len(spots) + linear, linear, xyz)
            warp.threads.append(thread)
            thread.gen = function(thread, (), *values)
            threads.append(thread)
        _run_block(threads[::-1] if backwards else threads, program.files, checker)
