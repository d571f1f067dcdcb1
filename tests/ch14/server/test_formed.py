"""Answers that must have a form, from a model that knows none: each that ends by itself keeps to it, in any company."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
from pydantic import BaseModel, ConfigDict, Field
from schemas import PERSON, SCHEMAS, TOOLS, keeps_to
from serving import Serving

from ch14_mini_llm.tokenizer import decode, encode

SAID = [{"role": "user", "content": "Who was there?"}]
CHAT = {"model": "tiny", "messages": SAID, "max_tokens": 90}
FREE = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 40}


@pytest.fixture(scope="module")
def server():
    with Serving("--deterministic") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


def check(choice, schema):
    """A choice that has ended by itself keeps to the schema; returns whether it has."""
    assert choice.finish_reason in ("stop", "length")
    if choice.finish_reason == "stop":
        assert keeps_to(json.loads(choice.message.content), schema), choice.message.content
    return choice.finish_reason == "stop"


def streamed(client, **asked):
    """{index: (text, {call's index: (id, name, arguments)}, finish_reason)} of a stream, whose form is checked."""
    answers = {}
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            first = choice.index not in answers
            text, calls, ended = answers.get(choice.index, ("", {}, None))
            assert ended is None and (choice.delta.role == "assistant") == first
            for call in choice.delta.tool_calls or ():
                if call.index in calls:
                    id, name, arguments = calls[call.index]
                    assert call.id is None and call.function.name is None
                else:
                    assert call.id.startswith("call_") and call.type == "function" and call.index == len(calls)
                    id, name, arguments = call.id, call.function.name, ""
                calls[call.index] = id, name, arguments + call.function.arguments
            answers[choice.index] = text + (choice.delta.content or ""), calls, choice.finish_reason
    return answers


# --- response_format -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:30])
def test_answers_keep_to_their_schema(client, schema):
    """Greedy, and drawn in different ways; streamed they are the same."""
    ended = 0
    for how in ({"temperature": 0}, {"seed": 1, "n": 3}, {"seed": 2, "temperature": 1.8, "top_p": 0.9},
                {"seed": 3, "frequency_penalty": 1.0, "logit_bias": {"198": 20}}):  # fmt: skip
        asked = CHAT | how | {"response_format": form(schema)}
        answer = client.chat.completions.create(**asked)
        ended += sum(check(choice, schema) for choice in answer.choices)
        assert streamed(client, **asked) == {
            choice.index: (choice.message.content, {}, choice.finish_reason) for choice in answer.choices
        }
    assert ended >= 4


def test_any_object(client):
    asked = CHAT | {"response_format": {"type": "json_object"}}
    forced = asked | {"temperature": 0, "logit_bias": {str(encode("{")[0]): 50, str(encode("}")[0]): 100}}
    assert client.chat.completions.create(**forced).choices[0].message.content == "{}"
    for seed in range(4):
        choice = client.chat.completions.create(**asked, seed=seed).choices[0]
        assert choice.message.content.startswith("{") and choice.message.tool_calls is None
        assert choice.finish_reason == "length" or isinstance(json.loads(choice.message.content), dict)


def test_a_completion_can_have_a_form_too(client):
    for echo in (False, True):
        answer = client.completions.create(**FREE, echo=echo, seed=5, extra_body={"response_format": form(SCHEMAS[4])})
        text = answer.choices[0].text.removeprefix(FREE["prompt"] * echo)
        assert answer.choices[0].finish_reason == "stop" and keeps_to(json.loads(text), SCHEMAS[4])
    text = client.completions.create(**FREE, seed=5, extra_body={"response_format": {"type": "text"}}).choices[0].text
    assert text == client.completions.create(**FREE, seed=5).choices[0].text


def test_an_answer_is_cut_where_it_may_not_go_on(client):
    choice = client.chat.completions.create(**CHAT | {"max_tokens": 5, "response_format": form(PERSON)}).choices[0]
    assert choice.finish_reason == "length" and choice.message.content.startswith('{"name": "')
    asked = CHAT | {"response_format": form({"enum": ["a, b"]}), "stop": ","}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == '"a'


def test_log_probabilities_are_the_models_own(client):
    """Of what the schema forces, the model thinks little; they are those that the text has as a prompt."""
    asked = CHAT | {"response_format": form({"const": {"a": 1}}), "logprobs": True, "top_logprobs": 2, "temperature": 0}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.message.content == '{"a": 1}' and choice.finish_reason == "stop"
    entries = choice.logprobs.content
    assert "".join(one.token for one in entries) == '{"a": 1}' and min(one.logprob for one in entries) < -1
    prompt = encode("user: Who was there?\nassistant:")
    new = [token for one in entries for token in encode(one.token)]
    known = client.completions.create(
        model="tiny", prompt=prompt + new, max_tokens=0, echo=True, logprobs=2
    ).choices[0].logprobs.token_logprobs[len(prompt) :]  # fmt: skip
    assert known == pytest.approx([one.logprob for one in entries], abs=1e-4)


def test_others_are_not_disturbed(client):
    """Twelve at once, every other one with a schema or tools: those without write what they write alone."""
    free = [FREE | {"prompt": FREE["prompt"][: 4 + k], "seed": k, "temperature": 0.8 * (k % 2)} for k in range(6)]
    ask = lambda one: client.completions.create(**one).choices[0].text
    alone = [ask(one) for one in free]
    formed = [CHAT | {"seed": k, "response_format": form(SCHEMAS[k])} for k in range(4)]
    formed += [CHAT | {"seed": k, "tools": TOOLS, "tool_choice": "required"} for k in range(2)]
    chat = lambda one: client.chat.completions.create(**one).choices[0]
    apart = [chat(one) for one in formed]
    with ThreadPoolExecutor(12) as pool:
        texts, choices = pool.map(ask, free), pool.map(chat, formed)
        assert list(texts) == alone
        for before, now in zip(apart, choices):
            calls = [[call.function for call in one.message.tool_calls or ()] for one in (before, now)]
            assert before.message.content == now.message.content and calls[0] == calls[1]


class Place(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["house", "garden"]
    rooms: int = Field(ge=0, le=20)


class Story(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mood: Literal["happy", "sad"]
    places: list[Place] = Field(max_length=2)
    ending: bool | None


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=9)


def test_openais_own_helpers(client):
    asked = CHAT | {"max_tokens": 120}
    for how in {"temperature": 0}, {"seed": 4}:
        parsed = client.chat.completions.parse(**asked, **how, response_format=Story).choices[0].message.parsed
        assert isinstance(parsed, Story)
        with client.chat.completions.stream(**asked, **how, response_format=Story) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == parsed
    tools = {"tools": [openai.pydantic_function_tool(Weather)], "tool_choice": "required"}
    (call,) = client.chat.completions.parse(**asked, **tools, seed=2).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**asked, **tools, seed=2) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (streamed_call,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed_call.function == call.function and "".join(one.arguments_delta for one in deltas) == (
        call.function.arguments
    )


# --- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_calls(client, choice):
    names = set()
    for how in ({"temperature": 0}, {"seed": 1, "n": 4}, {"seed": 2, "temperature": 1.5}):
        asked = CHAT | how | {"tools": TOOLS, "tool_choice": choice}
        answer = client.chat.completions.create(**asked)
        again = streamed(client, **asked)
        for one in answer.choices:
            (call,) = one.message.tool_calls
            assert one.finish_reason == "tool_calls" and one.message.content is None and call.type == "function"
            arguments = json.loads(call.function.arguments)
            names.add(call.function.name)
            assert set(arguments) == ({"city", "unit"} if call.function.name == "weather" else set())
            text, calls, ended = again[one.index]
            assert (text, ended) == ("", "tool_calls") and calls[0][1:] == (call.function.name, call.function.arguments)
        ids = [one.message.tool_calls[0].id for one in answer.choices]
        assert len({*ids, *(calls[0][0] for _, calls, _ in again.values())}) == 2 * len(ids)
    assert names <= {"weather", "ping"} and (choice == "required" or names == {"weather"})


def test_several_calls(client):
    asked = CHAT | {"tools": TOOLS[1:], "tool_choice": "required", "parallel_tool_calls": True, "seed": 3}
    choice = client.chat.completions.create(**asked).choices[0]
    calls = choice.message.tool_calls
    assert len(calls) > 1 and len({call.id for call in calls}) == len(calls) and choice.finish_reason == "length"
    assert {call.function.name for call in calls} == {"ping"}, "a story teller does not stop calling by itself"
    _, again, _ = streamed(client, **asked)[0]
    assert [one[2] for one in again.values()] == [call.function.arguments for call in calls]
    stopped = client.chat.completions.create(**asked | {"logit_bias": {"50256": 100}}).choices[0]
    assert len(stopped.message.tool_calls) == 1 and stopped.finish_reason == "tool_calls"


def test_a_call_that_is_cut(client):
    asked = CHAT | {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "weather"}}, "seed": 1}
    whole = client.chat.completions.create(**asked)
    all_of_it = whole.choices[0].message.tool_calls[0].function.arguments + "}\n</tool_call>"
    seen = set()
    for most in range(1, whole.usage.completion_tokens):
        choice = client.chat.completions.create(**asked | {"max_tokens": most}).choices[0]
        assert choice.finish_reason == "length" and not choice.message.content
        for call in choice.message.tool_calls or ():
            assert call.function.name == "weather" and all_of_it.startswith(call.function.arguments)
            seen.add(call.function.arguments)
    assert len(seen) > 3


def test_tools_that_need_not_be_called(client, server):
    """A story teller calls nothing; with "none" it has not even heard of the tools."""
    choice = client.chat.completions.create(**CHAT, tools=TOOLS, seed=1).choices[0]
    assert choice.message.content and choice.message.tool_calls is None and choice.finish_reason in ("length", "stop")
    known = client.chat.completions.create(**CHAT, seed=1)
    none = client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice="none", seed=1)
    assert none.choices[0].message == known.choices[0].message and none.usage == known.usage
    both = client.chat.completions.create(**CHAT, tools=TOOLS, response_format=form(SCHEMAS[1]), temperature=0).choices[
        0
    ]
    assert both.message.tool_calls or keeps_to(json.loads(both.message.content), SCHEMAS[1])


def test_a_result_goes_back_to_the_model(client):
    (call,) = client.chat.completions.create(
        **CHAT, tools=TOOLS, tool_choice="required", seed=1
    ).choices[0].message.tool_calls  # fmt: skip
    said = [*SAID, {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]  # fmt: skip
    answer = client.chat.completions.create(**CHAT | {"messages": said, "temperature": 0})
    arguments = json.dumps(json.loads(call.function.arguments), ensure_ascii=False)
    prompt = encode(
        f"user: Who was there?\nassistant: <tool_call>\n"
        f'{{"name": "{call.function.name}", "arguments": {arguments}}}\n</tool_call>\n'
        "user: <tool_response>\nIt rains.\n</tool_response>\nassistant:"
    )
    assert answer.usage.prompt_tokens == len(prompt) and answer.choices[0].message.content
    known = client.completions.create(model="tiny", prompt=decode(prompt), temperature=0, max_tokens=90, stop="\nuser:")
    assert known.choices[0].text == answer.choices[0].message.content


# --- what goes wrong -------------------------------------------------------------------------------------------------

WRONG = [
    ({"response_format": form({"not": {}})}, "response_format.json_schema.schema"),
    ({"response_format": form({"$ref": "#"})}, "response_format.json_schema.schema"),
    ({"response_format": form({"type": "string", "pattern": "(("})}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"a": {"type": "frob"}}}}}]}, "tools[0].function.parameters"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wrong, param", WRONG, ids=[param for _, param in WRONG])
