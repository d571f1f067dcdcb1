"""The table of fields: nothing that OpenAI's client knows is missing, and each check says what is wrong."""

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
BAD_BY_END = {
    "completions": [("prompt", []), ("prompt", [[]]), ("prompt", [1, "a"]), ("prompt", 5), ("prompt", {}), ("echo", 1),
                    ("logprobs", 21), ("logprobs", True), ("best_of", 2), ("suffix", "x"), ("prompt", ["a"] * 129),
                    ("messages", []), ("tools", [])],
    "chat": [("logprobs", 1), ("top_logprobs", 5), ("tools", []), ("tool_choice", "auto"), ("functions", []),
             ("response_format", {"type": "json_object"}), ("audio", {}), ("store", True), ("modalities", ["audio"]),
             ("service_tier", "flex"), ("reasoning_effort", "low"), ("prompt", "x"), ("metadata", {"a": 1})],
}  # fmt: skip


@pytest.mark.parametrize("end", fields.BOTH)
def test_what_cannot_be_honoured_is_refused_by_name(end):
    for name, value in BAD + BAD_BY_END[end]:
        with pytest.raises(ApiError) as caught:
            fields.read(end, GOOD[end] | {name: value})
        assert caught.value.status == 400 and caught.value.param.split(".")[0] == name, (name, value)
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
])  # fmt: skip
def test_fields_that_belong_together(end, name, other):
    with pytest.raises(ApiError) as caught:
        fields.read(end, GOOD[end] | other)
    assert caught.value.param == name


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
