"""When a kernel touches memory that is not there: an exception where that is possible, and always a word.

Machine code cannot raise, and Python's own handlers run only when it has returned. So the handler below is compiled:
Numba makes a C function of `_on_signal`, and the operating system calls it in the thread that made the mistake.

- An access in the reserved memory round device arrays (see `guard`): a page is lent to the kernel, which goes on to the
  end of its block. The launch then raises an error with the kernel's line.
- Anything else kills the process, as it did before, but a message on the standard error says first which kernel ran,
  and what to do. Handlers that were there before (``faulthandler``) have their turn after it.

Handler and launches share a table of int64 words: a few for all, then a row for each thread that launches kernels,
then two words for each thread that helps. Only Linux on x86-64 and ARM; elsewhere Python's ``faulthandler`` is turned
on, which names the line that launched the kernel.
"""

import ctypes
import faulthandler
import linecache
import mmap
import os
import platform
import signal
import sys
import threading
import warnings

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .errors import LaunchError

PAGE = mmap.PAGESIZE
ROWS, HELPERS, SUSPECTS, LENT, MOST_PLACES = 1024, 1024, 4, 256, 10_000

# Words for all: the arena's first byte and end; is the process dying, and of which thread; pages lent so far; how many
# file descriptors to write to, and which; µs to wait for a notebook; are faults outside of kernels ours to report; the
# next suspect; address of the action that ends a process. Then first words of the parts below.
ARENA, ARENA_END, DYING, SPEAKER, N_LENT, N_FILES, FILES, WAIT, SPEAK, NEXT_SUSPECT = 0, 1, 2, 3, 4, 5, 6, 8, 9, 10
DEFAULT = 11
MOST_WAIT = 400_000  # µs, in which a notebook's other threads carry the message to its cell
LINGER = 20_000  # µs, in which threads of the same launch come here as well, and not to the handlers before this one
OLD = 16  # addresses of the handlers before ours, by number of the signal
REASONS = OLD + 32  # addresses of what a signal means, by its number
TEXTS = REASONS + 32  # addresses of the messages' other parts
SUSPECT = TEXTS + 16  # so many times: a launch's `place`
LENT_PAGES = SUSPECT + SUSPECTS
BUFFER = LENT_PAGES + LENT  # where a message is put together
ROW = BUFFER + 512
# Words of a row. THREAD: pthread_self() of its thread. NOTE: the running launch's `place`, 0 if none runs.
# AT, WROTE: the first access outside, and whether it was a write (-1: not known). ERR: the kernel's `_err`.
THREAD, NOTE, AT, WROTE, ERR, WIDTH = 0, 1, 2, 3, 4, 24
HELPER = ROW + ROWS * WIDTH  # pthread_self(), first word of the row it works for
WORDS = HELPER + 2 * HELPERS
ERR_WORDS = 14  # 9 of a report, and 5 of blocks that threads share: see `runtime._claim`
LEFT = 3  # in `_err[0]`, next to what `runtime` has there: the launch left its arrays
STOPPED = 4  # … it was interrupted

LINUX = sys.platform.startswith("linux") and ctypes.sizeof(ctypes.c_void_p) == 8
MACHINE = platform.machine()
CAN_CATCH = LINUX and MACHINE in ("x86_64", "aarch64")
# Offsets in what the system hands to a handler (siginfo_t, ucontext_t).
CODE, ADDRESS, SENDER = 8, 16, 16
STACK_POINTER, PROGRAM_COUNTER = (160, 168) if MACHINE == "x86_64" else (432, 440)
ERROR_CODE = 192  # x86-64 only: bit 1 says that it was a write
X86 = MACHINE == "x86_64"
SA_SIGINFO, SA_ONSTACK, SA_NODEFER = 4, 0x08000000, 0x40000000
SS_DISABLE = 2
ALTERNATE_STACK = 64 << 10  # bytes: a handler must run though the thread's stack is full

