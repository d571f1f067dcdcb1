"""The command line: text, JSON, streaming, and every mistake a user can make."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common
from ch14_mini_llm import run as run_module
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.weights import load_weights, save_weights, tensor_table
from ch14_mini_llm.start import calm_collector
from ch14_mini_llm.tokenizer.bpe import END_OF_TEXT_ID, VOCAB_SIZE, decode, encode

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "ch14_mini_llm" / "run.py"
HELLO = [15496, 11, 612, 318]
SIZES = dict(n_layer=2, n_head=2, d_model=8, d_ff=32, n_ctx=1024, vocab_size=VOCAB_SIZE)


def write_model(path, always=None, **sizes):
    """A random model of the real vocabulary; ``always``: the token that it finds most likely whatever it reads."""
    config = GPT2Config(**{**SIZES, **sizes})
    rng = np.random.default_rng(3)
    tensors = {name: rng.standard_normal(shape) * 0.3 for name, shape, _ in tensor_table(config)}
    if always is not None:
        tensors["ln_f.weight"] *= 0
        tensors["ln_f.bias"][:] = np.arange(config.d_model) == 0  # the last hidden state is (1, 0, 0, ...)
        tensors["wte.weight"][:, 0] = np.arange(config.vocab_size) == always
    save_weights(path, config, tensors)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("weights") / "model.bin")


def start(*arguments, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": Path.home(), **options}
    return subprocess.Popen([sys.executable, str(PROGRAM), *map(str, arguments)], **options)


def call(*arguments, environment=None):
    """Run the program in another folder; returns (exit code, standard output, standard error)."""
    process = start(*arguments, env={**os.environ, "PYTHONIOENCODING": "utf-8", **(environment or {})})
    out, err = process.communicate(timeout=300)
    return process.returncode, out.decode(), err.decode()


def run_json(*arguments):
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)  # fails unless one JSON value is all there is


# --- what it prints --------------------------------------------------------------------------------------------------


def test_text_with_stats_and_trace(weights):
    code, out, err = call("--weights", weights, "--max_new=5", "--stats", "--trace", "--engine=naive")
    assert code == 0, err
    assert out.startswith("Hello, there is")  # the default prompt
    *_, tokens_line, text_line = out.splitlines()
    tokens = list(map(int, tokens_line.removeprefix("tokens: ").split(",")))
    assert tokens[:4] == HELLO and len(tokens) == 9
    assert json.loads(text_line.removeprefix("text: ")) == decode(tokens)
    assert out.startswith(decode(tokens) + "\n")  # streamed
    assert "kernel launches of one step over 8 tokens" in out
    assert "chapters/ch06_shared_tile/kernels.py:" in out and "\nlargest: " in out
    assert "tokens/s after the first token" in out and f"backend:       {common.BACKEND}" in out
    assert str(weights) in err and "d_model 8" in err
    assert "Traceback" not in err


def test_json_holds_everything(weights):
    found = run_json("--weights", weights, "--tokens=15496,11,612,318", "--max_new=5", "--trace", "--engine=naive")
    assert found["prompt_tokens"] == HELLO == found["tokens"][:4]
    assert len(found["tokens"]) == 9
    assert found["text"] == decode(found["tokens"])
    assert found["backend"] == common.BACKEND
    assert found["device"] and found["weights"] == str(weights)
    assert found["tokens_per_s"] > 0 and found["first_token_s"] > 0
    assert found["first_token_from_program_start_s"] > found["first_token_s"]
    assert found["stopped"] == "max_new"
    launches = found["launches"]
    assert len(launches) == 1 + 17 * SIZES["n_layer"] + 3
    assert launches[0]["kernel"] == "embed" and launches[-1]["kernel"] == "greedy_argmax"
    for launch in launches:
        assert set(launch) == {"kernel", "defined_at", "grid", "block", "ms"}
        assert len(launch["grid"]) == len(launch["block"]) == 3 and launch["ms"] >= 0
        file, line = launch["defined_at"].split(":")
        assert f"def {launch['kernel']}(" in (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


def test_prompt_as_text_and_as_tokens_are_the_same(weights):
    as_text = run_json("--weights", weights, "--prompt", "Hello, there is", "--max_new=2")
    assert as_text["prompt_tokens"] == HELLO
    assert "launches" not in as_text
    assert as_text["tokens"] == run_json("--weights", weights, "--max_new=2", "--ignore_eos")["tokens"]


def test_sampling_repeats_with_its_seed(weights, capsys):
    def tokens_and_seed(*seed):
        settings = ["--max_new=8", "--temperature=1.5", "--top_k=1000", "--top_p=0.95", "--json", *seed]
        assert run_module.main([f"--weights={weights}", *settings]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["tokens"], found["seed"]

    assert tokens_and_seed("--seed=7") == tokens_and_seed("--seed=7")
    assert tokens_and_seed("--seed=7")[0] != tokens_and_seed("--seed=8")[0]
    tokens, seed = tokens_and_seed()  # no seed given: one is chosen, and told
    assert tokens_and_seed(f"--seed={seed}") == (tokens, seed)


def test_temperature_0_takes_the_most_likely_token(weights, capsys):
    found = []
    for settings in ([], ["--temperature=0"], ["--temperature=0", "--top_k=-1", "--seed=5"]):
        assert run_module.main([f"--weights={weights}", "--max_new=4", "--json", *settings]) == 0
        found.append(json.loads(capsys.readouterr().out)["tokens"])
    assert found == [found[0]] * 3


@pytest.mark.parametrize("engine", ["fast", "naive", "kv"])
def test_the_largest_seed(tmp_path, engine, capsys):
    """What the message about seeds states as the maximum is one; it is not taken for another number."""
    path = write_model(tmp_path / "model.bin", d_model=16, d_ff=64)

    def tokens(seed):
        arguments = [f"--weights={path}", "--max_new=8", "--temperature=2", f"--seed={seed}", f"--engine={engine}"]
        assert run_module.main([*arguments, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["seed"] == seed
        return found["tokens"]

    largest = 2**64 - 1
    assert tokens(largest) == tokens(largest)
    assert len({tuple(tokens(seed)) for seed in (largest, largest - 1, 2**63, 2**63 - 1, 2**32 - 1, 0)}) == 6


def test_stops_at_end_of_text_unless_told_otherwise(tmp_path):
    path = write_model(tmp_path / "model.bin", always=END_OF_TEXT_ID)
    found = run_json("--weights", path, "--max_new=3")
    assert found["tokens"] == HELLO and found["stopped"] == "end_of_text" and found["tokens_per_s"] == 0
    code, out, err = call("--weights", path, "--max_new=3")
    assert (code, out) == (0, 'Hello, there is\n\ntokens: 15496,11,612,318\ntext: "Hello, there is"\n')
    found = run_json("--weights", path, "--max_new=3", "--ignore_eos")
    assert found["tokens"] == HELLO + 3 * [END_OF_TEXT_ID] and found["stopped"] == "max_new"


def test_every_token_is_on_screen_before_the_next_is_made(weights, monkeypatch, capsys):
    shown = []

    def watched(model, tokens, max_new, sampling, stop):
        for token in (257, 7932, 1295):
            shown.append(capsys.readouterr().out)
            yield token

    import ch14_mini_llm.levels.generate

    monkeypatch.setattr(ch14_mini_llm.levels.generate, "generate", watched)
    assert run_module.main(["--weights", str(weights)]) == 0
    assert shown == ["", "Hello, there is a", " wonderful"]


def test_half_a_character_waits_for_the_other_half(weights, monkeypatch, capsys):
    snake = encode("\U0001f40d")
    assert len(snake) > 1
    made = iter([*snake, snake[0]])
    import ch14_mini_llm.levels.generate

    monkeypatch.setattr(ch14_mini_llm.levels.generate, "generate", lambda *args, **kwargs: made)
    assert run_module.main(["--weights", str(weights), "--tokens=64"]) == 0
    assert capsys.readouterr().out.startswith("a\U0001f40d\ufffd\n\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to one process")
def test_ctrl_c_ends_it_cleanly(weights):
    process = start("--weights", weights, "--max_new=1000", "--ignore_eos")
    assert process.stdout.read(5) == b"Hello"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.endswith(b"run.py: interrupted\n") and b"Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe in another way")
def test_a_reader_that_leaves_is_no_error(weights):
    process = start("--weights", weights, "--max_new=1000", "--ignore_eos")
    assert process.stdout.read(5) == b"Hello"
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in err and b"BrokenPipe" not in err


# --- mistakes --------------------------------------------------------------------------------------------------------


def assert_one_line(code, out, err, *needles):
    assert code == 2, (out, err)
    assert out == ""
    assert err.startswith("run.py: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for needle in needles:
        assert needle in err


@pytest.mark.parametrize(
    "arguments, needles",
    [
        (["--tokens="], ["--tokens is empty"]),
        (["--tokens= "], ["--tokens is empty"]),
        (["--tokens=1,,2"], ["item 1 is ''"]),
        (["--tokens=1,two"], ["item 1 is 'two'", "--tokens=15496,11,612,318"]),
        (["--tokens=1.5"], ["'1.5'"]),
        (["--tokens=1_000"], ["'1_000'"]),
        (["--tokens=" + "9" * 5000], ["9...", "not an integer"]),
        (["--tokens=50257"], ["token id 50257 (position 0)", "0 to 50256"]),
        (["--tokens=1,-1"], ["token id -1 (position 1)"]),
        (["--tokens=1", "--prompt=a"], ["--tokens and --prompt"]),
        (["--prompt="], ["--prompt is empty"]),
        (["--max_new=0"], ["max_new is 0", "at least 1"]),
        (["--max_new=-3"], ["max_new is -3"]),
        (["--max_new=many"], ["--max_new", "'many'"]),
        (["--max_new=2.0"], ["--max_new", "'2.0'"]),
        (["--max_new=1021"], ["4 prompt tokens", "1025", "1024", "up to 1020"]),
        (["--prompt=" + "a b " * 600], ["1024", "at most 1023 tokens"]),
        (["--temperature=-0.5"], ["temperature is -0.5"]),
        (["--temperature=nan"], ["temperature is nan"]),
        (["--temperature=warm"], ["--temperature", "'warm'"]),
        (["--top_k=-2"], ["top_k is -2", "at least 1"]),
        (["--top_k=50258"], ["top_k is 50258", "50257"]),
        (["--top_k=1.5"], ["--top_k", "'1.5'"]),
        (["--top_p=0"], ["top_p is 0", "above 0"]),
        (["--top_p=1.5"], ["top_p is 1.5", "at most 1"]),
        (["--seed=-1"], ["seed is -1"]),
        (["--seed=18446744073709551616"], ["seed is 18446744073709551616", "to 18446744073709551615"]),
        (["--seed=" + "9" * 200], ["has 200 digits"]),
        (["--max_new=" + "9" * 40], ["max_new " + "9" * 40, "up to 1020"]),
        (["--tokens=" + "9" * 30], ["token id " + "9" * 30]),
        (["--top_p=1.0000001"], ["top_p is 1.0000001"]),
        (["--top_p=1.0000000000000002"], ["top_p is 1.0000000000000002"]),
        (["--temperature=-0.00000001"], ["temperature is -1e-08"]),
        (["--prompt=a", "--weights=no\nsuch"], ["no\\nsuch: there is no such weight file"]),
        (["--weights=nowhere.bin"], ["nowhere.bin", "no such weight file"]),
        (["--weights="], ["--weights is empty"]),
        (["--dtype=float16", "--engine=naive"], ["dtype is 'float16'", "keeps weights as float32", "kv or fast"]),
        (["--dtype=float32", "--engine=fast"], ["engine fast keeps weights as float16", "use engine naive or kv"]),
        (["--dtype=bfloat16", "--engine=kv"], ["--dtype", "'bfloat16'"]),
        (["--no_such_option"], ["--no_such_option"]),
        (["--tokens"], ["--tokens", "expected one argument"]),
        (["stray"], ["stray"]),
    ],
    ids=lambda value: value[0][:20] if str(value[0]).startswith("--") else None,
)
def test_a_mistake_is_one_line(weights, capsys, arguments, needles):
    """In this process, for speed: `main` gives the exit code that the program ends with."""
    if not any(a.startswith("--weights") for a in arguments):
        arguments = ["--weights", str(weights), *arguments]
    code = run_module.main(arguments)
    captured = capsys.readouterr()
    assert_one_line(code, captured.out, captured.err, *needles)


@pytest.mark.parametrize("arguments", [["--tokens=1,,2"], ["--top_p=2", "--json"], ["--weights=nowhere.bin"]])
def test_a_mistake_ends_the_program_with_code_2(weights, arguments):
    arguments = arguments if "--weights=nowhere.bin" in arguments else [f"--weights={weights}", *arguments]
    assert_one_line(*call(*arguments))


def test_damaged_weights_are_one_line(weights, tmp_path, capsys):
    data = weights.read_bytes()
    for name, damaged, needle in (
        ("cut.bin", data[:-2], "cut short"),
        ("short.bin", data[:10], "file length is 10"),
        ("magic.bin", b"GGUF" + data[4:], "magic"),
        ("heads.bin", data.replace(b'"n_head":2', b'"n_head":1', 1), "does not have the checksum"),
        ("value.bin", data[:-200] + b"\x00\x7e" + data[-198:], "does not have its checksum"),
        ("old.bin", data[:4] + b"\x01" + data[5:], "old.bin: "),
    ):
        (tmp_path / name).write_bytes(damaged)
        code = run_module.main(["--weights", str(tmp_path / name)])
        captured = capsys.readouterr()
        assert_one_line(code, captured.out, captured.err, name, needle)
    code = run_module.main(["--weights", str(tmp_path)])
    captured = capsys.readouterr()
    assert_one_line(code, captured.out, captured.err, str(tmp_path))


def test_no_weights_at_all(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("ch14_mini_llm.model.weights.DATA_DIR", tmp_path)
    code = run_module.main([])
    captured = capsys.readouterr()
    assert_one_line(code, captured.out, captured.err, "there are no weights", "download_gpt2.py")


def test_an_unknown_backend_is_one_line(weights):
    code, out, err = call("--weights", weights, environment={"MINI_BACKEND": "abacus"})
    assert_one_line(code, out, err, "abacus", "gpu, cpu or auto")


@pytest.mark.skipif(common.BACKEND == "gpu", reason="there is a GPU")
def test_a_gpu_that_is_not_there(weights):
    code, out, err = call("--weights", weights, environment={"MINI_BACKEND": "gpu"})
    assert code == 2 and out == ""
    assert err.startswith("run.py: error: MINI_BACKEND=gpu") and "Traceback" not in err


# --- streams and the environment -------------------------------------------------------------------------------------

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")


def shell(text, *arguments):
    """Run a shell's command line in which "$@" is the program: (its exit code, its output, errors)."""
    command = ["sh", "-c", text, "sh", sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, timeout=300)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@needs_full
