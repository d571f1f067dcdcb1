"""float16 for Numba's CPU target, which has none.

Importing this module teaches the CPU target the type `float16`: arrays of it, casts, constants, `np.float16(x)`,
arithmetic and comparisons.  Importing it twice does nothing, and code without float16 is typed and compiled as
before.

A value is an LLVM `half`, two bytes in memory.  Arithmetic widens to float32, where the sum, difference, product and
quotient of two float16 round to the same float16 as the exact result would (24 bits >= 2 * 11 + 2), and narrows again.
Both conversions are single instructions on x86 with F16C and on Arm; elsewhere a few integer operations do it.

Result types follow numba-cuda 0.30: float16 with float16, int8 or bool gives float16; with int16, uint8 or float32
it gives float32; with uint16, wider integers or float64 it gives float64; `//`, `%` and `**` give float32 or wider;
`float(x)` of a float16 is a float16.  Casts follow it too, and that is not always NumPy:

* float16 to an integer rounds to the nearest integer, ties to even, and saturates (PTX `cvt.rni`); NumPy truncates.
  A nan gives 0, in 64 bits the smallest int64 (or 2**63).
* float64 to float16 rounds once, not by way of float32.

One thing is allowed here that numba-cuda refuses: a float16 as a condition (`if x:`), true unless zero.
"""

import operator
import platform

from llvmlite import ir
from numba.core import pythonapi, types
from numba.core.datamodel import models, register_default
from numba.core.errors import TypingError
from numba.core.imputils import impl_ret_borrowed
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, builtin_registry, infer_global
from numba.extending import intrinsic

from . import lowering
from .lowering import lower_builtin, lower_cast

f16, f32, f64 = types.float16, types.float32, types.float64
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


# --- conversions ----------------------------------------------------------------------------------------------------


def _hardware_converts(context):
    """Whether the processor compiled for has float16 <-> float32 instructions."""
    if platform.machine().lower() not in ("x86_64", "amd64", "x86", "i386", "i686"):
        return True
    return "+f16c" in context.codegen().magic_tuple()[2]


def widen(context, builder, value):
    """float16 to float32, exact."""
    if _hardware_converts(context):
        return builder.fpext(value, FLOAT)
    bits = builder.zext(builder.bitcast(value, I16), I32)
    # The float32 with the same fields is 2**112 times too small; multiplying also normalises subnormals.
    field = builder.shl(builder.and_(bits, I32(0x7FFF)), I32(13))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(field, FLOAT), FLOAT(2.0**112), flags=("contract",)), I32)
    special = builder.icmp_unsigned(">=", field, I32(0x0F800000))  # inf and nan
    scaled = builder.select(special, builder.or_(field, I32(0x7F800000)), scaled)
    sign = builder.shl(builder.and_(bits, I32(0x8000)), I32(16))
    return builder.bitcast(builder.or_(scaled, sign), FLOAT)


def narrow(context, builder, value):
    """float32 to float16, to nearest, ties to even."""
    if _hardware_converts(context):
        return builder.fptrunc(value, HALF)
    bits = builder.bitcast(value, I32)
    magnitude = builder.and_(bits, I32(0x7FFFFFFF))
    # Normal results: rebias the exponent, add just under half a unit (plus the odd bit), drop 13 bits.
    odd = builder.and_(builder.lshr(magnitude, I32(13)), I32(1))
    normal = builder.lshr(builder.add(builder.add(magnitude, I32(0xFFF - (112 << 23))), odd), I32(13))
    # Subnormal results: adding 0.5 lines the float16's last place up with the float32's.
    shifted = builder.fadd(builder.bitcast(magnitude, FLOAT), FLOAT(0.5), flags=("contract",))
    subnormal = builder.sub(builder.bitcast(shifted, I32), I32(0x3F000000))
    result = builder.select(builder.icmp_unsigned("<", magnitude, I32(0x38800000)), subnormal, normal)
    result = builder.select(builder.icmp_unsigned(">=", magnitude, I32(0x47800000)), I32(0x7C00), result)
    result = builder.select(builder.icmp_unsigned(">", magnitude, I32(0x7F800000)), I32(0x7E00), result)
    sign = builder.and_(builder.lshr(bits, I32(16)), I32(0x8000))
    return builder.bitcast(builder.trunc(builder.or_(result, sign), I16), HALF)


