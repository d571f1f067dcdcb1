"""What a case of the bank is, the list of all cases, and how a case is compared with a report of the sanitizer."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import cuda

KINDS = (
    "out-of-bounds",
    "negative-index",
    "shared-race",
    "global-race",
    "divergent-barrier",
    "exited-barrier",
    "shuffle-mask",
    "uninitialized-shared",
    "uninitialized-local",
    "uninitialized-global",
    "int-overflow",
)

CASES = {}  # name -> Case, in the order of the modules


@dataclass(frozen=True)
class Case:
    """A small kernel with one bug, or a correct one that looks like a bug.

    ``kind``: what the sanitizer must call the bug; of a near miss, what a careless tool would call it.
    ``array``: the array's name in the kernel, several names where each is right, None where no array is concerned.
    ``run``: makes the inputs and launches; of a near miss, it returns what came out and what should have.
    ``note``: what the student did wrong, or why the near miss is right.
    ``index``: the element, where only one can be meant. ``hangs_gpu``: a GPU may wait for ever.
    ``unchecked``: the sanitizer may say, in a notice, that it cannot look at what the kernel does.
    """

    name: str
    kind: str
    array: str | tuple | None
    kernel: object
    run: Callable
    note: str
    bug: bool
    index: tuple | None = None
    hangs_gpu: bool = False
    unchecked: bool = False

    @property
    def arrays(self):
        """The names that are right for the array, as a tuple."""
        return (self.array,) if isinstance(self.array, str) else self.array


def bug(kernel, kind, array, run, note, **more):
    """Add a kernel with a bug to the bank."""
    _add(Case(kernel.py_func.__name__, kind, array, kernel, run, note, True, **more))


def near_miss(kernel, kind, run, note, **more):
    """Add a correct kernel that looks like a bug of that kind."""
    _add(Case(kernel.py_func.__name__, kind, None, kernel, run, note, False, **more))


def _add(case):
    if case.name in CASES or case.kind not in KINDS:
        raise ValueError(f"{case.name} is in the bank already, or {case.kind} is no kind")
    CASES[case.name] = case


# --- inputs ---------------------------------------------------------------------------------------------------------


def ints(*shape):
    """A device array of int32: 0, 1, 2, …"""
    return cuda.to_device(np.arange(np.prod(shape), dtype=np.int32).reshape(shape))


def zeros(*shape, dtype=np.int32):
    """A device array of zeros."""
    return cuda.to_device(np.zeros(shape, dtype))


def given(*values, dtype=np.int32):
    """A device array of these values."""
    return cuda.to_device(np.array(values, dtype))


# --- the marked lines -----------------------------------------------------------------------------------------------


def functions(kernel):
    """The kernel's Python function and those of the device functions that it calls."""
    found, left = [], [kernel.py_func]
    while left:
        function = left.pop()
        if function not in found:
            found.append(function)
            named = (function.__globals__.get(name) for name in function.__code__.co_names)
            left += [value.py_func for value in named if hasattr(value, "py_func")]
    return found


def marked(case, mark):
    """The places, as pairs of file and line, that carry the comment ``# BUG`` or ``# OTHER`` in a case's source."""
    places = set()
    for function in functions(case.kernel):
        lines, first = inspect.getsourcelines(function)
        file = str(Path(function.__code__.co_filename).resolve())
        places |= {(file, first + n) for n, text in enumerate(lines) if text.rstrip().endswith(f"# {mark}")}
    return places


# --- the comparison -------------------------------------------------------------------------------------------------


def place(file, line):
    """A place of a finding as `marked` gives it; None where there is no second access."""
    return None if line is None else (str(Path(file).resolve()), line)


def at(place):
    return "nowhere" if place is None else f"{Path(place[0]).name}:{place[1]}"


def disagreements(case, report):
    """What is wrong with a report of the sanitizer about a case, as sentences; an empty list if nothing is."""
    wrong = []
    if not case.bug:
        wrong += [f"false alarm: {one.kind} at {at(place(one.file, one.line))}" for one in report.findings]
        if not case.unchecked:
            wrong += [f"not checked: {text}" for text in report.notices]
        return wrong
    if not report.findings and case.unchecked and report.notices:
        return wrong  # a bug that is overlooked, but not silently
    if not report.findings:
        return [f"nothing was found; expected {case.kind}"]
    planted, others = marked(case, "BUG"), marked(case, "OTHER")
    seen = set()
    for one in report.findings:
        first, second = place(one.file, one.line), place(one.other_file or one.file, one.other_line)
        seen |= {first, second}
        if one.kind != case.kind:
            wrong.append(f"{one.kind} at {at(first)} in the place of {case.kind}")
        for found in (first, second):
            if found is not None and found not in planted | others:
                wrong.append(f"{one.kind} at {at(found)}, a line without a mark")
        if case.array is not None and one.array not in case.arrays:
            wrong.append(f"the array is called {one.array}, not {' or '.join(case.arrays)}")
        if case.index is not None and tuple(one.index) != case.index:
            wrong.append(f"the index is {one.index}, not {case.index}")
        if one.count < 1 or not one.message:
            wrong.append("a finding without a count or a message")
    if case.kind.endswith("barrier"):  # the branch that keeps threads away is as good a place as the barrier
        planted = planted if planted & seen or not others & seen else set()
    wrong += [f"no finding at {at(line)}" for line in sorted(planted - seen)]
    return list(dict.fromkeys(wrong))
