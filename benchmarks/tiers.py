"""A text that was computed before, and goes on: what it is worth that its keys and values are still somewhere.

    python benchmarks/tiers.py [--shapes smollm2-135m,…] [--tokens 128,256,…] [--repeats 5] [--folder DIR]
                               [--out benchmarks/results]
    python benchmarks/tiers.py --page           # draws what was measured, and writes the tables of the pages

Prints the figures and writes them to ``<out>/<device>/tiers.json``. A text of n tokens is run, and then left: its
blocks are evicted to where the way says. Then comes its next turn, n tokens and `TURN` more, and the time until its
first token is taken, by the host's clock and without a server. Texts are random, and each is used once. So are the
weights, on which time does not depend. The ways:

* ``anew``: nothing is kept anywhere.
* ``device``: the blocks are still on the device, in the prefix cache.
* ``host``: in the host's memory (``--kv_host``).
* ``files``: in files that the system has in its memory, as after a restart of the server.
* ``disk``: in files that have to be read from the disk; the system was asked to forget them.

After each turn a block is compared, bit for bit, with what was computed the first time. ``copy``: `COPIED` blocks from
the host to the device, a call for each piece, and all in one launch.

Exit codes: 0 all measured; 1 a block came back with other bits (nothing is written); 2 bad arguments.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before numba.cuda)

# isort: split
import numpy as np  # noqa: E402
from numba import cuda  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.gpt2 import _digits, _names, _numbers  # noqa: E402
from benchmarks.ladders import RESULTS, device_folder  # noqa: E402
from benchmarks.plots import COLOURS, pyplot, result_files, save, table_block  # noqa: E402
from benchmarks.torch_llama import SHAPES, random_llama, to_numba  # noqa: E402
from ch14_mini_llm.cache.store import BlockStore  # noqa: E402
from ch14_mini_llm.engine.engine import Engine  # noqa: E402
from ch14_mini_llm.engine.request import Request  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from ch14_mini_llm.model.upload import llama_float16  # noqa: E402
from ch14_mini_llm.start import calm_collector  # noqa: E402
from common import bench  # noqa: E402

WAYS = ("anew", "device", "host", "files", "disk")
TURN, COPIED, WARM = 24, 125, 2
TOKENS = [128, 256, 512, 1024, 2000]
DEFAULT_SHAPES = {"cpu": ["smollm2-135m"], "gpu": [*SHAPES]}
PAGES = [ROOT / "ch14_mini_llm" / "tiers.md", ROOT / "chapters" / "ch13_llm_ops" / "kv_blocks.md"]
PICTURE = ROOT / "ch14_mini_llm" / "img" / "tiers.svg"
BLOCK = table_block("tiers")


class Wrong(Exception):
    """A block's bits are not those that were computed."""


