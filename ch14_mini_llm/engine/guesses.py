"""Sequences that bring guesses of their next tokens, as `engine.speculate` makes them: their rows, and what became of
them.

A guess has a row of its own, and a token follows it: so it takes the place of a sequence that is not there. Where all
places are taken, and somebody waits, nobody guesses.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed

from ch14_mini_llm.cache.pool import BlockPool
from ch14_mini_llm.cache.radix import RadixCache
from ch14_mini_llm.engine.owners import Owners
from ch14_mini_llm.engine.plan import Part
from ch14_mini_llm.engine.sequence import RUNNING, Logprob, Sequence
from ch14_mini_llm.engine.speculate import n_right


class Guesses(Owners):
    """As `Owners`. max_batch: places. n_drafts, n_accepted: guesses so far, and how many of them were right."""

    def __init__(self, pool: BlockPool, cache: RadixCache | None, block_size: int, max_batch: int) -> None:
        super().__init__(pool, cache, block_size)
        self.max_batch = max_batch
        self.n_drafts = self.n_accepted = 0

    @property
    def wants_tokens(self) -> bool:
        """Whether a sequence is likely to guess as soon as it knows its newest token."""
        return any([sequence.guesser is not None and sequence.guesser.hot for sequence in self.running])

    def _guess(self) -> dict[Sequence, list[int]]:
        """Guesses behind the newest tokens of those that decode, as many as there are places, and new tokens left."""
        guessed = {}
        places = self.max_batch - len(self.running) - len(self.waiting)
        for sequence in [one for one in self.running if one.guesser is not None]:
            if places <= 0:
                sequence.guesser.hot = False
            if places <= 0 or sequence.n_computed < sequence.n_prompt or sequence.left != 1:
                continue
            if sequence.n_pending:
                sequence.guesser.look(sequence.tokens)
            elif drafts := sequence.guesser.guess(sequence.tokens, min(places, sequence.left_new - 1)):
                guessed[sequence] = drafts
                places -= len(drafts)
        return guessed

    def _with_guesses(self, sequence: Sequence, drafts: list[int]) -> Part | None:
        """The rows of a sequence's newest token and of its guesses, as many as there are blocks for; None for none."""
        start = sequence.n_computed
        if sequence.state != RUNNING:  # it has given way to another
            return None
        if more := self._take(max(0, self._blocks_for(start + 1 + len(drafts)) - len(sequence.blocks))):
            sequence.blocks += more
        drafts = drafts[: max(0, len(sequence.blocks) * self.block_size - start - 1)]
        if not drafts:
            return None
        sequence.n_computed += 1
        sequence.n_pending += 1
        return Part(sequence, start, 1 + len(drafts), True, sequence.life, drafts=tuple(drafts))

    def _verify(self, part: Part, tokens: Listed[int], scores: Listed[Logprob | None]) -> None:
        """``tokens`` followed a sequence's rows: they count as far as the guesses were right, one after another."""
        sequence, drafts = part.sequence, part.drafts
        if part.life != sequence.life:
            return
        right = n_right(drafts, tokens)
        sequence.guesser.learn(sequence.tokens, len(drafts), right)
        self.n_drafts, self.n_accepted = self.n_drafts + len(drafts), self.n_accepted + right
        sequence.n_computed += right
        sequence.n_pending += right
        for i in range(right + 1):
            if part.life == sequence.life:  # it may end in the middle
                self._advance(sequence, part.start + 1 + i, tokens[i], scores[i], ())

    def _advance(
        self, sequence: Sequence, written: int, token: int | None, score: Logprob | None, prompt: Listed[Logprob]
    ) -> None:
        raise NotImplementedError
