"""What ``make bench CH=12`` measures: causal attention of whole texts, of one new token, and of many sequences' tokens.

Sizes are (heads, tokens, head_dim), for pages (sequences, tokens of the longest): 12 heads of 64 each, GPT-2's.
"""

import math

import numpy as np

from chapters.ch11_attention import kernels as ch11
from chapters.ch12_flash import decode as decoding
from chapters.ch12_flash import decode_half, paged, tensor_core
from chapters.ch12_flash import kernels as ch12
from common.bench import Ladder

MATRIX_BYTES = 1 << 30  # scores above this are left out: chapter 11's attention stands beside the others where it can
SPLITS = (8, 32)  # numbers of splits measured beside the one that decode_splits chooses
N_HEAD, HEAD_DIM = 12, 64  # of the sequences in pages
PAGES = (256, 64, 16, 4)  # tokens of a page


def _normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def _scale(head_dim):
    return np.float32(1 / math.sqrt(head_dim))


# --- whole texts -----------------------------------------------------------------------------------------------------


def _matrix_fits(size):
    n_head, n_tokens, _ = size
    return ch11.attention_scores_bytes(n_head, n_tokens) <= MATRIX_BYTES


def _texts(rng, size):
    n_head, n_tokens, head_dim = size
    arrays = {name: _normal(rng, *size) for name in "qkv"}
    if _matrix_fits(size):
        arrays["scores"] = np.zeros((n_head, n_tokens, n_tokens), np.float32)
    arrays["lse"] = np.zeros((n_head, n_tokens), np.float32)
    arrays["out"] = np.zeros((n_tokens, n_head * head_dim), np.float32)
    return {**arrays, "n_head": n_head, "n_tokens": n_tokens, "head_dim": head_dim, "scale": _scale(head_dim)}


def _flash(kernel, launch):
    return lambda a: kernel[launch(a.n_tokens, a.n_head, a.head_dim)](
        a.q, a.k, a.v, a.out, a.lse, a.n_tokens, a.head_dim, a.scale, 1
    )


def _flash_expected(a):
    heads = range(a.n_head)  # one by one: all matrices of scores together may not fit
    return np.concatenate(
        [ch12.flash_reference(*(x[h : h + 1] for x in (a.q, a.k, a.v)), a.scale, True)[0] for h in heads], axis=1
    )


def _numpy_attention(a):
    """A head at a time, so that the scores in use are those of one head."""
    later = np.triu(np.full((a.n_tokens, a.n_tokens), -np.inf, np.float32), 1)
    out = a.out.reshape(a.n_tokens, a.n_head, a.head_dim)
    for head in range(a.n_head):
        q, k, v = (x[head].astype(np.float32, copy=False) for x in (a.q, a.k, a.v))  # NumPy is slow in float16
        probs = q @ k.T
        probs *= a.scale
        probs += later
        probs -= probs.max(1, keepdims=True)
        np.exp(probs, out=probs)
        probs /= probs.sum(1, keepdims=True)
        out[:, head] = probs @ v


def _torch_attention(a):
    import torch

    # [None]: its fused kernels want a dimension for the batch
    out = torch.nn.functional.scaled_dot_product_attention(a.q[None], a.k[None], a.v[None], is_causal=True)
    a.out = out[0].transpose(0, 1).reshape(a.out.shape)


def _attention_flops(size):
    """Of both products, for the pairs of tokens that count: (t + 1) of them for token t."""
    n_head, n_tokens, head_dim = size
    return 2 * n_head * head_dim * n_tokens * (n_tokens + 1)


# --- whole texts, in float16 -----------------------------------------------------------------------------------------


def _half_texts(rng, size):
    n_head, n_tokens, head_dim = size
    arrays = {name: _normal(rng, *size).astype(np.float16) for name in "qkv"}
    arrays["lse"] = np.zeros((n_head, n_tokens), np.float32)
    arrays["out"] = np.zeros((n_tokens, n_head, head_dim), np.float16)
    return {**arrays, "n_head": n_head, "n_tokens": n_tokens, "head_dim": head_dim, "scale": _scale(head_dim)}


def _flash_half(a):
    out = a.out.reshape(a.n_tokens, a.n_head * a.head_dim)
    tensor_core.flash_half(a.q, a.k, a.v, out, a.lse, a.n_tokens, a.scale, 1)


def _half_expected(a):
    heads = (slice(h, h + 1) for h in range(a.n_head))
    outs = [tensor_core.flash_half_reference(a.q[h], a.k[h], a.v[h], a.scale, True)[0] for h in heads]
    return np.stack(outs, axis=1)