class Tiers:
    """An engine of some shape, and the stores that its blocks can be evicted to. folder: for files."""

    def __init__(self, shape, longest, folder):
        config = SHAPES[shape]
        tensors = random_llama(config, "cuda" if common.BACKEND == "gpu" else "cpu")
        blocks = 3 * -(-(longest + TURN) // 16)
        if common.BACKEND == "gpu":
            model = llama_float16(config, tensors, to_device=to_numba)
            self.engine = Engine(model, "fast", num_blocks=blocks, max_batch=8)
        else:
            tensors = {name: tensor.float().numpy() for name, tensor in tensors.items()}
            self.engine = Engine.of(config, tensors, "kv", dtype="float16", num_blocks=blocks, max_batch=8)
        self.cache, self.pages = self.engine.prefix_cache, self.engine.runner.cache
        self.pages.touch(range(1, blocks + 1))
        store = lambda **room: BlockStore(
            shape, self.pages.block_shape, self.pages.dtype, memory=self.pages.host, **room
        )
        self.block_bytes = int(np.prod(self.pages.block_shape)) * self.pages.dtype.itemsize
        files = store(folder=folder)
        host = store(host_bytes=blocks * self.block_bytes)
        host.memory[:] = 0  # so that the system has given it
        self.stores = {"anew": store(), "device": store(), "host": host, "files": files, "disk": files}
        self.vocab_size, self.draws = config.vocab_size, np.random.default_rng(14)

    def text(self, n):
        """``n`` random tokens."""
        return self.draws.integers(0, self.vocab_size, n).tolist()

    def seconds(self, way, n):
        """The time until the first token of a next turn behind ``n`` tokens. Raises `Wrong`."""
        text = self.text(n)
        self.cache.attach(self.stores[way], self.pages)
        self.engine.run([Request(text, 1)])
        before = self.last_block(text)
        if way != "device":
            self.cache.evict(self.engine.pool.n_blocks)
        if way == "disk":
            forget(self.stores[way].files.folder)
        turn = Request([*text[: n // 16 * 16], *self.text(TURN + n % 16)], 1)
        start = time.perf_counter()
        (result,) = self.engine.run([turn])
        elapsed = time.perf_counter() - start
        if result.cached_tokens != (0 if way == "anew" else n // 16 * 16):
            raise Wrong(f"{way}, {n} tokens: {result.cached_tokens} of them were found")
        if way != "anew" and not np.array_equal(self.last_block(text), before):
            raise Wrong(f"{way}, {n} tokens: the last block's bits are others than those computed")
        self.cache.evict(self.engine.pool.n_blocks)
        for name in self.stores[way].names(text, 16):
            self.stores[way].remove(name)
        return elapsed

    def last_block(self, text):
        """The bits of a text's last block on the device."""
        blocks, memory = self.cache.match([*text, 0]).blocks, self.pages.host(1)
        self.pages.read(blocks[-1:], memory, [0])
        self.engine.pool.drop(blocks)
        return np.array(memory)

    def copies(self, repeats):
        """`COPIED` blocks from the host: a call a piece, and one launch."""
        n_pieces, most, size = self.pages.words.shape
        n = min(COPIED, most - 1)
        memory, blocks, times = self.pages.host(n), [*range(1, n + 1)], {"calls": [], "launch": []}
        memory[:] = 1

        def calls():
            for block in blocks:
                for piece in range(n_pieces):
                    self.pages.words[piece, block].copy_to_device(np.asarray(memory[block - 1, piece]))
            cuda.synchronize()

        for name, copy in ("calls", calls), ("launch", lambda: self.pages.write(memory, range(n), blocks)):
            for _ in range(1 + repeats):
                start = time.perf_counter()
                copy()
                times[name].append(time.perf_counter() - start)
        found = {f"{name}_ms": _digits(1e3 * statistics.median(some[1:])) for name, some in times.items()}
        return {"blocks": n, "pieces": n_pieces, "bytes": n * self.block_bytes, **found}


def forget(folder):
    """Ask the system to keep nothing of the files in a folder in its memory."""
    for path in folder.glob("*/*"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(options, folder, progress=lambda text: None):
    """The figures as a list, one item a shape."""
    found = []
    for shape in options.shapes:
        tiers, rows = Tiers(shape, max(options.tokens), folder), []
        for n in options.tokens:
            times = {way: [] for way in WAYS}
            for i in range(WARM + options.repeats):
                progress(f"{shape}, {n} tokens")
                for way in WAYS:
                    seconds = tiers.seconds(way, n)
                    if i >= WARM:
                        times[way].append(1e3 * seconds)
            rows.append({"tokens": n, **{way: [*map(_digits, sorted(some))] for way, some in times.items()}})
        found.append({"shape": shape, "block_bytes": tiers.block_bytes, "rows": rows, "copy": tiers.copies(5)})
        found[-1]["even"] = {way: even(rows, way) for way in WAYS[1:]}
        del tiers
    return found


def even(rows, way):
    """From how many tokens on a way is faster than to compute anew, between two measured points by a straight line;
    None: not up to the last one."""
    gains = [(row["tokens"], statistics.median(row["anew"]) - statistics.median(row[way])) for row in rows]
    for (less, lost), (more, won) in zip([(0, None), *gains], gains):
        if won > 0 and all(gain > 0 for n, gain in gains if n >= more):
            return more if lost is None or lost >= 0 else round(less + (more - less) * -lost / (won - lost))
    return None


# --- what is read ----------------------------------------------------------------------------------------------------


def format_table(result):
    """The figures as lines of Markdown."""
    lines = ["| | tokens | computed anew, ms | on the device | host's memory | files | disk |", "|---|" + "---:|" * 6]
    for one in result["shapes"]:
        for row in one["rows"]:
            middle = {way: statistics.median(row[way]) for way in WAYS}
            cells = [f"{bench.short(middle[way])} ({middle[way] / middle['anew']:.2f})" for way in WAYS[1:]]
            cells = [one["shape"], f"{row['tokens']}", bench.short(middle["anew"]), *cells]
            lines.append("| " + " | ".join(cells) + " |")
    what = "the time until a next turn's first token, without a server, medians; in brackets: of that anew"
    return [*lines, "", f"*{result['device']}, level `{result['level']}`, random weights; {what}.*"]


def copy_table(result):
    """The copies as lines of Markdown."""
    lines = ["| | blocks of pieces | MB | a call a piece, ms | one launch, ms | GB/s |", "|---|" + "---:|" * 5]
    for one in result["shapes"]:
        copy = one["copy"]
        cells = [one["shape"], f"{copy['blocks']} × {copy['pieces']}", f"{copy['bytes'] / 1e6:.0f}"]
        cells += [bench.short(copy["calls_ms"]), bench.short(copy["launch_ms"])]
        lines.append("| " + " | ".join([*cells, f"{copy['bytes'] / copy['launch_ms'] / 1e6:.3g}"]) + " |")
    return [*lines, "", f"*{result['device']}: from the host's memory to the device, medians of 5.*"]


TABLES = {"turn": format_table, "copy": copy_table}


def filled(page, folder=RESULTS):
    """A page's text with its tables of the committed figures."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in result_files(folder, "tiers.json")]

    def table(match):
        lines = [line for result in results for line in ["", *TABLES[match[2]](result)]]
        return match[1] + "\n".join([*lines[1:], ""]) + match[3]

    return BLOCK.sub(table, page)


def draw(results, path):
    """Draw the times against the length of the text, a panel a shape and device, to the SVG file ``path``."""
    panels = [(result["device"], one) for result in results for one in result["shapes"]]
    rows = -(-len(panels) // 2)
    figure, axes = pyplot().subplots(rows, 2, figsize=(7.4, 0.5 + 2.7 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (device, one) in zip(axes.flat, panels):
        tokens = [row["tokens"] for row in one["rows"]]
        for way, colour in zip(WAYS, (COLOURS[6], COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[4])):
            times = [statistics.median(row[way]) for row in one["rows"]]
            axis.plot(tokens, times, "o-", ms=3, lw=1.3, color=colour, label="computed anew" if way == "anew" else way)
        axis.set(xscale="log", yscale="log", xticks=tokens, xlabel="tokens before the turn")
        axis.set_xticks(tokens, [str(n) for n in tokens])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_title(f"{one['shape']}\n{device.replace('NVIDIA ', '')}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms until the first token")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(WAYS), frameon=False)
    save(figure, path)


def write_pages():
    """Part of ``make plots``."""
    for page in PAGES:
        write_text(page, filled(page.read_text(encoding="utf-8")))
    draw([json.loads(path.read_text(encoding="utf-8")) for path in result_files(RESULTS, "tiers.json")], PICTURE)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--page"]:
        return write_pages()
    parser = argparse.ArgumentParser(prog="benchmarks/tiers.py", description=__doc__.split("\n")[0])
    add, shapes = parser.add_argument, DEFAULT_SHAPES[common.BACKEND]
    add("--shapes", type=_names(SHAPES), default=shapes, help=f"of {','.join(SHAPES)} ({','.join(shapes)})")
    add("--tokens", type=_numbers, default=TOKENS, help=f"of the text ({','.join(map(str, TOKENS))})")
    add("--repeats", type=int, default=5, help="of each, of which the median counts (5)")
    add("--folder", type=Path, help="where files are written, for the time of this (a temporary one)")
    add("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    options = parser.parse_args(argv)
    longest = min(SHAPES[shape].n_ctx for shape in options.shapes) - TURN - 16
    if options.repeats < 1 or not options.tokens or not 16 <= min(options.tokens) <= max(options.tokens) <= longest:
        parser.error(f"--repeats must be at least 1, and --tokens from 16 to {longest}")
    path = options.out / device_folder() / "tiers.json"
    try:
        make_output(path, "--out")
    except FileError as error:
        parser.error(str(error))
    calm_collector()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, tqdm(disable=None) as bar:

        def progress(text):
            bar.set_description(text)
            bar.update()

        try:
            shapes = measure(options, folder, progress)
        except Wrong as error:
            print(error, file=sys.stderr)
            raise SystemExit(1) from None
    level = "fast" if common.BACKEND == "gpu" else "kv"
    result = {"device": bench.device_name(), "level": level, "repeats": options.repeats, "shapes": shapes}
    write_text(path, json.dumps(result, indent=1) + "\n")
    print("\n".join([*format_table(result), "", *copy_table(result), "", f"written: {path}"]))


if __name__ == "__main__":
    main()
