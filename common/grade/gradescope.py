"""For teachers: results in the form that Gradescope reads, and the zip that it runs.

Source of the form: Gradescope's documentation, "Autograder Specifications" (results.json; setup.sh and run_autograder
at the top of the zip; a submission in ``submission/``, results in ``results/results.json``).

Gradescope runs an autograder as root. Students' files then run as a user of their own, who can read neither the
references nor the submission nor the results, cannot end or change the grader, and has no network (`isolate`).
"""

import contextlib
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

from .exercise import LARGEST, ROOT, ExerciseError, exercises, read
from .plugin import grade, report_of
from .process import User
from .student import Wrong, keep_secret

SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the image: Python, the packages, a user for students' files, and
# compiled kernels.
set -euo pipefail
root="${AUTOGRADER_ROOT:-/autograder}"
book="$root/source/kernel-by-kernel"
user="${GRADED_USER:-graded}"
id -u "$user" >/dev/null 2>&1 \\
    || useradd --system --create-home --home-dir "/var/lib/$user" --shell /usr/sbin/nologin "$user"

find_python() {  # one that students' files can use as well: not in somebody's home
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 /usr/bin/python3}; do
        python=$(command -v "$name") && runuser -u "$user" -- "$(readlink -f "$python")" -c '
import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && return 0
    done
    return 1
}

if ! find_python; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    for name in python3 python3.12 python3.13 python3.11; do
        apt-get install -y --no-install-recommends "$name" "$name-venv" && find_python && break
    done
    find_python || { echo "error: no Python 3.11, 3.12 or 3.13 can be had: choose a newer base image" >&2; exit 1; }
fi
"$python" -m venv "$root/venv"
"$root/venv/bin/pip" install -e "$book[grade]"
cd "$book"
"$root/venv/bin/python" -m common.grade prepare EXERCISES --user "$user" --secret "$root/source/secret"
"""
RUN = """#!/usr/bin/env bash
# Gradescope runs this for each submission, as root. (GRADED_USER= : students' files run as the user who runs this.)
root="${AUTOGRADER_ROOT:-/autograder}"
user="${GRADED_USER-graded}"
cd "$root/source/kernel-by-kernel"
exec "${PYTHON:-$root/venv/bin/python}" -m common.grade submission "$root/submission" EXERCISES \\
    --results "$root/results/results.json" --secret "$root/source/secret" ${user:+--user "$user"}
