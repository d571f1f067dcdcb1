"""The table of fields: nothing that OpenAI's client knows is missing, and each check says what is wrong."""

import re
import typing
from pathlib import Path

import pytest

from ch14_mini_llm.server import fields
from ch14_mini_llm.server.errors import ApiError
from ch14_mini_llm.server.openapi import description

GOOD = {
    "completions": {"model": "m", "prompt": "x"},
    "chat": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("end", fields.BOTH)
def test_every_field_of_the_openai_package_is_in_the_table(end):
    pytest.importorskip("openai")
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    params = {"completions": completion_create_params, "chat": chat_create_params}[end].CompletionCreateParamsBase
    known = set(typing.get_type_hints(params)) | {"stream"}
    assert known <= set(fields.TABLES[end]), "honour it or refuse it"
    others = set(fields.TABLES[end]) - known
    assert all("not OpenAI's" in fields.TABLES[end][name].meaning for name in others)


BAD = [
    ("temperature", "0.5"), ("temperature", -1), ("temperature", True), ("top_p", 0), ("top_p", 1.5), ("top_k", 0.5),
    ("min_p", 2), ("presence_penalty", 3), ("frequency_penalty", "1"), ("repetition_penalty", 0), ("n", 0), ("n", 200),
    ("n", 1.5), ("n", True), ("seed", "1"), ("seed", 2**70), ("max_tokens", -1), ("max_tokens", "5"), ("stop", [""]),
    ("stop", ""), ("stop", 5), ("stop", ["a"] * 17), ("stop", "a" * 1001), ("logit_bias", {"x": 1}),
    ("logit_bias", [1]), ("logit_bias", {"1": 101}), ("stream", "yes"), ("user", 5), ("stop_token_ids", [-1]),
    ("stop_token_ids", "1"), ("ignore_eos", 1), ("priority", 0.5), ("unheard_of", 1),
]  # fmt: skip
FUNCTION = {"type": "function", "function": {"name": "f"}}
BAD_BY_END = {
    "completions": [("prompt", []), ("prompt", [[]]), ("prompt", [1, "a"]), ("prompt", 5), ("prompt", {}), ("echo", 1),
                    ("logprobs", 21), ("logprobs", True), ("best_of", 2), ("suffix", "x"), ("prompt", ["a"] * 129),
                    ("messages", []), ("tools", []), ("response_format", {"type": "xml"})],
    "chat": [("logprobs", 1), ("top_logprobs", 5), ("tools", []), ("tool_choice", "auto"), ("functions", []),
             ("response_format", "json"), ("response_format", {}), ("response_format", {"type": ["text"]}),
             ("response_format", {"type": "text", "json_schema": {}}), ("response_format", {"type": "json_schema"}),
             ("response_format", {"type": "json_object", "schema": {}}), ("parallel_tool_calls", True),
             *(("response_format", {"type": "json_schema", "json_schema": wrong}) for wrong in (
                 "x", {}, {"name": "x"}, {"name": "a b", "schema": {}}, {"name": "x", "schema": True},
                 {"name": "x", "schema": {}, "strict": 1}, {"name": "x", "schema": {}, "description": "a person"},
                 {"name": "x" * 65, "schema": {}}, {"name": "x", "schema": {}, "more": 1})),
             *(("tools", wrong) for wrong in (
                 "x", {}, ["x"], [{}], [{"type": "custom", "custom": {"name": "x"}}], [{"type": "function"}],
                 [{"type": "function", "function": {}}], [FUNCTION | {"more": 1}], [FUNCTION, FUNCTION],
                 [FUNCTION | {"function": {"name": "a b"}}], [FUNCTION | {"function": {"name": "f", "strict": "yes"}}],
                 [FUNCTION | {"function": {"name": "f", "parameters": []}}], [FUNCTION] * 129,
                 [FUNCTION | {"function": {"name": "f", "parameters": {"type": "array"}}}],
                 [FUNCTION | {"function": {"name": "f", "description": 5}}],
                 [FUNCTION | {"function": {"name": "f", "more": 1}}])),
             ("tool_choice", "any"), ("tool_choice", {}), ("tool_choice", {"type": "allowed_tools"}),
             ("tool_choice", {"type": "function", "function": {"name": ""}}), ("audio", {}),
             ("store", True), ("modalities", ["audio"]),
             ("service_tier", "flex"), ("reasoning_effort", "low"), ("prompt", "x"), ("metadata", {"a": 1})],
}  # fmt: skip


@pytest.mark.parametrize("end", fields.BOTH)
def test_what_cannot_be_honoured_is_refused_by_name(end):
    for name, value in BAD + BAD_BY_END[end]:
        with pytest.raises(ApiError) as caught:
            fields.read(end, GOOD[end] | {name: value})
        assert caught.value.status == 400 and re.split(r"[.\[]", caught.value.param)[0] == name, (name, value)
        assert name in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("end", fields.BOTH)
def test_null_is_the_same_as_to_leave_it_out(end):
    every = dict.fromkeys(fields.TABLES[end])
    assert fields.read(end, every | GOOD[end]) == fields.read(end, GOOD[end])


@pytest.mark.parametrize("end, name, other", [
    ("chat", "top_logprobs", {"top_logprobs": 2}), ("completions", "model", {"model": None}),
    ("chat", "stream_options", {"stream_options": {"include_usage": True}}),
    ("completions", "stream_options", {"stream": False, "stream_options": {}}),
    ("chat", "messages", {"messages": None}), ("chat", "max_tokens", {"max_tokens": 1, "max_completion_tokens": 2}),
    ("chat", "stream_options.x", {"stream": True, "stream_options": {"x": True}}),
    ("chat", "tool_choice", {"tool_choice": "required"}),
    ("chat", "parallel_tool_calls", {"parallel_tool_calls": False}),
    ("chat", "tool_choice", {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
    ("chat", "ignore_eos", {"tools": [FUNCTION], "ignore_eos": True}),
    ("completions", "ignore_eos", {"response_format": {"type": "json_object"}, "ignore_eos": True}),
])  # fmt: skip
def test_fields_that_belong_together(end, name, other):
    with pytest.raises(ApiError) as caught:
        fields.read(end, GOOD[end] | other)
    assert caught.value.param == name


def test_forms_of_answers_as_they_are_read():
    read = lambda **more: fields.read("chat", GOOD["chat"] | more)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}, "strict": None}}
    assert read(response_format=schema)["response_format"] == {"type": "json_schema", "schema": {"a": 1}}
    assert read(response_format={"type": "text"}, ignore_eos=True)["response_format"] == {"type": "text"}
    chosen = {"type": "function", "function": {"name": "f"}}
    values = read(tools=[FUNCTION], tool_choice=chosen, parallel_tool_calls=False)
    nothing = {"type": "object", "additionalProperties": False, "properties": {}}
    assert values["tools"] == [{"type": "function", "function": {"name": "f", "parameters": nothing}}]
    assert values["tool_choice"] == {"name": "f"} and read(tool_choice="none")["tool_choice"] == "none"
    for given, closed in ({"properties": {"a": {}}}, True), ({"allOf": [{}]}, False), ({"$ref": "#/x"}, False):
        (tool,) = read(tools=[{"type": "function", "function": {"name": "f", "parameters": given}}])["tools"]
        assert ("additionalProperties" in tool["function"]["parameters"]) == closed


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_no_object(body):
    with pytest.raises(ApiError, match="must be a JSON object"):
        fields.read("chat", body)


def test_the_document_names_every_field():
    paths = description("m", 50257)["paths"]
    for end, path in ("completions", "/v1/completions"), ("chat", "/v1/chat/completions"):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == set(fields.TABLES[end]) and schema["additionalProperties"] is False


def test_the_page_has_the_table():
    page = (Path(fields.__file__).parent.parent / "server.md").read_text(encoding="utf-8")
    assert f"-->\n{fields.markdown()}<!-- end -->" in page, "paste what python -m ch14_mini_llm.server.fields prints"
