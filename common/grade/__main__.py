"""``python -m common.grade``: grade exercises, see what is solved, get a hint.

    python -m common.grade run [EX ...] [--file FILE] [--json FILE] [--junit FILE] [--watch]
    python -m common.grade progress
    python -m common.grade hint EX
    python -m common.grade reset EX
    python -m common.grade solution EX [--give-up]
    python -m common.grade autograder FILE.zip [EX ...]                  # for teachers: Gradescope's zip
    python -m common.grade prepare [EX ...] --user USER                  # in it: close the references, compile kernels
    python -m common.grade submission FOLDER [EX ...] --results FILE     # in it: Gradescope's results.json

EX is an exercise's name such as ch13/topk; all by default. Exit codes: 0 all passed, 1 not, 2 a mistake in the command.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import textwrap
import time
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from .exercise import ROOT, ExerciseError, exercises, find, read, shown
from .gradescope import build, grade_submission, isolate, read_secret, results
from .plugin import grade, save

NOTES = ROOT / ".grades.json"  # what is solved, and how many hints were given
WIDTH = 100


def notes():
    """{exercise: {"points", "max_points", "passed", "digest", "hints"}}: what is kept between commands.

    Raises `ExerciseError` if the file is damaged.
    """
    try:
        known = json.loads(NOTES.read_text(encoding="utf-8"))
        if not isinstance(known, dict) or not all(isinstance(one, dict) for one in known.values()):
            raise ValueError("it holds something else than notes")
        for one in known.values():
            for fact, kind in FACTS.items():
                if not isinstance(one.get(fact, kind()), (int, float) if kind is int else kind):
                    raise ValueError(f"{fact} is {one[fact]!r}")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or other JSON
        raise ExerciseError(f"{shown(NOTES)} is damaged ({error}): remove it, and grade again to fill it") from None
    return known


FACTS = {"points": int, "max_points": int, "passed": bool, "digest": str, "hints": int}


def remember(name, **facts):
    """Keep facts of an exercise."""
    known = notes()
    known[name] = known.get(name, {}) | facts
    save(known, NOTES)


def digest(file):
    """A file's fingerprint; "" if there is none."""
    return hashlib.sha256(read(file)).hexdigest()[:16] if file.is_file() else ""


def table(report):
    """A report as text: a line for each criterion, and under it what was seen and a hint."""
    total = f"{report['points']:g} of {report['max_points']} points, {report['seconds']:.1f} s"
    lines = [f"{report['exercise']}  {report['title']}: {total}", ""]
    rows = {row["name"]: row for row in report["criteria"]}
    for row in rows.values():
        mark = "ok  " if row["passed"] else "MISS"
        first = rows.get(row["follows"])
        again = first is not None and first["cause"] == row["cause"]
        above = " (as above)" if again else ""
        lines.append(f"  {mark} {row['points']:>4g} / {row['max_points']:<3} {row['about']}{above}")
        said = [row["note"]] if row["note"] else []
        if first is not None and not again:
            said.append(f"follows from a miss above, as it seems: {first['about']}")
        elif not row["passed"] and not again:
            said += [*row["seen"].splitlines(), f"hint: {row['hint']}"]
        if row["name"] == report["gate"]:
            said.append("Until then, all that is right counts a quarter: it may be right by luck.")
        for part in said:
            lines += textwrap.wrap(part, WIDTH, initial_indent=" " * 17, subsequent_indent=" " * 17) or [""]
    return "\n".join(lines)


def run(options):
    chosen = [find(name) for name in options.exercises] or list(exercises().values())
    if options.file and len(chosen) != 1:
        raise ExerciseError("--file is for one exercise: name it")
    for name in ("json", "junit"):
        writable(getattr(options, name), f"--{name}")
    notes()  # damaged ones are reported before work begins
    reports = []
    for exercise in tqdm(chosen, desc="exercises", disable=len(chosen) == 1):
        report = grade(exercise, options.file, junit=options.junit)
        reports.append(report)
        tqdm.write(table(report) + "\n")
        if not options.file:
            facts = {key: report[key] for key in ("points", "max_points", "passed")}
            remember(exercise.name, **facts, digest=digest(exercise.file))
    if len(reports) > 1:
        print(f"{sum(one['points'] for one in reports):g} of {sum(one['max_points'] for one in reports)} points; "
              f"{sum(one['passed'] for one in reports)} of {len(reports)} exercises solved")  # fmt: skip
    if options.json:
        save(reports, options.json)
    return all(one["passed"] for one in reports)


