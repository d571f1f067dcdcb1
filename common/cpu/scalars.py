"""What a kernel's scalar calls (`math.exp`, `cuda.popc`, `max`, ...) become on the CPU.

The tables at the end map a name to a function that compiled code may call in its place:

`MATH`         name in the `math` module -> replacement; every other `math` function keeps Numba's own
`CUDA_MATH`    the names of the `math` module that numba-cuda supports at all
`CUDA_SCALAR`  name in `numba.cuda` -> replacement
`BUILTIN`      `min` and `max`

Two things differ from Numba's CPU target, and both follow numba-cuda (0.30):

* Result types: `math.floor(float32)` is a float32 there, an int64 on Numba's CPU target; `math.exp(float16)` is a
  float16; `math.pow(float32, int32)` is a float32.  Each function lists numba-cuda's signatures, and Numba's own
  overload resolution picks one of them.
* Speed: in float32 the transcendental functions come from `vecmath` and vectorise; float64 goes to the C library.

All are Numba intrinsics: they write LLVM code into the caller, so a call costs nothing and compiles in no time.
Outside compiled code they cannot be called.  A call with unsupported types is a Numba TypingError that names the
types.
"""

import math
import operator
from functools import reduce
from inspect import Parameter, Signature

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic

from . import gpu_numbers, lowering, vecmath
from .lowering import lower_builtin

f16, f32, f64 = types.float16, types.float32, types.float64
i32, u32, i64, u64 = types.int32, types.uint32, types.int64, types.uint64


def make_intrinsic(name, cases, emit, doc=None, refused=()):
    """A function for compiled code with the given signatures.

    `cases` are Numba signatures, all of the same number (1 to 3) of arguments; Numba's overload resolution chooses
    among them and casts the arguments.  A call for which it would choose one of `refused` (typed by numba-cuda, but
    without code) is an error.  `emit(context, builder, sig, args)` writes the LLVM code and returns the value.
    """

    count = len(cases[0].args)

    def function(typingctx, *args):
        if len(args) != count:
            raise TypingError(f"{name}() takes {count} argument{'s' * (count > 1)}, not {len(args)}")
        sig = typingctx.resolve_overload(name, [*cases, *refused], args, {})
        if sig is None or sig in refused:
            given, known = ", ".join(map(str, args)), "; ".join(f"({', '.join(map(str, c.args))})" for c in cases)
            raise TypingError(f"{name}({given}) is not supported; supported argument types: {known}")
        return sig, emit

    # Numba reads the number of arguments off the Python signature.
    names = ("typingctx", *"xyz"[:count])
    function.__signature__ = Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names])
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc or f"`{name}` for compiled code; signatures: {'; '.join(map(str, cases))}."
    return intrinsic(function)


def call_llvm(builder, name, args):
    """Call the LLVM intrinsic `name` (without the type suffix), overloaded on the type of the first argument."""
    fn = builder.module.declare_intrinsic(name, [args[0].type], ir.FunctionType(args[0].type, [a.type for a in args]))
    return builder.call(fn, args)


def call_libm(builder, name, args):
    """Call a function of the C library; float32 arguments take the name with an `f` at the end."""
    name += "f" if args[0].type == vecmath.F32 else ""
    fn_type = ir.FunctionType(args[0].type, [a.type for a in args])
    return builder.call(cgutils.insert_pure_function(builder.module, fn_type, name), args)


# --- the math module ------------------------------------------------------------------------------------------------


def _numba_math(name):
    """Numba's own implementation of math.<name>."""

    def emit(context, builder, sig, args):
        return context.get_function(getattr(math, name), sig)(builder, args)

    return emit


def _vector(name):
    """`vecmath` in float32, Numba's own in float64."""
    fallback = _numba_math(name)

    def emit(context, builder, sig, args):
        if sig.args[0] == f32:
            return vecmath.emit(name, builder, args[0])
        return fallback(context, builder, sig, args)

    return emit


def _llvm(name):
    return lambda context, builder, sig, args: call_llvm(builder, "llvm." + name, args)


def _libm(name):
    return lambda context, builder, sig, args: call_libm(builder, name, args)


def _fmod(context, builder, sig, args):
    return builder.frem(*args)


def _modf(context, builder, sig, args):
    x = args[0]
    whole = call_llvm(builder, "llvm.trunc", [x])
    infinite = builder.fcmp_ordered("==", call_llvm(builder, "llvm.fabs", [x]), ir.Constant(x.type, math.inf))
    fraction = builder.select(infinite, ir.Constant(x.type, 0.0), builder.fsub(x, whole))
    return cgutils.pack_array(builder, [call_llvm(builder, "llvm.copysign", [fraction, x]), whole])


def _pow(context, builder, sig, args):
    x, y = args
    if sig.args[1] == i32:  # in float64, where every int32 is exact
        x = builder.fpext(x, vecmath.F64) if sig.args[0] == f32 else x
        result = call_llvm(builder, "llvm.pow", [x, builder.sitofp(y, vecmath.F64)])
        return builder.fptrunc(result, vecmath.F32) if sig.args[0] == f32 else result
    return call_llvm(builder, "llvm.pow", args)