"""
SKIPPED = ("__pycache__", "__MACOSX", "site-packages", "node_modules")  # folders in which no student's file lies
MOST_FILES, MOST_BYTES = 10_000, 1 << 28  # of a zip
NAMED = 10  # files that belong to no exercise and are named


def results(reports, strangers=()):
    """What Gradescope's ``results.json`` holds, for the reports of one submission.

    strangers: files of the submission that belong to no exercise; some of them are named in the output.
    """
    tests = []
    for report in reports:
        rows = {row["name"]: row for row in report["criteria"]}
        for number, row in enumerate(report["criteria"], 1):
            output = row["note"] or ""
            first = rows.get(row["follows"])
            if first is not None:
                same = first["cause"] == row["cause"]
                why = "As above." if same else f"Follows from a miss above, as it seems: {first['about']}"
                output = f"{row['seen']}\n\n{why}"
            elif not row["passed"]:
                output = f"{row['seen']}\n\nHint: {row['hint']}"
            if row["name"] == report["gate"]:
                output += "\n\nUntil then, all that is right counts a quarter: it may be right by luck."
            tests.append({
                "name": f"{report['exercise']}: {row['about']}", "number": f"{report['exercise']}.{number}",
                "score": row["points"], "max_score": row["max_points"],
                "status": "passed" if row["passed"] else "failed", "output": output, "visibility": "visible",
            })  # fmt: skip
    words = [f"{one['exercise']}: {one['points']:g} of {one['max_points']} points" for one in reports]
    words += [f"{name}: belongs to no exercise" for name in strangers[:NAMED]]
    words += [f"… and {len(strangers) - NAMED} more files"] if len(strangers) > NAMED else []
    if not reports:
        words.append("nothing was graded: no file is named like one of an exercise (topk.py for ch13/topk)")
    return {
        "score": sum(one["points"] for one in reports),
        "execution_time": round(sum(one["seconds"] for one in reports)),
        "output": "\n".join(words),
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": tests,
    }


# --- which file is meant ---------------------------------------------------------------------------------------------


def submitted(folder):
    """The Python files of a submission, paths relative to it, in order. Links and hidden folders do not count."""
    python = []
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED
                            and not os.path.exists(os.path.join(place, name, "pyvenv.cfg")))  # fmt: skip
        paths = (Path(place, name) for name in files if name.endswith(".py") and not name.startswith("."))
        python += [path.relative_to(folder) for path in paths if path.is_file() and not path.is_symlink()]
    return sorted(python)


def common_end(path, other):
    """How many parts two paths share, counted from their ends."""
    pairs = list(zip(reversed(path.parts), reversed(other.parts)))
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))


def meant(exercise, paths, namesakes):
    """Which of a submission's files are the student's for an exercise: those whose path fits best, mostly one.

    namesakes: files of the book that are named like the exercise's and are not it: a chapter's ``scan.py`` is no
    solution of ``exercises/scan/scan.py``, however the book was handed in.
    """
    place = exercise.file.relative_to(ROOT) if exercise.file.is_relative_to(ROOT) else Path(*exercise.file.parts[-3:])
    fits = {}
    for path in paths:
        end = common_end(path, place)
        if end and not any(common_end(path, other) > end for other in namesakes):
            fits.setdefault(end, []).append(path)
    return fits[max(fits)] if fits else []


def unpacked(archive, folder):
    """Unpack a zip into a folder. Raises `ExerciseError` if it is damaged or holds too much."""
    try:
        with zipfile.ZipFile(archive) as whole:
            entries = [entry for entry in whole.infolist() if not entry.is_dir() and entry.filename.endswith(".py")]
            if len(entries) > MOST_FILES or sum(entry.file_size for entry in entries) > MOST_BYTES:
                raise ExerciseError(f"{archive.name} holds too much: hand in the exercise's file")
            for entry in entries:
                if entry.file_size <= LARGEST:
                    whole.extract(entry, folder)  # a path that would lead out of the folder is kept inside
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError) as error:
        raise ExerciseError(f"{archive.name} cannot be unpacked: {error}") from None


def grade_submission(folder, wanted=(), user=None):
    """Grade the files of a folder, or of zips in it: ``(reports, strangers)``.

    A file belongs to the exercise that it is named like, ``topk.py`` to ``ch13/topk``; of several files of that name,
    the one counts whose path fits best. wanted: names of exercises that count, also where their file is missing; by
    default those that have a file here, and of these only those that have been begun, if any has. user: a
    `process.User` as whom they run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inside = Path(scratch, "submission")
        shutil.copytree(folder, inside, symlinks=True, ignore_dangling_symlinks=True)
        notes = []
        archives = sorted(path for path in inside.glob("*.zip") if path.is_file() and not path.is_symlink())
        for archive in archives:
            try:
                unpacked(archive, archive.with_suffix(""))
            except ExerciseError as error:
                notes.append(str(error))
        return _grade_files(inside, wanted, user, notes)


def _grade_files(folder, wanted, user, notes):
    paths = submitted(folder)
    book = [Path(name) for name in tracked() if name.endswith(".py")]
    chosen = [exercises()[name] for name in wanted] or list(exercises().values())
    files, used = {}, set()
    for exercise in chosen:
        namesakes = [path for path in book if path.name == exercise.file.name and ROOT / path != exercise.file]
        files[exercise.name] = meant(exercise, paths, namesakes)
        used.update(files[exercise.name])
    if not wanted:
        chosen = [exercise for exercise in chosen if files[exercise.name]]
        begun = [e for e in chosen if any(not is_stub(e, folder / path) for path in files[e.name])]
        chosen = begun or chosen
    reports = []
    for exercise in chosen:
        candidates = files[exercise.name]
        if not candidates:
            words = f"{exercise.file.name} was not submitted"
            if notes:
                words += f" ({'; '.join(notes)})"
            reports.append(report_of(exercise, None, Wrong(words, "submitted")))
        elif len({(folder / path).read_bytes() for path in candidates}) > 1:
            words = f"several files could be meant: {', '.join(map(str, candidates))}"
            reports.append(report_of(exercise, None, Wrong(words, "submitted")))
        else:
            try:
                read(folder / candidates[0])
            except ExerciseError as error:
                words = str(error).replace(f"{folder}{os.sep}", "")
                reports.append(report_of(exercise, None, Wrong(words, "submitted")))
            else:
                reports.append(grade(exercise, folder / candidates[0], user=user))
    names, whole = {path.name for path in book}, [book_in(path) for path in used]
    others = [path for path in paths if path not in used and path.name not in names]
    others = [path for path in others if not any(path.is_relative_to(root) for root in whole if root is not None)]
    return reports, [*(str(path) for path in others), *notes]


