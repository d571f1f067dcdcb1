"""Who waits, who runs, and which blocks of the pool each sequence has.

A prompt's blocks are taken when its sequence is admitted, all or none; then one at a time. When there is none left,
cached blocks go first, and then the sequence that comes last (lowest priority, then latest) gives its blocks back and
is computed anew later. The first in line never gives way, so there is always one that gets on.
"""

from __future__ import annotations

import bisect

from ch14_mini_llm.cache.pool import BlockPool
from ch14_mini_llm.cache.radix import RadixCache
from ch14_mini_llm.engine.plan import Output
from ch14_mini_llm.engine.sequence import ENDED, RUNNING, WAITING, Sequence, next_life


class Owners:
    """Sequences over one `BlockPool`. cache: or None. block_size: in tokens."""

    def __init__(self, pool: BlockPool, cache: RadixCache | None, block_size: int) -> None:
        self.pool, self.cache, self.block_size = pool, cache, block_size
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self.outputs: list[Output] = []  # not fetched yet
        self._read = 0  # the last ticket whose tokens have been read

    def add(self, sequence: Sequence) -> None:
        """A new sequence. Its prompt must fit the pool: what can never run is refused by who takes requests."""
        assert self._blocks_for(len(sequence.tokens)) <= self.pool.n_blocks
        bisect.insort(self.waiting, sequence, key=lambda one: one.rank)

    def check(self) -> None:
        """Raises AssertionError unless each block is free, owned or cached, as the sequences and the cache say."""
        known = [] if self.cache is None else self.cache.blocks()
        self.pool.check([sequence.blocks for sequence in self.running], known)
        assert all(not sequence.blocks for sequence in self.waiting)

    # --- taking blocks -----------------------------------------------------------------------------------------------

    def _admit(self, sequence: Sequence) -> bool:
        """Take the blocks of all tokens that a waiting sequence has; False, and nothing is taken, if there are not."""
        blocks = self.cache.match(sequence.tokens).blocks if self.cache is not None and sequence.reads_cache else []
        more = self._take(self._blocks_for(len(sequence.tokens)) - len(blocks))
        if more is None:
            self.pool.drop(blocks)
            return False
        n_tokens = len(blocks) * self.block_size
        sequence.blocks, sequence.n_computed, sequence.n_written = blocks + more, n_tokens, n_tokens
        sequence.n_entered = len(blocks)
        sequence.state = RUNNING
        sequence.n_cached = n_tokens if sequence.n_cached is None else sequence.n_cached
        return True

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether the blocks of a sequence reach to its next token, after one was taken, from others if need be."""
        if self._blocks_for(sequence.n_computed + 1) <= len(sequence.blocks):
            return True
        while True:
            more = self._take(1)
            if more is not None:
                sequence.blocks += more
                return True
            if self.pool.late:
                return False  # some come back when a step under way has been read
            last = self.running[-1]
            if last is sequence and len(self.running) == 1:
                if sequence.n_pending == 0:
                    pool = f"the pool of {self.pool.n_blocks} blocks of {self.block_size} tokens is full"
                    self._end(sequence, "length", f"{pool}, with {len(sequence.tokens)} of this request alone")
                return False
            self._preempt(last)
            if last is sequence:
                return False

    def _reserve(self, sequence: Sequence) -> None:
        """Take the block of the step after this one if there is a free one: then the device finds it by itself."""
        if sequence.n_computed == len(sequence.blocks) * self.block_size and sequence.left and self.pool.free:
            sequence.blocks += self.pool.take(1)

    def _take(self, n: int) -> list[int] | None:
        if (missing := n - self.pool.free) > 0:
            if self.cache is None or self.pool.cached < missing:
                return None
            self.cache.evict(missing)
        return self.pool.take(n)

    def _blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.block_size)

    def _enter(self, sequence: Sequence, n_written: int) -> None:
        sequence.n_entered = n_written // self.block_size
        self.cache.insert(sequence.tokens[:n_written], sequence.blocks)

    # --- giving up ---------------------------------------------------------------------------------------------------

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks from a running sequence; it will be computed anew."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.state = WAITING
        sequence.preemptions += 1
        bisect.insort(self.waiting, sequence, key=lambda one: one.rank)

    def _end(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        """The one place where a sequence ends, whatever its state and the reason."""
        if sequence.state == ENDED:
            return
        (self.waiting if sequence.state == WAITING else self.running).remove(sequence)
        self._release(sequence)
        sequence.state, sequence.finish_reason, sequence.error = ENDED, reason, error
        self.outputs.append(Output(sequence.id, (), reason, error, cached_tokens=sequence.n_cached or 0))

    def _release(self, sequence: Sequence) -> None:
        """Give its blocks back; those that a step under way may write, once that has been read."""
        under_way = sequence.ticket is not None and sequence.ticket > self._read
        self.pool.drop(sequence.blocks, until=sequence.ticket if under_way else None)
        sequence.blocks = []
        sequence.n_computed = sequence.n_written = sequence.n_entered = sequence.n_pending = 0
        sequence.life = next_life()
        self._left()

    def _left(self) -> None:
        """Called when a running sequence has given up its blocks."""
