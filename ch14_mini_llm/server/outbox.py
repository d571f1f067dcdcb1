"""Outputs on their way out of the engine's process: where tokens come fast, those of a request leave together.

A GPU makes a hundred thousand tokens a second. Each could be a message, and then an event of its own on some socket,
but an event costs Python 0.1 ms. So tokens wait for more of them, for three times as long as the events of all requests
take; one client alone does not notice. The first of a request and what ends it wait for nothing.
"""

from __future__ import annotations

import time

from ch14_mini_llm.engine.plan import Output

EVENT = 300e-6  # seconds, three times what an event costs: the rest of the time is for requests that come in


class Outbox:
    """What has not been sent, by the requests' keys."""

    def __init__(self) -> None:
        self._held: dict[int, list[Output]] = {}
        self._begun: set[int] = set()
        self._urgent: list[int] = []
        self._sent = 0.0

    def add(self, key: int, output: Output) -> None:
        """One more output of a request. Tokens join those that are held."""
        held = self._held.setdefault(key, [])
        if held and held[-1].prompt_logprobs is None and output.prompt_logprobs is None:
            output = _joined(held.pop(), output)
        held.append(output)
        if output.finish_reason is not None or key not in self._begun:
            self._urgent.append(key)
        (self._begun.add if output.finish_reason is None else self._begun.discard)(key)

    def take(self, n_requests: int, now: bool = False) -> list[tuple[int, Output]]:
        """What is to be sent, with so many requests under way: all that is held, or only what waits for nothing. now:
        all."""
        clock = time.monotonic()
        urgent, self._urgent = self._urgent, []
        if now or clock - self._sent >= n_requests * EVENT:
            self._sent, held, self._held = clock, self._held, {}
        else:
            held = {key: self._held.pop(key) for key in urgent if key in self._held}
        return [(key, output) for key, outputs in held.items() for output in outputs]


def _joined(first: Output, then: Output) -> Output:
    tokens, logprobs = first.tokens + then.tokens, first.logprobs + then.logprobs
    return Output(then.id, tokens, then.finish_reason, then.error, logprobs, None, then.cached_tokens)
