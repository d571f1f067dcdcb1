"""The grader's commands, the student's process, and what teachers get."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import BACKEND
from common.grade import Wrong, __main__, gradescope, plugin, process, same
from common.grade import exercise as files
from common.grade import student as student_module
from common.grade.student import Student
from common.grade.wire import pack, unpack

ROOT = files.ROOT
TOPK = files.find("ch13/topk")


@pytest.fixture
def exercise(tmp_path, monkeypatch):
    """ch13/topk in a folder of its own, which commands may write to, and notes of its own."""
    folder = tmp_path / "ch13_llm_ops" / "exercises" / "topk"
    shutil.copytree(TOPK.folder, folder)
    made = files.load(folder)
    for module in (files, __main__, gradescope):
        monkeypatch.setattr(module, "exercises", lambda: {made.name: made})
    monkeypatch.setattr(__main__, "NOTES", tmp_path / "notes.json")
    return made


def run(*arguments):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        __main__.main([str(one) for one in arguments])
    return ended.value.code


# --- commands --------------------------------------------------------------------------------------------------------


def test_from_the_stub_to_the_solution(exercise, capsys, tmp_path):
    assert run("reset", "topk") == 0
    assert run("run", "ch13/topk", "--json", tmp_path / "report.json", "--junit", tmp_path / "junit.xml") == 1
    told = capsys.readouterr().out
    assert "0 of 20 points" in told and told.count("MISS") == len(TOPK.criteria) and told.count("not implemented") == 1
    (report,) = json.loads((tmp_path / "report.json").read_text())
    assert report["exercise"] == "ch13/topk" and not any(row["points"] for row in report["criteria"])
    assert run("progress") == 0
    assert "0 of 20 points" in capsys.readouterr().out
    assert run("solution", "topk") == 2
    assert "has not passed yet" in capsys.readouterr().err
    for number in (1, 2, 3, 3):
        assert run("hint", "topk") == 0
        assert f"hint {number} of 3" in capsys.readouterr().out
    exercise.file.write_text(exercise.solution.read_text())
    assert run("run", "topk", "--junit", tmp_path / "junit.xml") == 0
    assert "20 of 20 points" in capsys.readouterr().out
    assert 'tests="' in (tmp_path / "junit.xml").read_text()
    assert run("progress") == 0
    assert "solved, 3 of 3 hints" in capsys.readouterr().out
    assert run("solution", "topk") == 0
    assert capsys.readouterr().out == exercise.solution.read_text()
    assert run("reset", "topk") == 0
    (kept,) = exercise.folder.glob("topk.20*.py")
    assert kept.read_text() == exercise.solution.read_text() and exercise.file.read_text() == exercise.stub()
    assert run("progress") == 0
    assert "edited since" in capsys.readouterr().out
    assert run("solution", "topk", "--give-up") == 0


def test_an_unknown_exercise_names_the_nearest(capsys):
    for name, near in (("ch13/top_k", "ch13/topk"), ("kvcache", "ch14/kv_cache"), ("ch13", "ch13/topk")):
        assert run("run", name) == 2
        told = capsys.readouterr().err
        assert f"there is no exercise {name!r}" in told and near in told


def change(exercise, old, new):
    text = exercise.solution.read_text()
    assert text.count(old) >= 1
    exercise.file.write_text(text.replace(old, new, 1))
    return plugin.grade(exercise)["criteria"][0]


@pytest.mark.parametrize(
    "old, new, seen, hint",
    [
        ("    i = cuda.grid(1)\n", "    i = cuda.grid(1\n", "topk.py:28: '(' was never closed", "syntax"),
        ("def keep_top_k(", "def keep_top(", "the function keep_top_k is missing", "changed"),
        ("(logits, keep, n, k)", "(logits, keep, k, n)", "it must be keep_top_k(logits, keep, n, k)", "changed"),
        ("THREADS = 256", "THREADS = 128", "topk.py:14: outside of the marks stands THREADS = 128", "changed"),
        ("# --- your code ends ---\n\n\n# What", "\n\n\n# What", "the gap that begins in line", "changed"),
        ("    i = cuda.grid(1)\n", "    import os\n    i = cuda.grid(1)\n", "import os", "own-work"),
        ("    i = cuda.grid(1)\n", "    i = eval('1')\n", "eval is not for use here", "own-work"),
        ("    i = cuda.grid(1)\n", "    i = cuda.gird(1)\n", "topk.py:28", "error"),
        ("# --- your code ends ---", "X = 1 / 0\n# --- your code ends ---", "ZeroDivisionError", "load"),
        ("    i = cuda.grid(1)\n", "   i = cuda.grid(1)\n", "topk.py:28: IndentationError", "syntax"),
        ("    i = cuda.grid(1)\n", "    i = cuda.grid(1)\0\n", "null byte", "syntax"),
        ("    i = cuda.grid(1)\n", "    i = " + 400 * "(" + "\n", "topk.py", "syntax"),
    ],
)  # fmt: skip
def test_what_cannot_be_graded_is_told_with_its_line(exercise, old, new, seen, hint):
    row = change(exercise, old, new)
    assert seen in row["seen"] and row["hint_name"] == hint


def test_an_error_is_told_once_and_without_paths(exercise, capsys):
    exercise.file.write_text(exercise.solution.read_text().replace("cuda.grid(1)", "cuda.gird(1)"))
    assert run("run", "topk") == 1
    told = capsys.readouterr().out
    assert told.count("MISS") == len(TOPK.criteria) and told.count("hint:") == 1 and str(exercise.folder) not in told


def rows_of(exercise, *changes, file=None):
    text = exercise.solution.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) >= 1
        text = text.replace(old, new)
    (file or exercise.file).write_text(text, encoding="utf-8")
    report = plugin.grade(exercise, file)
    return {row["name"]: row for row in report["criteria"]}, report


# --- what a gap is not for -------------------------------------------------------------------------------------------

SCAN, FIRST = files.find("ch08/scan"), "# --- your code begins (optional) ---\n"


@pytest.mark.parametrize(
    "code, seen",
    [
        ("cuda.jit = print", "cuda.jit = …: what stands outside"), ("common.sanitize = print", "common.sanitize = …"),
        ("common.memory_report = print", "common.memory_report = …"), ("np.full = np.ones", "np.full = …"),
        ("del common.sanitize", "outside of functions, a gap is for functions and constants only"),
        ("cuda = np", "cuda is taken"), ("def traffic(x):\n    return 1", "traffic is taken"),
        ("def len(x):\n    return 1", "len is taken"), ("X = common.os._exit", "common.os is not for use here"),
        ("X = common.sys.modules", "common.sys.modules is not for use"), ("X = np.load('x')", "np.load is not for use"),
        ("X = np.ctypeslib.ctypes", "np.ctypeslib.ctypes is not for"),
        ("X = cuda.jit.__globals__", "__globals__ is not"),
        ("X = (lambda: 0).__class__", "is not for use"), ("X = getattr(common, 'o' + 's')", "getattr is not for use"),
        ("X = getattr(common, 'os')", "getattr is not for use"), ("X = __builtins__", "__builtins__ is not for use"),
        ("setattr(cuda, 'jit', print)", "a gap is for functions and constants"), ("X = exit", "exit is not for use"),
        ("def f():\n    global common\n    common = 1", "global common: what stands outside"),
        ("def f():\n    import os", "import os: all you need is imported above"),
        ("def f():\n    common.sanitize = 1", "common.sanitize = …"), ("while True:\n    pass", "a gap is for"),
        ("class Fake:\n    pass", "a gap is for functions"), ("X = scan_blocks.py_func", "py_func is not for use"),
    ],
)  # fmt: skip
def test_what_would_reach_the_grader_is_refused_by_its_text(tmp_path, code, seen):
    file = tmp_path / "scan.py"
    text = SCAN.solution.read_text(encoding="utf-8")
    file.write_text(text.replace(FIRST, f"{FIRST}{code}\n"))
    what, hint = files.look(SCAN, file)
    assert seen in what and re.match(r"scan.py:1[6-8]: ", what) and hint == "own-work", what


@pytest.mark.parametrize(
    "code",
    ["TWICE = 2 * THREADS", "A, B = 1, int32(2)", "X: int = 3", '"""What these do."""', "f = lambda x: 2 * x",
     "@cuda.jit(device=True, inline=True)\ndef f(x):\n    io = x\n    return io", "pass",
     "def f(x):\n    y = x.copy()\n    y.flags.writeable = True\n    return getattr(y, 'shape', None)"],
)  # fmt: skip
def test_what_a_gap_is_for_is_let_through(tmp_path, code):
    file = tmp_path / "scan.py"
    text = SCAN.solution.read_text(encoding="utf-8")
    file.write_text(text.replace(FIRST, f"{FIRST}{code}\n"))
    assert files.look(SCAN, file) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the filter of system calls is Linux's")
def test_a_process_without_network_has_no_sockets():
    code = """if True:
        import os, socket, subprocess, sys
        from common.grade.worker import without_network
        pair = socket.socketpair()
        assert without_network()
        for family in socket.AF_INET, socket.AF_INET6, socket.AF_UNIX:
            try:
                socket.socket(family)
            except PermissionError:
                continue
            sys.exit(1)
        pair[0].send(b"x")
        child = [sys.executable, "-c", "import socket; socket.socket()"]
        assert b"PermissionError" in subprocess.run(child, capture_output=True).stderr
        print("none")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "none\n", done.stderr


