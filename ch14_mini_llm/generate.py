"""From a prompt to more tokens: the loop around `GPT2.forward`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.model import GPT2
from ch14_mini_llm.request import Sampling, check_request
from ch14_mini_llm.weights import WeightsError
from chapters.ch13_llm_ops.sampling import sample
from common.trace import Launch, trace


class Sampler:
    """Chapter 13's sampling in the form that `GPT2.forward` takes; call number s of it is step s of the seed."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.sampling, self.vocab_size, self.step = sampling, vocab_size, 0
        self.weights = cuda.device_array(vocab_size, np.int64)

    def __call__(self, logits, next_token) -> None:
        """Draw `next_token` (1,) int32 from `logits` (vocab_size,) float32, both on the device."""
        s = self.sampling
        sample(logits, self.weights, next_token, self.vocab_size, s.temperature, s.top_k, s.top_p, s.seed, self.step)
        self.step += 1


def generate(
    model: GPT2, tokens: Sequence[int], max_new: int, sampling: Sampling | None = None, stop: int | None = None
) -> Iterator[int]:
    """Yield up to `max_new` token ids that follow `tokens`, each as soon as it is made.

    sampling: None takes the most likely token every time. stop: an id that ends the text; it is not yielded.
    Raises `RequestError` at once (not at the first token) for a request that the model cannot fulfil, and
    `WeightsError` at a token for which the weights give no logits but NaN.
    """
    check_request(model.config, tokens, max_new, sampling)
    model.check_length(len(tokens) + max_new - 1)  # the last token made is not read again
    return _tokens(model, list(tokens), max_new, _chooser(model, sampling), stop)


def _tokens(model: GPT2, tokens: list, max_new: int, choose: Sampler | None, stop: int | None) -> Iterator[int]:
    for _ in range(max_new):
        token = model.forward(tokens, choose)
        if token == stop:
            return
        if token < 0:  # what chapters 7 and 13 give where no logit is a number
            raise WeightsError(f"after {len(tokens)} tokens all logits are NaN: the values of these weights overflow")
        tokens.append(token)
        yield token


def trace_step(model: GPT2, tokens: Sequence[int], sampling: Sampling | None = None) -> list[Launch]:
    """Every kernel launch of one step over `tokens`, in order, as `common.trace` records them."""
    choose = _chooser(model, sampling)
    with trace() as launches:
        model.forward(tokens, choose)
    return launches


def _chooser(model: GPT2, sampling: Sampling | None) -> Sampler | None:
    return None if sampling is None else Sampler(sampling, model.config.vocab_size)
