"""What the scheduler says to the runner, and to whoever waits for tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from ch14_mini_llm.engine.sequence import Logprob, Sequence

MIXED_ROWS, MIXED_TIMES = 256, 4


def mixed_rows(n: int) -> int:
    """Rows of a step in which some of ``n`` sequences decode, while the others' prompts wait: 256, or up to 4 n.

    Few, so that those who decode do not wait for much longer than without prompts: on an H200 (GPT-2, 124M) 256 rows
    take 2.2 times as long as the step of 16. More where many wait: then it is they who lose most.

    Sizes that a step's shape need not pad, see `forward.shapes`: 256, 384, 512, 768, 1024 …
    """
    power = 1 << (MIXED_TIMES * n).bit_length() - 1
    return max(MIXED_ROWS, power + power // 2 if MIXED_TIMES * n >= power + power // 2 else power)


class Part(NamedTuple):  # a step makes many: a frozen dataclass takes three times as long
    """``count`` tokens of a sequence from position ``start`` on; ``samples``: a new token follows the last of them.

    life: the sequence's when this was planned. padding: rows that only fill a batch up (`engine.static`). drafts:
    guesses behind the first token (`engine.speculate`); a new token follows each row of such a part.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    life: int
    padding: bool = False
    drafts: tuple[int, ...] = ()


def each_row(part: Part) -> list[Part]:
    """A part's rows, each as a part."""
    return [part._replace(start=start, count=1, drafts=()) for start in range(part.start, part.start + part.count)]


@dataclass(frozen=True)
class Plan:
    """What a step runs over. ticket: its number. same_as_last: the same sequences as the step before, each with a row
    in both that a token follows."""

    ticket: int
    parts: tuple[Part, ...]
    same_as_last: bool

    @cached_property
    def sampling(self) -> list[Part]:
        """The parts behind which a new token follows; of one with guesses, each row."""
        if self.rows == len(self.parts):
            return [part for part in self.parts if part.samples]
        rows = [[part] if not part.drafts else each_row(part) for part in self.parts if part.samples]
        return [row for part in rows for row in part]

    @property
    def sequences(self) -> list[Sequence]:
        return [part.sequence for part in self.parts]

    def start_of(self, i: int) -> int:
        """The first position of part ``i``."""
        return self.parts[i].start

    @cached_property
    def scored(self) -> bool:
        """Whether log-probabilities of a new token are asked for."""
        return any([part.sequence.logprobs is not None for part in self.parts])

    @cached_property
    def rows(self) -> int:
        return sum([part.count for part in self.parts])

    @cached_property
    def n_steps(self) -> int:
        """How many parts in front are a row each."""
        if self.rows == len(self.parts):
            return len(self.parts)
        return next(i for i, part in enumerate(self.parts) if part.count > 1)

    @property
    def padding_rows(self) -> int:
        """How many of the rows only fill the batch up."""
        return sum([part.count for part in self.parts if part.padding])


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of a step. new: one a row that samples, or None. prompt: {number of the part: those of the
    prompt's tokens from the second of its positions on}."""

    new: list[Logprob | None]
    prompt: dict[int, list[Logprob]]


class Output(NamedTuple):
    """What is new of a request: tokens, and at its end why it has ended ("stop", "length", "abort", "error").

    logprobs: one a token, if the request asks for them. prompt_logprobs: once, when the prompt has been run over.
    cached_tokens: at its end, how many of the prompt were found in the prefix cache.
    """

    id: int
    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    cached_tokens: int = 0


@dataclass
class Result:
    """What became of a request. tokens: the new ones. finish_reason: "stop", "length", "abort", "error". error: a text.

    cached_tokens: of the prompt, found in the prefix cache. preemptions: how often it was computed anew. seed: of the
    draws, None where none are made. logprobs: one a token; prompt_logprobs: one a token of the prompt, the first None.
    """

    id: int | None
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    seed: int | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob | None, ...] | None = None

    def take(self, output: Output) -> None:
        """Add what is new."""
        self.tokens += output.tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.error = output.finish_reason, output.error
