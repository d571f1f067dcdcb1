"""The dispatcher: what ``@cuda.jit`` returns on the CPU backend, and how a launch runs."""

import functools
import itertools
import math
import numbers
import os
import pickle
import threading
import time

import numba
import numpy as np
from numba.core import serialize, types

from ..backend import BackendError
from . import compile as compiling
from . import crash, fresh, guard, machine, runtime
from .arrays import DeviceNDArray, checking
from .device import host_view
from .errors import (
    DivergenceError,
    DivisionError,
    HangError,
    KernelError,
    LaunchError,
    LaunchTypeError,
    OutOfBoundsError,
)
from .signatures import Signatures
from .source import Names, remember
from .streams import IN_ORDER, check_stream
from .team import Team

MAX_THREADS, MAX_BLOCK, MAX_GRID = 1024, (1024, 1024, 64), (2**31 - 1, 65535, 65535)
MAX_DYNAMIC_SHARED = 227 * 1024
SMALL = 16384  # threads of a launch whose cost is not known yet and is tried without the pool
INLINE_SECONDS = 40e-6  # a launch estimated shorter than this is not worth calling other threads for
SLICE = 0.05  # seconds of machine code after which Python comes by, for Ctrl-C; blocks are not cut
MAX_WORKERS = 1024
MOST_KINDS = 1000  # of launches of a kernel whose NumPy arrays are watched, see `Dispatcher._staged`
SMALL_BYTES, SMALL_KINDS = 64 << 10, 64  # NumPy arrays of so few bytes are watched for so many lists of numbers, too

MOST_LASTS = 256  # launches of a kernel that are known again by grid and numbers

_NOTE, _ERR, _NOTHING = crash.NOTE, crash.ERR, np.empty(0, np.uint8)
_NEXT, _PART, _BLOCKS, _CALLED, _NUMBER = range(crash.ERR + 9, crash.ERR + 14)  # see `runtime._claim`
_NUMBERS = {bool, int, float, complex, *np.sctypeDict.values()}

_mine = threading.local()  # `row`: see `crash.Row`; `steps`: see `replay`, while it records
_team = None
_team_lock = threading.Lock()
_trace = None  # a list while a trace is being taken, see common.trace
_sanitizer = None  # the innermost `sanitizer.Session` in force, see common.sanitize


@functools.cache
def workers():
    """Number of threads that run blocks: ``MINI_THREADS``, or the cores this process may use.

    Raises BackendError where the variable is not a whole number in 1 … 1024.
    """
    chosen = os.environ.get("MINI_THREADS", "").strip()
    if not chosen:
        return machine.cpu_count()
    if not (chosen.isascii() and chosen.isdigit() and len(chosen) < 19 and 1 <= int(chosen) <= MAX_WORKERS):
        raise BackendError(
            f"MINI_THREADS={os.environ['MINI_THREADS'][:40]!r} is not a whole number in 1 … {MAX_WORKERS}: set it to "
            f"the number of threads that run blocks, or unset it to use the {machine.cpu_count()} cores of this machine"
        )
    return int(chosen)


if "MINI_THREADS" in os.environ:
    workers()  # a mistake in it is reported at once, not at the first launch


def _helpers():
    """The `Team` of this process; None if there is but one worker."""
    global _team
    if workers() == 1:
        return None
    with _team_lock:
        if _team is None:
            _team = Team(workers() - 1)
        return _team


def _forget_team():
    global _team, _team_lock
    _team, _team_lock = None, threading.Lock()
    _mine.__dict__.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_team)