def book_in(path):
    """The folder of a submission that is a copy of the book, if an exercise's file lies in one; else None."""
    for exercise in exercises().values():
        place = exercise.file.relative_to(ROOT) if exercise.file.is_relative_to(ROOT) else exercise.file
        if common_end(path, place) == len(place.parts):
            return path.parents[len(place.parts) - 1]
    return None


def is_stub(exercise, file):
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return file.stat().st_size <= LARGEST and file.read_text(encoding="utf-8") == exercise.stub()
    return False


# --- a user for students' files --------------------------------------------------------------------------------------


def isolate(name, *closed):
    """The `process.User` of this name, after what is not for its eyes was closed to it.

    closed: folders besides the references that only the grader's user may enter from now on.
    Raises `ExerciseError` if there is no such user, or if this process may not start others as it.
    """
    if os.geteuid() != 0:
        raise ExerciseError(f"--user={name}: only root can run files as another user; without it, they run as yours")
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ExerciseError(f"--user={name}: there is no such user; useradd makes one") from None
    if entry.pw_uid == 0:
        raise ExerciseError(f"--user={name}: that user may do everything; name one without rights")
    for folder in {exercise.folder.parent for exercise in exercises().values()} | set(map(Path, closed)):
        if folder.exists():
            os.chown(folder, 0, 0)
            folder.chmod(0o700 if folder.is_dir() else 0o600)
    cache = Path(entry.pw_dir, "kernels")
    cache.mkdir(parents=True, exist_ok=True)
    os.chown(cache, entry.pw_uid, entry.pw_gid)
    cache.chmod(0o700)
    return User(name, entry.pw_uid, entry.pw_gid, str(cache))


def read_secret(path):
    """Have inputs depend on the number in a file, which only the grader can read."""
    try:
        keep_secret(int(Path(path).read_text(encoding="ascii"), 16))
    except (OSError, ValueError) as error:
        raise ExerciseError(f"--secret={path}: no number in base 16 can be read there ({error})") from None


# --- the zip ---------------------------------------------------------------------------------------------------------


def tracked():
    """The files of the book, relative to its root: those that git knows, or all where there is no git."""
    if (ROOT / ".git").exists():
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
        names = done.stdout.decode().split("\0")
    else:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if ".venv" not in path.parts]
    return [name for name in names if name and (ROOT / name).is_file()]


def build(path, wanted=()):
    """Write the autograder's zip: the book's files, ``setup.sh``, ``run_autograder`` and a secret. Returns the count.

    wanted: names of the exercises that it grades; by default those that a submission has files of.
    """
    needed = [name for name in tracked() if not name.startswith(("tests/", "benchmarks/", ".ci/"))
              and not name.endswith((".ipynb", ".png", ".svg"))]  # fmt: skip
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    chosen = " ".join(wanted)
    texts = {
        "setup.sh": (0o755, SETUP.replace("EXERCISES", chosen)),
        "run_autograder": (0o755, RUN.replace("EXERCISES", chosen)),
        "secret": (0o600, f"{secrets.randbits(62):x}\n"),
    }
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (mode, text) in texts.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = mode << 16
            archive.writestr(entry, text)
        for name in needed:
            archive.write(ROOT / name, f"kernel-by-kernel/{name}")
    shutil.move(part, path)
    return len(needed)