TEXT = (
    "\nKernel by Kernel: the process dies of ",
    " in the kernel ",
    ", grid (",
    ".\n  It most likely left its arrays. Run it again with MINI_CHECK=1, which names the line, the index and the "
    "thread; then guard the access: if i < n: …\n",
    ".\n  Its stack is full: a device function that calls itself without an end, or local arrays that are too large.\n",
    " while no kernel runs. Kernels that ran on NumPy arrays, whose ends are watched only at a first launch:\n",
    "  If one of them wrote outside its arrays, this is what comes of it. Run it again with MINI_CHECK=1, which names "
    "the line, the index and the thread.\n",
    "    ",
    ", ",
    ")",
    "\n",
)
DIES, IN_KERNEL, IN_GRID, LEAVES, STACK_FULL, IDLE, BLAME, INDENT, COMMA, CLOSE, NEWLINE = range(len(TEXT))
REASON = {
    signal.SIGSEGV: "SIGSEGV (an access to memory that is not there)",
    signal.SIGBUS: "SIGBUS (an access to memory that is not there)",
    signal.SIGFPE: "SIGFPE (an integer division without a result)",
    signal.SIGILL: "SIGILL (machine code that is none)",
    signal.SIGABRT: "SIGABRT (a library has stopped it, perhaps for damaged memory)",
}

words = np.zeros(WORDS, np.int64)
_at = words.ctypes.data
_texts = [ctypes.create_string_buffer(text.encode()) for text in (*TEXT, *REASON.values())]
words[TEXTS : TEXTS + len(TEXT)] = [ctypes.addressof(text) for text in _texts[: len(TEXT)]]
for _number, _text in zip(REASON, _texts[len(TEXT) :]):
    words[REASONS + _number] = ctypes.addressof(_text)
_cells = memoryview(words)  # its items are set faster than an array's
_notes, _places, _stacks, _helper_stacks, _old = {}, {}, [], [], {}
_lock = threading.Lock()
_free_rows, _free_helpers = list(range(ROWS - 1, -1, -1)), list(range(HELPERS - 1, -1, -1))
_installed = None  # whether faulthandler was on when our handler was put in; None: not put in


# --- the handler, compiled ------------------------------------------------------------------------------------------


def _memory(kind, store):
    """An intrinsic that loads or stores one value of an LLVM type at an address."""

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, sig, args):
            value = builder.load(builder.inttoptr(args[0], kind.as_pointer()))
            return value if kind.width == 64 else builder.sext(value, ir.IntType(64))

        return types.int64(types.int64), codegen

    @intrinsic
    def save(typingctx, address, value):
        def codegen(context, builder, sig, args):
            value = args[1] if kind.width == 64 else builder.trunc(args[1], kind)
            builder.store(value, builder.inttoptr(args[0], kind.as_pointer()))

        return types.void(types.int64, types.int64), codegen

    return save if store else load


_load, _load32, _load8 = (_memory(ir.IntType(bits), False) for bits in (64, 32, 8))
_store, _store8 = (_memory(ir.IntType(bits), True) for bits in (64, 8))


@intrinsic
def _count(typingctx, address):
    """Add 1 at an address, atomically; gives what was there."""

    def codegen(context, builder, sig, args):
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], word.as_pointer()), word(1), "monotonic")

    return types.int64(types.int64), codegen


_i32, _i64 = types.int32, types.int64
_mmap = types.ExternalFunction("mmap", _i64(_i64, _i64, _i32, _i32, _i32, _i64))
_mprotect = types.ExternalFunction("mprotect", _i32(_i64, _i64, _i32))
_write = types.ExternalFunction("write", _i64(_i32, _i64, _i64))
_sigaction = types.ExternalFunction("sigaction", _i32(_i32, _i64, _i64))
_raise_signal = types.ExternalFunction("raise", _i32(_i32))
_getpid = types.ExternalFunction("getpid", _i32())
_pthread_self = types.ExternalFunction("pthread_self", _i64())
_usleep = types.ExternalFunction("usleep", _i32(_i32))
SEGV, BUS, ABRT = int(signal.SIGSEGV), int(signal.SIGBUS), int(signal.SIGABRT)
READ_WRITE, NONE = mmap.PROT_READ | mmap.PROT_WRITE, 0
NEW_PAGE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED: in the place of what is there
_END = BUFFER * 8 + 512 * 8 - 32


@numba.njit(nogil=True, error_model="numpy")
def _put(table, to, text):
    """Append a C string to the message; gives its new end."""
    while _load8(text) != 0 and to < table + _END:
        _store8(to, _load8(text))
        to, text = to + 1, text + 1
    return to


