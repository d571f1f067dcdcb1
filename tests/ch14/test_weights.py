"""The weight file: what is written is read back, and whatever is wrong with a file is named."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ch14_mini_llm import weights
from ch14_mini_llm.weights import GPT2Config, WeightsError, load_weights, save_weights, tensor_table

ROOT = Path(__file__).resolve().parents[2]
SMALL = GPT2Config(n_layer=2, n_head=3, d_model=33, d_ff=31, n_ctx=7, vocab_size=127)
GPT2_124M = GPT2Config(n_layer=12, n_head=12, d_model=768, d_ff=3072, n_ctx=1024, vocab_size=50257)


def random_tensors(config, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape, _ in tensor_table(config)}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.bin"
    save_weights(path, SMALL, random_tensors(SMALL))
    return path


def patch(path, position, raw):
    data = bytearray(path.read_bytes())
    data[position : position + len(raw)] = raw
    path.write_bytes(data)


def patch_field(path, index, value):
    patch(path, 4 * index, np.int32(value).tobytes())


@pytest.mark.parametrize(
    "config", [SMALL, GPT2Config(1, 1, 1, 1, 1, 1), GPT2Config(3, 2, 64, 256, 128, 1025)], ids=["odd", "ones", "even"]
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_round_trip_rounds_to_fp16(tmp_path, config, dtype):
    tensors = random_tensors(config, dtype=dtype)
    digest = save_weights(tmp_path / "m.bin", config, tensors)
    assert digest == hashlib.sha256((tmp_path / "m.bin").read_bytes()).hexdigest()
    found_config, found = load_weights(tmp_path / "m.bin")
    assert found_config == config
    assert list(found) == [name for name, _, _ in tensor_table(config)]
    for name, tensor in tensors.items():
        assert isinstance(found[name], np.memmap) and not found[name].flags.writeable
        assert found[name].dtype == np.float16 and found[name].flags.c_contiguous
        np.testing.assert_array_equal(found[name], tensor.astype(np.float16))


def test_bytes_lie_where_the_table_says(saved):
    data = saved.read_bytes()
    tensors = random_tensors(SMALL)
    assert data[:4] == b"KbKW"
    assert list(np.frombuffer(data[4:64], "<i4")) == [1, 2, 3, 33, 31, 7, 127, 1] + [0] * 7
    end = 64
    for name, shape, offset in tensor_table(SMALL):
        assert offset == end
        end += 2 * int(np.prod(shape))
        assert data[offset:end] == tensors[name].astype("<f2").tobytes()
    assert end == len(data) == SMALL.file_bytes


def test_gpt2_small_has_its_published_size():
    assert GPT2_124M.n_parameters == 124_439_808
    assert GPT2_124M.head_dim == 64
    assert GPT2_124M.file_bytes == 248_879_680


def test_matrices_that_are_views_are_stored_in_row_order(tmp_path):
    tensors = random_tensors(SMALL)
    name = "h.1.attn.c_attn.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T).T
    save_weights(tmp_path / "m.bin", SMALL, tensors)
    np.testing.assert_array_equal(load_weights(tmp_path / "m.bin")[1][name], tensors[name].astype(np.float16))


def read_table(heading):
    """Rows of the Markdown table in data/README.md whose header line starts with `heading`."""
    lines = (ROOT / "data" / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def evaluate_shape(text, config):
    """The shape "(d, 3 * d)" stands for in `config`."""
    sizes = {**asdict(config), "d": config.d_model}
    numbers = re.sub(r"[a-z_]+", lambda match: str(sizes[match.group()]), text)
    parts = [part for part in numbers.strip("()").split(",") if part.strip()]
    return tuple(int(np.prod([ast.literal_eval(factor.strip()) for factor in part.split("*")])) for part in parts)


def test_readme_table_of_tensors_agrees_with_the_code():
    rows = [(name.strip("`"), shape) for name, shape in read_table("| tensor |")]
    block = [row for row in rows if "{i}" in row[0]]
    first = rows.index(block[0])
    expanded = rows[:first]
    for layer in range(SMALL.n_layer):
        expanded += [(name.replace("{i}", str(layer)), shape) for name, shape in block]
    expanded += rows[first + len(block) :]
    documented = [(name, evaluate_shape(shape, SMALL)) for name, shape in expanded]
    assert documented == [(name, shape) for name, shape, _ in tensor_table(SMALL)]


def test_readme_table_of_the_header_agrees_with_the_code():
    rows = read_table("| int32 |")
    assert [field.strip("`") for _, field, _ in rows[:-1]] == list(weights.HEADER_FIELDS)
    assert [int(number) for number, _, _ in rows[:-1]] == list(range(len(weights.HEADER_FIELDS)))
    assert rows[-1][0] == f"{len(weights.HEADER_FIELDS)}-{weights.HEADER_INTS - 1}"
    assert hex(weights.MAGIC) in rows[0][2] and rows[1][2] == str(weights.VERSION)


@pytest.mark.parametrize(
    ("index", "value", "said"),
    [
        (0, 0x12345678, r"magic is 0x12345678; it must be 0x574b624b"),
        (1, 2, "version is 2; it must be 1"),
        (2, 0, "n_layer is 0; it must be from 1 to 1024"),
        (2, 1025, "n_layer is 1025; it must be from 1 to 1024"),
        (3, -1, "n_head is -1"),
        (3, 2, "d_model is 33 and n_head is 2"),
        (4, 1 << 30, "d_model is 1073741824"),
        (5, 0, "d_ff is 0"),
        (6, -7, "n_ctx is -7"),
        (7, 0, "vocab_size is 0"),
        (8, 2, "dtype is 2; it must be 1"),
        (9, 1, "reserved header integer 9 is 1; it must be 0"),
        (15, -1, "reserved header integer 15 is -1"),
    ],
)
def test_a_wrong_header_field_is_named(saved, index, value, said):
    patch_field(saved, index, value)
    with pytest.raises(WeightsError, match=re.escape(said)) as caught:
        load_weights(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("index", [2, 4, 5, 6, 7])
def test_a_size_that_disagrees_with_the_length_is_refused(saved, index):
    wrong = asdict(SMALL)
    field = weights.HEADER_FIELDS[index]
    wrong[field] *= 2
    patch_field(saved, index, wrong[field])
    with pytest.raises(WeightsError, match=f"{SMALL.file_bytes} bytes.*{GPT2Config(**wrong).file_bytes} bytes"):
        load_weights(saved)


@pytest.mark.parametrize(("change", "word"), [(-1, "cut short"), (1, "too long"), (-2, "cut short"), (64, "too long")])
def test_a_wrong_length_is_refused(saved, change, word):
    data = saved.read_bytes()
    saved.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(WeightsError, match=f"{SMALL.file_bytes + change} bytes.*{SMALL.file_bytes} bytes.*{word}"):
        load_weights(saved)


@pytest.mark.parametrize("length", [0, 1, 63])
def test_a_file_shorter_than_its_header_is_refused(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    with pytest.raises(WeightsError, match=f"{length} bytes; the header alone is 64"):
        load_weights(saved)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="there is no such weight file"):
        load_weights(tmp_path / "absent.bin")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(tmp_path)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7C01], ids=hex)
@pytest.mark.parametrize("where", ["wte.weight", "h.0.mlp.c_fc.weight", "h.1.ln_2.bias", "ln_f.bias"])
def test_nan_and_infinity_are_refused_naming_the_tensor(saved, bits, where):
    shape, offset = next((shape, offset) for name, shape, offset in tensor_table(SMALL) if name == where)
    last = int(np.prod(shape)) - 1
    patch(saved, offset + 2 * last, np.uint16(bits).tobytes())
    index = re.escape(str(tuple(size - 1 for size in shape)))
    with pytest.raises(WeightsError, match=f"tensor {re.escape(where)} holds .*(nan|inf) at index {index}"):
        load_weights(saved)


@pytest.mark.parametrize("size", [1, 31, 33, 127, 1025, 4096])
def test_first_non_finite_agrees_with_numpy(size):
    rng = np.random.default_rng(size)
    flat = rng.integers(0, 1 << 16, size, dtype=np.uint16)  # one in 32 bit patterns is not finite
    for mask in (0xFFFF, 0xFBFF):  # anything; and with one exponent bit cleared, nothing that is not finite
        values = (flat & mask).view(np.float16)
        wrong = np.flatnonzero(~np.isfinite(values))
        expected = int(wrong[0]) if wrong.size else None
        assert weights.first_non_finite(values, chunk=100) == expected
    assert weights.first_non_finite(np.full(size, 65504, np.float16), chunk=100) is None


def test_the_check_is_fast_enough_for_large_models():
    values = np.ones(1 << 25, np.float16)
    started = time.perf_counter()
    assert weights.first_non_finite(values) is None
    assert time.perf_counter() - started < 0.5  # 124M values may then take 2 s on a machine this slow; usually 0.05


def test_saving_refuses_what_fp16_cannot_hold(tmp_path):
    tensors = random_tensors(SMALL)
    tensors["h.1.mlp.c_proj.weight"][30, 32] = 70000
    with pytest.raises(WeightsError, match=r"h\.1\.mlp\.c_proj\.weight holds 70000 at index \(30, 32\).*65504"):
        save_weights(tmp_path / "m.bin", SMALL, tensors)
    tensors["h.1.mlp.c_proj.weight"][30, 32] = np.nan
    with pytest.raises(WeightsError, match="holds nan"):
        save_weights(tmp_path / "m.bin", SMALL, tensors)
    assert list(tmp_path.iterdir()) == []


def test_saving_refuses_wrong_tensors(tmp_path):
    good = random_tensors(SMALL)
    without = {name: tensor for name, tensor in good.items() if name != "ln_f.bias"}
    for tensors, said in (
        (without, "1 tensors are missing: ln_f.bias"),
        ({**good, "lm_head.weight": good["wte.weight"]}, "not part of the layout: lm_head.weight"),
        ({**good, "wpe.weight": good["wpe.weight"].T}, r"wpe.weight has shape \(33, 7\).*\(7, 33\)"),
        ({**good, "wpe.weight": np.zeros((7, 33), np.int32)}, "wpe.weight has dtype int32"),
    ):
        with pytest.raises(WeightsError, match=said):
            save_weights(tmp_path / "m.bin", SMALL, tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_old_file(saved):
    before = saved.read_bytes()
    tensors = random_tensors(SMALL, seed=1)
    tensors["ln_f.bias"][0] = np.inf  # the last tensor: everything before it has been written by then
    with pytest.raises(WeightsError):
        save_weights(saved, SMALL, tensors)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_progress_is_told_of_every_tensor(tmp_path):
    names = []
    save_weights(tmp_path / "m.bin", SMALL, random_tensors(SMALL), on_tensor=names.append)
    assert names == [name for name, _, _ in tensor_table(SMALL)]


@pytest.mark.parametrize("value", [1.5, "12", None, True])
def test_a_configuration_must_hold_integers(value):
    with pytest.raises(WeightsError, match=r"n_layer is .*must be an integer"):
        GPT2Config(value, 1, 8, 32, 8, 8)


def test_default_weights_prefer_real_gpt2(tmp_path):
    with pytest.raises(WeightsError, match=r"download_gpt2.py.*train_tiny.py"):
        weights.default_weights(tmp_path)
    (tmp_path / "tiny-gpt2.bin").touch()
    assert weights.default_weights(tmp_path) == tmp_path / "tiny-gpt2.bin"
    (tmp_path / "gpt2-small.bin").touch()
    assert weights.default_weights(tmp_path) == tmp_path / "gpt2-small.bin"
    assert weights.DATA_DIR == ROOT / "data"
