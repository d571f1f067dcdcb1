"""Instructions that Numba-CUDA has no name for: wide loads and stores, pairs of float16, copies in the background,
tensor cores.

==========================================  ==========================================  ===============  ==============
function                                    on the GPU                                  moves            needs
==========================================  ==========================================  ===============  ==============
``load_float4(x, i)``                       ``ld.v4.f32``                               4 float32        any GPU
``store_float4(x, i, a, b, c, d)``          ``st.v4.f32``                               4 float32        any GPU
``store_float2(x, i, a, b)``                ``st.v2.f32``                               2 float32        any GPU
``load_half8(x, i)``                        ``ld.v4.u32``                               8 float16        any GPU
``store_half8(x, i, a, b, c, d)``           ``st.v4.u32``                               8 float16        any GPU
``load_half2(x, i)``                        ``ld.u32``                                  2 float16        any GPU
``store_half2(x, i, pair)``                 ``st.u32``                                  2 float16        any GPU
``load_float4_once(x, i)``                  ``ld.global.nc.L1::no_allocate.v4.f32``     4 float32        any GPU
``load_half8_once(x, i)``                   ``ld.global.nc.L1::no_allocate.v4.u32``     8 float16        any GPU
``load_half8_now(x, i)``                    ``ld.global.L1::no_allocate.v4.u32``        8 float16        any GPU
``load_half8_if(x, i, inside)``             ``@p ld.global.v4.u32``                     8 float16, or 0  any GPU
``load_float4_if(x, i, inside)``            ``@p ld.global.v4.f32``                     4 float32, or 0  any GPU
``load_half8_once_if(x, i, inside)``        ``@p ld.global.L1::no_allocate.v4.u32``     8 float16, or 0  any GPU
``store_float4_once(x, i, a, b, c, d)``     ``st.global.cs.v4.f32``                     4 float32        any GPU
``store_half8_once(x, i, a, b, c, d)``      ``st.global.cs.v4.u32``                     8 float16        any GPU
``pack_half2(low, high)``                   ``cvt.rn.f16x2.f32``                        registers        any GPU
``unpack_half2(pair)``                      ``cvt.f32.f16`` twice                       registers        any GPU
``add_same(a, b)``                          ``add``                                     registers        any GPU
``exp2_approx(x)``                          ``ex2.approx.ftz.f32``                      registers        any GPU
``cp_async_half8(tile, j, x, i, inside)``   ``cp.async.cg.shared.global``               8 float16        sm_80, or see
``cp_async_float4(tile, j, x, i, inside)``  ``cp.async.cg.shared.global``               4 float32        the same
``cp_async_commit()``                       ``cp.async.commit_group``                   –                below
``cp_async_wait(n)``                        ``cp.async.wait_group n``                   –
``griddep_wait()``                          ``griddepcontrol.wait``                     –                sm_90, or
``griddep_launch()``                        ``griddepcontrol.launch_dependents``        –                nothing
``ldmatrix_x4(tile, j)``                    ``ldmatrix.sync.aligned.m8n8.x4``           4 × 8 × 8        sm_75
``ldmatrix_x4_trans(tile, j)``              ``ldmatrix … .x4.trans``                    4 × 8 × 8        sm_75
``mma_m16n8k8(a0, a1, b0, c0 … c3)``        ``mma.sync.aligned.m16n8k8``                registers        sm_75
``mma_m16n8k16(a0 … a3, b0, b1, c0 … c3)``  ``mma.sync.aligned.m16n8k16``               registers        sm_80, or see
                                                                                                         below
==========================================  ==========================================  ===============  ==============

A *pair* is two float16 in one uint32, the lower index in the lower half, as they lie in memory. An index is an integer
or, for an array of several dimensions, a tuple of integers. The array is C-contiguous and lies in global or shared
memory: the compiler sees which, and writes ``ld.global`` or ``ld.shared``. The ``_once`` functions are for global
memory that nobody reads again soon: they leave the caches to others. ``load_…_once`` also takes for granted that no
thread writes the array while the kernel runs.

**Turing (sm_75)** has tensor cores, but neither the larger product nor copies in the background. There
``mma_m16n8k16`` becomes two ``mma_m16n8k8``, and ``cp_async_half8`` a load and a store, which the thread waits for: a
kernel that is written for sm_80 runs there, slower.

**Alignment is yours to see to**: a load of 16 bytes must start at a multiple of 16 bytes, or a GPU stops with
"misaligned address". An array of its own begins at a multiple of 256 bytes; in a row-major matrix, rows do so too if
their length is a multiple of 4 (float32) or 8 (float16). ``cuda.shared.array(…, alignment=16)`` aligns shared arrays.

Each function has an equivalent for the CPU backend, so that kernels that use it run everywhere.
"""

