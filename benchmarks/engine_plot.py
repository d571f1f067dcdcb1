"""Draw what ``benchmarks/engine.py`` measured, and write its tables into chapter 14's page of graphs: ``make plots``.

    python benchmarks/engine_plot.py

In ``ch14_mini_llm/graphs.md``, what stands between ``<!-- engine NAME -->`` and ``<!-- end -->`` is the table NAME of
`TABLES`. The plots are ``ch14_mini_llm/img/engine_decode.svg`` and ``engine_step.svg``.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.plots import COLOURS, LIBRARY_COLOUR, pyplot, result_files, save, table_block  # noqa: E402
from common.bench import short  # noqa: E402

CHAPTER, RESULTS = ROOT / "ch14_mini_llm", ROOT / "benchmarks" / "results"
BLOCK = table_block("engine")
OURS = "engine"
PEER_COLOURS = (LIBRARY_COLOUR, COLOURS[6])
STEP_COLOURS = {"decode": COLOURS[0], "mixed": COLOURS[6], "prompt": LIBRARY_COLOUR, "none": "#dddddd"}
AROUND = 12  # steps before and behind those with a part of the long prompt


def measured(results=RESULTS):
    """The figures of the GPU with an ``engine.json``. Raises FileNotFoundError if there is none."""
    return _of_a_gpu(results, "engine.json", "make bench-engine")


def profiled(results=RESULTS):
    """The figures of the same GPU's ``step_profile.json``. Raises FileNotFoundError if there are none."""
    return _of_a_gpu(results, "step_profile.json", "benchmarks/step_profile.py")


def _of_a_gpu(results, name, command):
    paths = [path for path in result_files(results, name) if path.parent.name != "cpu"]
    if not paths:
        raise FileNotFoundError(f"{results} has no {name} of a GPU: run {command} there first")
    return json.loads(paths[0].read_text(encoding="utf-8"))


def how(result):
    """Where and how it was measured, in words."""
    device = result["device"].replace("NVIDIA ", "")
    return f"{device}, {result['model']}, level `{result['level']}`, medians of {result['repeats']} runs"


def by_name(result):
    """{name: {sequences: row}} of the question *decode*, ours first; rows that failed are left out."""
    found = {}
    for row in result["decode"]["rows"]:
        if not row["error"]:
            found.setdefault(row["name"], {})[row["sequences"]] = row
    return found


# --- the tables ------------------------------------------------------------------------------------------------------


