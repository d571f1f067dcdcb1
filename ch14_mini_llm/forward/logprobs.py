"""Log-probabilities of new tokens and of a prompt's, launched with a step and read with its tokens."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.plan import Logprob, Plan
from ch14_mini_llm.engine.request import MAX_TOP
from ch14_mini_llm.forward.half import PROMPT_ROWS
from chapters.ch13_llm_ops.sampling_rows import logprobs_rows, rows_launch

WIDTH = 2 + 2 * MAX_TOP  # numbers a row: log-probability, rank, the likeliest ids and their log-probabilities


class ScoreRows:
    """Chapter 13's ``logprobs_rows`` for up to ``max_rows`` rows of a step.

    There are two buffers of results, used by turns: a step may be launched before the one in front has been read.
    """

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self.max_rows, self.vocab_size = max_rows, vocab_size
        self._n_top, self._tops = cuda.device_array(max_rows, np.int32), None
        self._buffers = [cuda.device_array(max_rows * WIDTH, np.int32) for _ in range(2)]
        self._turn = 0

    def begin(self, tops: list[int]) -> None:
        """A step begins. tops: how many of the likeliest tokens each row wants, -1 for a row that wants nothing."""
        if tops != self._tops:
            self._tops = tops
            self._n_top.copy_to_device(np.array(tops + [-1] * (self.max_rows - len(tops)), np.int32))
        self._turn = 1 - self._turn

    def launch(self, logits, tokens, first: int, n: int) -> None:
        """Rows first … first + n - 1 from logits (≥ n, vocab_size), their tokens (≥ n,) int32: both on the device."""
        logprob, rank, ids, top = self._views(self._buffers[self._turn], first, n)
        logprobs_rows[rows_launch(n)](
            logits, tokens, self._n_top[first : first + n], logprob.view(np.float32), rank, ids, top.view(np.float32),
            self.vocab_size,
        )  # fmt: skip

    def pending(self) -> PendingScores:
        """What was launched since `begin`, to be read later."""
        return PendingScores(self, self._buffers[self._turn], self._tops)

    def _views(self, buffer, first: int, n: int):
        """logprob, rank (n,), top_ids and top_logprobs (n, MAX_TOP) of rows from ``first`` on, all int32."""
        rows, at = self.max_rows, (2 + MAX_TOP) * self.max_rows
        tops = slice(first * MAX_TOP, (first + n) * MAX_TOP)
        likeliest = (part[tops].reshape(n, MAX_TOP) for part in (buffer[2 * rows : at], buffer[at:]))
        return buffer[first : first + n], buffer[rows + first : rows + first + n], *likeliest


class PendingScores:
    """Log-probabilities under way. tops: see `ScoreRows.begin`."""

    def __init__(self, rows: ScoreRows, buffer, tops: list[int]) -> None:
        self._rows, self._buffer, self._tops = rows, buffer, tops

    def read(self) -> list[Logprob | None]:
        """Wait for the step; a `Logprob` a row, None for rows that want nothing."""
        n = len(self._tops)
        logprob, rank, ids, top = self._rows._views(self._buffer.copy_to_host(), 0, n)
        logprob, top = logprob.view(np.float32), top.view(np.float32)
        return [None if wanted < 0 else
                Logprob(float(logprob[i]), int(rank[i]),
                        {int(token): float(top[i, j]) for j, token in enumerate(ids[i, :wanted]) if token >= 0})
                for i, wanted in enumerate(self._tops)]  # fmt: skip


class PromptScores:
    """Log-probabilities of prompts' tokens: the head once more, for the rows in front of them, few at a time."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        self._sizes, self._scores = (max_rows, vocab_size), None

    def wanted(self, plan: Plan) -> tuple | None:
        """What the parts of a plan ask for: ``(rows, tokens, tops, counts)`` for `launch`; None if nothing."""
        if plan.same_as_last or not any([part.sequence.prompt_logprobs is not None for part in plan.parts]):
            return None
        rows, tokens, tops, counts, row = [], [], [], {}, 0
        for number, part in enumerate(plan.parts):
            sequence = part.sequence
            if sequence.prompt_logprobs is not None and not sequence.prompt_done:
                text = sequence.tokens[: sequence.n_prompt][part.start + 1 : part.start + part.count + 1]
                counts[number] = len(text)
                rows += range(row, row + len(text))
                tokens += text
                tops += [sequence.prompt_logprobs] * len(text)
            row += part.count
        return (rows, tokens, tops, counts) if tokens else None

    def launch(self, wanted: tuple, ops) -> PendingPrompts:
        """After the layers of a step, and before its rows move on. ops: what stands behind the forward's verbs."""
        rows, tokens, tops, counts = wanted
        if self._scores is None:
            self._scores = ScoreRows(*self._sizes)
            self._logits = cuda.device_array((PROMPT_ROWS, self._sizes[1]), np.float32)
            self._inputs = cuda.device_array((2, self._sizes[0]), np.int32)
        self._scores.begin(tops)
        self._inputs.copy_to_device(np.array([line + [0] * (self._sizes[0] - len(line)) for line in (rows, tokens)],
                                             np.int32))  # fmt: skip
        of_rows, of_tokens = self._inputs[0], self._inputs[1]
        for first in range(0, len(rows), PROMPT_ROWS):
            n = min(PROMPT_ROWS, len(rows) - first)
            ops.logits_at(of_rows[first : first + n], n, self._logits)
            self._scores.launch(self._logits, of_tokens[first : first + n], first, n)
        return PendingPrompts(self._scores.pending(), counts)


class PendingPrompts:
    """Log-probabilities of prompts under way. counts: {number of the part: how many of them}."""

    def __init__(self, scores: PendingScores, counts: dict[int, int]) -> None:
        self._scores, self._counts = scores, counts

    def read(self) -> dict[int, list[Logprob]]:
        """Wait for the step; {number of the part: of its tokens from the second of its positions on}."""
        scores = iter(self._scores.read())
        return {number: [next(scores) for _ in range(count)] for number, count in self._counts.items()}