def narrow_double(context, builder, value):
    """float64 to float16, rounded once.

    The float32 in between is rounded to odd: an inexact value gets a last bit of one, so that it cannot look like a
    tie.
    """
    single = builder.fptrunc(value, FLOAT)
    back = builder.fpext(single, DOUBLE)
    inexact = builder.zext(builder.fcmp_ordered("!=", back, value), I32)
    fabs = builder.module.declare_intrinsic("llvm.fabs", [DOUBLE])
    outward = builder.zext(builder.fcmp_ordered(">", builder.call(fabs, [back]), builder.call(fabs, [value])), I32)
    bits = builder.or_(builder.sub(builder.bitcast(single, I32), outward), inexact)
    return narrow(context, builder, builder.bitcast(bits, FLOAT))


def to_integer(context, builder, value, toty, rounding="llvm.rint"):
    """float16 to an integer type: rounded by the LLVM intrinsic `rounding`, saturated; nan gives 0 (64 bits: 2**63)."""
    wide = widen(context, builder, value)
    wide = builder.call(builder.module.declare_intrinsic(rounding, [FLOAT]), [wide])
    to = ir.IntType(toty.bitwidth)
    name = f"llvm.fpto{'s' if toty.signed else 'u'}i.sat.i{toty.bitwidth}.f32"
    fn = builder.module.declare_intrinsic(name, (), ir.FunctionType(to, [FLOAT]))
    result = builder.call(fn, [wide])
    if toty.bitwidth == 64:
        nan = builder.fcmp_unordered("uno", wide, wide)
        result = builder.select(nan, to(-(1 << 63)), result)
    return result


@lower_cast(f16, types.Float)
def _half_to_float(context, builder, fromty, toty, val):
    val = widen(context, builder, val)
    return builder.fpext(val, DOUBLE) if toty == f64 else val


@lower_cast(types.Float, f16)
def _float_to_half(context, builder, fromty, toty, val):
    return (narrow_double if fromty == f64 else narrow)(context, builder, val)


@lower_cast(f16, types.Integer)
def _half_to_integer(context, builder, fromty, toty, val):
    return to_integer(context, builder, val, toty)


@lower_cast(types.Integer, f16)
@lower_cast(types.IntegerLiteral, f16)
def _integer_to_half(context, builder, fromty, toty, val):
    if isinstance(fromty, types.Literal):  # its value is not in `val`
        fromty, val = fromty.literal_type, context.get_constant(fromty.literal_type, fromty.literal_value)
    # By way of float32: integers that it cannot hold exactly are beyond float16's range anyway.
    return narrow(context, builder, (builder.sitofp if fromty.signed else builder.uitofp)(val, FLOAT))


@lower_builtin(bool, f16)
def _half_to_bool(context, builder, sig, args):
    wide = widen(context, builder, args[0])
    return builder.fcmp_unordered("!=", wide, FLOAT(0.0))


# --- the type -------------------------------------------------------------------------------------------------------


@register_default(types.Float)
class FloatModel(models.PrimitiveModel):
    """Numba's model of float32 and float64, with float16 added."""

    def __init__(self, dmm, fe_type):
        try:
            be_type = {f16: HALF, f32: FLOAT, f64: DOUBLE}[fe_type]
        except KeyError:
            raise NotImplementedError(fe_type) from None
        if fe_type == f16:
            _extend_boxing()
        super().__init__(dmm, fe_type, be_type)


def _extend_boxing():
    """Let float16 scalars pass between Python and compiled code (as Python floats on the way out).

    Called when float16 is first used: importing `numba.core.boxing`, which fills the registries, takes 40 ms.
    """
    from numba.core import boxing  # noqa: F401

    box, unbox = pythonapi._boxers.functions[types.Float], pythonapi._unboxers.functions[types.Float]
    if getattr(box, "knows_float16", False):
        return

    def box_float(typ, val, c):
        if typ == f16:
            typ, val = f64, c.context.cast(c.builder, val, f16, f64)
        return box(typ, val, c)

    def unbox_float(typ, obj, c):
        native = unbox(f64 if typ == f16 else typ, obj, c)
        if typ != f16:
            return native
        return pythonapi.NativeValue(c.context.cast(c.builder, native.value, f64, f16), is_error=native.is_error)

    box_float.knows_float16 = True
    pythonapi._boxers.functions[types.Float] = box_float
    pythonapi._unboxers.functions[types.Float] = unbox_float


