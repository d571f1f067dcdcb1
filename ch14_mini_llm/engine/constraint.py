"""What a request's tokens must keep to, such as the grammar of JSON: the engine's side, which knows no grammars.

A constraint says which tokens may come next, and is told which one came. It is always as far as the tokens that the
host has read: so a sequence that has one gets no row while a token of it is under way, and one that is given up and
computed anew has lost nothing.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ch14_mini_llm.engine.request import Request, RequestError

WORD_BITS = 32  # of a mask, as chapter 13's `mask_rows` takes it


class Constraint(Protocol):
    """Of one sequence; called from the engine's thread. Whatever it raises ends its request, and no other."""

    @property
    def done(self) -> bool:
        """Whether the text is whole, and nothing can follow: the sequence ends with "stop"."""

    def mask(self, n_words: int) -> np.ndarray | None:
        """(n_words,) uint32, a bit for each token that may come next: token i's is bit i % 32 of word i // 32. None if
        any may."""

    def advance(self, token: int) -> None:
        """This token came."""


class Guard:
    """A constraint, and the mask of the next token: ``words``, (n_words,) uint32. Raises `RequestError` if there is no
    first token."""

    def __init__(self, constraint: Constraint, vocab_size: int) -> None:
        self.constraint, self._n_words, self.words = constraint, -(-vocab_size // WORD_BITS), None
        try:
            if constraint.done:
                raise ValueError("the text is whole before there is one")
            self._look()
        except Exception as error:
            raise RequestError(f"the constraint fails at the first token: {error}", "constraint") from None

    def _look(self) -> None:
        words = self.constraint.mask(self._n_words)
        if words is not None and not words.any():
            raise ValueError("it allows no token")
        self.words = words

    def advance(self, token: int) -> tuple[str | None, str | None]:
        """``(reason, error)`` for which the sequence ends behind this token: "stop", or "error" and a text; or None."""
        try:
            self.constraint.advance(token)
            if self.constraint.done:
                return "stop", None
            self._look()
        except Exception as error:
            return "error", f"the constraint fails behind token {token}: {type(error).__name__}: {error}"
        return None, None


def guarded(request: Request, vocab_size: int) -> Guard | None:
    """The guard of a request's constraint, if it has one. Raises `RequestError`."""
    return None if request.constraint is None else Guard(request.constraint, vocab_size)