def dim3(value, what, limits):
    """A launch dimension as three ints. Raises LaunchError for anything a GPU would refuse."""
    if type(value) is int and 1 <= value <= limits[0]:
        return value, 1, 1
    dims = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    whole = all([type(d) is int or isinstance(d, numbers.Integral) for d in dims])
    if not 1 <= len(dims) <= 3 or not whole:
        raise (LaunchError if whole or value is None else LaunchTypeError)(
            f"the {what} is {value!r}; it must be an int or a tuple of 1 to 3 ints",
            fix="kernel[blocks, threads](…), for example kernel[(n + 255) // 256, 256](…): // gives an int, / a float",
        )
    dims = (*map(int, dims), *(1,) * (3 - len(dims)))
    for axis, d, limit in zip("xyz", dims, limits):
        if not 1 <= d <= limit:
            raise LaunchError(
                f"the {what} is {value!r}: {axis} = {d} is not in 1 … {limit}",
                fix="check the arithmetic of the launch (an empty input gives a grid of 0)"
                if d < 1
                else f"at most {limit} fit there; give a thread more than one element, or use another axis",
            )
    return dims


class Dispatcher:
    """A kernel or device function. ``kernel[grid, block, stream, shared_bytes](*args)`` launches it.

    ``py_func``: the Python function. ``inspect_cpu()``: the generated code.
    """

    def __init__(self, function, device=False, signatures=None, debug=False, max_threads=MAX_THREADS):
        self.py_func, self.device, self.debug, self.max_threads = function, device, debug, max_threads
        self.__name__, self.__doc__, self.__module__ = function.__name__, function.__doc__, function.__module__
        self.__qualname__ = function.__qualname__
        self.__wrapped__ = function
        self._names = {}  # types of arguments -> what globals stood for when it was compiled for them first
        remember(function)
        self.explicit = signatures and Signatures(function, signatures, device)
        for signature in self.explicit.all if self.explicit else ():
            names = self._names[signature] = Names()
            compiling.check_types(function, names, signature, device)
        self._compiled = {}
        self._history = {}  # compiled key -> `_History`
        self._lock = threading.RLock()

    @property
    def frozen_names(self):
        """What globals stood for when it was compiled, one `Names` for each list of types."""
        return list(self._names.values())

    def __repr__(self):
        return f"<{'device function' if self.device else 'kernel'} {self.__name__} (CPU backend)>"

    def __reduce__(self):
        if "<locals>" in self.__qualname__:  # made inside a function: there is no name to find it by
            given = self.explicit and self.explicit.given
            return _anew, (serialize.dumps(self.py_func), self.device, given, self.debug, self.max_threads)
        return _by_name, (self.__module__, self.__qualname__)

    def __getitem__(self, launch):
        if not isinstance(launch, tuple) or not 2 <= len(launch) <= 5:
            raise LaunchError(
                f"{self.__name__}[…] takes grid and block, and optionally stream and bytes of shared memory",
                fix=f"{self.__name__}[blocks, threads](…)",
            )
        return self.configure(*launch[:4])

    def configure(self, griddim, blockdim, stream=0, sharedmem=0):
        """The kernel with a launch configuration, to be called with its arguments."""
        if self.device:
            raise LaunchError(f"{self.__name__} is a device function: call it from a kernel, do not launch it")
        grid, block = dim3(griddim, "grid", MAX_GRID), dim3(blockdim, "block", MAX_BLOCK)
        if math.prod(block) > self.max_threads:
            bounded = "" if self.max_threads == MAX_THREADS else f" of {self.__name__}, by its launch_bounds,"
            raise LaunchError(
                f"the block {block} has {math.prod(block)} threads; a block{bounded} has at most {self.max_threads}",
                fix="use a smaller block and more blocks",
            )
        check_stream(stream)
        if sharedmem == 0 and type(sharedmem) is int:
            return _Configured(self, grid, block, 0)
        if not isinstance(sharedmem, numbers.Real) or not 0 <= int(sharedmem) <= MAX_DYNAMIC_SHARED:
            raise LaunchError(f"{sharedmem!r} bytes of dynamic shared memory; a block has 0 to {MAX_DYNAMIC_SHARED}")
        return _Configured(self, grid, block, int(sharedmem))

    def __call__(self, *args):
        if self.device:
            return self.py_func(*args)
        raise LaunchError(
            f"{self.__name__} is a kernel and needs a launch configuration",
            fix=f"{self.__name__}[blocks, threads]({', '.join(['…'] if args else [])})",
        )

    def forall(self, ntasks, tpb=0, stream=0, sharedmem=0):
        """A 1-D launch over ``ntasks`` threads, as numba-cuda's ``forall``: of none, it does nothing."""
        if ntasks < 0:
            raise LaunchError(f"forall of {ntasks} tasks; it takes 0 or more")
        threads = tpb or min(128, self.max_threads)
        return self[-(-ntasks // threads), threads, stream, sharedmem] if ntasks else lambda *args: None

    @property
    def signatures(self):
        """The types that it has been compiled for, or its explicit signatures (as for numba-cuda, tuples of types)."""
        return list(self._names)

    def inspect_cpu(self, block=None):
        """The generated Python code, of the block shape ``block`` or of the latest one compiled, as text."""
        found = [c for key, c in self._compiled.items() if block is None or key[0] == dim3(block, "block", MAX_BLOCK)]
        if not found:
            raise RuntimeError(f"{self.__name__} has not been launched yet; launch it once, then look")
        return found[-1].source

    def recompile(self):
        """Forget what has been compiled: the next launch reads globals anew, as numba-cuda's ``recompile``."""
        explicit = self.explicit.all if self.explicit else ()
        with self._lock:
            self._compiled.clear()
            self._names = {signature: Names() for signature in explicit}

    def compile_for(self, block, args):
        """Compile (or load from disk) for a block shape and sample arguments; returns seconds taken."""
        start = time.perf_counter()
        self._prepare(dim3(block, "block", MAX_BLOCK), [host_view(a) for a in args])
        return time.perf_counter() - start

    def _prepare(self, block, values, check=None):
        signature = None
        if self.explicit:
            values, signature = self.explicit.convert(values)
        kinds, nonneg = [], []
        for v in values:
            if isinstance(v, np.ndarray):
                flags = v.flags
                kinds.append((v.dtype, v.ndim, flags.c_contiguous, flags.writeable))
                nonneg.append(False)
            elif type(v) is int:
                kinds.append(int)
                nonneg.append(v >= 0)
            else:
                kinds.append(type(v))
                nonneg.append(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v >= 0)
        if check is None:
            check = "bounds" if checking() else ""
        key = (block, tuple(kinds), tuple(nonneg), check)
        compiled = self._compiled.get(key)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(key)
                if compiled is None:
                    arg_types = [self._typeof(v, i) for i, v in enumerate(values)]
                    names = self._names.setdefault(signature or tuple(arg_types), Names())
                    compiled = compiling.load(
                        self.py_func, names, block, arg_types, tuple(nonneg), check, self.debug
                    )
                    self._compiled[key] = compiled
        return key, compiled, values

    def _view(self, value, position):
        try:
            return host_view(value)
        except (TypeError, ValueError) as error:
            raise LaunchTypeError(
                f"argument {position + 1} of {self.__name__} (a {type(value).__name__}): {error}",
                fix="pass contiguous NumPy arrays, device arrays, ints and floats",
            ) from None

    def _typeof(self, value, position):
        try:
            kind = numba.typeof(value)
        except (ValueError, TypeError):
            kind = None
        if isinstance(kind, types.Array):
            return kind
        if isinstance(kind, (types.Number, types.Boolean)) or isinstance(kind, types.BaseTuple):
            return kind
        raise LaunchError(
            f"argument {position + 1} of {self.__name__} is a {type(value).__name__}; kernels take arrays and numbers",
            fix="pass NumPy arrays, device arrays, ints and floats",
        )

    def _launch(self, grid, block, shared_bytes, args):
        values, numbers, shapes, canaries = [], [], [], []
        try:
            for a in args:
                if type(a) is DeviceNDArray:
                    values.append(a.host)
                    canaries += a.canaries
                else:
                    value = host_view(a)
                    values.append(value)
                    if isinstance(value, np.ndarray):
                        shapes.append(value.shape)
                        if value.base is not None:
                            canaries += guard.pairs_of(value)
                    else:
                        numbers.append(value if type(value) in _NUMBERS else _Unlike())
        except (TypeError, ValueError):
            values = [self._view(a, i) for i, a in enumerate(args)]
        if _sanitizer is not None:
            return self._watched(grid, block, shared_bytes, values)
        fresh.unwatched_launch()
        key, compiled, values = self._prepare(block, values)
        with IN_ORDER:
            history = self._history.get(key) or self._begin(key, block)
            try:
                row = _mine.row
            except AttributeError:
                row = _mine.row = crash.Row()
            if row.running[_NOTE]:  # a signal handler launches, in the middle of another launch
                row = crash.Row()
            used, staged, what = values, None, (grid, *numbers, *shapes)
            last = history.lasts.get(what)
            alike = last is not None
            if not alike:
                crash.ensure()
                last = _Last(what, grid, numbers, shapes, crash.place(history.note, grid))
                if shapes and key[3] != "bounds":
                    staged = self._staged(history, last, values)
                    if staged is not None:
                        used, canaries = staged.values, canaries + staged.pairs
            if shapes and staged is None and history.suspect is not last:
                crash.suspect(last.place)
                history.suspect = last
            taken = self._run(compiled, history, last, alike, row, block, shared_bytes, used)
            if row.running[_ERR]:
                self._failed(compiled, history, last, row, block, shared_bytes, values, used)
            for read, whole in canaries:
                if read() != whole:
                    self._failed(compiled, history, last, row, block, shared_bytes, values, used)
            if staged is not None:
                staged.copy_back()
                history.watched(last)
            if _trace is not None:
                _trace.append((self, grid, block, taken, values))
            if "steps" in _mine.__dict__:  # see `replay`
                step = self, compiled, history, last, block, shared_bytes, values, canaries
                _mine.steps.append(step if staged is None else None)

    def _watched(self, grid, block, shared_bytes, values):
        """A launch under the sanitizer or for a memory report."""
        crash.ensure()
        row = crash.Row()
        with IN_ORDER:
            row.running[_NOTE] = crash.place(crash.note(self.py_func, block), grid)
            try:
                _sanitizer.launch(self, grid, block, shared_bytes, values)
            finally:
                row.running[_NOTE] = 0
                pages = guard.close_pages()
        if pages:
            raise self._outside(int(row.words[crash.AT]) or pages[0], int(row.words[crash.WROTE]), values, grid, block)

    def _begin(self, key, block):
        return self._history.setdefault(key, _History(crash.note(self.py_func, block)))

    def _run(self, compiled, history, last, alike, row, block, shared_bytes, values):
        """Run all blocks; returns seconds taken. What went wrong stands in the row."""
        gx, gy, gz = last.grid
        blocks = gx * gy * gz
        run, err, running = compiled.run, row.err, row.running

        def work(first, end):
            dynamic = np.empty(shared_bytes, np.uint8) if shared_bytes else _NOTHING
            run(first, end, gx, gy, gz, dynamic, err, *values)

        tried, known = history.tried, last.known if alike else history.known
        small = known * blocks < INLINE_SECONDS or 1 <= tried <= 3 and blocks * math.prod(block) <= SMALL
        helped = False
        running[_NOTE] = last.place
        start = time.perf_counter()
        try:
            if blocks == 1 or alike and (small or workers() == 1) and known * blocks < SLICE:
                work(0, blocks)
            elif small or workers() == 1:
                _run_pieces(work, 0, blocks, 1)
            else:
                helped = True
                if alike and known * blocks < SLICE:
                    call = functools.partial(run, 0, 0, gx, gy, gz, _NOTHING, err, *values)
                    _run_shared((lambda: work(0, 0)) if shared_bytes else call, blocks, row)
                else:
                    _run_parallel(work, blocks, known if alike else None, row)
        except BaseException as error:
            self._broken_off(error, row, values)
        finally:
            running[_NOTE] = 0
        taken = time.perf_counter() - start
        if tried:  # the first run loads machine code: it says nothing about the next
            block_seconds = taken / blocks * (min(workers(), blocks) if helped else 1)
            last.known, history.known = min(last.known, block_seconds), min(history.known, block_seconds)
        history.tried = min(tried + 1, 9)
        if not alike:
            if len(history.lasts) >= MOST_LASTS:
                history.lasts.clear()
            history.lasts[last.what] = last
        return taken

    def _broken_off(self, error, row, values):
        """Raise what came out of a launch, unless the row says it better."""
        if isinstance(error, IndexError) and row.err[0] not in (0, crash.STOPPED):
            return
        _mine.__dict__.pop("row", None)  # it says that the launch is to stop, and others may still look there
        guard.damaged(values)  # the next launch is not to blame
        guard.close_pages()
        if not isinstance(error, (ValueError, ArithmeticError)):
            raise error
        code = self.py_func.__code__  # raised by Numba's own code
        raise KernelError(
            f"a thread of {self.__name__} failed: {error}", code.co_filename, code.co_firstlineno,
            "on a GPU such a thread ends without a word, unless the kernel has debug=True",
        ) from None

    def _staged(self, history, last, values):
        """The arrays of a launch in memory with guards, or None if its NumPy arrays are used where they are.

        Copied are those of the first launch with a grid and shapes; small ones also when whole numbers are new.
        """
        shapes, numbers = last.kind()
        known = history.kinds.get(shapes)
        if known is None or numbers not in known and len(known) < SMALL_KINDS:
            size = guard.size_of(values)
            if 0 < size <= (guard.MAX_STAGED if known is None else SMALL_BYTES):
                return guard.Staged(values)
        return None

    def _failed(self, compiled, history, last, row, block, shared_bytes, given, used):
        """Raise what the row and the canaries say. ``given``: the launch's values, ``used``: with arrays as staged."""
        err, outside, wrote = row.err.copy(), int(row.words[crash.AT]), int(row.words[crash.WROTE])
        row.err[:] = row.words[crash.AT] = 0
        history.lasts.clear()
        history.suspect = None  # the next launch is looked at like a first one
        guard.close_pages()
        written = guard.damaged(used)
        if written is not None and not outside:
            outside, wrote = written, 1
        if not outside:
            self._raise(compiled.sites[err[1]], err, block)
        try:
            self._look_again(last, row, block, shared_bytes, given)
        except (KernelError, MemoryError, IndexError) as error:
            if isinstance(error, OutOfBoundsError):
                where = f"; in the kernel {self.__name__}, grid {last.grid}, block {block}"
                raise OutOfBoundsError(error.what + where, error.filename, error.lineno, error.fix) from None
        raise self._outside(outside, wrote, used, last.grid, block)

    def _outside(self, at, wrote, values, grid, block):
        """The error for an access at an address outside of the arrays. ``wrote``: 1 if it was a write, 0, or -1."""
        verb = {0: "reads", 1: "writes", -1: "reads or writes"}[wrote]
        where = "outside its arrays"
        if position := guard.nearest(values, at):
            k, count, side = position
            name, array = self.py_func.__code__.co_varnames[k], values[k]
            where += f", {count} byte{'s' * (count > 1)} {side} {name} (shape {array.shape}, {array.dtype})"
        return OutOfBoundsError(
            f"the kernel {self.__name__} {verb} {where}; grid {grid}, block {block}",
            self.py_func.__code__.co_filename,
            crash.line_of(self.py_func),
            "run it again with the environment variable MINI_CHECK=1, which names the line, the index and the thread; "
            "then guard the access: if i < n: …",
        )

    def _look_again(self, last, row, block, shared_bytes, given):
        """Run a launch again, on copies, block after block, with each index checked: the error has line and thread."""
        if sum(v.nbytes for v in given if isinstance(v, np.ndarray)) > guard.MAX_STAGED:
            return
        copies = guard.Staged(given, everything=True).values
        _, compiled, copies = self._prepare(block, copies, "bounds")
        err, row.running[_NOTE] = np.zeros(crash.ERR_WORDS, np.int64), last.place

        def work(first, end):
            compiled.run(first, end, *last.grid, np.empty(shared_bytes, np.uint8), err, *copies)

        try:
            _run_pieces(work, 0, math.prod(last.grid), 1)
        except IndexError:
            if err[0] == 0:
                raise
        finally:
            row.running[_NOTE] = row.err[0] = row.words[crash.AT] = 0
            guard.close_pages()
        wraps = err[0] == runtime.OUT_OF_BOUNDS and -err[7] <= err[6] < 0
        if err[0] and not wraps:  # an index that wraps round stays inside
            self._raise(compiled.sites[err[1]], err, block)

    def _raise(self, site, err, block):
        filename, line, what, fix = site
        bx, by, bz, thread = (int(v) for v in err[2:6])
        if thread >= 0:
            tx, ty, tz = thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1])
            who = f"block ({bx}, {by}, {bz}), thread ({tx}, {ty}, {tz})"
        else:
            who = f"block ({bx}, {by}, {bz}), all threads"
        if err[0] == runtime.OUT_OF_BOUNDS:
            index, extent, axis = (int(v) for v in err[6:9])
            negative = " (a negative index wraps round silently without the check, also on a GPU)" if index < 0 else ""
            raise OutOfBoundsError(
                f"{what}: index {index} on axis {axis} is outside 0 … {extent - 1}{negative}; {who}",
                filename,
                line,
                "guard the access: if i < n: …",
            )
        kind = HangError if "gone round" in what else DivisionError if "by zero" in what else DivergenceError
        raise kind(f"{what}; {who}", filename, line, fix)


