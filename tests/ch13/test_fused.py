"""Chapter 13: what is fused to a matrix product, and the small kernels of a step, against NumPy; mostly exact."""

import numpy as np
import pytest
from numba import cuda

from chapters.ch07_warp_reduce.argmax import greedy_argmax_reference
from chapters.ch09_gemm.gemv_tensor import gemv_residual_launch, gemv_tensor_launch
from chapters.ch09_gemm.pipeline import gemm_bias_launch
from chapters.ch12_flash import decode_half, paged_half
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


@pytest.mark.parametrize(
    "N, d_model, rows", [(1, 8, 1), (33, 264, 8), (130, 768, 3), (6500, 8, 2), (40, 1544, 5), (33, 72, 19)]
)
def test_gemv_ln_gelu(rng, N, d_model, rows):
    x, W = whole(rng, np.float32, rows, d_model), whole(rng, np.float16, N, d_model) / np.float16(64)
    bias = whole(rng, np.float32, N)
    kernel, sizes = ch13.gemv_ln_gelu[gemv_tensor_launch(N, d_model, rows)], (rows, N, d_model, EPS)
    inputs = x.ravel(), W, sums_of(W), bias
    (found,) = on_device(lambda *arrays: kernel(*arrays, *sizes), inputs, [nan(np.float16, rows * N)])
    assert_gelu_of(found.reshape(rows, N), *behind_norm(x, W, bias))


# --- query, key and value --------------------------------------------------------------------------------------------


def qkv_of_rows(x, W, bias, heads, n_pages, block_size, slots):
    """gemv_ln_qkv on the device: q and both caches, -1 where nothing was written. heads: n_head, n_kv_head, size."""
    (rows, d_model), (n_head, n_kv_head, head_dim) = x.shape, heads
    kernel = ch13.gemv_ln_qkv[gemv_tensor_launch(len(W), d_model, rows)]
    sizes = rows, d_model, *heads, block_size, EPS
    pages = [np.full((n_pages, n_kv_head, block_size, head_dim), -1, np.float16) for _ in range(2)]
    inputs = x.ravel(), W, sums_of(W), bias, slots

    def launch(x, W, row_sums, bias, slots, *outputs):
        kernel(x, W, row_sums, bias, *outputs, slots, *sizes)

    q, *caches = on_device(launch, inputs, [nan(np.float16, rows * n_head * head_dim), *pages])
    return q.reshape(rows, n_head * head_dim), *caches


