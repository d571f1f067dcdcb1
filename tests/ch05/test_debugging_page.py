"""The page on debugging is true: its scripts print what stands below them, and its fixes are clean.

    python -m tests.ch05.test_debugging_page    write what the scripts print now into the page

On the page, the first ``python`` block is the beginning of every script, and each further one is a script, named in the
text before it. A ``text`` block after it is what it prints (long lines wrapped), a ``diff`` block after that the fix.
A script without a ``text`` block is an exercise: it has a finding.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from common import BACKEND

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "chapters" / "ch05_measuring" / "debugging.md"
WIDTH = 120
DRIVER = """
import contextlib, io, json, runpy, sys
printed = {}
for file in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        runpy.run_path(file, run_name="__main__")
    printed[file] = text.getvalue()
print(json.dumps(printed))
"""


def scripts(page):
    """The page's scripts, {name: {"python": code, "text": what it prints, "diff": fix}}, and where the text stands."""
    found, name, start = {}, None, 0
    fences = list(re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))
    prelude = next(fence[2] for fence in fences if fence[1] == "python")
    for fence in fences:
        if fence[1] == "python" and fence[2] != prelude:
            name = re.findall(r"`(\w+\.py)`:\n\n\Z", page[start : fence.start()])[-1]
            assert name not in found, f"two scripts are named {name}"
            found[name] = {"python": f"{prelude}\n{fence[2]}"}
        elif fence[1] in ("text", "diff") and name:
            found[name][fence[1]] = fence[2]
            found[name][f"{fence[1]} at"] = fence.span(2)
        start = fence.end()
    return found


def fixed(code, diff):
    """A script after its fix: the lines of the diff that begin with a blank or - become those with a blank or +."""
    lines = diff.splitlines(keepends=True)
    before, after = ("".join(line[1:] for line in lines if line[0] in marks) for marks in (" -", " +"))
    assert code.count(before) == 1, f"not there, or not once:\n{before}"
    return code.replace(before, after)


def printed(codes):
    """Run scripts, {name: code}, on the CPU backend, all in one process: {name: what it prints, wrapped}."""
    with tempfile.TemporaryDirectory() as folder:
        files = {str(Path(folder).resolve() / name): code for name, code in codes.items()}
        for file, code in files.items():
            Path(file).write_text(code, encoding="utf-8")
        environ = os.environ | {"MINI_BACKEND": "cpu", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-c", DRIVER, *files]
        done = subprocess.run(command, env=environ, capture_output=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        said = json.loads(done.stdout.splitlines()[-1])
        here = f"{Path(folder).resolve()}{os.sep}"
        return {Path(file).name: wrapped(text.replace(here, "")) for file, text in said.items()}


def wrapped(text):
    """Text with its long lines broken, the rest of each set in by two more."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        broken = textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        lines += [line.rstrip()] if len(line) <= WIDTH else broken
    return "\n".join(lines) + "\n"


def filled(page, said):
    """The page with what its scripts print."""
    for name, script in reversed(scripts(page).items()):
        if "text" in script:
            first, last = script["text at"]
            page = page[:first] + said[name] + page[last:]
    return page


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def said(page):
    """What all scripts print; those with their fix are named ``fixed_…``."""
    if BACKEND != "cpu":
        pytest.skip("the sanitizer and the memory report are modes of the CPU backend; this run is on a GPU")
    found = scripts(page)
    codes = {name: script["python"] for name, script in found.items()}
    codes |= {f"fixed_{name}": fixed(one["python"], one["diff"]) for name, one in found.items() if "diff" in one}
    return printed(codes)


def test_the_scripts_print_what_the_page_says(page, said):
    assert filled(page, said) == page, "run `python -m tests.ch05.test_debugging_page`"


def test_each_bug_is_found_and_its_fix_is_clean(page, said):
    bugs = [name for name, script in scripts(page).items() if "diff" in script]
    assert len(bugs) >= 7
    for name in bugs:
        assert re.search(r"^\d+ findings? in 1 launch", said[name], re.MULTILINE), name
        clean = said[f"fixed_{name}"]
        assert "\nno findings in 1 launch" in f"\n{clean}" and not re.search("note:|right: False", clean), clean


def test_each_exercise_has_a_bug_that_is_found(page, said):
    exercises = [name for name, script in scripts(page).items() if "text" not in script]
    assert len(exercises) == 3
    for name in exercises:
        assert re.search(r"^\d+ findings? in 1 launch", said[name], re.MULTILINE), name


def test_its_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page, flags=re.DOTALL)):
        assert (PAGE.parent / target).is_file(), target


if __name__ == "__main__":
    now = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(filled(now, printed({name: one["python"] for name, one in scripts(now).items()})), encoding="utf-8")
