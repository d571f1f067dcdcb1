"""Who guesses for an engine: the text itself, a smaller model, or the first layers of the model.

A draft model is an engine of its own. It is asked to go on with a text as anybody would ask it, and its prefix cache
knows what it has read of that text before: so only the newest tokens are new to it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Listed
from dataclasses import replace
from typing import TYPE_CHECKING

from ch14_mini_llm.engine.models import model_of
from ch14_mini_llm.engine.request import Request, RequestError, shown
from ch14_mini_llm.engine.sizes import blocks_that_fit
from ch14_mini_llm.engine.speculate import HOW, Guesser, Ngrams, can_guess, check_how
from ch14_mini_llm.model.roles import Model
from ch14_mini_llm.model.weights import load_weights

if TYPE_CHECKING:
    from ch14_mini_llm.engine.engine import Engine

BLOCK_SIZE = 4  # of a draft model: what is left of a block is read again
GPU_SHARE, CPU_BYTES = 0.05, 1 << 28  # of the free memory, or of the host's, for its keys and values


class Drafted(Guesser):
    """The likeliest tokens of another engine's model."""

    def __init__(self, draft: Engine) -> None:
        super().__init__()
        self.draft = draft

    def _find(self, tokens: Listed[int], most: int) -> list[int]:
        most = min(most, self.draft.model.n_ctx - len(tokens))  # its context may end before the text does
        return self.draft.run([Request(tokens, most)])[0].tokens if most > 0 else []

    def _sees(self, tokens: Listed[int]) -> bool:
        return len(tokens) < self.draft.model.n_ctx


class Speculation:
    """``guesser(request)``: who guesses a request's tokens, or None.

    how: as `Engine` takes it. model, level, max_batch: of the engine that the guesses are for. draft: the engine of a
    draft model, or None. Raises `RequestError`, and `WeightsError` for a file that cannot be used.
    """

    def __init__(self, how: str | Engine | None, model: Model, level: str, max_batch: int, static: bool) -> None:
        self.on, self.draft = how is not None, None
        if not self.on:
            return
        if static:
            raise RequestError(f"speculate is {shown(how)}, but a static batch has no place for guesses: leave one out")
        if how != "ngram":
            named = isinstance(how, (str, os.PathLike))
            self.draft = draft_engine(os.fspath(how), model, level, max_batch) if named else how
            if not hasattr(self.draft, "runner"):
                raise RequestError(f"speculate is {shown(how)}; it can be {HOW}, or an engine", "speculate")
            mine, theirs = model.vocab_size, self.draft.model.vocab_size
            if mine != theirs:
                words = f"speculate: the draft has a vocabulary of {theirs} tokens, this model one of {mine}"
                raise RequestError(f"{words}; they must have the same", "speculate")

    def guesser(self, request: Request) -> Guesser | None:
        """A new one for a request."""
        if not self.on or not can_guess(request):
            return None
        return Ngrams() if self.draft is None else Drafted(self.draft)


def draft_engine(how: str, model: Model, level: str, max_batch: int) -> Engine:
    """An engine for the first layers of a model ("layers:N"), or for a weight file."""
    from ch14_mini_llm.engine.engine import Engine

    layers = check_how(how, len(model.layers))
    if layers is not None:
        draft = replace(model, layers=model.layers[:layers])
    else:
        dtype = str(model.head.weight.dtype) if level == "kv" else None
        draft = model_of(*load_weights(how), level, dtype=dtype)
    num_blocks = blocks_that_fit(draft, level, BLOCK_SIZE, max_batch, GPU_SHARE, CPU_BYTES)
    return Engine(draft, level, num_blocks, BLOCK_SIZE, max_batch)