# --- one cause, one hint ---------------------------------------------------------------------------------------------


def hints(rows):
    """{criterion: hint's name} of the misses that have a hint of their own."""
    return {name: row["hint_name"] for name, row in rows.items() if row["hint"]}


def test_what_follows_from_a_miss_is_marked_and_has_no_hint(exercise):
    rows, report = rows_of(exercise, ("before < k and", "before <= k and"))
    assert hints(rows) == {"selection": "rank"} and report["gate"] is None
    follow = {name: row["follows"] for name, row in rows.items() if row["follows"]}
    assert {"ties", "edges", "distribution"} <= set(follow) and set(follow.values()) == {"selection"}
    text = __main__.table(report)
    assert text.count("hint:") == 1
    assert text.count("follows from a miss above, as it seems: the k largest") == len(follow)
    told = gradescope.results([report])
    assert sum("Hint:" in one["output"] for one in told["tests"]) == 1
    assert sum("Follows from a miss above" in one["output"] for one in told["tests"]) == len(follow)


def test_a_slot_off_by_one_in_the_cache_is_one_cause(tmp_path):
    slot = "np.array([first], np.int32)", "np.array([first + (T == 1)], np.int32)"
    rows, _ = rows_of(files.find("ch14/kv_cache"), slot, file=tmp_path / "kv_cache.py")
    assert len(hints(rows)) == 1 and sum(not row["passed"] for row in rows.values()) >= 3, hints(rows)


