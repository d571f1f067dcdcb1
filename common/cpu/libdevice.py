"""`numba.cuda.libdevice` on the CPU: `LIBDEVICE` maps a function's name to a replacement for compiled code.

Signatures are those of numba-cuda 0.30: d float64, f float32, l int64, i int32, h int16, and unsigned quantities
travel in signed types of the same width.  Arguments are cast to the signature.  Differences from the GPU:

* The `fast_` functions are the accurate ones.  Functions that differ only in rounding direction exist for `_rn` (to
  nearest) and, among the conversions to integers, for all four.
* Conversions to integers saturate, as on the GPU; a nan gives 0 from float32 to 32 bits, otherwise the bits of the
  smallest signed integer.
* Functions of two results (`sincosf`, `modff`, `frexpf`) return a tuple, as in numba-cuda.

Not here: Bessel functions, the inverses of erf and of the normal distribution, `_rd`/`_ru`/`_rz` arithmetic.
"""

import math

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing import signature

from . import half, scalars, vecmath
from .scalars import call_libm, call_llvm, emit_math, make_intrinsic

_TYPES = {"d": types.float64, "f": types.float32, "l": types.int64, "i": types.int32, "h": types.int16}
I32, I64, F32, F64 = vecmath.I32, vecmath.I64, vecmath.F32, vecmath.F64

LIBDEVICE = {}


def _define(name, code, emit):
    """Add libdevice.<name>; `code` is arguments>result in the letters above, e.g. 'ff>f' (two results: 'f>ff')."""
    arg_codes, result_codes = code.split(">")
    results = [_TYPES[c] for c in result_codes]
    result = results[0] if len(results) == 1 else types.Tuple(results)
    LIBDEVICE[name] = make_intrinsic(name, [signature(result, *[_TYPES[c] for c in arg_codes])], emit)


def _define_floats(name, emit, arity=1, single=None):
    """Add the float64 function `name` and its float32 twin (`name` + 'f' unless given)."""
    _define(name, "d" * arity + ">d", emit)
    _define(single or name + "f", "f" * arity + ">f", emit)


def _math(name):
    return lambda context, builder, sig, args: emit_math(name, context, builder, sig, args)


def _llvm(name):
    return lambda context, builder, sig, args: call_llvm(builder, "llvm." + name, args)


def _libm(name):
    return lambda context, builder, sig, args: call_libm(builder, name, args)


def _float_op(op):
    # 'arcp' means nothing for these three; naming a flag keeps 'contract' away, for the _rn forms must not be fused
    return lambda context, builder, sig, args: getattr(builder, op)(*args, flags=() if op == "fdiv" else ("arcp",))


def _constant(like, value):
    return ir.Constant(like.type, value)


# --- floating point -------------------------------------------------------------------------------------------------

for _name in ("acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "erf", "erfc", "exp", "exp2",
              "expm1", "fabs", "floor", "lgamma", "log", "log10", "log1p", "log2", "sin", "sinh", "sqrt", "tan", "tanh",
              "trunc"):
    _define_floats(_name, _math(_name))
for _name in ("atan2", "fmod", "hypot", "nextafter", "pow", "remainder", "copysign"):
    _define_floats(_name, _math(_name), 2)
_define_floats("tgamma", _math("gamma"))
_define_floats("cbrt", _libm("cbrt"))
_define_floats("rsqrt", scalars.emit_rsqrt)
_define_floats("rint", _llvm("rint"))
_define_floats("nearbyint", _llvm("rint"))
_define_floats("round", _llvm("round"))
_define_floats("fmax", _llvm("maxnum"), 2)
_define_floats("fmin", _llvm("minnum"), 2)
_define_floats("fma", scalars.emit_fma, 3)
_define_floats("fma_rn", scalars.emit_fma, 3, "fmaf_rn")
for _name in ("cos", "exp", "log", "log10", "log2", "sin", "tan"):
    _define(f"fast_{_name}f", "f>f", _math(_name))
_define("fast_powf", "ff>f", _math("pow"))
_define("fast_fdividef", "ff>f", _float_op("fdiv"))
for _name in ("add", "sub", "mul", "div"):
    _define(f"f{_name}_rn", "ff>f", _float_op("f" + _name))
    if _name != "sub":
        _define(f"d{_name}_rn", "dd>d", _float_op("f" + _name))


def _exp10(context, builder, sig, args):
    x = args[0] if sig.args[0] == types.float64 else builder.fpext(args[0], F64)
    power = call_llvm(builder, "llvm.pow", [_constant(x, 10.0), x])
    return power if sig.args[0] == types.float64 else builder.fptrunc(power, F32)