@pytest.mark.parametrize("more", [[], ["--json"], ["--trace", "--stats"]], ids=str)
@pytest.mark.parametrize("where, said", [(">&-", "is closed"), ("> /dev/full", "cannot be written (No space")])
def test_an_output_that_cannot_be_written_is_one_line(weights, where, said, more):
    code, out, err = shell(f'"$@" {where}', f"--weights={weights}", "--max_new=2", *more)
    lines = [line for line in err.splitlines() if not line.startswith(("weights: ", "backend: ", "the kernels are"))]
    assert (code, out) == (2, "") and len(lines) == 1, err
    assert lines[0].startswith(f"run.py: error: the standard output {said}")


@needs_full
@pytest.mark.parametrize("where", ["2>&-", "2> /dev/full", "2>&- <&-"])
def test_messages_that_cannot_be_written_are_lost_and_nothing_else(weights, where):
    """Not even to the standard output, where --json has one object and nothing else."""
    code, out, err = shell(f'"$@" {where}', f"--weights={weights}", "--max_new=2", "--json")
    assert code == 0 and err == "" and json.loads(out)["tokens"][:4] == HELLO
    assert shell(f'"$@" {where}', f"--weights={weights}", "--max_new=0")[:2] == (2, "")


@needs_full
def test_nothing_can_be_written_at_all(weights):
    for where in (">&- 2>&-", "> /dev/full 2> /dev/full", ">&- 2>&- <&-"):
        assert shell(f'"$@" {where}', f"--weights={weights}", "--max_new=2") == (2, "", "")
    assert shell('"$@" --help > /dev/full')[0] == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe in another way")
