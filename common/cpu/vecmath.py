"""Elementary functions in float32 that LLVM can turn into SIMD code.

Numba calls the C library for `math.exp` and its kin, once per element: a loop over the threads of a block then runs one
thread at a time.  The functions here write straight-line LLVM code instead (multiplications, integer bit tricks and
selects; no branch and no call), so that the loop vectoriser computes 4 to 16 threads at once.

Each function takes and returns a `Num`, a small wrapper that lets the formulas below be read as formulas.  Method, the
same for all: reduce the argument to a short interval exactly (W. J. Cody and W. Waite, *Software Manual for the
Elementary Functions*, 1980), evaluate a polynomial there, undo the reduction.  The polynomials are minimax fits in the
relative error, made for this file; the interval of each fit stands beside it.

Largest error in units in the last place: exp, exp2, log 1.1 and tanh, erf 1.4 over all float32 arguments; log2,
log10, sin, cos 1.6 over 200 million of them.  A processor without fused multiply-add adds up to one unit to log2 and
log10.  Special values follow C: `exp(-inf)` is 0, `log(0)` is -inf, `log` of a negative number and `sin(inf)` are
nan, a nan stays a nan, results below the normal range are rounded, not flushed.
"""

from functools import cache

from llvmlite import ir
from numba.core import cgutils

F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
I32, I64 = ir.IntType(32), ir.IntType(64)

# 'contract' lets a*b + c become one fused multiply-add where the processor has it.  Naming a flag also keeps stronger
# fast-math flags of the surrounding function away from these instructions (Numba only fills in empty flag lists).
_FLAGS = ("contract",)


class Num:
    """An LLVM value (float32, float64, int32 or int64) with Python's operators; each use writes one instruction.

    Python numbers on either side become constants of the same type.  Comparisons are ordered (false for nan) and
    signed.
    """

    __slots__ = ("builder", "value")

    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    @property
    def type(self):
        return self.value.type

    def _is_float(self):
        return isinstance(self.type, (ir.FloatType, ir.DoubleType))

    def like(self, other):
        """`other`, a Num or a Python number, as an LLVM value of this one's type."""
        return other.value if isinstance(other, Num) else ir.Constant(self.type, other)

    def _binary(self, other, float_op, int_op, swap=False):
        left, right = self.value, self.like(other)
        if swap:
            left, right = right, left
        if self._is_float():
            return Num(self.builder, getattr(self.builder, float_op)(left, right, flags=_FLAGS))
        return Num(self.builder, getattr(self.builder, int_op)(left, right))

    def __add__(self, other):
        return self._binary(other, "fadd", "add")

    __radd__ = __add__

    def __sub__(self, other):
        return self._binary(other, "fsub", "sub")

    def __rsub__(self, other):
        return self._binary(other, "fsub", "sub", swap=True)

    def __mul__(self, other):
        return self._binary(other, "fmul", "mul")

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self._binary(other, "fdiv", "sdiv")

    def __rtruediv__(self, other):
        return self._binary(other, "fdiv", "sdiv", swap=True)

    def __and__(self, other):
        return self._binary(other, "", "and_")

    def __or__(self, other):
        return self._binary(other, "", "or_")

    def __xor__(self, other):
        return self._binary(other, "", "xor")

    def __lshift__(self, other):
        return self._binary(other, "", "shl")

    def __rshift__(self, other):
        """Arithmetic shift: the sign is copied down."""
        return self._binary(other, "", "ashr")

    def _compare(self, op, other):
        compare = self.builder.fcmp_ordered if self._is_float() else self.builder.icmp_signed
        return compare(op, self.value, self.like(other))

    def __lt__(self, other):
        return self._compare("<", other)

    def __gt__(self, other):
        return self._compare(">", other)

    def __ge__(self, other):
        return self._compare(">=", other)

    def equals(self, other):
        return self._compare("==", other)

    def where(self, condition, other):
        """This value where `condition` holds, `other` elsewhere (a select, not a branch)."""
        return Num(self.builder, self.builder.select(condition, self.value, self.like(other)))

    def bits(self, to):
        """The same bits read as the LLVM type `to`."""
        return Num(self.builder, self.builder.bitcast(self.value, to))

    def widen(self):
        """float32 to float64, exact."""
        return Num(self.builder, self.builder.fpext(self.value, F64))

    def narrow(self):
        """float64 to float32, rounded to nearest."""
        return Num(self.builder, self.builder.fptrunc(self.value, F32))

    def magnitude(self):
        return (self.bits(I32) & 0x7FFFFFFF).bits(F32)

    def with_sign_of(self, other):
        """This value, taken as non-negative, with the sign bit of `other`."""
        return (self.bits(I32) | (other.bits(I32) & -0x80000000)).bits(F32)