def _anew(pickled, *options):
    return Dispatcher(pickle.loads(pickled), *options)


def _by_name(module, qualname):
    import importlib

    value = importlib.import_module(module)
    for part in qualname.split("."):
        value = getattr(value, part)
    return value


class _Unlike:
    """Stands for an argument that is not compared with that of the launch before, such as a tuple."""


class _Last:
    """What a launch was like: its grid, its numbers, the shapes of its NumPy arrays; and `what`, all of them.

    place: see `crash.place`; known: least seconds a block.
    """

    __slots__ = ("what", "grid", "numbers", "shapes", "place", "known")

    def __init__(self, what, grid, numbers, shapes, place):
        self.what, self.grid, self.numbers, self.shapes, self.place = what, grid, numbers, shapes, place
        self.known = math.inf

    def kind(self):
        """The launch's grid and shapes, and its whole numbers: two tuples."""
        return (self.grid, *self.shapes), tuple([n for n in self.numbers if isinstance(n, (int, np.integer))])


class _History:
    """What is known from earlier launches of a compiled kernel.

    tried: runs so far; known: least seconds a block, of any; lasts: what -> `_Last`, of many launches; suspect: the
    one that `crash.suspect` had last; note: see `crash.note`; kinds: which launches with NumPy arrays have been
    watched, as grid and shapes: {numbers}, see `Dispatcher._staged`.
    """

    __slots__ = ("tried", "known", "lasts", "suspect", "note", "kinds")

    def __init__(self, note):
        self.tried, self.known, self.lasts, self.suspect, self.note, self.kinds = 0, math.inf, {}, None, note, {}

    def watched(self, last):
        """A launch has been watched, and stayed inside its arrays."""
        shapes, numbers = last.kind()
        if shapes in self.kinds or len(self.kinds) < MOST_KINDS:
            self.kinds.setdefault(shapes, set()).add(numbers)


