"""What may be asked of a model: the checks of tokens, lengths and sampling settings.

Nothing here imports a kernel, so a bad request is refused before a backend is looked for.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ch14_mini_llm.model.config import GPT2Config

if TYPE_CHECKING:
    from ch14_mini_llm.engine.constraint import Constraint

MAX_SEED = 2**64 - 1  # chapter 13's Philox takes 64 bits
GREEDY = 1e-3  # a temperature up to here takes the most likely token, without a division
MAX_BIASES = 300
MAX_TOP = 20  # log-probabilities a token, chapter 13's limit
SMALLEST, LARGEST = math.ulp(0.0), sys.float_info.max

# Fields of `Sampling` that are numbers: the lowest, the highest, and how a message says it.
NUMBERS = {
    "temperature": (0, LARGEST, "at least 0 and finite (0 takes the most likely token every time)"),
    "top_p": (SMALLEST, 1, "above 0 and at most 1 (1 draws from all tokens)"),
    "min_p": (0, 1, "from 0 to 1 (0 drops no token)"),
    "presence_penalty": (-2, 2, "from -2 to 2 (0 is no penalty)"),
    "frequency_penalty": (-2, 2, "from -2 to 2 (0 is no penalty)"),
    "repetition_penalty": (SMALLEST, LARGEST, "above 0 and finite (1 is no penalty)"),
}


class RequestError(ValueError):
    """Tokens or settings that cannot be used with a model; the message names the value, the limit and the fix.

    field: the one that is wrong, such as "top_p", or None.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


def check_number(name: str, value: object, low: float, high: float, limit: str) -> None:
    """Raises `RequestError` unless value is a number from low to high; ``limit`` says that in words."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not (real and low <= value <= high):
        raise RequestError(f"{name} is {shown(value)}; it must be a number {limit}", name)


def check_whole(name: str, value: object, low: int, high: int, limit: str) -> None:
    """Raises `RequestError` unless value is an integer from low to high; ``limit`` says that in words."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not (whole and low <= value <= high):
        raise RequestError(f"{name} is {shown(value)}; it must be a whole number {limit}", name)


