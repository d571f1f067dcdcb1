"""The student's process: loads the student's file, calls what it is asked to, and says what came of it.

    python -m common.grade.worker SOCKET

is the *nursery*: it imports all that a student's file needs, once, and forks a process for each file (`serve`), which
therefore starts in milliseconds. `process.Nursery` talks to it. A student's process gets ``{"function", "args",
"mode"}`` through its connection and answers with ``{"value", "launches", "findings", "looked", "memory", "copied",
"made", "seconds", "refused", "error"}``. Neither references nor checks are in its reach: an audit hook refuses to open
them, to start other programs, processes and threads, and to reach for the network; and what the grader relies on is
looked at after each call, so that code which replaces it is refused as well.
"""

import _thread
import contextlib
import importlib
import importlib.util
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CLOSED = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.kill",
    "os.killpg", "socket.connect", "socket.bind", "socket.sendto", "_thread.start_new_thread",
    "_thread.start_joinable_thread", "ctypes.dlopen", "ctypes.dlsym",
)  # fmt: skip
LISTED = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.link", "os.symlink", "os.chmod",
          "os.truncate", "shutil.copyfile")  # fmt: skip
OURS = ("common", "chapters", "ch14_mini_llm")
WATCHED = (*OURS, "numba.cuda", "numba.cuda.dispatcher", "numba.cuda.cudadrv.devicearray", "numpy", "math",
           "statistics", "builtins", "os", "sys", "io", "json", "struct", "time",
           "multiprocessing.connection")  # fmt: skip
MOST_WRITTEN = 1 << 28  # bytes of a file: printing without an end does not fill the disk
PAGE = struct.Struct("ddd")  # of the clock that grader and worker share: left out, stopped at, is it stopped?

refused = []  # what the student's code was not allowed to do, in words


# --- time ------------------------------------------------------------------------------------------------------------


class Clock:
    """The processor time of this process, compiling left out; the grader reads it while a call runs.

    page: a writable buffer of PAGE.size bytes, shared with the grader.
    """

    def __init__(self, page):
        self.page, self.left_out, self.depth = page, 0.0, 0
        self.write(0.0, 0)

    def write(self, stopped_at, stopped):
        PAGE.pack_into(self.page, 0, self.left_out, stopped_at, stopped)

    def now(self):
        """Seconds."""
        return time.process_time() - self.left_out

    @contextlib.contextmanager
    def stopped(self):
        """What is done within it does not count."""
        self.depth += 1
        if self.depth > 1:
            yield
        else:
            start = time.process_time()
            self.write(start - self.left_out, 1)
            try:
                yield
            finally:
                self.left_out += time.process_time() - start
                self.write(0.0, 0)
        self.depth -= 1

    def leave_out(self, kind, name):
        """Stop for as long as a method runs."""
        original = getattr(kind, name)

        def method(*args, **options):
            with self.stopped():
                return original(*args, **options)

        setattr(kind, name, method)


def compilers():
    """The methods in which kernels are compiled, or loaded from the disk: ``[(class, name), …]``."""
    import common

    if common.BACKEND == "cpu":
        from common.cpu.launch import Dispatcher

        return [(Dispatcher, "_prepare")]
    from numba.cuda.dispatcher import CUDADispatcher

    return [(CUDADispatcher, "compile")]


# --- what the student's code may not do ------------------------------------------------------------------------------


def guard(file):
    """From now on, refuse what a student's file has no business with. It cannot be taken back."""
    own = {os.path.realpath(file), os.path.dirname(os.path.realpath(file))}
    root = str(ROOT) + os.sep
    busy = []

    def is_secret(path):
        path = os.path.realpath(os.fsdecode(path))
        if path in own:
            return False
        if path.startswith("/proc/"):  # another process is the grader's, or none of the student's business
            return path.split("/")[2].isdigit() and int(path.split("/")[2]) != os.getpid()
        if not path.startswith(root):
            return False
        parts = path[len(root) :].split(os.sep)
        if "__pycache__" in parts and parts[-1].split(".")[0] == Path(file).stem:
            return False  # the interpreter looks for a compiled form of the student's own file
        return "exercises" in parts or parts[0] in ("tests", ".git")

    def is_ours():
        """Is it the backend that asks, which compiles in a forked process and has threads for blocks?"""
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if name == str(file):
                return False
            if name.startswith(root) and name != __file__:
                return True
            frame = frame.f_back
        return False

    def hook(event, args):
        if busy or not (event in CLOSED or event in LISTED):
            return
        busy.append(event)  # the hook's own calls do not count
        try:
            if event in CLOSED:
                if is_ours():
                    return
                what = f"tried to start a program or a thread, to end one, or to reach the network ({event})"
            elif isinstance(args[0], (str, bytes, os.PathLike)) and is_secret(args[0]):
                what = f"tried to read {os.path.relpath(os.path.realpath(os.fsdecode(args[0])), ROOT)}"
            else:
                return
        finally:
            busy.clear()
        refused.append(what)
        raise PermissionError(f"not allowed while your code is graded: it {what}")

    sys.addaudithook(hook)


