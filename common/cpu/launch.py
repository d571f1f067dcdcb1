"""The dispatcher: what ``@cuda.jit`` returns on the CPU backend, and how a launch runs."""

import functools
import itertools
import math
import numbers
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numba.core import types

from . import compile as compiling
from . import fresh, machine, runtime
from .arrays import checking
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
from .streams import check_stream

MAX_THREADS, MAX_BLOCK, MAX_GRID = 1024, (1024, 1024, 64), (2**31 - 1, 65535, 65535)
MAX_DYNAMIC_SHARED = 227 * 1024
SMALL = 16384  # threads of a launch whose cost is not known yet and is tried without the pool
INLINE_SECONDS = 60e-6  # a launch estimated shorter than this is not worth waking other threads for

_pool = None
_pool_lock = threading.Lock()
_trace = None  # a list while a trace is being taken, see common.trace
_sanitizer = None  # the innermost `sanitizer.Session` in force, see common.sanitize


@functools.cache
def workers():
    """Number of threads that run blocks: ``MINI_THREADS``, or the cores this process may use."""
    chosen = os.environ.get("MINI_THREADS")
    return max(1, int(chosen)) if chosen else machine.cpu_count()


def _threads():
    global _pool
    with _pool_lock:
        if _pool is None:
            previous = threading.stack_size(16 << 20)  # arrays of a block live on the stack
            _pool = ThreadPoolExecutor(max(1, workers() - 1), thread_name_prefix="blocks")
            list(_pool.map(lambda _: time.sleep(0.001), range(workers())))
            threading.stack_size(previous)
        return _pool


