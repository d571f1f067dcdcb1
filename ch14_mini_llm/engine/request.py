"""What may be asked of a model: the checks of tokens, lengths and sampling settings.

Nothing here imports a kernel, so a bad request is refused before a backend is looked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ch14_mini_llm.model.config import GPT2Config

MAX_SEED = 2**64 - 1  # chapter 13's Philox takes 64 bits


class RequestError(ValueError):
    """Tokens or settings that cannot be used with a model; the message names the value, the limit and the mend."""


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token instead of taking the most likely one. Raises `RequestError` for a bad value.

    temperature: logits are divided by it, above 0; top_k: draw among the k most likely only, None for all; top_p: draw
    among the fewest tokens whose probabilities add up to p, in (0, 1]; seed: the same seed gives the same tokens.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise RequestError(
                f"temperature is {self.temperature}; it must be above 0 and finite "
                "(for the most likely token every time, ask for no sampling at all)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k is {self.top_k}; it must be at least 1 (leave it out to draw from all tokens)")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (1 draws from all tokens)")
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed is {self.seed}; it must be from 0 to {MAX_SEED}")


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises `RequestError` unless `tokens` is not empty and all are integers from 0 to vocab_size - 1."""
    if len(tokens) == 0:
        raise RequestError("the prompt has no tokens; give at least 1")
    if set(map(type, tokens)) == {int} and 0 <= min(tokens) and max(tokens) < vocab_size:
        return  # the usual case: faster than to look at one after another
    for position, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            raise RequestError(f"token {position} is {token!r}; it must be an integer from 0 to {vocab_size - 1}")
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"token id {token} (position {position}) is not in this model's vocabulary; "
                f"use ids from 0 to {vocab_size - 1}"
            )


def check_request(
    config: GPT2Config, tokens: Sequence[int], max_new: int, sampling: Sampling | None = None, least_new: int = 1
) -> None:
    """Raises `RequestError` unless a model of these sizes can add `max_new` tokens to `tokens`.

    config: anything with n_ctx and vocab_size. least_new: max_new, at least.
    """
    check_tokens(tokens, config.vocab_size)
    if isinstance(max_new, bool) or not isinstance(max_new, (int, np.integer)):
        raise RequestError(f"max_new is {max_new!r}; it must be a whole number")
    if max_new < least_new:
        raise RequestError(f"max_new is {max_new}; it must be at least {least_new}")
    if len(tokens) + max_new > config.n_ctx:
        room = config.n_ctx - len(tokens)
        mend = f"use max_new up to {room}" if room > 0 else f"use a prompt of at most {config.n_ctx - 1} tokens"
        raise RequestError(
            f"{len(tokens)} prompt tokens and max_new {max_new} make {len(tokens) + max_new}, "
            f"but this model's context (n_ctx) is {config.n_ctx}: {mend}"
        )
    if sampling is not None and sampling.top_k is not None and sampling.top_k > config.vocab_size:
        raise RequestError(
            f"top_k is {sampling.top_k}; it can be at most this model's vocabulary, {config.vocab_size} tokens"
        )


@dataclass(frozen=True)
class Request:
    """What an engine is asked for: up to ``max_new`` tokens behind a prompt.

    tokens: the prompt's ids. max_new: 0 only runs over the prompt. sampling: None takes the likeliest token every time.
    stop_tokens: any of them ends the text and is left out of it. priority: larger runs first.
    """

    tokens: Sequence[int]
    max_new: int
    sampling: Sampling | None = None
    stop_tokens: Sequence[int] = ()
    priority: int = 0
