"""Draw the plots of the lessons from the committed figures: the first half of ``make plots``.

    python benchmarks/plots.py

A lesson that has ``<!-- bench NAME -->`` shows ``img/NAME.svg``; this draws it from ``benchmarks/results/*/chNN.json``.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, F401  (before numba.cuda)

# isort: split
from chapters import lessons  # noqa: E402

COLOURS = ["#9db4c0", "#5c8ea6", "#2f6690", "#16425b", "#81a684", "#466060", "#c08497"]
LIBRARY_COLOUR = "#d9a441"


def table_block(name):
    """What finds the tables of a page that a plotter writes: ``<!-- NAME TABLE -->`` … ``<!-- end -->``, in groups the
    first line, TABLE, and the last."""
    return re.compile(rf"(<!-- {name} (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def result_files(results, name):
    """The files of a name in the folders of devices, GPUs first."""
    return sorted(results.glob(f"*/{name}"), key=lambda path: (path.parent.name == "cpu", path.parent.name))


def pyplot():
    """``matplotlib.pyplot`` with our settings: the same figures give the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "kernel by kernel", "font.size": 9, "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    return plt


def save(figure, path):
    """Write a figure to the SVG file ``path``, whose folder is made, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")  # long names widen it
    pyplot().close(figure)


def draw(chapter, name, path):
    """Draw ladder ``name`` as grouped bars, a panel for each device, to the SVG file ``path``."""
    plt = pyplot()
    measured = lessons.measured(chapter, name)
    letters = max(sum(len(size) + 3 for size in ladder["sizes"]) for _, ladder in measured)  # sizes, side by side
    room = max(4.2, 0.078 * letters) * len(measured) + 0.8
    figure, axes = plt.subplots(1, len(measured), figsize=(max(6.6, room), 3.2), squeeze=False)  # 6.6: the legend's
    for axis, (result, ladder) in zip(axes[0], measured):
        width = 0.8 / len(ladder["rows"])
        for i, row in enumerate(ladder["rows"]):
            x = [s + (i - (len(ladder["rows"]) - 1) / 2) * width for s in range(len(ladder["sizes"]))]
            colour = LIBRARY_COLOUR if row["library"] else COLOURS[i % len(COLOURS)]
            axis.bar(x, [v or 0 for v in row["values"]], width * 0.92, color=colour, label=row["name"].replace("`", ""))
        if ladder["share"] == "copy":
            axis.axhline(result["copy_gb_s"], color="#666", lw=1, ls="--", label="the device's own copy")
        axis.set_xticks(range(len(ladder["sizes"])), ladder["sizes"])
        axis.set_ylabel(ladder["unit"])
        axis.set_title(result["device"].replace("NVIDIA ", ""))
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    for axis in axes[0][1:]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.suptitle(measured[0][1]["title"])
    figure.tight_layout(rect=(0, 0.06 + 0.06 * ((len(labels) - 1) // 3), 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    save(figure, path)


def main(argv=None):
    argparse.ArgumentParser(prog="benchmarks/plots.py", description=__doc__.split("\n")[0]).parse_args(argv)
    for folder in lessons.folders():
        text = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").exists() else ""
        for kind, words in ((match[2], match[3].split()) for match in lessons.BLOCK.finditer(text)):
            if kind == "bench" and lessons.measured(lessons.number(folder), words[0]):
                draw(lessons.number(folder), words[0], folder / "img" / f"{words[0]}.svg")
                print(f"chapters/{folder.name}/img/{words[0]}.svg")


if __name__ == "__main__":
    main()