def _forget_pool():
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def dim3(value, what, limits):
    """A launch dimension as three ints. Raises LaunchError for anything a GPU would refuse."""
    dims = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    whole = all(isinstance(d, numbers.Integral) for d in dims)
    if not 1 <= len(dims) <= 3 or not whole:
        raise (LaunchError if whole or value is None else LaunchTypeError)(
            f"the {what} is {value!r}; it must be an int or a tuple of 1 to 3 ints",
            mend="kernel[blocks, threads](…), for example kernel[(n + 255) // 256, 256](…): // gives an int, / a float",
        )
    dims = (*map(int, dims), *(1,) * (3 - len(dims)))
    for axis, d, limit in zip("xyz", dims, limits):
        if not 1 <= d <= limit:
            raise LaunchError(
                f"the {what} is {value!r}: {axis} = {d} is not in 1 … {limit}",
                mend="check the arithmetic of the launch (an empty input gives a grid of 0)"
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
        self._seconds = {}  # compiled key -> (runs so far, least seconds a block)
        self._lock = threading.RLock()

    @property
    def frozen_names(self):
        """What globals stood for when it was compiled, one `Names` for each list of types."""
        return list(self._names.values())

    def __repr__(self):
        return f"<{'device function' if self.device else 'kernel'} {self.__name__} (CPU backend)>"

    def __reduce__(self):
        return _by_name, (self.__module__, self.__qualname__)

    def __getitem__(self, launch):
        if not isinstance(launch, tuple) or not 2 <= len(launch) <= 5:
            raise LaunchError(
                f"{self.__name__}[…] takes grid and block, and optionally stream and bytes of shared memory",
                mend=f"{self.__name__}[blocks, threads](…)",
            )
        grid, block, stream, shared = (*launch, 0, 0)[:2] + (*launch[2:4], 0, 0)[:2]
        return self.configure(grid, block, stream, shared)

    def configure(self, griddim, blockdim, stream=0, sharedmem=0):
        """The kernel with a launch configuration, to be called with its arguments."""
        if self.device:
            raise LaunchError(f"{self.__name__} is a device function: call it from a kernel, do not launch it")
        grid, block = dim3(griddim, "grid", MAX_GRID), dim3(blockdim, "block", MAX_BLOCK)
        if math.prod(block) > self.max_threads:
            bounded = "" if self.max_threads == MAX_THREADS else f" of {self.__name__}, by its launch_bounds,"
            raise LaunchError(
                f"the block {block} has {math.prod(block)} threads; a block{bounded} has at most {self.max_threads}",
                mend="use a smaller block and more blocks",
            )
        check_stream(stream)
        if not isinstance(sharedmem, numbers.Real) or not 0 <= int(sharedmem) <= MAX_DYNAMIC_SHARED:
            raise LaunchError(f"{sharedmem!r} bytes of dynamic shared memory; a block has 0 to {MAX_DYNAMIC_SHARED}")
        return _Configured(self, grid, block, int(sharedmem))

    def __call__(self, *args):
        if self.device:
            return self.py_func(*args)
        raise LaunchError(
            f"{self.__name__} is a kernel and needs a launch configuration",
            mend=f"{self.__name__}[blocks, threads]({', '.join(['…'] if args else [])})",
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
                kinds.append((v.dtype, v.ndim, v.flags.c_contiguous, v.flags.writeable))
                nonneg.append(False)
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
                mend="pass contiguous NumPy arrays, device arrays, ints and floats",
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
            mend="pass NumPy arrays, device arrays, ints and floats",
        )

    def _launch(self, grid, block, shared_bytes, args):
        try:
            values = [host_view(a) for a in args]
        except (TypeError, ValueError):
            values = [self._view(a, i) for i, a in enumerate(args)]
        if _sanitizer is not None:
            return _sanitizer.launch(self, grid, block, shared_bytes, values)
        fresh.unwatched_launch()
        key, compiled, values = self._prepare(block, values)
        blocks = grid[0] * grid[1] * grid[2]
        err = np.zeros(9, np.int64)
        run = compiled.run

        def work(first, last):
            dynamic = np.empty(shared_bytes, np.uint8)
            run(first, last, grid[0], grid[1], grid[2], dynamic, err, *values)

        start = time.perf_counter()
        try:
            tried, known = self._seconds.get(key, (0, math.inf))
            small = known * blocks < INLINE_SECONDS or 1 <= tried <= 3 and blocks * math.prod(block) <= SMALL
            if blocks == 1 or workers() == 1 or small:
                work(0, blocks)
            else:
                _run_parallel(work, blocks)
        except IndexError:
            if err[0] == 0:
                raise
        except (ValueError, ArithmeticError) as error:  # raised by Numba's own code: a GPU's thread would just end
            code = self.py_func.__code__
            raise KernelError(
                f"a thread of {self.__name__} failed: {error}", code.co_filename, code.co_firstlineno,
                "on a GPU such a thread ends without a word, unless the kernel has debug=True",
            ) from None
        taken = time.perf_counter() - start
        if tried:  # the first run loads machine code: it says nothing about the next
            known = min(known, taken / blocks * (1 if blocks == 1 or small else min(workers(), blocks)))
        self._seconds[key] = min(tried + 1, 9), known
        if err[0]:
            self._raise(compiled.sites[err[1]], err, block)
        if _trace is not None:
            _trace.append((self, grid, block, taken, values))

    def _raise(self, site, err, block):
        filename, line, what, mend = site
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
        raise kind(f"{what}; {who}", filename, line, mend)


def _by_name(module, qualname):
    import importlib

    value = importlib.import_module(module)
    for part in qualname.split("."):
        value = getattr(value, part)
    return value


def _run_parallel(work, blocks):
    """Blocks in order, in chunks, on all workers; the calling thread works too."""
    count = min(workers(), blocks)
    chunk = max(1, -(-blocks // (count * 8)))
    starts = itertools.count(0, chunk)

    def loop():
        for first in starts:
            if first >= blocks:
                return
            work(first, min(first + chunk, blocks))

    pool = _threads()
    others = [pool.submit(loop) for _ in range(count - 1)]
    try:
        loop()
    finally:
        for other in others:
            other.exception()
    for other in others:
        other.result()


class _Configured:
    __slots__ = ("kernel", "grid", "block", "shared_bytes")

    def __init__(self, kernel, grid, block, shared_bytes):
        self.kernel, self.grid, self.block, self.shared_bytes = kernel, grid, block, shared_bytes

    def __call__(self, *args):
        self.kernel._launch(self.grid, self.block, self.shared_bytes, args)
