"""Exercises as files: where they are, their gaps, and what can be said of a student's file without running it."""

import ast
import builtins
import difflib
import functools
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BEGIN = re.compile(r"^\s*# --- your code begins( \(optional\))? ---$")
END = re.compile(r"^\s*# --- your code ends ---$")
TODO = 'raise NotImplementedError("your code")'
LARGEST = 1_000_000  # bytes of a student's file

# What a gap has no use for. Names; attributes, of anything; attributes of NumPy; and the double-underscored names that
# it may use. With them, code could reach the grader instead of doing the task.
OUT_OF_REACH = {
    "__builtins__", "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "exit", "globals", "input",
    "locals", "memoryview", "open", "quit", "setattr", "vars",
}  # fmt: skip
HIDDEN = {
    "atexit", "builtins", "ctypes", "ctypeslib", "gc", "gi_frame", "f_back", "f_globals", "f_locals", "host",
    "importlib", "inspect", "io", "linecache", "modules", "multiprocessing", "os", "py_func", "runpy", "shutil",
    "signal", "socket", "subprocess", "sys", "tb_frame", "tempfile", "threading", "traceback",
}  # fmt: skip
HIDDEN_IN_NUMPY = {
    "DataSource", "_core", "core", "f2py", "fromfile", "genfromtxt", "lib", "load", "loadtxt", "memmap", "save",
    "savetxt", "savez", "savez_compressed", "test", "testing",
}  # fmt: skip
SPECIAL = {"__init__", "__call__", "__len__", "__iter__", "__next__", "__getitem__", "__name__", "__doc__"}

# Hints that fit everywhere; an exercise's own hint of the same name comes first.
GENERAL = {
    "start": "Read the task (README.md beside the file), and write your code between the two marks.",
    "error": "Your code stopped with an error. Its last line says what, and the line before where.",
    "syntax": "Python cannot read the file. If the line looks right, look at the one before: a bracket that is not "
    "closed, a colon that is missing, an indentation that does not fit.",
    "load": "The file stops before any kernel runs: what stands in a gap outside of a function is run when the file is "
    "loaded. Try it: python FILE.",
    "exit": "A function ends with return, and the program with its last line: nothing in the task asks to leave it.",
    "follows": "Something that this criterion builds on is not right yet: fix the criteria above first.",
    "unseen": "A kernel that touches no array does nothing. If yours does, the sanitizer cannot look into it: make the "
    "device function simpler in which it does so.",
    "alone": "Few threads do the work of all, and the others wait. Give every thread a share of it.",
    "time": "Your code may be right: this machine was too slow for it, or it does far more work than the task needs. "
    "Grade it again when the machine has nothing else to do.",
    "submitted": "Hand in one file for each exercise, under its own name (topk.py for ch13/topk), or the whole book.",
    "changed": "Only what stands between the marks is yours. `make reset EX=…` gives the file back; yours is kept.",
    "endless": "Something does not come to an end. Does every path through a loop move its variable on? (Or it works "
    "far more than the task needs: compiling, and what else the machine does, are not counted.)",
    "crash": "The process died. An index far outside of an array does that: run it with MINI_CHECK=1.",
    "own-work": "Write it yourself, from what the file imports: that is what the exercise is for.",
    "shared-race": "Threads of a block meet at one element of shared memory. Which barrier is missing in between?",
    "global-race": "Two threads touch one element of an array, and nothing says who comes first. Give each its own.",
    "out-of-bounds": "There are more threads than elements, or an index goes too far: guard it with an if.",
    "negative-index": "An index below 0 counts from the end, silently, also on a GPU: guard it with an if.",
    "uninitialized-shared": "Shared memory holds anything at the start: write it, wait, then read it.",
    "uninitialized-local": "A local array holds anything at the start: fill it first.",
    "uninitialized-global": "Not every element of a result was written before it was read.",
    "divergent-barrier": "A barrier must be reached by all threads of the block: take it out of the if.",
    "exited-barrier": "A thread that returns early never reaches the barrier. Put the work under an if instead.",
    "shuffle-mask": "All lanes that a shuffle's mask names must take part in it.",
    "int-overflow": "A number was cast to a type in which it does not fit.",
    "hang": "A loop waits for something that no other thread will do.",
}  # fmt: skip