@pytest.mark.parametrize("arguments", [["--max_new=4", "--json"], ["--max_new=4", "--trace"]], ids=str)
def test_head_ends_it_without_a_word(weights, arguments):
    process = start(f"--weights={weights}", *arguments)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert b"Traceback" not in err and b"BrokenPipe" not in err


@pytest.mark.parametrize(
    "name, value",
    [("NUMBA_NUM_THREADS", "0"), ("NUMBA_NUM_THREADS", "x"), ("TQDM_MININTERVAL", "x"), ("TQDM_NCOLS", "1.5"),
     ("MINI_THREADS", "x")],
)  # fmt: skip
def test_a_number_of_the_environment_that_is_none_is_named(weights, name, value):
    code, out, err = call("--weights", weights, "--max_new=1", environment={name: value, "MINI_BACKEND": "cpu"})
    assert_one_line(code, out, err, name, value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_weights_from_a_pipe_or_a_device_are_refused_at_once(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.bin")
    for path, kind in ((tmp_path / "pipe.bin", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        code = run_module.main(["--weights", str(path)])
        captured = capsys.readouterr()
        assert_one_line(code, captured.out, captured.err, str(path), f"is {kind}")


def test_help_names_every_option():
    code, out, err = call("--help")
    assert code == 0 and not err
    for option in "tokens prompt max_new weights temperature top_k top_p seed ignore_eos stats trace json".split():
        assert f"--{option}" in out


def test_the_model_in_data_is_the_default(monkeypatch, tmp_path, capsys):
    """data/tiny-gpt2.bin unless data/gpt2-small.bin is there; the program says which."""
    monkeypatch.setattr("ch14_mini_llm.model.weights.DATA_DIR", tmp_path)
    for name in ("tiny-gpt2.bin", "gpt2-small.bin"):
        write_model(tmp_path / name)
        assert load_weights(tmp_path / name)
        assert run_module.main(["--max_new=1", "--json"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["weights"] == str(tmp_path / name)
        assert str(tmp_path / name) in captured.err


def test_the_collector_lets_alone_what_is_there():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        calm_collector()
        assert gc.get_freeze_count() > frozen and gc.get_threshold() == (before[0], 1000, 1000)
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
