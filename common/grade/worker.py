"""The student's process: loads the student's file, calls what it is asked to, and tells what came of it.

    python -m common.grade.worker CONNECTION FILE

Started by `student.Student`, which sends ``{"function", "args", "sanitize"}`` through the connection (the number of a
file descriptor) and gets ``{"value", "launches", "findings", "refused", "error"}``. Neither references nor checks are
in reach: an audit hook refuses to open them, to start other programs and to reach for the network.
"""

import contextlib
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CLOSED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
LISTED = ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.link", "os.symlink", "shutil.copyfile")
refused = []  # what the student's code was not allowed to do, in words


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

    def hook(event, args):
        if busy or not (event in CLOSED or event in LISTED):
            return
        busy.append(event)  # the hook's own calls do not count
        try:
            if event in CLOSED:
                told = f"tried to start a program or to reach the network ({event})"
            elif isinstance(args[0], (str, bytes, os.PathLike)) and is_secret(args[0]):
                told = f"tried to read {os.path.relpath(os.path.realpath(os.fsdecode(args[0])), ROOT)}"
            else:
                return
        finally:
            busy.clear()
        refused.append(told)
        raise PermissionError(f"not allowed while your code is graded: it {told}")

    sys.addaudithook(hook)


def load(file):
    """The student's file as a module."""
    import importlib.util

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
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = getattr(getattr(frame.f_locals.get("self"), "py_func", None), "__code__", None)
        if frame.f_code.co_name == "compile" and code is not None and code.co_filename == str(file):  # Numba's
            return f"{name}:{code.co_firstlineno}: kernel {code.co_name}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == str(file):
            return f"{name}:{frame.lineno}: {frame.line}"
    return ""


def describe(error, file):
    """An exception as a dict: its type, its message, and where in the student's file."""
    return {"type": type(error).__name__, "message": str(error).strip()[:2000], "where": where(error, file)}


def told(launch, file):
    """A launch as a dict; ``arguments`` are numbers, and shapes of arrays."""
    own = launch.kernel.py_func.__code__.co_filename == str(file)
    return {
        "kernel": launch.name, "own": own, "grid": list(launch.grid), "block": list(launch.block),
        "arguments": [list(one) if isinstance(one, tuple) else one for one in launch.arguments],
    }  # fmt: skip


def answer(module, file, request):
    """Call a function of the student's module; a dict, see above."""
    import common
    from common.trace import trace

    refused.clear()
    said = {"value": None, "launches": [], "findings": [], "refused": [], "error": None}
    function = getattr(module, request["function"], None)
    with contextlib.ExitStack() as stack:
        launches = stack.enter_context(trace())
        report = stack.enter_context(common.sanitize()) if request["sanitize"] else None
        try:
            said["value"] = function(*request["args"])
        except Exception as error:
            said["error"] = describe(error, file)
    said["launches"] = [told(one, file) for one in launches]
    if report is not None:
        said["findings"] = [{"kind": one.kind, "message": one.message} for one in report.findings]
    said["refused"] = list(refused)
    return said


def main():
    link, file = Connection(int(sys.argv[1])), Path(sys.argv[2]).resolve()
    sys.dont_write_bytecode = True
    import common

    # isort: split
    from numba import cuda

    import common.trace
    from common.grade.wire import pack, unpack

    if common.BACKEND == "cpu":
        import common.cpu.sanitizer
    cuda.synchronize()
    guard(file)
    try:
        module, error = load(file), None
    except Exception as wrong:
        module, error = None, describe(wrong, file)
    link.send_bytes(pack({"error": error, "refused": refused}))
    while True:
        try:
            request = unpack(link.recv_bytes())
        except EOFError:
            return
        link.send_bytes(pack(answer(module, file, request)))


if __name__ == "__main__":
    main()
