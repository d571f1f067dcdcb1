"""The JSON of answers: whole ones, and the chunks of a stream, for both endpoints."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ch14_mini_llm.engine.sequence import Logprob
from ch14_mini_llm.server.fields import CHAT
from ch14_mini_llm.server.tools import CallDelta, call_json, joined
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer

Entry = tuple[int, Logprob | None]  # a token, and what is known of it


@dataclass
class Usage:
    """Tokens of a request: of its prompts, found in the cache among them, and new ones, of all choices."""

    prompt: int = 0
    cached: int = 0
    new: int = 0

    @property
    def json(self) -> dict:
        return {
            "prompt_tokens": self.prompt, "completion_tokens": self.new, "total_tokens": self.prompt + self.new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }  # fmt: skip


@dataclass
class Piece:
    """What is new of a choice. entries: (where in the text, entry) of tokens, if log-probabilities are wanted. calls:
    of functions; their text is not in ``text``."""

    text: str = ""
    entries: list[tuple[int, Entry]] = field(default_factory=list)
    finish_reason: str | None = None
    calls: list[CallDelta] = field(default_factory=list)

    def add(self, other: Piece) -> None:
        self.text += other.text
        self.entries += other.entries
        self.calls += other.calls
        self.finish_reason = other.finish_reason


class Form:
    """The form of one request's answers. end: of `fields.BOTH`. logprobs: are they wanted? calls: may
    an answer have some?"""

    def __init__(
        self, end: str, model: str, fingerprint: str, tokenizer: GPT2Tokenizer, logprobs: bool, calls: bool = False
    ) -> None:
        self.end, self.tokenizer, self.with_logprobs, self.with_calls = end, tokenizer, logprobs, calls
        self.id = ("chatcmpl-" if end == CHAT else "cmpl-") + secrets.token_hex(12)
        kind = "chat.completion" if end == CHAT else "text_completion"
        self._head = {
            "id": self.id, "object": kind, "created": int(time.time()), "model": model,
            "system_fingerprint": fingerprint,
        }  # fmt: skip

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict:
        """The answer at once."""
        choices = [self._choice(index, piece, "message") for index, piece in enumerate(pieces)]
        return {**self._head, "choices": choices, "usage": usage.json}

    def chunk(self, index: int, piece: Piece, first: bool = False, with_usage: bool = False) -> dict:
        """A chunk of a stream. first: of this choice. with_usage: usage comes in the last chunk, so it is null here."""
        choice = self._choice(index, piece, "delta", first)
        return {**self._chunk_head, "choices": [choice], **({"usage": None} if with_usage else {})}

    def last_chunk(self, usage: Usage) -> dict:
        """The chunk with the usage, which has no choices."""
        return {**self._chunk_head, "choices": [], "usage": usage.json}

    @property
    def _chunk_head(self) -> dict:
        return self._head | ({"object": "chat.completion.chunk"} if self.end == CHAT else {})

    def _choice(self, index: int, piece: Piece, name: str, first: bool = True) -> dict:
        choice = {"index": index, "logprobs": None, "finish_reason": piece.finish_reason}
        if self.end == CHAT:
            said = {"role": "assistant"} if first else {}
            calls = [(call.index, call_json(call)) for call in joined(piece.calls)]
            if name == "message":
                said |= {"content": piece.text or (None if calls else ""), "refusal": None, "annotations": []}
                said |= {"tool_calls": [call for _, call in calls]} if calls else {}
            else:
                if piece.text or first:
                    said["content"] = piece.text or (None if self.with_calls else "")
                said |= {"tool_calls": [{"index": at, **call} for at, call in calls]} if calls else {}
            choice[name] = said
            if self.with_logprobs:
                entries = [self._chat_entry(*entry) for _, entry in piece.entries]
                choice["logprobs"] = {"content": entries, "refusal": None}
        else:
            choice["text"] = piece.text
            if self.with_logprobs:
                choice["logprobs"] = self._completion_logprobs(piece.entries)
        return choice

    def _token(self, token: int) -> str:
        """A token's text as logprobs have it: one that is no whole characters is spelled in bytes, as OpenAI does."""
        known = self.tokenizer.token_bytes(token)
        try:
            return known.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)

    def _chat_entry(self, token: int, known: Logprob) -> dict:
        one = lambda token, logprob: {
            "token": self._token(token), "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(token))
        }  # fmt: skip
        return {**one(token, known.logprob), "top_logprobs": [one(*pair) for pair in known.top.items()]}

    def _completion_logprobs(self, entries: Sequence[tuple[int, Entry]]) -> dict:
        top = [
            known and {self._token(token): logprob for token, logprob in known.top.items()} for _, (_, known) in entries
        ]
        return {
            "tokens": [self._token(token) for _, (token, _) in entries],
            "token_logprobs": [known and known.logprob for _, (_, known) in entries],
            "top_logprobs": top if any(top) else None, "text_offset": [at for at, _ in entries],
        }  # fmt: skip
