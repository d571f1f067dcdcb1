"""From a prompt to more tokens, on any level of the engine."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from ch14_mini_llm.engine.request import Sampling, check_request
from ch14_mini_llm.model.layout import WeightsError


def generate(
    model, tokens: Sequence[int], max_new: int, sampling: Sampling | None = None, stop: int | Collection[int] = ()
) -> Iterator[int]:
    """Yield up to `max_new` token ids that follow `tokens`, each as soon as it is made.

    model: of any level (`ch14_mini_llm.levels`). sampling: None takes the most likely token every time. stop: the id,
    or ids, that end the text; they are not yielded. Raises `RequestError` at once (not at the first token) for a
    request that the model cannot fulfil, and `WeightsError` at a token for which the weights give no logits but NaN.
    """
    check_request(model.config, tokens, max_new, sampling)
    sampling = sampling and sampling.plain()
    model.check_length(len(tokens) + max_new - 1)  # the last token made is not read again
    stops = {stop} if isinstance(stop, int) else stop
    return _until(model.stream(tokens, max_new, sampling), len(tokens), stops)


def _until(made: Iterator[int], n_tokens: int, stop: Collection[int]) -> Iterator[int]:
    for number, token in enumerate(made):
        if token in stop:
            return
        if token < 0:  # what chapters 7 and 13 give where no logit is a number
            after = n_tokens + number
            raise WeightsError(f"after {after} tokens all logits are NaN: the values of these weights overflow")
        yield token
