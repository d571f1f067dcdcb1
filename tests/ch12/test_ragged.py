"""Chapter 12: rows of several sequences over pages, prompts and single steps in one launch."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch12_flash import ragged
from chapters.ch12_flash.paged import paged_slots

TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
LENGTHS = [1, 5, 33, 64, 17]  # tokens of each sequence, those that are new included
NEW = [1, 5, 3, 1, 17]  # of them, the new ones: steps, whole prompts, the end of a prompt
RUNGS = {  # kernel: its launch for n_rows, n_head, n_kv_head, head_dim, block_size
    ragged.paged_v3_rows: lambda n, heads, _, *sizes: ragged.paged_rows_launch(n, heads, *sizes),
    ragged.paged_v7_key_per_lane: lambda n, heads, _, *sizes: ragged.paged_lanes_launch(n, heads, *sizes),
    ragged.paged_v8_query_per_lane: ragged.paged_tiles_launch,
}
every_rung = pytest.mark.parametrize("kernel", RUNGS, ids=lambda kernel: kernel.py_func.__name__)


def scale_of(head_dim):
    return np.float32(head_dim**-0.5)


def layout(rng, block_size, lengths=LENGTHS, new=NEW):
    """``(block_table, pages, row_seq, positions)``: pages 1 and up in random order, rows one sequence after another."""
    needed = [-(-length // block_size) for length in lengths]
    block_table = np.full((len(lengths), max(needed) + 1), -1, np.int32)
    pages = 1 + rng.permutation(sum(needed)).astype(np.int32)
    for line, count in zip(block_table, needed):
        line[:count], pages = pages[:count], pages[count:]
    row_seq = np.repeat(np.arange(len(lengths)), new).astype(np.int32)
    positions = np.concatenate([np.arange(n - k, n) for n, k in zip(lengths, new)]).astype(np.int32)
    return block_table, sum(needed) + 1, row_seq, positions


def caches(rng, block_table, n_pages, n_kv_head, block_size, head_dim, lengths=LENGTHS):
    """Pages of NaN with random numbers where a token is."""
    k, v = np.full((2, n_pages, n_kv_head, block_size, head_dim), np.nan, np.float32)
    for line, length in zip(block_table, lengths):
        for position in range(length):
            page, place = line[position // block_size], position % block_size
            k[page, :, place], v[page, :, place] = rng.standard_normal((2, n_kv_head, head_dim))
    return k, v


def case(rng, n_head, n_kv_head, head_dim, block_size=16, lengths=LENGTHS, new=NEW):
    """What `attend` takes behind the kernel: random queries of a `layout`, its `caches`, and where each row stands."""
    block_table, n_pages, row_seq, positions = layout(rng, block_size, lengths, new)
    k, v = caches(rng, block_table, n_pages, n_kv_head, block_size, head_dim, lengths)
    q = rng.standard_normal((len(row_seq), n_head, head_dim), dtype=np.float32)
    return q, k, v, block_table, row_seq, positions


def attend(kernel, q, k, v, block_table, row_seq, positions):
    """What the kernel writes; 7 lies behind it."""
    n_rows, n_head, head_dim = q.shape
    _, n_kv_head, block_size, _ = k.shape
    buffer = cuda.to_device(np.concatenate([np.full(q.size, np.nan, np.float32), np.full(40, 7, np.float32)]))
    inputs = map(cuda.to_device, (q, k, v, block_table, row_seq, positions))
    kernel[RUNGS[kernel](n_rows, n_head, n_kv_head, head_dim, block_size)](
        *inputs, buffer[: q.size].reshape(q.shape), n_kv_head, head_dim, block_size, scale_of(head_dim)
    )
    got = buffer.copy_to_host()
    np.testing.assert_array_equal(got[q.size :], 7)
    return got[: q.size].reshape(q.shape)


@every_rung
@pytest.mark.parametrize("block_size", [4, 16, 64])
@pytest.mark.parametrize("n_head, n_kv_head, head_dim", [(2, 2, 32), (1, 1, 128), (6, 2, 24), (3, 1, 64)])
def test_each_row_asks_its_own_sequence_up_to_its_position(rng, kernel, block_size, n_head, n_kv_head, head_dim):
    inputs = case(rng, n_head, n_kv_head, head_dim, block_size)
    expected = ragged.paged_rows_reference(*inputs, scale_of(head_dim))
    np.testing.assert_allclose(attend(kernel, *inputs), expected, **TOLERANCE)


@every_rung
def test_a_row_has_the_same_bits_alone_and_in_any_batch(rng, kernel):
    q, k, v, block_table, row_seq, positions = case(rng, 2, 2, 32)
    together = attend(kernel, q, k, v, block_table, row_seq, positions)
    for row in (0, 3, 7, 12, 26):
        one, seq = slice(row, row + 1), row_seq[row]
        alone = attend(kernel, q[one], k, v, block_table[seq : seq + 1], np.zeros(1, np.int32), positions[one])
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("n_head, n_kv_head, head_dim", [(2, 2, 32), (6, 2, 24), (32, 1, 32)])
def test_queries_that_share_a_key_have_the_bits_of_those_that_do_not(rng, n_head, n_kv_head, head_dim):
    """Rows of one sequence or of five in a block, more keys than a warp has lanes, and every length of the last 32."""
    lengths, new = [1, 5, 70, 64, 17, 97], [1, 5, 36, 1, 17, 40]
    inputs = case(rng, n_head, n_kv_head, head_dim, lengths=lengths, new=new)
    one, other = (
        attend(kernel, *inputs) for kernel in (ragged.paged_v7_key_per_lane, ragged.paged_v8_query_per_lane)
    )
    np.testing.assert_array_equal(one, other)


@every_rung
def test_what_is_no_number_in_a_sequence_stays_there(rng, kernel):
    q, k, v, block_table, row_seq, positions = case(rng, 2, 2, 32)
    before = attend(kernel, q, k, v, block_table, row_seq, positions)
    k[block_table[1, 0]], v[block_table[4, 0]] = np.inf, np.nan
    after = attend(kernel, q, k, v, block_table, row_seq, positions)
    hit = np.isin(row_seq, (1, 4))
    assert not np.isfinite(after[hit]).all(axis=2).any()
    np.testing.assert_array_equal(after[~hit], before[~hit])


@every_rung
def test_padding_and_infinite_scores(rng, kernel):
    """A row at position -1 sees nothing and is 0; of a score of infinity or NaN the row is NaN, and no other is."""
    q, k, v, block_table, row_seq, positions = case(rng, 2, 2, 32)
    before = attend(kernel, q, k, v, block_table, row_seq, positions)
    q[3], q[5, 1], positions[7] = np.nan, np.inf, -1
    after = attend(kernel, q, k, v, block_table, row_seq, positions)
    assert np.isnan(after[3]).all() and np.isnan(after[5, 1]).all() and not after[7].any()
    others = [row for row in range(len(q)) if row not in (3, 5, 7)]
    np.testing.assert_array_equal(after[others], before[others])
    np.testing.assert_array_equal(after[5, 0], before[5, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n_head, n_kv_head, head_dim", [(2, 2, 24), (6, 2, 5)])
def test_keys_and_values_go_to_their_places_and_nowhere_else(rng, n_head, n_kv_head, head_dim, dtype):
    block_size = 4
    block_table, n_pages, row_seq, positions = layout(rng, block_size)
    n_rows = len(row_seq)
    slots = paged_slots(block_table, row_seq, positions, block_size).astype(np.int32)
    slots[4] = -1  # padding
    qkv = rng.standard_normal((n_rows, (n_head + 2 * n_kv_head) * head_dim)).astype(dtype)
    k, v = np.full((2, n_pages, n_kv_head, block_size, head_dim), np.nan, dtype)
    q = cuda.device_array((n_rows, n_head * head_dim), dtype)
    device_k, device_v = (cuda.to_device(cache.ravel()) for cache in (k, v))
    launch = ragged.split_qkv_pages_launch(n_rows, n_head, n_kv_head, head_dim)
    ragged.split_qkv_pages[launch](
        cuda.to_device(qkv), q, device_k, device_v, cuda.to_device(slots), n_rows, n_head, n_kv_head, head_dim,
        block_size,
    )  # fmt: skip
    expected = ragged.split_qkv_pages_reference(qkv, k, v, slots, n_head)
    for got, wanted in ((q, expected), (device_k, k.ravel()), (device_v, v.ravel())):
        np.testing.assert_array_equal(got.copy_to_host(), wanted)


@pytest.mark.parametrize(
    "launch, sizes, named",
    [
        (ragged.paged_rows_launch, (0, 1, 64, 16), "at least 1"),
        (ragged.paged_rows_launch, (1, 1, 129, 16), "head_dim = 129"),
        (ragged.paged_lanes_launch, (0, 1, 64, 16), "at least 1"),
        (ragged.paged_tiles_launch, (1, 33, 1, 64, 16), "at most 32"),
        (ragged.paged_tiles_launch, (1, 3, 2, 64, 16), "3 heads that read 2"),
        (ragged.paged_rows_launch, (65536, 1, 64, 16), "65536 rows"),
        (ragged.paged_rows_launch, (1, 1, 64, 6), "block_size = 6"),
        (ragged.split_qkv_pages_launch, (1, 3, 2, 64), "3 heads cannot share 2"),
        (ragged.split_qkv_pages_launch, (0, 2, 2, 64), "0"),
    ],
)
def test_launches_refuse(launch, sizes, named):
    with pytest.raises(ValueError, match=named):
        launch(*sizes)
