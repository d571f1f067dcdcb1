"""The disk cache: a kernel depends on all that its code depends on; damaged or foreign files are not used."""

import ast
import importlib.util
import os
import random
import subprocess
import sys
import textwrap
import threading
import warnings

import numpy as np
import pytest
from conftest import ROOT
from numba import cuda

import common
from common.cpu import compile as compiling
from common.cpu import machine_code, store
from common.cpu.errors import CompileError

if common.BACKEND != "cpu":
    pytest.skip("about the CPU backend's disk cache", allow_module_level=True)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MINI_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(path, name="lesson"):
    """The module in a file, imported anew."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KERNEL = """
from numba import cuda
import numpy as np
{head}

@cuda.jit
def kernel(out):
    out[0] = {expression}
"""

KINDS = {  # what comes before the kernel, with a value <n> in it; and what the kernel says
    "a global": ("N = <n>", "N"),
    "a tuple": ("N = (5, <n>)", "N[1]"),
    "a float": ("N = <n>.0", "N"),
    "a NumPy number": ("N = np.int32(<n>)", "N"),
    "an array": ("N = np.array([<n>, 5])", "N[0]"),
    "a class": ("class C:\n    N = <n>", "C.N"),
    "a class in a class": ("class A:\n    class B:\n        N = <n>", "A.B.N"),
    "a class\'s tuple": ("class C:\n    N = (5, <n>)", "C.N[1]"),
    "a base class": ("class A:\n    N = <n>\nclass B(A):\n    pass", "B.N"),
    "an instance": ("class C:\n    def __init__(self, n):\n        self.n = n\nc = C(<n>)", "c.n"),
    "a dataclass": ("import dataclasses\n@dataclasses.dataclass\nclass C:\n    n: int\nc = C(<n>)", "c.n"),
    "a property": ("class C:\n    n = property(lambda self: <n>)\nc = C()", "c.n"),
    "a namespace": ("import types\nc = types.SimpleNamespace(n=<n>)", "c.n"),
    "a named tuple": ("import collections\nc = collections.namedtuple('C', 'n m')(<n>, 5)", "c.n"),
    "an enum's value": ("import enum\nclass E(enum.Enum):\n    A = <n>", "E.A.value"),
    "an IntEnum": ("import enum\nclass E(enum.IntEnum):\n    A = <n>", "E.A + 0"),
    "arithmetic": ("M = <n>", "(M + 4) * 1 - 4"),
    "a helper": ("@cuda.jit(device=True)\ndef f(x):\n    return x + <n>", "f(0)"),
    "a helper\'s global": ("N = <n>\n@cuda.jit(device=True)\ndef f(x):\n    return x + N", "f(0)"),
    "a helper\'s class": ("class C:\n    N = <n>\n@cuda.jit(device=True)\ndef f(x):\n    return x + C.N", "f(0)"),
    "a helper\'s helper": (
        "@cuda.jit(device=True)\ndef g(x):\n    return x + <n>\n@cuda.jit(device=True)\ndef f(x):\n    return g(x)",
        "f(0)",
    ),
    "a helper's signature": ("@cuda.jit('float64(float64)', device=True)\ndef f(x):\n    return x + <n>", "f(0)"),
    "a helper in a class": ("class C:\n    @cuda.jit(device=True)\n    def f(x):\n        return x + <n>", "C.f(0)"),
    "a helper in a namespace": (
        "import types\n@cuda.jit(device=True)\ndef g(x):\n    return x + <n>\nc = types.SimpleNamespace(f=g)",
        "c.f(0)",
    ),
    "a choice of functions": ("import math\nf = (math.floor, math.ceil)[<n> - 1]", "f(2.5)"),
    "a choice of types": ("t = (np.int8, np.int16)[<n> - 1]", "t(300)"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_what_a_kernel_names_is_seen(kind, tmp_path):
    head, expression = KINDS[kind]
    for value in (1, 2, 1):
        path = tmp_path / "lesson.py"
        path.write_text(KERNEL.format(head=head.replace("<n>", str(value)), expression=expression))
        module, out = load(path), np.zeros(1)
        module.kernel[1, 1](out)
        expected = {"a choice of functions": 1 + value, "a choice of types": {1: 44, 2: 300}[value]}
        assert out[0] == expected.get(kind, value)


def test_an_edit_in_a_package_below_a_package_is_seen(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kbk_pkg").mkdir()
    (tmp_path / "kbk_pkg" / "__init__.py").write_text("")
    text = "import kbk_pkg.sub\n"
    (tmp_path / "lesson.py").write_text(KERNEL.format(head=text, expression="kbk_pkg.sub.N * 10 + kbk_pkg.sub.f(0)"))
    for value in (1, 2):
        (tmp_path / "kbk_pkg" / "sub.py").write_text(
            f"from numba import cuda\nN = {value}\n@cuda.jit(device=True)\ndef f(x):\n    return x + {value}\n"
        )
        for name in ("kbk_pkg", "kbk_pkg.sub"):
            sys.modules.pop(name, None)
        sys.dont_write_bytecode, keep = True, sys.dont_write_bytecode
        try:
            module, out = load(tmp_path / "lesson.py"), np.zeros(1)
        finally:
            sys.dont_write_bytecode = keep
        module.kernel[1, 1](out)
        assert out[0] == 11 * value


N = 1


@cuda.jit
def names_a_global(out):
    out[0] = N


def test_globals_are_read_once_for_each_list_of_types(monkeypatch):
    """As Numba does. And what one process has compiled with a changed global is not taken for another's kernel."""
    kernel = cuda.jit(names_a_global.py_func)

    def run(dtype, block=1):
        out = np.zeros(1, dtype)
        kernel[1, block](out)
        return out[0]

    assert run(np.float64) == 1
    monkeypatch.setitem(globals(), "N", 2)
    assert run(np.float64) == 1 and run(np.float64, block=32) == 1  # a GPU has compiled it for all blocks
    assert run(np.float32) == 2
    monkeypatch.undo()
    kernel = cuda.jit(names_a_global.py_func)
    assert run(np.float32) == 1


