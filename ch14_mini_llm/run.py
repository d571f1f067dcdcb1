"""Generate text with GPT-2, or a Llama, on the book's own kernels.

    python ch14_mini_llm/run.py --tokens=15496,11,612,318 --max_new=64
    python ch14_mini_llm/run.py --prompt "Once upon a time" --temperature 0.8 --top_k 40 --seed 1
    python ch14_mini_llm/run.py --engine=naive --max_new=1 --trace
    python ch14_mini_llm/run.py --stats
    python ch14_mini_llm/run.py --batch requests.jsonl --watch
    python ch14_mini_llm/run.py --weights data/smollm2-135m.bin --chat

The text appears token by token; the last two lines are the final list of token ids and its text. With --json the
output is one JSON object. Everything else (progress, messages) goes to the standard error.

Exit codes: 0 done; 2 a mistake in the arguments, the environment, the weights or the backend, or an output that cannot
be written (one line says which); 130 interrupted; 141 whoever read the output has gone.
"""

from __future__ import annotations

import time

PROGRAM_START = time.perf_counter()  # before the slow imports

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == ROOT / "ch14_mini_llm":
    sys.path[0] = str(ROOT)  # started as a script: import from the repository, wherever we are
elif str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from ch14_mini_llm.chat import run_chat  # noqa: E402
from ch14_mini_llm.cli import Parser, cut, integer, number, run_program  # noqa: E402
from ch14_mini_llm.engine.dtypes import DTYPES, check_dtype  # noqa: E402
from ch14_mini_llm.engine.request import RequestError, Sampling, check_request  # noqa: E402
from ch14_mini_llm.engine.speculate import HOW, check_how  # noqa: E402
from ch14_mini_llm.levels import ENGINES  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import default_weights, load_weights  # noqa: E402
from ch14_mini_llm.offline import OPTIONS, batch_lines, run_lines  # noqa: E402
from ch14_mini_llm.show import Stream, notice_when_slow, print_stats, print_trace, rate  # noqa: E402
from ch14_mini_llm.start import BackendProblem, best_level, introduce, say, upload  # noqa: E402
from ch14_mini_llm.tokenizer.bpe import TokenizerError  # noqa: E402
from ch14_mini_llm.tokenizer.own import tokenizer_of  # noqa: E402

DEFAULT_PROMPT = "Hello, there is"  # GPT-2's 15496, 11, 612, 318
DEFAULT_MAX_NEW = 64


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    mistakes = (WeightsError, TokenizerError, BackendProblem)
    return run_program("run.py", lambda: run(build_parser().parse_args(argv)), mistakes)


