"""For teachers: results in the form that Gradescope reads, and the zip that it runs.

Source of the form: Gradescope's documentation, "Autograder Specifications" (results.json; setup.sh and run_autograder
at the top of the zip; a submission in ``submission/``, results in ``results/results.json``).
"""

import shutil
import subprocess
import zipfile
from pathlib import Path

from .exercise import ROOT, exercises
from .plugin import grade, report_of
from .student import Wrong

SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image.
set -euo pipefail
cd "${AUTOGRADER_ROOT:-/autograder}/source/kernel-by-kernel"
python3 -m venv "${AUTOGRADER_ROOT:-/autograder}/venv"
"${AUTOGRADER_ROOT:-/autograder}/venv/bin/pip" install -e ".[grade]"
"""
RUN = """#!/usr/bin/env bash
# Gradescope runs this for each submission.
root="${AUTOGRADER_ROOT:-/autograder}"
cd "$root/source/kernel-by-kernel"
exec "${PYTHON:-$root/venv/bin/python}" -m common.grade submission "$root/submission" EXERCISES \\
    --results "$root/results/results.json"
"""


def results(reports, strangers=()):
    """What Gradescope's ``results.json`` holds, for the reports of one submission.

    strangers: files of the submission that belong to no exercise; they are named in the output.
    """
    tests = []
    for report in reports:
        for number, row in enumerate(report["criteria"], 1):
            output = row.get("note") or "" if row["passed"] else f"{row['seen']}\n\nHint: {row['hint']}"
            tests.append({
                "name": f"{report['exercise']}: {row['about']}", "number": f"{report['exercise']}.{number}",
                "score": row["points"], "max_score": row["max_points"],
                "status": "passed" if row["passed"] else "failed", "output": output, "visibility": "visible",
            })  # fmt: skip
    words = [f"{one['exercise']}: {one['points']} of {one['max_points']} points" for one in reports]
    words += [f"{name}: belongs to no exercise" for name in strangers]
    return {
        "score": sum(one["points"] for one in reports),
        "execution_time": round(sum(one["seconds"] for one in reports)),
        "output": "\n".join(words),
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": tests,
    }


def grade_submission(folder, wanted=()):
    """Grade the files of a folder by their names, ``topk.py`` for ``ch13/topk``: ``(reports, strangers)``.

    wanted: names of exercises that count, also where their file is missing; by default those that have a file here.
    """
    by_file = {one.file.name: one for one in exercises().values()}
    files = {path.name: path for path in sorted(Path(folder).rglob("*.py"))}
    chosen = [exercises()[name] for name in wanted] or [by_file[name] for name in files if name in by_file]
    reports = []
    for exercise in chosen:
        if exercise.file.name in files:
            reports.append(grade(exercise, files[exercise.file.name]))
        else:
            reports.append(report_of(exercise, None, Wrong(f"{exercise.file.name} was not submitted", "start")))
    counted = {one.file.name for one in chosen}
    return reports, [name for name in files if name not in counted]


def build(path, wanted=()):
    """Write the autograder's zip: the checkout's tracked files, ``setup.sh`` and ``run_autograder``. Returns the count.

    wanted: names of the exercises that it grades; by default those that a submission has files of.
    """
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    names = [name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    needed = [name for name in names if not name.startswith(("tests/", "benchmarks/", ".ci/"))
              and not name.endswith((".ipynb", ".png", ".svg"))]  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("setup.sh", SETUP), ("run_autograder", RUN.replace("EXERCISES", " ".join(wanted)))):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o755 << 16
            archive.writestr(entry, text)
        for name in needed:
            archive.write(ROOT / name, f"kernel-by-kernel/{name}")
    shutil.move(part, path)
    return len(needed)