def without_network(families=()):
    """Refuse sockets to this process and all that it starts, by a filter of system calls; True if that could be had.

    families: of sockets that may be made all the same, such as socket.AF_UNIX, which CUDA's driver asks for.
    Needs no privilege, only Linux on x86-64 or ARM64: the filter answers EPERM to ``socket`` and ``io_uring_setup``
    (and ends a process that calls the kernel in another architecture's way). seccomp(2) in Linux' manual has the form.
    """
    numbers = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}.get(os.uname().machine)
    if not sys.platform.startswith("linux") or numbers is None:
        return False
    import ctypes

    architecture, socket_call = numbers
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # BPF: a word of the call's data, two tests, the verdict
    allow, deny, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    program = [  # a test's second and third number: how many steps to leave out if it holds, and if it does not
        (load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, kill),  # x86-64: the numbers of x32
        (equal, 2, 0, socket_call), (equal, 2 + len(families), 0, 425), (answer, 0, 0, allow),
        (load, 0, 0, 16), *((equal, len(families) - i, 0, int(family)) for i, family in enumerate(families)),
        (answer, 0, 0, deny), (answer, 0, 0, allow),
    ]  # fmt: skip
    text = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    whole = Program(len(program), ctypes.addressof(text))
    no_new_privileges, set_seccomp, by_filter = 38, 22, 2
    return not prctl(no_new_privileges, 1, 0, 0, 0) and not prctl(set_seccomp, by_filter, ctypes.addressof(whole), 0, 0)


def relied_on():
    """What the grader relies on, now: {place in words: object}. Functions, classes and modules: data may change."""
    kinds = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)
    places = {}
    for name, module in list(sys.modules.items()):
        if module is None or not (name in WATCHED or name.split(".")[0] in OURS):
            continue
        places[f"sys.modules[{name!r}]"] = module
        for key, value in list(vars(module).items()):
            dispatcher = hasattr(type(value), "py_func") or "py_func" in getattr(value, "__dict__", ())
            if isinstance(value, kinds) or dispatcher:
                places[f"{name}.{key}"] = value
            if dispatcher:
                places[f"{name}.{key}.py_func"] = value.py_func
                places[f"{name}.{key}.py_func.__code__"] = getattr(value.py_func, "__code__", None)
            elif isinstance(value, types.FunctionType):
                places[f"{name}.{key}.__code__"] = value.__code__
            elif isinstance(value, type) and value.__module__ == name:
                for part, inner in list(vars(value).items()):
                    if callable(inner) or isinstance(inner, (property, staticmethod, classmethod)):
                        places[f"{name}.{key}.{part}"] = inner
    return places


def replaced(before):
    """Which of these places hold something else now."""
    now = relied_on()
    return [place for place, value in before.items() if now.get(place) is not value]


def threads():
    """How many threads there are that are not the backend's own, which run blocks."""
    return _thread._count() - sum(thread.name.startswith("blocks") for thread in threading.enumerate())


def misdeeds(tools):
    """What the student's code has done since the last look that it may not, in words."""
    misdeeds = list(refused) + [f"replaced {place}" for place in replaced(tools.originals)[:1]]
    return misdeeds + ["left a thread running"] * (threads() > tools.threads)


# --- calls -----------------------------------------------------------------------------------------------------------


