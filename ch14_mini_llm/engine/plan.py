"""What the scheduler says to the runner, and to whoever waits for tokens."""

from __future__ import annotations

from dataclasses import dataclass

from ch14_mini_llm.engine.sequence import Sequence


@dataclass(frozen=True)
class Part:
    """``count`` tokens of a sequence from position ``start`` on; ``samples``: a new token follows the last of them.

    life: the sequence's when this was planned. padding: rows that only fill a batch up (`engine.static`).
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    life: int
    padding: bool = False


@dataclass(frozen=True)
class Plan:
    """What a step runs over. ticket: its number. same_as_last: the same sequences as the step before, a row each."""

    ticket: int
    parts: tuple[Part, ...]
    same_as_last: bool

    @property
    def rows(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def padding_rows(self) -> int:
        """How many of the rows only fill the batch up."""
        return sum(part.count for part in self.parts if part.padding)


@dataclass(frozen=True)
class Output:
    """What is new of a request: tokens, and at its end why it has ended ("stop", "length", "abort", "error")."""

    id: int
    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
