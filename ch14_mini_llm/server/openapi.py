"""/openapi.json: what the server takes and answers, made from the table of fields."""

from __future__ import annotations

from ch14_mini_llm.server.fields import BOTH, CHAT, TABLES
from ch14_mini_llm.server.kinds import ID, ID_LIST, SESSION

MESSAGES = {
    "type": "array", "minItems": 1,
    "items": {
        "type": "object", "required": ["role"],
        "properties": {
            "role": {"type": "string", "enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"type": ["string", "null"]}, "tool_call_id": {"type": ["string", "null"]},
            "tool_calls": {"type": "array", "items": {"type": "object", "required": ["id", "type", "function"]}},
        },
    },
}  # fmt: skip
PATHS = {"completions": "/v1/completions", CHAT: "/v1/chat/completions"}
USUAL = (400, 401, 413, 429, 500, 503, 504)  # errors of an endpoint that makes tokens


def description(model: str, vocab_size: int) -> dict:
    """The document, of OpenAPI 3.1."""
    paths = {PATHS[end]: {"post": _operation(f"create_{end}", _body(end, model), (*USUAL, 404, 409))} for end in BOTH}
    ids = ID_LIST | {"items": ID | {"maximum": vocab_size - 1}}
    tokens = {"type": "object", "properties": {"tokens": ids}, "required": ["tokens"]}
    one_of = [{"required": ["prompt"]}, {"required": ["messages"]}]
    prompt = {"type": "object", "properties": {"prompt": {"type": "string"}, "messages": MESSAGES}, "oneOf": one_of}
    named = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
    for body in (tokens, prompt, named):
        body["additionalProperties"] = False
    for name, body in ("tokenize", prompt), ("detokenize", tokens), ("abort", named):
        paths[f"/{name}"] = {"post": _operation(name, body, (400, 401, 413, 503))}
    for name in ("health", "ready", "metrics", "v1/models"):
        paths[f"/{name}"] = {"get": _operation(name.replace("/", "_"), None, (401, 503))}
    sessions = {"get": _operation("sessions", None, (400, 401, 503))}
    paths["/v1/sessions"] = sessions
    session = {"name": "name", "in": "path", "required": True, "schema": SESSION.schema}
    other = {"type": "object", "properties": {"from": SESSION.schema}, "required": ["from"]}
    other["additionalProperties"] = False
    paths["/v1/sessions/{name}"] = {
        "get": _operation("session", None, (400, 401, 404, 503)),
        "post": _operation("save_session", other, (400, 401, 404, 409, 413, 503)),
        "delete": _operation("delete_session", None, (400, 401, 404, 409, 503)), "parameters": [session],
    }  # fmt: skip
    chosen = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"] = {"get": _operation("model", None, (401, 404)) | {"parameters": [chosen]}}
    return {
        "openapi": "3.1.0", "info": {"title": f"Kernel by Kernel: {model}", "version": "1"}, "paths": paths,
        "components": {
            "schemas": {"Error": _error()}, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }  # fmt: skip


def _body(end: str, model: str) -> dict:
    properties = {}
    for name, field in TABLES[end].items():
        schema = {"messages": MESSAGES, "model": {"enum": [model]}}.get(name, field.kind.schema)
        schema = schema if field.required else {"anyOf": [schema, {"type": "null"}]}
        properties[name] = ({"description": field.meaning} if field.meaning else {}) | schema
    required = [name for name, field in TABLES[end].items() if field.required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _operation(name: str, body: dict | None, errors: tuple[int, ...]) -> dict:
    kind = "text/plain" if name == "metrics" else "application/json"
    events = {"text/event-stream": {"schema": {}}} if name.startswith("create") else {}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers = {"200": {"description": "done", "content": {kind: {"schema": {}}} | events}}
    answers |= {str(status): {"description": "an error", "content": error} for status in errors}
    operation = {"operationId": name, "responses": answers}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def _error() -> dict:
    text = {"type": ["string", "null"]}
    properties = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    error = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
