"""GPT-2 without a GPU, in one run: the level ``kv`` compared with transformers, llama.cpp and NumPy's products.

    python benchmarks/laptop.py [--weights FILE] [--only decode,batch,prefill,start,llama,few] [--tokens 64]
                                [--prompt 16] [--peers transformers,llama.cpp] [--rounds 3]
                                [--out benchmarks/results] [--name laptop]

Prints a table and writes ``<out>/cpu/<name>.json``. Without ``--weights`` the model has the size of GPT-2 (124M) and
random weights, on which the time does not depend. Run it on an idle machine: everything here is one or two cores'
arithmetic, and what else they do is in the figures.

* ``decode``: tokens a second after a prompt, batch 1, from the first new token to the last, in float32 and float16. All
  take the most likely token. llama.cpp runs the same weights from a GGUF file of type F16 (``pip install
  -e .[peers]``). The floor is the time in which NumPy, adding up an array, reads as many bytes as there are weights.
* ``batch``: 8 sequences at once compared with one, tokens a second of all together.
* ``prefill``: chapter 9's product of 512 rows compared with NumPy's, at the four shapes of a layer.
* ``start``: processor seconds of ``run.py`` up to its first token, with compiled kernels on disk and without. Each time
  after a run that is not counted: on a virtual machine, memory that others have given back is slow to come again.
* ``llama``: SmolLM2, if ``make smollm2`` has fetched it: tokens a second as in ``decode``, and the seconds of a whole
  ``run.py --chat`` to the first token of an answer.
* ``few``: tokens a second as in ``decode`` with weights of 8 and 4 bits; and of SmolLM2 as it was published, 4 bits in
  its layers and 8 in its head, which llama.cpp runs from the same GGUF file (it is fetched for that).

Every figure is measured in a process of its own, in rounds (ours, theirs, ours, theirs …), so that a slow moment of the
machine meets all; it is the median, with the lowest and the highest next to it.

Exit codes: 0 all measured, 1 something failed (its error stands in the table and in the file), 2 bad arguments.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":
    os.environ["MINI_BACKEND"] = "cpu"

import common  # noqa: E402, F401  (before numba.cuda)

# isort: split
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.random_gpt2 import GPT2_124M, random_weights  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from ch14_mini_llm.model.layout import WeightsError  # noqa: E402
from ch14_mini_llm.model.weights import load_weights, save_weights  # noqa: E402

PARTS = ("decode", "batch", "prefill", "start", "llama", "few")
SMOLLM2, QUESTION = ROOT / "data" / "smollm2-135m.bin", "What is the capital of France?"
PEERS = {"transformers": ("torch", "transformers"), "llama.cpp": ("xllamacpp", "gguf")}  # and what must be installed
RESULTS = ROOT / "benchmarks" / "results"
SEQUENCES, PREFILL_ROWS = 8, 512
DTYPES = ("float32", "float16")
FEW = ("int8", "int4")


# --- what is measured, each in a process of its own ------------------------------------------------------------------


def decode_ours(weights, dtype, n_tokens, n_prompt):
    """Tokens a second of the level ``kv``."""
    from ch14_mini_llm.levels import make_engine
    from ch14_mini_llm.levels.generate import generate

    config, tensors = load_weights(weights)
    model, rates = make_engine("kv", config, tensors, n_prompt + n_tokens, dtype=dtype), []
    for _ in range(3):
        times = [time.perf_counter() for _ in generate(model, prompt_of(config, n_prompt), n_tokens)]
        rates.append((n_tokens - 1) / (times[-1] - times[0]))
    return max(rates[1:])


def decode_transformers(weights, n_tokens, n_prompt):
    """Tokens a second of transformers in float32, with its cache, the loop written out."""
    from benchmarks.peers import TransformersEager, TransformersLlama

    config, tensors = load_weights(weights)
    peer = {"gpt2": TransformersEager, "llama": TransformersLlama}[config.architecture]
    model, rates = peer(config, tensors, n_prompt + n_tokens, device="cpu"), []
    for _ in range(3):
        first = model.prefill(prompt_of(config, n_prompt))
        start = time.perf_counter()
        model.decode(first, n_tokens - 1)
        rates.append((n_tokens - 1) / (time.perf_counter() - start))
    return max(rates[1:])


def decode_llama_cpp(weights, n_tokens, n_prompt):
    """Tokens a second of llama.cpp in F16, by its own clock."""
    config, tensors = load_weights(weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gpt2.gguf")
        write_gguf(path, config, tensors)
        return _llama_cpp(path, prompt_of(config, n_prompt), n_tokens)


def decode_gguf(path, n_tokens, n_prompt):
    """Tokens a second of llama.cpp with a GGUF file as it is."""
    return _llama_cpp(path, np.random.default_rng(0).integers(0, 10_000, n_prompt).tolist(), n_tokens)


def _llama_cpp(path, prompt, n_tokens):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), 512, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads()
    server, rates = xllamacpp.Server(params), []
    request = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    for _ in range(3):
        rates.append(server.handle_completions(request)["timings"]["predicted_per_second"])
    return max(rates[1:])


def read_speed(weights):
    """GB/s at which one thread adds up an array that fits no cache."""
    array, seconds = np.ones(1 << 27, np.float32), []
    for _ in range(5):
        start = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - start)
    return array.nbytes / min(seconds) / 1e9


def batch_ours(weights, dtype, n_sequences, n_tokens, n_prompt):
    """Tokens a second of all sequences together, from the moment that all have their first to the end."""
    from ch14_mini_llm.engine.engine import Engine
    from ch14_mini_llm.engine.request import Request

    config, tensors = load_weights(weights)
    blocks = n_sequences * (n_prompt + n_tokens + 16) // 16
    engine = Engine.of(config, tensors, "kv", dtype=dtype, num_blocks=blocks, max_batch=n_sequences, prefix_cache=False)
    rates = []
    for _ in range(3):
        made = dict.fromkeys((engine.submit(Request(prompt_of(config, n_prompt, seed), n_tokens))
                              for seed in range(n_sequences)), 0)  # fmt: skip
        start, before = None, 0
        while not engine.idle:
            for output in engine.step():
                made[output.id] += len(output.tokens)
            if start is None and min(made.values()):
                start, before = time.perf_counter(), sum(made.values())
        rates.append((sum(made.values()) - before) / (time.perf_counter() - start))
    return max(rates[1:])


def prefill_products(weights, dtype):
    """[[K, N, our GFLOP/s, NumPy's]] for the products of a layer, `PREFILL_ROWS` rows; ours are checked."""
    from numba import cuda

    from chapters.ch09_gemm import panels

    config, _ = load_weights(weights)
    d, M, rng, rows = config.d_model, PREFILL_ROWS, np.random.default_rng(0), []
    for K, N in ((d, 3 * d), (d, d), (d, config.d_ff), (config.d_ff, d)):
        x, W = rng.standard_normal((M, K), dtype=np.float32), rng.standard_normal((K, N), dtype=np.float32)
        W = W.astype(dtype)
        inputs = [cuda.to_device(array) for array in (x, panels.pack_reference(W), np.zeros(N, np.float32))]
        ours, theirs, W = cuda.device_array((M, N), np.float32), np.empty((M, N), np.float32), W.astype(np.float32)
        kernel, launch = panels.linear(M, N)
        work = (kernel[launch], (*inputs, ours, M, N, K, 0)), (np.matmul, (x, W, theirs))
        speeds = []
        for run, arguments in work:  # one after the other: the threads of BLAS go on looking for work for a while
            times = []
            for _ in range(9):
                start = time.perf_counter()
                run(*arguments)
                times.append(time.perf_counter() - start)
            speeds.append(2e-9 * M * N * K / statistics.median(times[2:]))
            time.sleep(0.3)
        assert np.allclose(ours.copy_to_host(), theirs, atol=1e-3 * K**0.5)
        rows.append([K, N, *speeds])
    return rows


def first_token(weights, dtype, cold):
    """Processor seconds of a whole ``run.py`` that makes one token."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "MINI_BACKEND": "cpu", **({"MINI_CACHE_DIR": folder} if cold else {})}
        environ.pop("PYTHONDONTWRITEBYTECODE", None)  # Python keeps what it compiles, by default
        command = [sys.executable, "ch14_mini_llm/run.py", "--engine=kv", f"--dtype={dtype}", f"--weights={weights}",
                   "--tokens=1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16", "--max_new=1", "--json"]  # fmt: skip
        uncounted = {name: value for name, value in environ.items() if name != "MINI_CACHE_DIR"}
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=uncounted)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environ)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_word(weights, dtype):
    """Seconds from the start of ``run.py --chat`` to the first token of its answer to `QUESTION`."""
    command = [sys.executable, "ch14_mini_llm/run.py", "--chat", f"--prompt={QUESTION}", f"--weights={weights}",
               "--engine=kv", f"--dtype={dtype}", "--max_new=16", "--json"]  # fmt: skip
    environ = {**os.environ, "MINI_BACKEND": "cpu"}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for _ in range(2):  # the first is not counted
        done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environ)
    return json.loads(done.stdout)["first_token_from_program_start_s"]


def prompt_of(config, n, seed=0):
    """Random ids, the same for all."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, n).tolist()


def threads():
    """How many threads all take."""
    from common.cpu.launch import workers

    return workers()


def write_gguf(path, config, tensors):
    """A GPT-2 as llama.cpp reads it, in F16: matrices transposed, and a vocabulary that is only there to be counted."""
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(config.vocab_size)])
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * config.vocab_size)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(config.vocab_size - 1)
    names = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm",
             "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up",
             "mlp.c_proj": "ffn_down"}  # fmt: skip
    for name, array in tensors.items():
        *where, kind = name.split(".")
        layer = f"blk.{where[1]}." if where[0] == "h" else ""
        role = ".".join(where[2:] if layer else where)
        matrix = array.ndim == 2 and layer
        value = np.ascontiguousarray(array.T if matrix else array, np.float16 if array.ndim == 2 else np.float32)
        if role == "wpe":
            value = value.astype(np.float32)
        writer.add_tensor(f"{layer}{names[role]}.{kind}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CHILDREN = {f.__name__: f for f in (decode_ours, decode_transformers, decode_llama_cpp, decode_gguf, read_speed,
                                    batch_ours, prefill_products)}  # fmt: skip


