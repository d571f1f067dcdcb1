"""`numba.cuda.fp16` on the CPU: `FP16` maps a function's name (`hadd`, `hexp`, `__float2half_rn`, ...) to a
replacement.

Names and signatures are those of numba-cuda 0.30.  `hadd`, `hsub`, `hmul`, `hdiv`, `hfma` and the conversions round
once, to nearest, ties to even; the elementary functions are computed in float32 and rounded, so they are at most one
unit in the last place from the exact result (the GPU's `htanh_approx` is less accurate, here it is `htanh`).  `hmax`
and `hmin` ignore a nan, `__hmax_nan` and `__hmin_nan` return it.  Conversions to integers saturate.

Not here: conversions to float16 that round down, up or towards zero; cache-hinted loads and stores; shuffles (they go
through the launcher like all warp collectives).
"""

import math

from llvmlite import ir
from numba.core import types

from . import half
from .half import FLOAT, HALF, I16, f16, f32, f64, narrow, narrow_double, widen
from .scalars import call_llvm, emit_math, emit_via_float32, make_intrinsic

FP16 = {}
_BOOL = types.boolean


def _define(names, sig, emit):
    """Add `emit` under each of the blank-separated `names`."""
    function = None
    for name in names.split():
        function = function or make_intrinsic(name, [sig], emit)
        FP16[name] = function


def _in_float32(compute, clamp=False, relu=False):
    """float16 arguments to float32, `compute(builder, *wide)`, back to float16; optionally into [0, 1] or [0, inf)."""

    def emit(context, builder, sig, args):
        value = compute(builder, *[widen(context, builder, a) for a in args])
        if clamp or relu:  # maxnum turns a nan into 0
            value = call_llvm(builder, "llvm.maxnum", [value, FLOAT(0.0)])
        if clamp:
            value = call_llvm(builder, "llvm.minnum", [value, FLOAT(1.0)])
        return narrow(context, builder, value)

    return emit


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _arithmetic(op):
    return lambda builder, a, b: getattr(builder, op)(a, b)


for _name, _op in (("hadd", "fadd"), ("hsub", "fsub"), ("hmul", "fmul"), ("hdiv", "fdiv")):
    _names = f"{_name} __{_name}" if _name == "hdiv" else f"{_name} __{_name} __{_name}_rn"
    _define(_names, f16(f16, f16), _in_float32(_arithmetic(_op)))
    if _name != "hdiv":
        _define(f"__{_name}_sat", f16(f16, f16), _in_float32(_arithmetic(_op), clamp=True))


def _fma(limit):
    """a * b + c: the product is exact in float64, the sum so close that one rounding to float16 gives the right one."""

    def emit(context, builder, sig, args):
        a, b, c = (builder.fpext(widen(context, builder, x), ir.DoubleType()) for x in args)
        value = builder.fadd(builder.fmul(a, b), c)
        if limit:
            value = call_llvm(builder, "llvm.maxnum", [value, value.type(0.0)])
        if limit == "sat":
            value = call_llvm(builder, "llvm.minnum", [value, value.type(1.0)])
        return narrow_double(context, builder, value)

    return emit


def _fma_relu(context, builder, sig, args):
    value = _fma(None)(context, builder, sig, args)
    wide = widen(context, builder, value)
    return builder.select(builder.fcmp_ordered("<", wide, FLOAT(0.0)), HALF(0.0), value)  # a nan stays


_define("hfma __hfma", f16(f16, f16, f16), _fma(None))
_define("__hfma_sat", f16(f16, f16, f16), _fma("sat"))
_define("__hfma_relu", f16(f16, f16, f16), _fma_relu)
_define("hneg __hneg", f16(f16), lambda context, builder, sig, args: half.emit_sign(builder, "xor", args[0]))
_define("habs __habs", f16(f16), lambda context, builder, sig, args: half.emit_sign(builder, "and_", args[0]))


# --- comparisons ----------------------------------------------------------------------------------------------------


def _compare(op, unordered):
    def emit(context, builder, sig, args):
        compare = builder.fcmp_unordered if unordered else builder.fcmp_ordered
        return compare(op, *[widen(context, builder, a) for a in args])

    return emit


