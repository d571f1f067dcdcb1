"""Draw what ``benchmarks/batching.py`` measured, and write its tables into chapter 14's pages: ``batching.py --plot``.

A page has ``<!-- batching NAME -->``, and what stands between that and ``<!-- end -->`` is the table NAME: static,
blocks or sequences, of each device that has a ``batching.json``. Between ``<!-- picture -->`` and ``<!-- end -->``
stands what the command above it shows. The plots are ``ch14_mini_llm/img/batching_NAME.svg``.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.plots import COLOURS, LIBRARY_COLOUR, pyplot, result_files, save, table_block  # noqa: E402
from common.bench import short  # noqa: E402

CHAPTER = ROOT / "ch14_mini_llm"
PAGES = [CHAPTER / name for name in ("batching.md", "continuous_batching.md", "paged_kv.md")]
BLOCK = table_block("batching")
PICTURE = re.compile(
    r"(```\npython (ch14_mini_llm/run\.py [^\n]*--watch[^\n]*)\n```\n\n<!-- picture -->\n).*?(<!-- end -->)", re.DOTALL
)
COLUMNS = 92
QUIET = 0.25  # load average a core before a measurement
PADDING_COLOUR, OURS = "#d8c7cf", COLOURS[2]


def measured(results):
    """The figures of each device, GPUs first. Raises FileNotFoundError if there are none."""
    paths = result_files(results, "batching.json")
    if not paths:
        raise FileNotFoundError(f"{results} has no batching.json of any device: run benchmarks/batching.py first")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def name_of(result):
    return result["device"].replace("NVIDIA ", "")


def how(result):
    """Where and how it was measured, in words."""
    load = result["load"][0] if result.get("load") else 0
    quiet = load <= QUIET * result.get("cores", 2)
    busy = "" if quiet else f", on a machine that had other work (load average {load:.1f})"
    model = f"{result['model']}, level `{result['level']}`"
    return f"{name_of(result)}, {model}, medians of {result['repeats']} rounds{busy}"


# --- the tables ------------------------------------------------------------------------------------------------------


def static_table(result):
    """Continuous against static batches, as lines of Markdown."""
    static = result["static"]
    lines = ["| batches | tokens/s | steps | rows computed | of them padding |", "|---|---:|---:|---:|---:|"]
    for row in static["rows"]:
        share = f"{row['padding_rows']} ({100 * row['padding_share']:.0f} %)" if row["padding_rows"] else "0"
        lines.append(f"| {row['name']} | {short(row['tokens_s'][0])} | {row['steps']} | {row['rows']} | {share} |")
    ratio = "{:.2f} (lowest {:.2f}, highest {:.2f})".format(*static["ratio"])
    what = (
        f"{static['requests']} requests of {result['prompt'][0]} to {result['prompt'][1]} prompt tokens and "
        f"{result['new'][0]} to {result['new'][1]} new ones, {static['max_batch']} at a time, at most "
        f"{static['max_rows']} rows a step. Continuous is {ratio} times as fast; the tokens of both were compared and "
        "are equal"
    )
    return [*lines, "", f"*{how(result)}. {what}.*"]


def blocks_table(result):
    """Sizes of a block, as lines of Markdown."""
    blocks = result["blocks"]
    lines = [
        "| tokens a block | places without a token | sequences at once | preemptions | shared tokens | tokens/s |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in blocks["rows"]:
        lines.append(
            f"| {row['block_size']} | {100 * row['unused_share']:.1f} % | {row['held']:.0f} | {row['preemptions']} | "
            f"{row['prefix_hits']:.0f} of {blocks['shared_prefix']} | {short(row['tokens_s'][0])} |"
        )
    what = (
        f"Places, sequences and preemptions: {blocks['counted']} requests of the same mix in a pool of "
        f"{blocks['pool_tokens']} places ({blocks['pool_bytes'] / 2**20:.0f} MiB in this model), however it is cut. "
        f"Shared: what a prompt has from the cache that begins with the {blocks['shared_prefix']} tokens of an earlier "
        f"one. Tokens/s: {blocks['requests']} requests, {blocks['max_batch']} at a time, with room for all"
    )
    return [*lines, "", f"*{how(result)}. {what}.*"]


def sequences_table(result):
    """Sequences at once, as lines of Markdown."""
    sequences = result["sequences"]
    lines = ["| sequences at once | tokens/s | host, µs a step |", "|---:|---:|---:|"]
    lines += [f"| {row['sequences']} | {short(row['tokens_s'][0])} | {short(row['host_us'][0])} |"
              for row in sequences["rows"]]  # fmt: skip
    what = f"prompts of {sequences['prompt_tokens']} tokens, {sequences['new_tokens']} new ones"
    return [*lines, "", f"*{how(result)}, {what}.*"]


TABLES = {"static": static_table, "blocks": blocks_table, "sequences": sequences_table}


def filled(text, results):
    """The text of a page with its tables written anew. Raises KeyError on a table that is none of `TABLES`."""

    def fill(match):
        return match[1] + "\n".join("\n".join([*TABLES[match[2]](result), ""]) for result in results) + match[3]

    return BLOCK.sub(fill, text)


def pictured(text):
    """The text of a page with the pictures of its commands drawn anew, without speeds: they are another each time."""

    def fill(match):
        environ = {**os.environ, "COLUMNS": str(COLUMNS), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(
            [sys.executable, *match[2].split()], cwd=ROOT, env=environ, check=True, encoding="utf-8",
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        picture = done.stderr[done.stderr.index("step ") :]
        return f"{match[1]}```\n{re.sub(r'   [0-9]+ tokens/s', '', picture)}```\n{match[3]}"

    return PICTURE.sub(fill, text)


# --- the pictures ----------------------------------------------------------------------------------------------------


def draw_static(results, path):
    """What both kinds of batches compute, and how fast they are: a row of panels a device."""
    plt = pyplot()
    figure, axes = plt.subplots(len(results), 2, figsize=(8.4, 0.5 + 1.7 * len(results)), squeeze=False)
    for (left, right), result in zip(axes, results):
        rows = result["static"]["rows"]
        names, y = [row["name"] for row in rows], range(len(rows))
        useful = [row["rows"] - row["padding_rows"] for row in rows]
        left.barh(y, useful, 0.6, color=OURS, label="of requests")
        padding = [row["padding_rows"] for row in rows]
        left.barh(y, padding, 0.6, left=useful, color=PADDING_COLOUR, label="padding")
        left.set_xlabel("rows computed")
        left.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 0.97), ncols=2)
        values = [row["tokens_s"][0] for row in rows]
        bars = right.barh(y, values, 0.6, color=[OURS, LIBRARY_COLOUR])
        right.bar_label(bars, [short(value) for value in values], padding=3)
        right.set_xlim(0, 1.15 * max(values))
        right.set_xlabel(f"tokens/s, {name_of(result)}")
        for axis in (left, right):
            axis.set_yticks(y, names)
            axis.invert_yaxis()
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, path)


def draw_blocks(results, path):
    """What the size of a block costs and brings: counted panels of the first device, and the speeds of all."""
    plt = pyplot()
    blocks = results[0]["blocks"]
    sizes = [row["block_size"] for row in blocks["rows"]]
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 5))
    panels = {
        "places without a token, %": [100 * row["unused_share"] for row in blocks["rows"]],
        f"sequences at once in {blocks['pool_tokens']} places": [row["held"] for row in blocks["rows"]],
        f"of {blocks['shared_prefix']} shared tokens, found": [row["prefix_hits"] for row in blocks["rows"]],
    }
    for axis, (title, values) in zip(axes.flat, panels.items()):
        bars = axis.bar(range(len(sizes)), values, 0.7, color=OURS)
        axis.bar_label(bars, [f"{value:.0f}" for value in values], padding=2)
        axis.set_ylim(0, 1.15 * max(values))
        axis.set_title(title, fontsize=9)
    axis = axes.flat[3]
    for i, result in enumerate(results):
        rates = [row["tokens_s"] for row in result["blocks"]["rows"]]
        at_16 = next(rate[0] for size, rate in zip(sizes, rates) if size == 16)
        middle, low, high = ([rate[k] / at_16 for rate in rates] for k in range(3))
        axis.plot(range(len(sizes)), middle, "o-", color=COLOURS[2 - i % 3], label=name_of(result), ms=4)
        axis.fill_between(range(len(sizes)), low, high, color=COLOURS[2 - i % 3], alpha=0.2, lw=0)
    axis.set_ylim(0, None)
    axis.set_title("speed against blocks of 16; the band: lowest and highest", fontsize=9)
    axis.legend(frameon=False, loc="lower left")
    for axis in axes.flat:
        axis.set_xticks(range(len(sizes)), sizes)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("tokens a block")
    figure.tight_layout()
    save(figure, path)


def draw_sequences(results, path):
    """Tokens a second and the host's time a step, against how many sequences run at once: a row of panels a device."""
    plt = pyplot()
    figure, axes = plt.subplots(len(results), 2, figsize=(8.4, 2.7 * len(results)), squeeze=False)
    for pair, result in zip(axes, results):
        rows = result["sequences"]["rows"]
        n = [row["sequences"] for row in rows]
        for axis, key, title in zip(pair, ("tokens_s", "host_us"), ("tokens/s", "host: µs a step")):
            middle, low, high = ([row[key][k] for row in rows] for k in range(3))
            axis.plot(n, middle, "o-", color=OURS, ms=4)
            axis.fill_between(n, low, high, color=OURS, alpha=0.2, lw=0)
            axis.set_xscale("log", base=2)
            axis.set_xticks(n, n)
            axis.set_ylim(0, None)
            axis.set_xlabel("sequences at once")
            axis.set_title(f"{title}, {name_of(result)}", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, path)


def draw_all(folder, chapter=CHAPTER):
    """Draw all pictures and write all tables; returns the files. Raises FileNotFoundError if nothing was measured."""
    results, paths = measured(folder), []
    for name, draw in ("static", draw_static), ("blocks", draw_blocks), ("sequences", draw_sequences):
        paths.append(chapter / "img" / f"batching_{name}.svg")
        draw(results, paths[-1])
    for page in (chapter / page.name for page in PAGES):
        if page.exists():
            text = page.read_text(encoding="utf-8")
            page.write_text(pictured(filled(text, results)), encoding="utf-8")
            paths.append(page)
    return paths
