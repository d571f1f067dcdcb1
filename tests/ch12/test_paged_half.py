"""Chapter 12: attention over pages in float16, by chunks and by tiles, against NumPy and against itself in company."""

import numpy as np
import pytest
from numba import cuda
from test_ragged import caches, layout, scale_of

from chapters.ch12_flash import decode_half as decoding
from chapters.ch12_flash import paged_half

TAIL = 40
LENGTHS = [1, 5, 131, 64, 17]
NEW = [1, 5, 3, 1, 17]
HEADS = [(2, 2, 32), (6, 2, 64), (4, 1, 8), (3, 1, 128)]
TILES = [(64, 2, 2, 32), (64, 6, 2, 64), (128, 3, 1, 128), (64, 2, 1, 24)]


class Rows:
    """Rows of several sequences, with keys and values in pages; the others are NaN."""

    def __init__(self, rng, n_head, n_kv_head, head_dim, block_size=16, lengths=LENGTHS, new=NEW):
        self.block_size, self.n_kv_head = block_size, n_kv_head
        self.starts, self.counts = np.subtract(lengths, new), new
        self.block_table, n_pages, self.row_seq, self.positions = layout(rng, block_size, lengths, new)
        k, v = caches(rng, self.block_table, n_pages, n_kv_head, block_size, head_dim, lengths)
        self.k, self.v = k.astype(np.float16), v.astype(np.float16)
        self.q = rng.standard_normal((len(self.row_seq), n_head, head_dim)).astype(np.float16)
        self.longest = max(lengths)

    def expected(self):
        inputs = self.k, self.v, self.block_table, self.row_seq, self.positions
        return paged_half.paged_half_reference(self.q, *inputs, scale_of(self.q.shape[2]))

    def only(self, rows):
        """The same with some of the rows."""
        one = object.__new__(type(self))
        one.__dict__.update(self.__dict__)
        one.q, one.row_seq, one.positions = self.q[rows], self.row_seq[rows], self.positions[rows]
        return one

    def by_parts(self, single=0, spare=200):
        """What ``paged_v4_parts`` and ``combine_parts`` make of them; NaN for padding."""
        n_rows, n_head, head_dim = self.q.shape
        sizes = n_rows, self.longest + spare, n_head, head_dim
        launch = paged_half.paged_parts_launch(*sizes, self.block_size)
        lengths = paged_half.paged_parts_workspace(*sizes)
        parts, lse = (cuda.to_device(np.full(n, np.nan, t)) for n, t in zip(lengths, (np.float16, np.float32)))
        flat = self.q.ravel(), self.k.ravel(), self.v.ravel()
        inputs = map(cuda.to_device, (*flat, self.block_table, self.row_seq, self.positions))
        paged_half.paged_v4_parts[launch](
            *inputs, parts, lse, self.n_kv_head, head_dim, self.block_size, scale_of(head_dim), single
        )
        (n_chunks, _, _), width = launch[0], n_head * head_dim
        for row in np.flatnonzero(self.positions < 0):
            assert np.isnan(parts[row * n_chunks * width : (row + 1) * n_chunks * width].copy_to_host()).all()
        out = cuda.to_device(np.full(self.q.size + TAIL, 7, np.float16))
        sizes = n_head, head_dim, n_chunks, decoding.lse_stride_of(n_chunks)
        launch = paged_half.combine_parts_launch(n_rows, n_head, head_dim)
        paged_half.combine_parts[launch](parts, lse, cuda.to_device(self.positions), out, *sizes)
        assert (out[self.q.size :].copy_to_host() == 7).all()
        return out[: self.q.size].copy_to_host().reshape(self.q.shape)

    def by_tiles(self, starts=None, counts=None, more=0, keys=None, n_steps=0):
        """What ``flash_v5_pages`` makes of them; more: tiles of nothing. keys: of a segment, then put together by
        ``combine_segments``, which lets the first ``n_steps`` rows alone."""
        n_rows, n_head, head_dim = self.q.shape
        tiles = paged_half.query_tiles(
            self.starts if starts is None else starts, self.counts if counts is None else counts, head_dim, keys
        )
        n_parts = tiles[:, 6].max() + 1
        tiles = np.concatenate([tiles, np.zeros((more, 7), np.int32)])
        parts = cuda.to_device(np.full((n_parts, n_rows, n_head * head_dim), np.nan, np.float16))
        lse = cuda.to_device(np.full((n_parts, n_head, n_rows), np.nan, np.float32))
        inputs = map(cuda.to_device, (self.q, self.k.ravel(), self.v.ravel(), self.block_table, tiles))
        paged_half.flash_v5_pages(head_dim)[
            paged_half.flash_v5_launch(len(tiles), n_head, head_dim, self.block_size)
        ](*inputs, parts, lse, self.n_kv_head, self.block_size, scale_of(head_dim))
        if keys is None:
            assert np.isfinite(lse.copy_to_host()).all()
            return parts.copy_to_host().reshape(self.q.shape)
        out = cuda.to_device(np.full((n_rows, n_head * head_dim), np.nan, np.float16))
        launch = paged_half.combine_segments_launch(n_rows, n_head, head_dim)
        where = map(cuda.to_device, (self.positions, np.array([n_steps], np.int32)))
        paged_half.combine_segments[launch](parts, lse, *where, out, head_dim, keys)
        return out.copy_to_host().reshape(self.q.shape)


