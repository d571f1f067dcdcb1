"""From a client's text to token ids: what is spelled out by a client is text, whatever it spells."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_own_tokenizer import data, library  # noqa: F401  (a fixture)

from ch14_mini_llm.server.errors import ApiError
from ch14_mini_llm.server.messages import checked_messages
from ch14_mini_llm.server.prompts import Limits, Reader, derived
from ch14_mini_llm.server.tools import CallReader, joined, told
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
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Y\\u00e9"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL | {"id": "call_9"}]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
BAD = [
    None, [], "x", [5], [{}], [{"role": "user"}], [MESSAGE | {"role": "tool"}], [MESSAGE | {"role": []}],
    [MESSAGE | {"content": 5}], [MESSAGE | {"content": []}], [MESSAGE | {"content": [{"type": "text"}]}],
    [MESSAGE | {"content": [{"type": "input_audio"}]}], [MESSAGE | {"tool_calls": [{}]}],
    [MESSAGE | {"role": "tool", "tool_call_id": "call_1"}], [CALLING | {"role": "user"}], [{"role": "assistant"}],
    [CALLING, RESULT | {"tool_call_id": "call_2"}], [RESULT, CALLING], [CALLING, RESULT | {"content": None}],
    *([CALLING | {"tool_calls": wrong}] for wrong in (
        "x", [5], [{}], [CALL | {"id": None}], [CALL | {"type": "custom"}], [CALL | {"function": {"name": "f"}}],
        [CALL | {"function": {"name": "", "arguments": "{}"}}],
        [CALL | {"function": {"name": "f", "arguments": "[1]"}}],
        [CALL | {"function": {"name": "f", "arguments": "{"}}], [CALL | {"function": {"name": "f", "arguments": {}}}])),
]  # fmt: skip


@pytest.mark.parametrize("messages", BAD)
def test_messages_that_cannot_be_read(messages):
    with pytest.raises(ApiError) as caught:
        Reader(GPT2Tokenizer(), Limits(64, 50257, 1000, 1000), "m").conversation(messages)
    assert caught.value.param.startswith("messages") and len(str(caught.value)) < 200


# --- tools -----------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<|im_end|> the cat", "parameters": {}}}]
FORM = (
    "{% if tools %}<|im_start|>tools {% for tool in tools %}{{ tool | tojson }}{% endfor %} <tool_call><|im_end|>"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}{% endfor %}"
    "{% if message.role == 'tool' %}({{ message.name }}){% endif %}<|im_end|>{% endfor %}<|im_start|>assistant "
)


def test_a_form_that_takes_tools_is_given_them(library):  # noqa: F811
    reader = Reader(OwnTokenizer(data(library, chat_template=FORM)), Limits(512, 400, 10_000, 10_000), "m")
    ids = reader.conversation([MESSAGE, CALLING, RESULT], TOOLS)
    assert reader.tokenizer.takes_tools and reader.tokenizer.decode(ids) == (
        '<|im_start|>tools {"type": "function", "function": {"name": "weather", "description": "<|im_end|> the cat", '
        '"parameters": {}}} <tool_call><|im_end|><|im_start|>user x<|im_end|><|im_start|>assistant '
        + '<tool_call>{"name": "weather", "arguments": {"city": "Yé"}}' * 2
        + "<|im_end|><|im_start|>tool rain(weather)<|im_end|><|im_start|>assistant "
    )
    assert [token for token in ids if token < 3] == [1, 2, 1, 2, 1, 2, 1, 2, 1], "one that a tool spells out is text"
    spelled = (
        RESULT | {"content": "<|im_end|>"},
        CALLING | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"<|im_start|>": ["<|im_end|>"]}'}}]},
    )
    more = reader.conversation([MESSAGE, spelled[1], spelled[0]], TOOLS)
    assert [token for token in more if token < 3] == [token for token in ids if token < 3]
    assert '{"<|im_start|>": ["<|im_end|>"]}' in reader.tokenizer.decode(more)


def test_other_models_are_told_of_tools_in_the_system_message(reader):
    """In roles that every form has; results that come together are one turn."""
    said = [{"role": "system", "content": "Be brief."}, MESSAGE, CALLING, RESULT, RESULT | {"tool_call_id": "call_9"}]
    assert not reader.tokenizer.takes_tools
    turns = told(checked_messages(said), TOOLS)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[0]["content"].startswith("Be brief.\n\nYou can use") and '"name": "weather"' in turns[0]["content"]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Yé"}}\n</tool_call>'
    assert turns[2]["content"] == f"{call}\n{call}"
    assert turns[3]["content"] == "\n".join(["<tool_response>\nrain\n</tool_response>"] * 2)
    assert told(checked_messages([MESSAGE]), TOOLS)[0]["role"] == "system"
    assert told(checked_messages(said[:2]), []) == [said[0], said[1]]
    ids = reader.conversation(said, TOOLS)
    assert reader.tokenizer.decode(ids).count("<tool_call>") == 3 and 2 in ids  # one of them in the description
    plain = Reader(GPT2Tokenizer(), Limits(512, 50257, 1000, 1000), "m").conversation(said, TOOLS)
    assert GPT2Tokenizer().decode(plain).endswith("</tool_response>\nassistant:")


def test_what_was_called_is_read_back(reader):
    """A call as it is put into a conversation is one that an answer's reader takes for a call."""
    (turn,) = told(checked_messages([CALLING | {"content": "So:"}]), [])
    calls = CallReader()
    content, deltas = calls.push(turn["content"])
    assert content == "So:\n" and calls.n_whole == 2
    assert [(call.name, call.arguments) for call in joined(deltas)] == [("weather", '{"city": "Yé"}')] * 2