def _polynomial(x, coefficients):
    """c0 + c1 x + c2 x**2 + ..., by Horner's rule."""
    result = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        result = result * x + c
    return result


def _nearest_integer(x):
    """x, of magnitude below 2**22, rounded to an integer: as a float32 and as an int32.

    Adding 1.5 * 2**23 pushes the fraction out of the significand and leaves the integer in its low bits.
    """
    shifted = x + 12582912.0
    return shifted - 12582912.0, shifted.bits(I32) - 0x4B400000


def _power_of_two(n):
    """2**n for an int32 -126 <= n <= 127, written into the exponent bits."""
    return ((n + 127) << 23).bits(F32)


LN2_HI, LN2_LO = 0.693359375, -2.12194440054690583e-4  # LN2_HI has 10 bits: n * LN2_HI is exact
_EXP = (0.4999999403953552, 0.1666651964187622, 0.04166839271783829, 0.00836875569075346, 0.0013814517296850681)


def _exp_reduced(r):
    """exp(r) on [-ln2/2, ln2/2]."""
    return r * r * _polynomial(r, _EXP) + r + 1.0


def _exp_normal(x):
    """exp(x) where the result is a normal float32: |x| <= 87."""
    n, exponent = _nearest_integer(x * 1.4426950408889634)
    return _exp_reduced((x - n * LN2_HI) - n * LN2_LO) * _power_of_two(exponent)


def _scale(y, exponent):
    """y * 2**exponent for -252 <= exponent <= 254: in two steps, so that the end of the range rounds correctly."""
    half = exponent >> 1
    return y * _power_of_two(half) * _power_of_two(exponent - half)


def _clamp(x, low, high):
    """x kept within [low, high]; a nan passes."""
    x = _constant(x, high).where(x > high, x)
    return _constant(x, low).where(x < low, x)


def _constant(x, value):
    return Num(x.builder, x.like(value))


def exp(x):
    """e**x."""
    x = _clamp(x, -104.0, 89.0)  # beyond these the result is 0 or inf anyway
    n, exponent = _nearest_integer(x * 1.4426950408889634)
    return _scale(_exp_reduced((x - n * LN2_HI) - n * LN2_LO), exponent)


def exp2(x):
    """2**x."""
    x = _clamp(x, -151.0, 129.0)
    n, exponent = _nearest_integer(x)
    return _scale(_exp_reduced((x - n) * 0.6931471805599453), exponent)


_LOG1P = (0.3333321511745453, -0.24999797344207764, 0.20010440051555634, -0.16680532693862915,
          0.14005248248577118, -0.12183554470539093, 0.13987793028354645, -0.1289510279893875)


def _split_logarithm(x):
    """x = 2**n * m with 2/3 <= m < 4/3; returns n and log(m), both float32."""
    tiny = x < 1.1754943508222875e-38
    bits = (x * 8388608.0).where(tiny, x).bits(I32)  # subnormals are scaled up first
    n = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (n << 23)).bits(F32) - 1.0
    n = Num(x.builder, x.builder.sitofp((n - 23).where(tiny, n).value, F32))
    return n, f, f * f * (_polynomial(f, _LOG1P) * f - 0.5)  # log(m) = f + the third


def _log_specials(x, y):
    infinity = float("inf")
    y = x.where(x.equals(infinity), y)
    y = _constant(x, -infinity).where(x.equals(0.0), y)
    return y.where(x >= 0.0, float("nan"))  # negative numbers and nan


def log(x):
    """Natural logarithm."""
    n, f, rest = _split_logarithm(x)
    return _log_specials(x, n * LN2_HI + (f + (n * LN2_LO + rest)))


def log2(x):
    """Logarithm to base 2."""
    n, f, rest = _split_logarithm(x)
    # 1.4426950 = 1.4375 + 0.0051950; the first factor has so few bits that n + f * 1.4375 loses little
    return _log_specials(x, n + (f * 1.4375 + (f * 0.005195040888963407 + rest * 1.4426950408889634)))


def log10(x):
    """Logarithm to base 10."""
    n, f, rest = _split_logarithm(x)
    low = n * 4.6050389811952137e-6 + (rest * 0.4342944819032518 + f * 0.00045385065325182765)
    return _log_specials(x, n * 0.30102539062 + (f * 0.43384063125 + low))


_TANH = (-0.3333328068256378, 0.13331441581249237, -0.05373971536755562, 0.0206390880048275, -0.005704987328499556)


def tanh(x):
    """Hyperbolic tangent."""
    a = x.magnitude()
    square = a * a
    small = a + a * square * _polynomial(square, _TANH)  # fitted on [0, 0.625]
    large = 1.0 - 2.0 / (_exp_normal(2.0 * _clamp(a, 0.0, 10.0)) + 1.0)
    return small.where(a < 0.625, large).with_sign_of(x)


