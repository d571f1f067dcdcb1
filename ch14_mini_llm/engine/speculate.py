"""Guesses: several tokens of a sequence in one step, the same tokens as without.

Where a step waits for weights, five rows cost little more than one. So a sequence that decodes may bring guesses of its
next tokens, and has them checked:

    its newest token   a guess   a guess   a guess
          |               |         |         |
     the next token    the one   the one   the one     as the model makes them, behind each row
                       behind    behind    behind

The model's tokens count, up to and including the first that is not the guess below it: what stands behind that one was
made for a text that is none. So there is always one new token, and with three guesses up to four. Keys and values of
guesses that were wrong are written anew by the tokens that take their places.

Each row draws with the random number of its own position, as it would alone. So a guess changes no token, whether the
likeliest is taken or one is drawn: a guess ``x`` is right with the probability that the model gives ``x``, as rejection
sampling would accept it, and in the place of a wrong one is a token that was drawn from the others.

Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; A. Saxena, "Prompt Lookup
Decoding", 2023.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Listed

from ch14_mini_llm.engine.request import Request, RequestError, shown

MOST = 7  # guesses of a sequence at a time: with its newest token eight rows, whose weights `forward.few` reads once
FIRST = 3  # guesses, as long as nothing is known of how good they are
LONGEST_PAUSE = 64  # tokens
HOW = "ngram (what the text said before), layers:N (its own first N layers) or the weight file of a smaller model"


class Guesser:
    """Guesses of one sequence: `Ngrams`, or `engine.drafts.Drafted`.

    How many depends on how many were right: twice as many when all were, one more than were right otherwise. When none
    was, nothing is guessed for 2, 4, 8 … tokens.
    """

    def __init__(self) -> None:
        self.hot = False  # whether it is likely to guess again: then steps wait for its tokens
        self._width, self._misses, self._resume = FIRST, 0, 0

    def wish(self, tokens: Listed[int], most: int) -> int:
        """How many guesses it would make behind ``tokens`` if it may make so many."""
        return min(most, self._width) if len(tokens) >= self._resume else 0

    def guess(self, tokens: Listed[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow, or none."""
        wish = self.wish(tokens, most)
        found = self._find(tokens, wish) if wish > 0 else []
        self.hot = bool(found)
        return found

    def look(self, tokens: Listed[int]) -> None:
        """Be hot if there is something to guess behind ``tokens``, of which the newest are not known yet."""
        self.hot = self.hot or self.wish(tokens, 1) > 0 and self._sees(tokens)

    def learn(self, tokens: Listed[int], n_guesses: int, n_right: int) -> None:
        """So many of the last guesses were right. tokens: as they stood when they were guessed."""
        if n_right:
            self._misses, self._width = 0, min(2 * n_guesses if n_right == n_guesses else n_right + 1, MOST)
        else:
            self._misses += 1
            self._width, self._resume = 1, len(tokens) + min(1 << self._misses, LONGEST_PAUSE)
        self.hot = n_right > 0

    def _find(self, tokens: Listed[int], most: int) -> list[int]:
        raise NotImplementedError

    def _sees(self, tokens: Listed[int]) -> bool:
        return bool(self._find(tokens, 1))


class Ngrams(Guesser):
    """What stood behind the last ``size`` tokens when they stood in the text before."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.size = size
        self._behind: dict[tuple[int, ...], int] = {}  # tokens → where the text went on behind them, the last time
        self._known = size  # so far the text is in there

    def _find(self, tokens: Listed[int], most: int) -> list[int]:
        for end in range(self._known, len(tokens)):
            self._behind[tuple(tokens[end - self.size : end])] = end
        self._known = max(self._known, len(tokens))
        start = self._behind.get(tuple(tokens[-self.size :]))
        if start is None:
            return []
        period = len(tokens) - start  # a text that repeats itself faster than that goes round
        return [tokens[start + i % period] for i in range(most)]


def check_how(how: str | None, n_layer: int) -> int | None:
    """The number of "layers:N", None for the other ways. Raises `RequestError` for what is none of `HOW`. n_layer: of
    the model whose tokens are guessed."""
    if how is None:
        return None
    if how.startswith("layers:"):
        number = how.removeprefix("layers:")
        if not number.isdecimal() or not 1 <= int(number) < n_layer:
            limit = f"from layers:1 to layers:{n_layer - 1}"
            raise RequestError(f"speculate is {shown(how)}; of this model it can be {limit}", "speculate")
        return int(number)
    if how != "ngram" and not os.path.exists(how):
        raise RequestError(f"speculate is {shown(how)}, and there is no such file; it can be {HOW}", "speculate")
    return None


def places_for_one(how: str | None) -> int:
    """``max_batch`` of an engine for one sequence, whose guesses take the places of others."""
    return 1 if how is None else 1 + MOST


def can_guess(request: Request) -> bool:
    """Not where a token's logits depend on the tokens right before it: each guess would need a count of tokens, or a
    mask, of its own."""
    return request.constraint is None and not (request.sampling is not None and request.sampling.penalises)


def n_right(guesses: Listed[int], tokens: Listed[int]) -> int:
    """How many guesses in front are the tokens that came."""
    pairs = enumerate(zip(guesses, tokens))
    return next((i for i, (guess, token) in pairs if guess != token), len(guesses))
