"""Grammars of schemas and calls: what a mask allows is what can still become an answer, whatever is drawn."""

import json

import numpy as np
import pytest

pytest.importorskip("llguidance")
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas import PERSON, SCHEMAS, TOOLS, keeps_to
from test_own_tokenizer import data, library  # noqa: F401  (a fixture)
from tokenizers import Tokenizer, decoders, models, normalizers

from ch14_mini_llm.server import fields, grammar
from ch14_mini_llm.server.errors import ApiError
from ch14_mini_llm.server.grammar import Grammars, grammar_of
from ch14_mini_llm.server.tools import CallReader, joined
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer, OwnTokenizer

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer(), Grammars(GPT2Tokenizer())


@pytest.fixture(scope="module")
def own(library):  # noqa: F811
    tokenizer = OwnTokenizer(data(library))
    return tokenizer, Grammars(tokenizer)


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer as SentencePiece's: bytes apart, blanks in front of words, and some numbers that mean nothing."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127))]
    words += ["\u2581", "\u2581{", '{"', '\u2581"', "null", "\u2581null", "ing", "\u2581Co", "\u00e9"]
    vocabulary = {word: number + 3 * (number > 100) for number, word in enumerate(words)}
    parts = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    bpe = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence([*parts])
    bpe.add_special_tokens(["<unk>", "</s>"])
    tokenizer = OwnTokenizer(data(bpe, stop_tokens=[1], chat_template=None))
    assert tokenizer.starts_with_space
    return tokenizer, Grammars(tokenizer)


@pytest.fixture(params=["gpt2", "own", "pieces"])
def kind(request):
    """A tokenizer of 50257 tokens, one of 400 with three special ones, and SentencePiece's; the model's vocabulary is
    larger."""
    return request.getfixturevalue(request.param)


def asked(**more):
    return grammar_of(fields.read("chat", CHAT | more))


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def allowed(matcher, n_words=1600):
    return np.flatnonzero(np.unpackbits(matcher.mask(n_words).view(np.uint8), bitorder="little"))


def walk(kind, given, seed, steps=200, prefix=""):
    """``(bytes, whether it has ended)`` of an answer drawn at random from what is allowed, behind a prefix."""
    tokenizer, grammars = kind
    rng, matcher, text = np.random.default_rng(seed), grammars.matcher(given), b""
    for _ in range(steps + len(prefix)):
        ids = allowed(matcher)
        assert len(ids) and ids[-1] < len(tokenizer.all_bytes())
        assert not set(ids.tolist()) & (set(tokenizer.special_ids()) - set(tokenizer.stop_tokens))
        rest = prefix.encode()[len(text) :]
        if rest:
            ids = [n for n in ids if (known := tokenizer.token_bytes(n)).startswith(rest) or rest.startswith(known)]
            assert ids, (text, rest)
        elif prefix and steps == 0:
            return text, False
        token = int(rng.choice(ids))
        if token in tokenizer.stop_tokens:
            return text, True
        matcher.advance(token)
        text += tokenizer.token_bytes(token)
        if matcher.done:
            return text, True
    return text, False


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:30])
def test_what_is_drawn_from_the_masks_keeps_to_the_schema(kind, schema):
    ended = 0
    for seed in range(12):
        text, whole = walk(kind, asked(response_format=form(schema)), seed)
        if whole:
            ended += 1
            assert keeps_to(json.loads(text), schema), text
    assert ended >= 6


LEAVES = st.sampled_from([
    {"type": "boolean"}, {"type": "null"}, {"enum": ["x", 'quo"te', "é", 1, -2]}, {"type": "string", "maxLength": 4},
    {"type": "integer", "minimum": -20, "maximum": 300}, {"const": "\n"},
])  # fmt: skip
RANDOM = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(lambda ones: {"anyOf": ones}, st.lists(inner, min_size=1, max_size=3)),
        st.dictionaries(st.sampled_from(["a", "b c", "ü", '"', ""]), inner, max_size=3).map(
            lambda known: {"type": "object", "properties": known, "required": sorted(known)[::2],
                           "additionalProperties": False}
        ),
    ),
    max_leaves=6,
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(schema=RANDOM, seed=st.integers(0, 1000))
def test_schemas_at_random(own, schema, seed):
    text, whole = walk(own, asked(response_format=form(schema)), seed, 400)
    assert whole and keeps_to(json.loads(text), schema)


