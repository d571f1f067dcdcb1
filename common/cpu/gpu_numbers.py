"""Casts of floats to integers, and shifts, where C and LLVM leave the result open: as the PTX of a GPU has them.

Read off an H200 with numba-cuda 0.30.4. While a kernel is compiled (see `machine_code.settings`):

- a float outside the range of an integer type becomes the nearest number of the type; NaN becomes 0 where a float32 is
  cast to at most 32 bits, else the number with only the top bit set. Eight bits are the lower half of what 16 bits
  would get, as in a GPU's store to an array; a GPU that goes on computing with the value may see more bits, which the
  sanitizer reports;
- of the number of places to shift by, the lower 32 bits count, without a sign; 64 and more shift everything out.

Other functions that Numba compiles for this process are not touched.
"""

import functools
import operator

from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.cpython import numbers

from . import lowering

active = False  # is a kernel being compiled?

_FLOATS = {types.float32: "f32", types.float64: "f64"}
_INTEGERS = types.int8, types.int16, types.int32, types.int64, types.uint8, types.uint16, types.uint32, types.uint64


def saturated(builder, value, suffix, signed, bits):
    """LLVM code: a float (``suffix``: f32, f64) as an integer of so many bits, as a GPU casts it."""
    wide = max(bits, 16)
    kind, stem = ir.IntType(wide), f"llvm.fpto{'s' if signed else 'u'}i.sat.i{wide}.{suffix}"
    function = builder.module.globals.get(stem) or ir.Function(
        builder.module, ir.FunctionType(kind, [value.type]), stem
    )
    result = builder.call(function, [value])
    if wide == 64 or suffix == "f64":
        nan = builder.fcmp_unordered("uno", value, value)
        result = builder.select(nan, ir.Constant(kind, (1 << wide - 1) * (-1 if signed else 1)), result)
    return builder.trunc(result, ir.IntType(bits)) if bits < wide else result


def _cast(context, builder, fromty, toty, value):
    if not active:
        return numbers.float_to_integer(context, builder, fromty, toty, value)
    return saturated(builder, value, _FLOATS[fromty], toty.signed, toty.bitwidth)


for _float in _FLOATS:
    for _integer in _INTEGERS:
        lowering.lower_cast(_float, _integer)(_cast)


def _places(builder, amount, kind):
    """``(places, are they fewer than the bits)`` of a shift, as a GPU's shift instruction reads its operand."""
    places = builder.zext(builder.trunc(amount, ir.IntType(32)), kind) if kind.width > 32 else amount
    return places, builder.icmp_unsigned("<", places, ir.Constant(kind, kind.width))


def _operands(context, builder, sig, args):
    return [context.cast(builder, value, given, sig.return_type) for value, given in zip(args, sig.args)]


def _shift_left(context, builder, sig, args):
    if not active:
        return numbers.int_shl_impl(context, builder, sig, args)
    value, amount = _operands(context, builder, sig, args)
    places, inside = _places(builder, amount, value.type)
    return builder.select(inside, builder.shl(value, places), ir.Constant(value.type, 0))


def _shift_right(context, builder, sig, args):
    if not active:
        return numbers.int_shr_impl(context, builder, sig, args)
    value, amount = _operands(context, builder, sig, args)
    places, inside = _places(builder, amount, value.type)
    if not sig.return_type.signed:
        return builder.select(inside, builder.lshr(value, places), ir.Constant(value.type, 0))
    return builder.ashr(value, builder.select(inside, places, ir.Constant(value.type, value.type.width - 1)))


_SHIFTS = {numbers.int_shl_impl: _shift_left, numbers.int_shr_impl: _shift_right}


@functools.cache
def install():
    """Put the shifts in the place of Numba's own, which are registered for the same types."""
    lowering.install()
    for shift in (operator.lshift, operator.ilshift, operator.rshift, operator.irshift):
        known = cpu_target.target_context._defns[shift]
        known.versions = [(signature, _SHIFTS.get(code, code)) for signature, code in known.versions]
        known._cache.clear()