def load(file):
    """The student's file as a module."""
    spec = importlib.util.spec_from_file_location("student_file", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["student_file"] = module
    spec.loader.exec_module(module)
    return module


def where(error, file):
    """``NAME.py:LINE: line`` of the innermost place in the student's file that an error passed through, or "".

    Of an error while a kernel was compiled, it is where the kernel begins, not where it was launched.
    """
    name = Path(file).name
    if getattr(error, "filename", None) and getattr(error, "lineno", None):  # of our backend: the kernel's own line
        return f"{Path(error.filename).name}:{error.lineno}"
    kernel = kernel_in(error, file, {"compile"})  # Numba's
    if kernel is not None:
        return f"{name}:{kernel.co_firstlineno}: kernel {kernel.co_name}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == str(file):
            return f"{name}:{frame.lineno}: {frame.line}"
    return ""


def kernel_in(error, file, methods):
    """The code of the student's kernel that one of these methods of its was at when an error was raised, or None."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = getattr(getattr(frame.f_locals.get("self"), "py_func", None), "__code__", None)
        if frame.f_code.co_name in methods and code is not None and code.co_filename == str(file):
            return code
    return None


def compiling(error, file):
    """The name of the student's kernel that was being compiled when an error was raised, or None."""
    code = kernel_in(error, file, {name for _, name in compilers()})
    return code and code.co_name


def describe(error, file):
    """An exception as a dict: its type, its message, and where in the student's file."""
    try:
        message = str(error).strip()[:2000]
    except Exception:
        message = "(its message cannot be shown)"
    said = {"type": type(error).__name__, "message": message, "where": where(error, file)}
    return said | {"compiling": compiling(error, file)}


def as_dict(launch, file):
    """A launch as a dict; ``arguments`` are numbers, and shapes of arrays."""
    own = launch.kernel.py_func.__code__.co_filename == str(file)
    return {
        "kernel": launch.name, "own": own, "grid": list(launch.grid), "block": list(launch.block),
        "arguments": [list(one) if isinstance(one, tuple) else one for one in launch.arguments],
    }  # fmt: skip


class Uses:
    """``copied``: how many elements have come to the host. ``made``: how many arrays, on the device."""

    def __init__(self):
        from numba import cuda

        self.copied = self.made = 0
        kind = type(cuda.device_array(1))
        copy_to_host = kind.copy_to_host

        def counted(array, *args, **options):
            self.copied += array.size
            return copy_to_host(array, *args, **options)

        kind.copy_to_host = counted  # np.asarray of a device array comes by here as well
        for name in ("device_array", "device_array_like", "to_device", "managed_array", "mapped_array"):
            setattr(cuda, name, self.making(getattr(cuda, name)))

    def making(self, original):
        """A function that makes arrays, and counts them."""
        inside = []

        def make(*args, **options):
            inside.append(None)
            try:
                array = original(*args, **options)
            finally:
                inside.pop()
            given = any(value is array for value in (*args, *options.values()))
            self.made += not inside and not given
            return array

        make.__doc__, make.__name__ = original.__doc__, original.__name__
        return make


def answer(module, file, request, tools):
    """Call a function of the student's module; a dict, see above."""
    refused.clear()
    said = {"value": None, "launches": [], "findings": [], "looked": None, "memory": [], "refused": [], "error": None}
    function = getattr(module, request["function"], None)
    with contextlib.ExitStack() as stack:
        launches = stack.enter_context(tools.trace())
        report = memory = None
        if request["mode"] == "sanitize":
            report = stack.enter_context(tools.sanitize())
        elif request["mode"] == "idle":
            stack.enter_context(idle())
        elif request["mode"] == "memory":
            memory = stack.enter_context(tools.memory_report())
        start, before = tools.clock.now(), (tools.uses.copied, tools.uses.made)
        try:
            said["value"] = function(*request["args"])
        except BaseException as error:
            said["error"] = describe(error, file)
        said["seconds"] = tools.clock.now() - start
        said["copied"], said["made"] = tools.uses.copied - before[0], tools.uses.made - before[1]
    said["launches"] = [as_dict(one, file) for one in launches]
    if report is not None:
        said["findings"] = [{"kind": one.kind, "message": one.message} for one in report.findings]
        said["looked"] = {"launches": report.launches, "accesses": report.accesses, "notices": list(report.notices)}
    if memory is not None:
        said["memory"] = lines_of(memory, file)
    said["refused"] = misdeeds(tools)
    return said


@contextlib.contextmanager
def idle():
    """Within it, launches do nothing: what is right all the same was not computed by a kernel. CPU backend only."""
    from common.cpu import launch

    outer = launch._sanitizer
    launch._sanitizer = types.SimpleNamespace(launch=lambda *facts: None)
    try:
        yield
    finally:
        launch._sanitizer = outer


def lines_of(memory, file):
    """The lines of a memory report as dicts; ``warps``: how many of the launch's first warps took part."""
    names = ("kernel", "line", "array", "space", "access", "requests", "threads", "bytes", "sectors", "ideal_sectors",
             "wavefronts", "ideal_wavefronts")  # fmt: skip
    rows = []
    for one in memory.lines:
        key = one.kernel, one.file, one.line, one.array, one.space, one.access
        warps = len(memory._session.requests.get(key, {}))
        rows.append({name: getattr(one, name) for name in names} | {"warps": warps, "own": one.file == str(file)})
    return rows


def _nothing(x):
    x[0] = 0


def serve(link, file, imports, page):
    """Load a student's file and answer requests, until the connection is closed."""
    from common.grade.wire import pack, unpack

    tools = types.SimpleNamespace(clock=Clock(page), uses=Uses())
    for kind, name in compilers():
        tools.clock.leave_out(kind, name)
    import common
    import common.memory
    import common.trace

    for name in imports:
        with contextlib.suppress(ImportError):  # the student's file says it better
            importlib.import_module(name)
    tools.trace, tools.memory_report = common.trace.trace, common.memory.memory_report
    tools.sanitize = common.sanitize.sanitize if common.BACKEND == "cpu" else None
    from numba import cuda

    cuda.synchronize()
    if common.BACKEND == "gpu":  # the libraries that numba-cuda loads when it compiles: later that would be refused
        cuda.jit(_nothing)[1, 1](cuda.device_array(1))
    tools.originals, tools.threads = relied_on(), threads()
    guard(file)
    module = error = None
    try:
        module = load(file)
    except BaseException as wrong:
        error = describe(wrong, file)
    link.send_bytes(pack({"error": error, "refused": misdeeds(tools)}))
    while True:
        try:
            request = unpack(link.recv_bytes())
        except EOFError:
            return
        said = answer(module, file, request, tools)
        try:
            data = pack(said)
        except Exception as wrong:  # a value that holds itself, or cannot be shown
            data = pack(said | {"value": None, "error": describe(wrong, file)})
        link.send_bytes(data)


# --- the nursery -----------------------------------------------------------------------------------------------------


def start(nursery, order, descriptors):
    """Fork a student's process; its id. descriptors: of the connection, of the file that it prints to, of the clock."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        nursery.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the grader's, which ends this process
        link, output, page = descriptors
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(order["folder"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_WRITTEN, MOST_WRITTEN))
        if order["closed"]:
            resource.setrlimit(resource.RLIMIT_NPROC, (512, 512))
            import common

            without_network([socket.AF_UNIX] if common.BACKEND == "gpu" else [])
        serve(Connection(link), Path(order["file"]), order["imports"], mmap.mmap(page, PAGE.size))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code)


def end(child, patience):
    """End a student's process and all that it has started; its exit code, below 0 for a signal, if it ended by itself.

    patience: seconds that it gets for that.
    """
    deadline = time.monotonic() + patience
    pid = status = 0
    while not pid and time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0 if pid else 0.002)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    if not pid:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def main():
    nursery = socket.socket(fileno=int(sys.argv[1]))
    sys.dont_write_bytecode = True
    import common

    # isort: split
    from numba import cuda

    import common.grade.wire
    import common.memory
    import common.trace

    assert cuda is not None
    if common.BACKEND == "cpu":
        import common.cpu.sanitizer
        import common.sanitize
    children = set()
    with contextlib.suppress(ConnectionError):
        while True:
            data, descriptors, *_ = socket.recv_fds(nursery, 1 << 20, 3)
            if not data:
                break
            order = json.loads(data)
            if "end" in order:
                children.discard(order["end"])
                reply = {"code": end(order["end"], order["patience"])}
            else:
                sys.stdout.flush()
                reply = {"child": start(nursery, order, descriptors)}
                children.add(reply["child"])
            for descriptor in descriptors:
                os.close(descriptor)
            nursery.sendall(json.dumps(reply).encode() + b"\n")
    for child in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