import math

import numba
import numpy as np
from llvmlite import ir
from numba import cuda

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
    from numba.core.targetconfig import ConfigStack
    from numba.core.typing import signature
    from numba.cuda import cgutils
    from numba.cuda.extending import intrinsic

F32, U32, U64, VOID = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.VoidType()


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
    builder.store(vector, builder.bitcast(address, kind.as_pointer()), align=4 * len(values))


def _assembly(builder, text, constraints, result, arguments):
    """A call of inline PTX: never left out, and kept in order with barriers and other such calls."""
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=True), arguments)


def _pure(builder, text, constraints, result, arguments):
    """A call of inline PTX that only computes: the compiler may move it, or leave it out if nobody uses the result."""
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(function, text, constraints, side_effect=False), arguments)


def _compute_capability():
    """What the kernel at hand is compiled for, such as (8, 0)."""
    return tuple(ConfigStack().top().compute_capability)[:2]


def _load_once(builder, address, word, count, ordered):
    kind, letter = ("f32", "f") if isinstance(word, ir.FloatType) else ("u32", "r")
    text = f"ld.global{'' if ordered else '.nc'}.L1::no_allocate.v4.{kind} {{$0, $1, $2, $3}}, [$4];"
    clobbers = ",~{memory}" if ordered else ""
    loaded = _assembly(builder, text, f"={letter}," * count + "l" + clobbers, ir.LiteralStructType([word] * count),
                       [builder.ptrtoint(address, U64)])  # fmt: skip
    return [builder.extract_value(loaded, i) for i in range(count)]


def _store_once(builder, address, values):
    kind, letter = ("f32", "f") if isinstance(values[0].type, ir.FloatType) else ("u32", "r")
    text = f"st.global.cs.v4.{kind} [$0], {{$1, $2, $3, $4}};"
    _assembly(builder, text, "l" + f",{letter}" * 4 + ",~{memory}", VOID, [builder.ptrtoint(address, U64), *values])