# --- the run ---------------------------------------------------------------------------------------------------------


def child(name, *arguments, n_threads=None):
    """What ``CHILDREN[name]`` returns in a process of its own. Raises RuntimeError with its last line."""
    environ = {**os.environ, "MINI_BACKEND": "cpu", **({"MINI_THREADS": str(n_threads)} if n_threads else {})}
    command = [sys.executable, __file__, "--child", json.dumps([name, *arguments])]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])


def plan(parts, peers, weights, n_tokens, n_prompt, gguf=None):
    """[(name of a figure, a function that measures it once)], in the order of a round. gguf: SmolLM2's file."""
    how, work = (n_tokens, n_prompt), []
    add = lambda name, *arguments, **options: work.append((name, lambda: child(*arguments, **options)))
    if "decode" in parts:
        for dtype in DTYPES:
            add(f"decode {dtype}", "decode_ours", weights, dtype, *how)
        if "transformers" in peers:
            add("decode transformers float32", "decode_transformers", weights, *how)
        if "llama.cpp" in peers:
            add("decode llama.cpp F16", "decode_llama_cpp", weights, *how)
        add("decode float16, one thread", "decode_ours", weights, "float16", *how, n_threads=1)
        add("read GB/s, one thread", "read_speed", weights)
    if "few" in parts:
        known = {name for name, _ in work}
        for dtype in [dtype for dtype in ("float16", *FEW) if f"decode {dtype}" not in known]:
            add(f"decode {dtype}", "decode_ours", weights, dtype, *how)
        if SMOLLM2.exists():
            for dtype in ("float16", "int4") if "llama" not in parts else ("int4",):
                add(f"SmolLM2 {dtype}", "decode_ours", str(SMOLLM2), dtype, *how)
        if gguf is not None:
            add("SmolLM2 llama.cpp, the same file", "decode_gguf", str(gguf), *how)
    if "batch" in parts:
        for n in (1, SEQUENCES):
            add(f"batch of {n}, float32", "batch_ours", weights, "float32", n, *how)
    if "prefill" in parts:
        for dtype in DTYPES:
            add(f"prefill {dtype}", "prefill_products", weights, dtype)
    if "start" in parts:
        for cold in (False, True):
            name = f"start to first token, {'cold' if cold else 'warm'}, CPU s"
            work.append((name, lambda cold=cold: first_token(weights, "float32", cold)))
    if "llama" in parts and SMOLLM2.exists():
        for dtype in DTYPES:
            add(f"SmolLM2 {dtype}", "decode_ours", str(SMOLLM2), dtype, *how)
        if "transformers" in peers:
            add("SmolLM2 transformers float32", "decode_transformers", str(SMOLLM2), *how)
        work.append(("SmolLM2, start to the first token of an answer, s", lambda: first_word(SMOLLM2, "float32")))
    return work


