"""Instructions that Numba-CUDA has no name for: 16-byte loads and stores, pairs of float16, tensor-core products.

========================================  ============================================  ===============  =========
function                                  on the GPU                                    moves            needs
========================================  ============================================  ===============  =========
``load_float4(x, i)``                     ``ld.v4.f32``                                 4 float32        any GPU
``store_float4(x, i, a, b, c, d)``        ``st.v4.f32``                                 4 float32        any GPU
``load_half8(x, i)``                      ``ld.v4.u32``                                 8 float16        any GPU
``store_half8(x, i, a, b, c, d)``         ``st.v4.u32``                                 8 float16        any GPU
``load_half2(x, i)``                      ``ld.u32``                                    2 float16        any GPU
``store_half2(x, i, pair)``               ``st.u32``                                    2 float16        any GPU
``pack_half2(low, high)``                 ``cvt.rn.f16.f32`` twice                      registers        any GPU
``unpack_half2(pair)``                    ``cvt.f32.f16`` twice                         registers        any GPU
``mma_m16n8k16(a0 … a3, b0, b1, c0 …)``   ``mma.sync.aligned.m16n8k16 … f32.f16.f16``   registers        sm_80
========================================  ============================================  ===============  =========

A *pair* is two float16 in one uint32, the lower index in the lower half, as they lie in memory. An index is an integer
or, for an array of several dimensions, a tuple of integers. The array is C-contiguous and lies in global or shared
memory: the compiler sees which, and writes ``ld.global`` or ``ld.shared``.

**Alignment is yours to see to**: a load of 16 bytes must start at a multiple of 16 bytes, or a GPU stops with
"misaligned address". An array of its own begins at a multiple of 256 bytes; in a row-major matrix, rows do so too if
their length is a multiple of 4 (float32) or 8 (float16). ``cuda.shared.array(…, alignment=16)`` aligns shared arrays.

Each function has an equivalent for the CPU backend, so that kernels that use it run everywhere.
"""

import numba
import numpy as np
from llvmlite import ir

from . import BACKEND
from .cpu.registry import cpu_equivalent

ON_CPU = BACKEND == "cpu"

if ON_CPU:
    from numba.core import cgutils, types
    from numba.core.errors import TypingError
    from numba.core.typing import signature
    from numba.extending import intrinsic

    from .cpu import half
else:
    from numba.core import types
    from numba.core.errors import TypingError
    from numba.core.typing import signature
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic

F32, U32 = ir.FloatType(), ir.IntType(32)


# --- memory ----------------------------------------------------------------------------------------------------------


def _require(name, array, index, element):
    """Raises TypingError unless ``array[index]`` is an ``element`` of a C-contiguous array."""
    if not isinstance(array, types.Array) or array.dtype != element or array.layout != "C":
        raise TypingError(f"{name} takes a C-contiguous array of {element}, not {array}")
    parts = [index] if isinstance(index, types.Integer) else getattr(index, "types", ())
    if len(parts) != array.ndim or not all(isinstance(part, types.Integer) for part in parts):
        raise TypingError(f"{name}: the index of {array} must be {array.ndim} integer(s), not {index}")


def _address(context, builder, signature, args, word):
    """A pointer of type ``word *`` to ``array[index]``, for the first two arguments."""
    array_type, index_type = signature.args[:2]
    array = context.make_array(array_type)(context, builder, args[0])
    if isinstance(index_type, types.Integer):
        indices, kinds = [args[1]], [index_type]
    else:
        indices, kinds = cgutils.unpack_tuple(builder, args[1]), index_type.types
    indices = [context.cast(builder, i, kind, types.intp) for i, kind in zip(indices, kinds)]
    shape = cgutils.unpack_tuple(builder, array.shape)
    strides = cgutils.unpack_tuple(builder, array.strides)
    place = cgutils.get_item_pointer2(context, builder, array.data, shape, strides, "C", indices)
    return builder.bitcast(place, word.as_pointer())


def _load(context, builder, address, word, count, align):
    """``count`` adjacent words: one vector load on a GPU; on the CPU several, which its vectoriser can take apart."""
    if count == 1 or ON_CPU:
        places = [builder.gep(address, [U32(i)]) for i in range(count)]
        return [builder.load(place, align=align) for place in places]
    vector = builder.load(builder.bitcast(address, ir.VectorType(word, count).as_pointer()), align=16)
    return [builder.extract_element(vector, U32(i)) for i in range(count)]


def _store(context, builder, address, values, align):
    if len(values) == 1 or ON_CPU:
        for i, value in enumerate(values):
            builder.store(value, builder.gep(address, [U32(i)]), align=align)
        return
    kind = ir.VectorType(values[0].type, len(values))
    vector = ir.Constant(kind, ir.Undefined)
    for i, value in enumerate(values):
        vector = builder.insert_element(vector, value, U32(i))
    builder.store(vector, builder.bitcast(address, kind.as_pointer()), align=16)


