"""From tokens to the text that leaves: the one place, whether it is streamed or not (the whole is its deltas, joined).

    bytes → whole characters → the stop texts → a delta

Of the characters that have come, those are held back that may be the beginning of a stop text, and no others.
"""

from __future__ import annotations

from collections.abc import Sequence

from ch14_mini_llm.tokenizer.own import GPT2Tokenizer, StreamDecoder


class StopMatcher:
    """Looks for texts that end an answer. ``found``: whether one has been completed; nothing comes after it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.found, self._held = tuple(stops), False, ""

    def push(self, text: str) -> str:
        """What may leave now. The stop text that is completed first counts; of two at once the longer."""
        if self.found:
            return ""
        if not self.stops:
            return text
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def ends_in(self, text: str) -> bool:
        """Whether `push` of it would complete a stop text."""
        return any([stop in self._held + text for stop in self.stops])

    def finish(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins, but which is not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """An answer's text as it leaves, with an entry for each of its tokens.

    offset: of the first character, in the text that the client sees. continues: it goes on with the prompt's text.
    ``n_tokens``: how many have come.
    """

    def __init__(
        self, tokenizer: GPT2Tokenizer, stops: Sequence[str] = (), offset: int = 0, continues: bool = False
    ) -> None:
        self.decoder, self.matcher, self.n_tokens = StreamDecoder(tokenizer, continues), StopMatcher(stops), 0
        self._came = self._left = offset
        self._entries: list[tuple[int, object]] = []  # (where its text begins, entry), of tokens that have not left

    @property
    def stopped(self) -> bool:
        """Whether a stop text has ended it."""
        return self.matcher.found

    def push(self, token: int, entry: object = None) -> tuple[str, list[tuple[int, object]]]:
        """``(delta, entries)`` that leave now. entry: anything that is to leave with the token's first character."""
        self.n_tokens += 1
        text = self.decoder.push(token)
        self._entries.append((self._came, entry))
        self._came += len(text)
        return self._leave(self.matcher.push(text))

    def push_all(self, tokens: Sequence[int]) -> tuple[str, list[tuple[int, object]]]:
        """`push` for tokens of which nothing else is known; those behind a stop text are left out. Entries: (token,
        None)."""
        texts = [self.decoder.push(token) for token in tokens]
        together, delta = not self.matcher.ends_in(whole := "".join(texts)), ""
        for token, text in zip(tokens, texts):
            if self.stopped:
                break
            self.n_tokens += 1
            self._entries.append((self._came, (token, None)))
            self._came += len(text)
            delta += "" if together else self.matcher.push(text)
        return self._leave(self.matcher.push(whole) if together else delta)

    def finish(self) -> tuple[str, list[tuple[int, object]]]:
        """What is left, at the end: a character cut off becomes U+FFFD."""
        if self.stopped:
            return "", []
        delta, entries = self._leave(self.matcher.push(self.decoder.finish()) + self.matcher.finish())
        entries, self._entries = entries + self._entries, []
        return delta, entries

    def _leave(self, delta: str) -> tuple[str, list[tuple[int, object]]]:
        self._left += len(delta)
        n = sum(at < self._left for at, _ in self._entries)
        entries, self._entries = self._entries[:n], self._entries[n:]
        return delta, entries