@cuda.jit(device=True)
def adds_a_global(x):
    return x + N


@cuda.jit
def calls_it(out):
    out[0] = adds_a_global(out[0])


def test_a_changed_global_of_a_device_function_is_refused(monkeypatch):
    """A GPU goes on with the value that it was compiled with, for the types that it was compiled for."""
    out = np.zeros(1)
    calls_it[1, 1](out)
    monkeypatch.setitem(globals(), "N", 5)
    calls_it[1, 1](out)
    assert out[0] == 2
    with pytest.raises(CompileError, match="N has changed since adds_a_global was compiled") as error:
        cuda.jit(calls_it.py_func)[1, 1](out)
    assert error.value.lineno == adds_a_global.py_func.__code__.co_firstlineno + 2
    monkeypatch.setitem(globals(), "adds_a_global", cuda.jit(device=True)(adds_a_global.py_func))
    cuda.jit(calls_it.py_func)[1, 1](out)
    assert out[0] == 7


def test_the_text_is_the_one_that_was_imported(tmp_path):
    path = tmp_path / "lesson.py"
    path.write_text(KERNEL.format(head="", expression="1"))
    module, out = load(path), np.zeros(1)
    path.write_text(KERNEL.format(head="@cuda.jit\ndef another(out):\n    out[0] = 5", expression="2"))
    module.kernel[1, 1](out)
    assert out[0] == 1


def test_a_function_decorated_after_its_file_was_edited_is_refused(tmp_path):
    path = tmp_path / "lesson.py"
    path.write_text("def kernel(out):\n    out[0] = 1\n")
    plain = load(path).kernel
    path.write_text("def kernel(out):\n    out[0] = 2\n")
    with pytest.raises(CompileError, match="not the code of kernel that was imported"):
        cuda.jit(plain)[1, 1](np.zeros(1))


def launch_text(path):
    """Import the lesson in a file and launch its kernel; returns what it stores."""
    out = np.zeros(1)
    load(path).kernel[1, 1](out)
    return out[0]


def forget():
    """As in a new process: nothing compiled is known."""
    compiling._runs.clear()


def test_damaged_files_are_compiled_again_and_never_run(folder, tmp_path):
    path = tmp_path / "lesson.py"
    path.write_text(KERNEL.format(head="@cuda.jit(device=True)\ndef f(x):\n    return x + 7", expression="f(0)"))
    assert launch_text(path) == 7
    whole = {p: p.read_bytes() for p in folder.iterdir()}
    assert {p.suffix for p in whole} >= {".tables", ".machine"}
    rng = random.Random(1)
    for victim in sorted(whole):
        if victim.name.startswith(("runtime", "meaning")):
            continue
        for damage in range(4):
            data = bytearray(whole[victim])
            if damage == 0:
                data = data[: rng.randrange(len(data))]  # cut
            elif damage == 1:
                data = b""
            else:
                for _ in range(8):
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            victim.write_bytes(data)
            forget()
            before = dict(machine_code.count)
            assert launch_text(path) == 7, (victim.name, damage)
            if victim.name.startswith("run_"):
                assert machine_code.count["compiled"] == before["compiled"] + 1
            assert store.read(victim.name) is not None or victim.name.startswith("dev_")  # whole again
            victim.write_bytes(whole[victim])


