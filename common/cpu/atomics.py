"""Atomic operations on arrays, with the meaning they have in numba-cuda (0.30).

`ATOMIC` maps the names under `cuda.atomic` to true atomic operations, for arrays that several CPU threads touch;
`BLOCK_ATOMIC` maps them to plain load, compute and store, for arrays that one CPU thread owns (the shared memory of a
block that runs on one thread).  Both take `(ary, idx, val)` and return the **old** element, in the array's dtype;
`val` is cast to that dtype first.  `idx` is an integer for a one-dimensional array, a tuple of integers otherwise;
negative indices count from the end.  `cas` takes `(ary, idx, old, val)`, `compare_and_swap` `(ary, old, val)` and
works on element 0.

==================  ==============================================  ==================================================
operation           dtypes                                          new element
==================  ==============================================  ==================================================
add, sub            int32, uint32, int64, uint64, float32, float64  old + val, old - val
max, min            the same                                        the larger, smaller; unchanged if either is nan
nanmax, nanmin      the same                                        the larger, smaller; a nan loses against a number
and_, or_, xor      int32, uint32, int64, uint64                    bitwise
exch                int32, uint32, int64, uint64                    val
cas                 int32, uint32, int64, uint64                    val if the element equals old
inc                 uint32, uint64                                  0 if old >= val else old + 1
dec                 uint32, uint64                                  val if old == 0 or old > val else old - 1
==================  ==============================================  ==================================================

Another dtype (float16, for one) or a float index is a Numba TypingError that names it.  All operations are sequentially
consistent: a lock built of `cas` and `exch` works on the CPU also where the kernel forgot its `threadfence`.
"""

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

_INTEGERS = (types.int32, types.uint32, types.int64, types.uint64)
_UNSIGNED = (types.uint32, types.uint64)
_NUMBERS = (*_INTEGERS, types.float32, types.float64)
_ORDERING = "seq_cst"


# --- element access -------------------------------------------------------------------------------------------------


def _check_access(name, ary, idx, dtypes, writes=True):
    """Refuse what numba-cuda refuses; returns the index type to cast to."""
    if not isinstance(ary, types.Array):
        raise TypingError(f"{name}: the first argument must be an array, not {ary}")
    if dtypes is not None and ary.dtype not in dtypes:
        raise TypingError(f"{name} does not support {ary.dtype} arrays; use one of {', '.join(map(str, dtypes))}")
    if writes and not ary.mutable:
        raise TypingError(f"{name}: the array is read-only; pass one that may be written")
    if isinstance(idx, types.Integer) and ary.ndim == 1:
        return types.intp
    if isinstance(idx, types.BaseTuple) and len(idx) == ary.ndim > 1 and all(isinstance(i, types.Integer) for i in idx):
        return types.UniTuple(types.intp, ary.ndim)
    wanted = "an integer" if ary.ndim == 1 else f"a tuple of {ary.ndim} integers"
    raise TypingError(f"{name}: the index of a {ary.ndim}-dimensional array must be {wanted}, not {idx}")


def _element_pointer(context, builder, sig, args):
    """Pointer to ary[idx]; `sig.args` and `args` start with the array and the index."""
    indices = [args[1]] if sig.args[1] == types.intp else cgutils.unpack_tuple(builder, args[1])
    ary = context.make_array(sig.args[0])(context, builder, args[0])
    return cgutils.get_item_pointer(context, builder, sig.args[0], ary, indices, wraparound=True)


# --- the new element ------------------------------------------------------------------------------------------------
# Each function writes the code for the new element, given the old one and the operand; `ty` is the dtype.


def _is_float(ty):
    return isinstance(ty, types.Float)


def _compare(builder, ty, op, a, b):
    if _is_float(ty):
        return builder.fcmp_ordered(op, a, b)
    return (builder.icmp_signed if ty.signed else builder.icmp_unsigned)(op, a, b)


def _extremum(op):
    def new(builder, ty, old, val):
        return builder.select(_compare(builder, ty, op, val, old), val, old)  # false if either is nan

    return new


def _nan_extremum(op):
    def new(builder, ty, old, val):
        replace = _compare(builder, ty, op, val, old)
        if _is_float(ty):
            replace = builder.or_(replace, builder.fcmp_unordered("uno", old, old))
        return builder.select(replace, val, old)

    return new