def int32(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    "n_head, n_kv_head, head_dim, rows", [(1, 1, 8, 1), (3, 3, 8, 5), (4, 2, 128, 8), (12, 12, 64, 1), (6, 2, 8, 19)]
)
def test_gemv_ln_qkv(rng, n_head, n_kv_head, head_dim, rows):
    """At places here and there, the first and the last among them, and one row of padding."""
    d_model, block_size = n_head * head_dim, 8
    N = (n_head + 2 * n_kv_head) * head_dim
    x, W = whole(rng, np.float32, rows, d_model), whole(rng, np.float16, N, d_model)
    bias = 10 * whole(rng, np.float32, N) + 1
    slots = 1 + rng.permutation(46)[:rows].astype(np.int32)
    slots[0], slots[rows // 2] = 0, 47
    slots[rows // 3] = -1 if rows > 1 else 47
    q, k_cache, v_cache = qkv_of_rows(x, W, bias, (n_head, n_kv_head, head_dim), 6, block_size, slots)
    exact, allowed = behind_norm(x, W, bias)
    q_width, kv_width = n_head * head_dim, n_kv_head * head_dim
    assert_half(q, exact[:, :q_width], allowed[:, :q_width])
    for cache, col in ((k_cache, q_width), (v_cache, q_width + kv_width)):
        written = np.zeros(cache.shape[:3], bool)
        for row, slot in enumerate(slots):
            if slot < 0:
                continue
            page, place = slot // block_size, slot % block_size
            part = np.s_[row, col : col + kv_width]
            assert_half(cache[page, :, place].ravel(), exact[part], allowed[part])
            written[page, :, place] = True
        assert (cache[~written] == -1).all()


def test_a_row_has_the_same_bits_in_any_group(rng):
    """Alone, and as any of nineteen; of every product of a step."""
    x, W = rng.standard_normal((19, 264)).astype(np.float32), rng.standard_normal((40, 264)).astype(np.float16)
    bias, sums = rng.standard_normal(40).astype(np.float32), sums_of(W)

    def gelu(x):
        kernel, sizes = ch13.gemv_ln_gelu[gemv_tensor_launch(40, 264, len(x))], (len(x), 40, 264, EPS)
        inputs, outputs = (x.ravel(), W, sums, bias), [nan(np.float16, len(x) * 40)]
        return on_device(lambda *arrays: kernel(*arrays, *sizes), inputs, outputs)[0].reshape(len(x), 40)

    def logits(x):
        return logits_of(x, np.arange(len(x), dtype=np.int32), W, bias)[0]

    for product in (gelu, logits):
        together = product(x)
        for row in (0, 7, 8, 18):
            np.testing.assert_array_equal(product(x[row : row + 1])[0], together[row])


# --- attention in parts, and the matrix behind it --------------------------------------------------------------------


def projected(rng, n_head, head_dim, lengths, d_model=None):
    """gemv_parts_residual behind paged_v4_parts on the device, and what float64 makes of the same: (found, exact).

    A row a sequence, of so many tokens; length 0 is padding.
    """
    width, rows, block_size = n_head * head_dim, len(lengths), 16
    d_model, max_tokens = d_model or width, max(lengths) + 40
    q = rng.standard_normal((rows, n_head, head_dim)).astype(np.float16)
    x, bias = rng.standard_normal((rows, d_model), dtype=np.float32), rng.standard_normal(d_model, dtype=np.float32)
    W = (rng.standard_normal((d_model, width)) / 16).astype(np.float16)
    needed = [-(-length // block_size) for length in lengths]
    block_table, pages = np.zeros((rows, max(needed)), np.int32), 1 + rng.permutation(sum(needed))
    for line, count in zip(block_table, needed):
        line[:count], pages = pages[:count], pages[count:]
    k, v = rng.standard_normal((2, 1 + sum(needed), n_head, block_size, head_dim)).astype(np.float16)
    for line, length in zip(block_table, lengths):
        if length % block_size:
            for cache in (k, v):
                cache[line[length // block_size], :, length % block_size :] = np.nan
    positions, row_seq = np.array(lengths, np.int32) - 1, np.arange(rows, dtype=np.int32)
    scale, sizes = np.float32(head_dim**-0.5), (rows, max_tokens, n_head, head_dim)
    attend = paged_half.paged_parts_launch(*sizes, block_size)
    n_chunks = attend[0][0]
    work, stride = paged_half.paged_parts_workspace(*sizes), decode_half.lse_stride_of(n_chunks)
    parts, lse = (cuda.to_device(nan(dtype, n)) for dtype, n in zip((np.float16, np.float32), work))

    def launch(q, k, v, block_table, row_seq, positions, W, bias, x):
        paged_half.paged_v4_parts[attend](
            q, k, v, block_table, row_seq, positions, parts, lse, n_head, head_dim, block_size, scale, 1
        )
        kernel = ch13.gemv_parts_residual[gemv_residual_launch(d_model, width, rows)]
        kernel(parts, lse, W, bias, x, positions, rows, d_model, n_head, head_dim, n_chunks, stride)

    inputs = q.ravel(), k.ravel(), v.ravel(), block_table, row_seq, positions, W, bias
    (found,) = on_device(launch, inputs, [x.ravel()])
    real = positions >= 0
    inputs = k, v, block_table, row_seq[real], positions[real], scale
    attention = paged_half.paged_half_reference(q[real], *inputs).astype(np.float16).astype(np.float64)
    exact = x[real] + attention.reshape(-1, width) @ W.astype(np.float64).T + bias
    return found.reshape(rows, d_model)[real], exact


@pytest.mark.parametrize(
    "n_head, head_dim, lengths",
    [
        (1, 8, [1]), (3, 8, [1025]), (12, 64, [1]), (12, 64, [129, 1, 40]), (3, 128, [333]), (2, 64, [1000]),
        (9, 128, [70, 71, 3, 9, 200, 0, 1]), (34, 64, [140]), (3, 8, [*range(1, 20)]),
    ],
)  # fmt: skip
def test_gemv_parts_residual(rng, n_head, head_dim, lengths):
    """One chunk, several, more than are loaded at a time; d_model above what registers hold; rows of several groups."""
    found, exact = projected(rng, n_head, head_dim, lengths)
    assert np.abs(found - exact).max() <= 2e-3 * np.abs(exact).max()


def test_gemv_parts_residual_of_heads_that_are_not_d_model(rng):
    found, exact = projected(rng, 3, 8, [5, 60], d_model=40)
    assert np.abs(found - exact).max() <= 2e-3 * np.abs(exact).max()


# --- logits and the likeliest ----------------------------------------------------------------------------------------


def logits_of(x, logits_rows, W, bias):
    """gemv_ln_logits on the device: logits, best and best_token, a row each."""
    (vocab_size, d_model), n = W.shape, len(logits_rows)
    configuration = gemv_tensor_launch(vocab_size, d_model, n)
    blocks = configuration[0][0]

    def launch(*arrays):
        ch13.gemv_ln_logits[configuration](*arrays, n, vocab_size, d_model, EPS)

    outputs = [nan(np.float32, n, vocab_size), nan(np.float32, n, blocks), np.full((n, blocks), -9, np.int32)]
    return on_device(launch, (x.ravel(), logits_rows, W, sums_of(W), bias), outputs)


def embeddings(vocab_size, d_model=33):
    """wte and wpe with 5 positions."""
    rng = np.random.default_rng(vocab_size)
    return [rng.standard_normal((n, d_model)).astype(np.float16) for n in (vocab_size, 5)]


class Ends:
    """What the ends of a step write: rows at ``positions``, at place ``ring`` of three."""

    def __init__(self, positions, ring, d_model=33):
        n = len(positions)
        self.positions, self.ring = np.array(positions, np.int32), np.array(ring, np.int32)
        self.chosen, self.shown = np.full(n, -5, np.int32), np.full((3, n + 1), -5, np.int32)
        self.slot_mapping = np.full(n, -5, np.int32)
        self.block_table = 3 + np.arange(2 * n, dtype=np.int32).reshape(n, 2)
        self.x = nan(np.float32, n * d_model)

    def run(self, launch, inputs, wte, wpe):
        """launch(*inputs, chosen, …, x), with pages of 4 tokens; returns the tokens, all else being checked."""
        before = self.__dict__.copy()
        names = "chosen", "positions", "slot_mapping", "ring", "shown", "x"

        def launched(wte, wpe, block_table, *arrays):
            *read, chosen, positions, slot_mapping, ring, shown, x = arrays
            launch(*read, chosen, positions, slot_mapping, block_table, 4, ring, shown, wte, wpe, x)

        found = on_device(launched, (wte, wpe, self.block_table, *inputs), [before[name] for name in names])
        self.__dict__.update(zip(names, found))
        d_model = wte.shape[1]
        shown = before["shown"].copy()
        for row, (position, place) in enumerate(zip(before["positions"], before["ring"])):
            x = self.x[row * d_model : (row + 1) * d_model]
            if place < 0:
                assert self.positions[row] == position and self.ring[row] == place
                assert self.slot_mapping[row] == before["slot_mapping"][row]
                np.testing.assert_array_equal(x, before["x"][row * d_model : (row + 1) * d_model])
                continue
            assert self.positions[row] == position + 1 and self.ring[row] == (place + 1) % 3
            shown[place, row] = self.chosen[row]
            page = (position + 1) // 4  # the table has two
            slot = self.block_table[row, page] * 4 + (position + 1) % 4 if page < 2 else -1
            assert self.slot_mapping[row] == slot
            if position + 1 < len(wpe):
                token = wte[max(self.chosen[row], 0)].astype(np.float32)
                np.testing.assert_array_equal(x, token + wpe[position + 1].astype(np.float32))
            else:
                np.testing.assert_array_equal(x, before["x"][row * d_model : (row + 1) * d_model])
        np.testing.assert_array_equal(self.shown, shown)
        return self.chosen


def pick(best, best_token, vocab_size, position=2):
    """The token that pick_best writes for each row."""
    best, best_token = np.atleast_2d(best), np.atleast_2d(best_token)
    n, blocks = best.shape
    kernel = ch13.pick_best[ch13.pick_best_launch(n)]
    ends = Ends([position] * n, [row % 3 for row in range(n)])
    tokens = ends.run(
        lambda best, best_token, *arrays: kernel(best, best_token, blocks, vocab_size, *arrays),
        (best, best_token), *embeddings(vocab_size),
    )  # fmt: skip
    return int(tokens[0]) if n == 1 else tokens.tolist()


def greedy(x, at, W, bias):
    """Logits of one row on the device, and the token picked; what blocks have found is theirs."""
    logits, best, best_token = (array[0] for array in logits_of(x, int32(at), W, bias))
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


def test_logits_of_some_of_many_rows(rng):
    """In any order, more than a group of eight; each has its own token."""
    x, W, bias = whole(rng, np.float32, 13, 264), whole(rng, np.float16, 257, 264), whole(rng, np.float32, 257)
    rows = int32(12, 3, 0, 7, 8, 9, 1, 2, 11, 4)
    logits, best, best_token = logits_of(x, rows, W, bias)
    expected, allowed = behind_norm(x[rows], W, bias)
    assert (np.abs(logits - expected) <= allowed).all()
    assert pick(best, best_token, 257) == logits.argmax(axis=1).tolist()


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
    assert pick(best, best_token, 9000, position=0) == best_token[best == best.max()].min()
    best[:], best_token[:] = -INF, 9000
    assert pick(best, best_token, 9000) == -1
    best_token[n_blocks // 2] = 8999
    assert pick(best, best_token, 9000) == 8999


# --- the ends of a step ----------------------------------------------------------------------------------------------


def test_append_rows():
    """Up to the last position, behind which a token has a place but no embedding; row 1 is padding."""
    wte, wpe = embeddings(60)
    ends = Ends([1, -1, 3], [0, -1, 2])
    for tokens in ([17, 1, 59], [-1, 1, 3], [59, 1, 0], [3, 1, 4]):
        ends.chosen = int32(*tokens)
        kernel = ch13.append_rows[ch13.append_rows_launch(3)]
        assert ends.run(kernel, (), wte, wpe).tolist() == tokens
    assert ends.positions.tolist() == [5, -1, 7] and ends.ring.tolist() == [1, -1, 0]


def test_pick_best_at_the_last_position():
    assert pick(np.float32([1, 3]), np.int32([5, 9]), 10, position=4) == 9


def test_no_index_outside_the_arrays(rng, monkeypatch):
    monkeypatch.setenv("MINI_CHECK", "1")  # the CPU backend raises at any; on a GPU compute-sanitizer is the tool
    x, W, bias = whole(rng, np.float32, 9, 24), whole(rng, np.float16, 72, 24), zeros(72)
    q, _, v_cache = qkv_of_rows(x, W, bias, (3, 3, 8), 3, 4, int32(-1, 8, 9, 0, 1, 2, 3, 4, 7))
    exact, allowed = behind_norm(x, W, bias)
    assert_half(q, exact[:, :24], allowed[:, :24])
    assert_half(v_cache[1, :, 3].ravel(), exact[8, 48:], allowed[8, 48:])
    projected(rng, 3, 8, [1300, 0, 5])
    assert pick(np.float32([1, 3, 3]), np.int32([5, 9, 7]), 10) == 7


def test_launches_refuse():
    for launch in (ch13.pick_best_launch, ch13.append_rows_launch):
        with pytest.raises(ValueError, match="at least 1"):
            launch(0)