def test_an_edit_of_a_comment_of_the_backend_compiles_nothing(monkeypatch, tmp_path):
    text = "from . import half\n\n\ndef f(x):\n    '''What it does.'''\n    return x + 1  # why\n"
    (tmp_path / "a.py").write_text(text)
    other = text.replace("# why", "").replace("What it does", "Other")
    (tmp_path / "b.py").write_text("'''Of the module.'''\n" + other)
    (tmp_path / "c.py").write_text(text.replace("+ 1", "+ 2"))
    a, b, c = (store.meaning(tmp_path / f"{name}.py") for name in "abc")
    assert a == b != c


def test_the_folder_is_the_users_own(folder, tmp_path):
    old = os.umask(0)
    try:
        folder.mkdir(mode=0o777)
        path = tmp_path / "lesson.py"
        path.write_text(KERNEL.format(head="", expression="3"))
        assert launch_text(path) == 3
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o600}


def test_files_that_others_can_write_are_not_read(folder, tmp_path):
    path = tmp_path / "lesson.py"
    path.write_text(KERNEL.format(head="", expression="3"))
    assert launch_text(path) == 3
    for entry in folder.glob("run_*"):
        entry.chmod(0o666)
        assert store.read(entry.name) is None
        entry.chmod(0o600)
        assert store.read(entry.name) is not None
        if os.geteuid() == 0:
            os.chown(entry, 12345, -1)
            assert store.read(entry.name) is None
            os.chown(entry, 0, -1)
        target = entry.with_name("elsewhere")
        entry.rename(target)
        entry.symlink_to(target)
        assert store.read(entry.name) is None
    forget()
    assert launch_text(path) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user's")
def test_a_foreign_folder_costs_one_line(folder, tmp_path):
    folder.mkdir()
    os.chown(folder, 12345, -1)
    path = tmp_path / "lesson.py"
    path.write_text(KERNEL.format(head="", expression="4"))
    with pytest.warns(UserWarning, match="belongs to another user") as caught:
        assert launch_text(path) == 4
    assert len([w for w in caught if "compiled kernels cannot be kept" in str(w.message)]) == 1
    assert not list(folder.iterdir())


def test_a_full_disk_costs_one_line(folder, monkeypatch, tmp_path):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.tempfile, "mkstemp", full)
    path = tmp_path / "lesson.py"
    path.write_text(KERNEL.format(head="", expression="5"))
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        assert launch_text(path) == 5
    assert len([w for w in caught if "compiled kernels cannot be kept" in str(w.message)]) == 1


THREADS = """
import sys, threading
sys.path[:0] = [{root!r}, {folder!r}]
import numpy as np
import common
from numba.cpython import numbers
import cold

before, wrong = numbers._int_arith_flags, []
gate = threading.Barrier(8)

def work(t):
    gate.wait()
    for i in range(8):
        k = (t + i) % 8 if {order!r} == "mixed" else i
        out = np.zeros(64, np.int64)
        getattr(cold, f"kernel_{{k}}")[2, 32](out, 3)
        expected = [3 * (k + 2) + j if j % 2 else j - k for j in range(64)]
        if out.tolist() != expected:
            wrong.append((t, k, out.tolist()))

threads = [threading.Thread(target=work, args=(t,)) for t in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong, wrong[0]
assert numbers._int_arith_flags is before
print("right")
"""

COLD = """
@cuda.jit
def kernel_{k}(out, x):
    i = cuda.grid(1)
    if i % 2:
        out[i] = x * {times} + i
    else:
        out[i] = i - {k}
"""


