"""data/train_tiny.py: it learns, its file holds the model it trained, and that model is GPT-2."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

# isort: split
import train_tiny
from train_tiny import CorpusError, Settings

from ch14_mini_llm.model.weights import load_weights, tensor_table
from ch14_mini_llm.tokenizer import bpe

ROOT = Path(__file__).resolve().parents[2]
TINY = Settings(n_layer=2, n_head=2, d_model=12, n_ctx=16, steps=30, batch=4, micro_batch=4, lr=2e-2, eval_every=10)
ARGUMENTS = "--n_layer 2 --n_head 2 --d_model 12 --n_ctx 16 --batch 4 --lr 0.02 --eval_every 10 --device cpu".split()


def write_text(path, n_documents=60):
    words = "the cat and a dog sat on one red mat in the sun".split()
    rng = np.random.default_rng(5)
    documents = [" ".join(rng.choice(words, size=rng.integers(8, 30))) + "." for _ in range(n_documents)]
    text = "\n<|endoftext|>\n".join(documents) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return documents, text


def transformers_model(path):
    """The weights of a file in transformers' GPT-2."""
    config, tensors = load_weights(path)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.d_model, n_inner=config.d_ff,
            n_positions=config.n_ctx, vocab_size=config.vocab_size,
        )
    ).eval()  # fmt: skip
    state = {f"transformer.{name}": torch.from_numpy(tensor.astype(np.float32)) for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, finished process) of 30 steps from the command line."""
    folder = tmp_path_factory.mktemp("trained")
    write_text(folder / "text.txt.gz")
    command = [sys.executable, ROOT / "data" / "train_tiny.py", folder / "text.txt.gz", "--out", folder / "tiny.bin"]
    done = subprocess.run([*command, *ARGUMENTS, "--steps", "30"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_the_loss_falls_and_the_log_tells(trained):
    folder, done = trained
    *rows, final = [json.loads(line) for line in (folder / "tiny.log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert [row["tokens"] for row in rows] == [10 * 64, 20 * 64, 30 * 64]
    assert rows[0]["train_loss"] > rows[-1]["train_loss"] + 1
    assert final["held_out_loss"] < math.log(bpe.VOCAB_SIZE) - 2
    assert final["settings"]["d_model"] == 12 and final["steps"] == 30 and not final["interrupted"]
    text = gzip.decompress((folder / "text.txt.gz").read_bytes())
    assert final["corpus_sha256"] == hashlib.sha256(text).hexdigest()
    assert final["weights_sha256"] == hashlib.sha256((folder / "tiny.bin").read_bytes()).hexdigest()
    assert f"held-out loss {final['held_out_loss']}" in done.stdout
    assert [sample["text"] for sample in final["samples"][::2]] != []
    assert all(sample["text"] in done.stdout for sample in final["samples"])
    assert sorted(path.name for path in folder.iterdir()) == ["text.txt.gz", "tiny.bin", "tiny.log.jsonl"]


def test_the_file_holds_the_model_whose_loss_was_logged(trained):
    folder, _ = trained
    model = transformers_model(folder / "tiny.bin")
    final = json.loads((folder / "tiny.log.jsonl").read_text().splitlines()[-1])
    held_out = torch.from_numpy(train_tiny.read_corpus(folder / "text.txt.gz", 16).held_out).long()
    assert final["held_out_tokens"] == len(held_out) - 1
    total = 0.0
    for start in range(0, len(held_out) - 1, 16):
        window = held_out[start : start + 17]
        logits = model(window[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert total / (len(held_out) - 1) == pytest.approx(final["held_out_loss"], abs=2e-4)


@pytest.fixture
def one_torch_thread():
    """Bit for bit the same twice: with several threads, torch on a CPU adds gradients in the order they come."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_training_in_process_is_reproducible_and_exports_what_it_returns(tmp_path, one_torch_thread):
    write_text(tmp_path / "text.txt")
    corpus = train_tiny.read_corpus(tmp_path / "text.txt", TINY.n_ctx)
    settings = replace(TINY, steps=6, device="cpu", eval_every=3)
    model, summary = train_tiny.train(corpus, settings)
    again, _ = train_tiny.train(corpus, settings)
    in_parts, _ = train_tiny.train(corpus, replace(settings, micro_batch=2, dropout=0.0))
    whole, _ = train_tiny.train(corpus, replace(settings, dropout=0.0))
    state = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name])
    for name, tensor in in_parts.state_dict().items():
        expected = whole.state_dict()[name]
        if name.endswith("attn.c_attn.bias"):
            # Softmax does not see what all keys have in common, so the keys' bias has no gradient but rounding errors,
            # and Adam takes steps of full size whichever way these point.
            tensor, expected = (torch.cat([t[: TINY.d_model], t[2 * TINY.d_model :]]) for t in (tensor, expected))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=5e-3)
    assert summary["tokens_seen"] == 6 * 64

    path = tmp_path / "m.bin"
    train_tiny.save_weights(path, settings.model_config(), {name: t.numpy() for name, t in state.items()})
    ids = torch.from_numpy(corpus.held_out[:16]).long()[None]
    torch.testing.assert_close(model(ids), transformers_model(path)(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_layer", "n_head", "d_model", "n_ctx"), [(1, 1, 8, 5), (3, 2, 34, 33), (2, 4, 128, 64)])
def test_the_architecture_is_gpt2(tmp_path, n_layer, n_head, d_model, n_ctx):
    """With every parameter random, transformers' GPT-2 gives the same logits."""
    config = Settings(n_layer=n_layer, n_head=n_head, d_model=d_model, n_ctx=n_ctx).model_config()
    torch.manual_seed(n_ctx)
    model = train_tiny.GPT2(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            parameter.copy_(parameter.half().float())
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert set(state) == {name for name, _, _ in tensor_table(config)}
    train_tiny.save_weights(tmp_path / "m.bin", config, state)
    ids = torch.randint(0, config.vocab_size, (2, n_ctx))
    ours, theirs = model(ids), transformers_model(tmp_path / "m.bin")(ids).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-6
    targets = torch.randint(0, config.vocab_size, (2, n_ctx))
    loss = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    assert model(ids, targets).item() == pytest.approx(loss.item(), rel=1e-5)


def test_the_default_size_fits_in_16_megabytes():
    config = Settings().model_config()
    assert config.vocab_size == 50257
    assert 15_000_000 < config.file_bytes <= 16_000_000


def test_corpus_is_split_at_documents(tmp_path):
    documents, text = write_text(tmp_path / "text.txt", n_documents=100)
    corpus = train_tiny.read_corpus(tmp_path / "text.txt", 16)
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    end = bpe.END_OF_TEXT
    assert bpe.decode(corpus.train) == "".join(document + end for document in documents[:98])
    assert bpe.decode(corpus.held_out) == "".join(document + end for document in documents[98:])
    for start in corpus.starts:
        assert start == 0 or corpus.train[start - 1] == bpe.END_OF_TEXT_ID
        assert start + 16 < len(corpus.train)


@pytest.mark.parametrize("ending", ["\n<|endoftext|>\n", "\n<|endoftext|>", "\n\n", ""])
def test_documents_are_the_same_however_the_file_ends(tmp_path, ending):
    path = tmp_path / "text.txt"
    path.write_bytes(b"<|endoftext|>\r\none\ntwo\r\n<|endoftext|>\n\nthree <|endoftext|> inside" + ending.encode())
    documents, _ = train_tiny.read_documents(path)
    assert documents == ["one\ntwo", "three <|endoftext|> inside"]


def test_text_without_separators_holds_the_last_tokens_out(tmp_path):
    (tmp_path / "text.txt").write_text("a b c d e f g h i j " * 100)
    corpus = train_tiny.read_corpus(tmp_path / "text.txt", 16)
    assert len(corpus.held_out) == math.ceil(0.02 * (len(corpus.train) + len(corpus.held_out)))
    assert list(corpus.starts) == [0]


def test_windows_lie_inside_the_training_part_and_half_start_documents(tmp_path):
    write_text(tmp_path / "text.txt")
    corpus = train_tiny.read_corpus(tmp_path / "text.txt", 16)
    rng = np.random.default_rng(1)
    rows = np.stack([train_tiny.sample_rows(corpus, 8, 16, rng) for _ in range(500)])
    assert rows.min() >= 0 and rows.max() + 17 == len(corpus.train)
    assert np.isin(rows[:, ::2], corpus.starts).all()
    assert set(rows[:, ::2].ravel()) == set(corpus.starts)
    assert len(set(rows[:, 1::2].ravel())) > len(corpus.starts) * 5


def test_learning_rate_warms_up_and_ends_with_steps_or_minutes():
    settings = Settings(lr=1.0, steps=1000, warmup=100, minutes=1)
    rates = [train_tiny.learning_rate(settings, step, 0) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == rates[99] == 1.0
    assert rates[99:] == sorted(rates[99:], reverse=True) and 0.019 < rates[-1] < 0.021
    assert train_tiny.learning_rate(settings, 100, 60) == pytest.approx(0.02)
    assert train_tiny.learning_rate(settings, 100, 30) == pytest.approx(0.51)


def test_minutes_end_the_training(tmp_path):
    write_text(tmp_path / "text.txt")
    corpus = train_tiny.read_corpus(tmp_path / "text.txt", 16)
    rows = []
    started = time.perf_counter()
    _, summary = train_tiny.train(corpus, replace(TINY, steps=10**6, minutes=0.02, device="cpu"), rows.append)
    assert time.perf_counter() - started < 30
    assert 0 < summary["steps"] < 10**6 and rows[-1]["step"] == summary["steps"]
    assert rows[-1]["lr"] < 0.5 * TINY.lr


def test_the_best_weights_are_kept_not_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "learning_rate", lambda settings, step, seconds: 0.02 if step < 6 else 3.0)
    write_text(tmp_path / "text.txt")
    corpus = train_tiny.read_corpus(tmp_path / "text.txt", 16)
    rows = []
    settings = replace(TINY, steps=12, eval_every=1, device="cpu", dropout=0.0)
    model, summary = train_tiny.train(corpus, settings, rows.append)
    best = min(rows, key=lambda row: row["val_loss"])
    assert best["val_loss"] < rows[-1]["val_loss"], "the run did not get worse, so it shows nothing"
    assert best["step"] < 12
    assert summary["best_step"] == best["step"]
    assert summary["held_out_loss"] == pytest.approx(best["val_loss"], abs=0.05)
    assert not model.training


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one child process")
def test_ctrl_c_still_writes_the_file(tmp_path):
    write_text(tmp_path / "text.txt")
    command = [sys.executable, ROOT / "data" / "train_tiny.py", tmp_path / "text.txt", "--out", tmp_path / "tiny.bin"]
    child = subprocess.Popen([*command, *ARGUMENTS, "--steps", "1000000"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "tiny.log.jsonl").exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == 0 and "Traceback" not in stderr, stderr
    *_, final = [json.loads(line) for line in (tmp_path / "tiny.log.jsonl").read_text().splitlines()]
    assert final["interrupted"] and 10 <= final["steps"] < 10**6
    assert load_weights(tmp_path / "tiny.bin")[0].d_model == 12


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(CorpusError, match="2 tokens are too few for --n_ctx 16"):
        train_tiny.read_corpus(tmp_path / "text.txt", 16)
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(CorpusError, match="0 tokens are too few"):
        train_tiny.read_corpus(tmp_path / "text.txt", 16)
    (tmp_path / "bad.txt.gz").write_bytes(b"not packed")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("bad.txt.gz", "bad.txt", "absent.txt"):
        with pytest.raises(CorpusError, match="cannot be read"):
            train_tiny.read_corpus(tmp_path / name, 16)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--n_head", "3"], "d_model is 128 and n_head is 3"),
        (["--n_layer", "0"], "n_layer is 0"),
        (["--steps", "0"], "--steps is 0; it must be above 0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--dropout", "1"], "--dropout is 1.0"),
        (["--micro_batch", "5"], "--micro_batch is 5; it must divide --batch 64"),
        (["--seed", "-1"], "--seed is -1"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
        (["--seed", str(2**64)], f"--seed is {2**64}; it can be at most {2**64 - 1}"),
        (["--seed", "1.5"], "'1.5' is not an integer"),
        (["--batch", "9" * 30], "--batch is 9"),
        (["--steps", "9" * 5000], "has 5000 digits"),
        (["--lr", "inf"], "--lr is inf"),
        (["--weight_decay", "nan"], "--weight_decay is nan"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--device", ""], "--device  cannot be used"),
        (["--out", "no/folder/tiny.bin"], "there is no folder"),
        (["--out", ""], "--out"),
        (["--out", "/"], "--out: / is a folder"),
        (["--log", "no/folder/tiny.log"], "--log: there is no folder"),
        (["--no_such"], "--no_such"),
    ],
)
def test_bad_options_are_refused(capsys, tmp_path, arguments, said):
    assert train_tiny.main([str(tmp_path / "text.txt"), "--out", str(tmp_path / "m.bin"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("train_tiny: error: ") and captured.err.count("\n") == 1
    assert said in captured.err


@pytest.fixture
def odd_outputs(tmp_path):
    """{name: what it is} of things that no program may replace."""
    text = tmp_path / "text.txt"
    write_text(text)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_folder").symlink_to("folder")
    (tmp_path / "to_pipe").symlink_to("pipe")
    (tmp_path / "to_text").symlink_to("text.txt")
    (tmp_path / "to_itself").symlink_to("to_itself")
    return {
        "folder": "a folder", "pipe": "a pipe", os.ttyname(os.openpty()[1]): "a device", "text.txt": "what is read",
        "to_folder": "a folder", "to_pipe": "a pipe", "to_text": "what is read", "to_itself": "leads nowhere",
        "text.txt/x": "text.txt is not a folder", "absent/x": "there is no folder", "x" * 300: "too long",
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
@pytest.mark.parametrize("option", ["--out", "--log"])
def test_outputs_are_checked_before_the_work(odd_outputs, tmp_path, capsys, monkeypatch, option):
    """Before the text is read; and what is there stays."""
    monkeypatch.setattr(train_tiny, "read_corpus", lambda *_: pytest.fail("the text was read"))
    before = {path.name: (path.lstat().st_mode, path.lstat().st_ino) for path in tmp_path.iterdir()}
    for name, said in odd_outputs.items():
        arguments = {"--out": str(tmp_path / "m.bin"), option: str(tmp_path / name)}
        options = [f"{key}={value}" for key, value in arguments.items()]
        assert train_tiny.main([str(tmp_path / "text.txt"), *options]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"train_tiny: error: {option}: ") and error.count("\n") == 1 and said in error, error
    options = [f"--out={tmp_path / 'm.bin'}", f"--log={tmp_path / 'm.bin'}"]
    assert train_tiny.main([str(tmp_path / "text.txt"), *options]) == 2
    assert "where the weights go" in capsys.readouterr().err
    assert {path.name: (path.lstat().st_mode, path.lstat().st_ino) for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_takes_no_files(tmp_path, capsys):
    write_text(tmp_path / "text.txt")
    (tmp_path / "shut").mkdir(mode=0o500)
    (tmp_path / "kept.bin").write_bytes(b"kept")
    (tmp_path / "kept.bin").chmod(0o400)
    for name, said in (("shut/m.bin", "nothing can be written"), ("kept.bin", "write-protected")):
        assert train_tiny.main([str(tmp_path / "text.txt"), f"--out={tmp_path / name}"]) == 2
        assert said in capsys.readouterr().err


def test_a_full_disk_is_found_out_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 1000})())
    assert train_tiny.main([str(tmp_path / "text.txt"), f"--out={tmp_path / 'm.bin'}"]) == 2
    assert "but 1000 are free" in capsys.readouterr().err


@pytest.fixture
def spoil(tmp_path, monkeypatch):
    """`spoil(name)`: a training of 6 steps, at whose end a folder of this name is in the way; (exit code, weights)."""
    write_text(tmp_path / "text.txt")
    train = train_tiny.train

    def run(name, at="end"):
        def trained(corpus, settings, on_row):
            if at == "start":
                (tmp_path / name).mkdir()
            found = train(corpus, settings, on_row)
            if at == "end":
                (tmp_path / name).unlink(missing_ok=True)
                (tmp_path / name).mkdir()
            return found

        monkeypatch.setattr(train_tiny, "train", trained)
        monkeypatch.setattr(train_tiny, "PROMPTS", ("Hello",))
        return train_tiny.main([str(tmp_path / "text.txt"), f"--out={tmp_path / 'm.bin'}", *ARGUMENTS, "--steps=6"])

    return run


def test_an_output_that_becomes_impossible_costs_nothing(spoil, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert spoil("m.bin") == 2
    captured = capsys.readouterr()
    (kept,) = (tmp_path / "temporary").glob("m-*.bin")
    assert load_weights(kept)[0].d_model == 12
    *_, error = captured.err.splitlines()
    assert error.startswith("train_tiny: error: ") and str(kept) in error and "is a folder" in error
    assert str(kept) in captured.out and (tmp_path / "m.bin").is_dir() and not list((tmp_path / "m.bin").iterdir())
    *_, final = [json.loads(line) for line in (tmp_path / "m.log.jsonl").read_text().splitlines()]
    assert final["weights_sha256"] == hashlib.sha256(kept.read_bytes()).hexdigest()


@pytest.mark.parametrize("at", ["start", "end"])
def test_a_log_that_becomes_impossible_costs_no_weights(spoil, tmp_path, capsys, at):
    assert spoil("m.log.jsonl", at) == 2
    assert load_weights(tmp_path / "m.bin")[0].d_model == 12
    error = capsys.readouterr().err
    assert "m.log.jsonl cannot be written any more" in error.splitlines()[-1] and "Traceback" not in error


def test_a_regular_file_is_replaced_and_keeps_its_mode(tmp_path, capsys, spoil):
    (tmp_path / "real.bin").write_bytes(b"old")
    (tmp_path / "real.bin").chmod(0o640)
    (tmp_path / "m.bin").symlink_to("real.bin")
    spoil("elsewhere")
    assert (tmp_path / "m.bin").is_symlink() and load_weights(tmp_path / "m.bin")[0].d_model == 12
    assert (tmp_path / "real.bin").stat().st_mode & 0o777 == 0o640


def shell(text, *arguments):
    command = ["sh", "-c", text, "sh", sys.executable, str(ROOT / "data" / "train_tiny.py"), *map(str, arguments)]
    return subprocess.run([*command, *ARGUMENTS, "--steps=6"], capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_streams_that_fail(tmp_path):
    """No output: the training does not begin. No messages: it goes on, and its weights are written."""
    write_text(tmp_path / "text.txt")
    arguments = [tmp_path / "text.txt", f"--out={tmp_path / 'm.bin'}"]
    for where in (">&-", "> /dev/full"):
        done = shell(f'"$@" {where}', *arguments)
        assert done.returncode == 2 and done.stderr.startswith("train_tiny: error: the standard output")
        assert done.stderr.count("\n") == 1 and not (tmp_path / "m.bin").exists()
    for where in ("2>&-", "2> /dev/full"):
        done = shell(f'"$@" {where}', *arguments)
        assert done.returncode == 0 and "held-out loss" in done.stdout
        assert load_weights(tmp_path / "m.bin")[0].d_model == 12
        (tmp_path / "m.bin").unlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_text_that_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:30])
    spoilt = bytearray(gzip.compress(b"text" * 1000))
    spoilt[12] ^= 255
    (tmp_path / "spoilt.txt.gz").write_bytes(spoilt)
    for name, said in (("pipe.txt", "is a pipe"), ("", "is a folder"), ("cut.txt.gz", "cannot be read"),
                       ("spoilt.txt.gz", "cannot be read")):  # fmt: skip
        assert train_tiny.main([str(tmp_path / name), f"--out={tmp_path / 'm.bin'}"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert train_tiny.main(["/dev/zero", f"--out={tmp_path / 'm.bin'}"]) == 2
    assert "is a device" in capsys.readouterr().err


def test_a_missing_text_is_one_line(capsys, tmp_path):
    assert train_tiny.main([str(tmp_path / "absent.txt"), "--out", str(tmp_path / "m.bin")]) == 2
    error = capsys.readouterr().err
    assert "absent.txt: cannot be read" in error and error.count("\n") == 1


def test_micro_batch_divides_the_batch():
    for batch in (1, 7, 12, 64):
        rows = train_tiny.choose_micro_batch(replace(Settings(), batch=batch), torch.device("cpu"))
        assert batch % rows == 0 and rows <= 8
    assert set(asdict(Settings())) >= {"seed", "dropout", "weight_decay"}
