"""A conversation in the terminal: what you say, and what the model answers, as it comes.

Each turn is a request with the whole conversation for its prompt. What was there before lies in the engine's prefix
cache, so only the new words are read. Ctrl-C ends an answer, an empty line or the end of the input the conversation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ch14_mini_llm.engine.request import Request, RequestError, Sampling
from ch14_mini_llm.engine.speculate import places_for_one
from ch14_mini_llm.start import best_level, introduce, loading, say
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer, StreamDecoder

BLOCK_SIZE = 16


class Chat:
    """A conversation with a model. engine: `engine.engine.Engine`, whose pool has room for ``n_ctx`` tokens.

    messages: what was said, as the tokenizer's form has it. reason: why the last answer ended: "stop", "length" (of
    max_new, or the context) or "interrupted".
    """

    def __init__(self, engine, tokenizer: GPT2Tokenizer, max_new: int, sampling: Sampling | None = None) -> None:
        self.engine, self.tokenizer, self.max_new, self.sampling = engine, tokenizer, max_new, sampling
        self.messages: list[dict] = []
        self.reason = ""

    def say(self, text: str) -> Iterator[str]:
        """Say something; yields the answer in pieces. Left before its end, the answer ends where it is.

        Raises `RequestError` where the conversation has outgrown the context; then nothing has been said.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.tokenizer.chat(messages)
        room = self.engine.model.n_ctx - len(prompt)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(prompt)} tokens and the context (n_ctx) is {self.engine.model.n_ctx}: "
                "begin a new one"
            )
        request = Request(prompt, min(self.max_new, room), self.sampling, self.tokenizer.stop_tokens)
        return self._answer(messages, request)

    def _answer(self, messages: list[dict], request: Request) -> Iterator[str]:
        decoder, pieces, self.reason = StreamDecoder(self.tokenizer), [], "interrupted"
        id = self.engine.submit(request)
        try:
            while self.reason == "interrupted":
                for output in self.engine.step():
                    if output.error is not None:
                        raise RequestError(output.error)
                    for token in output.tokens:
                        pieces.append(decoder.push(token))
                        yield pieces[-1]
                    self.reason = output.finish_reason or self.reason
            pieces.append(decoder.finish())
            yield pieces[-1]
        finally:
            self.engine.abort(id)
            while not self.engine.idle:
                self.engine.step()
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]


def run_chat(options, path, config, tensors, tokenizer, sampling: Sampling | None) -> None:
    """``run.py --chat``: read lines from the standard input, write answers to the standard output."""
    if options.json or options.trace or options.stats:
        raise RequestError("--json, --trace and --stats are of one answer: give --prompt as well")
    tokenizer.chat([{"role": "user", "content": "Hello"}])  # whether the model has a form for it, before it is loaded
    if options.engine == "naive":
        raise RequestError("--chat and --engine=naive: a conversation runs on the levels kv and fast")
    backend, _ = introduce(path, config)
    level = options.engine or best_level(config, backend, options.dtype)
    from ch14_mini_llm.engine.engine import Engine

    with loading(config) as on_tensor:
        engine = Engine.of(
            config, tensors, level, on_tensor, options.dtype, max_batch=places_for_one(options.speculate),
            block_size=BLOCK_SIZE, num_blocks=-(-config.n_ctx // BLOCK_SIZE) + 1, speculate=options.speculate,
        )  # fmt: skip
    chat = Chat(engine, tokenizer, options.max_new, sampling)
    say("an empty line ends the conversation, Ctrl-C an answer")
    while line := _line():
        try:
            for piece in chat.say(line):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass  # what was said until then stays said
        except RequestError as error:
            say(f"run.py: {error}")
        print(" …" if chat.reason != "stop" else "", flush=True)


def _line() -> str:
    """The next line of the standard input without white space around it; empty at its end."""
    if sys.stdin is None:
        return ""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip()
    except UnicodeDecodeError:
        raise RequestError("the standard input is not UTF-8; type or send text") from None