def decode_table(result):
    """How fast n sequences decode, as lines of Markdown: ours, and each peer with the ratio."""
    rows = by_name(result)
    peers = [name for name in rows if name != OURS]
    same = {row["sequences"]: row["over_default"] for row in result.get("deterministic", {}).get("rows", ())}
    titles = "".join(f" {name} | ratio |" for name in peers)
    lines = [
        f"| sequences | engine, tokens/s | of the floor |{titles} deterministic |",
        f"|---:|---:|---:|{'---:|---:|' * len(peers)}---:|",
    ]
    for n, ours in rows[OURS].items():
        cells = [str(n), short(ours["tokens_s"][0]), f"{100 * ours['share']:.0f} %"]
        for name in peers:
            row = rows[name].get(n)
            rate = row and row["tokens_s"][0]
            ratio = row and ours["tokens_s"][0] / rate
            cells += [short(rate), f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"] if row else ["–", "–"]
        cells.append(f"{same[n]:.2f}" if n in same else "–")
        lines.append(f"| {' | '.join(cells)} |")
    size = result["decode"]
    what = f"prompts of {size['prompt']} tokens, {size['new']} new ones"
    what += "; the fastest setting of each peer" * bool(peers)
    return [*lines, "", f"*{how(result)}; {what}. Deterministic: the rate over the engine's own.*"]


def others_table(result):
    """What else was asked, a line each."""
    lines, idle = ["| | |", "|---|---:|"], result["decode"].get("idle")
    if idle and not idle["error"]:
        share = f"{100 * max(idle['idle_share'], 0):.1f} %"
        lines.append(f"| of a step of {idle['sequences']} sequences, the GPU is idle | {share} |")
    for row in result.get("sampling", {}).get("rows", ()):
        kind = {"top_k": "top-k 40", "top_p": "top-p 0.95"}[row["name"]]
        lines.append(f"| {kind} over greedy, {row['sequences']} at once | {row['over_greedy']:.2f} |")
    if "requests" in result:
        found = result["requests"]
        what = f"{found['requests']} requests at once, over the rate of decoding"
        lines.append(f"| {what} | {found['over_decode']:.2f} |")
        lines.append(f"| the same, with outputs of {found['mixed'][0]} to {found['mixed'][1]}, over static batches | "
                     f"{found['over_static'][0]:.2f} |")  # fmt: skip
        ours, static = (row.get("rows") for row in found["rows"][1:3])
        if ours:
            lines.append(f"| … rows that static batches run over, with padding, over ours | {static / ours:.2f} |")
    if "prefix" in result:
        found = result["prefix"]
        what = f"{found['requests']} requests that share {found['shared']} tokens, cached, over not cached"
        lines.append(f"| {what}: time to the first token | {found['first_token_ms_ratio']:.2f} |")
        lines.append(f"| … throughput | {found['tokens_s_ratio']:.2f} |")
    if "gap" in result:
        found = result["gap"]
        what = f"a prompt of {found['prompt']} while {found['sequences']} decode: the worst gap over the median"
        lines.append(f"| {what} | {found['ratio'][0]:.2f} |")
    if "run" in result:
        lines.append(f"| `run.py`, {result['run']['new']} tokens, over the rate of decoding | "
                     f"{result['run']['over_decode']:.2f} |")  # fmt: skip
    return [*lines, "", f"*{how(result)}.*"]


PARTS = {  # of a step: kernels' names, as they begin
    "attention": ("paged_", "combine_", "flash_"),
    "head, choice": ("gemv_ln_logits", "gemm_logits", "pick_", "parts_norm_of"),
    "norms": ("parts_norm", "parts_rms"), "products": ("gemm_", "gemv_"),
}  # fmt: skip


def profile_table(result):
    """Where a step's time is, as lines of Markdown, from ``step_profile.json``."""
    lines = [
        "| sequences | step | attention | *cache* | products | norms | head, choice | *all weights* | launches |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        times = dict.fromkeys(PARTS, 0.0)
        for kernel in row["kernels"]:
            part = next(part for part, names in PARTS.items() if kernel["name"].startswith(names))
            times[part] += kernel["us"]
        launches = sum(kernel["launches"] for kernel in row["kernels"])
        cells = [row["us"], times["attention"], row["cache_us"], times["products"], times["norms"],
                 times["head, choice"], row["weights_us"]]  # fmt: skip
        lines.append(f"| {row['sequences']} | {' | '.join(f'{us:.0f} µs' for us in cells)} | {launches} |")
    device, what = result["device"].removeprefix("NVIDIA "), "the time that the device's own copy takes for the bytes"
    return [*lines, "", f"*{device}, medians of {result['repeats']} replays; cache, all weights: {what}.*"]


TABLES = {"decode": decode_table, "others": others_table, "profile": profile_table}


def filled(text, result, profile):
    """The text of the page with its tables written anew. Raises KeyError on a table that is none of `TABLES`."""
    of = lambda name: profile if name == "profile" else result
    return BLOCK.sub(lambda match: match[1] + "\n".join([*TABLES[match[2]](of(match[2])), ""]) + match[3], text)


# --- the pictures ----------------------------------------------------------------------------------------------------


def draw_decode(result, path):
    """Tokens a second, and the share of the floor, against how many sequences decode: ours and the peers."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.2))
    for name, rows in by_name(result).items():
        n = list(rows)
        colour = COLOURS[2] if name == OURS else PEER_COLOURS[name.startswith("transformers")]
        for axis, value in zip(axes, (lambda row: row["tokens_s"][0], lambda row: 100 * row["share"])):
            axis.plot(n, [value(row) for row in rows.values()], "o-", ms=4, color=colour, label=name)
    for axis, title in zip(axes, ("tokens/s", "% of the floor")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(n := list(by_name(result)[OURS]), n)
        axis.set_xlabel("sequences at once")
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, None)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    save(figure, path)


def draw_step(result, path):
    """The steps around a long prompt that arrives while others decode: how long each took, and what was in it."""
    plt = pyplot()
    ms, rows, kinds = (result["gap"]["timeline"][name].split() for name in ("ms", "rows", "kinds"))
    ms = ms[1:]  # a call of the engine launches a step, and waits for the tokens of the one before
    late = [i for i, kind in enumerate(kinds) if kind == "mixed" and i > len(kinds) // 4]
    shown = range(max(late[0] - AROUND, 0), min(late[-1] + AROUND, len(ms)))
    figure, axis = plt.subplots(figsize=(8.4, 2.6))
    for kind, colour in STEP_COLOURS.items():
        steps = [i for i in shown if kinds[i] == kind]
        if steps:
            axis.bar(steps, [float(ms[i]) for i in steps], 0.85, color=colour, label=kind)
    for i in shown:
        if kinds[i] == "mixed":
            axis.annotate(f"{rows[i]} rows", (i, float(ms[i])), ha="center", va="bottom", fontsize=7, rotation=90,
                          xytext=(0, 3), textcoords="offset points")  # fmt: skip
    axis.axhline(result["gap"]["median_ms"][0], color="#666", lw=1, ls="--", label="median gap")
    axis.set_ylim(0, 1.35 * max(float(ms[i]) for i in shown))
    axis.set_xlabel("step")
    axis.set_ylabel("ms until its tokens were read")
    axis.legend(frameon=False, ncols=4, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    save(figure, path)


def draw_all(results=RESULTS, chapter=CHAPTER):
    """Draw the pictures and write the tables; returns the files. Raises FileNotFoundError if nothing was measured."""
    result = measured(results)
    paths = [chapter / "img" / "engine_decode.svg", chapter / "img" / "engine_step.svg", chapter / "graphs.md"]
    draw_decode(result, paths[0])
    draw_step(result, paths[1])
    text = paths[2].read_text(encoding="utf-8")
    paths[2].write_text(filled(text, result, profiled(results)), encoding="utf-8")
    return paths


def main(argv=None):
    argparse.ArgumentParser(prog="benchmarks/engine_plot.py", description=__doc__.split("\n")[0]).parse_args(argv)
    for path in draw_all():
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
