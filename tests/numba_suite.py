"""Numba's own CUDA test suite on the CPU backend: what passes, what is refused, what is wrong.

    python -m tests.numba_suite [--suite numba|numba-cuda|DIR] [--only PATTERN] [--jobs 2] [--seconds 120]
                                [--json FILE] [--cache DIR] [--sources] [--sanitize] [--list CLASS …]

The wheels of Numba and of numba-cuda, pinned in pyproject.toml, carry the tests of their CUDA target. They were written
for a GPU by people who do not know this project: where one says what a kernel gives, the CPU backend gives the same, or
says that it cannot. :mod:`tests.numba_suite_child` loads and runs a module of the suite in a process of its own;
:mod:`tests.numba_suite_rules` says what became of each test. Printed are a table of the classes, each test that is in
one of the bad ones (silently wrong, crash or hang, unclear error, accepted though a GPU refuses), and the reasons of
what is not applicable.

A process that dies, or a test that takes longer than ``--seconds``, counts for the test that was running; the tests
behind it run in a new process. ``--only`` takes a part of a test's id, such as ``cudapy.test_atomics`` or ``test_clz``.
``--suite`` takes a folder of ``test_*.py`` as well, written with ``unittest`` and ``from numba import cuda``. Compiled
kernels are kept in a folder that is removed in the end, or in ``--cache``. With ``--sources`` the kernels in texts that
a test runs, by ``exec`` or ``python -c``, are given a source, as a notebook's cells have; the backend refuses them
otherwise, and the tests say nothing about numbers. ``--list`` names more classes whose tests are to be printed. The
settings of the backend hold here, too: ``MINI_CHECK=1 python -m tests.numba_suite``. With ``--sanitize`` each test runs
under the sanitizer, and what that finds is printed: a test that passes has the right numbers, so it is either a mistake
of the test, which happens, or one of the sanitizer.

Exit codes: 0 nothing is silently wrong and nothing crashes or hangs, 1 something is or does, 2 there is nothing to run,
130 it was stopped.
"""

import argparse
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests import numba_suite_rules as rules  # noqa: E402
from tests.numba_suite_child import SANITIZE, SITE, SOURCES, SUITES, suite_folder  # noqa: E402

CHILD = ROOT / "tests" / "numba_suite_child.py"
SITECUSTOMIZE = f"""import os, sys
if os.environ.get("NUMBA_SUITE"):
    sys.path.append({str(CHILD.parent)!r})
    import numba_suite_child
    numba_suite_child.prepare(os.environ["NUMBA_SUITE"])
"""
LOADING = 60  # seconds that a process may take beyond the limit for a test until its first test begins
SHOWN = 200  # characters of a reason that are printed
FATAL_TAIL = 3000  # characters of a dead process's output that are kept


def modules_of(suite, pattern=""):
    """Names of the suite's modules (``cudapy.test_atomics``) that may have tests with ``pattern`` in their ids."""
    folder = suite_folder(suite)
    files = sorted(folder.rglob("test_*.py"))
    names = {".".join(path.relative_to(folder).with_suffix("").parts): path for path in files}
    parts = [part for part in pattern.split(".") if part]
    return [name for name, path in names.items() if all(p in name or p in path.read_text() for p in parts)]


