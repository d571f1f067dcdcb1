"""The timeline of traced launches, as text and as a picture: what `profile.py` shows."""

from __future__ import annotations

from dataclasses import dataclass

from ch14_mini_llm.files import replacing

WIDTH = 48  # columns of the timeline in text
SHADES = " ·░▒▓█"  # how much of a column's time a kernel has: none … all


@dataclass
class Slice:
    """One launch: the kernel's name, ``file:line`` of its definition, grid and block, and its time in milliseconds."""

    name: str
    defined_at: str
    grid: list
    block: list
    ms: float


def as_slice(launch) -> Slice:
    """A `common.trace.Launch` in words and numbers."""
    return Slice(launch.name, launch.defined_at, list(launch.grid), list(launch.block), launch.ms)


def by_kernel(slices: list[Slice]) -> list[tuple[Slice, list[tuple[float, float]], float]]:
    """[(first launch, [(start, ms), …], ms in all), …], in order of first launch.

    Starts are counted as if each kernel began when the one before it ended.
    """
    groups, now = {}, 0.0
    for one in slices:
        groups.setdefault((one.name, one.defined_at), (one, []))[1].append((now, one.ms))
        now += one.ms
    return [(first, spans, sum(ms for _, ms in spans)) for first, spans in groups.values()]


def format_profile(slices: list[Slice]) -> str:
    """The timeline, a row a kernel in order of first launch, the sums, and a sentence that names the largest."""
    from common.trace import _align

    groups, total = by_kernel(slices), sum(one.ms for one in slices)
    rows = [
        ("kernel", f"timeline, {total:.3f} ms from left to right", "launches", "ms", "share", "chapter", "defined at")
    ]
    for first, spans, ms in groups:
        row = (first.name, f"|{bar(spans, total)}|", len(spans), f"{ms:.3f}", f"{share(ms, total):.1f} %")
        rows.append((*row, chapter(first), first.defined_at))
    rows.append(("all", "", len(slices), f"{total:.3f}", "", "", ""))
    return "\n".join([*_align(rows, right={2, 3, 4}), "", verdict(slices)])


def verdict(slices: list[Slice]) -> str:
    """The sentence that names the largest kernel."""
    first, spans, ms = max(by_kernel(slices), key=lambda group: group[2])
    total = sum(one.ms for one in slices)
    return (
        f"The largest kernel is {first.name} of chapter {chapter(first) or '?'}, {first.defined_at}: "
        f"{len(spans)} launch{'es' if len(spans) > 1 else ''}, {ms:.3f} of {total:.3f} ms ({share(ms, total):.1f} %)."
    )


def bar(spans: list[tuple[float, float]], total: float) -> str:
    """One row of the timeline: each column is shaded by how much of its time the spans have."""
    filled = [0.0] * WIDTH
    for start, ms in spans:
        left, right = (WIDTH * edge / total if total else 0.0 for edge in (start, start + ms))
        for column in range(int(left), min(WIDTH, int(right) + 1)):
            filled[column] += max(0.0, min(right, column + 1) - max(left, column))
    return "".join(SHADES[0 if f <= 0 else min(len(SHADES) - 1, 1 + int(f * (len(SHADES) - 1)))] for f in filled)


def share(part: float, whole: float) -> float:
    """`part` of `whole` in percent."""
    return 100 * part / whole if whole else 0.0


def chapter(one: Slice) -> str:
    """The chapter's number, such as "6", of a kernel defined in ``chapters/ch06_…``; "" for another."""
    folder = one.defined_at.removeprefix("chapters/ch")
    return folder[:2].lstrip("0") if folder != one.defined_at else ""


def draw(slices: list[Slice], title: str, path: str) -> None:
    """The timeline as a picture: a row a kernel, the largest in colour."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "kernel by kernel", "font.size": 9, "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    groups, total = by_kernel(slices), sum(one.ms for one in slices)
    largest = max(range(len(groups)), key=lambda i: groups[i][2])
    figure, axis = plt.subplots(figsize=(9, 1.1 + 0.3 * len(groups)))
    for i, (_, spans, _) in enumerate(groups):
        axis.broken_barh(spans, (i - 0.38, 0.76), color="#d9a441" if i == largest else "#2f6690", linewidth=0)
    names = [f"{first.name} (ch. {chapter(first) or '?'})" for first, _, _ in groups]
    axis.set_yticks(range(len(groups)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, total)
    axis.set_xlabel("milliseconds, gaps between kernels left out")
    right = axis.secondary_yaxis("right")
    right.set_yticks(range(len(groups)), [f"{len(spans)} × = {share(ms, total):.0f} %" for _, spans, ms in groups])
    for side in (axis, right):
        side.tick_params(length=0)
        side.spines[:].set_visible(False)
    axis.set_title(f"{title}\n{verdict(slices)}", fontsize=9)
    figure.tight_layout()
    kind = path.rpartition(".")[2]
    with replacing(path, "--save") as file:
        figure.savefig(file, format=kind, **({"metadata": {"Date": None}} if kind == "svg" else {"dpi": 120}))
    plt.close(figure)
