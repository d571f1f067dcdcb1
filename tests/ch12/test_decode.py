"""Chapter 12: decoding, in one block a head and by splits, from one piece and from pages, against NumPy and PyTorch."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch12_flash import decode as decoding
from chapters.ch12_flash import paged

SHAPES = [  # n_head, n_tokens, head_dim
    (1, 1, 32), (3, 2, 64), (2, 31, 32), (1, 33, 128), (3, 127, 64), (2, 200, 128), (1, 1025, 36),
]  # fmt: skip
LENGTHS = [1, 33, 0, 200, 64, 127]
TAIL = 300
TOLERANCE = dict(rtol=0, atol=4e-6)  # a mean of values below 5: some ten roundings of 5 * 2**-24 = 3e-7 each


def with_tail(array, fill):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, fill, np.float32)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def poisoned(shape):
    """Device array of NaN: what a kernel leaves unwritten, or reads unasked, shows."""
    return cuda.to_device(np.full(shape, np.nan, np.float32))


def scale_of(q):
    return np.float32(1 / np.sqrt(q.shape[-1]))


# --- one piece -------------------------------------------------------------------------------------------------------


def decode(q, k, v, n_split, spare=5):
    """Attention on the device, n_split 0: v1. The cache has room for more tokens, all NaN, and 7 lies behind out."""
    n_head, n_tokens, head_dim = k.shape
    room = ((0, 0), (0, spare), (0, 0))
    k, v = (cuda.to_device(np.pad(a, room, constant_values=np.nan)) for a in (k, v))
    _, device_q = with_tail(q, np.nan)
    buffer, out = with_tail(np.full(q.shape, np.nan, np.float32), 7)
    if n_split:
        pairs, sums = map(poisoned, decoding.decode_workspace(n_head, n_split, head_dim))
        decoding.decode_attention(device_q, k, v, pairs, sums, out, n_tokens, scale_of(q))
    else:
        launch = decoding.decode_launch(n_tokens, n_head, head_dim)
        decoding.decode_v1_block_per_head[launch](device_q, k, v, out, n_tokens, head_dim, scale_of(q))
    np.testing.assert_array_equal(buffer.copy_to_host()[q.size :], 7)
    return out.copy_to_host()


def randoms(rng, n_head, n_tokens, head_dim):
    k, v = rng.standard_normal((2, n_head, n_tokens, head_dim), dtype=np.float32)
    return rng.standard_normal((n_head, head_dim), dtype=np.float32), k, v


@pytest.mark.parametrize("n_split", [0, 1, 2, 7, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(rng, shape, n_split):
    q, k, v = randoms(rng, *shape)
    np.testing.assert_allclose(decode(q, k, v, n_split), decoding.decode_reference(q, k, v, scale_of(q)), **TOLERANCE)


@pytest.mark.parametrize("n_split", [0, 3])
def test_decode_against_torch(torch, rng, n_split):
    q, k, v = randoms(rng, 3, 100, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(a).double() for a in (q[:, None], k, v))
    )
    np.testing.assert_allclose(decode(q, k, v, n_split), expected[:, 0].numpy(), **TOLERANCE)


@pytest.mark.parametrize("n_split", [0, 3])
@pytest.mark.parametrize("winner", [0, 31, 70, 99])
def test_large_scores_do_not_overflow(rng, n_split, winner):
    """All scores are some thousands below zero but one, some thousands above: out is that token's value, exactly."""
    q, k, v = randoms(rng, 2, 100, 32)
    q[:], k[:], k[:, winner] = 30, -40 - rng.random((2, 100, 1)), 50
    np.testing.assert_array_equal(decode(q, k, v, n_split), v[:, winner])


@pytest.mark.parametrize("n_split", [0, 5])
def test_equal_scores_give_the_mean(rng, n_split):
    q, k, v = randoms(rng, 1, 64, 32)
    k[:], v = k[:, :1], rng.integers(-8, 9, v.shape).astype(np.float32)
    np.testing.assert_array_equal(decode(q, k, v, n_split), v.mean(axis=1))  # whole numbers, a power of two of them


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    q, k, v = randoms(rng, 2, 33, 36)
    expected = decoding.decode_reference(q, k, v, scale_of(q))
    np.testing.assert_allclose(decode(q, k, v, 3, spare=0), expected, **TOLERANCE)


