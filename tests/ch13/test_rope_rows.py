"""Chapter 13: heads cut out of rows and turned on the way, into pages and into a text's arrays."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch12_flash.paged import paged_slots
from chapters.ch13_llm_ops import batch, rope_rows
from chapters.ch13_llm_ops.rope import rope_tables


@pytest.mark.parametrize("n_head, n_kv_head, head_dim", [(2, 2, 24), (6, 2, 10), (9, 3, 64), (4, 1, 2)])
def test_heads_are_turned_and_go_to_their_places(rng, n_head, n_kv_head, head_dim):
    n_rows, block_size, n_pages, base = 7, 4, 9, 1e5
    table = 1 + rng.permutation(n_pages - 1).reshape(2, 4).astype(np.int32)
    row_seq, positions = np.array([0, 0, 0, 1, 1, 0, 1], np.int32), np.array([3, 4, 5, 0, 1, 11, 15], np.int32)
    slots = paged_slots(table, row_seq, positions, block_size).astype(np.int32)
    slots[4] = positions[4] = -1  # padding
    qkv = rng.standard_normal((n_rows, (n_head + 2 * n_kv_head) * head_dim), dtype=np.float32)
    k, v = np.full((2, n_pages, n_kv_head, block_size, head_dim), np.nan, np.float32)
    q = cuda.to_device(np.full((n_rows + 1, n_head * head_dim), 7, np.float32))
    device_k, device_v = (cuda.to_device(cache.ravel()) for cache in (k, v))
    tables = map(cuda.to_device, rope_tables(16, head_dim, base))
    rope_rows.split_qkv_rope_pages[rope_rows.split_qkv_rope_launch(n_rows, n_head, n_kv_head, head_dim)](
        cuda.to_device(qkv), q, device_k, device_v, cuda.to_device(slots), cuda.to_device(positions), *tables, n_rows,
        n_head, n_kv_head, head_dim, block_size,
    )  # fmt: skip
    expected = rope_rows.split_qkv_rope_pages_reference(qkv, k, v, slots, positions, n_head, base)
    np.testing.assert_allclose(q.copy_to_host()[:-1], expected, atol=2e-6)
    np.testing.assert_array_equal(q.copy_to_host()[-1], 7)
    np.testing.assert_allclose(device_k.copy_to_host(), k.ravel(), atol=2e-6)
    np.testing.assert_array_equal(device_v.copy_to_host(), v.ravel())


@pytest.mark.parametrize("n_head, n_source", [(1, 1), (6, 6), (6, 2), (4, 1)])
def test_each_source_head_serves_its_group(rng, n_head, n_source):
    x = rng.standard_normal((5, n_source * 33), dtype=np.float32)
    out = cuda.to_device(np.full((n_head, 5, 33), np.nan, np.float32))
    rope_rows.split_heads[rope_rows.split_heads_launch(5, n_head, 33)](cuda.to_device(x), out, 5, n_head, n_source, 33)
    np.testing.assert_array_equal(out.copy_to_host(), rope_rows.split_heads_reference(x, n_head, n_source))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n_rows, d_model", [(1, 1), (33, 31)])
def test_tokens_without_positions(rng, n_rows, d_model, dtype):
    tokens, source, chosen = (rng.integers(low, 40, n_rows).astype(np.int32) for low in (0, -40, -1))
    source = np.minimum(source, n_rows - 1)
    wte = rng.standard_normal((50, d_model)).astype(dtype)
    out = cuda.to_device(np.full((n_rows + 1, d_model), 7, np.float32))
    inputs = map(cuda.to_device, (tokens, source, chosen, wte))
    batch.embed_tokens[blocks_2d(n_rows, d_model)](*inputs, out, n_rows, d_model)
    zeros = np.zeros((1, d_model), dtype)
    expected = batch.embed_rows_reference(tokens, source, chosen, np.zeros(n_rows, np.int32), wte, zeros)
    np.testing.assert_array_equal(out.copy_to_host()[:-1], expected)
    np.testing.assert_array_equal(out.copy_to_host()[-1], 7)


def test_launches_refuse():
    for sizes, named in ((1, 3, 2, 64), "3 heads cannot share 2"), ((1, 2, 2, 5), "head_dim = 5"), ((0, 2, 2, 4), "0"):
        with pytest.raises(ValueError, match=named):
            rope_rows.split_qkv_rope_launch(*sizes)
    with pytest.raises(ValueError, match="0"):
        rope_rows.split_heads_launch(0, 1, 4)