def measure(work, rounds, progress=lambda: None):
    """({name: [median, lowest, highest], or a list of such lists}, {name: error})."""
    found, errors = {name: [] for name, _ in work}, {}
    for _ in range(rounds):
        for name, run in work:
            if name not in errors:
                try:
                    found[name].append(run())
                except (RuntimeError, subprocess.CalledProcessError) as error:
                    errors[name] = str(error)[:300]
            progress()
    summary = lambda values: [statistics.median(values), min(values), max(values)]
    figures = {}
    for name, values in found.items():
        if values and isinstance(values[0], list):
            columns = [list(zip(*row)) for row in zip(*values)]  # of each shape: its K, its N, ours, theirs
            figures[name] = [[K[0], N[0], summary(ours), summary(theirs)] for K, N, ours, theirs in columns]
        elif values:
            figures[name] = summary(values)
    return figures, errors


def ratios(figures, weight_bytes):
    """The ratios that the table ends with, of those figures that are there."""
    median = {name: value[0] for name, value in figures.items() if not isinstance(value[0], list)}
    pairs = {
        "float32 / transformers": ("decode float32", "decode transformers float32"),
        "float16 / llama.cpp F16": ("decode float16", "decode llama.cpp F16"),
        **{f"{dtype} / float16": (f"decode {dtype}", "decode float16") for dtype in FEW},
        "SmolLM2 float32 / transformers": ("SmolLM2 float32", "SmolLM2 transformers float32"),
        "SmolLM2 int4 / llama.cpp, the same file": ("SmolLM2 int4", "SmolLM2 llama.cpp, the same file"),
        f"{SEQUENCES} sequences / one": (f"batch of {SEQUENCES}, float32", "batch of 1, float32"),
    }
    found = {name: median[a] / median[b] for name, (a, b) in pairs.items() if a in median and b in median}
    if {"decode float16, one thread", "read GB/s, one thread"} <= median.keys():
        floor = median["read GB/s, one thread"] * 1e9 / weight_bytes
        found["share of the floor, float16, one thread"] = median["decode float16, one thread"] / floor
    for dtype in DTYPES:
        rows = figures.get(f"prefill {dtype}", [])
        if rows:
            found[f"prefill {dtype} / NumPy, least of four"] = min(ours[0] / theirs[0] for _, _, ours, theirs in rows)
    return found


