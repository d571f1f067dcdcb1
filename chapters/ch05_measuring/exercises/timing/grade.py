"""The checks of ch05/timing: see `common.grade`."""

import numpy as np
import pytest

from common.grade import Wrong, check, same

NEAR = 0.03  # the simulated device waits for the first launch of a batch to be queued: at most 2 % here


def simulated(student, works, compile_ms, repeat, batch, on):
    """The milliseconds that time_kernel gives, and the log of what it did."""
    on = f"{on}, repeat = {repeat}, batch = {batch}"
    try:
        told = student.call("simulate", works, compile_ms, repeat, batch, on=on).value
    except Wrong as wrong:
        for part, hint in (("has not happened yet", "sync"), ("was never recorded", "recorded")):
            if part in wrong.seen:
                raise Wrong(wrong.seen.split(" (at ")[0], hint) from None
        raise
    check("record" in told["log"], f"no event of gpu was recorded, on {on}", "no-event")
    ms = told["ms"]
    check(isinstance(ms, (int, float)), f"time_kernel returned {ms!r}, not a number, on {on}", "work")
    return ms, told["log"], on


@pytest.mark.parametrize("ms, repeat, batch", [(2.0, 3, 4), (0.05, 5, 50), (7.0, 1, 1)])
def test_waits(student, ms, repeat, batch):
    _, log, on = simulated(student, [ms], 0.0, repeat, batch, f"a simulated kernel of {ms:g} ms")
    log = log[log.index("record") :]
    for i in range(1, len(log) - 1):
        waited = log[i - 1 : i + 2] == ["launch", "wait", "launch"]
        number = log[:i].count("launch")
        check(not waited, f"the host waits between launches {number} and {number + 1} of a batch, on {on}", "gaps")
        late = log[i - 1 : i + 2] == ["launch", "wait", "record"]
        check(not late, f"the host waits between launch {number} and the event behind it, on {on}", "gaps")


@pytest.mark.parametrize("repeat, batch", [(3, 4), (1, 7), (9, 1), (1, 1)])
def test_launches(student, repeat, batch):
    _, log, on = simulated(student, [1.0], 100.0, repeat, batch, "a simulated kernel of 1 ms")
    seen, expected = log.count("launch"), 1 + repeat * batch
    hint = "warm-up" if seen == expected - 1 else "count"
    check(seen == expected, f"launch was called {seen} times, expected {expected}, on {on}", hint)


@pytest.mark.parametrize("repeat, batch", [(1, 1), (1, 10), (3, 2)])
def test_warmup(student, repeat, batch):
    told = "a simulated kernel of 3 ms, of which the first launch compiles for 400 ms and runs for 90 ms"
    ms, _, on = simulated(student, [90.0, 3.0], 400.0, repeat, batch, told)
    other, *_ = simulated(student, [3.0], 0.0, repeat, batch, "a simulated kernel of 3 ms that need not be compiled")
    told = f"the figure is {ms:.5g} ms, but {other:.5g} ms if the first launch is like all others"
    check(abs(ms - other) <= NEAR * abs(other), f"{told}, on {on}")


def a_real_kernel(student):
    least = {20_000: np.inf, 5_000_000: np.inf}
    for _ in range(8):  # what else the machine does only makes a figure larger: the least one counts
        for steps in least:
            on = f"chain_kernel with {steps} steps, repeat = 5, batch = 2"
            answer = student.call("measure", steps, 5, 2, on=on)
            check(len(answer.own) == 11, f"{len(answer.own)} launches were seen, expected 11, on {on}", "count")
            ms = answer.value
            a_time = isinstance(ms, (int, float)) and 0 < ms < np.inf
            check(a_time, f"the figure is {ms!r}, not a time, on {on}", "work")
            least[steps] = min(least[steps], ms)
        short, long = least.values()
        if long > 3 * short:  # about 250 times as long
            return
    check(False, f"chain_kernel took {short:.3g} ms with 20 000 steps, {long:.3g} ms with 5 000 000", "work")


@pytest.mark.parametrize("work", [1.5, 15.0, 150.0, 0.06, "real"])
def test_work(student, work):
    if work == "real":
        a_real_kernel(student)
        return
    repeat, batch = (3, 60) if work < 1 else (3, 5)
    ms, _, on = simulated(student, [work], 200.0, repeat, batch, f"a simulated kernel of {work:g} ms")
    hint = "work"
    for factor, name in ((batch, "divide"), (1e-3, "units"), (1e3, "units")):
        if abs(ms - factor * work) <= NEAR * factor * work:
            hint = name
    same(ms, work, "the figure", on, rtol=NEAR, hint=hint)


@pytest.mark.parametrize(
    "rounds", [(2.0, 2.2, 60.0, 2.1, 1.9), (4.0, 4.0, 4.0, 4.0, 300.0), (9.0, 5.0, 7.0), (2.0, 90.0, 8.0, 4.0)]
)
def test_median(student, rounds):
    batch = 4
    works = [2.0, *(ms for ms in rounds for _ in range(batch))]
    told = f"simulated batches of {', '.join(f'{ms:g}' for ms in rounds)} ms a launch"
    ms, _, on = simulated(student, works, 0.0, len(rounds), batch, told)
    same(ms, float(np.median(rounds)), "the figure", on, rtol=NEAR)
