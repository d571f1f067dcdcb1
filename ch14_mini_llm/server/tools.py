"""Calls of functions as a model writes them: how it is told of them, and what its text says.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

That is the form of Hermes, which Qwen and others were trained on. A template that has it is given the tools; any other
model is told in a system message, and reads results in a user's turn, since a template may know no other roles.

Source: NousResearch, "Hermes-Function-Calling", for the form.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import NamedTuple

from ch14_mini_llm.server.text import overlap

TAG = "<tool_call>"
BEGIN, HEAD, END, BETWEEN = TAG + "\n", '{{"name": "{name}", "arguments": ', "}\n</tool_call>", "\n"
NAMED = re.compile(re.escape(HEAD.format(name="NAME")).replace("NAME", '([^"]*)'))
MOST_CALLS = 16  # of an answer
TOLD = """You can use these functions. Each line describes one, as JSON:
<tools>
{tools}
</tools>

To use one, write nothing but its name and its arguments, as JSON between these tags:
<tool_call>
{{"name": "its name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


class CallDelta(NamedTuple):
    """What is new of a call. index: which of the answer's. id, name: with the first of it, then None. arguments: a
    piece of JSON."""

    index: int
    id: str | None
    name: str | None
    arguments: str


def joined(deltas: list[CallDelta]) -> list[CallDelta]:
    """One for each call, in order."""
    calls: dict[int, CallDelta] = {}
    for new in deltas:
        old = calls.get(new.index)
        calls[new.index] = new if old is None else old._replace(arguments=old.arguments + new.arguments)
    return list(calls.values())


def call_json(call: CallDelta) -> dict:
    """A call as OpenAI's answers have it, without its index."""
    function = {"name": call.name, "arguments": call.arguments}
    if call.id is None:
        return {"function": {"arguments": call.arguments}}
    return {"id": call.id, "type": "function", "function": function}


class CallReader:
    """Takes an answer's text apart as it comes. n_whole: calls that have ended.

    What may be the beginning of a tag is held back, as a stop text is; so is a call until its name is known. only:
    there is no text but calls, so that a tag which is cut off is none either.
    """

    def __init__(self, only: bool = False) -> None:
        self.n_whole, self._only, self._held, self._calls, self._named = 0, only, "", False, False

    def push(self, text: str) -> tuple[str, list[CallDelta]]:
        """``(content, deltas)`` that leave now."""
        self._held += text
        content, deltas = "", []
        while True:
            if not self._calls:
                left, found = self._until(BEGIN)
                content += left if self.n_whole == 0 else ""  # between calls there is a line's end
                if not found:
                    return content, deltas
                self._calls, self._named = True, False
            if not self._named:
                head = NAMED.match(self._held)
                if head is None:
                    return content, deltas
                self._held, self._named = self._held[head.end() :], True
                deltas.append(CallDelta(self.n_whole, "call_" + secrets.token_hex(12), head[1], ""))
            left, found = self._until(END)
            if left:
                deltas.append(CallDelta(self.n_whole, None, None, left))
            if not found:
                return content, deltas
            self._calls, self.n_whole = False, self.n_whole + 1

    def finish(self) -> tuple[str, list[CallDelta]]:
        """What was held back, at the end; of a call that has no name yet, nothing."""
        held, self._held = self._held, ""
        if not self._calls:
            return "" if self._only or self.n_whole else held, []
        return "", [CallDelta(self.n_whole, None, None, held)] if self._named and held else []

    def _until(self, mark: str) -> tuple[str, bool]:
        """The text in front of a mark, and whether it is there; else what cannot be the mark's beginning."""
        left, found, rest = self._held.partition(mark)
        if found:
            self._held = rest
            return left, True
        keep = overlap(left, mark)
        self._held = left[len(left) - keep :]
        return left[: len(left) - keep], False


def told(turns: list[dict], tools: list[dict]) -> list[dict]:
    """A conversation for a model whose form knows no tools: three roles, and texts only."""
    plain: list[dict] = []
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if role == "assistant" and turn.get("tool_calls"):
            content = "\n".join([*([content] if content else []), *map(_spelled, turn["tool_calls"])])
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += f"\n{content}"
                continue
        plain.append({"role": role, "content": content, "results": turn["role"] == "tool"})
    if tools:
        text = TOLD.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if plain[0]["role"] == "system":
            plain[0]["content"] += f"\n\n{text}"
        else:
            plain.insert(0, {"role": "system", "content": text})
    return [{"role": turn["role"], "content": turn["content"]} for turn in plain]


def _spelled(call: dict) -> str:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return BEGIN + HEAD.format(name=function["name"]) + arguments + END