@pytest.mark.parametrize("block_size", [4, 16, 256])
@pytest.mark.parametrize("n_head, n_kv_head, head_dim", HEADS)
def test_parts_of_each_row_are_attention_over_its_own_sequence(rng, block_size, n_head, n_kv_head, head_dim):
    rows = Rows(rng, n_head, n_kv_head, head_dim, block_size)
    np.testing.assert_allclose(rows.by_parts(), rows.expected(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("block_size", [4, 16, 256])
@pytest.mark.parametrize("version, n_head, n_kv_head, head_dim", TILES)
def test_tiles_of_queries_are_attention_over_their_own_sequences(
    rng, block_size, version, n_head, n_kv_head, head_dim
):  # fmt: skip
    assert paged_half.flash_v5_pages(head_dim) is getattr(paged_half, f"flash_v5_pages_{version}")
    rows = Rows(rng, n_head, n_kv_head, head_dim, block_size)
    np.testing.assert_allclose(rows.by_tiles(), rows.expected(), rtol=2e-3, atol=2e-3)


def test_a_long_prompt_takes_several_tiles_and_chunks(rng):
    rows = Rows(rng, 1, 1, 64, lengths=[300, 7], new=[270, 7])
    expected = rows.expected()
    np.testing.assert_allclose(rows.by_tiles(more=3), expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(rows.by_parts(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("keys", [192, 384])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_tiles_with_many_keys_are_divided_among_segments(rng, head_dim, keys):
    """Rows that see one segment, two and three, in tiles that lie across their ends; one that decodes is let alone."""
    rows = Rows(rng, 2, 1, head_dim, lengths=[3, 530, 191, 192, 193], new=[1, 400, 191, 20, 2])
    found, expected = rows.by_tiles(keys=keys, n_steps=1, more=2), rows.expected()
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1:], expected[1:], rtol=2e-3, atol=2e-3)
    padded = rows.only(slice(0, len(rows.q)))
    padded.positions = np.where(np.arange(len(rows.q)) == 7, -1, rows.positions).astype(np.int32)
    assert np.isnan(padded.by_tiles(keys=keys)[7]).all()
    later = rows.only(slice(1 + 257, 1 + 400))  # the same rows in other tiles: the last chunk of the prompt
    alone = later.by_tiles([0, 530 - 143], [0, 143], keys=keys)
    np.testing.assert_array_equal(alone, found[1 + 257 : 1 + 400])


def test_segments_are_few_and_no_tile_lies_across_two():
    assert [paged_half.segment_keys(n) for n in (1, 1024, 6144, 6145, 8192, 100_000)] == [384, 384, 384, 768, 768, 6528]
    tiles = paged_half.query_tiles([0, 700], [300, 129], 64, 384)
    assert sorted(map(tuple, tiles[:, [0, 4, 5, 6]].tolist())) == [
        (0, 0, 128, 0), (128, 0, 256, 0), (256, 0, 300, 0), (300, 0, 384, 0), (300, 384, 768, 1), (300, 768, 828, 2),
        (428, 0, 384, 0), (428, 384, 768, 1), (428, 768, 829, 2),
    ]  # fmt: skip


def test_a_row_has_the_same_bits_alone_and_in_any_batch(rng):
    rows = Rows(rng, 6, 2, 64)
    parts, tiles = rows.by_parts(), rows.by_tiles()
    for row in (0, 3, 7, 12, 26):
        one, seq = rows.only(slice(row, row + 1)), rows.row_seq[row]
        np.testing.assert_array_equal(one.by_parts()[0], parts[row])
        starts = [rows.positions[row] if s == seq else 0 for s in range(len(LENGTHS))]
        alone = one.by_tiles(starts, [int(s == seq) for s in range(len(LENGTHS))])
        np.testing.assert_array_equal(alone[0], tiles[row])


def test_steps_need_not_wait_for_their_earlier_tokens(rng):
    rows = Rows(rng, 2, 2, 32, lengths=[1, 40, 17], new=[1, 1, 1])
    np.testing.assert_array_equal(rows.by_parts(single=1), rows.by_parts(single=0))


def test_padding_writes_nothing_and_changes_nothing(rng):
    rows = Rows(rng, 2, 2, 32, lengths=[3, 40], new=[1, 1])
    expected = rows.by_parts()
    rows.q = np.concatenate([rows.q, rows.q])
    rows.row_seq = np.concatenate([rows.row_seq, np.zeros(2, np.int32)])
    rows.positions = np.concatenate([rows.positions, np.full(2, -1, np.int32)])
    np.testing.assert_array_equal(rows.by_parts()[:2], expected)


def test_tiles_cover_all_rows_once_and_the_long_ones_come_first():
    tiles = paged_half.query_tiles([0, 700, 5], [300, 1, 128], 64)
    rows = np.concatenate([np.arange(row, row + count) for row, count, *_ in tiles])
    np.testing.assert_array_equal(np.sort(rows), np.arange(429))
    assert tiles[0].tolist() == [300, 1, 1, 700, 0, 701, 0]
    assert (np.diff(tiles[:, 5]) <= 0).all() and not tiles[:, [4, 6]].any()
    assert paged_half.query_tiles([], [], 64).shape == (0, 7)


@pytest.mark.parametrize("call", [
    lambda: paged_half.paged_parts_launch(1, 10, 1, 64, 12),
    lambda: paged_half.paged_parts_launch(0, 10, 1, 64, 16),
    lambda: paged_half.combine_parts_launch(0, 1, 64),
    lambda: paged_half.combine_parts_launch(1, 1, 24),
    lambda: paged_half.combine_segments_launch(0, 1, 64),
    lambda: paged_half.combine_segments_launch(1, 1, 12),
    lambda: paged_half.paged_parts_launch(1, 10, 1, 24, 16),
    lambda: paged_half.flash_v5_launch(0, 1, 64, 16),
    lambda: paged_half.flash_v5_launch(1, 1, 60, 16),
    lambda: paged_half.flash_v5_launch(1, 1, 64, 512),
])  # fmt: skip
def test_sizes_that_the_kernels_do_not_take_are_refused(call):
    with pytest.raises(ValueError, match="must be|takes|multiple|lanes"):
        call()
