"""Chapter 13: rotary position embedding, both pairings and both versions, against complex numbers in float64."""

import importlib

import numpy as np
import pytest
from numba import cuda

from chapters.ch13_llm_ops import rope as ch13

SHAPES = [(1, 1, 2), (3, 1, 64), (2, 33, 6), (1, 127, 34), (5, 9, 128)]  # n_head, T, head_dim
PAIRINGS = {
    "interleaved": (ch13.rope_interleaved_v1_sincos, ch13.rope_interleaved_v2_table, ch13.rope_interleaved_reference),
    "halves": (ch13.rope_halves_v1_sincos, ch13.rope_halves_v2_table, ch13.rope_halves_reference),
}
every_pairing = pytest.mark.parametrize("pairing", PAIRINGS)
both_versions = pytest.mark.parametrize("version", [1, 2])
TAIL = 40  # elements behind each array


def reference(pairing, x, positions, base=1e4):
    return PAIRINGS[pairing][2](x, positions, base)


def device_tables(n_positions, head_dim, base):
    """The tables on the device, with a row of NaN behind the last position."""
    nan = np.full((1, head_dim // 2), np.nan, np.float32)
    return [cuda.to_device(np.concatenate([t, nan]))[:-1] for t in ch13.rope_tables(n_positions, head_dim, base)]


def rope(pairing, version, x, positions, base=1e4, in_place=False):
    """The kernel's result; NaN lies behind the inputs, and 7 behind the result, which must still be there."""
    n_head, T, head_dim = x.shape
    behind = np.full(TAIL, 7 if in_place else np.nan, np.float32)
    x_buffer = cuda.to_device(np.concatenate([x.ravel(), behind]))
    buffer = x_buffer if in_place else cuda.to_device(np.full(x.size + TAIL, 7, np.float32))
    device_x, out = x_buffer[: x.size].reshape(x.shape), buffer[: x.size].reshape(x.shape)
    device_positions = cuda.to_device(np.asarray(positions, np.int32))
    launch = ch13.rope_launch(n_head, T, head_dim)
    if version == 1:
        PAIRINGS[pairing][0][launch](device_x, device_positions, out, T, head_dim, base)
    else:
        cos, sin = device_tables(int(max(positions)) + 1, head_dim, base)
        PAIRINGS[pairing][1][launch](device_x, device_positions, cos, sin, out, T, head_dim)
    assert (buffer.copy_to_host()[x.size :] == 7).all()
    return out.copy_to_host()


def table_error(x):
    """Bound of version 2: four roundings of 2^-24 (cos, sin, product, sum) on each of two terms."""
    return 4 * 2.0**-24 * 2 * np.abs(x).max()


@every_pairing
@both_versions
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope(rng, pairing, version, shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    positions = rng.integers(0, 30, shape[1])  # in any order, some twice
    # version 1: an angle is off by its size times the error of exp(-y), |y| < 10: some 10 · 2^-24, and a little more
    error = table_error(x) + (30 * 2e-6 if version == 1 else 0)
    np.testing.assert_allclose(
        rope(pairing, version, x, positions), reference(pairing, x, positions), rtol=0, atol=error
    )


@every_pairing
@both_versions
def test_rope_in_place(rng, pairing, version):
    x, positions = rng.standard_normal((2, 7, 48), dtype=np.float32), np.arange(3, 10)
    found = rope(pairing, version, x, positions, in_place=True)
    np.testing.assert_array_equal(found, rope(pairing, version, x, positions))


@every_pairing
def test_far_positions_want_the_table(rng, pairing):
    """At position 100 000 the angles of version 1 are wrong by far more than the table's."""
    x, positions = rng.standard_normal((1, 3, 64), dtype=np.float32), np.array([99_998, 99_999, 100_000])
    expected = reference(pairing, x, positions, 1e4)
    on_the_spot = np.abs(rope(pairing, 1, x, positions) - expected).max()
    from_table = np.abs(rope(pairing, 2, x, positions) - expected).max()
    assert from_table <= table_error(x)
    assert 100 * from_table < on_the_spot <= 100_000 * 2e-6 * np.abs(x).max() * 1.5


@every_pairing
@both_versions
def test_other_base(rng, pairing, version):
    x, positions = rng.standard_normal((2, 20, 16), dtype=np.float32), np.arange(20)
    expected = reference(pairing, x, positions, 5e5)
    np.testing.assert_allclose(rope(pairing, version, x, positions, 5e5), expected, rtol=0, atol=2e-4)
    assert np.abs(expected - reference(pairing, x, positions, 1e4)).max() > 0.1


@every_pairing
@both_versions
def test_position_zero_changes_nothing(rng, pairing, version):
    x = rng.standard_normal((2, 5, 32), dtype=np.float32)
    np.testing.assert_array_equal(rope(pairing, version, x, np.zeros(5, int)), x)


@every_pairing
def test_first_point_turns_by_one_radian_a_position(pairing):
    """A point (1, 0) goes to (cos 1, sin 1), and where the two numbers lie is the pairing."""
    x = np.zeros((1, 1, 8), np.float32)
    x[0, 0, 0] = 1
    expected = np.zeros(8)
    expected[[0, 1 if pairing == "interleaved" else 4]] = np.cos(1), np.sin(1)
    np.testing.assert_allclose(rope(pairing, 2, x, [1])[0, 0], expected, atol=1e-7)


@every_pairing
@both_versions
def test_products_depend_on_the_distance_alone(rng, pairing, version):
    q, k = rng.standard_normal((2, 1, 1, 64), dtype=np.float32)

    def product(at_q, at_k):
        return float((rope(pairing, version, q, [at_q]) * rope(pairing, version, k, [at_k])).sum(dtype=np.float64))

    assert product(3, 1) == pytest.approx(product(250, 248), abs=5e-3)
    assert abs(product(3, 1) - product(3, 2)) > 0.1


@every_pairing
def test_a_token_decoded_alone_is_the_same_as_in_its_text(rng, pairing):
    """The positions of one new token may be a cache's ``pos``."""
    x = rng.standard_normal((3, 17, 32), dtype=np.float32)
    whole = rope(pairing, 2, x, np.arange(17))
    for t in (0, 5, 16):
        np.testing.assert_array_equal(rope(pairing, 2, x[:, t : t + 1].copy(), [t]), whole[:, t : t + 1])


@every_pairing
@both_versions
def test_nan_stays_in_its_pair(pairing, version):
    x = np.ones((1, 2, 8), np.float32)
    x[0, 1, 0] = np.nan
    found = np.isnan(rope(pairing, version, x, [4, 5]))
    assert np.flatnonzero(found).tolist() == ([8, 9] if pairing == "interleaved" else [8, 12])


@every_pairing
@both_versions
def test_no_index_outside_the_arrays(rng, monkeypatch, pairing, version):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x, positions = rng.standard_normal((2, 9, 6), dtype=np.float32), np.arange(9)
    found = rope(pairing, version, x, positions)
    np.testing.assert_allclose(found, reference(pairing, x, positions), rtol=0, atol=1e-4)


def test_halves_agree_with_llama_of_transformers(torch, transformers, rng):
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=128, num_attention_heads=2, max_position_embeddings=64)
    q, k = rng.standard_normal((2, 2, 21, 64), dtype=np.float32)
    positions = np.arange(40, 61)
    cos, sin = llama.LlamaRotaryEmbedding(config)(torch.tensor(q), torch.tensor(positions)[None])
    theirs = llama.apply_rotary_pos_emb(torch.tensor(q)[None], torch.tensor(k)[None], cos, sin)
    for x, expected in zip((q, k), theirs, strict=True):
        # theirs computes angles in float32, as version 1 does
        np.testing.assert_allclose(rope("halves", 2, x, positions), expected[0].numpy(), rtol=0, atol=60 * 2e-6 * 5)


# --- tables and launches ---------------------------------------------------------------------------------------------


def test_tables_are_rounded_once():
    cos, sin = ch13.rope_tables(1000, 64)
    assert cos.shape == sin.shape == (1000, 32) and cos.dtype == sin.dtype == np.float32
    angle = 999 * 1e4 ** (-2 * 7 / 64)
    assert cos[999, 7] == np.float32(np.cos(angle)) and sin[999, 7] == np.float32(np.sin(angle))
    assert (cos[0] == 1).all() and (sin[0] == 0).all()
    np.testing.assert_allclose(cos.astype(np.float64) ** 2 + sin.astype(np.float64) ** 2, 1, atol=2.0**-23)


@pytest.mark.parametrize("head_dim", [0, -2, 7])
def test_odd_head_dim_is_refused(head_dim):
    for call in (lambda: ch13.rope_launch(1, 1, head_dim), lambda: ch13.rope_tables(5, head_dim)):
        with pytest.raises(ValueError, match=f"^head_dim = {head_dim}: .*must be even and at least 2"):
            call()


def test_launch_refuses_empty():
    with pytest.raises(ValueError, match="at least 1"):
        ch13.rope_launch(0, 5, 64)
    with pytest.raises(ValueError, match="at least 1"):
        ch13.rope_launch(2, 0, 64)
    with pytest.raises(ValueError, match="n_positions = 0"):
        ch13.rope_tables(0, 64)
