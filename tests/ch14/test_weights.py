"""The weight file: what is written is read back, and whatever is wrong with a file is named."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import os
import re
import struct
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ch14_mini_llm.model import header, layout, version1, weights
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.layout import WeightsError
from ch14_mini_llm.model.weights import load_weights, save_weights, tensor_table

ROOT = Path(__file__).resolve().parents[2]
SMALL = GPT2Config(n_layer=2, n_head=3, d_model=33, d_ff=31, n_ctx=7, vocab_size=127)
GPT2_124M = GPT2Config(n_layer=12, n_head=12, d_model=768, d_ff=3072, n_ctx=1024, vocab_size=50257)


def random_tensors(config, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape, _ in tensor_table(config)}


def write_v1(path, config, tensors):
    """A file of version 1, as the programs wrote it: 16 int32 and a stream of fp16."""
    fields = [0x574B624B, 1, *asdict(config).values(), 1] + [0] * 7
    names = [name for name, _, _ in tensor_table(config)]
    path.write_bytes(struct.pack("<16i", *fields) + b"".join(tensors[name].astype("<f2").tobytes() for name in names))


def take_apart(path):
    """(header as JSON, bytes behind it) of a file of version 2, by README's words and none of the reader's code."""
    data = path.read_bytes()
    magic, version, length, crc = struct.unpack("<4sIII", data[:16])
    assert (magic, version) == (b"KbKW", 2) and (16 + length) % 64 == 0
    assert zlib.crc32(data[:12] + data[16 : 16 + length]) == crc
    return json.loads(data[16 : 16 + length]), data[16 + length :]


def put_together(path, header, data):
    """Write a file of version 2 with this header, and with the checksum that it asks for."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = text.ljust(-(-(16 + len(text)) // 64) * 64 - 16)
    start = struct.pack("<4sII", b"KbKW", 2, len(text))
    path.write_bytes(start + struct.pack("<I", zlib.crc32(start + text)) + text + data)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.bin"
    save_weights(path, SMALL, random_tensors(SMALL))
    return path


@pytest.fixture
def saved_v1(tmp_path):
    path = tmp_path / "old.bin"
    write_v1(path, SMALL, random_tensors(SMALL))
    return path


V1_BYTES = 64 + 2 * SMALL.n_parameters


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