# name -> code for float32 and float64
_UNARY = {
    **{name: _vector(name) for name in ("exp", "exp2", "log", "log2", "log10", "tanh", "erf", "sin", "cos")},
    **{name: _llvm(name) for name in ("sqrt", "fabs", "floor", "ceil", "trunc")},
}
_ALSO_FLOAT16 = set(_UNARY) - {"tanh", "erf"}
_OTHERS = {"fmod": _fmod, "remainder": _libm("remainder"), "nextafter": _libm("nextafter"), "pow": _pow, "modf": _modf}


def emit_math(name, context, builder, sig, args):
    """Write math.<name>, in float32 or float64 as `sig` says."""
    emit = _UNARY.get(name) or _OTHERS.get(name) or _numba_math(name)
    return emit(context, builder, sig, args)


def emit_via_float32(name, context, builder, args):
    """Write math.<name> of one float16: computed in float32, rounded once at the end."""
    wide = builder.fpext(args[0], vecmath.F32)
    return builder.fptrunc(emit_math(name, context, builder, f32(f32), [wide]), vecmath.F16)


def _make_unary(name):
    def emit(context, builder, sig, args):
        if sig.args[0] == f16:
            return emit_via_float32(name, context, builder, args)
        if isinstance(sig.args[0], types.Integer):
            args, sig = [context.cast(builder, args[0], sig.args[0], f64)], f64(f64)
        return emit_math(name, context, builder, sig, args)

    cases = [f64(i64), f64(u64), f32(f32), f64(f64)] + ([f16(f16)] if name in _ALSO_FLOAT16 else [])
    return make_intrinsic(name, cases, emit)


MATH = {name: _make_unary(name) for name in _UNARY}
for _name in ("fmod", "remainder", "nextafter"):
    MATH[_name] = make_intrinsic(_name, [f32(f32, f32), f64(f64, f64)], _OTHERS[_name])
MATH["pow"] = make_intrinsic("pow", [f32(f32, f32), f64(f64, f64), f32(f32, i32), f64(f64, i32)], _pow)
MATH["modf"] = make_intrinsic("modf", [types.UniTuple(f64, 2)(f64), types.UniTuple(f32, 2)(f32)], _modf)
MATH["frexp"] = make_intrinsic("frexp", [types.Tuple([t, i32])(t) for t in (f32, f64)], _numba_math("frexp"))
MATH["ldexp"] = make_intrinsic("ldexp", [f32(f32, i32), f64(f64, i32)], _numba_math("ldexp"))

# All that numba-cuda knows of the math module; Numba's CPU target knows more (math.gcd), which a GPU would refuse.
CUDA_MATH = frozenset(MATH) | frozenset((
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "copysign", "cosh", "degrees", "erfc", "expm1", "gamma",
    "hypot", "isfinite", "isinf", "isnan", "lgamma", "log1p", "radians", "sinh", "tan"))

exp, exp2, log, log2, log10 = (MATH[n] for n in ("exp", "exp2", "log", "log2", "log10"))
tanh, erf, sin, cos, sqrt, pow = (MATH[n] for n in ("tanh", "erf", "sin", "cos", "sqrt", "pow"))


# --- numba.cuda -----------------------------------------------------------------------------------------------------

_INTEGERS = [types.int8, types.int16, i32, i64, types.uint8, types.uint16, u32, u64]


def emit_popc(context, builder, sig, args):
    return builder.ctpop(args[0])


def emit_clz(context, builder, sig, args):
    return builder.ctlz(args[0], cgutils.false_bit)


def emit_brev(context, builder, sig, args):
    return builder.bitreverse(args[0])


def emit_ffs(context, builder, sig, args):
    """1 + the number of zero bits below the lowest one bit; 0 for 0; an int32."""
    x = args[0]
    position = builder.add(builder.cttz(x, cgutils.false_bit), ir.Constant(x.type, 1))
    result = builder.select(builder.icmp_unsigned("==", x, ir.Constant(x.type, 0)), ir.Constant(x.type, 0), position)
    return result if x.type == vecmath.I32 else builder.trunc(result, vecmath.I32)


def emit_fma(context, builder, sig, args):
    return call_llvm(builder, "llvm.fma", args)


def emit_rsqrt(context, builder, sig, args):
    root = call_llvm(builder, "llvm.sqrt", args)
    return builder.fdiv(ir.Constant(root.type, 1.0), root)


popc = make_intrinsic("popc", [t(t) for t in _INTEGERS], emit_popc, "Number of one bits; the argument's type.")
clz = make_intrinsic("clz", [t(t) for t in _INTEGERS], emit_clz, "Number of leading zero bits; the argument's type.")
brev = make_intrinsic("brev", [u32(u32), u64(u64)], emit_brev, "Bits in reverse order.")
ffs = make_intrinsic("ffs", [u32(i32), u32(i64), u32(u32), u32(u64)], emit_ffs,
                     "Position of the lowest one bit, counted from 1; 0 if there is none; a uint32.",
                     refused=[u32(t) for t in _INTEGERS if t.bitwidth < 32])