def writable(path, option):
    """Raise `ExerciseError` unless a file can be written there, before anything is graded."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise ExerciseError(f"{option}={path} is {'a folder' if path.is_dir() else 'no regular file'}: name a file")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ExerciseError(f"{option}={path}: nothing can be written in {folder}: {error.strerror}") from None


def watch(options):
    """Grade again whenever a file is saved, until all are solved or Ctrl-C."""
    chosen = [find(name) for name in options.exercises] or list(exercises().values())
    before = {}
    while True:
        now = {one.name: digest(Path(options.file or one.file)) for one in chosen}
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            print(f"--- {datetime.now():%H:%M:%S}", flush=True)
            options.exercises = changed
            if run(options) and len(changed) == len(chosen):
                return True
            before = now
        time.sleep(0.3)


def progress(options):
    known = notes()
    for name, exercise in exercises().items():
        one = known.get(name, {})
        state = "not begun"
        if one.get("digest"):
            state = f"{one['points']:g} of {one['max_points']} points" + (", solved" if one["passed"] else "")
            state += "" if one["digest"] == digest(exercise.file) else " (edited since)"
        hints = f", {one['hints']} of {len(exercise.stages)} hints" if one.get("hints") else ""
        print(f"{name:<18} {exercise.points:>3} points  {state}{hints}: {exercise.title}")
    solved = sum(bool(one.get("passed")) for one in known.values())
    print(f"\n{solved} of {len(exercises())} solved; make grade EX=NAME grades one")
    return True


def hint(options):
    exercise = find(options.exercise)
    given = min(notes().get(exercise.name, {}).get("hints", 0) + 1, len(exercise.stages))
    remember(exercise.name, hints=given)
    print(f"{exercise.name}, hint {given} of {len(exercise.stages)}:")
    print(textwrap.fill(exercise.stages[given - 1], WIDTH, initial_indent="  ", subsequent_indent="  "))
    return True


def reset(options):
    exercise = find(options.exercise)
    if exercise.file.exists() and read(exercise.file) != exercise.stub().encode():
        kept = exercise.file.with_name(f"{exercise.file.stem}.{datetime.now():%Y-%m-%dT%H-%M-%S}.py")
        exercise.file.rename(kept)
        print(f"your file is kept: {shown(kept)}")
    exercise.file.write_text(exercise.stub(), encoding="utf-8")
    print(f"as it was: {shown(exercise.file)}")
    return True


def solution(options):
    exercise = find(options.exercise)
    known = {} if options.give_up else notes().get(exercise.name, {})
    if not options.give_up and not (known.get("passed") and known.get("digest") == digest(exercise.file)):
        raise ExerciseError(f"your own {exercise.file.name} has not passed yet (make grade EX={exercise.name}); "
                            "to see the reference all the same: --give-up, or make solution GIVE_UP=1")  # fmt: skip
    print(exercise.solution.read_text(encoding="utf-8"), end="")
    return True


def submission(options):
    if not options.folder.is_dir():
        raise ExerciseError(f"there is no folder {options.folder}")
    writable(options.results, "--results")
    wanted = [find(name).name for name in options.exercises]
    user, notes = None, []
    if options.user:
        user = isolate(options.user, options.folder, options.results.absolute().parent, *filter(None, [options.secret]))
    else:
        notes = ["graded without a user of its own for students' files: see chapters/exercises.md"]
    if options.secret:
        read_secret(options.secret)
    reports, strangers = grade_submission(options.folder, wanted, user)
    told = results(reports, strangers)
    save(told, options.results)
    print("\n".join([told["output"], *notes]))
    return True  # a wrong submission was graded well


def prepare(options):
    user = isolate(options.user, *filter(None, [options.secret]))
    if options.secret:
        read_secret(options.secret)
    chosen = [find(name) for name in options.exercises] or list(exercises().values())
    for exercise in chosen:
        report = grade(exercise, exercise.solution, user=user)
        print(table(report) + "\n", flush=True)
        if not report["passed"]:
            raise ExerciseError(f"the reference of {exercise.name} does not pass on this machine")
    return True


def autograder(options):
    writable(options.zip, "FILE.zip")
    count = build(options.zip, [find(name).name for name in options.exercises])
    print(f"{options.zip}: {count} files, {Path(options.zip).stat().st_size / 1e6:.1f} MB")
    return True


def parser():
    made = argparse.ArgumentParser(prog="python -m common.grade", description=__doc__.split("\n")[0])
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, about, *arguments):
        one = commands.add_parser(function.__name__, help=about, description=about)
        one.set_defaults(do=function)
        for names, facts in arguments:
            one.add_argument(*names, **facts)

    several = (["exercises"], {"nargs": "*", "metavar": "EX"})
    single = (["exercise"], {"metavar": "EX"})
    command(
        run, "grade exercises", several,
        (["--file"], {"type": Path, "help": "another file than the exercise's own"}),
        (["--json"], {"type": Path, "help": "write the reports to this file"}),
        (["--junit"], {"type": Path, "help": "write pytest's XML to this file"}),
        (["--watch"], {"action": "store_true", "help": "grade again on each save"}),
    )  # fmt: skip
    command(progress, "what is solved")
    command(hint, "the next hint", single)
    command(reset, "the exercise as it was; your file is kept", single)
    command(solution, "the reference", single, (["--give-up"], {"action": "store_true"}))
    secret = (["--secret"], {"type": Path, "help": "a file with a number, on which inputs depend"})
    command(submission, "grade a folder for Gradescope", (["folder"], {"type": Path}), several, secret,
            (["--results"], {"type": Path, "required": True}),
            (["--user"], {"help": "run students' files as this user; only root can"}))  # fmt: skip
    command(prepare, "grade the references, so that their kernels are compiled", several, secret,
            (["--user"], {"required": True}))  # fmt: skip
    command(autograder, "build Gradescope's zip", (["zip"], {"type": Path}), several)
    return made


def failed(text):
    """End with a line and exit code 2."""
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2) from None


def main(argv=None):
    options = parser().parse_args(argv)
    try:
        well = watch(options) if getattr(options, "watch", False) else options.do(options)
    except ExerciseError as error:
        failed(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: say no more
        raise SystemExit(2) from None
    except OSError as error:
        failed(f"{error.filename or 'the output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(0 if well else 1)


if __name__ == "__main__":
    main()