@pytest.mark.parametrize("order", ["mixed", "same"])
def test_eight_threads_launch_eight_cold_kernels(order, tmp_path, folder):
    text = "from numba import cuda\n" + "".join(COLD.format(k=k, times=k + 2) for k in range(8))
    (tmp_path / "cold.py").write_text(text)
    script = THREADS.format(root=str(ROOT), folder=str(tmp_path), order=order)
    environ = {**os.environ, "MINI_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def test_a_launch_in_a_thread_while_another_compiles_numba_code(tmp_path):
    """A child process is made for each compilation: not while another thread holds the compiler's lock."""
    import numba

    def slow(n):
        total = 0
        for i in range(n):
            total += i % 7 * (i % 5) - (i % 3 if i % 2 else i % 11)
        return total

    compiled = threading.Thread(target=lambda: [numba.njit(slow)(k) for k in (3, 4.5)])
    path = tmp_path / "lesson.py"
    path.write_text(KERNEL.format(head="", expression="8"))
    compiled.start()
    assert launch_text(path) == 8
    compiled.join(timeout=60)
    assert not compiled.is_alive()


def test_the_meaning_of_a_file_leaves_out_what_does_not_matter():
    """Not comments, docstrings and line numbers; but every constant, name and default, and in no order of a process."""
    base = """
    import os
    def f(x, y=1):
        "What it does."
        for _ in range(3):
            x += y * 0.0 if x in {"a", "b", "c"} else -2
        return lambda z: (x, z, 1)
    """
    plain = textwrap.dedent(base)
    known = store._meaning_of(plain.encode())
    moved = plain.replace('"What it does."', '"Another."').replace("import os", "# a comment\n\nimport os  # why")
    assert store._meaning_of(moved.encode()) == known
    for old, new in (
        ("y=1", "y=2"), ("y=1", "y=1.0"), ("y=1", "y=True"), ("0.0", "-0.0"), ("range(3)", "range(4)"), ('"c"', '"d"'),
        ("lambda z", "lambda w"), ("(x, z, 1)", "(x, z, 1.0)"), ("import os", "import sys"), ("+=", "-="),
    ):  # fmt: skip
        assert store._meaning_of(plain.replace(old, new).encode()) != known, (old, new)
    script = f"""
import sys, zlib
sys.path[:0] = [{str(ROOT)!r}]
from common.cpu import store
print(zlib.crc32(store._meaning_of({plain!r}).encode()))
"""
    seen = set()
    for seed in "123":
        environ = {**os.environ, "PYTHONHASHSEED": seed}
        seen.add(subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True).stdout)
    assert len(seen) == 1 and seen.pop().strip().isdigit()


def test_imports_are_found_without_a_parser():
    for path in (ROOT / "common" / "cpu").glob("*.py"):
        text, found = path.read_text(), set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                found |= {node.module} if node.module else {alias.name for alias in node.names}
        assert store._relative_imports(text) == found, path


LLVM_MEANWHILE = """
import sys, threading
sys.path[:0] = [{root!r}, {folder!r}]
import llvmlite.binding as llvm
import numpy as np
import common

sums = "".join(f"%x{{i + 1}} = mul i64 %x{{i}}, 3\\n" for i in range(3000))
text = "define i64 @f(i64 %x0) {{\\n" + sums + "ret i64 %x3000 }}"
at_it, done = threading.Event(), False

def parse():
    while not done:
        llvm.parse_assembly(text)
        at_it.set()

thread = threading.Thread(target=parse)
thread.start()
at_it.wait()
import cold
out = np.zeros(64, np.int64)
try:
    for k in range(4):
        getattr(cold, f"kernel_{{k}}")[2, 32](out, 3)
finally:
    done = True
thread.join()
print(out[1])
"""


def test_a_kernel_is_compiled_while_another_thread_uses_llvm(tmp_path, folder):
    """llvmlite has a lock of its own, which whoever calls LLVM holds: a forked child must not inherit it locked."""
    text = "from numba import cuda\n" + "".join(COLD.format(k=k, times=k + 2) for k in range(4))
    (tmp_path / "cold.py").write_text(text)
    script = LLVM_MEANWHILE.format(root=str(ROOT), folder=str(tmp_path))
    environ = {**os.environ, "MINI_CACHE_DIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "16\n"), done.stderr


def test_what_is_kept_can_be_loaded_by_a_process_without_a_compiler_child(folder, monkeypatch, tmp_path):
    path = tmp_path / "lesson.py"
    path.write_text(textwrap.dedent(KERNEL.format(head="", expression="9")))
    assert launch_text(path) == 9
    forget()
    monkeypatch.setattr(machine_code, "compile_in_child", lambda *a: pytest.fail("compiled again"))
    monkeypatch.setattr(compiling, "generate", lambda *a: pytest.fail("generated again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch_text(path) == 9
