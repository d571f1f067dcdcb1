"""A file of requests through the engine: a line of JSON in, a line of JSON out, in order.

    {"prompt": "Once upon a time", "max_new": 20, "temperature": 0.8, "seed": 1}
    {"tokens": [15496, 11], "id": "a"}

A line has ``prompt`` or ``tokens``, and of `FIELDS` what it wants otherwise than the command line says. What the fields
of `DRAWING` mean and may be, `Sampling` says; those of `SCORES`, `Request`. A line that is no such request has a result
with an ``error``, and the others run.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext

from ch14_mini_llm.engine.plan import Result
from ch14_mini_llm.engine.request import Request, RequestError, Sampling, check_whole
from ch14_mini_llm.engine.sequence import Logprob
from ch14_mini_llm.files import FileError, open_input
from ch14_mini_llm.start import best_level, introduce, loading
from ch14_mini_llm.terminal import Terminal
from ch14_mini_llm.tokenizer.bpe import TokenizerError
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer, tokenizer_of
from ch14_mini_llm.watch import Watch

DRAWING = (
    "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "seed",
)  # fmt: skip
OPTIONS = ("temperature", "top_k", "top_p", "seed")  # those of `DRAWING` that ``run.py`` takes
SIZES = ("max_batch", "num_blocks", "block_size")  # of the engine, as ``run.py`` takes them
SCORES = ("logprobs", "prompt_logprobs")
FIELDS = ("id", "prompt", "tokens", "max_new", "priority", "stop_tokens", "ignore_eos", *DRAWING, *SCORES)
LARGEST = 2**53  # whole numbers that every reader of JSON has
MOST_BYTES = 1 << 30
GPT2 = GPT2Tokenizer()


def batch_lines(options) -> list[bytes] | None:
    """The lines of the file that ``run.py --batch`` names, None without it; raises `RequestError`."""
    if options.batch is None:
        for name in ("static", "watch", *SIZES):
            if getattr(options, name) not in (None, False):
                raise RequestError(f"--{name} is given without --batch; name a file of requests with --batch=FILE")
        return None
    for name in ("tokens", "prompt", "trace", "stats", "json"):
        if getattr(options, name) not in (None, False):
            raise RequestError(f"--batch and --{name} are both given; with --batch, requests and results are in files")
    if options.engine == "naive":
        raise RequestError("--batch and --engine=naive: batches run on the levels kv and fast")
    return read_lines(options.batch)


def read_lines(path: str | os.PathLike) -> list[bytes]:
    """The lines of a file that are not blank. Raises `RequestError` if it cannot be read."""
    try:
        with open_input(path) as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise RequestError(f"--batch: there is no file {path}; give a file with a request a line") from None
    except (OSError, FileError) as error:
        raise RequestError(f"--batch: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) > MOST_BYTES:
        raise RequestError(f"--batch: {path} has more than {MOST_BYTES} bytes; cut it into several files")
    lines = [line for line in data.splitlines() if line.strip()]
    if not lines:
        raise RequestError(f"--batch: {path} has no requests; give a file with one a line")
    return lines


def parse(line: bytes, defaults: dict, vocab_size: int, tokenizer=GPT2) -> tuple[object, Request]:
    """``(id, request)`` of a line. defaults: fields that it may leave out. Raises `RequestError`."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {str(error)[:100]}") from None
    if not isinstance(fields, dict):
        raise RequestError('not an object; write one such as {"prompt": "Once upon a time"}')
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise RequestError(f"field {unknown[0][:40]!r} is unknown; a request has {', '.join(FIELDS)}")
    if ("prompt" in fields) == ("tokens" in fields):
        raise RequestError("a request has one of the fields prompt and tokens")
    known = {**defaults, **{name: value for name, value in fields.items() if value is not None}}
    tokens = known["tokens"] if "tokens" in fields else _encoded(known["prompt"], tokenizer)
    if not isinstance(tokens, list):
        raise RequestError("tokens must be a list of ids, such as [15496, 11]")
    stop = known.get("stop_tokens", [])
    if not isinstance(stop, list):
        raise RequestError("stop_tokens must be a list of ids, such as [50256]")
    drawing = {name: known[name] for name in DRAWING if name in known}
    for name, value in ("max_new", known["max_new"]), ("priority", known.get("priority", 0)):
        check_whole(name, value, -LARGEST, LARGEST, f"up to {LARGEST}")
    sampling = Sampling(**drawing).seeded() if drawing else None
    if not known.get("ignore_eos"):
        stop = [*stop, *(token for token in tokenizer.stop_tokens if token < vocab_size)]
    scores = {name: known.get(name) for name in SCORES}
    return fields.get("id"), Request(tokens, known["max_new"], sampling, stop, known.get("priority", 0), **scores)