_define_floats("exp10", _exp10)


def _rcbrt(context, builder, sig, args):
    return builder.fdiv(_constant(args[0], 1.0), call_libm(builder, "cbrt", args))


_define_floats("rcbrt", _rcbrt)


def _fdim(context, builder, sig, args):
    x, y = args
    return builder.select(builder.fcmp_ordered("<=", x, y), _constant(x, 0.0), builder.fsub(x, y))


_define_floats("fdim", _fdim, 2)


def _normcdf(context, builder, sig, args):
    x = args[0]
    tail = emit_math("erfc", context, builder, sig, [builder.fmul(x, _constant(x, -math.sqrt(0.5)))])
    return builder.fmul(tail, _constant(x, 0.5))


_define_floats("normcdf", _normcdf)


def _saturate(context, builder, sig, args):
    # maxnum takes the number of a number and a nan: nan becomes 0
    low = call_llvm(builder, "llvm.maxnum", [args[0], _constant(args[0], 0.0)])
    return call_llvm(builder, "llvm.minnum", [low, _constant(low, 1.0)])


_define("saturatef", "f>f", _saturate)


def _reciprocal(context, builder, sig, args):
    return builder.fdiv(_constant(args[0], 1.0), args[0])


_define_floats("drcp_rn", _reciprocal, single="frcp_rn")
_define_floats("dsqrt_rn", _llvm("sqrt"), single="fsqrt_rn")
_define("frsqrt_rn", "f>f", scalars.emit_rsqrt)


for _suffix, _t in (("", "d"), ("f", "f")):
    _define(f"powi{_suffix}", f"{_t}i>{_t}", _math("pow"))
    _define(f"ldexp{_suffix}", f"{_t}i>{_t}", _math("ldexp"))
    _define(f"scalbn{_suffix}", f"{_t}i>{_t}", _math("ldexp"))
    _define(f"modf{_suffix}", f"{_t}>{_t}{_t}", _math("modf"))
    _define(f"frexp{_suffix}", f"{_t}>{_t}i", _math("frexp"))
    _define(f"sincos{_suffix}", f"{_t}>{_t}{_t}", lambda context, builder, sig, args: cgutils.pack_array(builder, [
        emit_math(name, context, builder, signature(sig.args[0], *sig.args), args) for name in ("sin", "cos")]))
LIBDEVICE["fast_sincosf"] = LIBDEVICE["sincosf"]


# --- tests and bits -------------------------------------------------------------------------------------------------


def _test(op, operand):
    """An int32 flag: compare |x| with the constant `operand`."""

    def emit(context, builder, sig, args):
        magnitude = call_llvm(builder, "llvm.fabs", args)
        compare = builder.fcmp_unordered if op == "uno" else builder.fcmp_ordered
        return builder.zext(compare(op, magnitude, _constant(magnitude, operand)), I32)

    return emit


for _name, _single, _emit in (("isnand", "isnanf", _test("uno", 0.0)), ("isinfd", "isinff", _test("==", math.inf)),
                              ("isfinited", "finitef", _test("<", math.inf))):
    _define(_name, "d>i", _emit)
    _define(_single, "f>i", _emit)


def _bitcast(context, builder, sig, args):
    return builder.bitcast(args[0], context.get_value_type(sig.return_type))


def _signbit(context, builder, sig, args):
    bits = ir.IntType(sig.args[0].bitwidth)
    negative = builder.icmp_signed("<", builder.bitcast(args[0], bits), ir.Constant(bits, 0))
    return builder.zext(negative, I32)


_define("signbitd", "d>i", _signbit)
_define("signbitf", "f>i", _signbit)


_define("float_as_int", "f>i", _bitcast)
_define("int_as_float", "i>f", _bitcast)
_define("double_as_longlong", "d>l", _bitcast)
_define("longlong_as_double", "l>d", _bitcast)
_define("float2half_rn", "f>h", lambda context, builder, sig, args:
        builder.bitcast(half.narrow(context, builder, args[0]), half.I16))
_define("half2float", "h>f", lambda context, builder, sig, args:
        half.widen(context, builder, builder.bitcast(args[0], half.HALF)))


# --- conversions ----------------------------------------------------------------------------------------------------

_ROUNDINGS = {"rn": "rint", "rd": "floor", "ru": "ceil", "rz": "trunc"}