def test_two_mistakes_have_two_hints(exercise):
    ties = "other > x or (other == x and j < i)", "other > x"
    rows, _ = rows_of(exercise, ties, ("uniform(uint64(seed), uint64(first", "uniform(uint64(0), uint64(first"))
    assert hints(rows) == {"ties": "ties", "repeatable": "seed"}


def test_a_race_is_a_gate(exercise):
    """What the sanitizer finds may be right by luck: a quarter of what is right counts."""
    rows, report = rows_of(exercise, ("    if tid == 0:\n        everything", "    if tid < WARP:\n        everything"))
    assert report["gate"] == "memory" and rows["memory"]["hint_name"] == "global-race" and not report["passed"]
    assert all(row["passed"] for name, row in rows.items() if name not in ("memory", "sums"))
    assert report["points"] == sum(row["points"] for row in rows.values()) <= report["max_points"] / plugin.GATED
    assert rows["selection"]["points"] == 4 / plugin.GATED
    assert "all that is right counts a quarter" in __main__.table(report)
    told = gradescope.results([report])
    assert told["score"] == sum(one["score"] for one in told["tests"]) == report["points"]


def test_an_error_under_the_sanitizer_is_no_race(exercise):
    _, report = rows_of(exercise, ("    i = cuda.grid(1)\n", "    i = cuda.gird(1)\n"))
    assert report["gate"] is None


# --- files and arguments ---------------------------------------------------------------------------------------------


