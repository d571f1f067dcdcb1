"""The messages of a conversation: what a client sends, checked, as templates take it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from ch14_mini_llm.engine.request import shown
from ch14_mini_llm.server.errors import refused
from ch14_mini_llm.server.kinds import wrong

ROLES = {
    "developer": "system", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
FIELDS = {"role", "content", "name"}
MORE = {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}  # fields of some roles


def checked_messages(messages: object) -> list[dict]:
    """A conversation as templates take it: [{"role", "content"}], with "tool_calls" where the assistant has called
    something (arguments are objects there), "tool_call_id" and "name" where a result comes back. Raises `ApiError`,
    which names the message."""
    if not isinstance(messages, list) or not messages:
        raise refused("messages", f"messages is {shown(messages)}; it must be a list of messages, and not empty")
    turns, called = [], {}
    for number, message in enumerate(messages):
        at = f"messages[{number}]"
        if not isinstance(message, dict):
            raise refused(at, f"{at} is {shown(message)}; it must be an object with a role and a content")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise refused(f"{at}.role", f"{at}.role is {shown(role)}; it must be one of {', '.join(ROLES)}")
        for name, value in message.items():
            if name not in FIELDS | MORE.get(role, set()) and value is not None and value != []:
                raise refused(
                    f"{at}.{name}"[:80], f"{at}.{name[:60]} is not done here: leave it out", "unsupported_parameter"
                )
        calls = _calls(message.get("tool_calls"), f"{at}.tool_calls") if role == "assistant" else []
        nothing = calls and message.get("content") in (None, [])
        turn = {"role": ROLES[role], "content": "" if nothing else _content(message.get("content"), f"{at}.content")}
        if calls:
            turn["tool_calls"] = calls
            called |= {call["id"]: call["function"]["name"] for call in calls}
        if role == "tool":
            known = message.get("tool_call_id")
            if not isinstance(known, str) or known not in called:
                raise refused(f"{at}.tool_call_id", f"{at}.tool_call_id is {shown(known)}; it must be the id of a call "
                              "in a message before it")  # fmt: skip
            turn |= {"tool_call_id": known, "name": called[known]}
        turns.append(turn)
    return turns


def _calls(calls: object, at: str) -> list[dict]:
    """What the assistant has called: [{"id", "type", "function": {"name", "arguments"}}]."""
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise wrong(at, calls, "a list of calls")
    checked = []
    for number, call in enumerate(calls):
        here = f"{at}[{number}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or call.get("type", "function") != "function":
            raise wrong(here, call, 'a call, {"id", "type": "function", "function": {"name", "arguments"}}')
        for name, value in ("id", call.get("id")), ("function.name", function.get("name")):
            if not isinstance(value, str) or not value:
                raise wrong(f"{here}.{name}", value, "a text that is not empty")
        try:
            arguments = json.loads(function.get("arguments"))
        except (TypeError, ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise wrong(f"{here}.function.arguments", function.get("arguments"), "a JSON object, as a text")
        checked.append(
            {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return checked


def strings(value: object) -> Iterator[str]:
    """All texts in a value of JSON, names of fields among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield name
            yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)


def mapped(value: object, change: Callable[[str], str]) -> object:
    """A value of JSON with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name): mapped(one, change) for name, one in value.items()}
    return [mapped(one, change) for one in value] if isinstance(value, list) else value


def _content(content: object, at: str) -> str:
    """A message's text: as it is, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise refused(at, f"{at} is {shown(content)}; it must be a text, or a list of parts that are texts")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"a part of type {shown(kind)}" if isinstance(kind, str) and kind != "text" else shown(part)
            raise refused(
                f"{at}[{number}]", f"{at}[{number}] is {what}; this model reads texts only", "unsupported_value"
            )
        texts.append(part["text"])
    return "".join(texts)
