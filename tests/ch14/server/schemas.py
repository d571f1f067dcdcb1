"""JSON schemas for tests, and whether a value keeps to one: by hand, since nothing here needs `jsonschema`."""

from __future__ import annotations

import re

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "home"], "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object", "required": ["x"],
            "properties": {"x": {"type": "number", "minimum": -9, "maximum": 9}, "ok": {"type": "boolean"}},
            "additionalProperties": False,
        },
    },
}  # fmt: skip
SCHEMAS = [
    PERSON, {"enum": ["yes", "no", 5, None]}, {"type": "boolean"}, {"const": {"a": [1, "x"]}},
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 99}, "minItems": 2, "maxItems": 4},
    {"type": "string", "minLength": 2, "maxLength": 5}, {"type": "string", "pattern": "^[a-c]{2}-[0-9]+!$"},
    {"type": ["integer", "null"], "minimum": 1, "maximum": 3},
]  # fmt: skip
TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
    "number": (int, float),
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {
        "name": "weather", "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {
            "city": {"type": "string", "maxLength": 10}, "unit": {"enum": ["C", "F"]},
        }, "required": ["city", "unit"]},
    }},
    {"type": "function", "function": {"name": "ping"}},
]  # fmt: skip


def keeps_to(value, schema, root=None):
    """Whether a value keeps to a schema, of the words that `SCHEMAS` uses."""
    root = root or schema
    if "$ref" in schema:
        return keeps_to(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(keeps_to(value, one, root) for one in schema["anyOf"])
    same = lambda one: one == value and type(one) is type(value)
    if "const" in schema or "enum" in schema:
        return any(map(same, schema.get("enum", [schema.get("const")])))
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, TYPES[kind]) and (kind == "boolean") == isinstance(value, bool) for kind in kinds):
        return False
    if isinstance(value, dict):
        known = schema.get("properties", {})
        return (
            set(schema.get("required", ())) <= set(value)
            and (schema.get("additionalProperties", True) or set(value) <= set(known))
            and all(keeps_to(one, known[name], root) for name, one in value.items() if name in known)
        )
    if isinstance(value, list):
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9)
        return fits and all(keeps_to(one, schema.get("items", {"anyOf": [{}]}), root) for one in value)
    if isinstance(value, str):
        fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
        return fits and re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return schema.get("minimum", -1e99) <= value <= schema.get("maximum", 1e99)
    return True