def _torch_half(a):
    import torch

    out = torch.nn.functional.scaled_dot_product_attention(a.q[None], a.k[None], a.v[None], is_causal=True)
    a.out = out[0].transpose(0, 1)  # a view: how the library lays it out is its own affair


# --- one query a head ------------------------------------------------------------------------------------------------


def _one_query(rng, size):
    n_head, n_tokens, head_dim = size
    arrays = {"q": _normal(rng, n_head, head_dim), "k": _normal(rng, *size), "v": _normal(rng, *size)}
    for n_split in {*SPLITS, decoding.decode_splits(n_tokens, n_head)}:
        pairs, sums = decoding.decode_workspace(n_head, n_split, head_dim)
        arrays[f"pairs_{n_split}"], arrays[f"sums_{n_split}"] = np.zeros(pairs, np.float32), np.zeros(sums, np.float32)
    arrays["out"] = np.zeros((n_head, head_dim), np.float32)
    return {**arrays, "n_head": n_head, "n_tokens": n_tokens, "head_dim": head_dim, "scale": _scale(head_dim)}


def _decode_v1(a):
    launch = decoding.decode_launch(a.n_tokens, a.n_head, a.head_dim)
    decoding.decode_v1_block_per_head[launch](a.q, a.k, a.v, a.out, a.n_tokens, a.head_dim, a.scale)


def _decode_split(n_split=None):
    """Split-K decoding with ``n_split`` splits, or as many as decode_splits chooses."""

    def launch(a):
        n = n_split or decoding.decode_splits(a.n_tokens, a.n_head)
        pairs, sums = getattr(a, f"pairs_{n}"), getattr(a, f"sums_{n}")
        decoding.decode_attention(a.q, a.k, a.v, pairs, sums, a.out, a.n_tokens, a.scale)

    return launch