def test_any_object(gpt2):
    """Nothing ends it but the model; what is forced to an end is an object."""
    given, wanted = asked(response_format={"type": "json_object"}), '{"a": [1, {"b": "c\\n"}], "d": null}'
    text, whole = walk(gpt2, given, 0, 0, wanted)
    matcher = gpt2[1].matcher(given)
    assert whole and text.decode() == wanted
    assert set(gpt2[0].token_bytes(token)[:1] for token in allowed(matcher)) == {b"{"}
    assert asked(response_format={"type": "text"}) is None and asked(tools=TOOLS, tool_choice="none") is None


# --- calls -----------------------------------------------------------------------------------------------------------


def read(text):
    reader = CallReader()
    content, deltas = reader.push(text)
    rest, more = reader.finish()
    return content + rest, joined(deltas + more), reader.n_whole


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call_that_must_come_comes_once(kind, choice):
    names = set()
    for seed in range(12):
        text, whole = walk(kind, asked(tools=TOOLS, tool_choice=choice), seed)
        content, (call,), n_whole = read(text.decode())
        assert whole and content == "" and n_whole == 1 and call.index == 0 and call.id.startswith("call_")
        arguments = json.loads(call.arguments)
        names.add(call.name)
        if call.name == "ping":
            assert arguments == {}
        else:
            assert set(arguments) == {"city", "unit"} and len(arguments["city"]) <= 10 and arguments["unit"] in "CF"
    assert names == ({"weather"} if isinstance(choice, dict) else {"weather", "ping"})


def test_several_calls_where_they_may_be_several(own):
    given, most = asked(tools=TOOLS[1:], tool_choice="required", parallel_tool_calls=True), 0
    for seed in range(8):
        text, _ = walk(own, given, seed, 2000)
        _, calls, n_whole = read(text.decode())
        assert [call.index for call in calls] == list(range(n_whole)) and len({call.id for call in calls}) == n_whole
        most = max(most, n_whole)
    assert 1 < most <= 16


def test_text_or_a_call(kind):
    given = asked(tools=TOOLS)
    text, _ = walk(kind, given, 3, 60)
    content, calls, _ = read(text.decode(errors="replace"))
    assert content and not calls  # a tag at random is not to be expected
    begin = 'Let me see: <b> <tool\n<tool_call>\n{"name": "wea'
    text, whole = walk(kind, given, 5, 200, begin)
    content, (call,), n_whole = read(text.decode())
    assert whole and content == "Let me see: <b> <tool\n" and call.name == "weather" and n_whole == 1
    assert set(json.loads(call.arguments)) == {"city", "unit"}
    tokenizer, grammars = kind
    matcher = grammars.matcher(given)
    for byte in "<tool_call>":
        matcher.advance(next(n for n in allowed(matcher) if tokenizer.token_bytes(n) == byte.encode()))
    assert {tokenizer.token_bytes(token)[:1] for token in allowed(matcher)} == {b"\n"}, "a tag begins a call"


def test_json_or_a_call(own):
    given = asked(tools=TOOLS, response_format=form(PERSON))
    for prefix, calls in ('{"na', 0), ("<to", 1):
        text, whole = walk(own, given, 2, 300, prefix)
        content, found, _ = read(text.decode())
        assert whole and len(found) == calls and (calls or keeps_to(json.loads(content), PERSON))


CALLS = '{"name": "weather", "arguments": {"city": "Ab\\n</tool_call>", "n": {"a": {}}}}\n</tool_call>'
ANSWERS = ["just text", "a < b <tool_cal", f"<tool_call>\n{CALLS}", f"so:\n<tool_call>\n{CALLS}\n<tool_call>\n{CALLS}",
           f"<tool_call>\n{CALLS[:50]}", f"<tool_call>\n{CALLS[:14]}", f"<tool_call>\n{CALLS[:-3]}"]  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(answer=st.sampled_from(ANSWERS), cuts=st.lists(st.integers(0, 200), max_size=30))
def test_calls_are_read_the_same_in_any_pieces(answer, cuts):
    content, deltas, reader = "", [], CallReader()
    cuts = sorted(min(cut, len(answer)) for cut in cuts)
    for begin, end in zip([0, *cuts], [*cuts, len(answer)]):
        text, new = reader.push(answer[begin:end])
        content, deltas = content + text, deltas + new
    text, new = reader.finish()
    once, known, n_whole = read(answer)
    assert content + text == once and reader.n_whole == n_whole
    assert [(call.name, call.arguments) for call in joined(deltas + new)] == [(c.name, c.arguments) for c in known]
    assert [delta.id is None for delta in deltas] == [delta.name is None for delta in deltas]