@intrinsic
def half_view(typingctx, ary):
    """The float16 array that shares its memory with a uint16 array, of the same shape and strides.

    Numba's dispatcher needs about 9 microseconds to recognise one float16 array argument and 0.1 for other dtypes, so a
    hot caller passes `x.view(np.uint16)` and the compiled function starts with `x = half_view(x)`, which costs nothing.
    """
    if not isinstance(ary, types.Array) or ary.dtype != types.uint16:
        raise TypingError(f"half_view needs a uint16 array, not {ary}; pass x.view(np.uint16)")
    result = ary.copy(dtype=f16)

    def emit(context, builder, sig, args):
        source = context.make_array(sig.args[0])(context, builder, args[0])
        view = context.make_array(result)(context, builder)
        for field in ("meminfo", "parent", "nitems", "itemsize", "shape", "strides"):
            setattr(view, field, getattr(source, field))
        view.data = builder.bitcast(source.data, view.data.type)
        return impl_ret_borrowed(context, builder, result, view._getvalue())

    return result(ary), emit


# --- operators ------------------------------------------------------------------------------------------------------

_ARITHMETIC = {"add": "fadd", "sub": "fsub", "mul": "fmul", "truediv": "fdiv"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _add_signature(function, sig):
    """Add `sig` to the overloads that Numba's typing knows for `function`.

    It must join the list of the built-in overloads: a template of its own would never be asked, since the built-in one
    already accepts float16 by promoting it to float32.
    """
    for known, ty in builtin_registry.globals:
        if known is not function or not isinstance(ty, types.Function):
            continue
        for template in ty.templates:
            cases = getattr(template, "cases", ())
            wider = signature(f32 if sig.return_type == f16 else sig.return_type, *[f32] * len(sig.args))
            if wider in cases and sig not in cases:
                template.cases = [*cases, sig]


def emit_arithmetic(context, builder, op, a, b):
    """One of fadd, fsub, fmul, fdiv on two float16 values, rounded to float16."""
    wide = getattr(builder, op)(widen(context, builder, a), widen(context, builder, b))
    return narrow(context, builder, wide)


def emit_comparison(context, builder, op, a, b):
    """Compare two float16 values; false for nan, but != is true."""
    compare = builder.fcmp_unordered if op == "!=" else builder.fcmp_ordered
    return compare(op, widen(context, builder, a), widen(context, builder, b))


def emit_sign(builder, op, value):
    """Change the sign bit: op 'and_' clears it, 'xor' flips it; a nan keeps its bits otherwise."""
    mask = I16(0x7FFF if op == "and_" else 0x8000)
    return builder.bitcast(getattr(builder, op)(builder.bitcast(value, I16), mask), HALF)


def _register_operators():
    def arithmetic(op):
        def emit(context, builder, sig, args):
            if op == "fdiv" and context.error_model.raise_on_fp_zero_division:
                zero = builder.fcmp_ordered("==", widen(context, builder, args[1]), FLOAT(0.0))
                with builder.if_then(zero, likely=False):
                    context.error_model.fp_zero_division(builder, ("division by zero",))
            return emit_arithmetic(context, builder, op, *args)

        return emit

    def comparison(op):
        return lambda context, builder, sig, args: emit_comparison(context, builder, op, *args)

    for name, op in _ARITHMETIC.items():
        for function in (getattr(operator, name), getattr(operator, "i" + name)):
            _add_signature(function, f16(f16, f16))
            lower_builtin(function, f16, f16)(arithmetic(op))
    for name, op in _COMPARISONS.items():
        _add_signature(getattr(operator, name), types.boolean(f16, f16))
        lower_builtin(getattr(operator, name), f16, f16)(comparison(op))
    for function in (abs, operator.neg, operator.pos):
        _add_signature(function, f16(f16))
    lower_builtin(abs, f16)(lambda context, builder, sig, args: emit_sign(builder, "and_", args[0]))
    lower_builtin(operator.neg, f16)(lambda context, builder, sig, args: emit_sign(builder, "xor", args[0]))
    lower_builtin(operator.pos, f16)(lambda context, builder, sig, args: args[0])


_register_operators()


@infer_global(float)
class _FloatOfHalf(AbstractTemplate):
    """float(x) of a float16 stays a float16, as float(x) of a float32 stays a float32."""

    def generic(self, args, kws):
        return signature(f16, f16) if args == (f16,) and not kws else None


lowering.install()