def _numpy_decode(a):
    scores = np.matmul(a.k, a.q[:, :, None])[:, :, 0]
    scores *= a.scale
    scores -= scores.max(1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(1, keepdims=True)
    a.out[...] = np.matmul(scores[:, None], a.v)[:, 0]


def _torch_decode(a):
    import torch

    out = torch.nn.functional.scaled_dot_product_attention(a.q[None, :, None], a.k[None], a.v[None])
    a.out = out[0, :, 0]


def _decode_bytes(size):
    """Of keys and values, and of q and out."""
    n_head, n_tokens, head_dim = size
    return 4 * n_head * head_dim * (2 * n_tokens + 2)


def _one_half_query(rng, size):
    """A query a head in float16, a cache that is just full, and what the last chunk's combining needs."""
    n_head, n_tokens, head_dim = size
    q, k, v = (_normal(rng, *shape).astype(np.float16) for shape in ((n_head * head_dim,), size, size))
    pairs, sums, arrived = decode_half.chunks_workspace(n_tokens, n_head, head_dim)
    work = {"pairs": np.zeros(pairs, np.float32), "sums": np.zeros(sums, np.float32)}
    work["arrived"] = np.zeros(arrived, np.int32)
    pos = np.array([n_tokens - 1], np.int32)
    sizes = {"n_head": n_head, "n_tokens": n_tokens, "head_dim": head_dim, "scale": _scale(head_dim)}
    return {"q": q, "k": k, "v": v, "pos": pos, "out": np.zeros_like(q), **work, **sizes}


def _decode_v3(a):
    launch = decode_half.chunks_launch(a.n_tokens, a.n_head, a.head_dim)
    work = a.pairs, a.sums, a.arrived, a.pos
    decode_half.decode_v3_chunks[launch](a.q, a.k, a.v, a.out, *work, a.head_dim, a.scale)


def _decode_half_expected(a):
    q = a.q.reshape(a.n_head, a.head_dim)
    return decode_half.decode_half_reference(q, a.k, a.v, a.n_tokens, a.scale).ravel()


def _numpy_decode_half(a):
    q, k, v = (x.astype(np.float32) for x in (a.q.reshape(a.n_head, a.head_dim), a.k, a.v))
    scores = np.matmul(k, q[:, :, None])[:, :, 0] * a.scale
    e = np.exp(scores - scores.max(1, keepdims=True))
    a.out[...] = np.matmul((e / e.sum(1, keepdims=True))[:, None], v).ravel()


def _torch_decode_half(a):
    import torch

    q = a.q.view(1, a.n_head, 1, a.head_dim)
    a.out = torch.nn.functional.scaled_dot_product_attention(q, a.k[None], a.v[None]).reshape(-1)


# --- many sequences --------------------------------------------------------------------------------------------------


def _lengths(size):
    """Lengths of the sequences, evenly from short to the longest."""
    num_seqs, longest = size
    return (np.arange(num_seqs) + 1) * longest // num_seqs


def _sequences(rng, size):
    """The same sequences in every layout: in one piece each, and in pages of 256, 64, 16 and 4 in random order."""
    num_seqs, longest = size
    lengths = rng.permutation(_lengths(size)).astype(np.int32)
    k, v = _normal(rng, 2, num_seqs, N_HEAD, longest, HEAD_DIM)
    arrays = {"q": _normal(rng, num_seqs, N_HEAD, HEAD_DIM), "k_whole": k, "v_whole": v, "context_lens": lengths}
    arrays["table_whole"] = np.arange(num_seqs, dtype=np.int32)[:, None]
    for block_size in PAGES:
        needed = -(-lengths // block_size)
        used = np.arange(longest // block_size) < needed[:, None]
        table = np.full(used.shape, -1, np.int32)
        table[used] = rng.permutation(used.sum())
        arrays[f"table_{block_size}"] = table
        for name, whole in (("k", k), ("v", v)):
            cache = np.empty((used.sum(), N_HEAD, block_size, HEAD_DIM), np.float32)
            pages = whole.reshape(num_seqs, N_HEAD, -1, block_size, HEAD_DIM).transpose(0, 2, 1, 3, 4)
            cache[table[used]] = pages[used]
            arrays[f"{name}_{block_size}"] = cache
    n_split = decoding.decode_splits(longest, num_seqs * N_HEAD)
    one_split = decoding.decode_splits(longest, N_HEAD)
    pairs, sums = decoding.decode_workspace(num_seqs * N_HEAD, n_split, HEAD_DIM)
    arrays["pairs"], arrays["sums"] = np.zeros(pairs, np.float32), np.zeros(sums, np.float32)
    pairs, sums = decoding.decode_workspace(N_HEAD, one_split, HEAD_DIM)
    arrays["one_pairs"], arrays["one_sums"] = np.zeros(pairs, np.float32), np.zeros(sums, np.float32)
    mask = np.where(np.arange(longest) < lengths[:, None], np.float32(0), np.float32(-math.inf))
    arrays["mask"] = mask[:, None, None]  # what a library adds to the scores
    arrays["out"] = np.zeros((num_seqs, N_HEAD, HEAD_DIM), np.float32)
    return {**arrays, "lengths": tuple(int(n) for n in lengths), "scale": _scale(HEAD_DIM)}


def _one_after_another(a):
    for seq, length in enumerate(a.lengths):
        arrays = a.q[seq], a.k_whole[seq], a.v_whole[seq], a.one_pairs, a.one_sums, a.out[seq]
        decoding.decode_attention(*arrays, length, a.scale)


def _in_pages(block_size):
    def launch(a):
        cache = (getattr(a, f"{name}_{block_size}") for name in ("k", "v", "table"))
        paged.paged_attention(a.q, *cache, a.context_lens, a.pairs, a.sums, a.out, a.scale)

    return launch


def _paged_v1(a):
    launch = paged.paged_launch(len(a.lengths), N_HEAD, HEAD_DIM, 16)
    arrays = a.q, a.k_16, a.v_16, a.table_16, a.context_lens, a.out
    paged.paged_v1_block_per_head[launch](*arrays, HEAD_DIM, 16, a.scale)


def _numpy_sequences(a):
    for seq, length in enumerate(a.lengths):
        scores = np.matmul(a.k_whole[seq, :, :length], a.q[seq, :, :, None])[:, :, 0]
        scores *= a.scale
        scores -= scores.max(1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(1, keepdims=True)
        a.out[seq] = np.matmul(scores[:, None], a.v_whole[seq, :, :length])[:, 0]


def _torch_sequences(a):
    import torch

    mask = a.mask.expand(-1, N_HEAD, -1, -1)
    out = torch.nn.functional.scaled_dot_product_attention(a.q[:, :, None], a.k_whole, a.v_whole, attn_mask=mask)
    a.out = out[:, :, 0]


def _sequences_bytes(size):
    """Of the keys and values that count, and of q and out."""
    return 4 * N_HEAD * HEAD_DIM * (2 * int(_lengths(size).sum()) + 2 * size[0])


LADDERS = [
    Ladder(
        name="flash",
        title="Causal attention, heads × tokens × head_dim",
        unit="GFLOP/s",
        share="library",
        sizes={
            "cpu": [(12, 64, 64), (12, 512, 64)],
            "gpu": [(12, 64, 64), (12, 1024, 64), (12, 4096, 64), (48, 4096, 64)],
        },
        make=_texts,
        work=_attention_flops,
        versions={
            "mha_naive": lambda a: ch11.mha_naive(a.q, a.k, a.v, a.scores, a.out, a.n_tokens, a.n_head, a.head_dim),
            "flash_v1_warp_per_query": _flash(ch12.flash_v1_warp_per_query, ch12.flash_v1_launch),
            "flash_v2_shared_tiles": _flash(ch12.flash_v2_shared_tiles, ch12.flash_v2_launch),
            "flash_v3_register_tiles": _flash(ch12.flash_v3_register_tiles, ch12.flash_v3_launch),
        },
        fits=lambda name, size: name != "mha_naive" or _matrix_fits(size),
        expected=_flash_expected,
        library={
            "cpu": ("NumPy, step by step", _numpy_attention),
            "gpu": ("`torch` scaled_dot_product_attention", _torch_attention),
        },
        tolerance=1e-4,
    ),
    Ladder(
        name="flash_half",
        title="Causal attention in float16, heads × tokens × head_dim",
        unit="TFLOP/s",
        share="library",
        sizes={"cpu": [(12, 64, 64), (12, 512, 64)], "gpu": [(48, 1024, 64), (48, 4096, 64), (32, 4096, 128)]},
        make=_half_texts,
        work=_attention_flops,
        versions={"flash_v4_64": _flash_half, "flash_v4_128": _flash_half},
        fits=lambda name, size: name == f"flash_v4_{size[2]}",
        expected=_half_expected,
        library={
            "cpu": ("NumPy, step by step in float32", _numpy_attention),
            "gpu": ("`torch` scaled_dot_product_attention", _torch_half),
        },
        tolerance=2e-3,
    ),
    Ladder(
        name="decode",
        title="One query a head: bytes of the keys and values, heads × tokens × head_dim",
        unit="GB/s",
        sizes={
            "cpu": [(12, 256, 64), (12, 4096, 64)],
            "gpu": [(12, 256, 64), (12, 1024, 64), (12, 8192, 64), (12, 65536, 64), (768, 1024, 64)],
        },
        make=_one_query,
        work=_decode_bytes,
        versions={
            "decode_v1_block_per_head": _decode_v1,
            **{f"decode_v2_split_k, {n} splits": _decode_split(n) for n in SPLITS},
            "decode_attention": _decode_split(),
        },
        expected=lambda a: decoding.decode_reference(a.q, a.k, a.v, a.scale),
        library={
            "cpu": ("NumPy, step by step", _numpy_decode),
            "gpu": ("`torch` scaled_dot_product_attention", _torch_decode),
        },
        tolerance=1e-4,
    ),
    Ladder(
        name="decode_half",
        title="One query a head in float16: bytes of the keys and values, heads × tokens × head_dim",
        unit="GB/s",
        sizes={
            "cpu": [(12, 256, 64), (12, 4096, 64)],
            "gpu": [(12, 128, 64), (12, 1024, 64), (12, 8192, 64), (768, 1024, 64)],
        },
        make=_one_half_query,
        work=lambda size: _decode_bytes(size) / 2,
        versions={"decode_v3_chunks": _decode_v3},
        expected=_decode_half_expected,
        library={
            "cpu": ("NumPy, by way of float32", _numpy_decode_half),
            "gpu": ("`torch` scaled_dot_product_attention", _torch_decode_half),
        },
        tolerance=2e-3,
    ),
    Ladder(
        name="paged",
        title="One query a head of many sequences: bytes of the keys and values, sequences × tokens of the longest",
        unit="GB/s",
        sizes={"cpu": [(8, 256), (8, 1024)], "gpu": [(8, 2048), (64, 2048), (256, 512)]},
        make=_sequences,
        work=_sequences_bytes,
        versions={
            "decode_attention, one sequence after another": _one_after_another,
            "paged_attention, one page a sequence": _in_pages("whole"),
            **{f"paged_attention, pages of {n}": _in_pages(n) for n in PAGES},
            "paged_v1_block_per_head, pages of 16": _paged_v1,
        },
        expected=lambda a: paged.paged_reference(a.q, a.k_whole, a.v_whole, a.table_whole, a.context_lens, a.scale),
        library={
            "cpu": ("NumPy, sequence by sequence", _numpy_sequences),
            "gpu": ("`torch` scaled_dot_product_attention, all as long as the longest", _torch_sequences),
        },
        tolerance=1e-4,
    ),
]
QUICK = {  # for the demo
    "flash": [(12, 64, 64)],
    "flash_half": [(12, 64, 64)],
    "decode": [(12, 256, 64), (12, 1024, 64)],
    "decode_half": [(12, 256, 64)],
    "paged": [(4, 256)],
}