def _loader(name, array, index, element, word, count):
    """What an intrinsic returns that loads ``count`` words from an array of ``element``."""
    _require(name, array, index, element)
    result = types.UniTuple(word, count) if count > 1 else word

    def codegen(context, builder, sig, args):
        kind = context.get_value_type(word)
        address = _address(context, builder, sig, args, kind)
        words = _load(context, builder, address, kind, count, 4 if not ON_CPU else element.bitwidth // 8)
        return context.make_tuple(builder, result, words) if count > 1 else words[0]

    return signature(result, array, index), codegen


def _storer(name, array, index, values, element, word):
    """What an intrinsic returns that stores ``values`` (converted to ``word``) in an array of ``element``."""
    _require(name, array, index, element)
    if not array.mutable:
        raise TypingError(f"{name}: the array cannot be written to")
    if not all(isinstance(value, types.Number) for value in values):
        raise TypingError(f"{name} stores numbers, not {', '.join(map(str, values))}")

    def codegen(context, builder, sig, args):
        address = _address(context, builder, sig, args, context.get_value_type(word))
        words = [context.cast(builder, a, kind, word) for a, kind in zip(args[2:], sig.args[2:])]
        _store(context, builder, address, words, 4 if not ON_CPU else element.bitwidth // 8)
        return context.get_dummy_value()

    return signature(types.none, array, index, *values), codegen


@intrinsic
def load_float4(typingctx, array, index):
    """``array[index : index + 4]`` as four float32: ``a, b, c, d = load_float4(x, i)``. 16-byte aligned."""
    return _loader("load_float4", array, index, types.float32, types.float32, 4)


@intrinsic
def store_float4(typingctx, array, index, a, b, c, d):
    """``array[index : index + 4] = a, b, c, d`` (float32). 16-byte aligned."""
    return _storer("store_float4", array, index, (a, b, c, d), types.float32, types.float32)


@intrinsic
def load_half8(typingctx, array, index):
    """Eight float16 from ``array[index]`` on, as four pairs (uint32). 16-byte aligned."""
    return _loader("load_half8", array, index, types.float16, types.uint32, 4)


@intrinsic
def store_half8(typingctx, array, index, a, b, c, d):
    """Four pairs (uint32) become eight float16 from ``array[index]`` on. 16-byte aligned."""
    return _storer("store_half8", array, index, (a, b, c, d), types.float16, types.uint32)


@intrinsic
def load_half2(typingctx, array, index):
    """Two float16 from ``array[index]`` on, as a pair (uint32). 4-byte aligned: an even index."""
    return _loader("load_half2", array, index, types.float16, types.uint32, 1)


@intrinsic
def store_half2(typingctx, array, index, pair):
    """A pair (uint32) becomes two float16 from ``array[index]`` on. 4-byte aligned: an even index."""
    return _storer("store_half2", array, index, (pair,), types.float16, types.uint32)


# --- pairs of float16 ------------------------------------------------------------------------------------------------


@intrinsic
def pack_half2(typingctx, low, high):
    """Two numbers, rounded to float32 and then to float16 (to nearest, ties to even), as a pair (uint32)."""
    if not (isinstance(low, types.Number) and isinstance(high, types.Number)):
        raise TypingError(f"pack_half2 takes two numbers, not {low} and {high}")

    def codegen(context, builder, sig, args):
        bits = []
        for value, kind in zip(args, sig.args):
            value = context.cast(builder, value, kind, types.float32)
            value = half.narrow(context, builder, value) if ON_CPU else builder.fptrunc(value, ir.HalfType())
            bits.append(builder.zext(builder.bitcast(value, ir.IntType(16)), U32))
        return builder.or_(bits[0], builder.shl(bits[1], U32(16)))

    return signature(types.uint32, low, high), codegen


@intrinsic
def unpack_half2(typingctx, pair):
    """The two float16 of a pair (uint32) as two float32: ``low, high = unpack_half2(pair)``."""
    if not isinstance(pair, types.Integer):
        raise TypingError(f"unpack_half2 takes a pair (uint32), not {pair}")

    def codegen(context, builder, sig, args):
        pair_bits = context.cast(builder, args[0], sig.args[0], types.uint32)
        values = []
        for bits in (pair_bits, builder.lshr(pair_bits, U32(16))):
            value = builder.bitcast(builder.trunc(bits, ir.IntType(16)), ir.HalfType())
            values.append(half.widen(context, builder, value) if ON_CPU else builder.fpext(value, F32))
        return context.make_tuple(builder, sig.return_type, values)

    return signature(types.UniTuple(types.float32, 2), pair), codegen


# On the CPU these are what they are on a GPU: `intrinsic` above is Numba's for the CPU there, called once a lane.
for _function, _elements in ((load_float4, 4), (store_float4, 4), (load_half8, 8), (store_half8, 8), (load_half2, 2),
                             (store_half2, 2), (pack_half2, 0), (unpack_half2, 0)):  # fmt: skip
    _writes = _function in (store_float4, store_half8, store_half2)
    cpu_equivalent(_function, elements=_elements, writes=_writes)(_function)


# --- tensor cores ----------------------------------------------------------------------------------------------------

MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


@intrinsic
def mma_m16n8k16(typingctx, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """D = A @ B + C on a tensor core, by a whole warp: A (16, 16) and B (16, 8) float16, C and D (16, 8) float32.

    Each lane holds 4 pairs of A, 2 of B and 4 numbers of C, and gets the 4 of D that stand where its C stood. With
    ``group = lane // 4`` and ``two = lane % 4 * 2`` a lane's registers are, as (row, column):

    =========  ==================================  =========  ==================================
    register   elements                            register   elements
    =========  ==================================  =========  ==================================
    ``a0``     A[group,     two : two + 2]         ``b0``     B[two : two + 2,   group]
    ``a1``     A[group + 8, two : two + 2]         ``b1``     B[two + 8 : two + 10, group]
    ``a2``     A[group,     two + 8 : two + 10]    ``c0 c1``  C[group,     two : two + 2]
    ``a3``     A[group + 8, two + 8 : two + 10]    ``c2 c3``  C[group + 8, two : two + 2]
    =========  ==================================  =========  ==================================

    A pair of B runs down a column: where B is stored transposed, (8, 16), it is two neighbours in memory.
    a0 … b1: uint32; c0 … c3: float32; returns four float32. All 32 lanes must call it together. sm_80 or later.
    Source: PTX ISA, section "Matrix Fragments for mma.m16n8k16 with floating point type".
    """
    kinds = (a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
    if not all(isinstance(kind, types.Integer) for kind in kinds[:6]):
        raise TypingError("mma_m16n8k16 takes the pairs of A and B as uint32: see load_half2 and pack_half2")
    if not all(kind == types.float32 for kind in kinds[6:]):
        raise TypingError("mma_m16n8k16 takes and returns C as float32")

    def codegen(context, builder, sig, args):
        wanted = [types.uint32] * 6 + [types.float32] * 4
        args = [context.cast(builder, a, kind, want) for a, kind, want in zip(args, sig.args, wanted)]
        result = ir.LiteralStructType([F32] * 4)
        function = ir.FunctionType(result, [U32] * 6 + [F32] * 4)
        assembly = ir.InlineAsm(function, MMA, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", side_effect=True)
        product = builder.call(assembly, args)
        return context.make_tuple(builder, sig.return_type, [builder.extract_value(product, i) for i in range(4)])

    return signature(types.UniTuple(types.float32, 4), *kinds), codegen


if ON_CPU:
    # A warp at once: each argument is an array of 32, one a lane. The sum of a tensor core runs in an order that is not
    # documented; here it is C + A[:, 0] B[0] + A[:, 1] B[1] + …, each step rounded to float32.

    @cpu_equivalent(mma_m16n8k16, level="warp", returns=("float32",) * 4)
    @numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
    def mma_m16n8k16_on_cpu(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, d0, d1, d2, d3):
        A = np.empty((16, 16), np.float32)
        B = np.empty((16, 8), np.float32)
        D = np.empty((16, 8), np.float32)
        for lane in range(32):
            group, two = lane // 4, lane % 4 * 2
            A[group, two], A[group, two + 1] = unpack_half2(a0[lane])
            A[group + 8, two], A[group + 8, two + 1] = unpack_half2(a1[lane])
            A[group, two + 8], A[group, two + 9] = unpack_half2(a2[lane])
            A[group + 8, two + 8], A[group + 8, two + 9] = unpack_half2(a3[lane])
            B[two, group], B[two + 1, group] = unpack_half2(b0[lane])
            B[two + 8, group], B[two + 9, group] = unpack_half2(b1[lane])
            D[group, two], D[group, two + 1] = c0[lane], c1[lane]
            D[group + 8, two], D[group + 8, two + 1] = c2[lane], c3[lane]
        for row in range(16):
            for k in range(16):
                for column in range(8):
                    D[row, column] += A[row, k] * B[k, column]
        for lane in range(32):
            group, two = lane // 4, lane % 4 * 2
            d0[lane], d1[lane] = D[group, two], D[group, two + 1]
            d2[lane], d3[lane] = D[group + 8, two], D[group + 8, two + 1]