def shown(value: object) -> str:
    """A value of a message, cut if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token. Raises `RequestError` for a bad value.

    temperature: logits are divided by it; up to `GREEDY`, the most likely token is taken. top_k: draw among the k most
    likely only; None, 0 and -1 for all. top_p: draw among the fewest tokens whose probabilities add up to p. min_p:
    drop tokens less than min_p times as likely as the most likely one. presence_penalty, frequency_penalty: what the
    logit of a token loses that was generated before, once, and for each time. repetition_penalty: divides the logits
    above 0 of tokens that the prompt or the new text has, and multiplies the others. logit_bias: token id → what its
    logit gains. seed: the same seed gives the same tokens; None: drawn when the request is submitted.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, (low, high, limit) in NUMBERS.items():
            check_number(name, getattr(self, name), low, high, limit)
        if self.top_k is not None:
            check_whole("top_k", self.top_k, -1, 2**31 - 1, "of at least 1, or 0 or -1 to draw from all tokens")
            if self.top_k < 1:
                object.__setattr__(self, "top_k", None)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, MAX_SEED, f"from 0 to {MAX_SEED}")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", checked_biases(self.logit_bias) or None)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken every time."""
        return self.temperature <= GREEDY or self.min_p == 1

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens before."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen."""
        return self.penalises or self.logit_bias is not None

    def seeded(self) -> Sampling:
        """With a seed: this one's, or one drawn now."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(32))

    def plain(self) -> Sampling | None:
        """As the levels take it, which run one sequence and know temperature, top_k and top_p: with a seed, or None for
        the most likely token every time. Raises `RequestError` for what they do not know."""
        for name in ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"):
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default and not (name == "min_p" and self.greedy):
                raise RequestError(f"{name} is {shown(value)}; only an Engine takes it: leave it out here", name)
        return None if self.greedy else self.seeded()


def checked_biases(biases: object) -> dict[int, float]:
    """{token id: value} of a ``logit_bias``, whose ids may be texts, as JSON has them. Raises `RequestError`."""
    if not isinstance(biases, Mapping):
        raise RequestError(f"logit_bias is {shown(biases)}; it must map token ids to numbers", "logit_bias")
    if len(biases) > MAX_BIASES:
        raise RequestError(f"logit_bias has {len(biases)} ids; it can have {MAX_BIASES} at most", "logit_bias")
    checked = {}
    for token, value in biases.items():
        if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 10:
            token = int(token)
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)) or token < 0:
            raise RequestError(f"logit_bias has the key {shown(token)}; its keys are token ids from 0 on", "logit_bias")
        try:
            check_number(f"logit_bias of token {token}", value, -100, 100, "from -100 to 100 (0 changes nothing)")
        except RequestError as error:
            raise RequestError(str(error), "logit_bias") from None
        checked[int(token)] = float(value)
    return checked


def check_tokens(tokens: Sequence[int], vocab_size: int, field: str = "tokens") -> None:
    """Raises `RequestError` unless `tokens` is not empty and all are integers from 0 to vocab_size - 1."""
    if len(tokens) == 0:
        raise RequestError("the prompt has no tokens; give at least 1", field)
    if set(map(type, tokens)) == {int} and 0 <= min(tokens) and max(tokens) < vocab_size:
        return  # the usual case: faster than to look at one after another
    for position, token in enumerate(tokens):
        if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
            limit = f"it must be an integer from 0 to {vocab_size - 1}"
            raise RequestError(f"token {position} is {token!r}; {limit}", field)
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"token id {token} (position {position}) is not in this model's vocabulary; "
                f"use ids from 0 to {vocab_size - 1}",
                field,
            )


def check_max_length(max_length: int | None, n_ctx: int) -> int:
    """The longest sequence that a model is made for, by default its context. Raises `RequestError`."""
    if max_length is None:
        return n_ctx
    if not 1 <= max_length <= n_ctx:
        raise RequestError(f"max_length is {max_length}; this model's context is 1 to {n_ctx} tokens")
    return max_length


def check_length(length: int, max_length: int, n_ctx: int) -> None:
    """Raises `RequestError` if a sequence of `length` tokens does not fit a model made for `max_length`."""
    if length > max_length:
        longer = f" or make the model with max_length up to {n_ctx}" if max_length < n_ctx else ""
        raise RequestError(f"{length} tokens, but this model's buffers are for {max_length}: shorten the text{longer}")


def check_request(
    config: GPT2Config, tokens: Sequence[int], max_new: int, sampling: Sampling | None = None, least_new: int = 1
) -> None:
    """Raises `RequestError` unless a model of these sizes can add `max_new` tokens to `tokens`.

    config: anything with n_ctx and vocab_size. least_new: max_new, at least.
    """
    check_tokens(tokens, config.vocab_size)
    if isinstance(max_new, bool) or not isinstance(max_new, (int, np.integer)):
        raise RequestError(f"max_new is {max_new!r}; it must be a whole number", "max_new")
    if max_new < least_new:
        raise RequestError(f"max_new is {max_new}; it must be at least {least_new}", "max_new")
    if len(tokens) + max_new > config.n_ctx:
        room = config.n_ctx - len(tokens)
        fix = f"use max_new up to {room}" if room > 0 else f"use a prompt of at most {config.n_ctx - 1} tokens"
        raise RequestError(
            f"{len(tokens)} prompt tokens and max_new {max_new} make {len(tokens) + max_new}, "
            f"but this model's context (n_ctx) is {config.n_ctx}: {fix}",
            "max_new" if room > 0 else "tokens",
        )
    if sampling is not None and sampling.top_k is not None and sampling.top_k > config.vocab_size:
        limit = f"it can be at most this model's vocabulary, {config.vocab_size} tokens"
        raise RequestError(f"top_k is {sampling.top_k}; {limit}", "top_k")
    for token in (sampling.logit_bias or {}) if sampling is not None else ():
        if token >= config.vocab_size:
            limit = f"use ids from 0 to {config.vocab_size - 1}"
            raise RequestError(
                f"logit_bias has token id {token}, not in this model's vocabulary; {limit}", "logit_bias"
            )


@dataclass(frozen=True)
class Request:
    """What an engine is asked for: up to ``max_new`` tokens behind a prompt.

    tokens: the prompt's ids. max_new: 0 only runs over the prompt. sampling: None takes the likeliest token every time.
    stop_tokens: any of them ends the text and is left out of it. priority: larger runs first. logprobs: with each new
    token its log-probability and those of so many likeliest ones, 0 to `MAX_TOP`; None for nothing. prompt_logprobs:
    the same for the prompt's tokens from the second on. Both are the model's, before any setting of ``sampling``.
    constraint: what the new tokens must keep to (`engine.constraint`); it is used up by this request.
    """

    tokens: Sequence[int]
    max_new: int
    sampling: Sampling | None = None
    stop_tokens: Sequence[int] = ()
    priority: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


def check_rest(request: Request, static: bool) -> None:
    """Raises `RequestError` unless logprobs and prompt_logprobs are None or from 0 to `MAX_TOP`, and for a constraint
    in a static batch, which plans ahead."""
    if static and request.constraint is not None:
        raise RequestError("constraint is given, but a static batch takes none: leave static out", "constraint")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(request, name) is not None:
            limit = f"from 0 to {MAX_TOP} (leave it out for no log-probabilities)"
            check_whole(name, getattr(request, name), 0, MAX_TOP, limit)
