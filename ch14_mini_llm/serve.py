"""Serve a model over HTTP: OpenAI's API on the book's own kernels.

    python ch14_mini_llm/serve.py
    python ch14_mini_llm/serve.py --weights data/smollm2-135m.bin --port 8000 --max_batch 32

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "tiny-gpt2", "prompt": "Once upon a time", "max_tokens": 20}'

The default model is SmolLM2, if `make smollm2` has made it, else the tiny one. The engine runs in a process of its own;
this one only talks to clients. SIGTERM or Ctrl-C: no connection is taken any more, answers under way have ``--grace``
seconds; a second one ends at once.

Exit codes: 0 ended by a signal; 1 the engine cannot be started; 2 a mistake in the arguments, the environment or the
weights, or a port that cannot be had (one line says which).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if sys.path and sys.path[0] and Path(sys.path[0]).resolve() == ROOT / "ch14_mini_llm":
    sys.path[0] = str(ROOT)  # started as a script: import from the repository, wherever we are
elif str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from ch14_mini_llm.cli import Parser, cut, integer, number, run_program  # noqa: E402
from ch14_mini_llm.engine.dtypes import DTYPES  # noqa: E402
from ch14_mini_llm.engine.request import RequestError  # noqa: E402
from ch14_mini_llm.engine.speculate import HOW, check_how  # noqa: E402
from ch14_mini_llm.files import FileError  # noqa: E402

LEVELS = ("kv", "fast")
NEEDS = ("uvicorn", "starlette", "prometheus_client")
GRPC_NEEDS = ("grpc", "google.protobuf")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    from ch14_mini_llm.model.layout import WeightsError
    from ch14_mini_llm.tokenizer.bpe import TokenizerError

    mistakes = (WeightsError, TokenizerError, FileError)
    return run_program("serve.py", lambda: serve(build_parser().parse_args(argv)), mistakes)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="serve.py",
        description="Serve a model over HTTP: OpenAI's API on the book's own kernels.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--weights", metavar="FILE", help="a weight file (default: data/smollm2-135m.bin if it is there, else the tiny "
        "model)")  # fmt: skip
    add("--name", metavar="NAME", help="the model's name for clients (default: the file's, without its ending)")
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine "
        "alone; 0.0.0.0 is everybody who can reach it: give --api_key as well)")  # fmt: skip
    add("--port", metavar="PORT", type=integer, default=8000, help="port to listen on (default 8000; 0: any free one)")
    add("--grpc_port", metavar="PORT", type=integer, help="listen for gRPC as well, on this port (default: not; 0: any "
        "free one); server/generate.proto is the contract")  # fmt: skip
    add("--api_key", metavar="KEY", action="append", default=[], help="ask for this key; may be given several times, "
        "or as KBK_API_KEY in the environment, where others on the machine cannot read it")  # fmt: skip
    add("--engine", metavar="LEVEL", choices=LEVELS, help="kv or fast (default: fast on a GPU, kv without)")
    add("--dtype", metavar="TYPE", choices=DTYPES["kv"], help="of the weights on the level kv (default float32)")
    add("--deterministic", action="store_true", help="on the level fast: the same text in any company, as on kv; a "
        "large batch is slower")  # fmt: skip
    add("--speculate", metavar="HOW", help=f"guess tokens, and check several in a step, where places are left: {HOW} "
        "(default: not)")  # fmt: skip
    add("--num_blocks", metavar="N", type=integer, help="blocks of the KV cache (default: what fits)")
    add("--block_size", metavar="N", type=integer, default=16, help="tokens a block: 4, 8, 16 … 256 (default 16)")
    add("--no_prefix_cache", action="store_true", help="compute anew what requests begin with alike, to compare")
    add("--kv_dir", metavar="FOLDER", help="keep keys and values there that leave the device, and sessions (default: "
        "nothing is kept; what is said to the model can be read from these files)")  # fmt: skip
    add("--kv_disk", metavar="GB", type=number, default=4.0, help="room for files in --kv_dir (default 4)")
    add("--kv_host", metavar="GB", type=number, default=0.0, help="of the host's memory, in front of the files (0)")
    add("--max_batch", metavar="N", type=integer, default=32, help="sequences that run at a time (default 32)")
    add("--max_queue", metavar="N", type=integer, default=128, help="more that may wait; others get 429 (default 128)")
    add(
        "--timeout", metavar="SECONDS", type=number, default=600.0, help="for an answer, waiting included (default 600)"
    )
    add("--max_wait", metavar="SECONDS", type=number, default=120.0, help="until an answer must have begun, or it is "
        "answered 503 (default 120)")  # fmt: skip
    add("--grace", metavar="SECONDS", type=number, default=30.0, help="for answers under way at the end (default 30)")
    return parser


def serve(options: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    missing = [name for name in NEEDS if not _is_there(name)]
    if missing:
        raise RequestError(f"{', '.join(missing)} cannot be found; the server needs: pip install -e '.[serve]'")
    if options.grpc_port is not None:
        check_port("--grpc_port", options.grpc_port)
        missing = [name for name in GRPC_NEEDS if not _is_there(name)]
        if missing:
            what = f"--grpc_port is {options.grpc_port}, but {', '.join(missing)} cannot be found"
            raise RequestError(f"{what}: pip install -e '.[grpc]', or leave --grpc_port out")
    from ch14_mini_llm.model.weights import DATA_DIR, default_weights, load_weights
    from ch14_mini_llm.server.settings import Settings, kept_of
    from ch14_mini_llm.start import describe, say, shown
    from ch14_mini_llm.tokenizer.own import tokenizer_of

    if options.weights == "":
        raise RequestError("--weights is empty; give the path of a weight file, or leave it out")
    smollm2 = DATA_DIR / "smollm2-135m.bin"
    path = Path(options.weights or (smollm2 if smollm2.exists() else default_weights()))
    config, tensors = load_weights(path)
    tokenizer = tokenizer_of(config, tensors)
    tokenizer.encode_plain("now, not at the first request: packages may be missing")
    tokenizer.token_bytes(0)  # likewise: a table of all tokens
    del tensors
    keys = [*options.api_key, *filter(None, [os.environ.get("KBK_API_KEY")])]
    facts = f"{path.name} {path.stat().st_size} {config}"
    settings = Settings(
        options.name or path.stem, options.max_queue, tuple(keys), options.timeout, options.max_wait, options.grace,
        fingerprint=f"kbk_{hashlib.sha256(facts.encode()).hexdigest()[:10]}",
    )  # fmt: skip
    listening = listen(options.host, options.port)
    words = [f"weights: {shown(path)} ({describe(config)})"]
    if options.host not in ("127.0.0.1", "localhost", "::1") and not keys:
        words.append(f"warning: whoever can reach {options.host} can use this server; --api_key asks for a key")
    check_how(options.speculate, config.n_layer)
    same = "num_blocks", "block_size", "max_batch", "dtype", "deterministic", "speculate"
    engine = {name: getattr(options, name) for name in same}
    engine |= {"level": options.engine, "prefix_cache": not options.no_prefix_cache, "kept": None}
    if options.kv_dir is not None or options.kv_host:
        engine["kept"] = kept_of(options.kv_dir, options.kv_disk, options.kv_host, engine["prefix_cache"])
    return asyncio.run(_serve(settings, tokenizer, (listening, options.grpc_port), (str(path), engine), words, say))


def _is_there(module: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def check_port(name: str, port: int) -> None:
    """Raises `RequestError` for what is no port's number. name: the option's."""
    if not 0 <= port < 65536:
        raise RequestError(f"{name} is {port}; it must be from 0 to 65535")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `RequestError`."""
    check_port("--port", port)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except (OSError, UnicodeError) as error:
        words = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot listen on {cut(host)}, port {port} ({words}); try another --port") from None
    return listening


