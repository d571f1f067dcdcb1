"""data/download_gpt2.py: saved models, a hub (played by a local server), and everything that has to be refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "ch14"))

import download_gpt2
from download_gpt2 import ConversionError, convert
from fake_hub import Hub
from make_models import make_hf_model

from ch14_mini_llm.files import FileError
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.layout import WeightsError
from ch14_mini_llm.model.weights import load_weights

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"n_layer": 2, "n_head": 3, "d_model": 33, "n_ctx": 31, "vocab_size": 127}


@pytest.fixture(scope="module")
def made(tmp_path_factory, transformers):
    """(folder written by save_pretrained, the .bin made of it, the torch model); tests must not change them."""
    folder = tmp_path_factory.mktemp("model")
    path, model = make_hf_model(folder, **SIZES, seed=3)
    return folder / "hf", path, model


@pytest.fixture
def checkpoint(made, tmp_path):
    """A copy of the saved model that a test may damage."""
    return Path(shutil.copytree(made[0], tmp_path / "checkpoint"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    for field, value in changes.items():
        if value is ...:
            settings.pop(field, None)
        else:
            settings[field] = value
    path.write_text(json.dumps(settings))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "data" / "download_gpt2.py"), *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


def assert_one_line_error(done, *said):
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    for words in said:
        assert words in done.stderr


def test_every_tensor_of_a_saved_model_arrives(made):
    _, path, model = made
    config, tensors = load_weights(path)
    assert config == GPT2Config(2, 3, 33, 132, 31, 127)
    state = model.transformer.state_dict()
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, state[name].numpy())
        assert np.ptp(tensor) > 0, f"{name} is constant, so a mix-up would not show"


def test_an_mlp_of_another_width(transformers, tmp_path):
    path, model = make_hf_model(tmp_path, 1, 1, 31, 8, 33, seed=1, d_ff=65)
    config, tensors = load_weights(path)
    assert config.d_ff == 65
    np.testing.assert_array_equal(tensors["h.0.mlp.c_fc.weight"], model.transformer.h[0].mlp.c_fc.weight.detach())


def test_names_without_prefix_masks_and_a_tied_head_make_the_same_file(made, checkpoint, tmp_path):
    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 31, 31), np.uint8))
            tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    edit_tensors(checkpoint, older)
    _, digest = convert(checkpoint, tmp_path / "m.bin")
    assert digest == hashlib.sha256(made[1].read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_make_the_same_file(made, checkpoint, tmp_path, dtype):
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: t.astype(dtype) for name, t in tensors.items()}))
    convert(checkpoint, tmp_path / "m.bin")
    assert (tmp_path / "m.bin").read_bytes() == made[1].read_bytes()


def test_a_model_in_shards(made, checkpoint, tmp_path):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    weight_map = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, checkpoint / shard)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(checkpoint, tmp_path / "m.bin")
    assert (tmp_path / "m.bin").read_bytes() == made[1].read_bytes()


def test_a_pickled_pytorch_model(made, checkpoint, tmp_path):
    import torch

    (checkpoint / "model.safetensors").unlink()
    torch.save(made[2].state_dict(), checkpoint / "pytorch_model.bin")
    convert(checkpoint, tmp_path / "m.bin")
    assert (tmp_path / "m.bin").read_bytes() == made[1].read_bytes()
    (checkpoint / "pytorch_model.bin").write_bytes(b"not a model")
    with pytest.raises(ConversionError, match="cannot be read"):
        convert(checkpoint, tmp_path / "m.bin")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu', not 'gelu_new'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, not 1e-05"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"n_layer": ...}, "n_layer is missing"),
        ({"n_head": 5}, "d_model is 33 and n_head is 5"),
        ({"n_embd": 0}, "d_model is 0"),
        ({"n_positions": "many"}, "n_positions is 'many'"),
        ({"n_layer": 3}, "tensor h.2.attn.c_attn.bias is missing (and 11 more)"),
        ({"n_layer": 1}, "tensor h.1.attn.c_attn.bias is unknown (and 11 more)"),
        ({"vocab_size": 128}, "tensor wte.weight has shape (127, 33); the configuration asks for (128, 33)"),
        ({"n_inner": 99}, "tensor h.0.mlp.c_fc.weight has shape (33, 132)"),
    ],
)
def test_an_unsuitable_configuration_is_named(checkpoint, tmp_path, changes, said):
    edit_config(checkpoint, **changes)
    with pytest.raises((ConversionError, WeightsError)) as caught:
        convert(checkpoint, tmp_path / "m.bin")
    assert said in str(caught.value)
    assert not (tmp_path / "m.bin").exists()


def test_absent_settings_have_their_defaults(made, checkpoint, tmp_path):
    edit_config(checkpoint, **dict.fromkeys([*download_gpt2.SUPPORTED, "n_inner"], ...))
    convert(checkpoint, tmp_path / "m.bin")
    assert (tmp_path / "m.bin").read_bytes() == made[1].read_bytes()


def test_an_untied_head_is_refused(checkpoint, tmp_path):
    edit_tensors(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))
    with pytest.raises(ConversionError, match=r"lm_head.weight differs from wte.weight"):
        convert(checkpoint, tmp_path / "m.bin")


@pytest.mark.parametrize("value", [65520.0, -1e6, np.inf, np.nan])
def test_a_value_that_does_not_fit_is_named(checkpoint, tmp_path, value):
    def spoil(tensors):
        tensors["transformer.h.1.mlp.c_fc.bias"][131] = value

    edit_tensors(checkpoint, spoil)
    with pytest.raises(WeightsError, match=r"h\.1\.mlp\.c_fc\.bias holds .* at index \(131,\)"):
        convert(checkpoint, tmp_path / "m.bin")
    assert not (tmp_path / "m.bin").exists()


def test_a_damaged_file_is_named(checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=r"model.safetensors: cannot be read"):
        convert(checkpoint, tmp_path / "m.bin")
    weights.unlink()
    with pytest.raises(ConversionError, match=r"has none of model.safetensors"):
        convert(checkpoint, tmp_path / "m.bin")
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config.json: cannot be read as JSON"):
        convert(checkpoint, tmp_path / "m.bin")


def test_bfloat16_is_read_and_whole_numbers_are_refused_by_name(made, checkpoint, tmp_path):
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensors = load_torch(checkpoint / "model.safetensors")
    short = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_torch(short, checkpoint / "model.safetensors")
    convert(checkpoint, tmp_path / "m.bin")
    for name, tensor in load_weights(tmp_path / "m.bin")[1].items():
        np.testing.assert_array_equal(tensor, short[f"transformer.{name}"].to(torch.float16).numpy())
    save_torch({**tensors, "transformer.ln_f.bias": torch.ones(33, dtype=torch.int8)}, checkpoint / "model.safetensors")
    with pytest.raises(ConversionError, match=r"transformer.ln_f.bias is stored as I8; save the model as float32"):
        convert(checkpoint, tmp_path / "m.bin")


def test_command_line_on_a_folder(made, tmp_path):
    done = run("--model", made[0], "--out", tmp_path / "m.bin")
    assert done.returncode == 0, done.stderr
    data = (tmp_path / "m.bin").read_bytes()
    assert data == made[1].read_bytes()
    assert hashlib.sha256(data).hexdigest() in done.stdout and f"{len(data):,} bytes" in done.stdout
    assert "n_layer 2, n_head 3, d_model 33, d_ff 132, n_ctx 31, vocab_size 127" in done.stdout
    assert "writing m.bin: 100%" in done.stderr


def test_command_line_errors(made, tmp_path):
    out = tmp_path / "m.bin"
    assert_one_line_error(run("--model", made[0], "--out", tmp_path / "no" / "m.bin"), "there is no folder")
    assert_one_line_error(run("--model", made[0], "--out", tmp_path), "is a folder; give the name of the file")
    assert_one_line_error(run("--model", "gpt5", "--out", out), "'gpt5' is neither a folder", "gpt2-medium")
    assert_one_line_error(run("--model", tmp_path, "--out", out), "has no config.json")
    assert_one_line_error(
        run("--out", out, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache")), "the hub cannot be reached", "--model"
    )
    assert_one_line_error(
        run("--out", out, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "cache")),
        "the hub cannot be reached",
    )
    assert not out.exists()
    assert run("--help").returncode == 0
    assert_one_line_error(run("--out", out, HF_HUB_ETAG_TIMEOUT="x"), "HF_HUB_ETAG_TIMEOUT is 'x'")
    assert_one_line_error(run("--model", made[0]), "--out")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_out_replaces_a_regular_file_only(made, checkpoint, tmp_path, monkeypatch):
    """Anything else is refused before a byte is fetched, and is as it was."""
    monkeypatch.setattr(download_gpt2, "fetch", lambda *_: pytest.fail("it was fetched"))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    device = os.ttyname(os.openpty()[1])
    before = {path.name: (path.lstat().st_mode, path.lstat().st_ino) for path in tmp_path.iterdir()}
    odd = {"folder": "a folder", "pipe": "a pipe", "to_pipe": "a pipe", "folder/no/m.bin": "there is no folder",
           "x" * 300: "too long"}  # fmt: skip
    for out, said in [*((tmp_path / name, said) for name, said in odd.items()), (device, "a device"), ("", "is empty")]:
        with pytest.raises(FileError, match=said) as caught:
            convert("gpt2", out)
        assert str(caught.value).startswith("--out")
    for name in ("model.safetensors", "config.json"):  # what is read: its only copy, maybe
        with pytest.raises(FileError, match="is what is read"):
            convert(checkpoint, checkpoint / name)
    assert {path.name: (path.lstat().st_mode, path.lstat().st_ino) for path in tmp_path.iterdir()} == before
    (tmp_path / "old.bin").write_bytes(b"old")
    (tmp_path / "old.bin").chmod(0o604)
    (tmp_path / "link.bin").symlink_to("old.bin")
    convert(checkpoint, tmp_path / "link.bin")
    assert (tmp_path / "link.bin").is_symlink() and (tmp_path / "old.bin").read_bytes() == made[1].read_bytes()
    assert (tmp_path / "old.bin").stat().st_mode & 0o777 == 0o604


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("where, code", [(">&-", 2), ("> /dev/full", 2), ("2>&-", 0), ("2> /dev/full", 0)])
def test_streams_that_fail(made, tmp_path, where, code):
    program = [sys.executable, ROOT / "data" / "download_gpt2.py", f"--model={made[0]}", f"--out={tmp_path / 'm.bin'}"]
    done = subprocess.run(["sh", "-c", f'"$@" {where}', "sh", *program], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    if code:
        assert done.stderr.splitlines()[-1].startswith("download_gpt2: error: the standard output")
    else:
        assert (tmp_path / "m.bin").read_bytes() == made[1].read_bytes()


def test_missing_packages_are_named(made, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConversionError, match="pip install safetensors"):
        convert(made[0], tmp_path / "m.bin")
    with pytest.raises(ConversionError, match="pip install huggingface_hub"):
        convert("gpt2", tmp_path / "m.bin")


@pytest.fixture
def hub(checkpoint):
    server = Hub(checkpoint, "openai-community/gpt2")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_from_a_hub_then_from_its_cache(made, hub, tmp_path):
    out, environment = tmp_path / "m.bin", {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    done = run("--out", out, **environment)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == made[1].read_bytes()
    assert {line.rsplit("/", 1)[1] for line in hub.asked if line.startswith("GET") and "/resolve/" in line} == {
        "config.json",
        "model.safetensors",
    }
    out.unlink()
    assert run("--out", out, **environment, HF_HUB_OFFLINE="1").returncode == 0
    assert out.read_bytes() == made[1].read_bytes()


def test_download_falls_back_to_a_pickled_model(made, hub, tmp_path):
    import torch

    (hub.folder / "model.safetensors").unlink()
    torch.save(made[2].state_dict(), hub.folder / "pytorch_model.bin")
    done = run("--out", tmp_path / "m.bin", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.bin").read_bytes() == made[1].read_bytes()


def test_download_errors(hub, tmp_path):
    out, environment = tmp_path / "m.bin", {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    assert_one_line_error(run("--out", out, "--model", "no/such", **environment), "has no public model no/such")
    assert_one_line_error(run("--out", out, "--revision", "v9", **environment), "--revision", "no revision 'v9'")
    edit_config(hub.folder, activation_function="relu")
    hub.asked.clear()
    assert_one_line_error(run("--out", out, **environment), "activation_function is 'relu'")
    files = {line.rsplit("/", 1)[1] for line in hub.asked if "/resolve/" in line}
    assert files == {"config.json"}, "the weights of an unsuitable model were asked for"
