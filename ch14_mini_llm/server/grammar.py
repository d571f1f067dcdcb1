"""Grammars: from a JSON schema, or the functions that may be called, to the tokens that may come next.

The library `llguidance` does the parsing. A grammar goes through the pipe as a text, `Grammar`, and becomes a `Matcher`
in the engine's process: compiled in the thread that listens, not between two steps. Before that, the server's process
has tried it with single bytes for tokens, so that a schema which is not supported is answered 400, and nothing else
happens.

JSON is written as Python's ``json.dumps`` does, a blank behind each comma and colon and none elsewhere: a model that
may put white space anywhere may also put nothing but white space.

Sources: Willard & Louf 2023, "Efficient Guided Generation for Large Language Models"; Geng et al. 2025,
"JSONSchemaBench".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec

import numpy as np

from ch14_mini_llm.engine.constraint import WORD_BITS
from ch14_mini_llm.server.errors import refused
from ch14_mini_llm.server.formats import error_of
from ch14_mini_llm.server.tools import BEGIN, BETWEEN, END, HEAD, MOST_CALLS, TAG
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer

FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}
MOST = 200_000  # characters of a grammar
STATES = 50_000  # of a lexer, of some 1.5 KB each
KEPT = 32  # compiled grammars
MARK = "\x02"  # a character that no token joins with others
FIRST = 8  # bytes that a grammar is tried with: most that are too much for the parser are too much at once


@dataclass(frozen=True)
class Grammar:
    """What an answer must keep to, in llguidance's own form; goes through the pipe."""

    text: str


def grammar_of(values: dict) -> Grammar | None:
    """The grammar of a request's checked fields; None if anything may be said. Raises `ApiError` for what cannot be
    kept to, or if the library is missing."""
    form, choice = values.get("response_format", {"type": "text"}), values.get("tool_choice", "auto")
    tools = values.get("tools", []) if choice != "none" else []
    if form["type"] == "text" and not tools:
        return None
    at = "tools" if tools else "response_format"
    if find_spec("llguidance") is None:
        raise refused(at, f"{at} needs the package llguidance, which this server does not have: pip install -e "
                      "'.[serve]'", "unsupported_parameter")  # fmt: skip
    schema = None if form["type"] == "text" else form.get("schema", {"type": "object"})
    if schema is not None:
        at = "response_format.json_schema.schema" if "schema" in form else "response_format"
        grammar = Grammar(_json(schema, at))
    for number, tool in enumerate(tools):
        _json(tool["function"]["parameters"], f"tools[{number}].function.parameters")
    if tools:
        functions = [tool["function"] for tool in tools if not isinstance(choice, dict)
                     or tool["function"]["name"] == choice["name"]]  # fmt: skip
        most = MOST_CALLS if values.get("parallel_tool_calls") and isinstance(choice, str) else 1
        grammar = Grammar(_tried(_lark(functions, choice == "auto", schema, most), "tools"))
    return grammar


def _json(schema: dict, at: str) -> str:
    from llguidance import LLMatcher

    try:
        text = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=FORM)
    except (ValueError, RecursionError) as error:
        raise error_of(at, _line(error)) from None
    return _tried(text, at)


def _lark(functions: list[dict], free: bool, schema: dict | None, most: int) -> str:
    """Calls of these functions, up to ``most``; free: or any other text, or JSON of a schema."""
    lines = []
    for number, function in enumerate(functions):
        head = json.dumps(HEAD.format(name=function["name"]))
        lines.append(f"call_{number}: {head} args_{number} {json.dumps(END)}")
        lines.append(f"args_{number}: {_inline(function['parameters'])}")
    calls = " | ".join(f"call_{number}" for number in range(len(functions)))
    more = f"({json.dumps(BETWEEN + BEGIN)} call){{0,{most - 1}}}" if most > 1 else ""
    anything, begin = r"(.|\n)*", json.dumps(BEGIN)
    if not free:
        start = f"start: {begin} call {more}"
    elif schema is not None:
        start = f"start: answer | {begin} call {more}\nanswer: {_inline(schema)}"
    else:  # lazy: the first tag ends the text in front of it
        line = json.dumps(BEGIN.removeprefix(TAG))
        start = (f"start: FREE | lead {line} call {more}\nlead[lazy]: /{anything}{TAG}/\n"
                 f"FREE: /{anything}/ & ~/{anything}{TAG}{anything}/")  # fmt: skip
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark("\n".join([start, f"call: {calls}", *lines]))