@numba.njit(nogil=True, error_model="numpy")
def _put_number(table, to, number):
    power = 1
    while number // power >= 10:
        power *= 10
    while power > 0 and to < table + _END:
        _store8(to, 48 + number // power % 10)
        to, power = to + 1, power // 10
    return to


@numba.njit(nogil=True, error_model="numpy")
def _put_kernel(table, to, place):
    """Append a kernel and its grid: four words, the address of its note and the grid's lengths."""
    to = _put(table, to, _load(place))
    to = _put(table, to, _load(table + (TEXTS + IN_GRID) * 8))
    for axis in range(3):
        if axis > 0:
            to = _put(table, to, _load(table + (TEXTS + COMMA) * 8))
        to = _put_number(table, to, _load(place + 8 + axis * 8))
    return _put(table, to, _load(table + (TEXTS + CLOSE) * 8))


@numba.njit(nogil=True, error_model="numpy")
def _row_of(table, thread):
    """Address of the row of the launch that a thread works for; 0 if it works for none."""
    for k in range(ROWS):
        row = table + (ROW + k * WIDTH) * 8
        if _load(row + THREAD * 8) == thread and _load(row + NOTE * 8) != 0:
            return row
    for k in range(HELPERS):
        helper = table + (HELPER + 2 * k) * 8
        if _load(helper) == thread and _load(helper + 8) != 0:
            return table + _load(helper + 8) * 8
    return 0


@numba.njit(nogil=True, error_model="numpy")
def _lend(table, row, address, wrote):
    """Make the page of an access in the arena a usable one, note the access, and let the launch end."""
    page = address & -PAGE
    if _mprotect(page, PAGE, READ_WRITE) != 0:
        return False
    if row != 0 and _load(row + AT * 8) == 0:
        _store(row + WROTE * 8, wrote)
        _store(row + AT * 8, address)
    if row != 0 and _load(row + ERR * 8) == 0:
        _store(row + ERR * 8, LEFT)
    place = table + (LENT_PAGES + _count(table + N_LENT * 8) % LENT) * 8
    before = _load(place)
    _store(place, page)
    if before != 0 and before != page:  # as many as that are lent at a time: a long loop outside takes no memory
        _mmap(before, PAGE, NONE, NEW_PAGE, -1, 0)
    return True


@numba.njit(nogil=True, error_model="numpy")
def _speak(table, signum, row, stack_full):
    """Write the message: on every file, in one piece."""
    first = table + BUFFER * 8
    to = _put(table, first, _load(table + (TEXTS + DIES) * 8))
    to = _put(table, to, _load(table + (REASONS + signum) * 8))
    if row != 0:
        to = _put(table, to, _load(table + (TEXTS + IN_KERNEL) * 8))
        to = _put_kernel(table, to, _load(row + NOTE * 8))
        to = _put(table, to, _load(table + (TEXTS + (STACK_FULL if stack_full else LEAVES)) * 8))
    else:
        to = _put(table, to, _load(table + (TEXTS + IDLE) * 8))
        for k in range(SUSPECTS):
            place = _load(table + (SUSPECT + k) * 8)
            if place != 0:
                to = _put(table, to, _load(table + (TEXTS + INDENT) * 8))
                to = _put_kernel(table, to, place)
                to = _put(table, to, _load(table + (TEXTS + NEWLINE) * 8))
        to = _put(table, to, _load(table + (TEXTS + BLAME) * 8))
    for k in range(_load(table + N_FILES * 8)):
        _write(np.int32(_load(table + (FILES + k) * 8)), first, to - first)
    if _load(table + WAIT * 8) != 0:
        _usleep(np.int32(_load(table + WAIT * 8)))


def _on_signal(table, signum, info, context):
    """Called by the system, in the thread that made the access, with addresses of its structures."""
    code, address, thread = _load32(info + CODE), _load(info + ADDRESS), _pthread_self()
    row = _row_of(table, thread)
    stack, at = _load(context + STACK_POINTER), _load(context + PROGRAM_COUNTER)
    by_access = (signum == SEGV or signum == BUS) and code > 0 and at != address
    full = by_access and stack - (1 << 16) <= address < stack + (1 << 16)
    if by_access and _load(table + ARENA * 8) <= address < _load(table + ARENA_END * 8):
        wrote = (_load(context + ERROR_CODE) >> 1) & 1 if X86 else -1
        if _lend(table, row, address, wrote):
            return
    elif row != 0 and signum != ABRT and code <= 0 and _load32(info + SENDER) == _getpid():
        if _load(table + DYING * 8) == 0:
            return  # `faulthandler`, put before this handler, passes on a signal; the access itself comes again
    if _count(table + DYING * 8) == 0:
        _store(table + SPEAKER * 8, thread)
        if row != 0 or _load(table + SPEAK * 8) != 0 and _load(table + SUSPECT * 8) != 0:
            _speak(table, signum, row, full)
        _usleep(np.int32(LINGER))
        _sigaction(signum, _load(table + (OLD + signum) * 8), 0)
    else:
        if _load(table + SPEAKER * 8) != thread:  # another thread is about to end the process: let it finish
            _usleep(np.int32(2 * MOST_WAIT))
        _sigaction(signum, _load(table + DEFAULT * 8), 0)
    if not by_access:  # nothing repeats it for the handlers before ours
        _raise_signal(signum)


# --- putting it in ---------------------------------------------------------------------------------------------------


class _Action(ctypes.Structure):
    """``struct sigaction`` of glibc and musl on 64-bit Linux."""

    _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ubyte * 128), ("flags", ctypes.c_int),
                ("restorer", ctypes.c_void_p)]  # fmt: skip


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