def _loader(name, array, index, element, word, count, once=False, ordered=False):
    """What an intrinsic returns that loads ``count`` words from an array of ``element``."""
    _require(name, array, index, element)
    result = types.UniTuple(word, count) if count > 1 else word

    def codegen(context, builder, sig, args):
        kind = context.get_value_type(word)
        address = _address(context, builder, sig, args, kind)
        if once and not ON_CPU:
            words = _load_once(builder, address, kind, count, ordered)
        else:
            words = _load(context, builder, address, kind, count, 4 if not ON_CPU else element.bitwidth // 8)
        return context.make_tuple(builder, result, words) if count > 1 else words[0]

    return signature(result, array, index), codegen


def _storer(name, array, index, values, element, word, once=False):
    """What an intrinsic returns that stores ``values`` (converted to ``word``) in an array of ``element``."""
    _require(name, array, index, element)
    if not array.mutable:
        raise TypingError(f"{name}: the array cannot be written to")
    if not all(isinstance(value, types.Number) for value in values):
        raise TypingError(f"{name} stores numbers, not {', '.join(map(str, values))}")

    def codegen(context, builder, sig, args):
        address = _address(context, builder, sig, args, context.get_value_type(word))
        words = [context.cast(builder, a, kind, word) for a, kind in zip(args[2:], sig.args[2:])]
        if once and not ON_CPU:
            _store_once(builder, address, words)
        else:
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
def store_float2(typingctx, array, index, a, b):
    """``array[index : index + 2] = a, b`` (float32). 8-byte aligned."""
    return _storer("store_float2", array, index, (a, b), types.float32, types.float32)


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


@intrinsic
def load_float4_once(typingctx, array, index):
    """``load_float4`` of global memory that is read once and written by nobody: past the L1 cache."""
    return _loader("load_float4_once", array, index, types.float32, types.float32, 4, once=True)


@intrinsic
def load_half8_once(typingctx, array, index):
    """``load_half8`` of global memory that is read once and written by nobody: past the L1 cache."""
    return _loader("load_half8_once", array, index, types.float16, types.uint32, 4, once=True)


@intrinsic
def load_half8_now(typingctx, array, index):
    """``load_half8_once`` that begins where it stands, and so may not be put off until after :func:`griddep_wait`.

    The other one a compiler may move: nobody writes the memory, so the order would not matter. The memory may be
    written, too, by whatever is waited for first.
    """
    return _loader("load_half8_now", array, index, types.float16, types.uint32, 4, once=True, ordered=True)


@intrinsic
def store_float4_once(typingctx, array, index, a, b, c, d):
    """``store_float4`` to global memory that nobody reads soon: the first that the L2 cache gives up."""
    return _storer("store_float4_once", array, index, (a, b, c, d), types.float32, types.float32, once=True)


@intrinsic
def store_half8_once(typingctx, array, index, a, b, c, d):
    """``store_half8`` to global memory that nobody reads soon: the first that the L2 cache gives up."""
    return _storer("store_half8_once", array, index, (a, b, c, d), types.float16, types.uint32, once=True)


# --- pairs of float16 ------------------------------------------------------------------------------------------------


@intrinsic
def pack_half2(typingctx, low, high):
    """Two numbers, rounded to float32 and then to float16 (to nearest, ties to even), as a pair (uint32)."""
    if not (isinstance(low, types.Number) and isinstance(high, types.Number)):
        raise TypingError(f"pack_half2 takes two numbers, not {low} and {high}")

    def codegen(context, builder, sig, args):
        values = [context.cast(builder, value, kind, types.float32) for value, kind in zip(args, sig.args)]
        if not ON_CPU and _compute_capability() >= (8, 0):  # its first operand is the high half
            return _pure(builder, "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", U32, values[::-1])
        bits = []
        for value in values:
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


@intrinsic
def add_same(typingctx, a, b):
    """a + b of two numbers of one type, in that type: Numba makes int64 of the sum of two int32.

    A shuffle of an int64 is two shuffles, and a local variable takes two registers.
    """
    if a != b or not isinstance(a, (types.Integer, types.Float)):
        raise TypingError(f"add_same takes two numbers of the same type, not {a} and {b}")

    def codegen(context, builder, sig, args):
        return builder.fadd(*args) if isinstance(a, types.Float) else builder.add(*args)

    return signature(a, a, b), codegen


@intrinsic
def exp2_approx(typingctx, x):
    """2 ** x for a float32, by the GPU's own instruction: right to 2 ^ -22 relative; results below 2 ^ -126 are 0.

    ``math.exp`` is made of this and some ten instructions around it. exp(x) = exp2_approx(x * log2(e)): scale once,
    where a scale is multiplied in anyway. Source: PTX ISA, ``ex2``.
    """
    if x != types.float32:
        raise TypingError(f"exp2_approx takes a float32, not {x}")

    def codegen(context, builder, sig, args):
        if ON_CPU:
            return context.compile_internal(builder, _exp2_on_cpu, sig, args)
        return _pure(builder, "ex2.approx.ftz.f32 $0, $1;", "=f,f", F32, args)

    return signature(types.float32, x), codegen


def _exp2_on_cpu(x):
    if x < np.float32(-126):
        return np.float32(0)
    return np.float32(math.exp(np.float64(x) * 0.6931471805599453))


# On the CPU these are what they are on a GPU: `intrinsic` above is Numba's for the CPU there, called once a lane.
for _function, _elements in ((load_float4, 4), (store_float4, 4), (store_float2, 2), (load_half8, 8), (store_half8, 8),
                             (load_half2, 2), (store_half2, 2), (load_float4_once, 4), (store_float4_once, 4),
                             (load_half8_once, 8), (load_half8_now, 8), (store_half8_once, 8), (pack_half2, 0),
                             (unpack_half2, 0), (add_same, 0), (exp2_approx, 0)):  # fmt: skip
    _writes = _function in (store_float4, store_float2, store_half8, store_half2, store_float4_once, store_half8_once)
    cpu_equivalent(_function, elements=_elements, writes=_writes)(_function)


# --- loads of 16 bytes, or zeros --------------------------------------------------------------------------------------

if ON_CPU:

    @cuda.jit(device=True)
    def load_half8_if(array, index, inside):
        """:func:`load_half8` where ``inside`` is true, else four zeros, without a branch.

        Threads at the edge of a matrix load nothing there, and a compiler that sees no branch keeps all of a thread's
        loads under way at once. ``array[index]`` need not exist where ``inside`` is false. Global memory.
        """
        if inside:
            a, b, c, d = load_half8(array, index)
        else:
            a = b = c = d = np.uint32(0)
        return a, b, c, d

    @cuda.jit(device=True)
    def load_float4_if(array, index, inside):
        """:func:`load_half8_if` for 4 float32."""
        if inside:
            a, b, c, d = load_float4(array, index)
        else:
            a = b = c = d = np.float32(0)
        return a, b, c, d

    load_half8_once_if = load_half8_if  # which caches a load goes past is for a GPU to know

else:

    def _loader_if(name, array, index, inside, element, word, once=False):
        """What an intrinsic returns that loads 16 bytes of global memory, or zeros."""
        _require(name, array, index, element)
        result = types.UniTuple(word, 4)

        def codegen(context, builder, sig, args):
            kind, letter, zero = ("f32", "f", "0f00000000") if word == types.float32 else ("u32", "r", "0")
            address = _address(context, builder, sig, args, context.get_value_type(word))
            here = context.cast(builder, args[2], inside, types.boolean)
            here = builder.zext(builder.icmp_unsigned("!=", here, ir.Constant(here.type, 0)), U32)
            zeros = " ".join(f"mov.{kind} ${i}, {zero};" for i in range(4))
            load = f"ld.global{'.L1::no_allocate' if once else ''}.v4.{kind}"
            text = f"{{ .reg .pred p; setp.ne.u32 p, $5, 0; {zeros} @p {load} {{$0, $1, $2, $3}}, [$4]; }}"
            loaded = _assembly(builder, text, f"=&{letter}," * 4 + "l,r,~{memory}",
                               ir.LiteralStructType([context.get_value_type(word)] * 4),
                               [builder.ptrtoint(address, U64), here])  # fmt: skip
            return context.make_tuple(builder, result, [builder.extract_value(loaded, i) for i in range(4)])

        return signature(result, array, index, inside), codegen

    @intrinsic
    def load_half8_if(typingctx, array, index, inside):
        """Eight float16, or zeros: see the CPU's version above."""
        return _loader_if("load_half8_if", array, index, inside, types.float16, types.uint32)

    @intrinsic
    def load_float4_if(typingctx, array, index, inside):
        """Four float32, or zeros: see the CPU's version above."""
        return _loader_if("load_float4_if", array, index, inside, types.float32, types.float32)

    @intrinsic
    def load_half8_once_if(typingctx, array, index, inside):
        """Eight float16, or zeros, past the L1 cache."""
        return _loader_if("load_half8_once_if", array, index, inside, types.float16, types.uint32, once=True)


# --- copies in the background ----------------------------------------------------------------------------------------

if ON_CPU:

    @cuda.jit(device=True)
    def cp_async_half8(tile, place, array, index, inside):
        """Begin to copy 8 float16 from global to shared memory: tile[place …] = array[index …], or 0 … if not inside.

        The thread does not wait and needs no register for what is under way. Both ends are 16-byte aligned; where
        ``inside`` is false nothing is read, but ``array[index]`` should still name a place. Read the tile after
        :func:`cp_async_wait` (the thread's own copies) and a barrier (everybody's). Source: PTX ISA, ``cp.async``.
        On the CPU backend the copy is done at once: a forgotten wait shows on a GPU only.
        """
        if inside:
            a, b, c, d = load_half8(array, index)
            store_half8(tile, place, a, b, c, d)
        else:
            zero = np.uint32(0)
            store_half8(tile, place, zero, zero, zero, zero)

    @cuda.jit(device=True)
    def cp_async_float4(tile, place, array, index, inside):
        """:func:`cp_async_half8` for 4 float32."""
        if inside:
            a, b, c, d = load_float4(array, index)
            store_float4(tile, place, a, b, c, d)
        else:
            zero = np.float32(0)
            store_float4(tile, place, zero, zero, zero, zero)

else:

    def _copier(name, element, tile, place, array, index, inside):
        """What an intrinsic returns that copies 16 bytes of ``element`` from global to shared memory."""
        _require(name, tile, place, element)
        _require(name, array, index, element)

        def codegen(context, builder, sig, args):
            source = _address(context, builder, signature(types.none, array, index), args[2:4], U32)
            here = context.cast(builder, args[4], inside, types.boolean)
            here = builder.icmp_unsigned("!=", here, ir.Constant(here.type, 0))
            if _compute_capability() >= (8, 0):
                n_bytes = builder.select(here, U32(16), U32(0))
                target = _shared_address(context, builder, tile, place, args[0], args[1])
                arguments = [target, builder.ptrtoint(source, U64), n_bytes]
                text = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
                _assembly(builder, text, "r,l,r,~{memory}", VOID, arguments)
                return context.get_dummy_value()
            target = _address(context, builder, signature(types.none, tile, place), args[:2], U32)
            with builder.if_else(here) as (then, otherwise):
                with then:
                    _store(context, builder, target, _load(context, builder, source, U32, 4, 4), 4)
                with otherwise:
                    _store(context, builder, target, [U32(0)] * 4, 4)
            return context.get_dummy_value()

        return signature(types.none, tile, place, array, index, inside), codegen

    @intrinsic
    def cp_async_half8(typingctx, tile, place, array, index, inside):
        """Begin to copy 8 float16 to shared memory: see the CPU's version above."""
        return _copier("cp_async_half8", types.float16, tile, place, array, index, inside)

    @intrinsic
    def cp_async_float4(typingctx, tile, place, array, index, inside):
        """:func:`cp_async_half8` for 4 float32."""
        return _copier("cp_async_float4", types.float32, tile, place, array, index, inside)


def _order(text, since=(0, 0), kinds=()):
    """What an intrinsic returns that is one instruction without a result; nothing on the CPU, or before ``since``."""

    def codegen(context, builder, sig, args):
        if not ON_CPU and _compute_capability() >= since:
            _assembly(builder, text, "~{memory}", VOID, [])
        return context.get_dummy_value()

    return signature(types.none, *kinds), codegen


def _wait_order(name, instruction, n, since=(0, 0)):
    """:func:`_order` for an instruction that waits for all but the last ``n`` groups, which stands in its text."""
    if not ON_CPU and not isinstance(n, types.IntegerLiteral):
        raise TypingError(f"{name} takes a constant, which stands in the instruction itself")
    return _order(f"{instruction} {getattr(n, 'literal_value', 0)};", since, (n,))


@intrinsic
def cp_async_commit(typingctx):
    """The copies begun since the last call are a group."""
    return _order("cp.async.commit_group;", (8, 0))


@intrinsic
def cp_async_wait(typingctx, n):
    """Wait until all but the thread's last n groups have arrived. n: a constant."""
    return _wait_order("cp_async_wait", "cp.async.wait_group", n, (8, 0))


@intrinsic
def griddep_wait(typingctx):
    """Wait for the kernel launched before this one to end, and see all it wrote.

    A kernel usually begins when the one before has ended. Launched as *dependent* (see ``common.graph``), it begins
    earlier, and may do what does not depend on the other, such as loading weights, until it calls this. A kernel so
    launched must call it, in every thread that reads or writes what others do. Without such a launch, before sm_90 and
    on the CPU backend it does nothing. Source: CUDA Programming Guide, "Programmatic Dependent Launch".
    """
    return _order("griddepcontrol.wait;", (9, 0))


@intrinsic
def griddep_launch(typingctx):
    """The kernel launched after this one may begin, if all blocks have called this or have ended.

    It says nothing about results: the other one waits for them with :func:`griddep_wait`.
    """
    return _order("griddepcontrol.launch_dependents;", (9, 0))


for _function in (cp_async_commit, cp_async_wait, griddep_wait, griddep_launch):
    cpu_equivalent(_function)(_function)


def _shared_address(context, builder, array_type, index_type, array, index):
    """The 32-bit address that instructions on shared memory take, of ``array[index]``, worked out in 32 bits."""
    array = context.make_array(array_type)(context, builder, array)
    data = builder.addrspacecast(array.data, ir.PointerType(array.data.type.pointee, addrspace=3))
    address = builder.ptrtoint(data, U32)
    if isinstance(index_type, types.Integer):
        indices, kinds = [index], [index_type]
    else:
        indices, kinds = cgutils.unpack_tuple(builder, index), index_type.types
    for i, kind, stride in zip(indices, kinds, cgutils.unpack_tuple(builder, array.strides)):
        place = context.cast(builder, i, kind, types.int32)
        address = builder.add(address, builder.mul(place, builder.trunc(stride, U32)))
    return address


# --- tensor cores ----------------------------------------------------------------------------------------------------

MMA_K16 = (
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
MMA_K8 = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};"


def _mma(builder, text, pairs, sums):
    """One product on a tensor core: the four new sums."""
    constraints = ",".join(["=f"] * 4 + ["r"] * len(pairs) + ["f"] * 4)
    product = _assembly(builder, text, constraints, ir.LiteralStructType([F32] * 4), [*pairs, *sums])
    return [builder.extract_value(product, i) for i in range(4)]


def _multiplier(name, n_pairs, kinds, multiply):
    """What an intrinsic returns that takes ``n_pairs`` pairs of A and B and four sums, and gives four sums."""
    if not all(isinstance(kind, types.Integer) for kind in kinds[:n_pairs]):
        raise TypingError(f"{name} takes the pairs of A and B as uint32: see load_half2 and pack_half2")
    if not all(kind == types.float32 for kind in kinds[n_pairs:]):
        raise TypingError(f"{name} takes and returns C as float32")

    def codegen(context, builder, sig, args):
        wanted = [types.uint32] * n_pairs + [types.float32] * 4
        args = [context.cast(builder, a, kind, want) for a, kind, want in zip(args, sig.args, wanted)]
        return context.make_tuple(builder, sig.return_type, multiply(builder, args[:n_pairs], args[n_pairs:]))

    return signature(types.UniTuple(types.float32, 4), *kinds), codegen


@intrinsic
def mma_m16n8k8(typingctx, a0, a1, b0, c0, c1, c2, c3):
    """D = A @ B + C on a tensor core, by a whole warp: A (16, 8) and B (8, 8) float16, C and D (16, 8) float32.

    The lanes hold what :func:`mma_m16n8k16` says, of A's first 8 columns and B's first 8 rows: a0, a1 and b0 there.
    sm_75 or later. Source: PTX ISA, section "Matrix Fragments for mma.m16n8k8".
    """
    return _multiplier("mma_m16n8k8", 3, (a0, a1, b0, c0, c1, c2, c3),
                       lambda builder, pairs, sums: _mma(builder, MMA_K8, pairs, sums))  # fmt: skip


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
    a0 … b1: uint32; c0 … c3: float32; returns four float32. All 32 lanes must call it together. On sm_75 this is two
    :func:`mma_m16n8k8`. Source: PTX ISA, section "Matrix Fragments for mma.m16n8k16 with floating point type".
    """

    def multiply(builder, pairs, sums):
        if _compute_capability() >= (8, 0):
            return _mma(builder, MMA_K16, pairs, sums)
        a0, a1, a2, a3, b0, b1 = pairs
        return _mma(builder, MMA_K8, [a2, a3, b1], _mma(builder, MMA_K8, [a0, a1, b0], sums))

    return _multiplier("mma_m16n8k16", 6, (a0, a1, a2, a3, b0, b1, c0, c1, c2, c3), multiply)


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

    @cpu_equivalent(mma_m16n8k8, level="warp", returns=("float32",) * 4)
    @numba.njit(nogil=True, error_model="numpy")
    def mma_m16n8k8_on_cpu(a0, a1, b0, c0, c1, c2, c3, d0, d1, d2, d3):
        none = np.zeros(32, np.int64)
        mma_m16n8k16_on_cpu(a0, a1, none, none, b0, none, c0, c1, c2, c3, d0, d1, d2, d3)


# --- tensor cores: operands from shared memory -----------------------------------------------------------------------

if ON_CPU:
    # Each lane loads the row that it names; then rows are dealt out as the tensor core wants them.

    @intrinsic
    def _deal(typingctx, w0, w1, w2, w3):
        raise TypingError("_deal runs on the CPU backend, for a warp at once")

    @intrinsic
    def _deal_trans(typingctx, w0, w1, w2, w3):
        raise TypingError("_deal_trans runs on the CPU backend, for a warp at once")

    @cpu_equivalent(_deal, level="warp", returns=("uint32",) * 4)
    @numba.njit(nogil=True, error_model="numpy")
    def _deal_on_cpu(w0, w1, w2, w3, r0, r1, r2, r3):
        for lane in range(32):
            row = lane // 4
            for matrix, out in enumerate((r0, r1, r2, r3)):
                source = 8 * matrix + row
                column = lane % 4
                out[lane] = (w0, w1, w2, w3)[column][source]

    @cpu_equivalent(_deal_trans, level="warp", returns=("uint32",) * 4)
    @numba.njit(nogil=True, error_model="numpy")
    def _deal_trans_on_cpu(w0, w1, w2, w3, r0, r1, r2, r3):
        for lane in range(32):
            column = lane // 4
            for matrix, out in enumerate((r0, r1, r2, r3)):
                words = (w0, w1, w2, w3)[column // 2]
                shift = column % 2 * 16
                first = 8 * matrix + lane % 4 * 2
                low, high = (words[first] >> shift) & 0xFFFF, (words[first + 1] >> shift) & 0xFFFF
                out[lane] = low | high << 16

    @cuda.jit(device=True)
    def ldmatrix_x4(tile, place):
        """Four 8 x 8 matrices of float16 from shared memory, as :func:`mma_m16n8k16` wants them: four pairs a lane.

        Lane l names, as ``tile[place]``, where a row of 8 begins (16-byte aligned): row l % 8 of matrix l // 8. It gets
        from each matrix the pair in row l // 4, columns l % 4 * 2 and the next. So A's registers a0 … a3 come from
        lanes that name A[l % 16, l // 16 * 8]; and b0, b1 of two products side by side, from B stored transposed, from
        lanes that name B.T[l // 16 * 8 + l % 8, l // 8 % 2 * 8]. All 32 lanes must call it together. sm_75 or later.
        Source: PTX ISA, ``ldmatrix``.
        """
        w0, w1, w2, w3 = load_half8(tile, place)
        w0, w1, w2, w3 = _deal(w0, w1, w2, w3)
        return w0, w1, w2, w3

    @cuda.jit(device=True)
    def ldmatrix_x4_trans(tile, place):
        """:func:`ldmatrix_x4` of matrices that lie transposed: rows l % 4 * 2 and the next of column l // 4.

        So b0, b1 of two products side by side come from B as it lies, (K, N), from lanes that name
        B[l % 16, l // 16 * 8].
        """
        w0, w1, w2, w3 = load_half8(tile, place)
        w0, w1, w2, w3 = _deal_trans(w0, w1, w2, w3)
        return w0, w1, w2, w3
else:

    def _matrix_loader(name, tile, place, variant):
        _require(name, tile, place, types.float16)
        result = types.UniTuple(types.uint32, 4)

        def codegen(context, builder, sig, args):
            address = _shared_address(context, builder, tile, place, *args)
            text = f"ldmatrix.sync.aligned.m8n8.x4{variant}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
            loaded = _assembly(builder, text, "=r,=r,=r,=r,r,~{memory}", ir.LiteralStructType([U32] * 4), [address])
            return context.make_tuple(builder, result, [builder.extract_value(loaded, i) for i in range(4)])

        return signature(result, tile, place), codegen

    @intrinsic
    def ldmatrix_x4(typingctx, tile, place):
        """Four 8 x 8 matrices from shared memory, four pairs a lane: see the CPU's version above."""
        return _matrix_loader("ldmatrix_x4", tile, place, "")

    @intrinsic
    def ldmatrix_x4_trans(typingctx, tile, place):
        """:func:`ldmatrix_x4` of matrices that lie transposed: see the CPU's version above."""
        return _matrix_loader("ldmatrix_x4_trans", tile, place, ".trans")