def _inline(schema: dict) -> str:
    return f"%json {json.dumps(schema | {'x-guidance': FORM})}"


@lru_cache(KEPT)
def _tried(text: str, at: str) -> str:
    """A grammar that has been compiled once, and has been asked for its first bytes. Raises `ApiError`."""
    from llguidance import LLMatcher

    if len(text) > MOST:
        raise error_of(at, f"it makes a grammar of {len(text)} characters, of {MOST} at most")
    matcher = LLMatcher(_bytes(), text, log_level=0, limits=_limits())
    for _ in range(FIRST):
        if matcher.is_stopped():  # an error stops it too
            break
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"))
        if len(allowed):
            matcher.consume_token(int(allowed[0]))
    if matcher.is_error():
        raise error_of(at, _line(matcher.get_error()))
    return text


@cache
def _bytes():
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _limits():
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=STATES, verbose_errors=False)


def _line(error: object) -> str:
    """What a library says, in one line."""
    words = " ".join(str(error).split())[:300]
    return "nothing can be written that keeps to it" if words.startswith("NoExtension") else words


class Matcher:
    """How far one answer has come in its grammar: an `engine.constraint.Constraint`. matcher: the library's, for
    ``n_tokens`` tokens."""

    def __init__(self, matcher, n_tokens: int) -> None:
        self._matcher, self._n_words, self._words = matcher, -(-n_tokens // WORD_BITS), np.zeros(0, np.uint32)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar: {_line(self._matcher.get_error())}")

    @property
    def done(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self, n_words: int) -> np.ndarray:
        if len(self._words) < n_words:  # a model may have numbers for more tokens than its tokenizer
            self._words = np.zeros(max(n_words, self._n_words), np.uint32)
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.itemsize * self._n_words)
        self._check()
        return self._words[:n_words]

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()


class Grammars:
    """The engine's side: makes matchers for a model's tokens. The same grammar is compiled once."""

    def __init__(self, tokenizer: GPT2Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compiled = lru_cache(KEPT)(self._compile)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the answer's beginning. Raises `ValueError` for what is no grammar."""
        return Matcher(self._compiled(grammar.text).deep_copy(), self._tokens.vocab_size)

    def _compile(self, text: str):
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, text, log_level=0, limits=_limits())
        matcher.compute_bitmask()  # the first takes the longest
        return matcher

    @cached_property
    def _tokens(self):
        from llguidance import LLTokenizer

        return LLTokenizer(Tokens(self._tokenizer), eos_token=list(self._tokenizer.stop_tokens))


class Tokens:
    """A model's tokenizer as llguidance takes one: the bytes of each token, and which tokens are no text."""

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, tokenizer: GPT2Tokenizer) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, tokenizer.stop_tokens[0]
        self.tokens, self.special_token_ids = tokenizer.all_bytes(), tokenizer.special_ids()
        front = tokenizer.encode_plain(MARK, in_front=False)
        bare = b"".join(map(tokenizer.token_bytes, front)) == MARK.encode()
        self._mark, self._front = ("", 0) if bare else (MARK, len(front))

    def __call__(self, text: bytes | str) -> list[int]:
        """Ids of a text in the middle of another: without the blank that some tokenizers put in front of one."""
        text = self._mark + (text if isinstance(text, str) else text.decode())
        return self._tokenizer.encode_plain(text, in_front=False)[self._front :]
