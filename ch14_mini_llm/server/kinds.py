"""Kinds of values that a request's fields can have: how each is checked, and its JSON schema."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ch14_mini_llm.engine.request import MAX_BIASES, NUMBERS, SMALLEST, RequestError, Sampling, shown
from ch14_mini_llm.server.errors import ApiError, refused

MAX_STOPS, MAX_STOP_LENGTH = 16, 1000  # texts, characters
MAX_PROMPTS = 128


SESSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Kind:
    """How a value is checked, and its JSON schema. check: (name, value) -> value; raises `ApiError`."""

    check: Callable[[str, object], object]
    schema: dict


def wrong(name: str, value: object, limit: str) -> ApiError:
    return refused(name, f"{name} is {shown(value)}; it must be {limit}")


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def whole(low: int, high: int) -> Kind:
    """An integer from low to high."""

    def check(name, value):
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            value = int(value)  # JSON knows no integers: 5.0 is 5
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(name, value, f"a whole number from {low} to {high}")
        return value

    return Kind(check, {"type": "integer", "minimum": low, "maximum": high})


def setting(name: str, value: object) -> object:
    """A number of `Sampling`, which knows its limits."""
    try:
        Sampling(**{name: value})
    except RequestError as error:
        raise refused(name, str(error)) from None
    return value


def number(name: str) -> Kind:
    """The kind of a setting that `NUMBERS` has."""
    low, high, _ = NUMBERS[name]
    least = {"exclusiveMinimum": 0} if low == SMALLEST else {"minimum": low}
    return Kind(setting, {"type": "number", **least, "maximum": high})


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    return value


def session(name: str, value: object) -> str:
    """The name of a session, which is that of a file as well."""
    if not isinstance(value, str) or not SESSION_NAME.fullmatch(value):
        raise wrong(name, value, "1 to 64 letters, digits, dots, underlines and hyphens, a letter or digit first")
    return value


def stops(name: str, value: object) -> list[str]:
    """A text, or some."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(one, str) and one for one in texts):
        raise wrong(name, value, "a text that is not empty, or a list of such")
    if len(texts) > MAX_STOPS:
        raise refused(name, f"{name} has {len(texts)} texts; it can have {MAX_STOPS} at most")
    if any(len(one) > MAX_STOP_LENGTH for one in texts):
        raise refused(name, f"a text of {name} is longer than {MAX_STOP_LENGTH} characters")
    return texts


def token_ids(name: str, value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**31 for one in value):
        raise wrong(name, value, "a list of token ids")
    return value


def biases(name: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object that maps token ids to numbers")
    return setting(name, value)


def stream_options(name: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise wrong(name, value, 'an object such as {"include_usage": true}')
    for key, one in value.items():
        if key not in ("include_usage", "include_obfuscation"):
            raise refused(f"{name}.{key}", f"{name}.{key} is not known; {name} can have include_usage")
        flag(f"{name}.{key}", one)
    if value.get("include_obfuscation"):
        raise refused(f"{name}.include_obfuscation", "include_obfuscation is not done here: leave it out, or false")
    return value


def label(name: str, value: object) -> object:
    """What a client keeps its own records by; it is to change nothing."""
    known = isinstance(value, str) or isinstance(value, dict) and all(isinstance(one, str) for one in value.values())
    if not known or len(str(value)) > 10_000:
        raise wrong(name, value, "a text, or an object of texts, of 10000 characters at most")
    return value


def prompts(name: str, value: object) -> list[str | list[int]]:
    """A text, a list of token ids, or a list of texts or of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise wrong(name, value, "a text, a list of token ids, or a list of such, and not empty")
    if all(type(one) is int for one in value):
        return [token_ids(name, value)]
    if len(value) > MAX_PROMPTS:
        raise refused(name, f"{name} has {len(value)} prompts; a request can have {MAX_PROMPTS} at most")
    for one in value:
        if not isinstance(one, str) and not (isinstance(one, list) and one and token_ids(name, one)):
            raise wrong(name, one, "a text, or a list of token ids that is not empty")
    return value


def only(*values: object) -> Kind:
    """One of some values that ask for nothing more than is done."""

    def check(name, value):
        if not any(value == one and type(value) is type(one) for one in values):
            raise refused(name, f"{name} is {shown(value)}; only {', '.join(map(shown, values))} is done here: leave "
                          "it out", "unsupported_value")  # fmt: skip
        return value

    return Kind(check, {"enum": [*values]})


def never(why: str) -> Kind:
    """A field that is refused whatever its value."""

    def check(name, value):
        raise refused(name, f"{name} is not done here ({why}): leave it out", "unsupported_parameter")

    return Kind(check, {"type": "null", "description": why})


FLAG, TEXT = Kind(flag, {"type": "boolean"}), Kind(text, {"type": "string"})
LABEL = Kind(
    label, {"type": ["string", "object"], "additionalProperties": TEXT.schema, "maxProperties": 16, "maxLength": 512}
)
SESSION = Kind(session, {"type": "string", "pattern": f"^{SESSION_NAME.pattern}$"})
STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
STOPS = Kind(stops, {"oneOf": [STOP, {"type": "array", "maxItems": MAX_STOPS, "items": STOP}]})
ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
ID_LIST = {"type": "array", "items": ID}
IDS = Kind(token_ids, ID_LIST)
BIASES = Kind(
    biases,
    {
        "type": "object", "maxProperties": MAX_BIASES, "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    },
)  # fmt: skip
STREAM = Kind(
    stream_options,
    {"type": "object", "properties": {"include_usage": FLAG.schema}, "additionalProperties": False},
)  # fmt: skip
SOME = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS}
SOME_IDS = ID_LIST | {"minItems": 1}
PROMPTS = Kind(
    prompts,
    {"anyOf": [TEXT.schema, SOME_IDS, SOME | {"items": TEXT.schema}, SOME | {"items": SOME_IDS}]},
)  # fmt: skip
TOP_K = Kind(setting, {"type": "integer", "minimum": -1, "maximum": 2**31 - 1})
MESSAGES = Kind(lambda name, value: value, {"type": "array", "items": {"type": "object"}})  # see `prompts.conversation`