_ERF = (0.12837916612625122, -0.376126229763031, 0.11283565312623978, -0.02685287594795227, 0.005186374299228191,
        -0.0007991528837010264, 7.787383219692856e-05)
_LOG_ERFC = (0.00032057470525614917, 1.1271716356277466, 0.6380122303962708, 0.1032181978225708, -0.021889640018343925,
             0.002960113575682044, -0.00018760473176371306)


def erf(x):
    """Error function."""
    a = x.magnitude()
    small = a + a * _polynomial(a * a, _ERF)  # fitted on [0, 1]
    large = 1.0 - _exp_normal(0.0 - _polynomial(_clamp(a, 0.0, 4.0), _LOG_ERFC))  # -log(erfc(a)) fitted on [1, 4]
    return small.where(a < 1.0, large).with_sign_of(x)


# --- sine and cosine ------------------------------------------------------------------------------------------------


@cache
def _two_over_pi_table():
    """For each exponent field of a float32, 2**e * 2/pi modulo 4 as the sum of two float64.

    A float32 is m * 2**e with an integer m < 2**24.  Whole turns drop out of m * (2**e * 2/pi), so only the remainder
    modulo 4 quarter turns is kept (the idea of M. Payne and R. Hanek, 1983).  The first part has 29 bits: its product
    with m is exact.  The exponent field 255 (inf, nan) gives nan.
    """
    precision = 400

    def arctan_inverse(n):  # arctan(1/n) * 2**precision
        total, power, k = 0, (1 << precision) // n, 0
        while power:
            total += (power // (2 * k + 1)) * (-1) ** k
            power //= n * n
            k += 1
        return total

    pi = 4 * (4 * arctan_inverse(5) - arctan_inverse(239))  # J. Machin's formula
    two_over_pi = (2 << (2 * precision)) // pi
    table = []
    for field in range(255):
        e = max(field, 1) - 150
        value = two_over_pi << e if e >= 0 else two_over_pi >> -e
        value %= 4 << precision
        drop = value.bit_length() - 29
        high = (value >> drop) << drop
        table.append((high / 2**precision, (value - high) / 2**precision))
    table.append((float("nan"), float("nan")))
    return table


_SIN = (-0.16666655242443085, 0.008332159370183945, -0.00019515116582624614)
_COS = (0.0416666679084301, -0.0013888883404433727, 2.4799457605695352e-05, -2.7205575747757393e-07)


def _table_entry(x, index, column):
    builder, name = x.builder, f"common_cpu_two_over_pi_{column}"
    data = builder.module.globals.get(name)
    if data is None:
        row = [entry[column] for entry in _two_over_pi_table()]
        data = cgutils.global_constant(builder, name, ir.Constant(ir.ArrayType(F64, 256), row))
    zero = ir.Constant(I32, 0)
    return Num(builder, builder.load(builder.gep(data, [zero, index.value], inbounds=True)))


def _quarter_turns(x):
    """|x| = (n + r) * pi/2 with |r| <= 1/2: n modulo 4 as an int32, and r * pi/2 as a float32."""
    bits = x.bits(I32)
    field = (bits >> 23) & 0xFF
    significand = bits & 0x7FFFFF
    significand = (significand | 0x800000).where(field > 0, significand)
    m = Num(x.builder, x.builder.sitofp(significand.value, F64))
    high, low = m * _table_entry(x, field, 0), m * _table_entry(x, field, 1)
    shifted = (high + low) + 6755399441055744.0  # 1.5 * 2**52, see _nearest_integer
    r = (high - (shifted - 6755399441055744.0)) + low
    n = Num(x.builder, x.builder.trunc(shifted.bits(I64).value, I32))
    return n & 3, (r * 1.5707963267948966).narrow()


def _sine_of_quarters(n, r):
    square = r * r
    sine = r + r * square * _polynomial(square, _SIN)
    cosine = 1.0 + square * (square * _polynomial(square, _COS) - 0.5)
    result = cosine.where((n & 1).equals(1), sine)
    return (result.bits(I32) ^ ((n & 2) << 30)).bits(F32)


def sin(x):
    """Sine; exact reduction for every finite argument."""
    n, r = _quarter_turns(x)
    return (_sine_of_quarters(n, r).bits(I32) ^ (x.bits(I32) & -0x80000000)).bits(F32)


def cos(x):
    """Cosine; exact reduction for every finite argument."""
    n, r = _quarter_turns(x)
    return _sine_of_quarters(n + 1, r)


FUNCTIONS = {f.__name__: f for f in (exp, exp2, log, log2, log10, tanh, erf, sin, cos)}


def emit(name, builder, value):
    """Write the code of one of `FUNCTIONS` for the float32 LLVM `value`; returns the float32 LLVM result."""
    return FUNCTIONS[name](Num(builder, value)).value
