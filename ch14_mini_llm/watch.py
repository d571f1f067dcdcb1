"""A batch at work, step by step, as a picture in the terminal: ``run.py --batch FILE --watch``.

A sequence a row, a step a column; on a terminal it is drawn anew in place and moves along, anywhere else it is printed
once, at the end. It looks like this:

    step 23   0 running   0 waiting   5 ended   190 tokens/s   2 preemptions
    blocks □□□□□□□· 0 in use, 7 cached, 1 free   prefix hits 4 of 33 tokens
    0 │▒███████ length
    1 │▒▒███████████ length
    2 │·▒▒██×··▒███×███ length
    3 │   ··········▒███ length
    4 │           ···▒████████ length
    steps 1 to 23
    · waiting   █ new token   ▒ prompt   × preempted
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ch14_mini_llm.engine.plan import Output, Part, Plan
from ch14_mini_llm.engine.scheduler import Scheduler
from ch14_mini_llm.engine.sequence import Sequence
from ch14_mini_llm.terminal import Terminal, width

FRAME = 0.1  # seconds between two pictures, at least
WINDOW = 32  # steps that tokens/s is an average of, while it runs
MOST_ENDED = 200  # sequences that are remembered after their end
BAR_CELLS = 24
LINES = 6  # of a picture that are no sequence's, and one below it
NAMES = ("", "waiting", "no row", "padding", "new token", "prompt", "preempted")  # what a sequence does in a step
NOTHING, WAITING, IDLE, PADDING, TOKEN, PROMPT, PREEMPTED = range(7)  # of several in a column, the largest is shown
COLOURS = (0, 90, 90, 35, 32, 33, 31)  # grey, magenta, green, yellow, red
GLYPHS, ASCII = " ·-░█▒×", " .-:#px"
BAR, ASCII_BAR = "■□·│", "#o.|"  # blocks in use, cached, free; the rule


@dataclass(eq=False)
class Row:
    """What a sequence did: from step ``steps[i]`` on ``codes[i]``. reason: of its end, "" before."""

    sequence: Sequence
    steps: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    preemptions: int = 0
    reason: str = ""

    def does(self, step: int, code: int) -> None:
        """From ``step`` on it does ``code``."""
        if self.steps and self.steps[-1] == step:
            self.codes[-1] = code
        elif not self.codes or self.codes[-1] != code:
            self.steps.append(step)
            self.codes.append(code)

    def at(self, first: int, last: int) -> int:
        """The code to show for steps ``first`` to ``last``."""
        begin = max(0, bisect.bisect_right(self.steps, first) - 1)
        end = bisect.bisect_right(self.steps, last)
        return max(self.codes[begin:end], default=NOTHING)


class Watch:
    """Follows a scheduler: `step` at the end of each step, `close` at the end of all. clock: seconds."""

    def __init__(
        self, scheduler: Scheduler, terminal: Terminal, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.scheduler, self.terminal, self.clock = scheduler, terminal, clock
        fits = terminal.can_show(GLYPHS + BAR)
        self.glyphs, self.bar = (GLYPHS, BAR) if fits else (ASCII, ASCII_BAR)
        self.rows: dict[int, Row] = {}
        self.steps = self.tokens = self.queries = self.hits = self.preemptions = self.ended = 0
        self._active: set[int] = set()  # rows that did something in the last step
        self._gone: deque[int] = deque()  # rows that have ended, the latest last
        self._start = self._frame = clock()
        self._times = deque([(self._start, 0)], maxlen=WINDOW + 1)

    # --- what happens ------------------------------------------------------------------------------------------------

    def step(self, plan: Plan | None, outputs: Iterable[Output]) -> None:
        """A step has ended. plan: what it ran over, None if there was nothing. outputs: what is new."""
        parts = () if plan is None else plan.parts
        self.steps += plan is not None
        self._meet([part.sequence for part in parts if not part.padding])
        if plan is not None:
            self._note(parts)
        for output in outputs:
            self.tokens += len(output.tokens)
            if output.finish_reason is not None:
                self._end(output)
        self._times.append((self.clock(), self.tokens))
        if self.terminal.live and self._times[-1][0] - self._frame >= FRAME:
            self._frame = self._times[-1][0]
            self.terminal.draw(self.picture())

    def _meet(self, planned: list[Sequence]) -> None:
        for sequence in (*planned, *self.scheduler.running, *self.scheduler.waiting):
            if sequence.id not in self.rows:
                self.rows[sequence.id] = Row(sequence, [max(1, self.steps)], [WAITING])

    def _note(self, parts: Iterable[Part]) -> None:
        codes = {sequence.id: IDLE for sequence in self.scheduler.running}
        for part in parts:
            id = ~part.sequence.id if part.padding else part.sequence.id  # see `engine.static`
            codes[id] = max(codes.get(id, NOTHING), _code(part))
            if not part.padding and self.rows[id].codes == [WAITING]:  # its first part
                self.queries += part.sequence.n_prompt
                self.hits += part.sequence.n_cached or 0
        active = set()
        for id in self._active | codes.keys():
            row = self.rows.get(id)
            if row is None:
                continue
            code = codes.get(id, WAITING)
            if row.sequence.preemptions > row.preemptions:
                self.preemptions += row.sequence.preemptions - row.preemptions
                row.preemptions, code = row.sequence.preemptions, PREEMPTED
            if row.reason and code != PADDING:
                code = NOTHING
            row.does(self.steps, code)
            if code not in (NOTHING, WAITING):
                active.add(id)
        self._active = active

    def _end(self, output: Output) -> None:
        self.ended += 1
        row = self.rows.get(output.id)
        if row is None:  # it came and went between two steps
            return
        row.reason = output.finish_reason
        if row.codes[-1] == WAITING:
            row.does(self.steps, NOTHING)
        self._gone.append(output.id)
        while len(self._gone) > MOST_ENDED and self._gone[0] not in self._active:
            del self.rows[self._gone.popleft()]

    # --- the picture -------------------------------------------------------------------------------------------------

    def picture(self, whole: bool = False) -> list[str]:
        """The picture as lines that fit the terminal. whole: all steps, several a column if need be."""
        columns, lines = self.terminal.size()
        columns -= 1
        live = self.terminal.live
        rows, hidden = self._chosen(max(1, lines - LINES) if live else MOST_ENDED)
        label = max((len(str(row.sequence.id)) for row in rows), default=1)
        cells = max(1, columns - label - 2)
        each = max(1, -(-self.steps // cells)) if whole else 1
        first = 1 if whole else max(1, self.steps - cells + 1)
        drawn = []
        for row in rows:
            codes = [row.at(step, step + each - 1) for step in range(first, self.steps + 1, each)]
            while codes and codes[-1] == NOTHING:
                codes.pop()
            reason = f" {row.reason}" if len(row.reason) < cells - len(codes) else ""
            drawn.append(f"{row.sequence.id:>{label}} {self.bar[3]}{self._paint(codes)}{reason}".rstrip())
        scale = f"steps {first} to {self.steps}" + (f", {each} a column" if each > 1 else "")
        shown = {code for row in self.rows.values() for code in row.codes} | {WAITING, PROMPT, TOKEN}
        legend = [f"{self._paint([code])} {NAMES[code]}" for code in sorted(shown - {NOTHING})]
        head = [_fit(self._status(whole), columns), self._blocks(columns)]
        tail = [_fit([scale, *hidden], columns), _fit(legend, columns)]
        room = max(1, lines - 1) if live else len(rows) + 4
        return [*head, *drawn, *tail] if room >= len(drawn) + 4 else [*head, *drawn][:room]

    def _chosen(self, room: int) -> tuple[list[Row], list[str]]:
        """Up to ``room`` rows by their numbers, and a word about the others. Those that run come first, then as many of
        the first in line as of those that ended last."""
        running = [self.rows[sequence.id] for sequence in self.scheduler.running if sequence.id in self.rows][-room:]
        waiting = [self.rows[sequence.id] for sequence in self.scheduler.waiting if sequence.id in self.rows]
        gone = [self.rows[id] for id in reversed(self._gone)]
        free = room - len(running)
        waiting = waiting[: max(free // 2, free - len(gone))]
        gone = gone[: free - len(waiting)]
        left_out = {
            "running": len(self.scheduler.running) - len(running),
            "waiting": len(self.scheduler.waiting) - len(waiting), "ended": self.ended - len(gone),
        }  # fmt: skip
        rows = sorted([*running, *waiting, *gone], key=lambda row: row.sequence.id)
        return rows, [f"{n} more {what}" for what, n in left_out.items() if n > 0]

    def _status(self, whole: bool) -> list[str]:
        (start, before), (end, after) = (self._start, 0) if whole else self._times[0], self._times[-1]
        rate = (after - before) / (end - start) if end > start else 0.0
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        words = [f"step {self.steps}", f"{running} running", f"{waiting} waiting", f"{self.ended} ended"]
        preempted = f"{self.preemptions} preemption{'s' if self.preemptions > 1 else ''}"
        return [*words, f"{rate:.0f} tokens/s", *([preempted] if self.preemptions else [])]

    def _blocks(self, columns: int) -> str:
        pool = self.scheduler.pool
        counts = [pool.n_blocks - pool.free - pool.cached, pool.cached, pool.free]
        words = ", ".join(f"{n} {what}" for n, what in zip(counts, ("in use", "cached", "free")))
        cells = max(0, min(BAR_CELLS, pool.n_blocks, columns - len(f"blocks  {words}")))
        edges = [-(-cells * sum(counts[:i]) // pool.n_blocks) for i in range(4)]  # rounded up: one block in use shows
        bar = "".join(glyph * (right - left) for glyph, left, right in zip(self.bar, edges, edges[1:]))
        hits = [f"prefix hits {self.hits} of {self.queries} tokens"] if self.scheduler.cache is not None else []
        return _fit([" ".join(filter(None, ("blocks", bar, words))), *hits], columns)

    def _paint(self, codes: list[int]) -> str:
        """Codes as glyphs, in colour where there is colour: an escape for each run of equal ones."""
        if not self.terminal.colour:
            return "".join(self.glyphs[code] for code in codes)
        text = ""
        for last, code in zip([None, *codes], codes):
            text += (f"\x1b[{COLOURS[code]}m" if code != last else "") + self.glyphs[code]
        return text + ("\x1b[0m" if codes else "")

    # --- begin and end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Show the whole run, for good."""
        self.terminal.draw(self.picture(whole=True))
        self.terminal.end()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _code(part: Part) -> int:
    if part.padding:
        return PADDING
    newest = part.count == 1 or part.drafts  # and guesses of the next ones
    return TOKEN if newest and part.start >= part.sequence.n_prompt else PROMPT


def _fit(words: list[str], columns: int) -> str:
    """As many of ``words`` as fit a line, and the first one."""
    while len(words) > 1 and sum(map(width, words)) + 3 * (len(words) - 1) > columns:
        words = words[:-1]
    return "   ".join(words)