class ExerciseError(Exception):
    """A mistake of the user's, or of the exercise's author: the message says what is wrong and how to fix it."""


@dataclass(frozen=True)
class Criterion:
    """name: its check is ``test_name``. points: all or none. about: what it asks. hint: the one if no other fits.

    needs: names of earlier criteria that it builds on. If one of them is missed, a miss of this one follows from that.
    """

    name: str
    points: int
    about: str
    hint: str
    needs: tuple = ()


@dataclass(frozen=True)
class Exercise:
    """An exercise as its ``exercise.toml`` has it. folder: absolute. stages: the hints of ``make hint``, in order.

    seconds: that all calls of a student's code may work together.
    """

    name: str  # "ch13/topk"
    folder: Path
    title: str
    seconds: float
    criteria: tuple
    hints: dict = field(repr=False)
    stages: tuple = field(repr=False)

    @property
    def file(self):
        return self.folder / f"{self.folder.name}.py"

    @property
    def solution(self):
        return self.folder / "solution.py"

    @property
    def points(self):
        return sum(one.points for one in self.criteria)

    def has_hint(self, key):
        """Is there a hint of this name, the exercise's own or a general one?"""
        return key in self.hints or key in GENERAL

    def hint(self, key):
        """The text of a hint. Raises KeyError."""
        return self.hints[key] if key in self.hints else GENERAL[key]

    def stub(self):
        """What the student begins with: the solution with its gaps emptied."""
        return stub(self.solution.read_text(encoding="utf-8"))


@functools.cache
def exercises():
    """{name: `Exercise`}, in the order of the book."""
    folders = [*ROOT.glob("chapters/ch??_*/exercises/*/"), *ROOT.glob("ch14_mini_llm/exercises/*/")]
    found = [load(folder) for folder in folders if (folder / "exercise.toml").is_file()]
    return {one.name: one for one in sorted(found, key=lambda one: (one.name[:4], one.folder.name))}


def load(folder):
    """The exercise in a folder. Raises `ExerciseError` if its ``exercise.toml`` does not hold what it must."""
    file = folder / "exercise.toml"
    try:
        told = tomllib.loads(file.read_text(encoding="utf-8"))
        criteria = tuple(Criterion(name, **facts) for name, facts in told["criteria"].items())
        made = Exercise(
            name=f"{folder.parent.parent.name[:4]}/{folder.name}", folder=folder, title=told["title"],
            seconds=float(told["seconds"]), criteria=criteria, hints=told["hints"], stages=tuple(told["stages"]),
        )  # fmt: skip
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ExerciseError(f"{shown(file)}: {type(error).__name__}: {error}") from None
    earlier = set()
    for one in criteria:
        if not made.has_hint(one.hint):
            raise ExerciseError(f"{shown(file)}: criterion {one.name}: there is no hint {one.hint!r}")
        if not earlier >= set(one.needs):
            raise ExerciseError(f"{shown(file)}: criterion {one.name} needs {list(one.needs)}, not all earlier ones")
        earlier.add(one.name)
    return made


def find(name):
    """The exercise of a name such as ``ch13/topk``, or ``topk``. Raises `ExerciseError` with the nearest names."""
    known = exercises()
    short = [one for one in known if one.split("/")[1] == name]
    if name in known or len(short) == 1:
        return known[name if name in known else short[0]]
    near = short or difflib.get_close_matches(name, [*known, *(n.split("/")[1] for n in known)], 3, 0.5)
    near = [n if "/" in n else next(k for k in known if k.endswith(f"/{n}")) for n in near]
    near = near or [n for n in known if n.startswith(name[:4])] or list(known)
    raise ExerciseError(f"there is no exercise {name!r}; nearest: {', '.join(dict.fromkeys(near))}")


