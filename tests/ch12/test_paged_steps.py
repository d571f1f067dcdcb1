"""Chapter 12, steps of many sequences by segments: against NumPy, and a row against itself in company."""

import numpy as np
import pytest
from numba import cuda
from test_paged_half import Rows
from test_ragged import scale_of

from chapters.ch12_flash import paged_steps

LENGTHS = [1, 5, 300, 64, 17, 256, 257, 530]  # with heads of 64: of one segment, of two, of three
HEADS = [(2, 2, 32), (6, 2, 64), (3, 1, 128), (4, 1, 8)]


class Steps(Rows):
    """Rows of which each is the only one of its sequence."""

    def __init__(self, rng, n_head, n_kv_head, head_dim, block_size=16, lengths=LENGTHS):
        super().__init__(rng, n_head, n_kv_head, head_dim, block_size, lengths, [1] * len(lengths))

    def by_segments(self, n_steps=None, spare=200):
        """What ``paged_v6_segments`` makes of them; NaN where it writes nothing."""
        n_rows, n_head, head_dim = self.q.shape
        sizes = n_rows, self.longest + spare, n_head, head_dim
        launch = paged_steps.segments_launch(*sizes, self.block_size)
        n_pairs, n_sums, n_arrived = paged_steps.segments_workspace(*sizes)
        work = [cuda.to_device(np.full(n, np.nan, np.float32)) for n in (n_pairs, n_sums)]
        arrived = cuda.to_device(np.zeros(n_arrived, np.int32))
        steps = np.array([n_rows if n_steps is None else n_steps], np.int32)
        inputs = self.q.ravel(), self.k.ravel(), self.v.ravel(), self.block_table, self.row_seq, self.positions, steps
        out = cuda.to_device(np.full(self.q.size + 8, np.nan, np.float16))
        for _ in range(2):  # the second launch finds what the first has left
            paged_steps.paged_v6_segments[launch](
                *map(cuda.to_device, inputs), out, *work, arrived, self.n_kv_head, head_dim, self.block_size,
                scale_of(head_dim),
            )  # fmt: skip
        assert not arrived.copy_to_host().any()
        found = out.copy_to_host()
        assert np.isnan(found[self.q.size :]).all()
        return found[: self.q.size].reshape(self.q.shape)


@pytest.mark.parametrize("block_size", [4, 16, 256])
@pytest.mark.parametrize("n_head, n_kv_head, head_dim", HEADS)
def test_each_row_is_attention_over_its_own_sequence(rng, block_size, n_head, n_kv_head, head_dim):
    rows = Steps(rng, n_head, n_kv_head, head_dim, block_size)
    np.testing.assert_allclose(rows.by_segments(), rows.expected(), rtol=2e-3, atol=2e-3)


def test_a_row_has_the_same_bits_alone_and_in_any_batch(rng):
    rows = Steps(rng, 6, 2, 64)
    together = rows.by_segments()
    for row in range(len(LENGTHS)):
        alone = rows.only(slice(row, row + 1))
        np.testing.assert_array_equal(alone.by_segments(spare=0)[0], together[row])


def test_rows_behind_the_steps_and_padding_are_left_alone(rng):
    rows = Steps(rng, 2, 2, 32, lengths=[3, 40, 17, 9])
    together = rows.by_segments()
    assert np.isnan(rows.by_segments(n_steps=2)[2:]).all()
    np.testing.assert_array_equal(rows.by_segments(n_steps=2)[:2], together[:2])
    rows.positions[1] = -1
    found = rows.by_segments()
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2, 3]], together[[0, 2, 3]])


def test_large_scores_do_not_overflow(rng):
    rows = Steps(rng, 2, 1, 64, lengths=[300, 40])
    rows.q *= np.float16(40)
    np.testing.assert_allclose(rows.by_segments(), rows.expected(), rtol=4e-3, atol=4e-3)


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")
    rows = Steps(rng, 2, 1, 64, lengths=[300, 40])
    np.testing.assert_allclose(rows.by_segments(spare=0), rows.expected(), rtol=2e-3, atol=2e-3)


def test_launches_refuse():
    for sizes, error in (
        ((0, 8, 1, 64, 16), "0 rows"), ((1, 0, 1, 64, 16), "0 tokens"), ((1, 8, 1, 256, 16), "head_dim = 256"),
        ((1, 8, 1, 24, 16), "head_dim = 24"), ((1, 8, 1, 64, 12), "block_size = 12"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            paged_steps.segments_launch(*sizes)
