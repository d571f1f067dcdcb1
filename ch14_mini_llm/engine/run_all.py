"""Requests that are all there from the start, run to their ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ch14_mini_llm.engine.plan import Output, Result
from ch14_mini_llm.engine.request import Request, RequestError
from ch14_mini_llm.engine.sequence import ENDED


def run_all(engine, requests: Sequence[Request], on_output: Callable[[Output], None] | None = None) -> list[Result]:
    """`Engine.run`."""
    results, running = [], {}
    for request in requests:
        try:
            id = engine.submit(request)
        except RequestError as error:
            results.append(Result(None, finish_reason="error", error=str(error)))
        else:
            sequence = engine.sequence(id)
            results.append(Result(id, seed=sequence.sampling and sequence.sampling.seed))
            running[id] = results[-1], sequence
    while any(sequence.state != ENDED for _, sequence in running.values()):
        for output in engine.step():
            if on_output is not None:
                on_output(output)
            if output.id in running:
                result, sequence = running[output.id]
                result.take(output)
                result.cached_tokens, result.preemptions = sequence.n_cached or 0, sequence.preemptions
    return results
