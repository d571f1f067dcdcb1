"""Grade one exercise: its checks run under pytest, a criterion is met if all cases of its test pass."""

import contextlib
import io
import json
import os
import time
from pathlib import Path

import pytest

from .exercise import ROOT, ExerciseError, look
from .process import Broken
from .student import Student, Wrong

INI = Path(__file__).with_name("pytest.ini")


class Grading:
    """A pytest plugin for one exercise and one student's file: gives ``student``, and notes what came of each check.

    first: stop after the first criterion that is not met.
    """

    def __init__(self, exercise, file, first=False, user=None):
        self.exercise, self.first = exercise, first
        self.student_process = Student(file, exercise.seconds, user=user)
        self.met = {}  # criterion -> True, or what is `Wrong`
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
            if isinstance(error, Broken):
                self.broken = str(error)
            if not isinstance(error, Wrong):  # the check did not expect such a value; the reference passes it
                error = Wrong(f"what came back cannot be checked ({type(error).__name__}: {error})")
            self.met[criterion_of(item)] = error
        return report


def criterion_of(item):
    """The criterion that a test is about: its function's name without ``test_``."""
    return item.function.__name__.removeprefix("test_")


def grade(exercise, file=None, first=False, junit=None, user=None):
    """Grade a file; returns a dict for JSON, see `report_of`.

    file: the student's file, by default the exercise's own. first: see `Grading`. junit: a path for pytest's XML. user:
    a `process.User` as whom the file runs.
    Raises `ExerciseError` if there is no such file, or if the checks themselves are broken.
    """
    start = time.perf_counter()
    file = Path(file or exercise.file)
    wrong = look(exercise, file)
    if wrong is not None:
        return report_of(exercise, str(file), Wrong(*wrong), seconds=time.perf_counter() - start)
    grading = Grading(exercise, file, first, user)
    arguments = [str(exercise.folder / "grade.py"), "-c", str(INI), "--rootdir", str(ROOT)]
    arguments += [f"--junitxml={junit}"] if junit else []
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), without_other_plugins():
        try:
            code = pytest.main(arguments, plugins=[grading])
        finally:
            grading.student_process.close()
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if grading.broken or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        what = grading.broken or said.getvalue()[-2000:] or f"pytest ended with {code}"
        raise ExerciseError(f"{exercise.name} cannot be graded: {what}")
    seconds = time.perf_counter() - start
    return report_of(exercise, str(file), Wrong("not tried"), grading.met, grading.notes, seconds)


GATED = 4  # beside a finding of the sanitizer, what is right counts a quarter


def report_of(exercise, file, wrong, met=None, notes=None, seconds=0.0):
    """A report, as a dict for JSON.

    wrong: a `Wrong` for all criteria that ``met`` does not have. met: criterion -> True, or a `Wrong`. notes: criterion
    -> what its check measured.
    The dict has ``exercise, title, file, points, max_points, seconds, passed, gate, criteria``. gate: the criterion at
    which the sanitizer found something, or None; if there is one, all points are a quarter. A criterion has ``name,
    about, points, max_points, passed, note, seen, cause, follows, hint_name, hint``. The last five are None where it is
    met; cause is what was seen without the input, if it does not depend on it; follows is the name of an earlier
    criterion whose miss explains this one, and then hint is None.
    """
    criteria, missed = [], {}
    gate = next((one.name for one in exercise.criteria if getattr((met or {}).get(one.name), "gate", False)), None)
    for one in exercise.criteria:
        result = (met or {}).get(one.name, wrong)
        row = {"name": one.name, "about": one.about, "points": 0, "max_points": one.points, "passed": result is True}
        row |= {"note": (notes or {}).get(one.name), "seen": None, "cause": None, "follows": None}
        row |= {"hint_name": None, "hint": None}
        if result is True:
            row["points"] = one.points / GATED if gate else one.points
        else:
            hint, cause = result.hint if exercise.has_hint(result.hint) else one.hint, result.cause or result.seen
            first = next((e for e in missed.values() if e["name"] in one.needs or e["cause"] == cause), None)
            row |= {"seen": result.seen, "cause": cause, "hint_name": hint, "hint": exercise.hint(hint)}
            if first is not None:
                row |= {"follows": first["follows"] or first["name"], "hint": None}
            missed[one.name] = row
        criteria.append(row)
    points = sum(row["points"] for row in criteria)
    points = int(points) if points == int(points) else points
    return {
        "exercise": exercise.name, "title": exercise.title, "file": file, "points": points,
        "max_points": exercise.points, "passed": points == exercise.points,
        "seconds": round(seconds, 2), "gate": gate, "criteria": criteria,
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
