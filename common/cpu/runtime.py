"""What generated code calls: arrays on the stack, checked indices, error reports, scalar equivalents.

Importing this module also teaches Numba's CPU target float16 and sets one LLVM option: a loop over 16 or 32 lanes
must not be unrolled before the vectoriser has seen it (measured on the 16x16-tiled matmul: 11 against 70 GFLOP/s
on one core).
"""

import math

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from . import half, machine_code
from .atomics import ATOMIC, BLOCK_ATOMIC
from .atomics import volatile_load as _volatile_load
from .libdevice import LIBDEVICE
from .scalars import BUILTIN, CUDA_SCALAR, MATH, round_whole

FP16 = getattr(half, "FP16", None)
if FP16 is None:
    from .halfmath import FP16

llvm.set_option("kernel-by-kernel", "-unroll-full-max-count=8")

OUT_OF_BOUNDS = 2  # kinds of report in _err[0]; 1 is any other error
_U = np.uint64


@intrinsic
def _claim(typingctx, err):
    """``(first, end)`` of the next blocks of a launch that threads share, as its error array has them; empty if none.

    err[9]: the next block. err[10]: which part of those that are left is taken at a time, 0 if blocks are not shared:
    a long piece is a stream of memory, and short ones at the end let all threads be done together. err[11]: how many
    blocks there are. err[12], err[13]: an address, and what to write there, so that other threads come.
    """
    result = types.UniTuple(types.int64, 2)

    def codegen(context, builder, sig, args):
        word = ir.IntType(64)
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        place, part, blocks, called, number = (builder.gep(data, [word(k)]) for k in range(9, 14))
        first = cgutils.alloca_once_value(builder, word(0))
        end = cgutils.alloca_once_value(builder, word(0))
        part = builder.load(part)
        with builder.if_then(builder.icmp_signed(">", part, word(0)), likely=False):
            called = builder.inttoptr(builder.load(called), word.as_pointer())
            builder.store_atomic(builder.load(number), called, "release", 8)
            blocks = builder.load(blocks)
            builder.store(builder.load_atomic(place, "monotonic", 8), first)
            again, done = builder.append_basic_block("take"), builder.append_basic_block("taken")
            builder.branch(again)
            builder.position_at_end(again)
            here = builder.load(first)
            left = builder.sub(blocks, here)
            size = builder.sdiv(left, part)
            size = builder.select(builder.icmp_signed(">", size, word(0)), size, word(1))
            after = builder.add(here, size)
            swapped = builder.cmpxchg(place, here, after, "monotonic", "monotonic")
            builder.store(builder.extract_value(swapped, 0), first)
            builder.store(after, end)
            builder.cbranch(builder.extract_value(swapped, 1), done, again)
            builder.position_at_end(done)
            last = builder.icmp_signed("<", builder.load(end), blocks)
            builder.store(builder.select(last, builder.load(end), blocks), end)
        return context.make_tuple(builder, sig.return_type, [builder.load(first), builder.load(end)])

    return result(err), codegen


@intrinsic(prefer_literal=True)
def _stack(typingctx, shape, dtype):
    """An uninitialised array on the stack: LLVM knows that nothing else points into it, and keeps it in registers."""
    if isinstance(shape, types.BaseTuple):
        dims = tuple(t.literal_value for t in shape.types)
    else:
        dims = (shape.literal_value,)
    element = dtype.dtype
    array = types.Array(element, len(dims), "C")

    def codegen(context, builder, sig, args):
        stored = context.get_data_type(element)
        with builder.goto_entry_block():
            memory = builder.alloca(ir.ArrayType(stored, math.prod(dims)))
            memory.align = 64
        size = context.get_abi_sizeof(stored)
        word = context.get_value_type(types.intp)
        strides, step = [], size
        for d in reversed(dims):
            strides.insert(0, word(step))
            step *= d
        result = context.make_array(array)(context, builder)
        context.populate_array(
            result,
            data=builder.bitcast(memory, result.data.type),
            shape=[word(d) for d in dims],
            strides=strides,
            itemsize=word(size),
            meminfo=None,
        )
        return result._getvalue()

    return array(shape, dtype), codegen


@machine_code.jit()
def _report(err, site, bx, by, bz, thread):
    """Note the first error of a launch."""
    if err[0] == 0:
        err[1], err[2], err[3], err[4], err[5] = site, bx, by, bz, thread
        err[0] = 1


@machine_code.jit()
def _inside(index, extent, axis, err, site, bx, by, bz, thread):
    """``index`` if it is within the array, else report and stop (MINI_CHECK=1)."""
    if index < 0 or index >= extent:
        if err[0] == 0:
            err[1], err[2], err[3], err[4], err[5] = site, bx, by, bz, thread
            err[6], err[7], err[8] = index, extent, axis
            err[0] = 2
        raise IndexError
    return np.intp(index)


@machine_code.jit()
def _nonzero(value, err, site, bx, by, bz, thread):
    """``value`` if it is not zero, else report and stop (``debug=True``)."""
    if value == 0:
        _report(err, site, bx, by, bz, thread)
        raise IndexError
    return value


@machine_code.jit()
def _any(mask):
    found = False
    for lane in range(32):
        found |= mask[lane]
    return found


@machine_code.jit()
def _same(values, lane, mask):
    """Bits of the lanes in ``mask`` that hold the same value as ``lane``."""
    bits = 0
    for other in range(32):
        if (mask >> other) & 1 and values[other] == values[lane]:
            bits |= 1 << other
    return bits


@machine_code.jit()
def _lanemask_lt(lane):
    return np.uint32((1 << lane) - 1)


@machine_code.jit()
def _round_digits(x, digits):
    """``round(x, digits)``, step by step as numba-cuda does it: by way of an int64."""
    if math.isinf(x) or math.isnan(x):
        return x
    if digits >= 0:
        first, second = (10.0 ** (digits - 22), 1e22) if digits > 22 else (10.0**digits, 1.0)
        y = (x * first) * second
        if math.isinf(y):
            return x
    else:
        first, second = 10.0 ** (-digits), 1.0
        y = x / first
    whole = float(round_whole(y))
    if math.fabs(y - whole) == 0.5:
        whole = 2.0 * float(round_whole(y / 2.0))
    return whole / second / first if digits >= 0 else whole * first


_names = {}  # what a generated module finds under which name


def _publish(prefix, table):
    for key, function in table.items():
        _names[f"{prefix}{key.rstrip('_')}"] = function
    return {key: f"{prefix}{key.rstrip('_')}" for key in table}


TABLES = {
    "math": _publish("_m_", MATH),
    "builtin": _publish("_b_", BUILTIN),
    "scalar": {**_publish("_s_", CUDA_SCALAR), "lanemask_lt": "_lanemask_lt"},
    "libdevice": _publish("_l_", LIBDEVICE),
    "fp16": _publish("_h_", FP16),
}
_publish("_atomic_", ATOMIC)
_publish("_block_", BLOCK_ATOMIC)
_names.update(
    _U=_U,
    _stack=_stack,
    _claim=_claim,
    _report=_report,
    _inside=_inside,
    _nonzero=_nonzero,
    _round=round_whole,
    _round_digits=_round_digits,
    _any=_any,
    _same=_same,
    _lanemask_lt=_lanemask_lt,
    _volatile_load=_volatile_load,
    np=np,
    math=math,
    numba=numba,
)
globals().update(_names)
__all__ = list(_names)


def namespace():
    """A fresh copy of the names that generated code may use."""
    return dict(_names)