for _name, _op in (("heq", "=="), ("hne", "!="), ("hlt", "<"), ("hle", "<="), ("hgt", ">"), ("hge", ">=")):
    _define(f"{_name} __{_name}", _BOOL(f16, f16), _compare(_op, unordered=False))
    _define(f"__{_name}u", _BOOL(f16, f16), _compare(_op, unordered=True))  # true if either is nan


def _isnan(context, builder, sig, args):
    wide = widen(context, builder, args[0])
    return builder.fcmp_unordered("uno", wide, wide)


def _isinf(context, builder, sig, args):
    """1 for inf, -1 for -inf, else 0."""
    wide, i32 = widen(context, builder, args[0]), ir.IntType(32)
    positive = builder.zext(builder.fcmp_ordered("==", wide, FLOAT(math.inf)), i32)
    return builder.sub(positive, builder.zext(builder.fcmp_ordered("==", wide, FLOAT(-math.inf)), i32))


_define("__hisnan", _BOOL(f16), _isnan)
_define("__hisinf", types.int32(f16), _isinf)


def _extremum(llvm_name, keep_nan):
    def compute(builder, a, b):
        value = call_llvm(builder, llvm_name, [a, b])
        if keep_nan:
            value = builder.select(builder.fcmp_unordered("uno", a, b), FLOAT(math.nan), value)
        return value

    return _in_float32(compute)


for _name, _op in (("hmax", "llvm.maxnum"), ("hmin", "llvm.minnum")):
    _define(f"{_name} __{_name}", f16(f16, f16), _extremum(_op, keep_nan=False))
    _define(f"__{_name}_nan", f16(f16, f16), _extremum(_op, keep_nan=True))


# --- elementary functions -------------------------------------------------------------------------------------------


def _math(name):
    return lambda context, builder, sig, args: emit_via_float32(name, context, builder, args)


for _name in ("ceil", "cos", "exp", "exp2", "floor", "log", "log10", "log2", "sin", "sqrt", "trunc"):
    _define("h" + _name, f16(f16), _math(_name))
_define("htanh htanh_approx", f16(f16), _math("tanh"))
_define("hrint", f16(f16), _in_float32(lambda builder, x: call_llvm(builder, "llvm.rint", [x])))
_define("hrcp", f16(f16), _in_float32(lambda builder, x: builder.fdiv(FLOAT(1.0), x)))
_define("hrsqrt", f16(f16), _in_float32(lambda builder, x: builder.fdiv(
    FLOAT(1.0), call_llvm(builder, "llvm.sqrt", [x]))))


def _exp10(context, builder, sig, args):
    exponent = builder.fmul(widen(context, builder, args[0]), FLOAT(math.log2(10.0)))
    return narrow(context, builder, emit_math("exp2", context, builder, f32(f32), [exponent]))


_define("hexp10", f16(f16), _exp10)


# --- conversions ----------------------------------------------------------------------------------------------------


def _bits(context, builder, sig, args):
    return builder.bitcast(args[0], HALF if sig.return_type == f16 else I16)


def _cast(context, builder, sig, args):
    return context.cast(builder, args[0], sig.args[0], sig.return_type)


def _to_integer(rounding):
    return lambda context, builder, sig, args: half.to_integer(context, builder, args[0], sig.return_type, rounding)


_define("__half_as_short", types.int16(f16), _bits)
_define("__half_as_ushort", types.uint16(f16), _bits)
_define("__short_as_half", f16(types.int16), _bits)
_define("__ushort_as_half", f16(types.uint16), _bits)
_define("__float2half __float2half_rn", f16(f32), _cast)
_define("__double2half", f16(f64), _cast)
_define("__half2float", f32(f16), _cast)
for _name, _ty in (("short", types.int16), ("ushort", types.uint16), ("int", types.int32), ("uint", types.uint32),
                   ("ll", types.int64), ("ull", types.uint64)):
    _define(f"__{_name}2half_rn", f16(_ty), _cast)
    for _mode, _rounding in (("rn", "llvm.rint"), ("rd", "llvm.floor"), ("ru", "llvm.ceil"), ("rz", "llvm.trunc")):
        _define(f"__half2{_name}_{_mode}", _ty(f16), _to_integer(_rounding))
_define("__half2char_rz", types.int8(f16), _to_integer("llvm.trunc"))
_define("__half2uchar_rz", types.uint8(f16), _to_integer("llvm.trunc"))