def shown(path):
    """A path as people read it: from the repository's root, if it lies there."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# --- gaps ------------------------------------------------------------------------------------------------------------


def gaps(text):
    """[(line of the begin mark, line of the end mark, optional?), …] with lines counted from 1.

    Raises `ExerciseError` if marks do not come in pairs.
    """
    found, begin = [], None
    for number, line in enumerate(text.splitlines(), 1):
        if match := BEGIN.match(line):
            if begin is not None:
                raise ExerciseError(f"line {number}: a gap begins inside the one that begins in line {begin[0]}")
            begin = number, bool(match[1])
        elif END.match(line):
            if begin is None:
                raise ExerciseError(f"line {number}: a gap ends that has not begun")
            found.append((begin[0], number, begin[1]))
            begin = None
    if begin is not None:
        raise ExerciseError(f"the gap that begins in line {begin[0]} does not end: its mark is missing")
    return found


def contents(text):
    """What stands in each gap, without comments and blank lines: a list of lists of lines."""
    lines = text.splitlines()
    told = [[line.strip() for line in lines[first : last - 1]] for first, last, _ in gaps(text)]
    return [[line for line in gap if line and not line.startswith("#")] for gap in told]


def skeleton(text):
    """The lines outside of the gaps, marks included, each with its number: [(number, line), …]."""
    inside = {n for first, last, _ in gaps(text) for n in range(first + 1, last)}
    return [(n, line.rstrip()) for n, line in enumerate(text.splitlines(), 1) if n not in inside]


def stub(text):
    """A solution with its gaps emptied: what has to be there raises NotImplementedError."""
    lines, out, after = text.splitlines(), [], 0
    for first, last, optional in gaps(text):
        out += lines[after:first]
        indent = lines[first - 1][: len(lines[first - 1]) - len(lines[first - 1].lstrip())]
        out += [] if optional else [f"{indent}{TODO}"]
        after = last - 1
    return "\n".join([*out, *lines[after:], ""])


# --- a student's file, as text ---------------------------------------------------------------------------------------


def read(file, exercise=None):
    """The bytes of a student's file. Raises `ExerciseError` if it is no file, cannot be read, or is too large."""
    anew = f"; `make reset EX={exercise.name}` makes it anew" if exercise and file == exercise.file else ""
    if not file.exists():
        raise ExerciseError(f"there is no file {file}{anew}")
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "not a regular file"
        raise ExerciseError(f"{file} is {kind}: name a Python file{anew}")
    try:
        with file.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except OSError as error:
        raise ExerciseError(f"{file} cannot be read: {error.strerror}") from None
    if len(data) > LARGEST:
        raise ExerciseError(f"{file} has more than {LARGEST} bytes: name a Python file")
    return data


def look(exercise, file):
    """What is wrong with a student's file as text: ``(what was seen, hint's name)``, or None."""
    name = file.name
    try:
        text = read(file, exercise).decode("utf-8")
    except UnicodeDecodeError as error:
        return f"{name}: not UTF-8 text: {error}", "syntax"
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        kind = "" if type(error) is SyntaxError else f"{type(error).__name__}: "
        return f"{name}:{error.lineno}: {kind}{error.msg}: {(error.text or '').strip()}", "syntax"
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL character; brackets without an end
        return f"{name}: not a Python program: {error or type(error).__name__}", "syntax"
    expected = exercise.stub()
    for node in ast.parse(expected).body:
        if isinstance(node, ast.FunctionDef):
            mine = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == node.name), None)
            if mine is None:
                return f"{name}: the function {node.name} is missing", "changed"
            if ast.unparse(mine.args) != ast.unparse(node.args):
                told = f"{node.name}({ast.unparse(mine.args)}); it must be {node.name}({ast.unparse(node.args)})"
                return f"{name}:{mine.lineno}: the signature is {told}", "changed"
    try:
        mine, theirs = skeleton(text), skeleton(expected)
    except ExerciseError as error:
        return f"{name}: {error}", "changed"
    for (number, line), (_, other) in zip([*mine, (len(text.splitlines()) + 1, None)], [*theirs, (0, None)]):
        if line != other:
            mine, theirs = (("(nothing)" if one is None else one.strip() or "(blank)") for one in (line, other))
            return f"{name}:{number}: outside of the marks stands {mine}; the exercise has {theirs} there", "changed"
    places = gaps(text)
    for (first, _, optional), gap in zip(places, contents(text)):
        if not optional and gap in ([], [TODO]):
            return f"not implemented: {name}, the gap in line {first + 1}", "start"
    wrong = out_of_reach(tree, places)
    return wrong and (f"{name}:{wrong[0]}: {wrong[1]}", "own-work")


