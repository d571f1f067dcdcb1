"""Launches that follow one another in machine code, on all threads, with no Python between them.

`replay` keeps launches with their arguments. Most take some microseconds, and Python needs as many to get from one to
the next: more, where weights have gone through the caches meanwhile. So a `Program` writes for each launch what a call
needs in the order of the machine (the *record*). `_execute`, in the thread that replays, goes from record to record;
`_attend`, in the helpers of a `team.Team`, waits for launches to help with. They meet at words of memory.

A record is called by the rules of x86-64 outside Windows: six whole numbers and eight floats in registers, all others
in words on the stack. What is on the stack behind the last argument does no harm, so there are a few lengths, and not
one a kernel. Elsewhere there are no programs, and `replay` goes through Python.
"""

import ctypes
import functools
import platform

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from . import crash, machine_code

WORD, LINE = 8, 16  # bytes of a word; words between two that different threads write
INTS, FLOATS = 6, 8  # registers for arguments
LENGTHS = 16, 48, 128, 320  # words on the stack
PLACE, BLOCKS, FUNCTION, LENGTH, FIRST_INT = range(5)  # words of a record; BLOCKS: to share, 0 if one thread runs all
FIRST_FLOAT, FIRST_STACK = FIRST_INT + INTS, FIRST_INT + INTS + FLOATS
STEPS, TABLE, ERROR, NOTE, PART, ROW = range(6)  # words of a program
# Words of a team, a cache line each: the latest job that helpers are called to; the latest that is closed; the job's
# record (0: Python has it), with the address of its error words and the row; whether a program runs. Then for each
# helper: the latest job that it came to, and the latest that it left.
CALLED, CLOSED, JOB, BUSY, SLOTS = (LINE * k for k in range(5))
TURNS = 2000  # looks at a word before others get the processor
IS_HERE = platform.machine().lower() in ("x86_64", "amd64") and platform.system() != "Windows"
_I64, _DOUBLE = ir.IntType(64), ir.DoubleType()


@intrinsic
def _look(typingctx, address):
    """A word that threads share, at an address: all of them see all changes in one order."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", WORD)

    return types.int64(types.int64), codegen


@intrinsic
def _publish(typingctx, address, value):
    """Set such a word."""

    def codegen(context, builder, sig, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", WORD)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _invoke(typingctx, record):
    """Call a record's function; gives its status, 0 if all is well."""

    def codegen(context, builder, sig, args):
        words = builder.inttoptr(args[0], _I64.as_pointer())
        at = lambda k, kind=_I64: builder.load(builder.bitcast(builder.gep(words, [_I64(k)]), kind.as_pointer()))
        result, error = (cgutils.alloca_once(builder, _I64) for _ in range(2))  # where it writes them
        ints = [builder.ptrtoint(result, _I64), builder.ptrtoint(error, _I64)]
        ints += [at(FIRST_INT + k) for k in range(2, INTS)]
        floats = [at(FIRST_FLOAT + k, _DOUBLE) for k in range(FLOATS)]
        length, address = at(LENGTH), at(FUNCTION)
        status = cgutils.alloca_once_value(builder, ir.IntType(32)(0))
        end = builder.append_basic_block("called")
        choice = builder.switch(length, end)
        for count in LENGTHS:
            block = builder.append_basic_block(f"call_{count}")
            choice.add_case(_I64(count), block)
            with builder.goto_block(block):
                kind = ir.FunctionType(ir.IntType(32), [_I64] * INTS + [_DOUBLE] * FLOATS + [_I64] * count)
                stack = [at(FIRST_STACK + k) for k in range(count)]
                function = builder.inttoptr(address, kind.as_pointer())
                builder.store(builder.call(function, [*ints, *floats, *stack]), status)
                builder.branch(end)
        builder.position_at_end(end)
        return builder.sext(builder.load(status), _I64)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(typingctx):
    """Tell the processor that this thread waits for a word."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


_yield = types.ExternalFunction("sched_yield", types.int32())


def _execute(program, team, helpers):
    """Run a program's launches, with so many helpers; gives 0, or the number of the one that failed, from 1."""
    steps, table, error = _look(program), _look(program + TABLE * WORD), _look(program + ERROR * WORD)
    note, part, row = (_look(program + NOTE * WORD), _look(program + PART * WORD), _look(program + ROW * WORD))
    _publish(team + BUSY * WORD, 1)
    failed, job = 0, _look(team + CALLED * WORD)
    for k in range(1, steps + 1):
        record = _look(table + (k - 1) * WORD)
        _publish(note, _look(record))
        blocks = _look(record + BLOCKS * WORD)
        if blocks == 0:
            status = _invoke(record)
        else:
            job += 1
            _publish(error + 9 * WORD, 0)  # see `runtime._claim`
            _publish(error + 11 * WORD, blocks)
            _publish(error + 10 * WORD, part)
            _publish(team + JOB * WORD, record)
            _publish(team + (JOB + 1) * WORD, error)
            _publish(team + (JOB + 2) * WORD, row)
            _publish(team + CALLED * WORD, job)
            status = _invoke(record)
            _publish(team + CLOSED * WORD, job)
            for helper in range(helpers):
                came = team + (SLOTS + 2 * helper * LINE) * WORD
                turns = 0
                while _look(came) == job and _look(came + LINE * WORD) != job:
                    _pause()
                    turns += 1
                    if turns > TURNS:
                        _yield()
            _publish(error + 10 * WORD, 0)
        if status != 0 or _look(error) != 0:
            failed = k
            break
    _publish(team + BUSY * WORD, 0)
    return failed


