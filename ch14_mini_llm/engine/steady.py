"""Steps in which nothing happens but that each of some sequences gets a token: most steps, and hundreds of sequences.

To move every sequence on by itself takes the host about 2 µs each, to plan and to read: 0.5 ms a step of 256, and more
than a GPU needs for it on a slow machine. But as long as none ends, and none joins, one number says where all of them
are: how many such steps there have been. What happens to a single sequence is known beforehand, and looked up by that
number: when its blocks are full, when another of them can be shared, when the first has all tokens that it may have.

The sequences themselves do not notice until `settle` tells them: it must be called before anything else reads or
changes what they say of their steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Listed
from functools import cached_property

from ch14_mini_llm.engine.plan import Output, Part, Plan
from ch14_mini_llm.engine.sequence import Sequence


class Again(Plan):
    """The plan of the step that `steps` are so many steps behind: the same sequences, a row each."""

    def __init__(self, ticket: int, steps: Steady, number: int) -> None:
        super().__init__(ticket, (), True)
        del self.__dict__["parts"]  # made only if someone looks
        self.__dict__.update(steps=steps, number=number, rows=len(steps.sequences), scored=steps.scored)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        steps = self.steps
        starts = [start + self.number for start in steps.starts]
        return tuple([Part(*one, 1, True, life) for *one, life in zip(steps.sequences, starts, steps.lives)])

    @property
    def sequences(self) -> list[Sequence]:
        return self.steps.sequences

    def start_of(self, i: int) -> int:
        return self.steps.starts[i] + self.number


class Steady:
    """What comes behind a plan in which every sequence has a row that a token follows.

    number: of steps planned since then. starts: the positions of the rows in that plan.
    """

    def __init__(self, plan: Plan, block_size: int) -> None:
        self.sequences = [part.sequence for part in plan.parts]
        self.starts, self.lives = [part.start for part in plan.parts], [part.life for part in plan.parts]
        self.block_size, self.number, self.scored = block_size, 0, plan.scored
        self._ticket, self._planned, self._read = plan.ticket, 0, 0  # steps of which the sequences do not know yet
        self._ids = [sequence.id for sequence in self.sequences]
        self._appends = [sequence.tokens.append for sequence in self.sequences]
        self._stops = frozenset().union(*[sequence.stop_tokens for sequence in self.sequences])
        self._more = [s.max_new - (len(s.tokens) + s.n_pending - s.n_prompt) for s in self.sequences]
        self._last = min(self._more)
        self._full: dict[int, list[int]] = defaultdict(list)  # number of a step → whose blocks are full behind it
        self._ends: dict[int, list[int]] = defaultdict(list)  # … modulo block_size → whose last block is
        for i, sequence in enumerate(self.sequences):
            self._full[len(sequence.blocks) * block_size - sequence.n_computed].append(i)
            self._ends[(-1 - self.starts[i]) % block_size].append(i)
        if self._full.get(0):
            self._last = 0
        self.count_tokens()

    def count_tokens(self) -> None:
        """Look how many tokens the host may yet read until the first sequence has all."""
        self._unread = min([s.max_new - (len(s.tokens) - s.n_prompt) for s in self.sequences])

    def next(self, ticket: int, take: Callable[[int], list[int] | None]) -> Again | None:
        """The next step; None if not all sequences can be in it. take(1): a block of the pool, or None."""
        if self.number >= self._last:
            return None
        self._ticket = ticket
        self.number += 1
        self._planned += 1
        for i in self._full.pop(self.number, ()):
            block = take(1) if self._more[i] > self.number else None
            if block is None:
                self._last = self.number
            else:
                self.sequences[i].blocks += block
                self._full[self.number + self.block_size].append(i)
        return Again(ticket, self, self.number)

    def read(self, tokens: Listed[int]) -> list[Output] | None:
        """Give the sequences the tokens of the oldest step; None, and nothing has happened, if one of them ends."""
        if self._unread <= 1 or min(tokens) < 0 or not self._stops.isdisjoint(tokens):
            return None
        self._unread -= 1
        self._read += 1
        for append, token in zip(self._appends, tokens):
            append(token)
        return list(map(Output, self._ids, zip(tokens)))

    def whole(self, number: int) -> list[tuple[Sequence, int]]:
        """The sequences that have filled a block with the step ``number``, and how many tokens that makes."""
        found = self._ends.get(number % self.block_size, ())
        return [(self.sequences[i], self.starts[i] + number + 1) for i in found]

    def settle(self) -> None:
        """Have the sequences say themselves where they are."""
        planned, read, self._planned, self._read = self._planned, self._read, 0, 0
        if not planned and not read:
            return
        for sequence in self.sequences:
            sequence.n_computed += planned
            sequence.n_pending += planned - read
            sequence.n_written += read
            sequence.ticket = self._ticket
