"""Compilation: the disk cache, what it depends on, and what happens when LLVM aborts."""

import enum
import importlib.util
import os

import numpy as np
import pytest
from numba import cuda

import common
from common.cpu import compile as compiling
from common.cpu import machine_code
from common.cpu.errors import OutOfBoundsError

if common.BACKEND != "cpu":
    pytest.skip("about the CPU backend's compiler", allow_module_level=True)

FACTOR = 2
TABLE = np.array([1, 2, 3])


@cuda.jit(device=True)
def helper(x):
    return x * FACTOR


@cuda.jit
def scale(x):
    i = cuda.grid(1)
    x[i] = helper(x[i]) + TABLE[0]


class Aborts:
    def compile(self, signature):
        os.abort()


class Fails:
    def compile(self, signature):
        raise ValueError("an ordinary error")


def test_an_abort_while_compiling_does_not_take_this_process_along():
    assert machine_code.compile_in_child(Aborts(), ()) == (None, False)
    assert machine_code.compile_in_child(Fails(), ()) == (None, True)  # raised again by the parent's own compile


def test_the_cache_is_used_and_depends_on_globals_and_helpers(monkeypatch, tmp_path):
    monkeypatch.setenv("MINI_CACHE_DIR", str(tmp_path))

    def run():
        monkeypatch.setitem(globals(), "helper", cuda.jit(device=True)(helper.py_func))  # its globals are read anew
        kernel = cuda.jit(scale.py_func)
        x = np.arange(32, dtype=np.int64)
        kernel[1, 32](x)
        return x.tolist(), {p.name for p in tmp_path.glob("kernel_scale_*.tables")}

    first, files = run()
    assert first == [2 * i + 1 for i in range(32)] and len(files) == 1
    monkeypatch.setattr(compiling, "generate", lambda *a: pytest.fail("compiled again"))
    assert run() == (first, files)
    monkeypatch.undo()
    monkeypatch.setenv("MINI_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(globals(), "FACTOR", 3)  # a global of the helper, not of the kernel
    second, files = run()
    assert second == [3 * i + 1 for i in range(32)] and len(files) == 2
    monkeypatch.setitem(globals(), "TABLE", np.array([7, 2, 3]))
    third, files = run()
    assert third == [3 * i + 7 for i in range(32)] and len(files) == 3


MOVED = """
from numba import cuda

@cuda.jit
def no_guard(x, y):
    i = cuda.grid(1)
    y[i] = 2 * x[i]{comment}
"""


def test_a_kernel_that_has_moved_is_not_compiled_again_and_knows_its_lines(monkeypatch, tmp_path):
    monkeypatch.setenv("MINI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MINI_CHECK", "1")
    counted, compile_in_child = [], machine_code.compile_in_child
    monkeypatch.setattr(machine_code, "compile_in_child", lambda *a: counted.append(a) or compile_in_child(*a))

    def launch(name, text):
        (tmp_path / name).write_text(text)
        spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), tmp_path / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with pytest.raises(OutOfBoundsError) as caught:
            module.no_guard[2, 32](np.ones(40, np.float32), np.ones(64, np.float32))
        return caught.value.filename, caught.value.lineno

    assert launch("first.py", MOVED.format(comment="")) == (str(tmp_path / "first.py"), 7)
    assert len(counted) == 1
    moved = "# a line above\n" + MOVED.format(comment="  # another comment")
    assert launch("second.py", moved) == (str(tmp_path / "second.py"), 8)
    assert len(counted) == 1
    assert launch("third.py", moved.replace("2 *", "3 *")) == (str(tmp_path / "third.py"), 8)
    assert len(counted) == 2
    assert len(list((tmp_path / "cache").glob("run_no_guard_*.machine"))) == 2


@cuda.jit
def hashes_by_overflow(out):
    tid = cuda.threadIdx.x
    out[tid, 0] = (np.int64(tid) * 6364136223846793005 + 1442695040888963407 >> 40) % 13
    out[tid, 1] = (tid + 9223372036854775800) // 1000
    out[tid, 2] = -9223372036854775807 - tid < 0


class Mode(enum.Enum):
    LOW, HIGH = 3, 0.5


@cuda.jit(device=True)
def never_set(x):
    for _ in range(2):
        if Mode.LOW.value % 3 < 2:
            continue
        y = x + 1
        x += y
    if x < 0:
        x += y
    return x


@cuda.jit
def decided_early(out):
    i = cuda.threadIdx.x
    taken = Mode.LOW.value % 5 < 1 and i > 2
    if Mode.HIGH.value < 0.25 and i > 2:
        y = i
    cuda.syncthreads()
    if taken:
        out[i] = y
    elif cuda.shfl_sync(-1, i, 0) > Mode.LOW.value:
        out[i] = -1
    else:
        out[i] = never_set(i)


def test_what_constants_decide_is_not_cut_off():
    out = np.zeros(32, np.int64)
    decided_early[1, 32](out)
    assert out.tolist() == list(range(32))


def test_signed_integers_wrap_round():
    """Numba leaves signed overflow undefined; here it is defined, on a GPU too (``common.gpu.wrap_integers``)."""
    out, expected = np.zeros((33, 3), np.int64), np.zeros((33, 3), np.int64)
    hashes_by_overflow[1, 33](out)
    tid = np.arange(33, dtype=np.int64)
    with np.errstate(over="ignore"):
        expected[:, 0] = (tid * np.int64(6364136223846793005) + np.int64(1442695040888963407) >> 40) % 13
        expected[:, 1] = (tid + np.int64(9223372036854775800)) // 1000
        expected[:, 2] = np.int64(-9223372036854775807) - tid < 0
    np.testing.assert_array_equal(out, expected)


def test_a_cache_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("MINI_CACHE_DIR", str(blocked))
    kernel = cuda.jit(scale.py_func)
    x = np.arange(32, dtype=np.int64)
    with pytest.warns(UserWarning, match="a file.*not a folder.*MINI_CACHE_DIR"):
        kernel[1, 32](x)
    assert x[5] == 11
