"""Grade one exercise: its checks run under pytest, a criterion is met if all cases of its test pass."""

import contextlib
import io
import json
import os
import time
from pathlib import Path

import pytest

from .exercise import ROOT, ExerciseError, look
from .student import Student, Wrong

INI = Path(__file__).with_name("pytest.ini")


class Grading:
    """A pytest plugin for one exercise and one student's file: gives ``student``, and notes what came of each check.

    first: stop after the first criterion that is not met.
    """

    def __init__(self, exercise, file, first=False):
        self.exercise, self.first = exercise, first
        self.student_process = Student(file, exercise.seconds)
        self.met = {}  # criterion -> True, or (seen, hint, cause)
        self.notes = {}  # criterion -> what its check set as `student.note`
        self.broken = None  # a mistake in grade.py itself

    @pytest.fixture(scope="session")
    def student(self):
        """The student's file: see `common.grade.student.Student`."""
        return self.student_process

    def pytest_collection_modifyitems(self, items):
        order = [one.name for one in self.exercise.criteria]
        names = {criterion_of(item) for item in items}
        if names != set(order):
            self.broken = f"criteria {sorted(order)}, but there are tests of {sorted(names)}"
            items[:] = []
        items.sort(key=lambda item: order.index(criterion_of(item)))

    def pytest_runtest_setup(self, item):
        criterion = criterion_of(item)
        if self.met.get(criterion, True) is not True:
            pytest.skip("this criterion is not met already")
        if self.first and any(one is not True for one in self.met.values()):
            pytest.skip("an earlier criterion is not met")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo is None:
            if report.when == "call":
                self.met.setdefault(criterion_of(item), True)
                self.notes[criterion_of(item)], self.student_process.note = self.student_process.note, None
        elif not call.excinfo.errisinstance(pytest.skip.Exception):
            error = call.excinfo.value
            seen, hint, cause = f"{type(error).__name__}: {error}", None, None
            if isinstance(error, Wrong):
                seen, hint, cause = error.seen, error.hint, error.cause
            if not isinstance(error, (Wrong, AssertionError)):
                self.broken = f"{item.name}: {call.excinfo.exconly()}"
            self.met[criterion_of(item)] = seen, hint, cause
        return report


def criterion_of(item):
    """The criterion that a test is about: its function's name without ``test_``."""
    return item.function.__name__.removeprefix("test_")


def grade(exercise, file=None, first=False, junit=None):
    """Grade a file; returns a dict for JSON.

    file: the student's file, by default the exercise's own. first: see `Grading`. junit: a path for pytest's XML.
    The dict has ``exercise, title, file, points, max_points, seconds, passed, criteria``; a criterion has ``name,
    about, points, max_points, passed, note, seen, cause, hint_name, hint``. The last four are None where it is met;
    cause is what was seen without the input, if it does not depend on it; note is what the check measured, or None.
    Raises `ExerciseError` if there is no such file, or if the checks themselves are broken.
    """
    start = time.perf_counter()
    file = Path(file or exercise.file)
    wrong = look(exercise, file)
    grading = Grading(exercise, file, first)
    if wrong is None:
        arguments = [str(exercise.folder / "grade.py"), "-c", str(INI), "--rootdir", str(ROOT)]
        arguments += [f"--junitxml={junit}"] if junit else []
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), without_other_plugins():
            try:
                code = pytest.main(arguments, plugins=[grading])
            finally:
                grading.student_process.close()
        if grading.broken or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            told = grading.broken or said.getvalue()[-2000:] or f"pytest ended with {code}"
            raise ExerciseError(f"the checks of {exercise.name} are broken: {told}")
    rest = ("not tried", None, None) if wrong is None else (*wrong, None)
    return report_of(exercise, str(file), rest, grading.met, grading.notes, time.perf_counter() - start)


def report_of(exercise, file, rest, met=None, notes=None, seconds=0.0):
    """A report in the form that `grade` returns.

    met: criterion -> True, or (seen, hint or None, cause or None); rest: the same for criteria that met does not have.
    notes: criterion -> note.
    """
    criteria = []
    for one in exercise.criteria:
        result = (met or {}).get(one.name, rest)
        row = {"name": one.name, "about": one.about, "points": 0, "max_points": one.points, "passed": result is True}
        row |= {"note": (notes or {}).get(one.name), "seen": None, "cause": None, "hint_name": None, "hint": None}
        if result is True:
            row["points"] = one.points
        else:
            seen, hint, cause = result
            hint = hint if exercise.has_hint(hint) else one.hint
            row |= {"seen": seen, "cause": cause or seen, "hint_name": hint, "hint": exercise.hint(hint)}
        criteria.append(row)
    points = sum(row["points"] for row in criteria)
    return {
        "exercise": exercise.name, "title": exercise.title, "file": file, "points": points,
        "max_points": exercise.points, "passed": points == exercise.points,
        "seconds": round(seconds, 2), "criteria": criteria,
    }  # fmt: skip


@contextlib.contextmanager
def without_other_plugins():
    """Within it, pytest loads no plugin that happens to be installed: grades are the same everywhere."""
    name = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def save(report, path):
    """Write a report, or a list of them, as JSON; the file is whole or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
