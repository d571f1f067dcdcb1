"""Where the time of one forward pass goes: every kernel on a timeline, and the largest of them by name.

    python ch14_mini_llm/profile.py
    python ch14_mini_llm/profile.py --length=512 --save timeline.svg
    python ch14_mini_llm/profile.py --with=nsys

The pass is run once before (that compiles the kernels), then measured, in `profiling.py`:

- ``trace``: our own, `common.trace`, on any machine; the median of three passes. On a GPU the device is held until a
  pass is queued (chapter 5), so that short kernels are timed and not the gaps that Python leaves between launches;
- ``nsys``, ``ncu``: NVIDIA's Nsight Systems and Nsight Compute, where they are installed and a GPU is the backend.
  The program starts itself again under the tool and matches the tool's launches with its own, in their order;
- ``auto`` (the default): nsys, else ncu, else trace.

Exit codes: 0 done; 2 a mistake in the arguments, the environment, the weights, the backend or the tool, or an output
that cannot be written (one line says which); 130 interrupted; 141 whoever read the output has gone.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == ROOT / "ch14_mini_llm":
    sys.path[0] = str(ROOT)  # started as a script: from the repository, and Python's own `profile` stays to be found

import argparse  # noqa: E402
import importlib.util  # noqa: E402

from ch14_mini_llm.cli import Parser, integer, run_program  # noqa: E402
from ch14_mini_llm.engine.request import RequestError, check_request  # noqa: E402
from ch14_mini_llm.files import FileError, check_output  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import default_weights, load_weights  # noqa: E402
from ch14_mini_llm.profiling import TOOLS, ToolError, measure, measure_with, pick_tool, write_child  # noqa: E402
from ch14_mini_llm.run import prompt_tokens  # noqa: E402
from ch14_mini_llm.start import BackendProblem, describe, pick_backend, say, shown, upload  # noqa: E402
from ch14_mini_llm.timeline import draw, format_profile  # noqa: E402
from ch14_mini_llm.tokenizer.bpe import TokenizerError  # noqa: E402
from ch14_mini_llm.tokenizer.own import tokenizer_of  # noqa: E402

PICTURES = (".svg", ".png")
NAMES = {"gpt2": "GPT-2", "llama": "a Llama"}


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    mistakes = (WeightsError, TokenizerError, BackendProblem, ToolError, FileError)
    return run_program("profile.py", lambda: run(build_parser().parse_args(argv)), mistakes)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="profile.py", description="Where the time of one forward pass of GPT-2 goes.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--tokens", metavar="IDS", help="the prompt as token ids, such as 15496,11,612,318 (that is the default)")
    add("--prompt", metavar="TEXT", help="the prompt as text, instead of --tokens")
    add("--length", metavar="N", type=integer, help="repeat or cut the prompt to N tokens")
    add("--weights", metavar="FILE", help="a weight file (default: data/gpt2-small.bin if there, else the tiny model)")
    add("--with", dest="tool", metavar="TOOL", default="auto", help="auto (default), trace, nsys or ncu")
    add("--save", metavar="FILE", help="draw the timeline to FILE.svg or FILE.png as well (needs matplotlib)")
    add("--child", metavar="FILE", help=argparse.SUPPRESS)  # what a tool starts: the launches go to FILE as JSON
    parser.set_defaults(chat=False)  # `prompt_tokens` asks
    return parser


def run(options: argparse.Namespace) -> None:
    """Measure one forward pass and show it: the program without its error handling."""
    path = check_usage(options)
    config, tensors = load_weights(path)
    tokens = prompt_tokens(options, tokenizer_of(config, tensors))
    if options.length is not None:
        if options.length >= config.n_ctx:  # before so many are in memory
            raise RequestError(f"--length is {options.length}; this model's context (n_ctx) leaves room for 1 to "
                               f"{config.n_ctx - 1} prompt tokens")  # fmt: skip
        tokens = (tokens * options.length)[: options.length]
    check_request(config, tokens, 1, None)
    backend, device, reason = pick_backend()
    if options.child:
        write_child(upload(config, tensors, len(tokens)), tokens, options.child)
        return
    say(f"weights: {shown(path)} ({describe(config)})")
    say(f"backend: {backend}, {device} ({reason})")
    tool = pick_tool(options.tool, backend)
    if tool != "trace":
        try:
            slices = measure_with(tool, path, tokens)
        except ToolError as error:
            if options.tool != "auto":
                raise
            say(f"{error}; taking our own event trace instead")
            tool = "trace"
    if tool == "trace":
        slices = measure(upload(config, tensors, len(tokens)), tokens)
    many = f"{len(tokens)} token{'' if len(tokens) == 1 else 's'}"
    title = f"one forward pass of {NAMES[config.architecture]} over {many}"
    how = f"{device}, timed by {'our own event trace' if tool == 'trace' else tool}"
    if options.save:
        draw(slices, f"{title}\n{describe(config)}\n{how}", options.save)
        say(f"written: {options.save}")
    print(f"{title}: {shown(path)}, {how}\n")
    print(format_profile(slices))


def check_usage(options: argparse.Namespace) -> Path:
    """The path of the weights; raises `RequestError` for whatever is wrong without looking into them."""
    if options.weights == "":
        raise RequestError("--weights is empty; give the path of a weight file, or leave it out")
    if options.tool not in ("auto", "trace", *TOOLS):
        raise RequestError(f"--with={options.tool}: it is auto, trace, nsys or ncu")
    if options.length is not None and options.length < 1:
        raise RequestError(f"--length is {options.length}; give at least 1")
    weights = Path(options.weights or default_weights())
    if options.save is not None:
        picture = Path(options.save)
        if picture.suffix not in PICTURES:
            raise RequestError(f"--save={options.save}: the name must end in {' or '.join(PICTURES)}")
        check_output(options.save, "--save", [weights])
        if importlib.util.find_spec("matplotlib") is None:
            raise RequestError("--save draws with matplotlib, which is not installed: pip install matplotlib")
    return weights


if __name__ == "__main__":
    sys.exit(main())
