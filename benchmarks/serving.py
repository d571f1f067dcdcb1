"""The server under load, compared with llama.cpp's on the same machine and the same weights.

    python benchmarks/serving.py [--only closed,open,chat,restart] [--clients 8] [--requests 5] [--new 48] [--turns 8]
                                 [--peers llama.cpp,transformers] [--weights FILE] [--dtype float16]
                                 [--out benchmarks/results] [--name serving]

Prints a table and writes ``<out>/<device>/<name>.json``. Each server runs in a process of its own with as many
sequences at a time as there are clients; the clients are in this process, and read the streams from bare sockets. All
take the likeliest token and make the same number of them. Without a GPU it serves SmolLM2 (`make smollm2`), and
llama.cpp (``pip install -e .[peers]``) has the same weights in F16. transformers' server, with its continuous batches,
takes any weights of ours (``pip install transformers[serving]``). Run it on an idle machine.

* ``closed``: so many clients, each of which asks again as soon as it has its answer.
* ``open``: requests arrive at random (a Poisson process), at 0.7 of the rate that our server reaches in ``closed``.
* ``overload``: three times as many, at twice the rate that it reaches, in our server: once with its long queue, and
  once with one half as long as its batch, behind which a request is answered 429.
* ``chat``: as many conversations as clients, with one system prompt, and each turn sends all turns before it: ours with
  the prefix cache and without, and how many tokens of the prompts were found in it; turn by turn as well.
* ``restart``: a session's next turn behind a history of some 2000 tokens, in a server that has just been started: with
  the session's files (``--kv_dir``), and without. Only ours.

Times are milliseconds, as 50th, 95th and 99th percentile: until the first text, between two pieces of text, and of the
whole answer. *Goodput*: the share of requests whose first text came within ``LIMITS``' first, and whose pieces came in
its second on average.

``--page`` writes the tables of the committed figures into chapter 14's pages and draws their plot instead: part of
``make plots``.

Exit codes: 0 all measured, 1 something failed, 2 bad arguments.
"""

import argparse
import asyncio
import functools
import importlib.util
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (before numba.cuda)

# isort: split
from tqdm import tqdm  # noqa: E402

from benchmarks.gpt2 import _digits, _names, _packages  # noqa: E402
from benchmarks.ladders import RESULTS, device_folder  # noqa: E402
from ch14_mini_llm.files import FileError, make_output, write_text  # noqa: E402
from common import bench  # noqa: E402

QUESTIONS, PEERS = ("closed", "open", "overload", "chat", "restart"), ("llama.cpp", "transformers")
SMOLLM2 = ROOT / "data" / "smollm2-135m.bin"
LIMITS = 2000, 200  # ms, of goodput
OPEN_SHARE, OVERLOAD = 0.7, 2.0  # of the rate that ``closed`` reaches
LONGER = 3  # times as many requests in ``overload``: a queue takes its time to become long
RESTARTS = 3
SYSTEM_WORDS, ASKED_WORDS = 150, (20, 80)
WORDS = "the cat house river sees a small green tree and old road under bright water where many birds sing".split()
PERCENTILES = 50, 95, 99
SHORT = "ours, a short queue"
SAID = {"ours": "Kernel by Kernel", "ours, no cache": "… without the prefix cache",
        SHORT: "… with a queue half as long as the batch", "llama.cpp": "llama.cpp",
        "transformers": "transformers serve"}  # fmt: skip


def words(count, *seed):
    """A text of so many words, the same for the same seed."""
    return " ".join(random.Random(repr(seed)).choices(WORDS, k=count))


class Answer:
    """A request's times, in seconds from when it was sent: of each piece of text, and of the end; and its usage."""

    def __init__(self, times, end, usage, text):
        self.times, self.end, self.usage, self.text = times, end, usage, text

    @property
    def cached(self):
        """How many tokens of the prompt were found in a cache."""
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


class Refused(RuntimeError):
    """A server had too much to do."""