def out_of_reach(tree, places):
    """The first thing in the gaps that is not for use there: ``(line, in words)``, or None.

    It keeps honest mistakes and lazy tricks from deciding a grade. It is no wall: see "For teachers" in
    ``chapters/exercises.md``.
    """
    inside = lambda node: any(first < getattr(node, "lineno", 0) < last for first, last, _ in places)
    given = {name for node in tree.body if not inside(node) for name in bound(node)}
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) and not inside(node)]
    imported = {name for node in imports for name in bound(node)}
    numpy = {name for node in imports for name in bound(node) if ast.unparse(node).startswith("import numpy")}
    for node in tree.body:
        if not inside(node):
            continue
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return node.lineno, f"{ast.unparse(node)}: all you need is imported above"
        if not constant and not isinstance(node, (ast.FunctionDef, ast.Assign, ast.AnnAssign, ast.Pass)):
            return node.lineno, f"{first_line(node)}: outside of functions, a gap is for functions and constants only"
        for name in bound(node):
            if name in given or hasattr(builtins, name):
                return node.lineno, f"{name} is taken: give it a name of its own"
    for node in ast.walk(tree):
        if inside(node) and (wrong := reaches(node, imported, numpy)):
            return node.lineno, wrong
    return None


def reaches(node, imported, numpy):
    """Why a node in a gap is not for use there, in words; None if it is. imported, numpy: names that were imported."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return f"{ast.unparse(node)}: all you need is imported above"
    if isinstance(node, ast.Global):
        return f"{ast.unparse(node)}: what stands outside of the gap stays as it is"
    if isinstance(node, ast.Name) and (node.id in OUT_OF_REACH or special(node.id)):
        return f"{node.id} is not for use here"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        constant = len(node.args) > 1 and isinstance(node.args[1], ast.Constant)
        if not constant or node.args[1].value in HIDDEN or special(str(node.args[1].value)):
            return f"{ast.unparse(node)[:60]}: {node.func.id} is not for use here"
    if isinstance(node, ast.Attribute):
        whose = node.value.id if isinstance(node.value, ast.Name) else None
        hidden = (node.attr in HIDDEN and whose != "self") or (whose in numpy and node.attr in HIDDEN_IN_NUMPY)
        if hidden or special(node.attr):
            return f"{ast.unparse(node)[:60]} is not for use here"
        changed = isinstance(node.ctx, (ast.Store, ast.Del))
        if changed and (whose in imported or isinstance(node.value, ast.Call)):
            return f"{ast.unparse(node)[:60]} = …: what stands outside of the gap stays as it is"
    return None


def special(name):
    """Is it a name with two underscores around it that code in a gap has no use for?"""
    return name.startswith("__") and name.endswith("__") and name not in SPECIAL


def bound(node):
    """The names that a statement outside of functions binds."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(one.asname or one.name).split(".")[0] for one in node.names]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, (ast.Store, ast.Del))]


def first_line(node):
    return ast.unparse(node).splitlines()[0][:60]