def table(result):
    """The result as lines for people."""
    lines = []
    for name, value in result["figures"].items():
        if isinstance(value[0], list):
            lines += [f"{name} {K} x {N}: {ours[0]:.1f} GFLOP/s, NumPy {theirs[0]:.1f}" for K, N, ours, theirs in value]
        else:
            lines.append(f"{name}: {value[0]:.2f} ({value[1]:.2f} … {value[2]:.2f})")
    lines += [f"{name}: {error}" for name, error in result["errors"].items()]
    return [*lines, "", *(f"{name}: {ratio:.2f}" for name, ratio in result["ratios"].items())]


def main(argv=None):
    """Run the program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", help="a weight file (default: 124M random weights)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--peers", default=",".join(PEERS), help="of transformers,llama.cpp; or none")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens (64)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (16)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each figure is taken (3)")
    parser.add_argument("--out", default=RESULTS, type=Path, help="folder of the results (benchmarks/results)")
    parser.add_argument("--name", default="laptop", help="of the file with the results (laptop)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        name, *arguments = json.loads(options.child)
        print(json.dumps(CHILDREN[name](*arguments)))
        return 0
    parts, peers = options.only.split(","), [] if options.peers == "none" else options.peers.split(",")
    for what, given, known in ("--only", parts, PARTS), ("--peers", peers, PEERS):
        if set(given) - set(known):
            parser.error(f"{what} is {','.join(given)}; it takes {', '.join(known)}")
    if options.tokens < 2 or min(options.prompt, options.rounds) < 1:
        parser.error("--tokens must be at least 2, --prompt and --rounds at least 1")
    if not options.name.isidentifier():
        parser.error(f"--name={options.name}: letters, digits and _, such as few_bits")
    left_out = {name: f"not installed: {', '.join(lacking)}" for name in peers
                if (lacking := [module for module in PEERS[name] if not importlib.util.find_spec(module)])}  # fmt: skip
    if "llama" in parts and not SMOLLM2.exists():
        left_out["llama"] = f"there is no {SMOLLM2.relative_to(ROOT)}: make smollm2"
    path = options.out / "cpu" / f"{options.name}.json"
    try:
        make_output(path, "--out")
    except FileError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        weights = options.weights or str(Path(folder, "gpt2.bin"))
        try:
            if not options.weights:
                save_weights(weights, GPT2_124M, random_weights(GPT2_124M))
            config, _ = load_weights(weights)
        except WeightsError as error:
            parser.error(str(error))
        there = [name for name in peers if name not in left_out]
        gguf = None
        if "few" in parts and SMOLLM2.exists() and "llama.cpp" in there:
            sys.path.insert(0, str(ROOT / "data"))
            import gguf_model

            gguf = gguf_model.fetch_smollm2(Path(folder))
        work = plan(parts, there, weights, options.tokens, options.prompt, gguf)
        with tqdm(total=len(work) * options.rounds, desc="measuring", file=sys.stderr, leave=False) as bar:
            figures, errors = measure(work, options.rounds, bar.update)
    weight_bytes = 2 * (config.n_parameters - config.n_ctx * config.d_model)  # float16; of positions a row is read
    result = {
        "machine": machine(), "config": vars(config), "tokens": options.tokens, "prompt": options.prompt,
        "rounds": options.rounds, "weight_bytes_float16": weight_bytes, "figures": figures,
        "ratios": ratios(figures, weight_bytes), "errors": errors | left_out,
    }  # fmt: skip
    print("\n".join(table(result)))
    write_text(path, json.dumps(result, indent=1) + "\n")
    return 1 if errors else 0


def machine():
    """The processor, its cores, and the versions of what was measured."""
    import importlib.metadata as metadata

    from common.cpu.machine import cpu_name

    versions = {}
    for name in ("numba", "numpy", "torch", "transformers", "xllamacpp"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"cpu": cpu_name(), "threads": threads(), "packages": versions}


if __name__ == "__main__":
    sys.exit(main())