@pytest.mark.parametrize("n_tokens, n_rows, n_split", [(1, 1, 1), (64, 1, 1), (65, 1, 2), (1 << 20, 12, 86),
                                                       (1 << 20, 1, 128), (1 << 20, 5000, 1)])  # fmt: skip
def test_number_of_splits(n_tokens, n_rows, n_split):
    assert decoding.decode_splits(n_tokens, n_rows) == n_split


@pytest.mark.parametrize(
    "launch, sizes, named",
    [
        (decoding.decode_launch, (0, 1, 64), "at least 1"),
        (decoding.decode_launch, (1, 1, 129), "head_dim = 129"),
        (decoding.decode_split_launch, (1, 0, 64, 1), "at least 1"),
        (decoding.decode_split_launch, (1, 1, 64, 129), "n_split = 129.*decode_splits"),
        (decoding.decode_splits, (0, 1), "at least 1"),
        (decoding.decode_combine_launch, (0,), "n_rows = 0"),
        (paged.paged_launch, (0, 1, 64, 16), "at least 1"),
        (paged.paged_launch, (1, 1, 129, 16), "head_dim = 129"),
        (paged.paged_launch, (1, 1, 64, 6), "block_size = 6"),
        (paged.paged_launch, (65536, 1, 64, 16), "65536 sequences"),
        (paged.paged_split_launch, (1, 1, 64, 16, 0), "n_split = 0"),
        (paged.paged_kv_append_launch, (0, 1, 64), "at least 1"),
    ],
)
def test_launches_refuse(launch, sizes, named):
    with pytest.raises(ValueError, match=named):
        launch(*sizes)


# --- pages -----------------------------------------------------------------------------------------------------------


