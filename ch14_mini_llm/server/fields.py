"""The fields of a request: each is honoured or refused, none is ignored. The table drives the checks, /openapi.json,
the table in the chapter's page, and the tests, which compare it with the fields that the package ``openai`` knows.

``null`` is the same as to leave a field out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ch14_mini_llm.engine.request import MAX_TOP, shown
from ch14_mini_llm.server.errors import ApiError, refused
from ch14_mini_llm.server.formats import RESPONSE_FORMAT, TOOL_CHOICE, TOOLS, check_together
from ch14_mini_llm.server.kinds import (
    BIASES,
    FLAG,
    IDS,
    LABEL,
    MAX_STOPS,
    MESSAGES,
    PROMPTS,
    SESSION,
    STOPS,
    STREAM,
    TEXT,
    TOP_K,
    Kind,
    never,
    number,
    only,
    whole,
)
from ch14_mini_llm.server.tools import MOST_CALLS

COMPLETIONS, CHAT = "completions", "chat"
BOTH = (COMPLETIONS, CHAT)
MAX_CHOICES = 128  # of a request: prompts times n
MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class Field:
    """A field of one or both endpoints. meaning: what it does here, for people."""

    name: str
    kind: Kind
    meaning: str
    ends: tuple[str, ...] = BOTH
    required: bool = False


FIELDS = (
    Field("model", TEXT, "the model's name, as /v1/models has it; another one is answered 404", required=True),
    Field("prompt", PROMPTS, "a text, token ids, or a list of such; \"\" is the start token", (COMPLETIONS,), True),
    Field("messages", MESSAGES, "the conversation, of system, developer, user, assistant and tool; texts only", (CHAT,),
          True),
    Field("max_tokens", whole(0, MAX_TOKENS), "new tokens at most; 16 for a completion, what fits for a chat"),
    Field("max_completion_tokens", whole(0, MAX_TOKENS), "the newer name of max_tokens", (CHAT,)),
    Field("temperature", number("temperature"), "logits are divided by it, 1 by default; 0 takes the likeliest token"),
    Field("top_p", number("top_p"), "draw from the fewest tokens whose probabilities add up to it; above 0"),
    Field("top_k", TOP_K, "draw from so many of the likeliest; 0 or -1 for all (not OpenAI's)"),
    Field("min_p", number("min_p"), "drop tokens less than so many times as likely as the likeliest (not OpenAI's)"),
    Field("presence_penalty", number("presence_penalty"), "what the logit of a token in the answer loses, -2 to 2"),
    Field("frequency_penalty", number("frequency_penalty"), "the same, for each time that it has it"),
    Field("repetition_penalty", number("repetition_penalty"), "divides logits of tokens in both texts (not OpenAI's)"),
    Field("logit_bias", BIASES, "token id → what its logit gains, -100 to 100; 300 ids at most"),
    Field("seed", whole(-(2**63), 2**64 - 1),
          "the same seed, the same answer (GPU: --deterministic); choice j has one made of it"),
    Field("n", whole(1, MAX_CHOICES), f"choices for each prompt, {MAX_CHOICES} in all"),
    Field("stop", STOPS, f"up to {MAX_STOPS} texts that end an answer, and are left out of it"),
    Field("stop_token_ids", IDS, "ids that end an answer, besides the model's own (not OpenAI's)"),
    Field("ignore_eos", FLAG, "go on behind the model's end token (not OpenAI's)"),
    Field("echo", FLAG, "the prompt in front of the answer", (COMPLETIONS,)),
    Field("logprobs", whole(0, MAX_TOP), f"log-probabilities, and of the likeliest, 0 to {MAX_TOP}", (COMPLETIONS,)),
    Field("logprobs", FLAG, "log-probabilities of the answer's tokens", (CHAT,)),
    Field("top_logprobs", whole(0, MAX_TOP), f"and of so many likeliest, 0 to {MAX_TOP}; needs logprobs", (CHAT,)),
    Field("stream", FLAG, "server-sent events, as tokens come"),
    Field("stream_options", STREAM, "include_usage: one more chunk at the end; needs stream"),
    Field("session_id", SESSION, "a name under which the whole turn is kept, with its keys and values (not OpenAI's)"),
    Field("priority", whole(-(2**31), 2**31 - 1), "larger is served first (not OpenAI's)"),
    Field("user", LABEL, "taken, and changes nothing, which is its purpose"),
    Field("metadata", LABEL, "as user", (CHAT,)),
    Field("safety_identifier", LABEL, "as user", (CHAT,)),
    Field("prompt_cache_key", LABEL, "taken: there is one cache, and it finds what begins alike by itself", (CHAT,)),
    Field("best_of", only(1), "only 1", (COMPLETIONS,)),
    Field("suffix", never("the models only go on"), "", (COMPLETIONS,)),
    Field("response_format", RESPONSE_FORMAT, "text, json_object, or json_schema, which the answer keeps to", (CHAT,)),
    Field("response_format", RESPONSE_FORMAT, "the same (not OpenAI's)", (COMPLETIONS,)),
    Field("modalities", only(["text"]), "only [\"text\"]", (CHAT,)),
    Field("tools", TOOLS, "functions, 128 at most; arguments keep to their schemas, strict or not", (CHAT,)),
    Field("tool_choice", TOOL_CHOICE, "auto by default; none, required, or a function, which is called once", (CHAT,)),
    Field("parallel_tool_calls", FLAG, f"true: an answer may have {MOST_CALLS} calls; else one; needs tools", (CHAT,)),
    Field("functions", never("tools is the newer name"), "", (CHAT,)),
    Field("function_call", only("none"), "only \"none\"; tool_choice is the newer name", (CHAT,)),
    Field("audio", never("texts only"), "", (CHAT,)),
    Field("moderation", never("nothing is moderated"), "", (CHAT,)),
    Field("prediction", never("nothing is guessed"), "", (CHAT,)),
    Field("prompt_cache_options", never("the cache has no options"), "", (CHAT,)),
    Field("prompt_cache_retention", never("what is least used leaves first"), "", (CHAT,)),
    Field("reasoning_effort", never("the models do not reason apart"), "", (CHAT,)),
    Field("service_tier", only("auto", "default"), "only \"auto\" or \"default\"", (CHAT,)),
    Field("store", only(False), "only false: nothing is stored", (CHAT,)),
    Field("verbosity", never("the models have no such setting"), "", (CHAT,)),
    Field("web_search_options", never("there is no network"), "", (CHAT,)),
)  # fmt: skip
TABLES = {end: {field.name: field for field in FIELDS if end in field.ends} for end in BOTH}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
            "logit_bias")  # fmt: skip


def read(end: str, body: object) -> dict:
    """The fields of a request's body, checked; those that are not given are left out. end: of `BOTH`. Raises
    `ApiError`, which names the field."""
    if not isinstance(body, Mapping):
        raise ApiError(400, f"the body is {shown(body)}; it must be a JSON object", code="invalid_body")
    table, values = TABLES[end], {}
    for name, value in body.items():
        if name not in table:
            hint = f" (it is one of /v1/{'chat/completions' if end == COMPLETIONS else 'completions'})"
            other = name in TABLES[CHAT if end == COMPLETIONS else COMPLETIONS]
            raise refused(name[:60], f"there is no field {shown(name)} here{hint * other}", "unknown_parameter")
        if value is not None:
            values[name] = table[name].kind.check(name, value)
    for name, field in table.items():
        if field.required and name not in values:
            raise refused(name, f"{name} is missing; it is {field.meaning}", "missing_required_parameter")
    needs(values, "stream_options", "stream")
    needs(values, "top_logprobs", "logprobs")
    needs(values, "parallel_tool_calls", "tools")
    if values.get("tool_choice") != "none":
        needs(values, "tool_choice", "tools")
    check_together(values)
    if values.get("max_tokens", (most := values.get("max_completion_tokens"))) != most and most is not None:
        raise refused("max_tokens", "max_tokens and max_completion_tokens are both given, and differ: give one of them")
    return values


def needs(values: dict, name: str, other: str) -> None:
    """Raises `ApiError` if a field is given without the one that it belongs to."""
    if name in values and not values.get(other):
        raise refused(name, f"{name} is given, but {other} is not: give both, or neither")


def markdown() -> str:
    """The table, as the chapter's page has it: ``python -m ch14_mini_llm.server.fields`` prints it."""
    lines = ["| field | completions | chat | what it does here |", "|---|---|---|---|"]
    for field in FIELDS:
        answer = "refused" if field.kind.schema.get("type") == "null" else "yes"
        cells = [answer if end in field.ends else "" for end in BOTH]
        needed = ", needed" * field.required
        meaning = field.meaning or field.kind.schema["description"]
        lines.append(f"| `{field.name}` | {cells[0]} | {cells[1]} | {meaning}{needed} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
