"""The exercises: stubs do not drift from the solutions, and the grader is right about right and wrong answers."""

import re
import tomllib

import pytest

from common.grade.exercise import ROOT, contents, exercises, gaps, skeleton
from common.grade.plugin import grade

EXERCISES = exercises()


def bank(kind):
    """[(exercise's name, a solution), …] of ``tests/wrong_solutions`` or ``tests/right_solutions``."""
    return [
        (f"{path.parent.name}/{path.stem}", one)
        for path in sorted((ROOT / "tests" / f"{kind}_solutions").rglob("*.toml"))
        for one in tomllib.loads(path.read_text(encoding="utf-8"))[kind]
    ]


WRONG, RIGHT = bank("wrong"), bank("right")


def by_name(exercise):
    return {"argvalues": [EXERCISES[name] for name in exercise], "ids": list(exercise)}


every_exercise = pytest.mark.parametrize("exercise", **by_name(EXERCISES))


# --- the files -------------------------------------------------------------------------------------------------------


@every_exercise
def test_the_stub_is_the_solution_with_its_gaps_emptied(exercise):
    text = exercise.file.read_text(encoding="utf-8")
    stub = exercise.stub()
    assert [line for _, line in skeleton(text)] == [line for _, line in skeleton(stub)], "make reset EX=…"
    assert len(gaps(stub)) >= 1 and not all(optional for *_, optional in gaps(stub))


@every_exercise
def test_an_exercise_is_whole(exercise):
    task = (exercise.folder / "README.md").read_text(encoding="utf-8")
    assert exercise.title in task and f"make grade EX={exercise.name}" in task
    for link in re.findall(r"\]\(([^)#]+)\)", task):
        assert "://" in link or (exercise.folder / link).exists(), link
    lesson = exercise.folder.parent.parent / "README.md"
    assert not lesson.exists() or f"(exercises/{exercise.folder.name}/README.md)" in lesson.read_text(encoding="utf-8")
    for one in exercise.criteria:
        assert one.about in task, f"{one.name}: the task does not say how it is graded"
        assert f"| {one.points} |" in task
    assert 2 <= len(exercise.stages) <= 5
    lines = sum(map(len, contents(exercise.solution.read_text(encoding="utf-8"))))
    assert lines <= 80, f"{lines} lines to write"
    wrong = [one for name, one in WRONG if name == exercise.name]
    assert len(wrong) >= (6 if exercise.name in ("ch13/topk", "ch13/topp", "ch14/kv_cache") else 3)
    assert len([one for name, one in RIGHT if name == exercise.name]) >= 2


# --- the grader ------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path_factory):
    """Writes a file for an exercise, in one place for all tests: what does not change is not compiled anew."""

    def write(exercise, text):
        file = tmp_path_factory.getbasetemp() / exercise.name / exercise.file.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write


@every_exercise
def test_what_is_not_begun_fails_everything(exercise, write):
    report = grade(exercise, write(exercise, exercise.stub()))
    assert report["points"] == 0 and not report["passed"]
    for row in report["criteria"]:
        assert row["seen"].startswith("not implemented") and row["hint_name"] == "start"


@every_exercise
def test_the_solution_passes_everything(exercise, write):
    report = grade(exercise, write(exercise, exercise.solution.read_text(encoding="utf-8")))
    missed = {row["name"]: row["seen"] for row in report["criteria"] if not row["passed"]}
    assert not missed and report["points"] == report["max_points"] == exercise.points


def text_of(exercise, one):
    """The solution, changed as a bank says: texts replaced, or whole gaps (counted from 0) filled with others."""
    text = exercise.solution.read_text(encoding="utf-8")
    for old, new in one.get("replace", ()):
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new.replace("{ROOT}", str(ROOT)))
    lines = text.splitlines()
    for number, new in sorted(one.get("fill", ()), reverse=True):
        first, last, _ = gaps(text)[number]
        lines[first : last - 1] = new.splitlines()
    return "\n".join([*lines, ""])


def named(bank):
    return [f"{name}-{one['name']}" for name, one in bank]


@pytest.mark.parametrize("name, right", RIGHT, ids=named(RIGHT))
def test_an_unusual_solution_passes(name, right, write):
    exercise = EXERCISES[name]
    report = grade(exercise, write(exercise, text_of(exercise, right)))
    assert report["passed"], {row["name"]: row["seen"] for row in report["criteria"] if not row["passed"]}


@pytest.mark.parametrize("name, wrong", WRONG, ids=named(WRONG))
def test_a_wrong_solution_is_rejected_with_its_hint(name, wrong, write):
    exercise = EXERCISES[name]
    report = grade(exercise, write(exercise, text_of(exercise, wrong)), first=True)
    missed = next((row for row in report["criteria"] if not row["passed"]), None)
    assert missed is not None, f"{wrong['mistake']}: passed"
    hints = wrong["hint"], wrong.get("hint_if_slow", wrong["hint"])
    assert missed["name"] == wrong["criterion"] and missed["hint_name"] in hints, missed["seen"]