def _plain(float_op, int_op):
    return lambda builder, ty, old, val: getattr(builder, float_op if _is_float(ty) else int_op)(old, val)


def _inc(builder, ty, old, val):
    one, zero = ir.Constant(old.type, 1), ir.Constant(old.type, 0)
    return builder.select(builder.icmp_unsigned("<", old, val), builder.add(old, one), zero)


def _dec(builder, ty, old, val):
    less = builder.sub(old, ir.Constant(old.type, 1))  # 0 becomes the largest number
    return builder.select(builder.icmp_unsigned("<", less, val), less, val)


# name -> (dtypes, new element, LLVM's own atomic instruction for integers, ... for floats; None: compare-and-swap loop)
_OPERATIONS = {
    "add": (_NUMBERS, _plain("fadd", "add"), "add", "fadd"),
    "sub": (_NUMBERS, _plain("fsub", "sub"), "sub", "fsub"),
    "max": (_NUMBERS, _extremum(">"), "max", None),
    "min": (_NUMBERS, _extremum("<"), "min", None),
    "nanmax": (_NUMBERS, _nan_extremum(">"), "max", None),
    "nanmin": (_NUMBERS, _nan_extremum("<"), "min", None),
    "and_": (_INTEGERS, _plain("", "and_"), "and", None),
    "or_": (_INTEGERS, _plain("", "or_"), "or", None),
    "xor": (_INTEGERS, _plain("", "xor"), "xor", None),
    "exch": (_INTEGERS, lambda builder, ty, old, val: val, "xchg", None),
    "inc": (_UNSIGNED, _inc, None, None),
    "dec": (_UNSIGNED, _dec, None, None),
}


def _as_integer_pointer(builder, ptr):
    """The pointer as one to integers of the element's width, on which compare-and-swap works."""
    width = {ir.FloatType(): 32, ir.DoubleType(): 64}.get(ptr.type.pointee) or ptr.type.pointee.width
    return builder.bitcast(ptr, ir.PointerType(ir.IntType(width))), ir.IntType(width)


