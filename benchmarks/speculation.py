"""Guesses of next tokens: what they are worth, for texts that repeat themselves and for others.

    python benchmarks/speculation.py [--weights FILE] [--dtype float16] [--how ngram,layers:6,…] [--new 128]
                                     [--repeats 3] [--out benchmarks/results]
    python benchmarks/speculation.py --page      # draws what was measured, and writes the tables of the page

Prints the figures and writes them to ``<out>/<device>/speculation.json``. Each prompt of ``speculation_prompts.json``
is answered alone, with the likeliest token each time, up to its end or ``--new`` tokens: without guesses, and in each
way of `engine.speculate.HOW` that is asked for. Prompts are in the prefix cache by then. The time is from the first
token to the last, and the ways take turns. Tokens have to be the same in all ways.

The default is SmolLM2 (`make smollm2`), without a GPU with weights in float16. Run it on an idle machine.

Exit codes: 0 all measured; 1 a way made other tokens (nothing is written); 2 bad arguments.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before numba.cuda)

# isort: split
from tqdm import tqdm  # noqa: E402

from benchmarks.gpt2 import _digits  # noqa: E402
from benchmarks.ladders import RESULTS, device_folder  # noqa: E402
from benchmarks.plots import COLOURS, pyplot, result_files, save, table_block  # noqa: E402
from ch14_mini_llm.engine.dtypes import DTYPES  # noqa: E402
from ch14_mini_llm.engine.engine import Engine  # noqa: E402
from ch14_mini_llm.engine.models import model_of  # noqa: E402
from ch14_mini_llm.engine.request import Request, RequestError  # noqa: E402
from ch14_mini_llm.engine.speculate import MOST  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import load_weights  # noqa: E402
from ch14_mini_llm.start import calm_collector  # noqa: E402
from ch14_mini_llm.tokenizer.bpe import TokenizerError  # noqa: E402
from ch14_mini_llm.tokenizer.own import tokenizer_of  # noqa: E402
from common import bench  # noqa: E402

SMOLLM2 = ROOT / "data" / "smollm2-135m.bin"
PROMPTS = Path(__file__).with_name("speculation_prompts.json")
GROUPS = {"repeating": "repeats its prompt", "other": "does not"}
PAGE = ROOT / "ch14_mini_llm" / "speculation.md"
PICTURE = ROOT / "ch14_mini_llm" / "img" / "speculation.svg"
BLOCK = table_block("speculation")
NONE = "none"


class Wrong(RuntimeError):
    """Tokens that are not those without guesses."""


class Way:
    """An engine for one sequence that guesses in one way, and how long its steps take: ``steps[rows]``, seconds."""

    def __init__(self, model, level, how):
        self.engine = Engine(model, level, max_batch=1 + MOST, speculate=None if how == NONE else how)
        self.engine.on_step = lambda plan, outputs: self._plans.append(plan)
        self.steps, self._plans = defaultdict(list), []

    def answer(self, request):
        """``(tokens, seconds from the first to the last, steps behind the first, guesses, right ones)``."""
        engine, tokens, times = self.engine, [], []
        before = engine.stats()
        engine.submit(request)
        while not engine.idle:
            self._plans.clear()
            start = time.perf_counter()
            outputs = engine.step()
            end = time.perf_counter()
            new = [token for output in outputs for token in output.tokens]
            tokens += new
            times += [end] * bool(new)
            (plan,) = self._plans
            if plan is not None and len(tokens) > len(new) and len(plan.sampling) == plan.rows:
                self.steps[plan.rows].append(end - start)
        counts = [engine.stats()[name] - before[name] for name in
                  ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")]  # fmt: skip
        return tokens, times[-1] - times[0], len(times) - 1, *counts


def tokens_of(tokenizer, messages):
    """A conversation as tokens; as plain text for a model that was not made for one."""
    try:
        return tokenizer.chat(messages)
    except TokenizerError:
        return tokenizer.encode("\n\n".join(message["content"] for message in messages) + "\n\n")


def measure(options, progress=lambda text: None):
    """The figures as a dict for JSON. Raises `RequestError`, `WeightsError` and `Wrong`."""
    config, tensors = load_weights(options.weights)
    tokenizer = tokenizer_of(config, tensors)
    level = "fast" if common.BACKEND == "gpu" else "kv"
    model = model_of(config, tensors, level, dtype=options.dtype if level == "kv" else None)
    ways = {how: Way(model, level, how) for how in [NONE, *options.how]}
    rows = []
    for group, prompts in json.loads(PROMPTS.read_text(encoding="utf-8")).items():
        for prompt in prompts:
            text = tokens_of(tokenizer, prompt["messages"])
            request = Request(text, min(options.new, config.n_ctx - len(text)), None, tokenizer.stop_tokens)
            row = {"group": group, "name": prompt["name"], "prompt": len(text)}
            runs = {how: [] for how in ways}
            for _ in range(1 + options.repeats):
                for how, way in ways.items():
                    progress(f"{prompt['name']}, {how}")
                    runs[how].append(way.answer(request))
            wanted = runs[NONE][0][0]
            if any(run[0] != wanted for some in runs.values() for run in some):
                raise Wrong(f"{prompt['name']}: not the tokens that there are without guesses")
            row["tokens"] = len(wanted)
            for how, some in runs.items():
                seconds = [run[1] for run in some[1:]]  # the first brings the prompt into the cache
                row[how] = {
                    "ms": [*map(_digits, sorted(1e3 * one for one in seconds))], "steps": some[-1][2],
                    "guesses": some[-1][3], "right": some[-1][4],
                }  # fmt: skip
            rows.append(row)
    found = {"rows": rows, "steps_ms": {}}
    of_all = defaultdict(list)
    for way in ways.values():
        if way.engine.speculation.draft is None:
            for n, times in way.steps.items():
                of_all[n] += times
    found["steps_ms"] = {n: _digits(1e3 * statistics.median(of_all[n])) for n in sorted(of_all)}
    return found


# --- what is read ----------------------------------------------------------------------------------------------------


def gain(rows, how):
    """How many times as fast a way is as without guesses, over all of some rows."""
    seconds = lambda way: sum(statistics.median(row[way]["ms"]) for row in rows)
    return seconds(NONE) / seconds(how)


def ways_of(result):
    """The ways of a result but the one without guesses."""
    return [name for name in result["how"] if name != NONE]


def format_table(result):
    """The figures as lines of Markdown."""
    ways = ways_of(result)
    lines = ["| | tokens | none, tokens/s | " + " | ".join(f"{how} | right" for how in ways) + " |"]
    lines.append("|---|" + "---:|" * (2 + 2 * len(ways)))
    for group, title in GROUPS.items():
        rows = [row for row in result["rows"] if row["group"] == group]
        for row in rows:
            cells = [row["name"], f"{row['tokens']}", bench.short(rate([row], NONE))]
            lines.append("| " + " | ".join([*cells, *_cells([row], ways)]) + " |")
        cells = [f"*all whose answer {title}*", f"{sum(row['tokens'] for row in rows)}", bench.short(rate(rows, NONE))]
        lines.append("| " + " | ".join([*cells, *_cells(rows, ways)]) + " |")
    what = "times as fast as without guesses, and the share of guesses that were right; medians of "
    what += f"{result['repeats']}, likeliest tokens, one text at a time"
    return [*lines, "", f"*{result['device']}, {result['model']}, level `{result['level']}`: {what}.*"]


def _cells(rows, ways):
    cells = []
    for how in ways:
        guesses = sum(row[how]["guesses"] for row in rows)
        right = f"{100 * sum(row[how]['right'] for row in rows) / guesses:.0f} %" if guesses else "–"
        cells += [f"{gain(rows, how):.2f}", right]
    return cells


def rate(rows, how):
    """Tokens a second behind the first of each row."""
    return 1e3 * sum(row["tokens"] - 1 for row in rows) / sum(statistics.median(row[how]["ms"]) for row in rows)


def steps_table(result):
    """What a step costs by its rows, as lines of Markdown."""
    known = result["steps_ms"]
    lines = ["| rows of a step | " + " | ".join(known) + " |", "|---|" + "---:|" * len(known)]
    lines.append("| ms | " + " | ".join(bench.short(ms) for ms in known.values()) + " |")
    lines.append("| of one row | " + " | ".join(f"{ms / known['1']:.2f}" for ms in known.values()) + " |")
    return [*lines, "", f"*{result['device']}, {result['model']}, level `{result['level']}`, medians.*"]


TABLES = {"gains": format_table, "steps": steps_table}


def filled(page, folder=RESULTS):
    """The page's text with its tables of the committed figures."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in result_files(folder, "speculation.json")]

    def table(match):
        lines = [line for result in results for line in ["", *TABLES[match[2]](result)]]
        return match[1] + "\n".join([*lines[1:], ""]) + match[3]

    return BLOCK.sub(table, page)