_libc = ctypes.CDLL(None, use_errno=True)


def _compiled_handler():
    """The address of a C function of a signal's three arguments, which hands the table's address on to `_on_signal`."""
    from . import machine_code  # late: arrays need this module, and not a compiler

    inner = machine_code.callback(_on_signal, types.void(_i64, _i32, _i64, _i64))
    text = f"""
        define void @handler(i32 %signum, i64 %info, i64 %context) {{
            %inner = inttoptr i64 {inner.address} to ptr
            call void %inner(i64 {_at}, i32 %signum, i64 %info, i64 %context)
            ret void
        }}"""
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), machine)
    engine.finalize_object()
    return engine.get_function_address("handler"), (inner, engine)


def ensure():
    """Put the handler in, if it is not there or ``faulthandler`` has been put before it. Cheap if nothing is to do."""
    global _installed, CAN_CATCH
    if _installed is not None and _installed == faulthandler.is_enabled():
        return
    with _lock:
        if _installed is not None and _installed == faulthandler.is_enabled():
            return
        if CAN_CATCH and _installed is None:
            try:
                _old["handler"] = _compiled_handler()
            except Exception as error:
                CAN_CATCH = False
                warnings.warn(f"a kernel that leaves its arrays may end this process: {error}", stacklevel=2)
        if not CAN_CATCH:
            if not faulthandler.is_enabled():
                _enable_faulthandler()
            _installed = faulthandler.is_enabled()
            return
        if _installed is None:
            files = [2]
            copy = getattr(sys.stderr, "_original_stdstream_copy", None)  # a notebook: 2 leads into its cells
            if isinstance(copy, int):
                files.append(copy)
                words[WAIT] = MOST_WAIT
            words[N_FILES], words[FILES : FILES + len(files)] = len(files), files
            _old["default"] = _Action()
            words[DEFAULT] = ctypes.addressof(_old["default"])
        handler = _old["handler"][0]
        speak = True
        for number in REASON:
            action, before = _Action(handler, flags=SA_SIGINFO | SA_ONSTACK | SA_NODEFER), _Action()
            _libc.sigaction(int(number), ctypes.byref(action), ctypes.byref(before))
            if before.handler != handler:
                _old[number] = before
                words[OLD + number] = ctypes.addressof(before)
                speak &= before.handler in (None, 0) or faulthandler.is_enabled()
        words[SPEAK] = speak
        _installed = faulthandler.is_enabled()


def _enable_faulthandler():
    try:
        faulthandler.enable()
    except (OSError, ValueError, AttributeError, RuntimeError):
        pass  # no standard error to write to


