"""Exercises as files: where they are, their gaps, and what can be said of a student's file without running it."""

import ast
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
OUT_OF_REACH = {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "open", "vars"}

# Hints that fit everywhere; an exercise's own hint of the same name comes first.
GENERAL = {
    "start": "Read the task (README.md beside the file), and write your code between the two marks.",
    "error": "Your code stopped with an error. Its last line says what, and the line before where.",
    "changed": "Only what stands between the marks is yours. `make reset EX=…` gives the file back; yours is kept.",
    "endless": "Something does not come to an end. Does every path through a loop move its variable on?",
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
    """A mistake of the user's, or of the exercise's author: the message says what is wrong and how to mend it."""


@dataclass(frozen=True)
class Criterion:
    """name: its check is ``test_name``. points: all or none. about: what it asks. hint: the one if no other fits."""

    name: str
    points: int
    about: str
    hint: str


@dataclass(frozen=True)
class Exercise:
    """An exercise as its ``exercise.toml`` tells it. folder: absolute. stages: the hints of ``make hint``, in order."""

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
    for one in criteria:
        if not made.has_hint(one.hint):
            raise ExerciseError(f"{shown(file)}: criterion {one.name}: there is no hint {one.hint!r}")
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


def look(exercise, file):
    """What is wrong with a student's file as text: ``(what was seen, hint's name)``, or None."""
    name = file.name
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ExerciseError(f"there is no file {file}; `make reset EX={exercise.name}` makes it anew") from None
    except UnicodeDecodeError as error:
        return f"{name}: not UTF-8 text: {error}", "error"
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        return f"{name}:{error.lineno}: {error.msg}: {(error.text or '').strip()}", "error"
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
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if any(first < line < last for first, last, _ in places):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                return f"{name}:{line}: {ast.unparse(node)}: all you need is imported above", "own-work"
            if isinstance(node, ast.Name) and node.id in OUT_OF_REACH:
                return f"{name}:{line}: {node.id} is not for use here", "own-work"
    return None