def draw(results, path):
    """Draw how many times as fast each way is, a panel a device, to the SVG file ``path``."""
    figure, axes = pyplot().subplots(1, len(results), figsize=(1 + 3.7 * len(results), 3.4), squeeze=False)
    colours = COLOURS[2], COLOURS[4], COLOURS[6], COLOURS[1], COLOURS[5]
    for axis, result in zip(axes[0], results):
        rows, ways = result["rows"][::-1], ways_of(result)
        height = 0.8 / len(ways)
        for i, (how, colour) in enumerate(zip(ways, colours)):
            places = [row + 0.4 - (i + 0.5) * height for row in range(len(rows))]
            axis.barh(places, [gain([row], how) for row in rows], height, color=colour, label=how)
        axis.axvline(1, color="#555", lw=0.8)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.tick_params(left=False)
        axis.set_xlabel("times as fast as without guesses")
        axis.set_title(f"{result['model']}\n{result['device'].replace('NVIDIA ', '')}", fontsize=9)
        axis.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    known = {label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(known.values(), known.keys(), loc="lower center", ncols=5, frameon=False)
    save(figure, path)


def write_page():
    """Part of ``make plots``."""
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))
    draw([json.loads(path.read_text(encoding="utf-8")) for path in result_files(RESULTS, "speculation.json")], PICTURE)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--page"]:
        return write_page()
    parser = argparse.ArgumentParser(prog="benchmarks/speculation.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", type=Path, default=SMOLLM2, help="a weight file (data/smollm2-135m.bin)")
    add("--dtype", choices=DTYPES["kv"], default="float16", help="of the weights on the level kv (float16)")
    add("--how", type=lambda text: text.split(","), default=["ngram"], metavar="HOW,…", help="ways to guess (ngram)")
    add("--new", type=int, default=128, help="tokens of an answer, at most (128)")
    add("--repeats", type=int, default=3, help="of each, of which the median counts (3)")
    add("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    options = parser.parse_args(argv)
    if options.new < 2 or options.repeats < 1:
        parser.error("--new must be at least 2, and --repeats 1")
    if not options.weights.exists():
        parser.error(f"--weights: {options.weights} is not there; make smollm2 fetches SmolLM2")
    path = options.out / device_folder() / "speculation.json"
    try:
        make_output(path, "--out")
    except FileError as error:
        parser.error(str(error))
    calm_collector()
    with tqdm(disable=None) as bar:

        def progress(text):
            bar.set_description(text)
            bar.update()

        try:
            found = measure(options, progress)
        except (RequestError, WeightsError) as error:
            parser.error(str(error))
        except Wrong as error:
            print(error, file=sys.stderr)
            raise SystemExit(1) from None
    level = "fast" if common.BACKEND == "gpu" else "kv"
    result = {
        "model": options.weights.stem, "device": bench.device_name(), "level": level, "new": options.new,
        "repeats": options.repeats, "how": [NONE, *options.how], **found,
    }  # fmt: skip
    write_text(path, json.dumps(result, indent=1) + "\n")
    result = json.loads(path.read_text(encoding="utf-8"))
    print("\n".join([*format_table(result), "", *steps_table(result), "", f"written: {path}"]))


if __name__ == "__main__":
    main()