async def ask(port, messages, new, fields):
    """Stream one chat completion from a server on this machine. Raises `Refused` for 429, and RuntimeError for any
    other answer."""
    body = {
        "messages": messages, "max_tokens": new, "temperature": 0, "stream": True, "ignore_eos": True,
        "stream_options": {"include_usage": True}, **fields,
    }  # fmt: skip
    data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
    head = "POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    start, times, usage, text = time.perf_counter(), [], None, []
    try:
        writer.write("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            kind = Refused if b" 429 " in status else RuntimeError
            raise kind(f"{status.decode().strip()}: {(await reader.read(2000)).decode(errors='replace')}")
        while line := await reader.readline():
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            usage = event.get("usage") or usage
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if piece:
                times.append(time.perf_counter() - start)
                text.append(piece)
        return Answer(times, time.perf_counter() - start, usage, "".join(text))
    finally:
        writer.close()


# --- the servers -----------------------------------------------------------------------------------------------------


class Server:
    """A server's process; ``with`` starts and ends it. fields: what its requests have besides."""

    def __init__(self, command, pattern, fields):
        self.command, self.pattern, self.fields = command, pattern, fields

    def __enter__(self):
        self.process = subprocess.Popen(self.command, cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace")
        said = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(self.pattern, line):
                self.port = int(found[1])
                break
        else:
            raise RuntimeError(f"{' '.join(self.command[:3])} … has ended: {''.join(said)[-2000:]}")
        self._reading = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._reading.kill()
        self._reading.wait()


def ours(options, *more):
    """Our server."""
    command = [sys.executable, "ch14_mini_llm/serve.py", "--port=0", "--name=m", f"--weights={options.weights}"]
    command += [f"--max_batch={options.clients}", *([f"--dtype={options.dtype}"] if options.dtype else []), *more]
    return Server(command, r"ready: http://[^:]*:(\d+)/", {"model": "m"})


def llama_cpp(options, folder):
    """llama.cpp's, with a slot for each client."""
    path = folder / "smollm2-f16.gguf"
    if not path.exists():
        half_gguf(fetched(folder), path)
    return Server([sys.executable, __file__, "--peer", str(path), str(options.clients)], r"listens: \S+:(\d+)", {})


def transformers_serve(options, folder):
    """transformers' server with its continuous batches, and the same weights."""
    path = folder / "hf"
    if not path.exists():
        from benchmarks.hf_folder import write_hf_folder

        write_hf_folder(options.weights, path, options.dtype or "float16")
    port = free_port()
    device = "cuda" if common.BACKEND == "gpu" else "cpu"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(path), "--continuous-batching"]
    command += ["--log-level=info", "--host=127.0.0.1", f"--port={port}", f"--device={device}"]
    if device == "cuda":  # the fastest of four settings on an H200
        command += ["--cb-use-cuda-graph", "--attn-implementation=sdpa"]
    return Server(command, r"running on http://[^:]*:(\d+)", {"model": str(path), "ignore_eos": None})


NEEDED = {
    "llama.cpp": ("pip install -e .[peers]", "xllamacpp", "gguf"),
    "transformers": (
        "pip install transformers[serving]", "torch", "transformers", "accelerate", "fastapi", "uvicorn", "openai",
    ),
}  # fmt: skip


def missing(peer):
    """What a peer's server needs and this Python lacks, as one line; None if it has everything."""
    cure, *modules = NEEDED[peer]
    lacks = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"--peers={peer} needs {', '.join(lacks)}: {cure}, or give --peers=none" if lacks else None


def free_port():
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def fetched(folder):
    """SmolLM2 as it is published."""
    sys.path.insert(0, str(ROOT / "data"))
    import gguf_model

    return gguf_model.fetch_smollm2(folder)


def half_gguf(source, path):
    """Write a GGUF file again with matrices in F16 and vectors in F32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def be_peer(path, clients):
    """Serve a GGUF file with llama.cpp until somebody ends this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity, params.port = path, 0, 0
    params.n_parallel, params.n_ctx = clients, 2048 * clients
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = cores
    server = xllamacpp.Server(params)
    print(f"listens: {server.listening_address}", file=sys.stderr, flush=True)
    while True:
        time.sleep(60)


# --- the loads -------------------------------------------------------------------------------------------------------


def asked(*seed):
    """One question, as messages."""
    low, high = ASKED_WORDS
    return [{"role": "user", "content": words(random.Random(repr(seed)).randint(low, high), "asked", *seed)}]


async def closed(server, clients, requests, new, tag="closed"):
    """``clients`` who ask ``requests`` times each, one after another. tag: other questions for another one."""

    async def client(number):
        answers = []
        for turn in range(requests):
            answers.append(await ask(server.port, asked(tag, number, turn), new, server.fields))
        return answers

    return await _timed(client(number) for number in range(clients))


async def arriving(server, rate, count, new):
    """``count`` requests that arrive at random, ``rate`` a second on average, whether or not others are answered."""
    draws, at = random.Random(1), 0.0

    async def one(number, at):
        await asyncio.sleep(at)
        try:
            return [await ask(server.port, asked("open", number), new, server.fields)]
        except Refused:
            return []

    works = []
    for number in range(count):
        works.append(one(number, at))
        at += draws.expovariate(rate)
    return await _timed(works)


async def chatting(server, clients, turns, new):
    """``clients`` conversations of some turns with one system prompt; each turn sends all that was said before."""
    system = {"role": "system", "content": words(SYSTEM_WORDS, "system")}

    async def talk(number):
        said, answers = [system], []
        for turn in range(turns):
            said.append({"role": "user", "content": words(ASKED_WORDS[0], "chat", number, turn)})
            answers.append(await ask(server.port, said, new, server.fields))
            said.append({"role": "assistant", "content": answers[-1].text})
        return answers

    return await _timed(talk(number) for number in range(clients))


async def _timed(works):
    start = time.perf_counter()
    answers = [answer for many in await asyncio.gather(*works) for answer in many]
    return answers, time.perf_counter() - start


def row(name, answers, seconds, count):
    """What a load's answers say. count: how many requests there were, of which the others were refused."""
    gaps = [after - before for answer in answers for before, after in zip(answer.times, answer.times[1:])]
    mean_gap = lambda answer: (answer.times[-1] - answer.times[0]) / max(1, answer.usage["completion_tokens"] - 1)
    good = [1e3 * answer.times[0] <= LIMITS[0] and 1e3 * mean_gap(answer) <= LIMITS[1] for answer in answers]
    tokens = sum(answer.usage["completion_tokens"] for answer in answers)
    prompts = sum(answer.usage["prompt_tokens"] for answer in answers)
    cached = sum(answer.cached for answer in answers)
    return {
        "name": name, "requests": len(answers), "refused": count - len(answers),
        "requests_s": _digits(len(answers) / seconds), "tokens_s": _digits(tokens / seconds),
        "prompt_tokens": prompts, "cached": _digits(cached / prompts),
        "events_s": _digits(sum(len(answer.times) for answer in answers) / seconds),
        "first_ms": percentiles([answer.times[0] for answer in answers]), "gap_ms": percentiles(gaps),
        "whole_ms": percentiles([answer.end for answer in answers]), "goodput": _digits(sum(good) / count),
    }  # fmt: skip


def by_turn(answers, turns):
    """Each turn of the conversations, which follow one another in ``answers``: medians over them."""
    found = []
    for turn in range(turns):
        alike = sorted(answers[turn::turns], key=lambda answer: answer.times[0])
        prompts = sum(answer.usage["prompt_tokens"] for answer in alike)
        found.append({
            "prompt_tokens": round(prompts / len(alike)),
            "cached": _digits(sum(answer.cached for answer in alike) / prompts),
            "first_ms": _digits(1e3 * alike[len(alike) // 2].times[0]),
        })  # fmt: skip
    return found


def percentiles(seconds):
    """`PERCENTILES` in milliseconds."""
    ordered = sorted(seconds)
    return [_digits(1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)]) for p in PERCENTILES]


def restarted(options, folder):
    """The question ``restart``: times to the first text of a next turn, each in a new server."""
    said = [{"role": "user", "content": words(options.history, "history")}]
    kept = f"--kv_dir={folder / 'kv'}"
    with ours(options, kept) as server:
        answer = asyncio.run(ask(server.port, said, 16, server.fields | {"session_id": "one"}))
    history = answer.usage["total_tokens"]
    said += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And what came then?"}]
    rows = []
    for name, more in ("from files", [kept]), ("computed anew", []):
        times, texts = [], []
        for _ in range(RESTARTS):
            with ours(options, *more) as server:
                asyncio.run(ask(server.port, asked("warm", 0, 0), 4, server.fields))
                answer = asyncio.run(ask(server.port, said, 16, server.fields))
            times.append(1e3 * answer.times[0])
            texts.append(answer.text)
        cached = answer.cached
        median = sorted(times)[RESTARTS // 2]
        rows.append({"name": name, "first_ms": _digits(median), "all_ms": [*map(_digits, times)], "cached": cached})
        if len({*texts}) != 1 or rows and texts[0] != (first := rows[0].setdefault("text", texts[0])):
            raise RuntimeError(f"the answers differ: {texts[0]!r}, {first!r}")
    ratio = _digits(rows[0]["first_ms"] / rows[1]["first_ms"])
    return {"history": history, "prompt": answer.usage["prompt_tokens"], "rows": rows, "ratio": ratio}


def alone(path, clients, requests, new, length, dtype):
    """Tokens a second of the engine without a server: as in ``closed``, prompts of ``length`` random tokens."""
    from ch14_mini_llm.engine.engine import Engine
    from ch14_mini_llm.engine.request import Request
    from ch14_mini_llm.model.weights import load_weights
    from ch14_mini_llm.start import best_level, calm_collector

    config, tensors = load_weights(path)
    level = best_level(config, common.BACKEND, dtype)
    engine, draws = Engine.of(config, tensors, level, dtype=dtype, max_batch=clients), random.Random(1)
    calm_collector()
    prompt = lambda: [draws.randrange(config.vocab_size) for _ in range(length)]
    for _ in range(2):  # compiles; records graphs
        engine.run([Request(prompt(), new) for _ in range(clients)])
    start, left = time.perf_counter(), clients * (requests - 1)
    for _ in range(clients):
        engine.submit(Request(prompt(), new))
    while not engine.idle:
        for output in engine.step():
            if output.finish_reason is not None and left:
                left -= 1
                engine.submit(Request(prompt(), new))
    return clients * requests * new / (time.perf_counter() - start)


def over_engine(options, ours):
    """What is left of the engine's own rate at the sockets. ours: the row of our server."""
    numbers = options.clients, options.requests, options.new, round(ours["prompt_tokens"] / ours["requests"])
    command = [sys.executable, __file__, "--alone", str(options.weights), *map(str, numbers), options.dtype or ""]
    rate = float(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
    return {"engine_tokens_s": _digits(rate), "over_engine": _digits(ours["tokens_s"] / rate)}


def load(question, server, options, rate):
    """One of `QUESTIONS`, put to a server."""
    if question == "closed":
        return closed(server, options.clients, options.requests, options.new)
    if question in ("open", "overload"):
        return arriving(server, rate, sent(question, options), options.new)
    return chatting(server, options.clients, options.turns, options.new)


def sent(question, options):
    """How many requests a question is."""
    each = {"chat": options.turns, "overload": LONGER * options.requests}.get(question, options.requests)
    return options.clients * each


def measure(options, folder, progress=lambda text: None):
    """The figures as a dict for JSON. folder: for files that are made on the way."""
    found = {"clients": options.clients, "new": options.new, "limits_ms": list(LIMITS)}
    makers = {"ours": lambda: ours(options)}
    peers = {"llama.cpp": llama_cpp, "transformers": transformers_serve}
    makers |= {name: functools.partial(peers[name], options, folder) for name in options.peers}
    for question in options.only:
        if question == "restart":
            progress(question)
            found[question] = restarted(options, folder)
            continue
        kinds = dict(makers)
        if question == "chat":
            kinds["ours, no cache"] = lambda: ours(options, "--no_prefix_cache")
        if question == "overload":
            kinds = {"ours": makers["ours"], SHORT: lambda: ours(options, f"--max_queue={options.clients // 2}")}
        found[question] = {"rows": []}
        if question in ("open", "overload"):
            rows = found.get("closed", {}).get("rows", [{}])
            share = OPEN_SHARE if question == "open" else OVERLOAD
            found[question]["rate"] = _digits(share * rows[0].get("requests_s", 1.0))
        for name, make in kinds.items():
            progress(f"{question}, {name}")
            with make() as server:
                asyncio.run(closed(server, options.clients, 1, 4, "warm"))  # not counted: memory, threads
                answers = asyncio.run(load(question, server, options, found[question].get("rate")))
                found[question]["rows"].append(row(name, *answers, sent(question, options)))
                if question == "chat":
                    found[question]["rows"][-1]["turns"] = by_turn(answers[0], options.turns)
        if question == "closed":
            progress("the engine alone")
            found[question] |= over_engine(options, found[question]["rows"][0])
    return found


# --- the table -------------------------------------------------------------------------------------------------------

TITLES = {"closed": "{clients} clients, one request after another", "open": "requests at random, {rate} a second",
          "overload": "twice as many as it can, {rate} a second",
          "chat": "{clients} conversations of {turns} turns"}  # fmt: skip


def format_table(result):
    """The figures as lines of Markdown."""
    lines = [
        "| | tokens/s | first text, ms | between pieces, ms | whole answer, ms | goodput | cached |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    spread = lambda values: " / ".join(bench.short(value) for value in values)
    for question in TITLES:
        if question in result:
            title = TITLES[question].format(**result, **result[question])
            lines.append(f"| *{title}* | | | | | | |")
            for one in result[question]["rows"]:
                times = " | ".join(spread(one[key]) for key in ("first_ms", "gap_ms", "whole_ms"))
                refused = f", {one['refused']} refused" if one["refused"] else ""
                last = f"{100 * one['goodput']:.0f} %{refused} | {100 * one['cached']:.0f} %"
                lines.append(f"| {SAID[one['name']]} | {bench.short(one['tokens_s'])} | {times} | {last} |")
    if share := result.get("closed", {}).get("over_engine"):
        lines.append(f"| the engine alone | {bench.short(result['closed']['engine_tokens_s'])} | | | | | |")
        lines.append(f"| … share of it that reaches the sockets | {share:.2f} | | | | | |")
    if "restart" in result:
        restart = result["restart"]
        title = f"a turn behind {restart['history']} tokens, in a new process"
        lines.append(f"| *{title}* | | | | | | |")
        for one in restart["rows"]:
            lines.append(f"| … {one['name']} | | {bench.short(one['first_ms'])} | | | | {one['cached']} tokens |")
    what = f"{result['new']} new tokens a request; times as 50th / 95th / 99th percentile. Goodput: first text within "
    what += f"{result['limits_ms'][0]} ms, and tokens {result['limits_ms'][1]} ms apart on average."
    return [*lines, "", f"*{result['device']}, {result['model']}; {what}*"]


def overload_table(result):
    """Too many requests, with a long queue and a short one, as lines of Markdown."""
    load = result["overload"]
    lines = ["| queue | refused | first text, ms: half within | 95 % within | good | tokens/s |", "|---|" + "---:|" * 5]
    for name, one in zip(("128, the default", f"{result['clients'] // 2}"), load["rows"]):
        half, most, _ = one["first_ms"]
        times = f"{bench.short(half)} | {bench.short(most)}"
        good = f"{100 * one['goodput']:.0f} %"
        lines.append(f"| {name} | {one['refused']} | {times} | {good} | {bench.short(one['tokens_s'])} |")
    count = load["rows"][0]["requests"] + load["rows"][0]["refused"]
    what = f"{count} requests at random, {load['rate']} a second, twice what it answers, "
    what += f"`--max_batch={result['clients']}`. Good: of all requests, those whose first text came within "
    what += f"{result['limits_ms'][0] / 1000:g} seconds"
    return [*lines, "", f"*{result['device']}, {result['model']}; {what}.*"]


def sockets_table(folder):
    """What of a GPU's tokens reaches the sockets, as lines of Markdown, a file of results a row."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/serving_*.json")]
    lines = ["| new tokens | the engine alone, tokens/s | at the sockets | | events/s | first text, ms |"]
    lines.append("|---:|" + "---:|" * 5)
    for result in sorted(results, key=lambda result: result["new"]):
        closed, (row,) = result["closed"], result["closed"]["rows"]
        cells = [f"{result['new']}", *(f"{round(rate)}" for rate in (closed["engine_tokens_s"], row["tokens_s"]))]
        cells += [f"{closed['over_engine']:.2f}", f"{round(row['events_s'])}"]
        cells.append(" / ".join(map(bench.short, row["first_ms"])))
        lines.append("| " + " | ".join(cells) + " |")
    one = results[0]
    what = f"{one['clients']} clients, {row['prompt_tokens'] // row['requests']} tokens of a prompt"
    return [*lines, "", f"*{one['device']}, GPT-2 small, random weights; {what}; 50th / 95th / 99th percentile.*"]


def turns_table(result):
    """The turns of the conversations as lines of Markdown."""
    rows = sorted(result["chat"]["rows"], key=lambda row: list(SAID).index(row["name"]))
    kinds = [(SAID[row["name"]], row["turns"]) for row in rows]
    lines = ["| turn | tokens of its prompt | " + " | ".join(f"{name}, ms" for name, _ in kinds) + " | found |"]
    lines.append("|---:|---:|" + "---:|" * (len(kinds) + 1))
    for number, ours in enumerate(kinds[0][1]):
        times = " | ".join(bench.short(turns[number]["first_ms"]) for _, turns in kinds)
        lines.append(f"| {number + 1} | {ours['prompt_tokens']} | {times} | {100 * ours['cached']:.0f} % |")
    what = f"{result['clients']} conversations at once; until the first text, medians. Found: of the prompt's tokens"
    return [*lines, "", f"*{result['device']}, {result['model']}; {what}, by our cache.*"]


CHAPTER = ROOT / "ch14_mini_llm"
TABLES = {"server": format_table, "under_load": overload_table, "prefix_cache": turns_table}  # of the pages
GPU_BLOCKS = {"serving gpu": lambda folder: format_table(committed(folder, "h200")), "sockets": sockets_table}


def committed(folder=RESULTS, device="cpu"):
    """The committed figures of a device."""
    return json.loads((folder / device / "serving.json").read_text(encoding="utf-8"))


def filled(name, page, folder=RESULTS):
    """The text of one of the chapter's pages with its tables of the committed figures."""
    tables = {"serving": lambda folder: TABLES[name](committed(folder)), **GPU_BLOCKS}
    for block, table in tables.items():
        before, start, rest = page.partition(f"<!-- {block} -->\n")
        if start:
            page = before + start + "\n".join([*table(folder), ""]) + rest[rest.index("<!-- end -->") :]
    return page


def draw(result, path):
    """Draw how long the first text of each turn takes, to the SVG file ``path``."""
    from benchmarks.plots import COLOURS, LIBRARY_COLOUR, pyplot, save

    colours = {"ours": COLOURS[2], "ours, no cache": COLOURS[6], "llama.cpp": LIBRARY_COLOUR}
    colours["transformers"] = COLOURS[5]
    figure, axis = pyplot().subplots(figsize=(6.6, 3.1))
    for one in result["chat"]["rows"]:
        label = SAID[one["name"]].replace("…", SAID["ours"])
        turns = range(1, len(one["turns"]) + 1)
        seconds = [turn["first_ms"] / 1000 for turn in one["turns"]]
        axis.plot(turns, seconds, "o-", color=colours[one["name"]], label=label, ms=4)
    axis.set_xticks(turns, [f"{turn}\n{one['prompt_tokens']}" for turn, one in zip(turns, one["turns"])])
    axis.set_xlabel("turn, and tokens of its prompt")
    axis.set_ylabel("seconds until the first text")
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    save(figure, path)


def write_pages():
    """Part of ``make plots``."""
    for name in TABLES:
        page = CHAPTER / f"{name}.md"
        write_text(page, filled(name, page.read_text(encoding="utf-8")))
    draw(committed(), CHAPTER / "img" / "chat_turns.svg")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--peer"]:
        return be_peer(argv[1], int(argv[2]))
    if argv[:1] == ["--alone"]:
        print(alone(argv[1], *map(int, argv[2:6]), argv[6] or None))
        return 0
    if argv[:1] == ["--page"]:
        write_pages()
        return 0
    parser = argparse.ArgumentParser(prog="benchmarks/serving.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", type=_names(QUESTIONS), default=list(QUESTIONS), help=f"of {','.join(QUESTIONS)}")
    peer = "transformers" if common.BACKEND == "gpu" else "llama.cpp"
    add("--peers", type=_names(PEERS), default=[peer], help=f"of {','.join(PEERS)}; or none ({peer})")
    add("--clients", type=int, default=8, help="who ask at the same time (8)")
    add("--requests", type=int, default=5, help="of each client (5)")
    add("--new", type=int, default=48, help="tokens of an answer (48)")
    add("--history", type=int, default=1850, help="words of a session's first question (1850)")
    add("--turns", type=int, default=8, help="of a conversation (8)")
    add("--weights", type=Path, default=SMOLLM2, help="a weight file (data/smollm2-135m.bin)")
    add("--dtype", choices=["float32", "float16"], default="float16" if common.BACKEND == "cpu" else None,
        help="of the weights on the level kv (float16)")  # fmt: skip
    add("--out", type=Path, default=RESULTS, help="folder of the results (benchmarks/results)")
    add("--name", default="serving", help="of the file with the results (serving)")
    options = parser.parse_args(argv)
    if min(options.clients, options.requests, options.new, options.turns, options.history) < 1:
        parser.error("--clients, --requests, --new, --turns and --history must be at least 1 each")
    if not options.weights.exists():
        parser.error(f"--weights: {options.weights} is not there; make smollm2 fetches SmolLM2")
    if "llama.cpp" in options.peers and options.weights != SMOLLM2:
        parser.error("llama.cpp has SmolLM2's weights: leave out --weights, or give --peers=none")
    for lack in filter(None, map(missing, options.peers)):
        parser.error(lack)
    if not options.name.isidentifier():
        parser.error(f"--name={options.name}: letters, digits and _, such as serving_256")
    path = options.out / device_folder() / f"{options.name}.json"
    try:
        make_output(path, "--out")
    except FileError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder, tqdm(disable=None) as bar:

        def progress(text):
            bar.set_description(text)
            bar.update()

        found = measure(options, Path(folder), progress)
    load = [_digits(one) for one in os.getloadavg()] if hasattr(os, "getloadavg") else None
    result = {
        "model": options.weights.stem, "device": bench.device_name(), "backend": common.BACKEND, "dtype": options.dtype,
        "turns": options.turns, "packages": _packages(), "load": load, **found,
    }  # fmt: skip
    write_text(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print("\n".join(format_table(result)), f"\nwritten: {path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
