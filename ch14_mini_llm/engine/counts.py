"""What an engine has done so far, in numbers."""

from __future__ import annotations

from ch14_mini_llm.engine.plan import Plan

NAMES = (
    "steps", "rows", "padding_rows", "prompt_tokens", "generation_tokens", "preemptions", "prefix_cache_queries",
    "prefix_cache_hits",
)  # fmt: skip


class Counts(dict):
    """{name of `NAMES`: how many so far}. rows: that steps ran over, of which padding_rows were a static batch's."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(NAMES, 0))

    def add(self, plan: Plan) -> None:
        """Count a step."""
        if plan.same_as_last:  # a row a sequence, none of a prompt
            self["steps"] += 1
            self["rows"] += plan.rows
            return
        for name, value in ("steps", 1), ("rows", plan.rows), ("padding_rows", plan.padding_rows):
            self[name] += value
        prompts = [part for part in plan.parts if part.start < part.sequence.n_prompt]
        for sequence, start, count, *_ in prompts:
            if start == sequence.n_cached and not sequence.preemptions:  # its first part
                self["prefix_cache_queries"] += sequence.n_prompt
                self["prefix_cache_hits"] += sequence.n_cached
            self["prompt_tokens"] += min(start + count, sequence.n_prompt) - start
