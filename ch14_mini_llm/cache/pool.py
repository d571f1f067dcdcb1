"""The pool of key-value blocks: who has which. Counts only; the memory itself is `pages`.

A block holds the keys and values of ``block_size`` tokens in every layer. At any time it is exactly one of

========  ==========================================================================================
free      nobody needs what is in it; the one given up last is taken first, its memory is near
owned     in the block table of one sequence or more: `uses` of it is how many
cached    in no block table, but the prefix cache knows what tokens it holds, and may lend it again
========  ==========================================================================================

Block 0 is in none of the three: a block table begins as zeros, and what was not filled in must lead to no one's block.

A step may still be running when the host takes a block from a sequence (an abort, a stop token, a preemption). Such a
block is dropped ``until`` that step's ticket: it stays owned until `retire` is called with the ticket.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterable, Sequence


class BlockPool:
    """``n_blocks`` blocks, numbered 1 … n_blocks."""

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = n_blocks
        self.uses = [0] * (n_blocks + 1)
        self._free = deque(range(1, n_blocks + 1))
        self._known = [False] * (n_blocks + 1)  # to the prefix cache
        self._cached: dict[int, None] = {}  # known and not owned, in the order in which they were given up
        self._late: dict[Hashable, list[int]] = {}  # ticket -> blocks that its step may still write

    @property
    def free(self) -> int:
        """How many blocks nobody needs."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """How many blocks only the prefix cache has."""
        return len(self._cached)

    @property
    def late(self) -> int:
        """How many uses are only there until a ticket is read."""
        return sum(map(len, self._late.values()))

    def take(self, n: int) -> list[int] | None:
        """``n`` free blocks, each used once; None, and nothing is taken, if there are fewer."""
        if n > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(n)]
        for block in blocks:
            self.uses[block] = 1
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """One more use of each of these blocks, which are owned or cached."""
        for block in blocks:
            assert self.uses[block] or self._known[block], f"block {block} is free"
            self.uses[block] += 1
            self._cached.pop(block, None)

    def drop(self, blocks: Sequence[int], until: Hashable = None) -> None:
        """One use less of each of these blocks; ``until``: not before `retire` is called with this ticket.

        blocks: in the order of their tokens. They are given up from the end, so that of two that the prefix cache
        knows the one with the later tokens is the older, and leaves first.
        """
        if until is not None:
            self._late.setdefault(until, []).extend(blocks)
            return
        for block in reversed(blocks):
            assert self.uses[block], f"block {block} is not owned"
            self.uses[block] -= 1
            if not self.uses[block] and self._known[block]:
                self._cached[block] = None
            elif not self.uses[block]:
                self._free.appendleft(block)

    def retire(self, ticket: Hashable) -> None:
        """The step of a ticket has ended: drop what was waiting for it."""
        self.drop(self._late.pop(ticket, ()))

    def know(self, block: int) -> None:
        """The prefix cache has an entry for an owned block."""
        assert self.uses[block] and not self._known[block]
        self._known[block] = True

    def oldest(self, n: int) -> list[int]:
        """Up to ``n`` cached blocks, first those that were given up longest ago."""
        return list(itertools.islice(self._cached, n))

    def forget(self, block: int) -> None:
        """The prefix cache has dropped its entry of a cached block, which is free now."""
        del self._cached[block]
        self._known[block] = False
        self._free.appendleft(block)

    def check(self, tables: Iterable[Iterable[int]], known: Iterable[int]) -> None:
        """Raises AssertionError unless the pool agrees with the block tables and with the prefix cache's entries.

        tables: the blocks of each live sequence. known: the blocks of all entries.
        """
        counted = [0] * (self.n_blocks + 1)
        for blocks in [*tables, *self._late.values()]:
            for block in blocks:
                assert 1 <= block <= self.n_blocks, f"block {block} in a block table"
                counted[block] += 1
        assert counted == self.uses, f"uses: {_differences(counted, self.uses)}"
        known = sorted(known)
        assert known == [b for b, is_known in enumerate(self._known) if is_known], "the cache has other entries"
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for block in range(1, self.n_blocks + 1):
            states = block in free, self.uses[block] > 0, block in self._cached
            assert sum(states) == 1, f"block {block}: free, owned, cached = {states}"


def _differences(counted: list[int], uses: list[int]) -> str:
    return ", ".join(f"block {b} is in {c} tables, used {u}" for b, (c, u) in enumerate(zip(counted, uses)) if c != u)