async def _serve(settings, tokenizer, ports, arguments, words, say) -> int:
    """ports: HTTP's socket, and the port for gRPC, or None. words: what is said first, once signals are heard."""
    import uvicorn

    from ch14_mini_llm.server.app import application
    from ch14_mini_llm.server.remote import READY, RemoteEngine
    from ch14_mini_llm.server.tokens import Server

    remote = RemoteEngine(*arguments, say=_progress(say))
    server, (listening, grpc_port) = Server(settings, tokenizer, remote), ports
    rpc = None
    if grpc_port is not None:
        from ch14_mini_llm.server.rpc import Rpc

        rpc = Rpc(server, listening.getsockname()[0], grpc_port)
    config = uvicorn.Config(
        application(server), log_level="warning", access_log=False, lifespan="off", server_header=False,
        timeout_keep_alive=75, timeout_graceful_shutdown=max(1, round(settings.grace)),
    )  # fmt: skip
    web, loop = _web(config), asyncio.get_running_loop()

    def end():
        if server.draining:
            os._exit(0)  # asked a second time
        server.draining = web.should_exit = True
        if rpc:
            rpc.end()
        say(f"ending: {remote.load} answers are under way; they have {settings.grace:g} seconds")

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, end)
    say("\n".join(words))
    remote.start()
    serving = asyncio.create_task(web.serve([listening]))
    calls = asyncio.create_task(rpc.serve()) if rpc else None
    starting = asyncio.create_task(remote.ready())
    await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done() and remote.state == READY:
        host, port = listening.getsockname()[:2]
        print("\r\x1b[K" * sys.stderr.isatty(), end="", file=sys.stderr)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1" + (f", gRPC {rpc.address}" if rpc else "")
        say(f"ready: {url}, model {settings.name!r}; Ctrl-C ends it")
    elif starting.done():
        web.should_exit = True
    await serving
    if rpc:
        rpc.end()
        await calls
    starting.cancel()
    failed = remote.problem if remote.state == "failed" else None
    remote.close()
    if failed:
        say(f"serve.py: error: the engine cannot be started: {failed}")
        return 1
    return 0


def _progress(say):
    """For what the engine's process says: one line that changes in a terminal, else a line each."""
    if not sys.stderr.isatty():
        return say
    return lambda text: print(
        f"\r\x1b[K{text}", end="" if text.startswith("warming up") else "\n", file=sys.stderr, flush=True
    )


def _web(config):
    """uvicorn's server, without its handlers of signals: they would end this process with 143 where 0 is meant."""
    import uvicorn

    class Web(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):
            yield

    return Web(config)


if __name__ == "__main__":
    sys.exit(main())