def test_a_file_that_is_none(exercise, tmp_path, capsys):
    pipe, empty, binary = tmp_path / "pipe.py", tmp_path / "empty.py", tmp_path / "binary.py"
    os.mkfifo(pipe)
    for file, seen in ((tmp_path, "is a folder"), (pipe, "not a regular file"), ("/dev/zero", "not a regular file"),
                       (tmp_path / "none.py", "there is no file")):  # fmt: skip
        assert run("run", "topk", f"--file={file}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and seen in line and str(file) in line
    empty.write_text("")
    binary.write_bytes(bytes(range(256)))
    for file, hint in ((empty, "changed"), (binary, "syntax")):
        assert plugin.grade(exercise, file)["criteria"][0]["hint_name"] == hint
    binary.write_bytes(b"#" * (files.LARGEST + 1))
    assert run("run", "topk", f"--file={binary}") == 2
    assert "more than" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--junit"])
def test_a_report_that_cannot_be_written_is_named_before_the_work(exercise, tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(__main__, "grade", None)  # there is nothing to grade yet
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "report", "/dev/full", "/proc/report.json"):
        assert run("run", "topk", f"{option}={path}") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {option}={path}")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"3", b'{"ch13/topk": 3}', b'{"ch13/topk": {"points": "x"}}', b'{"ch13/topk": {"hints": []}}',
     b'{"ch13/topk": {"passed": 1}}', bytes(range(256)), b"[" * 100_000],
)  # fmt: skip
def test_damaged_notes_are_named_and_kept(exercise, capsys, monkeypatch, data):
    monkeypatch.setattr(__main__, "grade", None)
    __main__.NOTES.write_bytes(data)
    for command in (["progress"], ["run", "topk"], ["hint", "topk"], ["solution", "topk"]):
        assert run(*command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "notes.json is damaged" in line and "remove it" in line
    assert __main__.NOTES.read_bytes() == data
    assert run("solution", "topk", "--give-up") == 0


def test_notes_that_cannot_be_read_or_written(exercise, capsys):
    __main__.NOTES.mkdir()
    assert run("progress") == 2 and run("hint", "topk") == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("error: ") and "notes.json: Is a directory" in line


def test_a_full_output_ends_with_a_line():
    for redirect in ("> /dev/full", ">&-"):
        command = f"{sys.executable} -m common.grade progress {redirect}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert "Traceback" not in done.stderr and done.returncode in (0, 2), done.stderr


def test_several_exercises_in_one_process(tmp_path):
    for name in ("ch02/guard", "ch13/topk", "ch02/guard"):
        one = files.find(name)
        file = tmp_path / one.file.name
        file.write_text(one.solution.read_text())
        report = plugin.grade(one, file)
        assert report["passed"], [(row["name"], row["seen"]) for row in report["criteria"]]


def test_a_missing_file(exercise, capsys):
    exercise.file.unlink()
    assert run("run", "topk") == 2
    assert "make reset EX=ch13/topk" in capsys.readouterr().err
    assert run("reset", "topk") == 0 and exercise.file.is_file()


def test_watch_grades_again_when_the_file_is_saved(tmp_path):
    file = tmp_path / "topk.py"
    file.write_text(TOPK.stub())
    command = [sys.executable, "-m", "common.grade", "run", "ch13/topk", "--watch", "--file", str(file)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        told = ""
        while "0 of 20 points" not in told:
            told += process.stdout.readline()
        file.write_text(TOPK.solution.read_text())
        told, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0 and "20 of 20 points" in told


# --- the student's process -------------------------------------------------------------------------------------------

HELPER = """
import math, os, sys, threading, time
import numpy as np
import common, common.memory, common.trace
from numba import cuda
def echo(*values): return list(values)
def wait(seconds):
    time.sleep(seconds)
    return "done"
def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
def loop():
    while True: pass
def die(): os.abort()
def leave(): os._exit(3)
def exit_(): sys.exit(1)
def interrupt(): raise KeyboardInterrupt
def itself():
    own = []
    own.append(own)
    return own
class Strange(Exception):
    def __str__(self): raise ValueError
def strange(): raise Strange
def stop(): raise ValueError("no luck")
def read(path): return np.fromfile(path, np.uint8)[:4]
def quiet(path):
    try:
        open(path)
    except PermissionError:
        pass
def start(): os.system("true")
def replace(what):
    if what == "jit": cuda.jit = lambda *a, **k: None
    if what == "sanitize": common.memory.memory_report = None
    if what == "dispatcher": type(block_max).__getitem__ = lambda *a: None
    if what == "numpy": np.full = np.ones
    if what == "class": type(cuda.to_device(np.zeros(1))).copy_to_host = lambda self: None
    if what == "builtin": __builtins__["divmod"] = lambda a, b: 0
    if what == "module": sys.modules["common.trace"] = math
    if what == "kernel": block_max.py_func = print
    if what == "code": common.trace.defined_at.__code__ = (lambda kernel: None).__code__
def thread(): threading.Thread(target=time.sleep, args=[9]).start()
def fork(): return os.fork()
def libc(): __import__("ctypes").CDLL(None)
def api(): __import__("ctypes").pythonapi.kill
def kill(): os.kill(os.getppid(), 9)
from chapters.ch07_warp_reduce.kernels import block_max
def frames():
    import sys, gc
    graders = ("common.grade.plugin", "common.grade.exercise")
    return [name for name in sys.modules if "exercises" in name or name in graders]
"""


KERNEL = """
@cuda.jit
def add(x, n):
    i = cuda.grid(1)
    if i < n:
        x[i] += NUMBER
def launch(n):
    x = cuda.to_device(np.arange(n))
    add[(n + 63) // 64, 64](x, n)
    return x.copy_to_host()
"""


@pytest.fixture
def student(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(HELPER)
    made = Student(file, 60)
    yield made
    made.close()


def test_values_come_back_as_they_went(student):
    values = [np.arange(6, dtype=np.float32).reshape(2, 3), 3, 1.5, "a", None, True, [1, [2]], {"k": np.array([1])}]
    got = student.call("echo", *values, on="values").value
    np.testing.assert_equal(got, values)
    assert got[0].dtype == np.float32
    assert unpack(pack({"x": float("inf"), "o": object}))["x"] == float("inf")


@pytest.mark.parametrize(
    "function, seen, hint",
    [
        ("die", "ended the process (SIGABRT)", "crash"), ("leave", "ended the process (exit code 3)", "crash"),
        ("stop", "ValueError: no luck (at mine.py:", "error"), ("start", "tried to start a program", "own-work"),
        ("missing", "TypeError", "error"), ("exit_", "your code ends the program, by SystemExit (at mine.py:", "exit"),
        ("interrupt", "your code ends the program, by KeyboardInterrupt", "exit"),
        ("strange", "Strange: (its message cannot be shown)", "error"),
        ("itself", "RecursionError", "error"),
    ],
)  # fmt: skip
def test_a_call_that_goes_wrong_is_told(student, function, seen, hint):
    with pytest.raises(Wrong) as wrong:
        student.call(function, on="nothing")
    assert seen in wrong.value.seen and wrong.value.hint == hint
    assert student.call("echo", 1, on="one").value == [1]  # it costs that call only


# --- time ------------------------------------------------------------------------------------------------------------


def test_an_endless_loop_costs_its_own_limit(student):
    student.call_limit = 0.5
    with pytest.raises(Wrong, match="loop on nothing did not end within 0.5 seconds of work") as wrong:
        student.call("loop", on="nothing")
    assert wrong.value.hint == "endless" and 59 < student.left < 59.6
    with pytest.raises(Wrong, match="not tried: loop on nothing did not end") as again:
        student.call("loop", on="something")
    assert again.value.cause == wrong.value.cause and student.left > 59
    assert student.call("echo", 1, on="one").value == [1]


def test_waiting_is_no_work(student, monkeypatch):
    student.call_limit = 0.2
    assert student.call("wait", 1.5, on="a while").value == "done"  # on a busy machine, a right answer waits as well
    monkeypatch.setattr(process, "IDLE_SECONDS", 1)
    with pytest.raises(Wrong, match="wait on a while waits: it did nothing") as wrong:
        student.call("wait", 60, on="a while")
    assert wrong.value.hint == "endless"


def test_compiling_is_no_work(student):
    unique = str(time.time_ns())  # a kernel that no cache has
    file = student.file.with_name("fresh.py")
    file.write_text(HELPER + KERNEL.replace("NUMBER", unique))
    fresh = Student(file, 0.2)
    try:
        answer = fresh.call("launch", 100, on="100 elements")
        assert np.array_equal(answer.value, np.arange(100) + int(unique)) and answer.seconds < 0.2
        assert fresh.left > 0
    finally:
        fresh.close()


def test_when_all_the_time_is_used_up_the_machine_is_named(student):
    student.left = 0.3
    with pytest.raises(Wrong, match="was not finished: the 60 seconds of work that all calls together") as wrong:
        student.call("loop", on="nothing")
    assert wrong.value.hint == "time" and "too slow" in files.GENERAL["time"]
    with pytest.raises(Wrong, match="echo on one was not tried: the 60 seconds") as later:
        student.call("echo", 1, on="one")
    assert later.value.hint == "time" and later.value.cause == wrong.value.cause


def test_work_counts(student):
    before = student.left
    student.call("work", 0.3, on="some work")
    assert 0.25 < before - student.left < 1.5


@pytest.mark.parametrize(
    "path",
    [TOPK.solution, TOPK.folder / "grade.py", ROOT / "tests" / "wrong_solutions" / "ch13" / "topk.toml",
     ROOT / ".git" / "HEAD", "/proc/GRADER/environ", ROOT / "chapters" / ".." / "tests" / "conftest.py"],
    ids=["solution", "checks", "bank", "git", "grader", "roundabout"],
)  # fmt: skip
@pytest.mark.parametrize("function", ["read", "quiet"])
def test_the_answers_are_out_of_reach(student, path, function, tmp_path):
    path = str(path).replace("GRADER", str(os.getpid()))
    with pytest.raises(Wrong, match="tried to read") as wrong:
        student.call(function, path, on="a path")
    assert wrong.value.hint == "own-work"
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(Wrong, match="tried to read"):
        student.call(function, str(link), on="a link to it")


@pytest.mark.parametrize(
    "what", ["jit", "sanitize", "dispatcher", "numpy", "class", "builtin", "module", "kernel", "code"]
)
@pytest.mark.parametrize("cpu", [False, True], ids=["where kernels run", "under the sanitizer"])
def test_what_the_grader_relies_on_cannot_be_replaced(student, what, cpu):
    with pytest.raises(Wrong, match="your code replaced ") as wrong:
        student.call("replace", what, on=what, cpu=cpu)
    assert wrong.value.hint == "own-work"


@pytest.mark.parametrize("function", ["thread", "fork", "kill", "libc", "api"])
def test_no_process_and_no_thread_is_started_or_ended(student, function):
    with pytest.raises(Wrong, match="tried to start a program or a thread, to end one|left a thread running"):
        student.call(function, on="nothing")
    if function != "thread":
        assert student.call("echo", 1, on="one").value == [1]


def test_a_file_that_ends_the_nursery_costs_itself_only(student):
    student.call("echo", 1, on="one")
    process.nursery("cpu").process.kill()
    other = Student(student.file, 60)
    assert other.call("echo", 1, on="one").value == [1]
    other.close()


def test_a_sanitizer_that_saw_nothing_is_not_clean(student):
    with pytest.raises(Wrong, match="saw no access to an array in 0 launches") as wrong:
        student.clean("echo", 1, on="no kernel at all")
    assert wrong.value.hint == "unseen" and not wrong.value.gate


def test_the_process_holds_nothing_of_the_grader(student):
    assert student.call("frames", on="").value == []


def test_same_says_where():
    same(np.array([1.0, np.nan]), np.array([1.0, np.nan]), "x", "n = 2")
    for got, seen in (
        (np.array([[1.0, 2], [3, 5]]), r"x\[1, 1\] is 5, expected 4, on n = 4; 1 of 4 elements differ"),
        (np.ones(3), r"x has the shape \(3,\), expected \(2, 2\), on n = 4"),
        (None, "x is None, not an array, on n = 4"),
    ):
        with pytest.raises(Wrong, match=seen):
            same(got, np.array([[1.0, 2], [3, 4]]), "x", "n = 4")


# --- for teachers ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the zip is made of the files that git knows")
def test_the_autograder_from_zip_to_results(tmp_path, capsys):
    assert run("autograder", tmp_path / "autograder.zip", "ch13/topk") == 0
    root = tmp_path / "autograder"
    with zipfile.ZipFile(tmp_path / "autograder.zip") as archive:
        assert {"setup.sh", "run_autograder"} <= set(archive.namelist())
        archive.extractall(root / "source")
    (root / "submission").mkdir()
    (root / "results").mkdir()
    solved = TOPK.solution.read_text()
    environ = os.environ | {"AUTOGRADER_ROOT": str(root), "PYTHON": sys.executable, "GRADED_USER": ""}
    for text, least, most in (
        (TOPK.stub(), 0, 0),
        (solved.replace("other > x or (other == x and j < i)", "other > x"), 1, 19),
        (solved, 20, 20),
    ):
        (root / "submission" / "topk.py").write_text(text)
        (root / "submission" / "notes.py").write_text("")
        script = ["bash", str(root / "source" / "run_autograder")]
        done = subprocess.run(script, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        told = json.loads((root / "results" / "results.json").read_text())
        assert least <= told["score"] <= most and "notes.py: belongs to no exercise" in told["output"]
        assert sum(one["max_score"] for one in told["tests"]) == 20 and len(told["tests"]) == len(TOPK.criteria)
        for one in told["tests"]:
            assert one["status"] == ("passed" if one["score"] else "failed")
            assert one["status"] == "passed" or any(
                word in one["output"] for word in ("Hint: ", "As above.", "Follows from a miss above")
            )


def hand_in(tmp_path, **files):
    """A folder with files: {path with __ for /: an exercise's file, or a text}."""
    folder = tmp_path / "submission"
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    folder.mkdir(exist_ok=True)
    return folder


def graded(monkeypatch, folder, *wanted):
    """({exercise: the file that was graded, or what was said instead}, strangers); grading itself is left out."""

    def grade(exercise, file, user=None):
        rows = [{"seen": str(file.relative_to(file.parents[len(file.parts) - 1 - file.parts.index("submission") - 1]))}]
        return {"exercise": exercise.name, "criteria": rows}

    monkeypatch.setattr(gradescope, "grade", grade)
    reports, strangers = gradescope.grade_submission(folder, wanted)
    return {one["exercise"]: one["criteria"][0]["seen"] for one in reports}, strangers


SOLVED = SCAN.solution.read_text(encoding="utf-8")
CHAPTER = (ROOT / "chapters" / "ch08_atomics_scan" / "scan.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("prefix", ["", "my-fork-main__"])
def test_a_whole_book_is_graded_by_path(tmp_path, monkeypatch, prefix):
    place = f"{prefix}chapters__ch08_atomics_scan__"
    others = {f"{prefix}tests__scan": "", f"{prefix}notes__mine": "", f"{prefix}common__grade__worker": ""}
    stubs = {f"{prefix}chapters__ch13_llm_ops__exercises__topk__topk": TOPK.stub()}
    folder = hand_in(tmp_path, **{f"{place}scan": CHAPTER, f"{place}exercises__scan__scan": SOLVED}, **others, **stubs)
    told, strangers = graded(monkeypatch, folder)
    assert list(told) == ["ch08/scan"] and told["ch08/scan"].endswith("exercises/scan/scan.py") and not strangers
    told, _ = graded(monkeypatch, folder, "ch08/scan", "ch13/topk")
    assert told["ch13/topk"].endswith("topk/topk.py")


def test_a_chapters_file_is_no_solution(tmp_path, monkeypatch):
    folder = hand_in(tmp_path, ch08_atomics_scan__scan=CHAPTER)
    told, _ = graded(monkeypatch, folder, "ch08/scan")
    assert told == {"ch08/scan": "scan.py was not submitted"}
    assert "nothing was graded" in gradescope.results(*gradescope.grade_submission(folder))["output"]


def test_of_several_files_the_one_whose_path_fits_best(tmp_path, monkeypatch):
    folder = hand_in(tmp_path, scan=CHAPTER, exercises__scan__scan=SOLVED, a__notes="")
    assert graded(monkeypatch, folder) == ({"ch08/scan": "exercises/scan/scan.py"}, ["a/notes.py"])
    folder = hand_in(tmp_path / "2", a__scan=CHAPTER, b__scan=SOLVED)
    told, _ = graded(monkeypatch, folder)
    assert told == {"ch08/scan": "several files could be meant: a/scan.py, b/scan.py"}
    folder = hand_in(tmp_path / "3", a__scan=SOLVED, b__scan=SOLVED, **{"venv__lib__site-packages__scan": CHAPTER})
    (folder / "venv" / "pyvenv.cfg").write_text("")
    told, _ = graded(monkeypatch, folder)
    assert told["ch08/scan"] == "a/scan.py"


def test_a_zip_of_a_folder(tmp_path, monkeypatch):
    folder = hand_in(tmp_path)
    with zipfile.ZipFile(folder / "homework.zip", "w") as archive:
        archive.writestr("homework/scan.py", SOLVED)
        archive.writestr("../../outside.py", "")
        archive.writestr("__MACOSX/homework/._scan.py", "")
    told, strangers = graded(monkeypatch, folder)
    assert list(told) == ["ch08/scan"] and told["ch08/scan"].endswith("homework/homework/scan.py")
    assert not list(tmp_path.rglob("outside.py"))
    (folder / "homework.zip").write_bytes(b"PK not a zip")
    told, strangers = graded(monkeypatch, folder, "ch08/scan")
    assert "homework.zip cannot be unpacked" in told["ch08/scan"] and "homework.zip cannot" in strangers[0]


def test_links_and_what_is_no_text(tmp_path, monkeypatch):
    folder = hand_in(tmp_path)
    (folder / "scan.py").symlink_to(SCAN.solution)
    (folder / "chapters").symlink_to(ROOT / "chapters")
    assert graded(monkeypatch, folder, "ch08/scan")[0] == {"ch08/scan": "scan.py was not submitted"}
    (folder / "scan.py").unlink()
    (folder / "scan.py").write_bytes(b"#" * (files.LARGEST + 1))
    assert "more than" in graded(monkeypatch, folder)[0]["ch08/scan"]


def test_a_submission_without_the_file(tmp_path):
    reports, strangers = gradescope.grade_submission(tmp_path, ["ch13/topk"])
    assert reports[0]["points"] == 0 and "was not submitted" in reports[0]["criteria"][0]["seen"] and not strangers
    assert run("submission", tmp_path / "nowhere", "--results", tmp_path / "r.json") == 2


def test_a_secret_changes_the_inputs_and_is_not_said(tmp_path, monkeypatch):
    monkeypatch.setattr(student_module, "_secret", [])
    before = student_module.random(3).integers(0, 10**9, 4)
    assert (before == np.random.default_rng(3).integers(0, 10**9, 4)).all()
    (tmp_path / "secret").write_text("3039\n")
    gradescope.read_secret(tmp_path / "secret")
    assert student_module._secret == [0x3039]
    after = student_module.random(3).integers(0, 10**9, 4)
    assert (after != before).any() and (after == student_module.random(3).integers(0, 10**9, 4)).all()
    (tmp_path / "secret").write_text("no number")
    for path in (tmp_path / "secret", tmp_path / "none"):
        assert run("submission", tmp_path, "--results", tmp_path / "r.json", "--secret", path) == 2


# --- two users -------------------------------------------------------------------------------------------------------

ATTACK = """
import os, socket, time
def attempt(what, path=None):
    if what == "read": return open(path).read()[:9]
    if what == "list": return os.listdir(path)
    if what == "write": return open(path, "w").write("{}")
    if what == "signal": return os.kill(path, 9)
    if what == "connect": return repr(socket.create_connection(("127.0.0.1", 9), 1))
    if what == "leave":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(99)
            os._exit(0)
        return "left"
    if what == "who": return [os.getuid(), *os.getgroups()]
    if what == "environ": return dict(os.environ)
"""


OTHER = 64321  # a user's number; it needs no account, and nothing else runs as it


def enterable():
    """A Python, with these packages, that another user can run: this one, or the system's own of the same version."""
    packages = str(Path(np.__file__).parent.parent)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    environ = {"PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1"}
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        try:
            command = [python, "-c", "import numba, sys; print('%d.%d' % sys.version_info[:2])"]
            done = subprocess.run(command, cwd="/", env=environ, user=OTHER, group=OTHER, extra_groups=[],
                                  capture_output=True, text=True)  # fmt: skip
        except OSError:
            continue
        if done.stdout.strip() == version:
            return python, packages
    pytest.skip(f"another user can run no Python {version} with Numba here")


@pytest.fixture
def as_other(monkeypatch):
    """``(folder, student)``: a folder with an exercise and a secret, closed; a `Student` that runs as another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can run files as another user")
    python, packages = enterable()
    monkeypatch.setattr(process.sys, "executable", python)
    monkeypatch.setenv("PYTHONPATH", packages)
    base = Path(tempfile.mkdtemp(prefix="kbk-users-"))
    try:
        base.chmod(0o755)
        folder = base / "chapters" / "ch13_llm_ops" / "exercises" / "topk"
        shutil.copytree(TOPK.folder, folder)
        one = files.load(folder)
        monkeypatch.setattr(gradescope, "exercises", lambda: {one.name: one})
        entry = SimpleNamespace(pw_uid=OTHER, pw_gid=OTHER, pw_dir=str(base / "home"))
        monkeypatch.setattr(gradescope.pwd, "getpwnam", lambda name: entry)
        (base / "results").mkdir()
        (base / "secret").write_text("1")
        user = gradescope.isolate("other", base / "results", base / "secret")
        (base / "mine.py").write_text(ATTACK)
        student = Student(base / "mine.py", 60, user=user)
        yield base, student
        student.close()
    finally:
        process.close_nurseries()
        shutil.rmtree(base)


def test_another_user_reads_and_writes_nothing_of_the_graders(as_other):
    base, student = as_other
    attempt = lambda *what: student.call("attempt", *what, on=what[0]).value
    assert attempt("who") == [OTHER] and not {"GRADER", "GITHUB_TOKEN"} & set(attempt("environ"))
    topk = base / "chapters" / "ch13_llm_ops" / "exercises" / "topk"
    for what, path, errors in (
        ("read", topk / "solution.py", "PermissionError"), ("list", topk, "PermissionError"),
        ("read", base / "secret", "PermissionError"), ("list", base / "results", "PermissionError"),
        ("write", base / "results" / "results.json", "PermissionError"), ("write", base / "new", "PermissionError"),
        ("write", ROOT / "common" / "grade" / "new.py", "PermissionError"), ("signal", os.getpid(), "PermissionError"),
        ("connect", None, "PermissionError"), ("read", f"/proc/{os.getpid()}/environ", "PermissionError"),
    ):  # fmt: skip
        with pytest.raises(Wrong, match=f"{errors}|your code tried to"):
            attempt(what, path if path is None or isinstance(path, int) else str(path))


def test_nothing_that_a_file_starts_outlives_it(as_other):
    _, student = as_other
    with pytest.raises(Wrong, match="tried to start a program"):
        student.call("attempt", "leave", on="")
    assert student.call("attempt", "who", on="").value == [OTHER]
    student.close()
    running = [one for one in Path("/proc").glob("[0-9]*") if one.exists() and one.stat().st_uid == OTHER]
    assert [int(one.name) for one in running] == [process.nursery(BACKEND, student.user).process.pid]


@pytest.mark.parametrize("name, seen", [("none-of-that-name", "there is no such user"), ("root", "may do everything")])
def test_a_user_that_cannot_be_is_named(tmp_path, capsys, name, seen):
    if os.geteuid() != 0:
        seen = "only root can run files as another user"
    assert run("submission", tmp_path, "--results", tmp_path / "r.json", "--user", name) == 2
    assert seen in capsys.readouterr().err