def tables(rng, lengths, block_size, spare=3):
    """Pages handed out in random order: ``(block_table, number of pages)``; -1 where none is needed."""
    needed = [-(-length // block_size) for length in lengths]
    block_table = np.full((len(lengths), max(needed) + 2), -1, np.int32)
    pages = rng.permutation(sum(needed) + spare).astype(np.int32)
    for row, count in zip(block_table, needed):
        row[:count], pages = pages[:count], pages[count:]
    return block_table, sum(needed) + spare


def filled_caches(rng, lengths, n_head, head_dim, block_size):
    """Caches of NaN into which ``paged_kv_append`` has written tokens: k_cache, v_cache, block_table, [(k, v), …].

    The tokens come in random order, as from many requests, and some are left out (slot -1).
    """
    block_table, num_blocks = tables(rng, lengths, block_size)
    seqs = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    order = rng.permutation(len(seqs))
    slots = paged.paged_slots(block_table, seqs[order], positions[order], block_size)
    k_new, v_new = rng.standard_normal((2, len(seqs) + 2, n_head, head_dim), dtype=np.float32)
    k_cache, v_cache = (poisoned((num_blocks, n_head, block_size, head_dim)) for _ in range(2))
    num_tokens = len(seqs) + 2
    paged.paged_kv_append[paged.paged_kv_append_launch(num_tokens, n_head, head_dim)](
        cuda.to_device(k_new), cuda.to_device(v_new), k_cache, v_cache,
        cuda.to_device(np.concatenate([[-1], slots, [-1]])), num_tokens, n_head, head_dim, block_size,
    )  # fmt: skip
    k, v = np.empty((2, len(seqs), n_head, head_dim), np.float32)
    k[order], v[order] = k_new[1:-1], v_new[1:-1]
    starts = np.cumsum([0, *lengths])
    by_sequence = [(k[a:b].swapaxes(0, 1), v[a:b].swapaxes(0, 1)) for a, b in zip(starts, starts[1:])]
    return k_cache, v_cache, block_table, by_sequence


def paged_attention(q, k_cache, v_cache, block_table, lengths, n_split):
    """Paged attention on the device, n_split 0: v1. 7 lies behind out."""
    num_seqs, n_head, head_dim = q.shape
    block_size = k_cache.shape[2]
    buffer, out = with_tail(np.full(q.shape, np.nan, np.float32), 7)
    inputs = cuda.to_device(q), k_cache, v_cache, cuda.to_device(block_table), cuda.to_device(np.int32(lengths))
    if n_split:
        pairs, sums = map(poisoned, decoding.decode_workspace(num_seqs * n_head, n_split, head_dim))
        paged.paged_attention(*inputs, pairs, sums, out, scale_of(q))
    else:
        launch = paged.paged_launch(num_seqs, n_head, head_dim, block_size)
        paged.paged_v1_block_per_head[launch](*inputs, out, head_dim, block_size, scale_of(q))
    np.testing.assert_array_equal(buffer.copy_to_host()[q.size :], 7)
    return out.copy_to_host()


@pytest.mark.parametrize("block_size", [4, 16, 64, 256])
@pytest.mark.parametrize("n_head, head_dim", [(2, 32), (1, 128), (3, 64)])
def test_paged_attention(rng, block_size, n_head, head_dim):
    k_cache, v_cache, block_table, by_sequence = filled_caches(rng, LENGTHS, n_head, head_dim, block_size)
    q = rng.standard_normal((len(LENGTHS), n_head, head_dim), dtype=np.float32)
    expected = [decoding.decode_reference(one, k, v, scale_of(q)) if k.size else 0 * one
                for one, (k, v) in zip(q, by_sequence)]  # fmt: skip
    for n_split in (0, 1, 3):
        got = paged_attention(q, k_cache, v_cache, block_table, LENGTHS, n_split)
        np.testing.assert_allclose(got, np.stack(expected), **TOLERANCE)
    host = k_cache.copy_to_host(), v_cache.copy_to_host()
    np.testing.assert_array_equal(paged.paged_reference(q, *host, block_table, LENGTHS, scale_of(q)), expected)


@pytest.mark.parametrize("n_split", [0, 3])
def test_pages_in_any_place_give_the_same_bits(rng, n_split):
    """The same groups of tokens meet in the same warps: where they lie changes nothing."""
    k_cache, v_cache, block_table, [(k, v)] = filled_caches(rng, [200], 2, 64, 16)
    q = rng.standard_normal((1, 2, 64), dtype=np.float32)
    got = paged_attention(q, k_cache, v_cache, block_table, [200], n_split)
    order = rng.permutation(len(k_cache))  # page p moves to order[p]
    moved = (cuda.to_device(cache.copy_to_host()[np.argsort(order)]) for cache in (k_cache, v_cache))
    elsewhere = np.where(block_table < 0, -1, order[block_table]).astype(np.int32)
    np.testing.assert_array_equal(paged_attention(q, *moved, elsewhere, [200], n_split), got)
    in_one_piece = decode(q[0], np.ascontiguousarray(k), np.ascontiguousarray(v), 0)
    np.testing.assert_allclose(got[0], in_one_piece, **TOLERANCE)


def test_append_writes_its_slots_and_nothing_else(rng):
    lengths, block_size = [5, 18, 1], 4
    k_cache, v_cache, block_table, by_sequence = filled_caches(rng, lengths, 3, 5, block_size)
    written = 0
    for cache, part in ((k_cache.copy_to_host(), 0), (v_cache.copy_to_host(), 1)):
        for seq, length in enumerate(lengths):
            for token in range(length):
                row = cache[block_table[seq, token // block_size], :, token % block_size]
                np.testing.assert_array_equal(row, by_sequence[seq][part][:, token])
        written += np.isfinite(cache).sum()
    assert written == 2 * sum(lengths) * 3 * 5


def test_no_index_outside_the_pages(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    lengths = [5, 0, 33]
    k_cache, v_cache, block_table, by_sequence = filled_caches(rng, lengths, 2, 36, 4)
    assert (block_table < 0).any()
    q = rng.standard_normal((3, 2, 36), dtype=np.float32)
    got = paged_attention(q, k_cache, v_cache, block_table, lengths, 2)  # v1 reads by the same device function
    np.testing.assert_allclose(got[2], decoding.decode_reference(q[2], *by_sequence[2], scale_of(q)), **TOLERANCE)
    assert (got[1] == 0).all()


def test_slots_of_a_token_without_a_page():
    with pytest.raises(ValueError, match="token 4 of sequence 1 has no page"):
        paged.paged_slots(np.array([[2, 0], [1, -1]]), [0, 1, 1], [7, 3, 4], 4)
