"""From a client's text to token ids: what is spelled out by a client is text, whatever it spells."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_own_tokenizer import data, library  # noqa: F401  (a fixture)

from ch14_mini_llm.server.errors import ApiError
from ch14_mini_llm.server.prompts import Limits, Reader, derived
from ch14_mini_llm.tokenizer import encode
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer, OwnTokenizer

PIECES = ["<|im_end|>", "<|im_start|>", "system\n", "the cat", " ", "\n", "<|endoftext|>", "<", "12", "é"]


@pytest.fixture(scope="module")
def reader(library):  # noqa: F811
    return Reader(OwnTokenizer(data(library)), Limits(512, 400, 10_000, 10_000), "m")


def conversation(text):
    return [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "the hat"},
        {"role": "user", "content": "on"},
    ]


@settings(deadline=None, max_examples=150)
@given(text=st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_special_tokens_of_a_conversation_are_the_forms_alone(reader, text):
    """As many as without the client's text, in the same roles; and the text comes back as it was."""
    ids, plain = reader.conversation(conversation(text)), reader.conversation(conversation("x"))
    special = [token for token in ids if token < 3]
    assert special == [token for token in plain if token < 3]
    assert reader.tokenizer.decode(ids) == reader.tokenizer.decode(plain).replace("user\nx<", f"user\n{text}<", 1)
    if not any(token in text for token in PIECES[:2] + ["<|endoftext|>"]):
        assert ids == reader.tokenizer.chat(conversation(text))


@settings(deadline=None, max_examples=100)
@given(text=st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_prompts_have_no_special_tokens(reader, text):
    ids = reader.encode(text, "prompt")
    assert all(token >= 3 for token in ids) and reader.tokenizer.decode(ids) == text


def test_gpt2s_prompts():
    reader = Reader(GPT2Tokenizer(), Limits(64, 50257, 1000, 1000), "m")
    assert reader.prompt_ids("Hello there") == encode("Hello there") and reader.prompt_ids("") == [50256]
    assert 50256 not in reader.prompt_ids("a <|endoftext|> b") and reader.prompt_ids([50256, 5]) == [50256, 5]
    with pytest.raises(ApiError, match="surrogate"):
        reader.prompt_ids("a \ud800")


def test_seeds_of_choices():
    seeds = {derived(seed, choice) for seed in range(20) for choice in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**64 for seed in seeds) and derived(7, 0) == 7


@pytest.mark.parametrize(
    "share, room, length, expected", [(100, 1000, 10, 54), (20, 1000, 10, None), (100, 40, 10, None)]
)
def test_what_is_left_open_is_the_context_or_the_pools_to_say(share, room, length, expected):
    reader = Reader(GPT2Tokenizer(), Limits(64, 50257, room, share), "m")
    assert reader.max_new("chat", {}, length) == expected
    asked = reader.asked("chat", {"model": "m", "messages": [{"role": "user", "content": "a"}]})
    n = len(asked.prompts[0])
    assert asked.requests[0].max_new == min(64 - n, share, room - n)
    assert (asked.shortened is None) == (asked.requests[0].max_new == 64 - n)


MESSAGE = {"role": "user", "content": "x"}
BAD = [
    None, [], "x", [5], [{}], [{"role": "user"}], [MESSAGE | {"role": "tool"}], [MESSAGE | {"role": []}],
    [MESSAGE | {"content": 5}], [MESSAGE | {"content": []}], [MESSAGE | {"content": [{"type": "text"}]}],
    [MESSAGE | {"content": [{"type": "input_audio"}]}], [MESSAGE | {"tool_calls": [{}]}],
]  # fmt: skip


@pytest.mark.parametrize("messages", BAD)
def test_messages_that_cannot_be_read(messages):
    with pytest.raises(ApiError) as caught:
        Reader(GPT2Tokenizer(), Limits(64, 50257, 1000, 1000), "m").conversation(messages)
    assert caught.value.param.startswith("messages") and len(str(caught.value)) < 200