def test_bytes_lie_where_the_header_says(saved):
    header, data = take_apart(saved)
    tensors = random_tensors(SMALL)
    assert header["model"] == {
        "architecture": "gpt2", "n_layer": 2, "n_head": 3, "n_kv_head": 3, "head_dim": 11, "d_model": 33, "d_ff": 31,
        "n_ctx": 7, "vocab_size": 127, "epsilon": 1e-5, "rotary_base": None, "tied_head": True, "tokenizer": "gpt2",
    }  # fmt: skip
    assert [entry["name"] for entry in header["tensors"]] == [name for name, _, _ in tensor_table(SMALL)]
    end = 0
    for entry in header["tensors"]:
        assert entry["type"] == "fp16" and tuple(entry["shape"]) == tensors[entry["name"]].shape
        assert entry["offset"] == end and entry["size"] == 2 * tensors[entry["name"]].size
        stored = data[end : end + entry["size"]]
        assert stored == tensors[entry["name"]].astype("<f2").tobytes()
        assert entry["crc32"] == f"{zlib.crc32(stored):08x}"
        end = -(-(end + entry["size"]) // 64) * 64
    assert end == len(data) and saved.stat().st_size == SMALL.file_bytes


def test_version_1_is_read(saved_v1, saved):
    config, tensors = load_weights(saved_v1)
    assert config == SMALL and saved_v1.stat().st_size == V1_BYTES
    end = 64
    for name, shape, offset in tensor_table(SMALL):
        assert offset == end
        end += 2 * int(np.prod(shape))
        assert isinstance(tensors[name], np.memmap) and not tensors[name].flags.writeable
        np.testing.assert_array_equal(tensors[name], load_weights(saved)[1][name])
    assert end == V1_BYTES


def test_the_model_in_the_repository_is_version_1_as_it_was():
    path = ROOT / "data" / "tiny-gpt2.bin"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"| SHA-256 of `tiny-gpt2.bin` | `{digest}` |" in (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    config, _ = load_weights(path)
    assert config == GPT2Config(7, 4, 128, 512, 512, 50257)


def test_gpt2_small_has_its_published_size():
    assert GPT2_124M.n_parameters == 124_439_808
    assert GPT2_124M.head_dim == 64
    assert tensor_table(GPT2_124M)[-1][2] + 2 * 768 == 248_879_680  # of version 1
    assert 248_879_680 < GPT2_124M.file_bytes < 248_879_680 + 64 * 149 + 20_000


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


def test_readme_table_of_the_old_header_agrees_with_the_code():
    rows = read_table("| int32 |")
    assert [field.strip("`") for _, field, _ in rows[:-1]] == list(version1.V1_FIELDS)
    assert [int(number) for number, _, _ in rows[:-1]] == list(range(len(version1.V1_FIELDS)))
    assert rows[-1][0] == f"{len(version1.V1_FIELDS)}-{version1.V1_INTS - 1}"
    assert hex(layout.MAGIC) in rows[0][2] and rows[1][2] == "1"


def test_readme_tables_of_the_header_agree_with_the_code():
    in_gpt2 = weights._model_of(SMALL)
    rows = read_table("| `model` |")
    assert [field.strip("`") for field, _, _ in rows] == list(header.MODEL_FIELDS)
    for field, value, _ in rows:
        field, value = field.strip("`"), value.strip("`")
        try:
            assert in_gpt2[field] == json.loads(value)
        except ValueError:
            assert value in ("a size", "n_head", "d_model / n_head") and isinstance(in_gpt2[field], int)
    assert [field.strip("`") for field, _ in read_table("| `tensors` |")] == list(header.Tensor.__dataclass_fields__)
    types = {name.strip("`"): (int(values), int(size)) for name, values, size in read_table("| type |")}
    assert types == header.TYPES
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    assert f"multiple of {header.ALIGNMENT} bytes" in text and f"the version, {layout.VERSION} |" in text


@pytest.mark.parametrize(
    ("index", "value", "said"),
    [
        (0, 0x12345678, r"magic is 0x12345678; it must be 0x574b624b"),
        (1, 3, r"version is 3; this code reads 1 and 2"),
        (1, 0, r"version is 0"),
        (1, 2, r"the header's length is 2 bytes"),
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
def test_a_wrong_header_field_is_named(saved_v1, index, value, said):
    patch_field(saved_v1, index, value)
    with pytest.raises(WeightsError, match=re.escape(said)) as caught:
        load_weights(saved_v1)
    assert str(saved_v1) in str(caught.value)


@pytest.mark.parametrize("index", [2, 4, 5, 6, 7])
def test_a_size_that_disagrees_with_the_length_is_refused(saved_v1, index):
    wrong = asdict(SMALL)
    field = version1.V1_FIELDS[index]
    wrong[field] *= 2
    patch_field(saved_v1, index, wrong[field])
    with pytest.raises(WeightsError, match=f"{V1_BYTES} bytes.*{64 + 2 * GPT2Config(**wrong).n_parameters} bytes"):
        load_weights(saved_v1)


@pytest.mark.parametrize(("change", "word"), [(-1, "cut short"), (1, "too long"), (-2, "cut short"), (64, "too long")])
def test_a_wrong_length_is_refused(saved_v1, change, word):
    data = saved_v1.read_bytes()
    saved_v1.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(WeightsError, match=f"{V1_BYTES + change} bytes.*{V1_BYTES} bytes.*{word}"):
        load_weights(saved_v1)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 63])
def test_a_file_shorter_than_its_header_is_refused(saved_v1, length):
    saved_v1.write_bytes(saved_v1.read_bytes()[:length])
    with pytest.raises(WeightsError, match=f"{length} bytes; the (shortest header is 16|header alone is 64)"):
        load_weights(saved_v1)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="there is no such weight file"):
        load_weights(tmp_path / "absent.bin")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(tmp_path)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0x7C01], ids=hex)
