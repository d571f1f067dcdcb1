"""What an answer must look like, as a request says it: response_format, tools and tool_choice. Whether a grammar can be
made of a schema is `grammar`'s to say."""

from __future__ import annotations

import re

from ch14_mini_llm.engine.request import shown
from ch14_mini_llm.server.errors import ApiError, refused
from ch14_mini_llm.server.kinds import FLAG, Kind, flag, text, wrong

NAME = "^[a-zA-Z0-9_-]{1,64}$"  # of a schema, and of a function
MAX_TOOLS = 128
COMBINED = {"$ref", "allOf", "anyOf", "oneOf"}  # a schema with none of these names all arguments that there are
CHOICES = ("none", "auto", "required")


def _object(at: str, value: object, known: dict[str, bool]) -> dict:
    """An object with these fields; those that are True are needed, null is the same as to leave one out."""
    if not isinstance(value, dict):
        raise wrong(at, value, f"an object with {', '.join(known)}")
    for name in value:
        if name not in known:
            raise refused(f"{at}.{name}"[:80], f"{at} has {shown(name)}, which is not known here; it can have "
                          f"{', '.join(known)}", "unknown_parameter")  # fmt: skip
    for name, needed in known.items():
        if needed and value.get(name) is None:
            raise refused(f"{at}.{name}", f"{at}.{name} is missing", "missing_required_parameter")
    return {name: one for name, one in value.items() if one is not None}


def _one_of(at: str, value: object, words: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in words:
        raise wrong(at, value, f"one of {', '.join(words)}")
    return value


def _name(at: str, value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(NAME, value):
        raise wrong(at, value, "a name of 1 to 64 letters, digits, _ and -")
    return value


def _schema(at: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise wrong(at, value, "a JSON schema, an object")
    return value


def response_format(name: str, value: object) -> dict:
    """{"type": "text" | "json_object"}, or {"type": "json_schema", "json_schema": {"name", "schema", "strict"}}."""
    kind = _one_of(f"{name}.type", _object(name, value, {"type": True, "json_schema": False})["type"],
                   ("text", "json_object", "json_schema"))  # fmt: skip
    given = value.get("json_schema")
    if kind != "json_schema":
        if given is not None:
            raise refused(f"{name}.json_schema", f"{name}.json_schema is given, but the type is {kind}")
        return {"type": kind}
    at = f"{name}.json_schema"
    if isinstance(given, dict) and given.get("description") is not None:
        raise refused(f"{at}.description", f"{at}.description is not done here (the model does not see the schema): "
                      "say it in a message", "unsupported_parameter")  # fmt: skip
    known = {"name": True, "schema": True, "strict": False, "description": False}
    fields = _object(at, given, known)
    _name(f"{at}.name", fields["name"])
    flag(f"{at}.strict", fields.get("strict", True))
    return {"type": kind, "schema": _schema(f"{at}.schema", fields["schema"])}


def tools(name: str, value: object) -> list[dict]:
    """Functions: [{"type": "function", "function": {"name", "description", "parameters", "strict"}}]."""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_TOOLS:
        raise wrong(name, value, f"a list of 1 to {MAX_TOOLS} functions")
    checked, names = [], set()
    for number, tool in enumerate(value):
        at = f"{name}[{number}]"
        tool = _object(at, tool, {"type": True, "function": True})
        _one_of(f"{at}.type", tool["type"], ("function",))
        at = f"{at}.function"
        known = {"name": True, "description": False, "parameters": False, "strict": False}
        function = _object(at, tool["function"], known)
        if _name(f"{at}.name", function["name"]) in names:
            raise refused(f"{at}.name", f"{at}.name is {shown(function['name'])}, which an earlier function has")
        names.add(function["name"])
        text(f"{at}.description", function.get("description", ""))
        flag(f"{at}.strict", function.pop("strict", True))
        parameters = _schema(f"{at}.parameters", function.get("parameters", {"properties": {}}))
        if parameters.get("type", "object") != "object":
            raise refused(f"{at}.parameters", f"{at}.parameters has the type {shown(parameters['type'])}; arguments "
                          "are an object")  # fmt: skip
        closed = {} if COMBINED & parameters.keys() else {"additionalProperties": False}
        function["parameters"] = {"type": "object", **closed, **parameters}
        checked.append({"type": "function", "function": function})
    return checked


def tool_choice(name: str, value: object) -> str | dict:
    """A word, or {"name"} of a function."""
    if isinstance(value, str):
        return _one_of(name, value, CHOICES)
    fields = _object(name, value, {"type": True, "function": True})
    _one_of(f"{name}.type", fields["type"], ("function",))
    function = _object(f"{name}.function", fields["function"], {"name": True})
    return {"name": _name(f"{name}.function.name", function["name"])}


def check_together(values: dict) -> None:
    """Raises `ApiError` for a choice among tools that are not there, and for answers that have two ends."""
    choice = values.get("tool_choice", "auto")
    functions = [tool["function"]["name"] for tool in values.get("tools", ())]
    if isinstance(choice, dict) and choice["name"] not in functions:
        raise refused("tool_choice", f"tool_choice names {shown(choice['name'])}, which tools does not have")
    formed = values.get("response_format", {"type": "text"})["type"] != "text"
    if values.get("ignore_eos") and (formed or functions and choice != "none"):
        other = "response_format" if formed else "tools"
        raise refused("ignore_eos", f"ignore_eos is given, but {other} says where the answer ends: leave one out")


def error_of(at: str, what: str) -> ApiError:
    """The error for a schema of which no grammar can be made."""
    return refused(at, f"{at} cannot be kept to: {what}", "unsupported_schema")


NAMED = {"type": "string", "pattern": NAME}
TYPE = lambda *kinds: {"enum": [*kinds]}
JSON_SCHEMA = {
    "type": "object", "required": ["name", "schema"], "additionalProperties": False,
    "properties": {"name": NAMED, "schema": {"type": "object"}, "strict": FLAG.schema},
}  # fmt: skip
RESPONSE_FORMAT = Kind(
    response_format,
    {"type": "object", "required": ["type"], "additionalProperties": False,
     "properties": {"type": TYPE("text", "json_object", "json_schema"), "json_schema": JSON_SCHEMA}},
)  # fmt: skip
FUNCTION = {
    "type": "object", "required": ["name"], "additionalProperties": False,
    "properties": {"name": NAMED, "description": {"type": "string"}, "parameters": {"type": "object"},
                   "strict": FLAG.schema},
}  # fmt: skip
TOOL = {
    "type": "object", "required": ["type", "function"], "additionalProperties": False,
    "properties": {"type": TYPE("function"), "function": FUNCTION},
}  # fmt: skip
TOOLS = Kind(tools, {"type": "array", "minItems": 1, "maxItems": MAX_TOOLS, "items": TOOL})
CHOSEN = {
    "type": "object", "required": ["type", "function"], "additionalProperties": False,
    "properties": {
        "type": TYPE("function"),
        "function": {"type": "object", "required": ["name"], "properties": {"name": NAMED},
                     "additionalProperties": False},
    },
}  # fmt: skip
TOOL_CHOICE = Kind(tool_choice, {"anyOf": [{"enum": [*CHOICES]}, CHOSEN]})
