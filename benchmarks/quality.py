"""What weights of few bits lose: perplexity, and how often the likeliest token is the same.

    python benchmarks/quality.py [--weights FILE] [--stories 100] [--length 256] [--out benchmarks/results]
    python benchmarks/quality.py --page         # writes the tables of chapter 9's page from the committed figures

Prints a table and writes ``<out>/cpu/quality.json``. SmolLM2 (`make smollm2`) writes short stories, from prompts and
with draws that are the same each time, but other ones than the tiny model was trained on: so they are held out, and
need not be downloaded. Each is given to the model under test, by default the tiny one, on the level ``kv``, with
weights in float32, float16, 8 and 4 bits, and the engine says the log-probability of each of its tokens.

Exit codes: 0 all measured; 2 bad arguments.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    os.environ["MINI_BACKEND"] = "cpu"

import common  # noqa: E402, F401  (before numba.cuda)

# isort: split
from tqdm import tqdm  # noqa: E402

from benchmarks.plots import table_block  # noqa: E402
from ch14_mini_llm.engine.dtypes import DTYPES  # noqa: E402
from ch14_mini_llm.engine.engine import Engine  # noqa: E402
from ch14_mini_llm.engine.request import Request, Sampling  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import DATA_DIR, load_weights  # noqa: E402
from ch14_mini_llm.tokenizer.own import tokenizer_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
WRITER, TINY = DATA_DIR / "smollm2-135m.bin", DATA_DIR / "tiny-gpt2.bin"
BLOCK = table_block("few")
PAGE = ROOT / "chapters" / "ch09_gemm" / "quantized.md"
WHO = (
    "a girl", "an old man", "a dog", "two brothers", "a teacher", "a farmer", "a bird", "the queen", "a baker", "a boy",
)  # fmt: skip
WHAT = (
    "finds a key", "loses a shoe", "learns to swim", "plants a tree", "meets a friend", "hears a song", "builds a boat",
    "wants to fly", "cannot sleep", "makes a promise",
)  # fmt: skip


def stories(count, length):
    """So many texts by `WRITER`."""
    config, tensors = load_weights(WRITER)
    tokenizer = tokenizer_of(config, tensors)
    engine = Engine.of(config, tensors, "kv", dtype="float16", max_batch=16, num_blocks=16 * (length + 64) // 16)
    requests = []
    for number in range(count):
        about = f"{WHO[number % len(WHO)]} who {WHAT[number // len(WHO) % len(WHAT)]}"
        prompt = tokenizer.chat([{"role": "user", "content": f"Write a short story about {about}."}])
        sampling = Sampling(temperature=0.8, top_k=40, seed=1_000_000 + number)
        requests.append(Request(prompt, length, sampling, tokenizer.stop_tokens))
    with tqdm(total=count, desc="writing", disable=None) as bar:
        results = engine.run(requests, lambda output: bar.update(output.finish_reason is not None))
    return [tokenizer.decode(result.tokens) for result in results]


def scores(weights, dtype, texts):
    """``(tokens, sum of their negative log-probabilities, the likeliest token at each place)`` of some texts."""
    config, tensors = load_weights(weights)
    tokenizer = tokenizer_of(config, tensors)
    prompts = [tokenizer.encode(text)[: config.n_ctx - 1] for text in texts]
    engine = Engine.of(config, tensors, "kv", dtype=dtype, max_batch=8, prefix_cache=False)
    results = engine.run([Request(prompt, 0, prompt_logprobs=1) for prompt in prompts if len(prompt) > 1])
    known = [score for result in results for score in result.prompt_logprobs[1:]]
    likeliest = [max(score.top, key=score.top.get) for score in known]
    return len(known), -sum(score.logprob for score in known), likeliest


def measure(weights, texts, dtypes=DTYPES["kv"]):
    """A row a dtype: its perplexity, that over float16's, and the share of places with float16's likeliest token."""
    found = {}
    for dtype in tqdm(dtypes, desc="reading", disable=None):
        found[dtype] = scores(weights, dtype, texts)
    n, total, wanted = found["float16"]
    rows = []
    for dtype, (_, loss, likeliest) in found.items():
        same = sum(a == b for a, b in zip(likeliest, wanted)) / n
        rows.append({"dtype": dtype, "perplexity": round(math.exp(loss / n), 4),
                     "over_float16": round(math.exp((loss - total) / n), 5), "same_token": round(same, 5)})  # fmt: skip
    return n, rows


def format_table(result):
    """The figures as lines of Markdown."""
    lines = ["| weights | perplexity | of float16's | the same likeliest token |", "|---|---:|---:|---:|"]
    for row in result["rows"]:
        change, same = 100 * (row["over_float16"] - 1), 100 * row["same_token"]
        lines.append(f"| {row['dtype']} | {row['perplexity']:.3f} | {change:+.2f} % | {same:.1f} % |")
    return [*lines, "", f"*{result['model']}, {result['tokens']} tokens of {result['stories']} stories.*"]


def speed_table(result):
    """What ``benchmarks/laptop.py --only few`` has measured, as lines of Markdown."""
    lines = ["| tokens a second | 124M random weights | SmolLM2 |", "|---|---:|---:|"]
    names = {"float16": "float16", "int8": "8 bits", "int4": "4 bits"}
    cell = lambda name: f"{result['figures'][name][0]:.0f}" if name in result["figures"] else ""
    for dtype, title in names.items():
        lines.append(f"| {title} | {cell(f'decode {dtype}')} | {cell(f'SmolLM2 {dtype}')} |")
    lines.append(f"| llama.cpp, from the same file | | {cell('SmolLM2 llama.cpp, the same file')} |")
    machine = f"{result['machine']['cpu']}, {result['machine']['threads']} cores"
    return [*lines, "", f"*{machine}; level `kv`, one text at a time, medians of {result['rounds']} processes.*"]


def filled(page, folder=RESULTS):
    """The page's text with its tables of the committed figures."""
    read = lambda name: json.loads((folder / "cpu" / f"{name}.json").read_text(encoding="utf-8"))
    lines = [*speed_table(read("few_bits")), "", *format_table(read("quality"))]
    return BLOCK.sub(lambda match: match[1] + "\n".join([*lines, ""]) + match[3], page)


def main(argv=None):
    if argv is None and sys.argv[1:] == ["--page"]:
        write_text(PAGE, filled(PAGE.read_text(encoding="utf-8")))
        return
    parser = argparse.ArgumentParser(prog="benchmarks/quality.py", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", type=Path, default=TINY, help="of the model under test (data/tiny-gpt2.bin)")
    parser.add_argument("--stories", type=int, default=100, help="how many (100)")
    parser.add_argument("--length", type=int, default=256, help="of a story, in tokens of SmolLM2, at most (256)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    options = parser.parse_args(argv)
    if min(options.stories, options.length) < 1:
        parser.error("--stories and --length must be at least 1 each")
    if not WRITER.exists():
        parser.error(f"{WRITER.relative_to(ROOT)} is not there; make smollm2 fetches SmolLM2, which writes the stories")
    path = options.out / "cpu" / "quality.json"
    try:
        make_output(path, "--out")
        load_weights(options.weights)
    except (FileError, WeightsError) as error:
        parser.error(str(error))
    texts = stories(options.stories, options.length)
    n, rows = measure(options.weights, texts)
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    result = {"model": options.weights.stem, "stories": len(texts), "tokens": n, "sha256": digest, "rows": rows}
    write_text(path, json.dumps(result, indent=1) + "\n")
    print("\n".join([*format_table(result), "", f"written: {path}"]))


if __name__ == "__main__":
    main()
