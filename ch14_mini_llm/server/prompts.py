"""From the checked fields of a request to what the engine is asked for: token ids, limits, settings, one `Request` for
each choice.

What a client has written is text: a special token that is spelled out in it does not become one, in a prompt or in a
conversation. (Token ids are taken as they are.)
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from ch14_mini_llm.engine.request import MAX_SEED, Request, RequestError, Sampling, check_tokens, shown
from ch14_mini_llm.server.errors import ApiError, refused
from ch14_mini_llm.server.fields import CHAT, COMPLETIONS, MAX_CHOICES, SAMPLING
from ch14_mini_llm.server.grammar import grammar_of
from ch14_mini_llm.server.messages import checked_messages, mapped, strings
from ch14_mini_llm.server.tools import told
from ch14_mini_llm.tokenizer.bpe import TokenizerError
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer

PROMPT_OF = {CHAT: "messages", COMPLETIONS: "prompt"}
DEFAULT_NEW = 16  # of a completion, as OpenAI has it
PLAIN_STOP = "\nuser:"  # where the plain form's next turn begins


@dataclass(frozen=True)
class Limits:
    """What the engine can take. room: tokens that the pool has blocks for. share: of it, for a request that does not
    say how many tokens it wants."""

    n_ctx: int
    vocab_size: int
    room: int
    share: int


@dataclass(frozen=True)
class Asked:
    """A request, ready for the engine: one `Request` a choice. prompts: token ids, of each prompt. n: choices of each.
    stops: texts that end an answer. shortened: None, or to how many new tokens the pool's load has shortened it. calls:
    of functions in an answer: "none", "auto" (there may be), "required". session: of which it is a turn, or None."""

    prompts: list[list[int]]
    n: int
    requests: list[Request]
    stops: tuple[str, ...]
    shortened: int | None = None
    calls: str = "none"
    session: str | None = None


class Reader:
    """Makes `Asked` of fields. name: the model's."""

    def __init__(self, tokenizer: GPT2Tokenizer, limits: Limits, name: str) -> None:
        self.tokenizer, self.limits, self.name = tokenizer, limits, name

    def asked(self, end: str, values: dict) -> Asked:
        """end: of `fields.BOTH`. values: as `fields.read` gives them. Raises `ApiError`."""
        self.check_model(values["model"])
        stops = tuple(values.get("stop", ()))
        calls = values.get("tool_choice", "auto") if "tools" in values else "none"
        tools = values["tools"] if calls != "none" else []
        grammar = grammar_of(values)
        if end == CHAT:
            prompts = [self.conversation(values["messages"], tools)]
            stops += (PLAIN_STOP,) * (not self.tokenizer.can_chat)
        else:
            prompts = [self.prompt_ids(prompt) for prompt in values["prompt"]]
        n = values.get("n", 1)
        if len(prompts) * n > MAX_CHOICES:
            raise refused("n", f"{len(prompts)} prompts times n {n} are {len(prompts) * n} choices; a request can have "
                          f"{MAX_CHOICES} at most")  # fmt: skip
        requests, shortened, stop_tokens = [], None, self.stop_tokens(values)
        for prompt in prompts:
            new = self.max_new(end, values, len(prompt))
            if new is None:
                limits = self.limits
                shortened = new = min(limits.n_ctx - len(prompt), limits.share, limits.room - len(prompt))
            for choice in range(n):
                requests.append(Request(prompt, new, self.sampling(values, choice), stop_tokens,
                                        values.get("priority", 0), *self.logprobs(end, values), grammar))  # fmt: skip
        calls, session = calls if isinstance(calls, str) else "required", values.get("session_id")
        if session is not None and len(requests) != 1:
            raise refused(
                "session_id", f"session_id is given with {len(requests)} answers; a session has one: ask for one"
            )
        return Asked(prompts, n, requests, stops, shortened, calls, session)

    def check_model(self, name: str) -> None:
        """Raises `ApiError`, 404, for another model's name."""
        if name != self.name:
            message = f"there is no model {shown(name)} here; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def max_new(self, end: str, values: dict, length: int) -> int | None:
        """New tokens at most, for a prompt of some length; None if the request leaves that open, and the pool has less
        to spare than the context. Raises `ApiError` where what is asked for can never be had."""
        n_ctx, room, param = self.limits.n_ctx, self.limits.room, PROMPT_OF[end]
        asked = values.get("max_completion_tokens", values.get("max_tokens"))
        least = 1 if asked is None else 0
        if asked is None and end == COMPLETIONS:
            asked = max(1, min(DEFAULT_NEW, n_ctx - length, room - length))
        what = f"the prompt has {length} tokens" + f", and {asked} new ones are asked for" * bool(asked)
        fix = "shorten the prompt" + " or max_tokens" * bool(asked and asked > least)
        if length + max(asked or 0, least) > n_ctx:
            limit = f"this model's context is {n_ctx} tokens at most"
            raise refused(param, f"{limit}, but {what}: {fix}", "context_length_exceeded")
        if length + max(asked or 0, least) > room:
            limit = f"the pool has room for {room} tokens"
            more = ", or start the server with a larger --num_blocks"
            raise refused(param, f"{limit}, but {what}: {fix}{more}", "context_length_exceeded")
        if asked is None and n_ctx - length <= min(self.limits.share, room - length):
            return n_ctx - length
        return asked

    def sampling(self, values: dict, choice: int) -> Sampling:
        """How to draw choice number ``choice``. Raises `ApiError`."""
        settings = {name: values[name] for name in SAMPLING if name in values}
        seed = values.get("seed")
        seed = secrets.randbits(32) if seed is None else derived(seed & MAX_SEED, choice)
        sampling = Sampling(**settings, seed=seed)
        if sampling.top_k is not None and sampling.top_k > self.limits.vocab_size:
            raise refused("top_k", f"top_k is {sampling.top_k}; the vocabulary has {self.limits.vocab_size} tokens")
        for token in sampling.logit_bias or ():
            if token >= self.limits.vocab_size:
                raise refused("logit_bias", f"logit_bias has token id {token}, not in this model's vocabulary; use ids "
                              f"from 0 to {self.limits.vocab_size - 1}")  # fmt: skip
        return sampling

    def stop_tokens(self, values: dict) -> tuple[int, ...]:
        """The ids that end an answer. Raises `ApiError`."""
        given = tuple(values.get("stop_token_ids", ()))
        self._check_ids(given or (0,), "stop_token_ids")
        return given + (() if values.get("ignore_eos") else self.tokenizer.stop_tokens)

    @staticmethod
    def logprobs(end: str, values: dict) -> tuple[int | None, int | None]:
        """`Request`'s logprobs and prompt_logprobs."""
        if end == CHAT:
            return values.get("top_logprobs", 0) if values.get("logprobs") else None, None
        wanted = values.get("logprobs")
        return wanted, wanted if values.get("echo") else None

    # --- token ids ---------------------------------------------------------------------------------------------------

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a prompt; of the empty text the start token alone. Raises `ApiError`."""
        if not isinstance(prompt, str):
            self._check_ids(prompt, "prompt")
            return prompt
        return self.encode(prompt, "prompt") or [self.tokenizer.stop_tokens[0]]

    def encode(self, text: str, param: str) -> list[int]:
        """Token ids of a text in which nothing is special. Raises `ApiError`."""
        try:
            return self.tokenizer.encode_plain(text)
        except TokenizerError as error:
            raise refused(param, str(error)) from None

    def _check_ids(self, tokens: Sequence[int], param: str) -> None:
        try:
            check_tokens(tokens, self.limits.vocab_size)
        except RequestError as error:
            raise refused(param, str(error)) from None

    def conversation(self, messages: object, tools: Sequence[dict] = ()) -> list[int]:
        """Token ids of a conversation, up to where the answer begins. tools: functions that may be called. Raises
        `ApiError`."""
        turns = checked_messages(messages)
        if not self.tokenizer.takes_tools:
            turns, tools = told(turns, tools), ()
        try:
            if not self.tokenizer.can_chat:
                text = "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant:"
                return self.tokenizer.encode_plain(text)
            return self._in_form(turns, tools)
        except TokenizerError as error:
            raise refused("messages", str(error)) from None

    def _in_form(self, turns: list[dict], tools: Sequence[dict]) -> list[int]:
        """In the model's own form, whose special tokens count; those that a client spells out are taken for text."""
        said = [*turns, *tools]
        spelled = [token for token in self.tokenizer.special_tokens() if any(token in text for text in strings(said))]
        spelled.sort(key=len, reverse=True)
        mark = secrets.token_hex(8)

        def marked(text: str) -> str:
            for number, token in enumerate(spelled):
                text = text.replace(token, f"<{mark}:{number}>")
            return text

        if spelled:
            turns, tools = mapped(turns, marked), mapped([*tools], marked)
        ids = []
        for place, piece in enumerate(self.tokenizer.render(turns, tools).split(f"<{mark}:")):
            if place:
                number, _, piece = piece.partition(">")
                ids += self.tokenizer.encode_plain(spelled[int(number)], in_front=False)
            ids += self.tokenizer.encode_form(piece) if piece else []
        return ids


def derived(seed: int, choice: int) -> int:
    """The seed of a choice: that of the request for the first, for the others one made of it and their number."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed},{choice}".encode()).digest()[:8], "little")