def _attend(team, came, helping, seen, patience):
    """A helper's wait: help with launches of programs, until there is a job for Python; gives its number, or -1 if
    there is none for so many looks. ``came``: address of its two words. ``helping``: where it says for which row it
    works. ``seen``: the latest job that it has left."""
    left = came + LINE * WORD
    _publish(left, seen)
    turns = 0
    while True:
        job = _look(team + CALLED * WORD)
        if job == seen:
            _pause()
            turns += 1
            if turns > patience:
                if _look(team + BUSY * WORD) == 0:
                    return -1
                _yield()
            continue
        _publish(came, job)  # first say so, then look whether it is too late: the other side does it the other way
        if _look(team + CLOSED * WORD) < job:
            record = _look(team + JOB * WORD)
            if record == 0:
                return job
            _publish(helping, _look(team + (JOB + 2) * WORD))
            error = _look(team + (JOB + 1) * WORD)
            if _invoke(record) != 0 and _look(error) == 0:
                _publish(error, crash.STOPPED)
        _publish(left, job)
        seen, turns = job, 0


def _watch(address, old, turns):
    """Look at a word until it is not ``old``, so many times at most; gives what it is."""
    for _ in range(turns):
        now = _look(address)
        if now != old:
            return now
        _pause()
    return _look(address)


@functools.cache
def loops():
    """``(execute, attend, watch)``: the three as C functions, which are called without Python's lock; None where there
    are none."""
    if not IS_HERE:
        return None
    made = []
    for function, count in (_execute, 3), (_attend, 5), (_watch, 3):
        callback = machine_code.callback(function, types.int64(*[types.int64] * count), optimized=False)
        made.append(ctypes.CFUNCTYPE(*[ctypes.c_int64] * (count + 1))(callback.address))
        _kept.append(callback)
    return tuple(made)


_kept = []  # what machine code lives in


class Program:
    """Launches with fixed arguments, run by machine code. records: of `record`, one a launch. row: the launching
    thread's. workers: threads at most."""

    def __init__(self, records, row, workers):
        self._records = records
        self._table = np.array([record.ctypes.data for record in records], np.int64)
        error, note = row.err.ctypes.data, row.words.ctypes.data + WORD * crash.NOTE
        self._words = np.array([len(records), self._table.ctypes.data, error, note, 2 * workers, row.first], np.int64)
        self._address, self._running = self._words.ctypes.data, row.running
        self._unseen = error + 13 * WORD  # where `runtime._claim` says that a launch has begun; helpers know already
        self._alone = np.zeros(SLOTS, np.int64)  # in place of a team's words

    def run(self, team):
        """Run the launches, with the helpers of a `Team` whose lock the caller holds, or alone: None.

        Gives 0, or the number of the launch that failed, counted from 1.
        """
        self._running[crash.ERR + 12] = self._unseen
        execute, _, _ = loops()
        if team is None:
            return execute(self._address, self._alone.ctypes.data, 0)
        team.wake()
        return execute(self._address, team.address, team.size)


def record(compiled, place, blocks, shared, arguments):
    """What a call of a `compile.Compiled` needs, as an array of words; None where it has no such form.

    place: of the launch, see `crash.place`. shared: do threads share its blocks? arguments: behind the range of blocks.
    """
    address, kinds = compiled.native()
    if address is None:
        return None
    ints, floats, stack = [0, 0], [], []
    for value, kind in zip((0, 0 if shared else blocks, *arguments), kinds):
        words = _words_of(value, kind)
        if words is None:
            return None
        for word, floating in words:
            registers, most = (floats, FLOATS) if floating else (ints, INTS)
            (registers if len(registers) < most else stack).append(word)
    length = next((length for length in LENGTHS if length >= len(stack)), None)
    if length is None:
        return None
    made = np.zeros(FIRST_STACK + length, np.uint64)
    made[:FIRST_INT] = place, blocks if shared else 0, address, length
    made[FIRST_INT : FIRST_INT + len(ints)] = ints
    made[FIRST_FLOAT : FIRST_FLOAT + len(floats)] = floats
    made[FIRST_STACK : FIRST_STACK + len(stack)] = stack
    return made


def _words_of(value, kind):
    """[(word, is it a float's?)] of an argument of a Numba type, as Numba's functions take it; None if not known."""
    whole = lambda number: (int(number) & (1 << 64) - 1, False)
    if isinstance(kind, types.Array):
        facts = 0, 0, value.size, value.itemsize, value.ctypes.data, *value.shape, *value.strides
        return [whole(fact) for fact in facts]
    if isinstance(kind, (types.Integer, types.Boolean)):
        return [whole(value)]
    if kind in (types.float32, types.float64):
        bits = np.float32(value).view(np.uint32) if kind == types.float32 else np.float64(value).view(np.uint64)
        return [(int(bits), True)]
    return None


def layout_of(kinds, context):
    """Whether Numba's functions take arguments of these types as `_words_of` lays them out."""
    expected = []
    for kind in kinds:
        if isinstance(kind, types.Array):
            expected += [False] * (5 + 2 * kind.ndim)
        elif isinstance(kind, (types.Integer, types.Boolean)):
            expected.append(False)
        elif kind in (types.float32, types.float64):
            expected.append(True)
        else:
            return False
    found = context.get_arg_packer(kinds).argument_types
    floating = [isinstance(one, (ir.FloatType, ir.DoubleType)) for one in found]
    known = all(isinstance(one, (ir.FloatType, ir.DoubleType, ir.PointerType, ir.IntType)) for one in found)
    return known and floating == expected
