"""The page on exercises is true: its list is the exercises' own, and its transcript is what the commands print.

    python -m tests.test_exercises_page    write both into the page

The transcript follows a student through ch13/topk: the stub, a first attempt with two mistakes, hints, the fixes.
"""

import contextlib
import io
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from common.grade import __main__ as commands
from common.grade import exercise as files

ROOT = files.ROOT
PAGE = ROOT / "chapters" / "exercises.md"
NAME, FILE = "ch13/topk", "chapters/ch13_llm_ops/exercises/topk/topk.py"
TIES = ("            if other > x or (other == x and j < i):", "            if other > x:")
ONE_THREAD = ("    if tid == 0:\n        everything", "    if tid < WARP:\n        everything")


def listed():
    """The exercises as a Markdown table."""
    lines = ["| exercise | what you write | points |", "|---|---|---|"]
    for name, one in files.exercises().items():
        link = f"../{one.folder.relative_to(ROOT).as_posix()}/README.md".removeprefix("../chapters/")
        lines.append(f"| [{name}]({link}) | {one.title} | {one.points} |")
    return "\n".join(lines) + "\n"


def transcript():
    """What a student's terminal shows, from the first command to the last, by running them in a copy."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        folder = Path(folder).resolve() / "ch13_llm_ops" / "exercises" / "topk"
        shutil.copytree(files.find(NAME).folder, folder)
        exercise = files.load(folder)
        for module in (files, commands):
            patch.setattr(module, "exercises", lambda: {NAME: exercise})
        patch.setattr(commands, "NOTES", folder / "notes.json")
        shown = []

        def run(make, *arguments):
            text = io.StringIO()
            with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
                commands.main(list(arguments))
            shown.append(f"$ make {make} EX={NAME}\n{text.getvalue().rstrip()}\n")

        solved = exercise.solution.read_text(encoding="utf-8")
        attempt = solved.replace(*TIES).replace(*ONE_THREAD)
        assert TIES[0] not in attempt and ONE_THREAD[0] not in attempt
        exercise.file.write_text(exercise.stub(), encoding="utf-8")
        run("grade", "run", NAME)
        shown.append(f"$ $EDITOR {FILE}    # a first attempt at both kernels\n")
        exercise.file.write_text(attempt, encoding="utf-8")
        run("grade", "run", NAME)
        run("hint", "hint", NAME)
        run("hint", "hint", NAME)
        one, warp = (text.splitlines()[0] for text in ONE_THREAD)
        fix = f"-{TIES[1]}\n+{TIES[0]}\n…\n-{warp}\n+{one}\n"
        shown.append(f"$ $EDITOR {FILE}    # an order among equals, and one thread that writes\n{fix}")
        exercise.file.write_text(solved, encoding="utf-8")
        run("grade", "run", NAME)
        run("progress", "progress")
        shown[-1] = shown[-1].replace(f" EX={NAME}", "", 1)
    return "\n".join(shown)


def put(page, mark, text):
    """The page with what stands between a mark and the next ``<!-- end -->`` replaced."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert len(pattern.findall(page)) == 1, mark
    return pattern.sub(lambda found: found[1] + text + found[2], page)


def without_times(page):
    """Seconds differ from run to run."""
    return re.sub(r"\d+\.\d s\b", "… s", page)


def test_the_list_of_exercises():
    page = PAGE.read_text(encoding="utf-8")
    assert put(page, "list", listed()) == page, "out of date: python -m tests.test_exercises_page"
    for link in re.findall(r"\]\(([^)#]+)\)", page):
        assert "://" in link or (PAGE.parent / link).exists(), link


def test_the_transcript():
    page = PAGE.read_text(encoding="utf-8")
    now = put(page, "transcript", f"```text\n{transcript()}```\n")
    assert without_times(now) == without_times(page), "out of date: python -m tests.test_exercises_page"


if __name__ == "__main__":
    text = put(PAGE.read_text(encoding="utf-8"), "list", listed())
    PAGE.write_text(put(text, "transcript", f"```text\n{transcript()}```\n"), encoding="utf-8")