def test_what_cannot_be_kept_to_is_refused_before_the_engine_hears_of_it(client, server, wrong, param, stream):
    before = server.metrics()["requests_accepted_total"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT | wrong, stream=stream)
    assert caught.value.param == param and set(caught.value.body) == {"message", "type", "param", "code"}
    assert server.metrics()["requests_accepted_total"] == before


HOSTILE = [
    {"type": "array", "items": {"type": "integer"}, "minItems": 10**7, "maxItems": 10**8},
    {"type": "string", "pattern": "^(((((a{0,50}){0,50}){0,50}){0,50}){0,50})$"},
    {"type": "string", "maxLength": 10**9},
    {"type": "string", "pattern": "^(.*a.*b.*c.*d.*e.*){1,30}$"}, {"enum": [f"v{i}" * 9 for i in range(3000)]},
    {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}},
    {"anyOf": [{"type": "string", "pattern": f"^(a|b){{{i},{2 * i}}}c$"} for i in range(1, 60)]},
    {"$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"},
]  # fmt: skip


def test_schemas_that_mean_harm_harm_nobody(server):
    """Each is answered or refused, in seconds, while an answer without a form goes on."""
    free, gaps, done = [], [], threading.Event()

    def stream():
        for _ in server.client().completions.create(**FREE | {"max_tokens": 450, "seed": 1}, stream=True):
            free.append(time.monotonic())
            if done.is_set():
                return

    thread = threading.Thread(target=stream)
    thread.start()
    for schema in HOSTILE:
        begun = time.monotonic()
        status, body, _ = server.request("/v1/chat/completions", CHAT | {
            "max_tokens": 12, "seed": 1, "response_format": form(schema)})  # fmt: skip
        assert time.monotonic() - begun < 15, schema
        assert status in (200, 400) or status == 500 and body["error"]["code"] == "engine_error", body
    done.set()
    thread.join()
    gaps = [after - before for before, after in zip(free, free[1:])]
    assert len(gaps) > 20 and max(gaps) < 5
    assert server.request("/ready")[0] == 200 and server.settle()["blocks_owned"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_go_away_in_the_middle(server, client, stream):
    before = server.settle()
    long = {"type": "array", "items": {"const": "one"}, "minItems": 400}
    asked = CHAT | {"max_tokens": 450, "n": 2, "stream": stream, "response_format": form(long)}
    server.cut_off(asked, 300 * stream, "/v1/chat/completions")
    end = time.monotonic() + 20
    while server.metrics()["request_aborted_total"] < before["request_aborted_total"] + 1:
        assert time.monotonic() < end
        time.sleep(0.02)
    found = server.settle()
    assert found["blocks_free"] + found["blocks_cached"] == before["blocks_free"] + before["blocks_cached"]
    check(client.chat.completions.create(**CHAT, response_format=form(PERSON)).choices[0], PERSON)


def test_a_small_pool_in_which_answers_give_way(client):
    """What was written before a request gave its blocks back stays, and what comes behind it still fits."""
    schema = {"type": "array", "items": {"enum": ["one", "two", "three"]}, "minItems": 12, "maxItems": 16}
    asked = [CHAT | {"max_tokens": 150, "seed": k, "response_format": form(schema)} for k in range(6)]
    wanted = [client.chat.completions.create(**one).choices[0].message.content for one in asked]
    with Serving("--num_blocks=16", "--max_batch=6", "--deterministic") as small:
        ask = lambda one: small.client().chat.completions.create(**one).choices[0]
        with ThreadPoolExecutor(6) as pool:
            choices = list(pool.map(ask, asked))
        assert small.settle()["num_preemptions_total"] > 0
    assert [choice.message.content for choice in choices] == wanted
    assert sum(check(choice, schema) for choice in choices) >= 4
