"""A request on its way through the engine: waiting, running, waiting again after a preemption, ended."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, field

from ch14_mini_llm.engine.constraint import Guard
from ch14_mini_llm.engine.request import Sampling
from ch14_mini_llm.engine.speculate import Guesser

WAITING, RUNNING, ENDED = "waiting", "running", "ended"
next_life = itertools.count().__next__


@dataclass(frozen=True)
class Logprob:
    """The log-probability of a token; its rank among all, 1 for the likeliest; the likeliest: {id: log-probability}."""

    logprob: float
    rank: int
    top: dict[int, float]


@dataclass(eq=False)
class Sequence:
    """One request's tokens, blocks and progress. Only `Scheduler` changes it.

    id: the engine's number of it. tokens: the prompt, then the new tokens as far as the host has read them. max_new:
    how many new ones there may be. order: of arrival. priority: larger runs first. sampling: None takes the likeliest
    token. stop_tokens: any of them ends the text, and is left out of it. reads_cache: whether keys and values of
    earlier requests may be used. logprobs, prompt_logprobs: as in `Request`. guard: of its constraint, if it has one.
    guesser: of its next tokens, if some may be guessed.

    ============  =====================================================================================================
    n_computed    tokens whose keys and values are in the blocks, or will be once the launched steps have ended
    n_written     those of steps that have ended
    n_entered     blocks that have been offered to the prefix cache
    n_pending     new tokens that launched steps make, and that the host has not read
    blocks        the block table: block ``i`` has the tokens from ``i * block_size`` on
    ticket        of the last step that was launched with it
    life          a number that is another one when it has been given up: a step that was launched before does not
                  count any more. No two sequences have the same.
    prompt_scores the prompt's log-probabilities as far as they have been read; prompt_done: and handed out
    ============  =====================================================================================================
    """

    id: int
    tokens: list[int]
    max_new: int
    order: int
    priority: int = 0
    sampling: Sampling | None = None
    stop_tokens: frozenset[int] = frozenset()
    reads_cache: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guard: Guard | None = None
    guesser: Guesser | None = None
    state: str = WAITING
    n_prompt: int = 0
    n_computed: int = 0
    n_written: int = 0
    n_entered: int = 0
    n_pending: int = 0
    n_cached: int | None = None  # tokens found in the prefix cache when it was first admitted
    blocks: list[int] = field(default_factory=list)
    ticket: Hashable = None
    life: int = field(default_factory=next_life)
    preemptions: int = 0
    prompt_scores: list[Logprob | None] = field(default_factory=list)
    prompt_done: bool = False
    finish_reason: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)
        self.prompt_scores = [None] * self.n_prompt if self.prompt_logprobs is not None else []

    @property
    def rank(self) -> tuple[int, int]:
        """What comes first is served first."""
        return -self.priority, self.order

    @property
    def length(self) -> int:
        """Tokens, those under way included."""
        return len(self.tokens) + self.n_pending

    @property
    def left(self) -> int:
        """Tokens that a step has yet to run over: 1 while it decodes, 0 if all that it may have is under way."""
        made = self.length - self.n_prompt
        if self.n_computed >= self.n_prompt and made >= self.max_new:
            return 0
        return self.length - self.n_computed

    @property
    def left_new(self) -> int:
        """How many tokens may yet follow those that the host knows."""
        return self.max_new - (len(self.tokens) - self.n_prompt)

    @property
    def new_tokens(self) -> list[int]:
        """The tokens behind the prompt, as far as they have been read."""
        return self.tokens[self.n_prompt :]

    def show_prompt(self) -> tuple[Logprob | None, ...] | None:
        """The prompt's log-probabilities once it has been run over, the first time that this is asked; else None."""
        if self.prompt_done or self.n_written < self.n_prompt:
            return None
        self.prompt_done = True
        return tuple(self.prompt_scores)
