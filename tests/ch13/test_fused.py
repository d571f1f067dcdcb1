"""Chapter 13: what is fused to a matrix product, and the small kernels of a step, against NumPy; mostly exact."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch07_warp_reduce.argmax import greedy_argmax_reference
from chapters.ch09_gemm.gemv_tensor import gemv_residual_launch, gemv_tensor_launch
from chapters.ch09_gemm.pipeline import gemm_bias_launch
from chapters.ch12_flash import decode_half
from chapters.ch13_llm_ops import fused as ch13
from chapters.ch13_llm_ops.kernels import gelu_reference

TAIL = 40  # elements behind each array
INF = np.inf
EPS = np.float32(1e-5)


def with_tail(array, fill):
    """A device copy of ``array`` with more elements behind it: ``(buffer, view of the array's shape)``."""
    buffer = cuda.to_device(np.concatenate([array.ravel(), np.full(TAIL, fill, array.dtype)]))
    return buffer, buffer[: array.size].reshape(array.shape)


def on_device(launch, inputs, outputs):
    """``outputs`` after ``launch(*inputs, *outputs)`` on device copies of all.

    Behind inputs lies NaN, or for integers a place that is wrong, -9; and 7 behind the outputs: checks that it is still
    there.
    """
    read = [with_tail(array, np.nan if array.dtype.kind == "f" else -9)[1] for array in inputs]
    written = [with_tail(array, 7) for array in outputs]
    launch(*read, *(view for _, view in written))
    for (buffer, _), array in zip(written, outputs):
        np.testing.assert_array_equal(buffer.copy_to_host()[array.size :], 7)
    return [view.copy_to_host() for _, view in written]


def nan(dtype, *shape):
    """What a kernel leaves unwritten shows."""
    return np.full(shape, np.nan, dtype)


def whole(rng, dtype, *shape):
    """Integers so small that sums of products are exact: any mistake shows as a difference."""
    return rng.integers(-8, 9, shape, np.int8).astype(dtype)


def behind_norm(x, W, bias):
    """What a matrix makes of layer-normed rows of x, in float64, and how wrong float32 may be: (exact, allowed).

    x and W are whole numbers, so their product is exact, and float16 holds x: what rounds are mean, scale and the last
    line, each a few times.
    """
    x, W = x.astype(np.float64), W.astype(np.float64)
    centred = x - x.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt((centred**2).mean(axis=1, keepdims=True) + EPS)
    return centred * scale @ W.T + bias, 2.0**-18 * (np.abs(x) @ np.abs(W).T * scale + np.abs(bias))


def sums_of(W):
    """What fold_norm leaves beside W: the sums of its rows."""
    return W.astype(np.float64).sum(axis=1).astype(np.float32)


def assert_half(found, exact, allowed):
    """Found is exact but for what is allowed and the rounding to float16."""
    assert (np.abs(found - exact) <= allowed + 2.0**-11 * (np.abs(exact) + allowed) + 2.0**-25).all()


def assert_gelu_of(found, y, wrong=0):
    """Found is gelu(y), for a y right to ``wrong``: right to 1e-5 and 1e-6 as gelu_kernel, then rounded to float16."""
    expected = gelu_reference(y).astype(np.float64)
    assert (np.abs(found - expected) <= (2.0**-11 + 1e-5) * np.abs(expected) + 1e-6 + 1.2 * wrong).all()


# --- GELU ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (130, 33, 17), (33, 130, 72), (129, 257, 40)])
def test_gemm_bias_gelu(rng, M, N, K):
    """Odd and even N, K a multiple of 8 or not; sums are multiples of 1 / 64 from some -10 to 10."""
    A, Bt = whole(rng, np.float16, M, K), whole(rng, np.float16, N, K) / np.float16(64)
    bias = (rng.integers(-200, 200, N) / 64).astype(np.float32)
    kernel = ch13.gemm_bias_gelu[gemm_bias_launch(M, N)]
    (found,) = on_device(lambda *arrays: kernel(*arrays, M, N, K), (A, Bt, bias), [nan(np.float16, M, N)])
    exact = A.astype(np.float64) @ Bt.astype(np.float64).T + bias
    assert_gelu_of(found, exact)
    assert_gelu_of(ch13.gemm_bias_gelu_reference(A, Bt, bias), exact)


@pytest.mark.parametrize("N, d_model, rows", [(1, 8, 1), (33, 264, 8), (130, 768, 3), (6500, 8, 2), (40, 1544, 5)])
def test_gemv_ln_gelu(rng, N, d_model, rows):
    x, W = whole(rng, np.float32, rows, d_model), whole(rng, np.float16, N, d_model) / np.float16(64)
    bias = whole(rng, np.float32, N)
    kernel, sizes = ch13.gemv_ln_gelu[gemv_tensor_launch(N, d_model, rows)], (rows, N, d_model, EPS)
    inputs = x.ravel(), W, sums_of(W), bias
    (found,) = on_device(lambda *arrays: kernel(*arrays, *sizes), inputs, [nan(np.float16, rows * N)])
    assert_gelu_of(found.reshape(rows, N), *behind_norm(x, W, bias))


# --- query, key and value --------------------------------------------------------------------------------------------


def empty_caches(n_head, max_tokens, head_dim):
    return [np.full((n_head, max_tokens, head_dim), -1, np.float16) for _ in range(2)]


def qkv_of_a_token(x, W, bias, n_head, max_tokens, pos):
    """gemv_ln_qkv on the device: q and both caches, -1 where nothing was written."""
    d_model = len(x)
    head_dim = d_model // n_head
    kernel = ch13.gemv_ln_qkv[gemv_tensor_launch(3 * d_model, d_model)]
    outputs = [nan(np.float16, d_model), *empty_caches(n_head, max_tokens, head_dim), np.int32([pos])]
    inputs = x, W, sums_of(W), bias
    *found, same = on_device(lambda *arrays: kernel(*arrays, d_model, head_dim, EPS), inputs, outputs)
    assert same[0] == pos
    return found


@pytest.mark.parametrize("n_head, head_dim, pos", [(1, 8, 0), (3, 8, 5), (2, 128, 8), (12, 64, 3)])
def test_gemv_ln_qkv(rng, n_head, head_dim, pos):
    """Up to the last slot of nine."""
    d_model = n_head * head_dim
    x, W = whole(rng, np.float32, d_model), whole(rng, np.float16, 3 * d_model, d_model)
    bias = 10 * whole(rng, np.float32, 3 * d_model) + 1
    q, k_cache, v_cache = qkv_of_a_token(x, W, bias, n_head, 9, pos)
    exact, allowed = (part[0].reshape(3, n_head, head_dim) for part in behind_norm(x[None], W, bias))
    assert_half(q, exact[0].ravel(), allowed[0].ravel())
    for cache, rows, wrong in ((k_cache, exact[1], allowed[1]), (v_cache, exact[2], allowed[2])):
        assert_half(cache[:, pos], rows, wrong)
        assert (np.delete(cache, pos, axis=1) == -1).all()


def split(qkv, n_head, max_tokens, pos):
    """split_qkv_append on the device: q and both caches."""
    T, d_model = len(qkv), qkv.shape[1] // 3
    head_dim = d_model // n_head
    kernel = ch13.split_qkv_append[ch13.split_qkv_append_launch(T, d_model)]
    outputs = [nan(np.float16, n_head, T, head_dim), *empty_caches(n_head, max_tokens, head_dim), np.int32([pos])]
    *found, same = on_device(lambda *arrays: kernel(*arrays, T, d_model, head_dim), [qkv], outputs)
    assert same[0] == pos
    return found


@pytest.mark.parametrize("n_head, head_dim, T, pos", [(1, 1, 1, 0), (3, 5, 33, 7), (2, 32, 9, 0), (2, 64, 5, 35)])
def test_split_qkv_append(rng, n_head, head_dim, T, pos):
    d_model = n_head * head_dim
    qkv = rng.standard_normal((T, 3 * d_model)).astype(np.float16)
    q, *caches = split(qkv, n_head, 40, pos)
    expected = qkv.reshape(T, 3, n_head, head_dim).transpose(1, 2, 0, 3)
    np.testing.assert_array_equal(q, expected[0])
    for cache, part in zip(caches, expected[1:]):
        np.testing.assert_array_equal(cache[:, pos : pos + T], part)
        assert (np.delete(cache, np.s_[pos : pos + T], axis=1) == -1).all()


# --- attention in parts, and the matrix behind it --------------------------------------------------------------------


def projected(rng, n_head, head_dim, n_tokens):
    """gemv_parts_residual behind decode_v4_parts on the device, and what float64 makes of the same: (found, exact)."""
    d_model, max_tokens = n_head * head_dim, n_tokens + 40
    q, x, bias = rng.standard_normal(d_model).astype(np.float16), *rng.standard_normal((2, d_model), dtype=np.float32)
    k, v = rng.standard_normal((2, n_head, max_tokens, head_dim)).astype(np.float16)
    W = (rng.standard_normal((d_model, d_model)) / 16).astype(np.float16)
    k[:, n_tokens:] = v[:, n_tokens:] = np.nan
    scale, attend = np.float32(head_dim**-0.5), decode_half.chunks_launch(max_tokens, n_head, head_dim)
    work, stride = decode_half.parts_workspace(max_tokens, n_head, head_dim), decode_half.lse_stride_of(attend[0][0])
    parts, lse = (cuda.to_device(nan(dtype, n)) for dtype, n in zip((np.float16, np.float32), work))

    def launch(q, k, v, W, bias, pos, x):
        decode_half.decode_v4_parts[attend](q, k, v, parts, lse, pos, head_dim, scale)
        kernel = ch13.gemv_parts_residual[gemv_residual_launch(d_model, d_model)]
        kernel(parts, lse, W, bias, x, pos, d_model, head_dim, stride)

    (found,) = on_device(launch, (q, k, v, W, bias, np.int32([n_tokens - 1])), [x])
    attention = decode_half.decode_half_reference(q.reshape(n_head, head_dim), k, v, n_tokens, scale)
    return found, x + W.astype(np.float64) @ attention.ravel().astype(np.float64) + bias


@pytest.mark.parametrize(
    "n_head, head_dim, n_tokens",
    [(1, 8, 1), (3, 8, 1025), (12, 64, 1), (12, 64, 129), (3, 128, 333), (2, 64, 1000), (9, 128, 70), (34, 64, 140)],
)
def test_gemv_parts_residual(rng, n_head, head_dim, n_tokens):
    """One chunk, several, more than are loaded at a time; d_model above what registers hold."""
    found, exact = projected(rng, n_head, head_dim, n_tokens)
    assert np.abs(found - exact).max() <= 2e-3 * np.abs(exact).max()


# --- logits and the likeliest ----------------------------------------------------------------------------------------


def logits_of(x, at, W, bias):
    """gemv_ln_logits on the device: logits, best and best_token."""
    vocab_size, d_model = W.shape
    configuration = gemv_tensor_launch(vocab_size, d_model)
    blocks = configuration[0]

    def launch(x, *arrays):
        ch13.gemv_ln_logits[configuration](x, at, *arrays, vocab_size, d_model, EPS)

    outputs = [nan(np.float32, vocab_size), nan(np.float32, blocks), np.full(blocks, -9, np.int32)]
    return on_device(launch, (x.ravel(), W, sums_of(W), bias), outputs)


def embeddings(vocab_size, d_model=33):
    """wte and wpe with 5 positions."""
    rng = np.random.default_rng(vocab_size)
    return [rng.standard_normal((n, d_model)).astype(np.float16) for n in (vocab_size, 5)]


def assert_embedded(x, wte, wpe, token, slot):
    """x is what embed_at makes of the token, or as it was where no position is left."""
    if slot < len(wpe):
        np.testing.assert_array_equal(x, wte[max(token, 0)].astype(np.float32) + wpe[slot].astype(np.float32))
    else:
        assert np.isnan(x).all()


def pick(best, best_token, vocab_size, pos=2):
    """The token that pick_best writes behind position ``pos``, to ``tokens`` and ``shown`` alike, and nothing else."""
    wte, wpe = embeddings(vocab_size)

    def launch(best, best_token, wte, wpe, tokens, shown, pos, x):
        found = best, best_token, len(best), vocab_size
        ch13.pick_best[ch13.pick_best_launch()](*found, tokens, shown, pos, wte, wpe, x)

    outputs = [np.full(6, -5, np.int32), np.full(6, -5, np.int32), np.int32([pos]), nan(np.float32, 33)]
    tokens, shown, new_pos, x = on_device(launch, (best, best_token, wte, wpe), outputs)
    np.testing.assert_array_equal(shown, tokens)
    assert new_pos[0] == pos + 1 and (np.delete(tokens, pos + 1) == -5).all()
    assert_embedded(x, wte, wpe, tokens[pos + 1], pos + 1)
    return int(tokens[pos + 1])


def greedy(x, at, W, bias):
    """Logits on the device, and the token picked; what blocks have found is theirs."""
    logits, best, best_token = logits_of(x, at, W, bias)
    found = best_token < len(W)
    np.testing.assert_array_equal(logits[best_token[found]], best[found])
    assert (best[~found] == -INF).all() and (best_token[~found] == len(W)).all()
    return logits, pick(best, best_token, len(W))


def zeros(n):
    return np.zeros(n, np.float32)


@pytest.mark.parametrize("vocab_size, d_model", [(1, 8), (7, 264), (257, 768), (6500, 24)])
def test_greedy_token_of_whole_numbers(rng, vocab_size, d_model):
    """Of each row of x; the likeliest twice, so that the lower token has to win."""
    x, bias = whole(rng, np.float32, 3, d_model), whole(rng, np.float32, vocab_size)
    W = whole(rng, np.float16, vocab_size, d_model)
    for at in range(3):
        likeliest = behind_norm(x[at : at + 1], W, bias)[0][0].argmax()
        W[vocab_size // 3], bias[vocab_size // 3] = W[likeliest], bias[likeliest]
        (expected,), (allowed,) = behind_norm(x[at : at + 1], W, bias)
        logits, token = greedy(x, at, W, bias)
        assert (np.abs(logits - expected) <= allowed).all()
        reference = ch13.gemv_ln_logits_reference(x[at], W, bias, EPS)
        assert (np.abs(reference - expected) <= allowed).all()
        assert token == logits.argmax() and expected[token] >= expected.max() - 2 * allowed.max()
        assert vocab_size < 9 or (logits == logits.max()).sum() > 1


def test_equal_logits_give_the_lowest_token():
    """In the same block, in another; and all equal."""
    x, W = np.float32([[8, -8] * 4]), np.zeros((6500, 8), np.float16)
    W[:, 0] = 1
    assert greedy(x, 0, W, zeros(6500))[1] == 0
    for likeliest in ([32, 33, 700], [40, 6499], [6490, 6499], [17, 6336 + 17]):
        W[:, 0] = 1
        W[likeliest, 0] = 2
        logits, token = greedy(x, 0, W, zeros(6500))
        assert (logits == logits.max()).sum() == len(likeliest) and token == likeliest[0]


def test_nan_never_wins(rng):
    x, W = whole(rng, np.float32, 1, 24), whole(rng, np.float16, 300, 24)
    order = np.argsort(-greedy(x, 0, W, zeros(300))[0], kind="stable")
    W[order[:5]] = np.nan
    W[:16] = np.nan  # nothing but NaN for the first block
    logits, token = greedy(x, 0, W, zeros(300))
    best = next(token for token in order if not np.isnan(logits[token]))
    assert np.isnan(logits).sum() >= 16 and token == best == greedy_argmax_reference(logits)


@pytest.mark.parametrize("spoilt", ["x", "W"])
def test_all_nan_gives_minus_one(rng, spoilt):
    arrays = {"x": whole(rng, np.float32, 1, 24), "W": whole(rng, np.float16, 300, 24), "bias": zeros(300)}
    arrays[spoilt][..., 5] = np.nan
    logits, token = greedy(arrays.pop("x"), 0, **arrays)
    assert np.isnan(logits).all() and token == -1


def test_all_minus_infinity_gives_token_0(rng):
    x, W = whole(rng, np.float32, 1, 24), whole(rng, np.float16, 300, 24)
    logits, token = greedy(x, 0, W, np.full(300, -INF, np.float32))
    assert (logits == -INF).all() and token == 0


@pytest.mark.parametrize("n_blocks", [1, 33, 1500])
def test_pick_best_of_many_blocks(rng, n_blocks):
    """Equal bests: the lowest token, whichever block has it."""
    best = rng.integers(-3, 3, n_blocks).astype(np.float32)
    best_token = rng.permutation(9000)[:n_blocks].astype(np.int32)
    assert pick(best, best_token, 9000, pos=0) == best_token[best == best.max()].min()
    best[:], best_token[:] = -INF, 9000
    assert pick(best, best_token, 9000) == -1
    best_token[n_blocks // 2] = 8999
    assert pick(best, best_token, 9000) == 8999


# --- the ends of a step ----------------------------------------------------------------------------------------------


def test_append_token():
    """Up to the last position, behind which a token has a place but no embedding."""
    wte, wpe = embeddings(60)

    def launch(chosen, wte, wpe, tokens, shown, pos, step, x):
        ch13.append_token[ch13.append_token_launch()](chosen, tokens, shown, pos, step, wte, wpe, x)

    tokens, shown = np.full((2, 7), -5, np.int32)
    pos, step = np.int32([1]), np.int64([(1 << 40) + 6])
    for slot, token in ((2, 17), (3, -1), (4, 59), (5, 3)):
        outputs = [tokens, shown, pos, step, nan(np.float32, 33)]
        tokens, shown, pos, step, x = on_device(launch, [np.int32([token]), wte, wpe], outputs)
        assert_embedded(x, wte, wpe, token, slot)
    assert tokens.tolist() == shown.tolist() == [-5] * 2 + [17, -1, 59, 3] + [-5]
    assert pos[0] == 5 and step[0] == (1 << 40) + 10


def test_pick_best_at_the_last_position():
    assert pick(np.float32([1, 3]), np.int32([5, 9]), 10, pos=4) == 9


def embedded(tokens, pos, wte, wpe, T):
    """embed_at on the device."""
    d_model = wte.shape[1]
    kernel, inputs = ch13.embed_at[blocks_2d(T, d_model)], (np.int32(tokens), np.int32([pos]), wte, wpe)
    return on_device(lambda *arrays: kernel(*arrays, T, d_model), inputs, [nan(np.float32, T, d_model)])[0]


@pytest.mark.parametrize("T, pos", [(1, 0), (1, 11), (5, 0), (9, 3)])
@pytest.mark.parametrize("d_model", [1, 72, 129])
def test_embed_at(rng, T, pos, d_model):
    """Added in float32; token -1, of a step that had nothing to choose from, reads as token 0."""
    wte, wpe = (rng.standard_normal((n, d_model)).astype(np.float16) for n in (50, 12))
    tokens = rng.integers(0, 50, 13).astype(np.int32)
    tokens[pos] = 49
    tokens[pos + T - 1] = -1
    found = embedded(tokens, pos, wte, wpe, T)
    tokens[pos + T - 1] = 0
    places = np.arange(pos, pos + T)
    np.testing.assert_array_equal(found, wte[tokens[places]].astype(np.float32) + wpe[places].astype(np.float32))


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x, W, bias = whole(rng, np.float32, 24), whole(rng, np.float16, 72, 24), zeros(72)
    q, _, v_cache = qkv_of_a_token(x, W, bias, 3, 4, 3)
    (exact,), (allowed,) = behind_norm(x[None], W, bias)
    assert_half(q, exact[:24], allowed[:24])
    assert_half(v_cache[:, 3].ravel(), exact[48:], allowed[48:])
    projected(rng, 3, 8, 1300)
    assert pick(np.float32([1, 3, 3]), np.int32([5, 9, 7]), 10) == 7
    assert embedded([3, 49], 0, np.ones((50, 33), np.float16), np.ones((2, 33), np.float16), 2).sum() == 2 * 2 * 33
    assert (split(np.ones((5, 30), np.float16), 2, 7, 2)[2][:, 2:] == 1).all()


def test_launches_refuse():
    for sizes in [(0, 64), (5, 0), (-1, 64)]:
        with pytest.raises(ValueError, match="at least 1"):
            ch13.split_qkv_append_launch(*sizes)
