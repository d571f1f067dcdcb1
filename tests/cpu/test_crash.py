"""A process that dies in a kernel says which, and what to do: in a terminal, with faulthandler, and in a notebook."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import guard_kernels as k
import pytest
from conftest import ROOT

from common.cpu import crash

pytestmark = pytest.mark.skipif(not crash.CAN_CATCH, reason="no handler for this system: it has Python's faulthandler")

HEAD = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "cpu")!r}]
import common
import ctypes, faulthandler, os, resource, threading
import numpy as np
from numba import cuda
import guard_kernels as k
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
"""
DIE = "k.write_far[4, 256](np.zeros(1000), 10**15)\n"  # addresses that no process can have
KERNEL = f"in the kernel write_far ({k.__file__}:{k.write_far.py_func.__code__.co_firstlineno + 1})"
SHAPE = ", block (256, 1, 1), grid (4, 1, 1)."


def run(code, *options, timeout=300):
    env = {key: v for key, v in os.environ.items() if not key.startswith(("MINI_CHECK", "PYTHONFAULT"))}
    command = [sys.executable, *options, "-c", HEAD + code]
    env["MINI_BACKEND"] = "cpu"
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


def said(text):
    """The messages in what a process has written."""
    return text.count("Kernel by Kernel: ")


@pytest.mark.parametrize("array", ["np.zeros(1000)", "cuda.to_device(np.zeros(1000))"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_process_that_dies_names_the_kernel(array, threads, monkeypatch):
    monkeypatch.setenv("MINI_THREADS", str(threads))
    done = run(f"k.write_far[4, 256]({array}, 10**15)\nprint('not reached')")
    assert done.returncode == -signal.SIGSEGV and done.stdout == ""
    assert KERNEL + SHAPE in done.stderr.replace("SIGSEGV", "") and "SIGSEGV" in done.stderr
    assert "MINI_CHECK=1" in done.stderr and "if i < n" in done.stderr and said(done.stderr) == 1


def test_launches_of_many_threads_name_their_own_kernel():
    done = run("""
def right():
    a = np.ones(100_000, np.float32)
    while True:
        k.guarded[400, 256](a, 1.0)
for _ in range(3):
    threading.Thread(target=right, daemon=True).start()
""" + DIE)  # fmt: skip
    assert done.returncode == -signal.SIGSEGV and KERNEL in done.stderr and "guarded" not in done.stderr


@pytest.mark.parametrize("when", ["", "faulthandler.enable()\n"])
def test_faulthandler_has_its_turn(when):
    done = run("k.guarded[1, 32](np.ones(5), 1.0)\n" + when + DIE, *([] if when else ["-X", "faulthandler"]))
    assert done.returncode == -signal.SIGSEGV and KERNEL in done.stderr and said(done.stderr) == 1, done.stderr
    assert done.stderr.count("Fatal Python error: Segmentation fault") == 1, done.stderr


def test_an_error_stays_an_error_under_a_late_faulthandler():
    done = run("""
k.scale[1, 32](np.ones(32), 2.0)
faulthandler.enable()
d = cuda.to_device(np.ones(5))
for launch in range(2):
    try:
        k.scale[1, 32](np.ones(31) if launch else d, 2.0)
    except IndexError as error:
        print("caught")
""")
    assert done.returncode == 0 and done.stdout == "caught\n" * 2 and said(done.stderr) == 0


def test_a_full_stack_is_called_that():
    done = run("""
import numba
from common.cpu import crash
@numba.njit(nogil=True)
def deep(n):
    return 1 if n <= 0 else deep(n - 1) + deep(n - 2) % 7
deep(3)
row = crash.Row()
row.running[crash.NOTE] = crash.place(crash.note(k.scale.py_func, (32, 1, 1)), (1, 1, 1))
deep(10**9)
""")
    assert done.returncode == -signal.SIGSEGV and "Its stack is full" in done.stderr and "scale (" in done.stderr


@pytest.mark.parametrize("end", ["os.abort()", "ctypes.string_at(0)", "os.kill(os.getpid(), 11)"])
def test_a_later_death_names_kernels_that_were_not_watched(end):
    """A damaged heap ends the process when memory is next asked for or freed: "double free", and no kernel runs."""
    done = run(f"""
a, d = np.zeros(1000), cuda.to_device(np.zeros(1000))
for _ in range(3):
    k.write_far[4, 256](a, 1)
    k.guarded[4, 256](d, 1.0)
{end}
""")
    assert done.returncode < 0 and said(done.stderr) == 1 and "while no kernel runs" in done.stderr
    assert "write_far (" in done.stderr and "grid (4, 1, 1)" in done.stderr and "MINI_CHECK=1" in done.stderr
    assert "guarded (" not in done.stderr  # its memory has guards


DAMAGES_THE_HEAP = """
places = np.arange(200)
arrays = [np.zeros(200) for _ in range(50)]
k.scatter[1, 256](places, arrays[0])
places += 150  # the same launch, with data that leads outside
for array in arrays[1:40:5]:
    k.scatter[1, 256](places, array)
arrays.clear()
filler = [np.ones(k) for k in range(1, 400)]
os.abort()  # in case it has survived
"""


def test_a_damaged_heap_names_the_kernel_that_did_it():
    run("places = np.arange(200)\nk.scatter[1, 256](places, np.zeros(200))")  # compiled
    for _ in range(6):
        with contextlib.suppress(subprocess.TimeoutExpired):  # malloc may also go round for ever in what is damaged
            done = run(DAMAGES_THE_HEAP, timeout=25)
            assert done.returncode < 0 and said(done.stderr) == 1 and "scatter (" in done.stderr
            return
    pytest.fail("six processes with a damaged heap went on for ever")


def test_a_process_without_such_kernels_dies_as_always():
    for code in ("", "k.guarded[4, 256](cuda.to_device(np.ones(9)), 1.0)\nk.guarded[4, 256](np.ones(9), 1.0)\n"):
        done = run(code + "os.abort()")
        assert done.returncode == -signal.SIGABRT and said(done.stderr) == 0


def test_a_forked_child_reports_for_itself():
    done = run("""
k.guarded[4, 256](np.ones(9), 1.0)
k.guarded[4, 256](np.ones(9), 1.0)
child = os.fork()
if child == 0:
    try:
        k.scale[4, 256](np.ones(9), 2.0)
    except IndexError:
        os.abort()  # nothing to report: what its parent did is not its own
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
a = np.ones(100_000)
k.guarded[400, 256](a, 2.0)
print(a.sum())
""")
    assert done.stdout == f"{-signal.SIGABRT}\n200000.0\n" and said(done.stderr) == 0


# --- notebooks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """Runs cells: gives what each one shows, a list of (kind, text)."""
    client = pytest.importorskip("jupyter_client")
    monkeypatch.setenv("MINI_BACKEND", "cpu")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    for name in ("MINI_CHECK", "PYTEST_CURRENT_TEST"):  # ipykernel looks at the latter
        monkeypatch.delenv(name, raising=False)
    with open(tmp_path / "stderr", "wb") as log:
        manager = client.KernelManager(kernel_name="python3")
        manager.start_kernel(stderr=log, stdout=log)
    channels = manager.client()
    channels.start_channels()
    channels.wait_for_ready(timeout=120)

    def cell(code, interrupt=None):
        request, start, shown = channels.execute(code), time.monotonic(), []
        while time.monotonic() - start < 120:
            if interrupt and time.monotonic() - start > interrupt:
                manager.interrupt_kernel()
                interrupt, shown = None, [("interrupted", time.monotonic())]
            try:
                message = channels.get_iopub_msg(timeout=0.2)
            except Exception:  # queue.Empty
                if not manager.is_alive():
                    return [*shown, ("dead", (tmp_path / "stderr").read_text())]
                continue
            content = message["content"]
            if message["parent_header"].get("msg_id") != request:
                continue
            if message["msg_type"] == "stream":
                shown.append((content["name"], content["text"]))
            elif message["msg_type"] == "error":
                shown.append((content["ename"], content["evalue"]))
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return [*shown, ("idle", time.monotonic())]
        raise TimeoutError(code)

    yield cell
    channels.stop_channels()
    manager.shutdown_kernel(now=True)


def test_in_a_notebook_the_error_stands_in_the_cell_and_the_kernel_lives(notebook):
    assert [kind for kind, _ in notebook(HEAD)] == ["idle"]
    (kind, text), _ = notebook("k.scale[40, 256](np.ones(1000, np.float32), 2.0)")
    assert kind == "OutOfBoundsError" and "a: index 1000 on axis 0" in text
    assert notebook("a = np.ones(5); k.guarded[1, 32](a, 2.0); print(a.sum())")[0] == ("stdout", "10.0\n")


def test_in_a_notebook_that_dies_the_message_stands_in_the_cell_and_in_the_terminal(notebook):
    notebook(HEAD)
    shown = notebook(DIE)
    assert KERNEL + SHAPE in dict(shown)["stderr"] and shown[-1][0] == "dead" and KERNEL in shown[-1][1]


def test_in_a_notebook_an_interrupt_stops_a_launch(notebook):
    notebook(HEAD + "out = np.zeros(64_000)\nk.slow[1000, 64](out, 10)")
    shown = notebook("k.slow[1000, 64](out, 10_000_000)", interrupt=1.0)
    assert shown[1][0] == "KeyboardInterrupt" and shown[-1][1] - shown[0][1] < 2
    assert notebook("k.slow[1000, 64](out, 10); print(out.min())")[0] == ("stdout", "16.00390625\n")