def _next_size(size, most, seconds):
    """How many blocks to run at a time, after ``size`` took ``seconds``: a `SLICE`, and not much more than before."""
    return max(1, min(most, 8 * size, int(size * SLICE / max(seconds, 1e-9))))


def _run_pieces(work, first, end, size):
    """Blocks in order, ``size`` at a time at first; Python comes by in between. Returns the size for what follows."""
    most, start = end - first, time.perf_counter()
    while first < end:
        last = min(first + size, end)
        work(first, last)
        now = time.perf_counter()
        if last - first == size:
            size = _next_size(size, most, now - start)
        first, start = last, now
    return size


def _run_parallel(work, blocks, known=None, row=None):
    """Blocks in order, in chunks, on all workers; the calling thread works too.

    ``known``: seconds a block, if that is certain. ``row``: the launch's, see `crash.Row`. If an exception comes by,
    such as KeyboardInterrupt, no block begins any more, and those that have begun are waited for.
    """
    count = min(workers(), blocks)
    chunk = max(1, -(-blocks // (count * 8)))
    least = 1 if known is None else _next_size(chunk, chunk, chunk * known)
    starts, stopped = itertools.count(0, chunk), False

    def loop():
        size, before = least, time.perf_counter()
        for first in starts:
            if first >= blocks or stopped:
                return
            if size < chunk:
                size = _run_pieces(work, first, min(first + chunk, blocks), size)
                before = time.perf_counter()
            else:
                work(first, min(first + chunk, blocks))
                now = time.perf_counter()
                if now - before > 2 * SLICE:
                    size = _next_size(chunk, chunk, now - before)
                before = now

    def stop():
        nonlocal stopped
        stopped = True
        if row is not None and not row.err[0]:
            row.err[0] = crash.STOPPED

    _together(loop, row, stop)


def _run_shared(work, blocks, row):
    """Blocks of a short launch, on all workers: ``work()`` by each, which takes blocks until there are none.

    To come back to Python between them would cost more than they take: once weights have gone through the caches, its
    own code is no longer there.
    """
    running, team = row.running, _helpers()
    running[_NEXT], running[_BLOCKS], running[_PART] = 0, blocks, 2 * min(workers(), blocks)

    def begin(number):
        running[_CALLED], running[_NUMBER] = team.called, number

    def stop():
        if not row.err[0]:
            row.err[0] = crash.STOPPED

    try:
        if team is not None and team.lock.acquire(blocking=False):
            try:
                team.run(work, row.first, stop, begin)
            finally:
                team.lock.release()
        else:  # a launch within a launch: nobody is called
            running[_CALLED] = row.words.ctypes.data + 8 * _NUMBER
            work()
    finally:
        running[_PART] = 0


def run_program(program):
    """Run a `native.Program` with every helper that is free; gives what it gives."""
    team = _helpers()
    if team is None or not team.lock.acquire(blocking=False):
        return program.run(None)
    try:
        return program.run(team)
    finally:
        team.lock.release()


def _together(work, row, stop):
    """Call ``work()`` here and in every helper that is free; here only, in a launch within a launch."""
    team = _helpers()
    if team is None or not team.lock.acquire(blocking=False):
        work()
        return
    try:
        team.run(work, row.first if row is not None else 0, stop)
    finally:
        team.lock.release()


class _Configured:
    __slots__ = ("kernel", "grid", "block", "shared_bytes")

    def __init__(self, kernel, grid, block, shared_bytes):
        self.kernel, self.grid, self.block, self.shared_bytes = kernel, grid, block, shared_bytes

    griddim = property(lambda self: self.grid, doc="Blocks along x, y, z.")
    blockdim = property(lambda self: self.block, doc="Threads of a block along x, y, z.")

    def __call__(self, *args):
        self.kernel._launch(self.grid, self.block, self.shared_bytes, args)
