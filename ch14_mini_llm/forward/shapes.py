"""How large a step is, with its padding: what its launches are made of, and so what a CUDA graph of it is kept by.

Sizes are buckets, so that few graphs serve all batches: 1, 2, 3, 4, 6, 8, 12 … sequences with a row each; 64, 128,
192, 256, 384 … rows of prompts, with sequences that decode in front of them. Padding's rows are computed, and read by
no one.
"""

from __future__ import annotations

from dataclasses import dataclass

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
from ch14_mini_llm.engine.plan import Plan
from chapters.ch09_gemm.gemv_tensor import ROWS_MAX
from chapters.ch12_flash.paged_half import segment_keys
from chapters.ch12_flash.paged_steps import segment_tokens
from chapters.ch12_flash.tensor_core import queries_of

FEW_ROWS = ROWS_MAX  # of a group, whose weights `Few` reads once
FEW_TOKENS = 512  # of the longest text, for which a step of `Few` has room at least
TILE = 64  # rows that a mixed step is padded to some number of


@dataclass(frozen=True)
class Shape:
    """How large a step is, padding included: what its launches are made of, and so what a graph of it is kept by.

    single: every sequence has one row, and a token follows each. draws: see `forward.sampler.RowSampler`. n_tokens: of
    the longest text that a step has room for. For `Many`: n_tiles, of queries of prompts; split, whether those with
    many keys are divided among segments; n_steps, rows in front that may be the only ones of their sequences, whose
    texts n_tokens counts.
    """

    ops: str
    rows: int
    n_logits: int
    n_tiles: int = 0
    n_steps: int = 0
    n_tokens: int = 0
    single: bool = False
    draws: int = 0
    split: bool = False


class Shapes:
    """The shapes of an engine's steps. max_few: rows that go through `Few`. max_tiles: of queries, in a step.
    max_tokens: of a sequence. Others as in `engine.sizes.Sizes`."""

    def __init__(
        self, level: str, max_batch: int, max_rows: int, max_few: int, max_tiles: int, max_tokens: int, head_dim: int
    ) -> None:
        self.plain, self.max_batch, self.max_rows, self.max_few = level == "kv", max_batch, max_rows, max_few
        self.max_tiles, self.max_tokens, self.head_dim = max_tiles, max_tokens, head_dim
        self.queries, self.segment = queries_of(head_dim), segment_keys(max_tokens)
        self._last: Shape | None = None  # and how many steps longer than at that time its texts may become
        self._more = 0

    def of(self, plan: Plan, draws: int) -> Shape:
        """The shape of a plan's step. draws: the sampler's."""
        if plan.same_as_last and self._more and self._last.draws == draws:
            self._more -= 1
            return self._last
        longest = max([part.start + part.count for part in plan.parts])
        self._last = self._of(plan, draws, longest)
        self._more = (self.max_tokens if self.plain else self._last.n_tokens) - longest if self._last.single else 0
        return self._last

    def _of(self, plan: Plan, draws: int, longest: int) -> Shape:
        rows, n_logits = plan.rows, len(plan.sampling)
        single = n_logits == rows == len(plan.parts)
        if self.plain:
            return Shape("plain", rows, n_logits, single=single, draws=draws)
        few = rows <= self.max_few
        if single:
            rows = n_logits = self._bucket(rows)
        else:
            step, most = (FEW_ROWS, self.max_few) if few else (TILE, self.max_rows)
            rows, n_logits = min(rounded(-(-rows // step)) * step, most), self._bucket(n_logits, coarse=not few)
        if few:
            now = max(FEW_TOKENS, _power(longest))
            end = max([part.sequence.n_prompt + part.sequence.max_new - 1 for part in plan.parts])
            n_tokens = min(max(now, min(_power(end), 2 * now)), self.max_tokens)  # or a text outgrows its graph
            return Shape("few", rows, n_logits, n_tokens=n_tokens, single=single, draws=draws)
        n_steps, n_prompts = plan.n_steps, len(plan.parts) - plan.n_steps
        longest_step = longest if single else max([part.start + 1 for part in plan.parts[:n_steps]], default=0)
        n_steps = min(self._bucket(n_steps, coarse=not single), rows)
        n_tiles, n_tokens = self._tiles(rows, n_prompts), self._context(longest_step)
        prompts = [(part.start, part.count) for part in plan.parts[plan.n_steps :]]
        split = max(map(sum, prompts), default=0) > self.segment
        if split:
            pieces = sum(
                -(-(start + min(first + self.queries, count)) // self.segment)
                for start, count in prompts for first in range(0, count, self.queries)
            )  # fmt: skip
            n_tiles = min(rounded(pieces), self.max_tiles)
        return Shape("many", rows, n_logits, n_tiles, n_steps, n_tokens, single, draws, split)

    def _tiles(self, rows: int, n_prompts: int) -> int:
        """Tiles of queries that parts of so many prompts can take."""
        n_prompts = self._bucket(n_prompts, coarse=True)
        return min(rows // self.queries + n_prompts, self.max_tiles) if n_prompts else 0

    def _context(self, longest: int) -> int:
        """Tokens of the longest text that a step has room for: a segment, two, four …"""
        segment = segment_tokens(self.head_dim)
        return min(segment << (-(-longest // segment) - 1).bit_length(), self.max_tokens) if longest else 0

    def _bucket(self, n: int, coarse: bool = False) -> int:
        """`rounded`, but no more than there can be. coarse: to 8, 32, 128 …; a mixed step has three such numbers, and
        each trio is a graph."""
        bits = (n - 1).bit_length()
        return min(1 << max(3, bits + 1 - bits % 2) if coarse else rounded(n), self.max_batch) if n else 0


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def rounded(n: int) -> int:
    """The next power of two, or three quarters of it: 1, 2, 3, 4, 6, 8, 12 …"""
    power = _power(n)
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power