class Child:
    """A process that runs tests of one module. ``seconds`` is the limit for a test."""

    running = set()

    def __init__(self, suite, module, plan, env, scratch, seconds):
        self.seconds, self.output = seconds, tempfile.TemporaryFile(dir=scratch)
        self.reader, writer = os.pipe()
        command = [sys.executable, "-X", "faulthandler", str(CHILD), suite, module, str(writer), json.dumps(plan)]
        self.process = subprocess.Popen(
            command, env=env, cwd=scratch, pass_fds=[writer], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        os.close(writer)
        self.running.add(self)

    def events(self):
        """Yield the child's events, each a dict; the last one says how it ended: ``outcome``, ``code``, ``text``."""
        unread, deadline = b"", time.monotonic() + self.seconds + LOADING
        while True:
            ready, _, _ = select.select([self.reader], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(self.reader, 1 << 16) if ready else None
            if not chunk:
                break
            *lines, unread = (unread + chunk).split(b"\n")
            for line in lines:
                deadline = time.monotonic() + self.seconds
                yield json.loads(line)
        if chunk is None:
            yield {"event": "exit", "outcome": "hang", "code": None, "text": self.end()}
        else:
            try:
                code = self.process.wait(10)
            except subprocess.TimeoutExpired:
                code = None
            yield {"event": "exit", "outcome": "crash", "code": code, "text": self.end()}

    def end(self):
        """End the process and all that it has started. Returns the end of what they have printed."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.output.seek(0)
        return self.output.read().decode(errors="replace")[-FATAL_TAIL:]

    def close(self):
        self.end()
        self.running.discard(self)
        self.output.close()
        os.close(self.reader)


def run_module(suite, module, pattern, env, scratch, seconds):
    """Run the tests of one module. Returns ``{id: record}``; a module that cannot be imported is one record."""
    records = {
        test: {"outcome": "not run", "skip": reason}
        for test, reason in rules.NOT_RUN.items()
        if test.startswith(module + ".") and pattern in test
    }
    while True:
        child = Child(suite, module, {"pattern": pattern, "but": sorted(records)}, env, scratch, seconds)
        try:
            classes = follow(child, module, records)
        finally:
            child.close()
        if classes is None or all(test in records for test in classes):
            return records


def follow(child, module, records):
    """Add what a child says to ``records``. Returns the ids of the module's tests, or None if no other child is due."""
    classes, current, began = {}, None, time.monotonic()
    for event in child.events():
        kind = event.pop("event")
        if kind == "tests":
            classes = event["classes"]
        elif kind == "load":
            records[module] = event | outcome_of(event)
            return None
        elif kind == "start":
            current, began = event["id"], time.monotonic()
        elif kind == "end":
            records[event.pop("id")] = event | {"seconds": round(time.monotonic() - began, 2)}
            current = None
        elif kind == "findings":
            if event["id"] in records:
                records[event["id"]]["findings"] = event["findings"]
        elif kind == "fixture":
            hit = [test for test, name in classes.items() if f".{name})" in event["where"]] or list(classes)
            for test in hit:
                records.setdefault(test, event | outcome_of(event))
        elif kind == "done":
            return None
        elif kind == "exit":
            records[current or module] = event
    return classes if current else None


def outcome_of(event):
    """What a failed or skipped import or fixture means for a test."""
    return {"outcome": "skip" if "skip" in event else "error"}


def run(suite="numba", pattern="", jobs=2, seconds=120, cache=None, sources=False, sanitized=False, progress=None):
    """Run a suite, or the tests with ``pattern`` in their ids. Returns ``{id: record}``, in order.

    A record has ``class`` and ``reason`` (see :mod:`tests.numba_suite_rules`), ``outcome``, and what led to them; with
    ``sanitized``, ``findings`` as well, a list of messages.
    ``seconds`` is the limit for one test; ``cache`` a folder for compiled kernels, by default the backend's own;
    ``progress`` is called with a line of text for each module that is done.
    """
    scratch = Path(tempfile.mkdtemp(prefix="numba-suite-"))
    (scratch / "sitecustomize.py").write_text(SITECUSTOMIZE)
    env = os.environ | {"MINI_BACKEND": "cpu", SITE: str(scratch)}
    env |= {SOURCES: "1" if sources else "", SANITIZE: "1" if sanitized else ""}
    if cache:
        env["MINI_CACHE_DIR"] = str(Path(cache).resolve())
    todo, records, lock = queue.SimpleQueue(), {}, threading.Lock()
    modules = modules_of(suite, pattern)
    for module in modules:
        todo.put(module)
    finished = 0

    def work():
        nonlocal finished
        while True:
            try:
                module = todo.get_nowait()
            except queue.Empty:
                return
            began = time.monotonic()
            ours = run_module(suite, module, pattern, env, scratch, seconds)
            for test, record in ours.items():
                record["class"], record["reason"] = rules.classify(test, record)
            with lock:
                finished += 1
                records.update(ours)
                if progress and ours:
                    counts = Counter(rules.TITLES[record["class"]] for record in ours.values())
                    text = ", ".join(f"{count} {title}" for title, count in counts.items())
                    progress(f"[{finished}/{len(modules)}] {module}: {text} ({time.monotonic() - began:.0f} s)")

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():  # so that Ctrl-C is seen
                thread.join(0.5)
    finally:
        while not todo.empty():
            todo.get_nowait()
        for child in list(Child.running):
            child.end()
        shutil.rmtree(scratch, ignore_errors=True)
    return dict(sorted(records.items()))


def table(records):
    """``{class: number of tests}`` in the order in which it is printed."""
    counts = Counter(record["class"] for record in records.values())
    return {kind: counts[kind] for kind in rules.TITLES}


def report(suite, records, listed=()):
    """The table, the tests in bad classes, and the reasons of what is not applicable, as text."""
    title = f"{suite} {version(suite)}: its CUDA suite" if suite in SUITES else f"{suite}:"
    lines = [f"{title} on the CPU backend, {len(records)} tests"]
    lines += [f"{count:6}  {rules.TITLES[kind]}" for kind, count in table(records).items()]
    for kind in [kind for kind in rules.TITLES if kind in rules.BAD or kind in listed]:
        chosen = [(test, record["reason"]) for test, record in records.items() if record["class"] == kind]
        if chosen:
            lines += ["", f"{rules.TITLES[kind]}:"]
            lines += [f"  {test}: {reason[:SHOWN]}" if reason else f"  {test}" for test, reason in chosen]
    findings = [(test, text) for test, record in records.items() for text in record.get("findings", ())]
    if findings:
        lines += ["", "findings of the sanitizer:"]
        lines += [f"  {test}: {text.strip().partition(chr(10))[0][:SHOWN]}" for test, text in findings]
    reasons = Counter(r["reason"] for r in records.values() if r["class"] == rules.NOT_APPLICABLE)
    if reasons:
        lines += ["", "not applicable, since about:"]
        lines += [f"{count:6}  {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def main(argv=None):
    """The program: parses ``argv``, runs, prints. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="tests.numba_suite", description=__doc__.split("\n")[0])
    parser.add_argument("--suite", default="numba", help="numba, numba-cuda (their wheels' tests), or a folder (numba)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="a part of the ids of the tests to run")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--seconds", type=float, default=120, help="limit for one test (120)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what became of each test to this file")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep compiled kernels here")
    parser.add_argument("--sources", action="store_true", help="give kernels from exec and python -c a source text")
    parser.add_argument("--sanitize", action="store_true", help="run each test under the sanitizer")
    parser.add_argument("--list", nargs="+", choices=rules.CLASSES, default=[], help="print the tests of these, too")
    options = parser.parse_args(argv)
    if options.jobs < 1 or options.seconds <= 0:
        parser.error("--jobs and --seconds must be above 0")
    if options.json and (options.json.is_dir() or not options.json.resolve().parent.is_dir()):
        parser.error(f"--json: {options.json} is not a file in a folder that exists")
    if suite_folder(options.suite) is None:
        what = "its wheel is not installed, or carries no CUDA tests" if options.suite in SUITES else "no such folder"
        parser.error(f"--suite {options.suite}: {what}; use {', '.join(SUITES)} or a folder")

    def progress(line):
        print(line, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="numba-suite-") as private:
        how = {"cache": options.cache or private, "sources": options.sources, "sanitized": options.sanitize}
        try:
            records = run(options.suite, options.only, options.jobs, options.seconds, progress=progress, **how)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
    if not records:
        parser.error(f"no test of the suite has {options.only!r} in its id")
    if options.json:
        summary = {"suite": options.suite, "table": table(records), "tests": records}
        options.json.write_text(json.dumps(summary, indent=1))
    print(report(options.suite, records, options.list))
    return 1 if any(record["class"] in (rules.WRONG, rules.CRASH) for record in records.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
