"""Write the README's figures on a GPU from the committed ones: part of ``make plots``.

    python benchmarks/readme.py [--results benchmarks/results/h100] [--readme README.md]

Between ``<!-- measured -->`` and ``<!-- end -->`` stand three tables: the model beside its peers, from ``gpt2.json``;
the best rung of each ladder beside the library or the device's own copy, from ``chNN.json`` and ``start.json``; and
what the engine does with many sequences and other models, from ``h200/engine*.json``.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402, F401  (before numba.cuda)

# isort: split
from common import bench  # noqa: E402

BLOCK = re.compile(r"(<!-- measured -->\n).*?(<!-- end -->)", re.DOTALL)
LADDERS = [  # chapter, ladder, version, size as the ladder's label has it, what it is
    (9, "gemm_half", "gemm_v8_tma", "4 096 × 4 096 × 4 096", "matrix product in float16, 4096³"),
    (12, "flash_half", "flash_v4_64", "48 × 4 096 × 64", "causal attention, 4 × 12 heads of 4096 tokens, head_dim 64"),
    (9, "gemv_half", "gemv_v5_tensor_core", "50 257 × 768", "GPT-2's head times one row"),
    (10, "softmax", "softmax_v5_registers", "16 384 × 4 096", "softmax of 64 Mi floats"),
    (7, "layernorm", "layernorm_v4_registers", "16 384 × 4 096", "layer norm of 64 Mi floats"),
]
ENGINE = ROOT / "benchmarks" / "results" / "h200"
MODELS = {"engine": "GPT-2 124M", **{f"engine_{name.lower()}": name for name in
                                     ("SmolLM2-135M", "Llama-3.2-1B", "Llama-2-7B")}}  # fmt: skip
SEQUENCES = (1, 32, 256)
LIBRARY = {9: "cuBLAS", 12: "PyTorch's attention"}


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def model_table(folder):
    """Lines of the table of levels and peers."""
    result = read(folder, "gpt2")
    rows = [row for row in result["rows"] if row.get("tokens_s")]
    fast = next(row["tokens_s"][0] for row in rows if row["name"] == "fast")
    sizes = [entry["size"] for entry in rows[0]["prefill"]]
    lines = ["| | tokens/s | `fast` against it | " + " | ".join(f"prompt of {size}" for size in sizes) + " |"]
    lines += ["|---|---:|---:|" + "---:|" * len(sizes)]
    for row in rows:
        name = f"`{row['name']}`" if row["kind"] == "level" else row["name"]
        ratio = "" if row["name"] == "fast" else f"{fast / row['tokens_s'][0]:.3g} ×"
        prompts = [f"{bench.short(entry['ms'][0])} ms" for entry in row["prefill"]]
        lines.append(" | ".join([f"| {name}", bench.short(row["tokens_s"][0]), ratio, *prompts]) + " |")
    fewer = f" (`{rows[0]['name']}`: {rows[0]['new_tokens']})"
    what = (
        f"*{result['device']}, GPT-2 small (124M) in one run: {result['new_tokens']} tokens{fewer} after a prompt of "
        f"{result['prompt_tokens']}, batch 1, float16 (`naive` and `kv`: float32), random weights. "
        "All weights read at the speed of the device's own copy would be "
        f"{result['ceiling_tokens_s']:.0f} tokens/s. All figures are of the likeliest token each time.*"
    )
    return [*lines, "", what]


def engine_table():
    """Lines of the table of many sequences, and of other models."""
    lines = ["| `Engine`, level `fast` | sequences | tokens/s | of the floor |", "|---|---:|---:|---:|"]
    for name, model in MODELS.items():
        result = read(ENGINE, name)
        for row in result["decode"]["rows"]:
            if row["name"] == "engine" and (n := row["sequences"]) in SEQUENCES:
                lines.append(f"| {model} | {n} | {row['tokens_s'][0]:.0f} | {100 * row['share']:.0f} % |")
    drawn = next(row for row in read(ENGINE, "engine")["sampling"]["rows"] if row["sequences"] == 1)
    what = (
        f"*{result['device']}, float16, random weights, {result['decode']['prompt']} tokens and "
        f"{result['decode']['new']} new ones. The floor: what the device's own copy takes for the weights once and "
        f"each sequence's keys and values. To draw from the 40 likeliest (`--top_k=40`) leaves "
        f"{100 * drawn['over_greedy']:.0f} % of the first line's speed; more in [14.6.4](ch14_mini_llm/graphs.md) and "
        "[14.5](ch14_mini_llm/llama.md).*"
    )
    return [*lines, "", what]


def kernel_table(folder):
    """Lines of the table of kernels."""
    lines = ["| kernel | what | measured | against |", "|---|---|---:|---|"]
    for chapter, name, version, size, what in LADDERS:
        result = read(folder, f"ch{chapter:02d}")
        ladder = next(ladder for ladder in result["ladders"] if ladder["name"] == name)
        at = ladder["sizes"].index(size)
        values = {row["library"] or row["name"]: row["values"][at] for row in ladder["rows"]}
        if ladder["share"] == "library":
            beside, against = values[True], LIBRARY[chapter]
        else:
            beside, against = result["copy_gb_s"], "the device's own copy"
        value, unit = values[version], ladder["unit"]
        if unit == "GFLOP/s" and value >= 10_000:
            value, unit = value / 1000, "TFLOP/s"
        measured = f"{bench.short(value)} {unit}"
        lines.append(f"| `{version}` | {what} | {measured} | {100 * values[version] / beside:.0f} % of {against} |")
    start = next(row for row in read(folder, "start")["rows"] if row["engine"] == "fast")
    first, imports = start["first_token_s"][0], start["import_s"][0]
    what = "start to first token, kernels on disk"
    lines.append(f"| `--engine=fast` | {what} | {first:.1f} s | import: {imports:.1f} s |")
    return lines


def render(folder):
    """What stands between the two comments. folder: that of a device's results."""
    return "\n".join([*model_table(folder), "", *kernel_table(folder), "", *engine_table()]) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="benchmarks/readme.py", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "h100", help="their folder")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file to write to")
    options = parser.parse_args(argv)
    text = options.readme.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        parser.error(f"{options.readme} has no <!-- measured --> … <!-- end -->")
    try:
        block = render(options.results)
    except FileNotFoundError as error:
        parser.error(f"{error.filename} is missing: run make bench on a GPU first")
    options.readme.write_text(BLOCK.sub(lambda match: match[1] + block + match[2], text), encoding="utf-8")
    print(options.readme)


if __name__ == "__main__":
    main()