def _float_to_int(rounding, signed):
    def emit(context, builder, sig, args):
        x = call_llvm(builder, "llvm." + _ROUNDINGS[rounding], args)
        to = context.get_value_type(sig.return_type)
        name = f"llvm.fpto{'s' if signed else 'u'}i.sat.{to.intrinsic_name}.{x.type.intrinsic_name}"
        result = builder.call(builder.module.declare_intrinsic(name, (), ir.FunctionType(to, [x.type])), [x])
        if to == I64 or x.type == F64:  # PTX cvt: nan gives 0 only from float32 to 32 bits
            smallest = _constant(result, -(1 << (to.width - 1)))
            result = builder.select(builder.fcmp_unordered("uno", x, x), smallest, result)
        return result

    return emit


for _source, _code in (("float", "f"), ("double", "d")):
    for _target, _result, _signed in (("int", "i", True), ("uint", "i", False), ("ll", "l", True), ("ull", "l", False)):
        for _mode in _ROUNDINGS:
            _define(f"{_source}2{_target}_{_mode}", f"{_code}>{_result}", _float_to_int(_mode, _signed))
for _name in ("llrint", "llrintf"):
    LIBDEVICE[_name] = LIBDEVICE["double2ll_rn" if _name == "llrint" else "float2ll_rn"]


def _int_to_float(signed):
    return lambda context, builder, sig, args: (builder.sitofp if signed else builder.uitofp)(
        args[0], context.get_value_type(sig.return_type))


for _source, _code, _signed in (("int", "i", True), ("uint", "i", False), ("ll", "l", True), ("ull", "l", False)):
    _define(f"{_source}2float_rn", f"{_code}>f", _int_to_float(_signed))
    _define(f"{_source}2double_rn", f"{_code}>d", _int_to_float(_signed))
_define("double2float_rn", "d>f", lambda context, builder, sig, args: builder.fptrunc(args[0], F32))


# --- integers -------------------------------------------------------------------------------------------------------


def _int_op(op):
    return lambda context, builder, sig, args: getattr(builder, op)(*args)


def _pick(compare, op):
    return lambda context, builder, sig, args: builder.select(getattr(builder, compare)(op, *args), *args)


def _narrow(emit):
    """Cut the result to the declared int32."""
    return lambda context, builder, sig, args: builder.trunc(emit(context, builder, sig, args), I32)


def _high_product(extend):
    def emit(context, builder, sig, args):
        width = args[0].type.width
        double = ir.IntType(2 * width)
        a, b = (getattr(builder, extend)(x, double) for x in args)
        return builder.trunc(builder.lshr(builder.mul(a, b), ir.Constant(double, width)), args[0].type)

    return emit


def _int_abs(context, builder, sig, args):
    zero = _constant(args[0], 0)
    return builder.select(builder.icmp_signed("<", args[0], zero), builder.sub(zero, args[0]), args[0])


_define("abs", "i>i", _int_abs)
_define("llabs", "l>l", _int_abs)


for _name, _long, _emit in (("popc", "popcll", scalars.emit_popc), ("clz", "clzll", scalars.emit_clz),
                            ("ffs", "ffsll", scalars.emit_ffs)):
    _define(_name, "i>i", _emit)
    _define(_long, "l>i", _emit if _name == "ffs" else _narrow(_emit))
_define("brev", "i>i", scalars.emit_brev)
_define("brevll", "l>l", scalars.emit_brev)
for _short, _long, _compare, _op in (("max", "llmax", "icmp_signed", ">"), ("min", "llmin", "icmp_signed", "<"),
                                     ("umax", "ullmax", "icmp_unsigned", ">"),
                                     ("umin", "ullmin", "icmp_unsigned", "<")):
    _define(_short, "ii>i", _pick(_compare, _op))
    _define(_long, "ll>l", _pick(_compare, _op))
_define("mulhi", "ii>i", _high_product("sext"))
_define("umulhi", "ii>i", _high_product("zext"))
_define("mul64hi", "ll>l", _high_product("sext"))
_define("umul64hi", "ll>l", _high_product("zext"))


def _average(extend, extra):
    """(x + y + extra) >> 1 without overflow."""

    def emit(context, builder, sig, args):
        a, b = (getattr(builder, extend)(x, I64) for x in args)
        return builder.trunc(builder.ashr(builder.add(builder.add(a, b), I64(extra)), I64(1)), I32)

    return emit


for _name, _extend, _extra in (("hadd", "sext", 0), ("rhadd", "sext", 1), ("uhadd", "zext", 0), ("urhadd", "zext", 1)):
    _define(_name, "ii>i", _average(_extend, _extra))
