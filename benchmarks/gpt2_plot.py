"""Draw what ``benchmarks/gpt2.py`` measured: ``ch14_mini_llm/img/decode.svg`` and ``prefill.svg``.

    python benchmarks/gpt2_plot.py [--results benchmarks/results] [--out ch14_mini_llm/img]

There is a panel for each device that has a ``gpt2.json``; a CPU only if there is nothing else.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, F401  (before numba.cuda)

# isort: split
from benchmarks.ladders import RESULTS  # noqa: E402
from benchmarks.plots import COLOURS, LIBRARY_COLOUR, pyplot, save  # noqa: E402

PEER_COLOURS = [LIBRARY_COLOUR, "#e8c98f", "#a97a1f", "#7a5a1a"]


def measured(folder=RESULTS):
    """What `gpt2.measure` gave on each device, from ``<folder>/*/gpt2.json``, in the folders' order."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*/gpt2.json"))]
    return [result for result in results if result["backend"] == "gpu"] or results


def draw_decode(results, path):
    """Bars of tokens/s for every level and peer, with the device's ceiling as a line, to the SVG file ``path``."""
    plt = pyplot()
    most = max(len(_rows(result, "tokens_s")) for result in results)
    figure, axes = plt.subplots(1, len(results), figsize=(5.4 * len(results) + 0.6, 0.36 * most + 1.5), squeeze=False)
    for axis, result in zip(axes[0], results):
        rows = _rows(result, "tokens_s")
        colours = _colours(result)
        names = [f"{row['name']}\n({row['new_tokens']} tokens)" if row["new_tokens"] != result["new_tokens"]
                 else row["name"] for row in rows]  # fmt: skip
        values = [row["tokens_s"][0] for row in rows]
        bars = axis.barh(range(len(rows)), values, 0.7, color=[colours[row["name"]] for row in rows])
        axis.bar_label(bars, [f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in values], padding=3)
        ceiling = result["ceiling_tokens_s"]
        axis.axvline(ceiling, color="#666", lw=1, ls="--")
        axis.set_yticks(range(len(rows)), names)
        axis.invert_yaxis()
        axis.set_xlabel(f"tokens/s\ndashed: all weights read at a copy's speed, {ceiling:.0f}")
        axis.set_xlim(0, 1.15 * max([*values, ceiling]))
        axis.set_title(result["device"].replace("NVIDIA ", ""))
        axis.spines[["top", "right"]].set_visible(False)
    first = results[0]
    figure.suptitle(f"GPT-2, {first['new_tokens']} tokens after a prompt of {first['prompt_tokens']}, batch 1")
    figure.tight_layout()
    save(figure, path)


def draw_prefill(results, path):
    """Groups of bars, one a prompt's length, of the ms that every level and peer takes, to the SVG file ``path``."""
    plt = pyplot()
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(1, len(results), figsize=(5.4 * len(results) + 0.6, 3.6), squeeze=False)
    for axis, result in zip(axes[0], results):
        rows = _rows(result, "prefill")
        colours = _colours(result)
        sizes = sorted({entry["size"] for row in rows for entry in row["prefill"]})
        width = 0.8 / max(1, len(rows))
        for i, row in enumerate(rows):
            entries = row["prefill"]
            x = [sizes.index(entry["size"]) + (i - (len(rows) - 1) / 2) * width for entry in entries]
            heights = [entry["ms"][0] for entry in entries]
            axis.bar(x, heights, width * 0.92, color=colours[row["name"]], label=row["name"])
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_xlabel("tokens of the prompt")
        axis.set_ylabel("ms until the next token")
        axis.set_title(result["device"].replace("NVIDIA ", ""))
        axis.spines[["top", "right"]].set_visible(False)
    found = {}  # the devices may have been measured with different models
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    figure.suptitle("GPT-2: reading a prompt, batch 1")
    figure.tight_layout(rect=(0, 0.08 + 0.06 * ((len(found) - 1) // 3), 1, 1))
    figure.legend(found.values(), found.keys(), loc="lower center", ncols=3, frameon=False)
    save(figure, path)


def _rows(result, key):
    """The rows of a result that have this figure."""
    return [row for row in result["rows"] if row.get(key)]


def _colours(result):
    """{name of a row: its colour}: blues for ours, ambers for the peers, whichever of them were measured."""
    found, used = {}, {"level": 0, "peer": 0}
    for row in result["rows"]:
        palette = COLOURS if row["kind"] == "level" else PEER_COLOURS
        found[row["name"]] = palette[used[row["kind"]] % len(palette)]
        used[row["kind"]] += 1
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/gpt2_plot.py", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures (benchmarks/results)")
    parser.add_argument("--out", type=Path, default=ROOT / "ch14_mini_llm" / "img", help="folder of the plots")
    options = parser.parse_args(argv)
    results = measured(options.results)
    if not results:
        parser.error(f"{options.results} has no gpt2.json of any device: run benchmarks/gpt2.py first")
    draw_decode(results, options.out / "decode.svg")
    print(options.out / "decode.svg")
    if any(_rows(result, "prefill") for result in results):
        draw_prefill(results, options.out / "prefill.svg")
        print(options.out / "prefill.svg")


if __name__ == "__main__":
    main()