fma = make_intrinsic("fma", [f32(f32, f32, f32), f64(f64, f64, f64)], emit_fma, "x * y + z, rounded once.")
cbrt = make_intrinsic("cbrt", [f32(f32), f64(f64)], _libm("cbrt"), "Cube root.")
rsqrt = make_intrinsic("rsqrt", [f32(f32), f64(f64)], emit_rsqrt, "1 / sqrt(x).")
nanosleep = make_intrinsic("nanosleep", [types.void(u32)], lambda context, builder, sig, args:
                           context.get_dummy_value(), "Does nothing: a CPU thread has nobody to wait for.")


@intrinsic
def selp(typingctx, test, a, b):
    """`a` where `test` (a boolean) holds, else `b`; both of one 16- to 64-bit number type."""
    supported = (f64, f32, types.int16, types.uint16, i32, u32, i64, u64)
    a, b = types.unliteral(a), types.unliteral(b)
    if a != b or a not in supported or types.unliteral(test) != types.boolean:
        raise TypingError(f"selp({test}, {a}, {b}) is not supported; the first argument must be a boolean and the "
                          f"other two of the same type, one of {', '.join(map(str, supported))}")
    return a(types.boolean, a, a), lambda context, builder, sig, args: builder.select(*args)


CUDA_SCALAR = {"popc": popc, "clz": clz, "ffs": ffs, "brev": brev, "selp": selp, "fma": fma, "cbrt": cbrt,
               "nanosleep": nanosleep}


# --- round ----------------------------------------------------------------------------------------------------------


def emit_round(context, builder, sig, args):
    """The nearest integer, of two the even one, as an int64; beyond its range as `gpu_numbers` has it."""
    nearest = call_llvm(builder, "llvm.rint", args)
    return gpu_numbers.saturated(builder, nearest, "f32" if sig.args[0] == f32 else "f64", True, 64)


round_whole = make_intrinsic("round", [i64(f32), i64(f64)], emit_round, "`round(x)` of a float: an int64.",
                             refused=[i64(t) for t in _INTEGERS])


# --- min and max ----------------------------------------------------------------------------------------------------


def max2(*values):
    """`max(a, b, ...)` with numba-cuda's result type and its treatment of nan.

    Two floats (float32 or float64) give CUDA's `fmax`, which ignores a nan.  Everything else (integers, mixtures,
    float16, three and more values) follows Python: from left to right `b if b > a else a`, so a nan in front stays
    and a nan behind is ignored.  The result has the type that Numba finds common to all arguments.  Both forms
    vectorise.
    """
    raise NotImplementedError("max2 is for compiled code")


def min2(*values):
    """`min(a, b, ...)`; see `max2`."""
    raise NotImplementedError("min2 is for compiled code")


class _MinMax(AbstractTemplate):
    def generic(self, args, kws):
        values = tuple(args[0]) if len(args) == 1 and isinstance(args[0], types.BaseTuple) else args
        if kws or not values or not all(isinstance(v, (types.Number, types.Boolean)) for v in values):
            return None
        result = self.context.unify_types(*values)
        return result and signature(result, *args)


@infer_global(max2)
class _TypeMax(_MinMax):
    key = max2


@infer_global(min2)
class _TypeMin(_MinMax):
    key = min2


def _lower_minmax(stub, llvm_name, compare):
    def two_floats(context, builder, sig, args):
        args = [context.cast(builder, value, ty, sig.return_type) for value, ty in zip(args, sig.args)]
        return call_llvm(builder, llvm_name, args)

    def fold(context, builder, result, items):
        def step(best, item):
            ty = context.typing_context.unify_types(best[0], item[0])
            old, new = (context.cast(builder, value, given, ty) for given, value in (best, item))
            better = context.get_function(compare, signature(types.boolean, ty, ty))(builder, (new, old))
            return ty, builder.select(better, new, old)

        ty, value = reduce(step, items)
        return context.cast(builder, value, ty, result)

    def values(context, builder, sig, args):
        return fold(context, builder, sig.return_type, zip(sig.args, args))

    def one_tuple(context, builder, sig, args):
        return fold(context, builder, sig.return_type, zip(sig.args[0], cgutils.unpack_tuple(builder, args[0])))

    lower_builtin(stub, types.VarArg(types.Any))(values)
    lower_builtin(stub, types.BaseTuple)(one_tuple)
    for a in (f32, f64):
        for b in (f32, f64):
            lower_builtin(stub, a, b)(two_floats)


_lower_minmax(max2, "llvm.maxnum", operator.gt)
_lower_minmax(min2, "llvm.minnum", operator.lt)
BUILTIN = {"min": min2, "max": max2}

lowering.install()