@pytest.mark.parametrize("where", ["wte.weight", "h.0.mlp.c_fc.weight", "h.1.ln_2.bias", "ln_f.bias"])
def test_nan_and_infinity_are_refused_naming_the_tensor(saved, saved_v1, bits, where):
    """In both versions; in the second one with the checksum that belongs to such a tensor."""
    shape, offset = next((shape, offset) for name, shape, offset in tensor_table(SMALL) if name == where)
    last = int(np.prod(shape)) - 1
    patch(saved_v1, offset + 2 * last, np.uint16(bits).tobytes())
    header, data = take_apart(saved)
    entry = next(entry for entry in header["tensors"] if entry["name"] == where)
    spoilt = bytearray(data)
    at = entry["offset"] + 2 * last
    spoilt[at : at + 2] = np.uint16(bits).tobytes()
    entry["crc32"] = f"{zlib.crc32(spoilt[entry['offset'] : entry['offset'] + entry['size']]):08x}"
    put_together(saved, header, bytes(spoilt))
    index = re.escape(str(tuple(size - 1 for size in shape)))
    for path in (saved, saved_v1):
        with pytest.raises(WeightsError, match=f"tensor {re.escape(where)} holds .*(nan|inf) at index {index}"):
            load_weights(path)


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


# --- version 2: checksums, and a header that is taken at its word ----------------------------------------------------