def _encoded(prompt, tokenizer) -> list[int]:
    if not isinstance(prompt, str) or not prompt:
        raise RequestError("prompt must be a text of at least one character")
    try:
        return tokenizer.encode(prompt)
    except TokenizerError as error:
        raise RequestError(str(error)) from None


def results(
    engine, lines: list[bytes], defaults: dict, on_end: Callable[[], None], tokenizer=GPT2
) -> Iterator[dict]:
    """Run the requests of ``lines``; yields a dict a line, in their order, each as soon as it can.

    on_end: called when a request has ended, whichever.
    """
    found: list[dict | None] = [None] * len(lines)
    running, shown = {}, 0
    for number, line in enumerate(lines):
        name = None
        try:
            name, request = parse(line, defaults, engine.model.vocab_size, tokenizer)
            running[engine.submit(request)] = number, name, request, Result(None)
        except RequestError as error:
            found[number] = {"line": number + 1, "id": name, "finish_reason": "error", "error": str(error)}
            on_end()
    while shown < len(lines):
        while shown < len(lines) and found[shown] is not None:
            yield found[shown]
            shown += 1
        for output in engine.step() if running else ():
            number, name, request, result = running[output.id]
            result.take(output)
            if output.finish_reason is not None:
                del running[output.id]
                found[number] = {
                    "line": number + 1, "id": name, "tokens": result.tokens, "text": tokenizer.decode(result.tokens),
                    "finish_reason": result.finish_reason, "error": result.error,
                    "seed": request.sampling.seed if request.sampling else None,
                }  # fmt: skip
                for field in SCORES:
                    if getattr(request, field) is not None:
                        found[number][field] = [as_json(score) for score in getattr(result, field) or ()]
                on_end()


def as_json(score: Logprob | None) -> dict | None:
    """A `Logprob` as JSON has it, which knows no infinity: null in its place."""
    if score is None:
        return None
    number = lambda value: value if math.isfinite(value) else None
    top = {str(token): number(value) for token, value in score.top.items()}
    return {"logprob": number(score.logprob), "rank": score.rank, "top": top}


def run_lines(options, lines: list[bytes], path, config, tensors) -> int:
    """Run a file of requests on the engine, as ``run.py``'s options say; returns the exit code."""
    defaults = {name: getattr(options, name) for name in ("max_new", *OPTIONS)}
    defaults = {name: value for name, value in defaults.items() if value is not None}
    backend, _ = introduce(path, config)
    from ch14_mini_llm.engine.engine import Engine

    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    with loading(config) as on_tensor:
        level = options.engine or best_level(config, backend, options.dtype)
        engine = Engine.of(config, tensors, level, on_tensor, options.dtype, static=options.static,
                           speculate=options.speculate, **sizes)  # fmt: skip
    defaults["ignore_eos"] = options.ignore_eos
    return run_batch(engine, lines, defaults, options.watch, tokenizer_of(config, tensors))


def run_batch(engine, lines: list[bytes], defaults: dict, watched: bool = False, tokenizer=GPT2) -> int:
    """Print a result a line, with progress on the standard error; returns the exit code, 1 if a request failed.

    watched: show what each sequence does in each step (`watch.Watch`) instead of a bar.
    """
    from tqdm import tqdm

    failed, terminal = 0, Terminal(sys.stderr)
    watch = Watch(engine.scheduler, terminal) if watched else nullcontext()
    if watched:
        engine.on_step = watch.step
    bar = tqdm(total=len(lines), unit=" requests", desc="running", leave=False, file=sys.stderr, disable=watched)
    with watch, bar:
        for result in results(engine, lines, defaults, bar.update, tokenizer):
            failed += result["error"] is not None
            terminal.clear()  # a picture in the way; the next step draws it again
            print(json.dumps(result, ensure_ascii=False), flush=True)
    if failed:
        print(f"{failed} of {len(lines)} requests have an error; see their results", file=sys.stderr)
    return 1 if failed else 0