def test_what_is_read_of_calls():
    arguments = '{"city": "Ab\\n</tool_call>", "n": {"a": {}}}'
    content, calls, n_whole = read(ANSWERS[3])
    assert content == "so:\n" and n_whole == 2 and [call.arguments for call in calls] == [arguments] * 2
    cut = arguments[: 50 - CALLS.index('{"city')]
    for answer, wanted in zip(ANSWERS[4:], [cut, None, arguments + "}\n</tool_ca"]):
        content, calls, n_whole = read(answer)
        assert content == "" and n_whole == 0 and [call.arguments for call in calls] == ([wanted] if wanted else [])
    assert read(ANSWERS[1])[0] == ANSWERS[1]


# --- what is refused -------------------------------------------------------------------------------------------------

NOT_KEPT = [
    ({"not": {}}, "not"), ({"type": "array", "uniqueItems": True}, "uniqueItems"), ({"type": "strnig"}, "strnig"),
    ({"$ref": "http://127.0.0.1:1/x"}, "127.0.0.1"), ({"$ref": "#/$defs/none"}, "none"), ({"$ref": "#"}, "nothing"),
    ({"type": "string", "pattern": "(?=a)b"}, "look"), ({"type": "string", "pattern": "(("}, "group"),
    ({"type": "string", "format": "zzz"}, "zzz"), ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
    ({"enum": []}, "anyOf"), ({"if": {}, "then": {}}, "if"), ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
    ({"type": "object", "description": "x" * 300_000}, "characters"),
    ({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1500)}}, "items"),
]  # fmt: skip


@pytest.mark.parametrize("schema, word", NOT_KEPT, ids=[word for _, word in NOT_KEPT])
def test_schemas_that_cannot_be_kept_to(schema, word):
    at = "response_format.json_schema.schema"
    with pytest.raises(ApiError, match=word) as caught:
        asked(response_format=form(schema))
    assert caught.value.status == 400 and caught.value.param == at and caught.value.code == "unsupported_schema"
    message = str(caught.value)
    assert message.startswith(f"{at} cannot be kept to: ") and len(message) < 400 and "\n" not in message


@pytest.mark.parametrize("schema, word", [NOT_KEPT[i] for i in (0, 1, 4, 6, 8)], ids=str)
def test_parameters_that_cannot_be_kept_to(schema, word):
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    with pytest.raises(ApiError, match=word) as caught:
        asked(tools=[TOOLS[0], {"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert caught.value.status == 400 and caught.value.param == "tools[1].function.parameters"


def test_schemas_that_are_nested_too_deep():
    deep = {"type": "string"}
    for _ in range(3000):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ApiError, match="recursion") as caught:
        asked(response_format=form(deep))
    assert caught.value.status == 400


def test_without_the_library_the_fields_are_refused(monkeypatch):
    monkeypatch.setattr(grammar, "find_spec", lambda name: None)
    for more in {"response_format": {"type": "json_object"}}, {"tools": TOOLS}:
        with pytest.raises(ApiError, match="needs the package llguidance") as caught:
            asked(**more)
        assert caught.value.status == 400 and caught.value.param == next(iter(more))
    assert asked(response_format={"type": "text"}) is None and asked() is None


def test_a_token_that_is_not_allowed_is_an_error(own):
    matcher = own[1].matcher(asked(response_format=form({"type": "boolean"})))
    with pytest.raises(ValueError, match="grammar"):
        matcher.advance(own[0].encode_plain("[")[0])
    with pytest.raises(ValueError):
        own[1].matcher(grammar.Grammar("start: ((("))


def test_each_answer_goes_its_own_way(own):
    """Matchers of one grammar, which is compiled once, do not share where they are."""
    given = asked(response_format=form({"enum": ["a", "b"]}))
    first, second = own[1].matcher(given), own[1].matcher(given)
    for token in own[0].encode_plain('"a"', in_front=False):
        first.advance(token)
    assert first.done and not second.done and {own[0].token_bytes(token) for token in allowed(second)} >= {b'"'}
