"""The teaching sanitizer: races, bounds, barriers and memory that nothing wrote, named at the line, without a GPU.

    with common.sanitize() as report:               # for one block of code
        kernel[grid, block](…)
    print(report)

    python -m common.sanitize script.py arguments…  # for a whole program; exit code 1 if there are findings
    pytest --sanitize                               # for tests: each fails that has findings

It is a mode of the CPU backend: kernels run compiled, with a look at every access. A finding names its kind, the line,
the array and the element, who did it (block and thread), for a race the other access too, and a fix. The same mistake
is told once, with a count. A race is found even where it did no harm this time: what counts is whether a barrier orders
the two accesses, not which of them came first. What cannot be looked at is told as a notice.

On a GPU use NVIDIA's compute-sanitizer; ``tests/compute_sanitizer.py`` runs it over the tests.
"""

import argparse
import contextlib
import os
import runpy
import sys
import types

from . import BACKEND, BackendError


class Report:
    """What a ``with sanitize()`` has seen. ``findings``: list of `Finding`; ``notices``: list of str."""

    def __init__(self, session):
        self._session = session

    findings = property(lambda self: self._session.findings, doc="Mistakes, in the order they were met.")
    notices = property(lambda self: self._session.notices, doc="What could not be looked at, by line.")
    launches = property(lambda self: self._session.launches, doc="Launches that were looked at.")
    accesses = property(lambda self: self._session.accesses, doc="Accesses of threads that were looked at.")
    clean = property(lambda self: not self.findings, doc="True if there are no findings.")

    def __str__(self):
        parts = [finding.message for finding in self.findings]
        parts += [f"note: {notice}" for notice in self.notices]
        if self._session.lost:
            parts.append(f"note: {self._session.lost} more findings were too many to keep")
        kinds = len(self.findings)
        parts.append(
            f"{kinds or 'no'} finding{'s' * (kinds != 1)} in {self.launches} launch{'es' * (self.launches != 1)}, "
            f"{self.accesses} accesses"
        )
        return "\n\n".join(parts)


@contextlib.contextmanager
def sanitize():
    """Look at every access of the kernels that are launched in the ``with`` block. Gives a `Report`.

    Launches do not raise what is found; a launch that would hang a GPU ends there. Inner ``with`` blocks have reports
    of their own. Raises BackendError on the GPU backend, where it cannot work.
    """
    if BACKEND != "cpu":
        raise BackendError(
            "sanitize is a mode of the CPU backend, and this process runs on the GPU: start it with MINI_BACKEND=cpu, "
            "or use NVIDIA's compute-sanitizer"
        )
    from .cpu import launch
    from .cpu.sanitizer import Session

    session, launch._sanitizer, outer = Session(), None, launch._sanitizer
    launch._sanitizer = session
    try:
        yield Report(session)
    finally:
        launch._sanitizer = outer


def main(argv=None):
    """``python -m common.sanitize script.py …``: exit code 0 clean, 1 findings, 2 bad usage; else the script's own."""
    parser = argparse.ArgumentParser(prog="python -m common.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("script", help="a Python program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(argv)
    if not os.path.isfile(options.script):
        parser.error(f"there is no file {options.script}")
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(options.script)))
    code = 0
    try:
        with sanitize() as report:
            try:
                runpy.run_path(options.script, run_name="__main__")
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BackendError as error:
        parser.error(str(error))
    print(report, file=sys.stderr)
    raise SystemExit(1 if report.findings else code)


class _Callable(types.ModuleType):
    """``common.sanitize`` is this module and, called, its function of the same name."""

    def __call__(self):
        return sanitize()


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    os.environ.setdefault("MINI_BACKEND", "cpu")
    main()
