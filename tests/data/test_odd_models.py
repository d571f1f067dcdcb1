"""Hundreds of odd model folders: each is converted rightly, or refused in one line with nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "data"))

import download_gpt2
from download_gpt2 import ConversionError, convert

from ch14_mini_llm.cli import one_line
from ch14_mini_llm.files import FileError
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.layout import WeightsError
from ch14_mini_llm.model.weights import load_weights, tensor_table

CONFIG = GPT2Config(n_layer=2, n_head=2, d_model=4, d_ff=16, n_ctx=8, vocab_size=16)
SETTINGS = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 4, "n_positions": 8, "vocab_size": 16}
RNG = np.random.default_rng(7)
TENSORS = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape, _ in tensor_table(CONFIG)}
NAMES = list(TENSORS)


def write_folder(folder, settings=SETTINGS, tensors=TENSORS):
    folder.mkdir()
    (folder / "config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    save_file(tensors, folder / "model.safetensors")
    return folder


def safetensors_file(path, entries, data=b"", header=None):
    """A safetensors file with any header: entries {name: (dtype, shape, (begin, end))}."""
    text = header or json.dumps(
        {name: {"dtype": dtype, "shape": shape, "data_offsets": at} for name, (dtype, shape, at) in entries.items()}
    )
    path.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + data)


def attempt(folder, out):
    """The message of a refusal, one line long and with nothing written; or None, and the file holds `TENSORS`."""
    try:
        convert(folder, out)
    except (ConversionError, WeightsError, FileError) as error:
        message = one_line(error)
        assert 10 < len(message) < 600, message
        assert not out.exists() and not list(out.parent.glob(".*.tmp"))
        return message
    config, found = load_weights(out)
    assert config == CONFIG
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name], tensor.astype(np.float16))
    out.unlink()
    return None


# --- config.json ------------------------------------------------------------------------------------------------------

VALUES = [None, True, False, 0, -1, 1, 2, 3, 5, 2.0, 4.5, 1e300, 2**40, 10**400, "", "4", "gpt2", "a\nb" * 50, [], [4],
          {}, {"a": 1}]  # fmt: skip
ALIASES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
           "max_position_embeddings": "n_positions"}  # fmt: skip


@pytest.mark.parametrize("field", [*SETTINGS, *ALIASES, *download_gpt2.SUPPORTED, "n_inner", "n_ctx"])
def test_any_value_of_a_setting(tmp_path, field):
    folder = write_folder(tmp_path / "model")
    for value in VALUES:
        if (field, value) == ("n_head", 1):
            continue  # another model of the same shapes: nothing in the folder says otherwise
        if field in ALIASES:
            harmless = value is None or value == SETTINGS[ALIASES[field]]
        elif field in download_gpt2.SUPPORTED:
            harmless = value in download_gpt2.SUPPORTED[field]
        elif field in SETTINGS:
            harmless = value == SETTINGS[field] and type(value) is type(SETTINGS[field])
        else:
            harmless = value is None or field == "n_ctx"  # which is looked at where nothing else gives the length
        (folder / "config.json").write_text(json.dumps({**SETTINGS, field: value}))
        message = attempt(folder, tmp_path / "m.bin")
        assert (message is None) == harmless, (field, value, message)


def test_a_setting_that_is_absent(tmp_path):
    folder = write_folder(tmp_path / "model")
    for field in SETTINGS:
        (folder / "config.json").write_text(json.dumps({k: v for k, v in SETTINGS.items() if k != field}))
        assert field in attempt(folder, tmp_path / "m.bin")


@pytest.mark.parametrize(
    "text, said",
    [("", "JSON"), ("{", "JSON"), ("[]", "not a JSON object"), ("null", "not a JSON object"), ("7", "a JSON object"),
     ("[" * 200_000, "JSON"), ("9" * 10_000, "JSON"), ('{"a": NaN}', "model_type"), ("\ufeff{}", "JSON"),
     ('{"n_head": 2, "n_head": 1}', "'n_head' is there twice"), ("\x00", "JSON"), ('{"model_type": "gpt2"', "JSON")],
    ids=lambda value: value[:12],
)  # fmt: skip
def test_a_config_that_is_no_config(tmp_path, text, said):
    folder = write_folder(tmp_path / "model", text)
    assert said in attempt(folder, tmp_path / "m.bin")


@pytest.mark.parametrize("raw", [b"\xff\xfe{\x00}\x00", b"\x80", bytes(range(256))], ids=str)
def test_a_config_that_is_no_text(tmp_path, raw):
    folder = write_folder(tmp_path / "model")
    (folder / "config.json").write_bytes(raw)
    assert "cannot be read as JSON" in attempt(folder, tmp_path / "m.bin")


def test_two_names_of_one_size_must_agree(tmp_path):
    folder = write_folder(tmp_path / "model", {**SETTINGS, "hidden_size": 4, "max_position_embeddings": 8})
    assert attempt(folder, tmp_path / "m.bin") is None
    (folder / "config.json").write_text(json.dumps({**SETTINGS, "num_attention_heads": 1}))
    assert "n_head is 2 and num_attention_heads is 1, two names" in attempt(folder, tmp_path / "m.bin")


# --- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_not_as_it_should_be(tmp_path, name):
    """Missing, renamed, twice, of another shape or type, not finite, too large."""
    good = TENSORS[name]
    spoilt = good.copy()
    spoilt.flat[-1] = np.nan
    large = np.full_like(good, 7e4)
    cases = [
        ({k: v for k, v in TENSORS.items() if k != name}, f"tensor {name} is missing"),
        ({**TENSORS, f"transformer.{name}": good + 1}, f"tensor {name} is there twice"),
        ({**TENSORS, f"transformer.{name}": good}, f"tensor {name} is there twice"),
        ({**TENSORS, f"{name}.old": good}, f"tensor {name}.old is unknown"),
        ({**TENSORS, f"{name}\n{'x' * 200}": good}, "is unknown"),
        ({**TENSORS, name: good.reshape(-1, 1, 1)}, f"tensor {name} has shape"),
        ({**TENSORS, name: good[..., :0]}, f"tensor {name} has shape"),
        ({**TENSORS, name: np.array(good.flat[0])}, f"tensor {name} has shape"),
        ({**TENSORS, name: spoilt}, f"tensor {name} holds nan"),
        ({**TENSORS, name: large}, f"tensor {name} holds 70000"),
    ]
    for dtype, word in (("int8", "I8"), ("int32", "I32"), ("int64", "I64"), ("uint8", "U8"), ("bool", "BOOL")):
        cases.append(({**TENSORS, name: good.astype(dtype)}, f"{name} is stored as {word}"))
    for number, (tensors, said) in enumerate(cases):
        folder = write_folder(tmp_path / f"model{number}", tensors=tensors)
        assert said in attempt(folder, tmp_path / "m.bin")


def test_masks_belong_to_a_layer_that_is_there(tmp_path):
    masks = {f"h.{layer}.attn.{name}": np.ones(1, np.uint8) for layer in (0, 1) for name in ("bias", "masked_bias")}
    assert attempt(write_folder(tmp_path / "a", tensors={**TENSORS, **masks}), tmp_path / "m.bin") is None
    for odd in ("h.2.attn.bias", "h.x.attn.bias", "h.attn.bias", "h.00.attn.bias"):
        folder = write_folder(tmp_path / odd, tensors={**TENSORS, odd: np.ones(1, np.float32)})
        assert f"tensor {odd} is unknown" in attempt(folder, tmp_path / "m.bin")


def test_safetensors_that_are_damaged(tmp_path):
    """Cut after each of 60 lengths, with a byte changed in each of 100 places, and with odd headers."""
    folder = write_folder(tmp_path / "model")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng(3)
    for length in {0, 1, 7, 8, 9, 100, 8 + header, len(whole) - 1, *rng.integers(0, len(whole), 52).tolist()}:
        path.write_bytes(whole[:length])
        assert "model.safetensors: cannot be read" in attempt(folder, tmp_path / "m.bin")
    for position in [*range(8), *rng.integers(8, 8 + header, 100)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            attempt(folder, tmp_path / "m.bin")  # an attempt that succeeds has looked at what it wrote, ...
        except AssertionError:  # ... but for a shift of data_offsets or shape, which no checksum of theirs shows
            assert json.loads(damaged[8 : 8 + header]) != json.loads(whole[8 : 8 + header])
            (tmp_path / "m.bin").unlink()
    for text in ("{}", "[]", "7", "", '{"__metadata__": 7}', '{"wte.weight": {}}', '{"wte.weight": []}', "\x00" * 8):
        safetensors_file(path, {}, header=text + " ")
        assert attempt(folder, tmp_path / "m.bin")
    for dtype, shape, at in (("F32", [16, 4], (0, 10)), ("F32", [-1], (0, 4)), ("F32", [2**62, 4], (0, 4)),
                             ("X9", [1], (0, 4)), ("F32", [1], (4, 0)), ("F32", [1], (0, 2**63)), ("C64", [1], (0, 8)),
                             ("F8_E4M3", [4], (0, 4)), ("F32", 1, (0, 4)), ("F32", ["a"], (0, 4))):  # fmt: skip
        safetensors_file(path, {"wte.weight": (dtype, shape, at)}, bytes(16))
        assert attempt(folder, tmp_path / "m.bin")


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """A folder of two shards: (folder, {tensor: shard})."""
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(NAMES)}
    for shard in set(weight_map.values()):
        save_file({name: TENSORS[name] for name in NAMES if weight_map[name] == shard}, folder / shard)
    return folder, weight_map


def write_index(folder, index):
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)


def test_odd_indexes(shards, tmp_path):
    folder, good = shards
    write_index(folder, {"metadata": {}, "weight_map": good})
    assert attempt(folder, tmp_path / "m.bin") is None
    outside = write_folder(tmp_path / "outside")
    shutil.copy(outside / "model.safetensors", tmp_path / "outside.safetensors")
    odd = ["", "{", "[]", "7", "null", {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}},
           {"weight_map": "x"}]  # fmt: skip
    places = [None, 7, [], {}, "", ".", "..", "config.json", "absent.safetensors", "../outside.safetensors",
              str(tmp_path / "outside.safetensors"), "model-1.safetensors", "a\nb.safetensors",
              "x" * 300 + ".safetensors"]  # fmt: skip
    odd += [{"weight_map": {**good, NAMES[0]: place}} for place in places]
    odd += [{"weight_map": {name: shard for name, shard in good.items() if name != NAMES[3]}},
            {"weight_map": {**good, "more": "model-0.safetensors"}},
            json.dumps({"weight_map": good}).replace("{", '{"wte.weight": "a", "wte.weight": "b",', 1)]  # fmt: skip
    for index in odd:
        write_index(folder, index)
        assert attempt(folder, tmp_path / "m.bin"), index


def test_a_tensor_in_two_shards(shards, tmp_path):
    folder, good = shards
    write_index(folder, {"weight_map": good})
    mine = {name: TENSORS[name] for name in NAMES if good[name] == "model-1.safetensors"}
    save_file({**mine, "wte.weight": TENSORS["wte.weight"] + 1}, folder / "model-1.safetensors")
    assert "wte.weight is not listed" in attempt(folder, tmp_path / "m.bin")
    write_index(folder, {"weight_map": {**good, "transformer.wte.weight": "model-1.safetensors"}})
    save_file({**mine, "transformer.wte.weight": TENSORS["wte.weight"] + 1}, folder / "model-1.safetensors")
    assert "tensor wte.weight is there twice" in attempt(folder, tmp_path / "m.bin")


# --- pickled models ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch has some about the odd ones
def test_pickled_models(torch, tmp_path):
    folder = write_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    good = {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}

    def message(state):
        torch.save(state, folder / "pytorch_model.bin")
        return attempt(folder, tmp_path / "m.bin")

    assert message(good) is None
    assert message({name: tensor.double() for name, tensor in good.items()}) is None
    assert message({name: torch.nn.Parameter(tensor) for name, tensor in good.items()}) is None
    assert message({name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in good.items()}) is None
    one = good["ln_f.bias"]
    for odd, word in (
        (one.to(torch.complex64), "complex64"), (one.to(torch.complex128), "complex128"), (one.int(), "int32"),
        (one.long(), "int64"), (one.to(torch.uint8), "uint8"), (one.bool(), "bool"),
        (one.to(torch.float8_e4m3fn), "float8"),
        (one.to_sparse(), "sparse"), (torch.quantize_per_tensor(one, 0.1, 0, torch.qint8), "qint8"),
        (one.to("meta"), "meta"), (one.tolist(), "a list"), (None, "a NoneType"), ({"a": one}, "a dict"), (7, "an int"),
    ):  # fmt: skip
        said = message({**good, "ln_f.bias": odd})
        assert "ln_f.bias is" in said and word.replace("an int", "a int") in said, said
    for state in ([], [one], one, 7, None, {}, {0: one}, {"state_dict": good}, {**good, 7: one}, "text"):
        assert message(state)
    assert "tensor wte.weight is there twice" in message({**good, "transformer.wte.weight": good["wte.weight"]})
    assert "ln_f.bias has shape" in message({**good, "ln_f.bias": one[:-1]})
    assert "ln_f.bias holds inf" in message({**good, "ln_f.bias": one / 0})
    torch.save(good, folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (folder / "pytorch_model.bin").write_bytes(whole[:length])
        assert "pytorch_model.bin: cannot be read" in attempt(folder, tmp_path / "m.bin")


# --- what lies in the folder ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
@pytest.mark.parametrize("file", ["config.json", *download_gpt2.WEIGHT_FILES, "model-0.safetensors"])
def test_what_is_no_file(shards, tmp_path, file):
    """A folder, a pipe (which must not be waited for), a device, a link to nowhere, to itself, and to a pipe."""
    folder, good = shards
    if file == "model-0.safetensors":
        write_index(folder, {"weight_map": good})
    path = folder / file
    links = [lambda to=to: path.symlink_to(to) for to in ("/dev/zero", "absent", file, "pipe")]
    for make in (path.mkdir, lambda: os.mkfifo(path), *links):
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        make()
        if not (folder / "pipe").exists():
            os.mkfifo(folder / "pipe")
        assert attempt(folder, tmp_path / "m.bin")


def test_links_to_files_are_files(tmp_path):
    """The hub's cache is made of them."""
    folder = write_folder(tmp_path / "model")
    for path in list(folder.iterdir()):
        path.rename(tmp_path / f"blob-{path.name}")
        path.symlink_to(tmp_path / f"blob-{path.name}")
    assert attempt(folder, tmp_path / "m.bin") is None


def test_names_of_models_that_are_none(tmp_path):
    for name in ("", " ", "a/b/c", "x" * 5000, "no\nsuch", ".", "..", "/", str(tmp_path / "absent"), "~/absent"):
        message = attempt(name, tmp_path / "m.bin")
        assert message and "--model" in message, name
