"""A static batch, to compare continuous batching with: the first in line run together, and all wait for the slowest.

The batch is a matrix with a place, a line, for each sequence: as wide as the longest prompt, then a column more with
each step. Shorter prompts are padded, so that all decode in the same columns. A sequence that has ended keeps its
place, which is run over until the last one has ended. Only then may others come in.

    A  a a a a a a │ a ·  ·  ·
    B  b b b · · · │ b b  ·  ·      · padding
    C  c c · · · · │ c c  c  c      C is the slowest

Padding is computed as everything else is: a row of it has a token, 0, a position, and a slot in the blocks of its
place, and passes through all products and the attention. So it costs what padding costs. The mask is that a row attends
up to its own position: padding lies behind the prompt, and each of its slots is written anew before a token behind it
looks there. A request's tokens are what they are alone, bit for bit.

A batch takes all blocks that it may need at its start, and keeps them to its end: there is no preemption, and most
of the blocks lie idle most of the time.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from dataclasses import dataclass

from ch14_mini_llm.cache.pool import BlockPool
from ch14_mini_llm.cache.radix import RadixCache
from ch14_mini_llm.engine.plan import Part, Plan
from ch14_mini_llm.engine.scheduler import Scheduler
from ch14_mini_llm.engine.sequence import RUNNING, Sequence


@dataclass(eq=False)
class Place:
    """A line of the matrix. padding: run over where ``sequence`` has nothing, in the same blocks; its id is ``~id``."""

    sequence: Sequence
    padding: Sequence


class StaticScheduler(Scheduler):
    """As `Scheduler`, but what begins together ends together. cache: not used; a batch leaves nothing behind.

    A plan has up to two parts for each sequence that runs: of itself, and of padding.
    """

    def __init__(
        self, pool: BlockPool, cache: RadixCache | None, block_size: int, max_batch: int, max_rows: int
    ) -> None:
        super().__init__(pool, None, block_size, max_batch, max_rows)
        self.places: list[Place] = []
        self.width = 0  # of the longest prompt
        self.column = 0  # the next one to run over

    def next(self) -> Plan | None:
        """The next columns of the batch, or of a new batch; None if a step under way has to be read first.

        Of the prompts' columns a step has as many as its budget of rows allows, then one.
        """
        if not self.running and not self._form():
            return None
        alive = {place for place in self.places if self._goes_on(place.sequence)}
        if not alive:
            return None if self.running else self.next()
        count = max(1, min(self.width - self.column, self.max_rows // len(self.places)))
        parts = [part for place in self.places for part in self._parts(place, count, place in alive)]
        self.column += count
        self._tickets += 1
        for part in parts:
            part.sequence.ticket = self._tickets
        padded = any(part.padding for part in parts)
        steady = tuple(part.sequence for part in parts) if self.column > self.width and not padded else ()
        plan = Plan(self._tickets, tuple(parts), bool(steady) and steady == self._last)
        self._last = steady
        return plan

    def _form(self) -> bool:
        """A batch of the first in line, as many as have room at their longest; False if there is none to form."""
        if not self.waiting or self.pool.late:  # blocks of the last batch come back when its last step has been read
            return False
        batch: list[Sequence] = []
        for sequence in self.waiting[: self.max_batch]:
            if batch and sum(map(self._blocks_for, _rooms([*batch, sequence]))) > self.pool.free:
                break
            batch.append(sequence)
        self.width, self.column = max(sequence.n_prompt for sequence in batch), 0
        for sequence, room in zip(batch, _rooms(batch)):
            blocks = self.pool.take(min(self._blocks_for(room), self.pool.free))  # less than it needs only if alone
            self.pool.hold(blocks)  # once for the sequence, once for its place
            padding = Sequence(~sequence.id, [0] * min(room, len(blocks) * self.block_size), 0, ~sequence.order)
            padding.n_prompt, padding.blocks = 0, blocks  # it has no prompt
            sequence.blocks, sequence.state, sequence.n_cached = list(blocks), RUNNING, 0
            self.places.append(Place(sequence, padding))
        self.running, self.waiting = batch, self.waiting[len(batch) :]
        return True

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether there is something to run over, and a slot for it; one for which the whole pool is too small ends."""
        return sequence.state == RUNNING and sequence.left > 0 and self._has_room(sequence)

    def _parts(self, place: Place, count: int, alive: bool) -> list[Part]:
        """What a place has in the next ``count`` columns: of its sequence, of padding, or one and then the other."""
        sequence, decodes = place.sequence, self.column >= self.width
        own = 0
        if alive:
            own = 1 if decodes else min(count, max(0, sequence.n_prompt - self.column))
        parts = [self._part(sequence, own)] if own else []
        if own < count:
            start = self.column + own
            if decodes:  # where its sequence would be, as far as its place goes
                start = min(sequence.n_prompt + self.column - self.width, len(place.padding.tokens) - 1)
            samples = decodes  # its logits cost, too
            life = ~place.padding.life  # not its own: what a step makes of padding is dropped
            parts.append(Part(place.padding, start, count - own, samples, life, padding=True))
        return parts

    def _end(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        super()._end(sequence, reason, error)
        if not self.running:  # the batch has ended
            for place in self.places:
                self._release(place.padding)
            self.places = []

    def check(self) -> None:
        """As for `Scheduler`; a place owns its blocks until the batch has ended."""
        owners = [*self.running, *(place.padding for place in self.places)]
        self.pool.check([owner.blocks for owner in owners], [])
        assert all(not sequence.blocks for sequence in self.waiting)


def _rooms(batch: Listed[Sequence]) -> list[int]:
    """Slots that each sequence's place needs: for the longest prompt, and for all its own tokens but the last."""
    width = max(sequence.n_prompt for sequence in batch)
    return [max(width, sequence.n_prompt + sequence.max_new - 1) for sequence in batch]