def run(options: argparse.Namespace) -> int | None:
    """Load, generate, print: the program without its error handling; returns its exit code if that is not 0."""
    for name in ("tokens", "batch"):
        if options.chat and getattr(options, name) is not None:
            raise RequestError(f"--chat and --{name} are both given; a conversation is in words: use --prompt")
    if options.weights == "":
        raise RequestError("--weights is empty; give the path of a weight file, or leave it out")
    path = options.weights or default_weights()
    lines = batch_lines(options)
    config, tensors = load_weights(path)
    if options.engine is not None:
        check_dtype(options.engine, options.dtype)
    check_how(options.speculate, config.n_layer)
    if lines is not None:
        return run_lines(options, lines, path, config, tensors)
    tokenizer = tokenizer_of(config, tensors)
    if options.chat and options.prompt is None:
        return run_chat(options, path, config, tensors, tokenizer, build_sampling(options))
    prompt = prompt_tokens(options, tokenizer)
    sampling = build_sampling(options)
    check_request(config, prompt, options.max_new, sampling)

    backend, device = introduce(path, config)
    level = options.engine or best_level(config, backend, options.dtype)
    if sampling is not None:
        settings = ", ".join(f"{name} {vars(sampling)[name]}" for name in OPTIONS if vars(sampling)[name] is not None)
        say(f"sampling: {settings}")

    from ch14_mini_llm.levels.generate import generate

    model = upload(config, tensors, len(prompt) + options.max_new, level, options.dtype, options.speculate)
    del tensors
    for note in getattr(model, "notes", []):
        say(f"engine {level}: {note}")

    tokens, times = list(prompt), []
    stream = Stream(not options.json, tokenizer)
    start = time.perf_counter()
    with notice_when_slow(backend) as stop_notice:
        for token in generate(
            model, prompt, options.max_new, sampling, () if options.ignore_eos else tokenizer.stop_tokens
        ):
            times.append(time.perf_counter())
            stop_notice()
            stream.write([token] if len(times) > 1 or options.chat else [*prompt, token])
            tokens.append(token)
    end = time.perf_counter()
    stream.finish(tokens=[] if times or options.chat else prompt)

    first = times[0] if times else end
    result = {
        "prompt_tokens": list(prompt),
        "tokens": tokens,
        "text": tokenizer.decode(tokens),
        "stopped": "max_new" if len(times) == options.max_new else "end_of_text",
        "backend": backend,
        "device": device,
        "engine": level,
        "weights": str(path),
        "tokens_per_s": rate(start, times),
        "first_token_s": first - start,
        "first_token_from_program_start_s": first - PROGRAM_START,
    }
    if options.chat:
        result["answer"] = tokenizer.decode(tokens[len(prompt) :])
    if sampling is not None:
        result["seed"] = sampling.seed
    launches = model.trace_step(tokens[:-1] if times else tokens, sampling) if options.trace else []
    if options.json:
        if options.trace:
            result["launches"] = [
                {
                    "kernel": launch.name,
                    "defined_at": launch.defined_at,
                    "grid": list(launch.grid),
                    "block": list(launch.block),
                    "ms": launch.ms,
                }
                for launch in launches
            ]
        print(json.dumps(result))
        return
    if options.trace:
        print_trace(launches, len(tokens) - bool(times), level)
    if options.stats:
        print_stats(result, len(times))
    print(f"tokens: {','.join(map(str, tokens))}")
    print(f"text: {json.dumps(result['text'], ensure_ascii=False)}")


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="run.py",
        description="Generate text with GPT-2, or a Llama, on the book's own kernels.",
        epilog="Without --temperature, --top_k, --top_p and --seed every token is the most likely one; "
        "with --temperature=0 too.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tokens", metavar="IDS", help="the prompt as token ids, such as 15496,11,612,318 (that is the default)")
    add("--prompt", metavar="TEXT", help="the prompt as text, instead of --tokens")
    add("--batch", metavar="FILE", help="many requests, a JSON object a line (see ch14_mini_llm/offline.py)")
    add("--max_batch", metavar="N", type=integer, help="with --batch: sequences that run at a time (default 32)")
    add("--num_blocks", metavar="N", type=integer, help="with --batch: blocks of the KV cache (default: what fits)")
    add("--block_size", metavar="N", type=integer, help="with --batch: tokens a block: 4, 8, 16 … 256 (default 16)")
    add("--static", action="store_true", help="with --batch: padded batches that begin and end together, to compare")
    add("--watch", action="store_true", help="with --batch: show what each sequence does in each step")
    add("--chat", action="store_true", help="talk with a model that was made for it, or have one answer to --prompt")
    add("--max_new", metavar="N", type=integer, default=DEFAULT_MAX_NEW, help="how many tokens to add (default 64)")
    add("--weights", metavar="FILE", help="a weight file (default: data/gpt2-small.bin if there, else the tiny model)")
    add("--temperature", metavar="T", type=number, help="draw with the logits divided by T (default 1)")
    add("--top_k", metavar="K", type=integer, help="draw from the K most likely tokens only")
    add("--top_p", metavar="P", type=number, help="draw from the fewest tokens that have P of the probability")
    add("--seed", metavar="S", type=integer, help="start of the random numbers: the same seed, the same text")
    add("--ignore_eos", action="store_true", help="go on after <|endoftext|> (default: stop there and leave it out)")
    add("--engine", metavar="LEVEL", choices=list(ENGINES), help="default: fast on a GPU, kv without. " + "; ".join(
        f"{level} is {what}" for level, what in ENGINES.items()))  # fmt: skip
    add("--dtype", metavar="TYPE", choices=DTYPES["kv"], help="of the weights on the level kv: float32 (default), "
        "float16, which is half the memory, int8 or int4, which lose a little")  # fmt: skip
    add("--speculate", metavar="HOW", help=f"guess tokens, and check several in a step: the same text, sooner; {HOW} "
        "(default: not)")  # fmt: skip
    add("--stats", action="store_true", help="show tokens per second, time to the first token, backend, device")
    add("--trace", action="store_true", help="show every kernel launch of the last step")
    add("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def prompt_tokens(options: argparse.Namespace, tokenizer) -> list[int]:
    """The token ids of the prompt; raises `RequestError` and `TokenizerError`."""
    if options.tokens is not None and options.prompt is not None:
        raise RequestError("--tokens and --prompt are both given; give one of them")
    if options.prompt is not None:
        if not options.prompt:
            raise RequestError("--prompt is empty; give at least one character")
        if options.chat:
            return tokenizer.chat([{"role": "user", "content": options.prompt}])
        return tokenizer.encode(options.prompt)
    if options.tokens is None:
        return tokenizer.encode(DEFAULT_PROMPT)
    if not options.tokens.strip():
        raise RequestError("--tokens is empty; give at least one id, such as --tokens=15496,11,612,318")
    ids = []
    for position, item in enumerate(options.tokens.split(",")):
        try:
            ids.append(integer(item))
        except argparse.ArgumentTypeError:
            raise RequestError(
                f"--tokens: item {position} is {cut(item)}, not an integer that could be an id; "
                "give ids with commas between, such as --tokens=15496,11,612,318"
            ) from None
    return ids


def build_sampling(options: argparse.Namespace) -> Sampling | None:
    """The sampling settings, or None for the most likely token every time; raises `RequestError`."""
    given = {name: getattr(options, name) for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    given.setdefault("seed", int.from_bytes(os.urandom(4), "little"))  # shown, so that the text can be had again
    return Sampling(**given).plain()


if __name__ == "__main__":
    sys.exit(main())