def _swap_loop(builder, ptr, compute):
    """old = *ptr; *ptr = compute(old), atomically, by compare-and-swap; returns old.  No store if nothing changes."""
    element = ptr.type.pointee
    ptr, bits = _as_integer_pointer(builder, ptr)
    first = builder.load_atomic(ptr, _ORDERING, bits.width // 8)
    entry = builder.basic_block
    attempt, store, done = (builder.append_basic_block(f"atomic.{name}") for name in ("attempt", "store", "done"))
    builder.branch(attempt)

    builder.position_at_end(attempt)
    old = builder.phi(bits)
    old.add_incoming(first, entry)
    new = builder.bitcast(compute(builder.bitcast(old, element)), bits)
    changed = builder.icmp_unsigned("!=", new, old)
    builder.cbranch(changed, store, done)

    builder.position_at_end(store)
    outcome = builder.cmpxchg(ptr, old, new, _ORDERING, _ORDERING)
    old.add_incoming(builder.extract_value(outcome, 0), store)
    builder.cbranch(builder.extract_value(outcome, 1), done, attempt)

    builder.position_at_end(done)
    return builder.bitcast(old, element)


def _update(name, atomic):
    """The intrinsic (ary, idx, val) for one row of `_OPERATIONS`."""
    dtypes, new, int_instruction, float_instruction = _OPERATIONS[name]

    def emit(context, builder, sig, args):
        ty, val = sig.return_type, args[2]
        ptr = _element_pointer(context, builder, sig, args)
        if not atomic:
            old = builder.load(ptr)
            builder.store(new(builder, ty, old, val), ptr)
            return old
        instruction = float_instruction if _is_float(ty) else int_instruction
        if instruction is None:
            return _swap_loop(builder, ptr, lambda old: new(builder, ty, old, val))
        if instruction in ("max", "min") and not ty.signed:
            instruction = "u" + instruction
        return builder.atomic_rmw(instruction, ptr, val, _ORDERING)

    def function(typingctx, ary, idx, val):
        index = _check_access(f"atomic.{name}", ary, idx, dtypes)
        if not isinstance(val, (types.Number, types.Boolean)):
            raise TypingError(f"atomic.{name}: the value must be a number, not {val}")
        return ary.dtype(ary, index, ary.dtype), emit

    return _named(function, name, atomic)


def _named(function, name, atomic):
    function.__name__ = function.__qualname__ = ("atomic_" if atomic else "block_") + name.rstrip("_")
    function.__doc__ = f"`cuda.atomic.{name}`" + ("." if atomic else " on an array that this thread owns.")
    return intrinsic(function)


def _emit_cas(builder, ptr, expected, val, atomic):
    if atomic:
        return builder.extract_value(builder.cmpxchg(ptr, expected, val, _ORDERING, _ORDERING), 0)
    old = builder.load(ptr)
    builder.store(builder.select(builder.icmp_unsigned("==", old, expected), val, old), ptr)
    return old


def _cas(atomic):
    def emit(context, builder, sig, args):
        return _emit_cas(builder, _element_pointer(context, builder, sig, args), args[2], args[3], atomic)

    def function(typingctx, ary, idx, old, val):
        index = _check_access("atomic.cas", ary, idx, _INTEGERS)
        return ary.dtype(ary, index, ary.dtype, ary.dtype), emit

    return _named(function, "cas", atomic)


def _compare_and_swap(atomic):
    def emit(context, builder, sig, args):
        pointer_sig = types.void(sig.args[0], types.intp)
        ptr = _element_pointer(context, builder, pointer_sig, [args[0], context.get_constant(types.intp, 0)])
        return _emit_cas(builder, ptr, args[1], args[2], atomic)

    def function(typingctx, ary, old, val):
        if isinstance(ary, types.Array) and ary.ndim != 1:
            raise TypingError(f"atomic.compare_and_swap works on element 0 of a 1-dimensional array; this one has "
                              f"{ary.ndim} dimensions; use atomic.cas(ary, idx, old, val)")
        _check_access("atomic.compare_and_swap", ary, types.intp, _INTEGERS)
        return ary.dtype(ary, ary.dtype, ary.dtype), emit

    return _named(function, "compare_and_swap", atomic)


def _table(atomic):
    return {**{name: _update(name, atomic) for name in _OPERATIONS},
            "cas": _cas(atomic), "compare_and_swap": _compare_and_swap(atomic)}


ATOMIC, BLOCK_ATOMIC = _table(True), _table(False)

atomic_add, atomic_sub, atomic_max, atomic_min, atomic_nanmax, atomic_nanmin, atomic_and, atomic_or, atomic_xor, \
    atomic_exch, atomic_inc, atomic_dec, atomic_cas, atomic_compare_and_swap = ATOMIC.values()
block_add, block_sub, block_max, block_min, block_nanmax, block_nanmin, block_and, block_or, block_xor, \
    block_exch, block_inc, block_dec, block_cas, block_compare_and_swap = BLOCK_ATOMIC.values()


# --- memory order ---------------------------------------------------------------------------------------------------


@intrinsic
def volatile_load(typingctx, ary, idx):
    """ary[idx], read from memory each time: a loop that waits for another thread's store sees it."""
    index = _check_access("volatile_load", ary, idx, None, writes=False)
    if not isinstance(ary.dtype, (types.Integer, types.Float, types.Boolean)):
        raise TypingError(f"volatile_load does not support {ary.dtype} arrays; use an integer, float or boolean array")

    def emit(context, builder, sig, args):
        ptr = _element_pointer(context, builder, sig, args)
        value = builder.load_atomic(ptr, "acquire", context.get_abi_sizeof(ptr.type.pointee))
        return context.data_model_manager[sig.return_type].from_data(builder, value)

    return ary.dtype(ary, index), emit


@intrinsic
def volatile_store(typingctx, ary, idx, val):
    """ary[idx] = val, written at this point, after everything before it."""
    index = _check_access("volatile_store", ary, idx, None)
    if not isinstance(ary.dtype, (types.Integer, types.Float, types.Boolean)):
        raise TypingError(f"volatile_store does not support {ary.dtype} arrays; use an integer, float or boolean array")

    def emit(context, builder, sig, args):
        ptr = _element_pointer(context, builder, sig, args)
        value = context.data_model_manager[sig.args[2]].as_data(builder, args[2])
        builder.store_atomic(value, ptr, "release", context.get_abi_sizeof(ptr.type.pointee))
        return context.get_dummy_value()

    return types.void(ary, index, ary.dtype), emit


@intrinsic
def threadfence(typingctx):
    """Order this thread's memory accesses: none moves across the call."""

    def emit(context, builder, sig, args):
        builder.fence(_ORDERING)
        return context.get_dummy_value()

    return types.void(), emit