def alternate_stack():
    """Give this thread a stack for handlers, if it has none: one that is full cannot run them. Returns its memory."""
    now = _Stack()
    if not CAN_CATCH or _libc.sigaltstack(None, ctypes.byref(now)) or not now.flags & SS_DISABLE:
        return None
    memory = _stacks.pop() if _stacks else ctypes.create_string_buffer(ALTERNATE_STACK)
    _libc.sigaltstack(ctypes.byref(_Stack(ctypes.addressof(memory), 0, ALTERNATE_STACK)), None)
    return memory


def line_of(function):
    """The line of a function's ``def`` (its code begins at the first decorator)."""
    file, first = function.__code__.co_filename, function.__code__.co_firstlineno
    lines = range(first, first + 50)
    return next((n for n in lines if linecache.getline(file, n).lstrip().startswith("def ")), first)


def note(function, block):
    """The address of a C string that names a kernel, its file, the line of its ``def``, and the block."""
    text = f"{function.__name__} ({function.__code__.co_filename}:{line_of(function)}), block {block}"
    if text not in _notes:
        _notes[text] = ctypes.create_string_buffer(text.encode(errors="replace"))
    return ctypes.addressof(_notes[text])


# --- what is running -------------------------------------------------------------------------------------------------


class Row:
    """The row of a thread that launches kernels, until the thread ends. Raises LaunchError where all are taken.

    ``first``: number of its first word; ``err``: the kernel's error array; ``running``: the words, as a memoryview.
    """

    number = stack = None  # where Ctrl-C comes before they are set

    def __init__(self):
        ensure()
        try:
            self.number = _free_rows.pop()
        except IndexError:
            raise LaunchError(f"more than {ROWS} threads launch kernels", fix="use fewer threads") from None
        self.stack = alternate_stack()
        self.first = ROW + self.number * WIDTH
        self.words = words[self.first : self.first + WIDTH]
        self.words[:] = 0
        self.words[THREAD] = threading.get_ident()
        self.running = memoryview(self.words)  # its items are set faster than an array's
        self.err = self.words[ERR : ERR + ERR_WORDS]

    def __del__(self):
        if self.number is None:
            return
        mine = words[ROW + self.number * WIDTH :][:WIDTH]
        if self.stack is not None and mine[THREAD] == threading.get_ident():
            _libc.sigaltstack(ctypes.byref(_Stack(None, SS_DISABLE, 0)), None)
            _stacks.append(self.stack)
        mine[THREAD] = mine[NOTE] = 0
        _free_rows.append(self.number)


def place(kernel_note, grid):
    """The address of four words for the handler: a kernel's `note`, and the grid of a launch."""
    where = _places.get((kernel_note, grid))
    if where is None:
        if len(_places) >= MOST_PLACES:  # they are never freed: a message may need them at any time
            grid = (0, 0, 0)
        where = _places.setdefault((kernel_note, grid), np.array([kernel_note, *grid], np.int64))
    return where.ctypes.data


def suspect(launch):
    """Remember the `place` of a launch on memory whose ends nobody watches: if the process dies later, it is named."""
    if launch not in words[SUSPECT : SUSPECT + SUSPECTS]:
        words[SUSPECT + int(words[NEXT_SUSPECT]) % SUSPECTS] = launch
        words[NEXT_SUSPECT] += 1


def helper():
    """A number for a thread that helps others with their launches; see `helping`."""
    _helper_stacks.append(alternate_stack())
    number = _free_helpers.pop()
    words[HELPER + 2 * number] = threading.get_ident()
    return number


def helping_at(number):
    """The address of the word that `helping` sets."""
    return _at + 8 * (HELPER + 2 * number + 1)


def helping(number, row):
    """The helper works for a row from now on (its first word), or for none (0)."""
    _cells[HELPER + 2 * number + 1] = row


def lent_pages():
    """The pages that the handler has lent since the last call; the caller takes them back."""
    if not words[N_LENT]:
        return []
    pages = [int(page) for page in words[LENT_PAGES : LENT_PAGES + LENT] if page]
    words[LENT_PAGES : LENT_PAGES + LENT] = words[N_LENT] = 0
    return pages


def _after_fork():
    """A forked child runs no kernel yet, and what its parent did is not its own."""
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    words[SUSPECT : SUSPECT + SUSPECTS] = 0
    words[HELPER:] = 0
    for row in range(ROWS):
        words[ROW + row * WIDTH + NOTE] = 0
    _free_helpers[:] = range(HELPERS - 1, -1, -1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