def assert_refused(path, *said):
    with pytest.raises(WeightsError) as caught:
        load_weights(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    for words in said:
        assert words in message, message


@pytest.mark.parametrize(
    "changes",
    [{"n_head": 1}, {"n_head": 11}, {"n_ctx": 8, "vocab_size": 126}, {"n_ctx": 127, "vocab_size": 7}, {"d_ff": 33},
     {"epsilon": 1e-6}, {"tied_head": False}, {"rotary_base": 10000.0}, {"architecture": "llama"}],
    ids=str,
)  # fmt: skip
def test_a_header_of_another_model_is_refused(saved, changes):
    """By its checksum; and if somebody made that anew, by the fields and tensors that do not fit it."""
    header, data = take_apart(saved)
    old = saved.read_bytes()
    header["model"].update(changes)
    put_together(saved, header, data)
    assert_refused(saved)
    text = json.dumps(header, separators=(",", ":")).encode()
    length = struct.unpack("<I", old[8:12])[0]
    saved.write_bytes(old[:16] + text.ljust(length)[:length] + data)
    assert_refused(saved, "the header does not have the checksum")


def test_every_byte_counts(saved):
    data = saved.read_bytes()
    end = len(data) - len(take_apart(saved)[1])
    rng = np.random.default_rng(0)
    for position in [*range(32), *rng.integers(32, end, 200), *rng.integers(end, len(data), 400), len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        saved.write_bytes(damaged)
        assert_refused(saved)
    saved.write_bytes(data)
    load_weights(saved)


@pytest.mark.parametrize("length", [16, 17, 63, 64, 1000, -1, -2, -64, -4096])
def test_a_cut_file_is_refused(saved, length):
    saved.write_bytes(saved.read_bytes()[:length])
    assert_refused(saved, "bytes")
    saved.write_bytes(saved.read_bytes() + bytes(10**6))
    assert_refused(saved)


def test_swapped_tensors_are_refused(saved):
    header, data = take_apart(saved)
    one, other = (entry for entry in header["tensors"] if entry["name"] in ("h.0.ln_1.bias", "h.1.ln_1.bias"))
    swapped = bytearray(data)
    for a, b in ((one, other), (other, one)):
        swapped[a["offset"] : a["offset"] + a["size"]] = data[b["offset"] : b["offset"] + b["size"]]
    put_together(saved, header, bytes(swapped))
    assert_refused(saved, "tensor h.0.ln_1.bias does not have its checksum")


def test_an_odd_header_is_one_line(saved):
    header, data = take_apart(saved)
    first = header["tensors"][0]

    def with_model(**changes):
        return {**header, "model": {**header["model"], **changes}}

    def with_first(**changes):
        return {**header, "tensors": [{**first, **changes}, *header["tensors"][1:]]}

    without = {name: value for name, value in header["model"].items() if name != "epsilon"}
    twice = json.dumps(header).replace('"n_head": 3', '"n_head": 3, "n_head": 1').encode()
    for odd, said in (
        (b"", "cannot be read as JSON"), (b"{", "cannot be read as JSON"), (b"[]", "two fields model and tensors"),
        (b"\xff\xfe{}", "read as JSON"), (b"[" * 100_000, "read as JSON"),
        (b'{"model": NaN}', "holds NaN"),
        (b"9" * 9000, "read as JSON"), (twice, "there twice"), ({**header, "note": 1}, "two fields"),
        ({**header, "model": []}, "must be an object"), ({**header, "model": without}, "field 'epsilon' is missing"),
        ({**header, "tensors": {}}, "must be a list"), ({**header, "tensors": []}, "the header lists None, where"),
        (with_model(colour="red"), "field 'colour' is unknown"), (with_model(n_head=True), "n_head is true"),
        (with_model(n_head=3.0), "n_head is 3.0; it must be from 1 to 1024"), (with_model(n_layer=0), "n_layer is 0"),
        (with_model(n_layer=10**30), "n_layer is 1000"), (with_model(epsilon="1e-5"), 'epsilon is "1e-5"'),
        (with_model(epsilon=-1), "epsilon is -1; it must be a number above 0"),
        (with_model(tied_head=1), "tied_head is 1"),
        (with_model(rotary_base=False), "rotary_base is false; it must be a number above 0 or null"),
        (with_model(architecture=""), "architecture is"), (with_model(architecture="a\nb"), "architecture is"),
        (with_model(architecture="mamba"), "architecture is 'mamba'; this code runs 'gpt2'"),
        (with_model(n_kv_head=2), "n_head must be a multiple of n_kv_head"),
        (with_model(n_kv_head=1), "n_kv_head is 1"),
        (with_model(tokenizer=None), "tokenizer is None"), (with_model(head_dim=12), "head_dim is 12"),
        (with_first(type="fp8"), "is of type 'fp8'; this code knows fp16"), (with_first(type=[]), "must have text"),
        (with_first(type="fp32"), "its shape takes"),
        (with_first(type="fp32", size=2 * first["size"]), "those before it"),
        (with_first(shape=[127]), "its shape takes"), (with_first(shape="127"), "must have whole numbers"),
        (with_first(shape=[33, 127]), "wte.weight"), (with_first(shape=[-127, -33]), "must have whole numbers"),
        (with_first(offset=64), "to be 8382 bytes at 64"), (with_first(size=10), "10 bytes at 0"),
        (with_first(name="wpe.weight"), "tensor wpe.weight is listed twice"), (with_first(crc32="0"), "its checksum"),
        (with_first(crc32=0), "must have text"),
        (with_first(name="a\nb"), "must have text"), (with_first(more=1), "fields"),
        ({**header, "tensors": header["tensors"][:-1]}, "where a GPT-2 of these sizes has"),
        ({**header, "tensors": [*header["tensors"], header["tensors"][0]]}, "wte.weight"),
        ({**header, "tensors": [7]}, "entry 0"),
    ):  # fmt: skip
        put_together(saved, odd, data)
        assert_refused(saved, said)


def test_a_random_change_of_the_header_is_refused_or_harmless(saved):
    """Whatever value is put wherever, with a checksum that is right: a `WeightsError`, or the same model."""
    header, data = take_apart(saved)
    rng = np.random.default_rng(1)
    odd = [None, True, -1, 0, 1, 3, 7, 33, 127, 1e300, 0.5, "", "gpt2", "fp16", [], {}, [1], {"a": 1}, 2**70, "é\u2028"]
    before = {name: tensor.copy() for name, tensor in load_weights(saved)[1].items()}
    refused = 0
    for _ in range(400):
        changed = copy.deepcopy(header)
        where = changed["model"] if rng.random() < 0.5 else changed["tensors"][rng.integers(len(changed["tensors"]))]
        key = list(where)[rng.integers(len(where))]
        if rng.random() < 0.1:
            del where[key]
        else:
            where[key] = odd[rng.integers(len(odd))]
        put_together(saved, changed, data)
        try:
            config, tensors = load_weights(saved)
        except WeightsError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            refused += 1
        else:
            assert config == SMALL and all(np.array_equal(before[name], tensors[name]) for name in before)
    assert refused > 300


def test_the_next_models_need_no_other_version(tmp_path, monkeypatch):
    """Grouped heads, rotary positions, a head of its own, 4-bit blocks, a tokenizer in the file, a field to come."""
    monkeypatch.setitem(header.TYPES, "q4", (32, 18))
    monkeypatch.setitem(header.LATER_FIELDS, "rotary_scaling", (float, None))
    model = {
        "architecture": "mistral", "n_layer": 1, "n_head": 8, "n_kv_head": 2, "head_dim": 16, "d_model": 96,
        "d_ff": 352, "n_ctx": 4096, "vocab_size": 1000, "epsilon": 1e-6, "rotary_base": 500000.0, "tied_head": False,
        "tokenizer": "tokenizer.json", "rotary_scaling": 8.0,
    }  # fmt: skip
    tokenizer = json.dumps({"a": 1}).encode()
    tensors = [("embedding", "fp16", (1000, 96)), ("0.gate", "q4", (352, 96)), ("0.norm", "fp32", (96,)),
               ("head", "q4", (1000, 96)), ("tokenizer.json", "bytes", (len(tokenizer),))]  # fmt: skip
    rng = np.random.default_rng(2)
    sizes = {"embedding": 2 * 96000, "0.gate": 352 * 3 * 18, "0.norm": 4 * 96, "head": 1000 * 3 * 18}
    stored = {name: rng.integers(0, 256, size, dtype=np.uint8).tobytes() for name, size in sizes.items()}
    stored["tokenizer.json"] = tokenizer
    path = tmp_path / "mistral.bin"
    digest = layout.write_layout(path, layout.make_layout(model, tensors), stored.__getitem__)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with open(path, "rb") as file:
        assert layout.read_version(file) == 2
        found = layout.read_layout(file)
        data = layout.read_tensors(file, found)
    assert found.model == model and [(t.name, t.type, t.shape) for t in found.tensors] == tensors
    assert {name: bytes(value) for name, value in data.items()} == stored
    assert_refused(path, "architecture is 'mistral'; this code runs 'gpt2' and 'llama'")
    monkeypatch.delitem(header.LATER_FIELDS, "rotary_scaling")
    assert_refused(path, "field 'rotary_scaling' is unknown")
    with pytest.raises(WeightsError, match="needs rows of a multiple of 32"):
        layout.make_layout({**found.model}, [("x", "q4", (32, 33))])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_only_regular_files_are_read(tmp_path):
    """At once: to open a pipe waits for a writer."""
    os.mkfifo(tmp_path / "pipe.bin")
    (tmp_path / "link.bin").symlink_to(tmp_path / "pipe.bin")
    (tmp_path / "loop.bin").symlink_to(tmp_path / "loop.bin")
    started = time.perf_counter()
    odd = {"pipe.bin": "is a pipe", "link.bin": "is a pipe", "loop.bin": "cannot be read", "": "is a folder"}
    for name, said in odd.items():
        assert_refused(tmp_path / name, said)
    for device in ("/dev/null", "/dev/zero"):
        assert_refused(Path(device), "is a device")
    assert time.perf_counter() - started < 5


def test_loading_is_fast(tmp_path):
    """What the checksums cost: 64 MB in well under the time that a first token takes."""
    config = GPT2Config(n_layer=1, n_head=1, d_model=1024, d_ff=4096, n_ctx=8, vocab_size=19000)
    tensors = {name: np.ones(shape, np.float16) for name, shape, _ in tensor_table(config)}
    save_weights(tmp_path / "m.bin", config, tensors)
    started = time.perf_counter()
    load_weights(tmp_path / "m.bin")
    assert time.perf_counter() - started < 0.5  # usually 0.03
