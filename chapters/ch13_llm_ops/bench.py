"""What ``make bench CH=13`` measures: activations, rotary positions, the key-value cache, and sampling.

Sizes are GPT-2 small's (768 and 3072 wide, 12 heads of 64, 50257 tokens) and those of a Llama of 7 billion weights
(11008 wide, 32 heads of 128). The exact GELU has no NumPy function, so no library is beside it on a CPU.
"""

import numpy as np

from chapters.ch09_gemm.gemv_tensor import gemv_bias_residual, gemv_residual_launch
from chapters.ch12_flash import decode_half
from chapters.ch13_llm_ops import fused, rope, sampling
from chapters.ch13_llm_ops import kernels as ch13
from chapters.ch13_llm_ops import kv_cache as kv
from common.bench import Ladder

D_FF = 3072  # GPT-2 small's
VOCAB_SIZE = 50257  # GPT-2's
PERIOD = 1 << 16  # the numbers of x come again after so many: the reference of the exact GELU is slow
FIRST_POSITION = 500  # of the tokens that are rotated: at 0 every angle is 0


def _normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


# --- activations -----------------------------------------------------------------------------------------------------


def _activation(rng, n_tokens):
    n = n_tokens * D_FF
    return {"x": np.resize(_normal(rng, PERIOD), n), "out": np.zeros(n, np.float32), "n": n}


def _numpy_gelu(a):
    inner = np.float32(0.044715) * a.x
    inner *= a.x
    inner += 1
    inner *= a.x
    inner *= np.float32(np.sqrt(2 / np.pi))
    np.tanh(inner, out=inner)
    inner += 1
    inner *= np.float32(0.5)
    np.multiply(inner, a.x, out=a.out)


def _torch_gelu(form):
    def run(a):
        import torch

        a.out = torch.nn.functional.gelu(a.x, approximate=form)

    return run


def _gelu_ladder(name, title, kernel, reference, library):
    return Ladder(
        name=name,
        title=f"{title}, n tokens × {D_FF}",
        unit="GB/s",
        sizes={"cpu": [1, 1024], "gpu": [1, 1024, 32768]},
        make=_activation,
        work=lambda n_tokens: 8 * n_tokens * D_FF,
        versions={kernel.__name__: lambda a: kernel[ch13.activation_launch(a.n)](a.x, a.out, a.n)},
        expected=lambda a: np.resize(reference(a.x[:PERIOD]), a.n),
        library=library,
    )


def _swiglu_inputs(rng, size):
    rows, d_ff = size
    gate_up = _normal(rng, rows, 2 * d_ff)
    gate, up = (np.ascontiguousarray(half).ravel() for half in np.split(gate_up, 2, axis=1))
    between, out = np.zeros((2, rows * d_ff), np.float32)
    return {"gate_up": gate_up, "gate": gate, "up": up, "between": between, "out": out, "rows": rows, "d_ff": d_ff}


def _silu_then_multiply(a):
    launch = ch13.activation_launch(a.rows * a.d_ff)
    ch13.silu[launch](a.gate, a.between, a.rows * a.d_ff)
    ch13.multiply[launch](a.between, a.up, a.out, a.rows * a.d_ff)


def _swiglu(a):
    ch13.swiglu[ch13.activation_launch(a.rows * a.d_ff)](a.gate, a.up, a.out, a.rows * a.d_ff)


def _swiglu_fused(a):
    out = a.out.reshape(a.rows, a.d_ff)
    ch13.swiglu_fused[ch13.swiglu_fused_launch(a.rows, a.d_ff)](a.gate_up, out, a.rows, a.d_ff)


def _numpy_swiglu(a):
    np.negative(a.gate, out=a.between)
    np.exp(a.between, out=a.between)
    a.between += 1
    np.divide(a.gate, a.between, out=a.out)
    a.out *= a.up


def _torch_swiglu(a):
    import torch

    torch.mul(torch.nn.functional.silu(a.gate), a.up, out=a.out)


# --- rotary positions ------------------------------------------------------------------------------------------------


def _rope_inputs(rng, size):
    n_head, T, head_dim = size
    positions = np.arange(FIRST_POSITION, FIRST_POSITION + T, dtype=np.int32)
    cos, sin = rope.rope_tables(FIRST_POSITION + T, head_dim)
    row_cos, row_sin = cos[FIRST_POSITION:], sin[FIRST_POSITION:]
    return {
        "x": _normal(rng, *size),
        "positions": positions,
        "cos": cos,
        "sin": sin,
        "turns": row_cos + np.complex64(1j) * row_sin,  # for the libraries, which are spared the look-up
        "cos_twice": np.concatenate([row_cos, row_cos], axis=1),
        "sin_twice": np.concatenate([row_sin, row_sin], axis=1),
        "out": np.zeros(size, np.float32),
        "n_head": n_head,
        "T": T,
        "head_dim": head_dim,
    }


def _sincos(kernel):
    return lambda a: kernel[rope.rope_launch(a.n_head, a.T, a.head_dim)](
        a.x, a.positions, a.out, a.T, a.head_dim, 10000.0
    )


def _table(kernel):
    return lambda a: kernel[rope.rope_launch(a.n_head, a.T, a.head_dim)](
        a.x, a.positions, a.cos, a.sin, a.out, a.T, a.head_dim
    )


def _numpy_interleaved(a):
    np.multiply(a.x.view(np.complex64), a.turns, out=a.out.view(np.complex64))


def _torch_interleaved(a):
    import torch

    x, out = (torch.view_as_complex(array.view(a.n_head, a.T, -1, 2)) for array in (a.x, a.out))
    torch.mul(x, a.turns, out=out)


def _numpy_halves(a):
    first, second = np.split(a.x, 2, axis=-1)
    np.multiply(a.x, a.cos_twice, out=a.out)
    half = a.head_dim // 2
    a.out[..., :half] -= second * a.sin_twice[:, :half]
    a.out[..., half:] += first * a.sin_twice[:, half:]


def _torch_halves(a):
    import torch

    first, second = a.x.chunk(2, -1)
    a.out = a.x * a.cos_twice + torch.cat((-second, first), -1) * a.sin_twice


def _rope_bytes(size):
    """x read and written; a row of the tables (4 · head_dim bytes) and a position for each token, read once."""
    n_head, T, head_dim = size
    return 8 * n_head * T * head_dim + 4 * T * head_dim + 4 * T


def _rope_ladder(pairing, title, sincos, table, reference, library):
    return Ladder(
        name=f"rope_{pairing}",
        title=f"{title}, heads × tokens × head_dim",
        unit="GB/s",
        sizes={"cpu": [(12, 1, 64), (12, 1024, 64)], "gpu": [(12, 1, 64), (12, 1024, 64), (32, 4096, 128)]},
        make=_rope_inputs,
        work=_rope_bytes,
        versions={sincos.__name__: _sincos(sincos), table.__name__: _table(table)},
        expected=lambda a: reference(a.x, a.positions),
        library=library,
        tolerance=2e-3,  # the angles of version 1 are off by some 1e-7 of a position's number; a wrong pair, by 1
    )


# --- the key-value cache ---------------------------------------------------------------------------------------------


def _append_inputs(rng, size):
    """A cache with room for T tokens at its end; for a short text, behind many others."""
    n_head, T, head_dim = size
    T_max = max(T, 1024)
    return {
        "k": _normal(rng, *size),
        "v": _normal(rng, *size),
        "out": _normal(rng, 2, n_head, T_max, head_dim),  # both caches
        "pos": np.array([T_max - T], np.int32),
        "first": T_max - T,
        "n_head": n_head,
        "T": T,
        "T_max": T_max,
        "head_dim": head_dim,
    }


def _kv_append(a):
    kv.kv_append[kv.kv_launch(a.n_head, a.T, a.head_dim)](a.k, a.v, a.out[0], a.out[1], a.pos, a.T, a.T_max, a.head_dim)


def _library_append(a):
    a.out[0, :, a.first : a.first + a.T] = a.k
    a.out[1, :, a.first : a.first + a.T] = a.v


def _read_inputs(rng, size):
    n_head, T, head_dim = size
    return {
        "cache": _normal(rng, n_head, 2 * T, head_dim),
        "slots": np.arange(T, dtype=np.int32),
        "out": np.zeros(size, np.float32),
        "n_head": n_head,
        "T": T,
        "head_dim": head_dim,
    }


def _kv_read(a):
    kv.kv_read[kv.kv_launch(a.n_head, a.T, a.head_dim)](a.cache, a.out, a.T, 2 * a.T, a.head_dim)


def _kv_gather(a):
    kv.kv_gather[kv.kv_launch(a.n_head, a.T, a.head_dim)](a.cache, a.slots, a.out, a.T, 2 * a.T, a.head_dim)


def _library_read(a):
    a.out[...] = a.cache[:, : a.T]


# --- attention and the matrix behind it ------------------------------------------------------------------------------


def _projection_inputs(rng, size):
    """A query a head in float16, a cache that is just full, the projection, and room for both ways to combine."""
    n_head, n_tokens, head_dim = size
    d_model = n_head * head_dim
    q, k, v = (_normal(rng, *shape).astype(np.float16) for shape in ((d_model,), size, size))
    shapes = decode_half.chunks_workspace(n_tokens, n_head, head_dim)
    work = dict(zip(("pairs", "sums", "arrived"), map(np.zeros, shapes, (np.float32, np.float32, np.int32))))
    lengths = decode_half.parts_workspace(n_tokens, n_head, head_dim)
    work |= dict(zip(("parts", "lse"), map(np.zeros, lengths, (np.float16, np.float32))))
    work |= {"attention": np.zeros(d_model, np.float16), "pos": np.array([n_tokens - 1], np.int32)}  # of one row
    W, bias = (_normal(rng, d_model, d_model) / 32).astype(np.float16), _normal(rng, d_model)
    sizes = {"n_head": n_head, "n_tokens": n_tokens, "head_dim": head_dim, "scale": np.float32(head_dim**-0.5)}
    # both ways add to out, which is 0 when the result is looked at
    return {"q": q, "k": k, "v": v, "W": W, "bias": bias, "out": np.zeros(d_model, np.float32), **work, **sizes}


def _combined_by_attention(a):
    d_model, attend = a.n_head * a.head_dim, decode_half.chunks_launch(a.n_tokens, a.n_head, a.head_dim)
    work = a.pairs, a.sums, a.arrived, a.pos
    decode_half.decode_v3_chunks[attend](a.q, a.k, a.v, a.attention, *work, a.head_dim, a.scale)
    gemv_bias_residual[gemv_residual_launch(d_model, d_model)](a.attention, a.W, a.bias, a.out, 1, d_model, d_model)


def _combined_by_the_product(a):
    d_model, attend = a.n_head * a.head_dim, decode_half.chunks_launch(a.n_tokens, a.n_head, a.head_dim)
    decode_half.decode_v4_parts[attend](a.q, a.k, a.v, a.parts, a.lse, a.pos, a.head_dim, a.scale)
    kernel, stride = fused.gemv_parts_residual, decode_half.lse_stride_of(attend[0][0])
    launch, sizes = gemv_residual_launch(d_model, d_model), (1, d_model, a.n_head, a.head_dim, attend[0][0], stride)
    kernel[launch](a.parts, a.lse, a.W, a.bias, a.out, a.pos, *sizes)


def _projection_expected(a):
    attention = decode_half.decode_half_reference(a.q.reshape(a.n_head, a.head_dim), a.k, a.v, a.n_tokens, a.scale)
    return (a.W.astype(np.float64) @ attention.ravel().astype(np.float64) + a.bias).astype(np.float32)


def _numpy_projection(a):
    q, k, v = (x.astype(np.float32) for x in (a.q.reshape(a.n_head, a.head_dim), a.k, a.v))
    scores = np.matmul(k, q[:, :, None])[:, :, 0] * a.scale
    e = np.exp(scores - scores.max(1, keepdims=True))
    attention = np.matmul((e / e.sum(1, keepdims=True))[:, None], v).ravel()
    a.out[...] = a.W.astype(np.float32) @ attention + a.bias


def _torch_projection(a):
    import torch

    q = a.q.view(1, a.n_head, 1, a.head_dim)
    attention = torch.nn.functional.scaled_dot_product_attention(q, a.k[None], a.v[None])
    a.out = torch.mv(a.W, attention.reshape(-1)) + a.bias


# --- sampling --------------------------------------------------------------------------------------------------------

SETTINGS = {
    "temperature": {"temperature": 0.8},
    "top-k 50": {"temperature": 0.8, "k": 50},
    "top-p 0.9": {"temperature": 0.8, "p": 0.9},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "k": 50, "p": 0.9},
}


def _sampling_inputs(rng, size):
    """Logits, and a step whose random number lies so far inside a token that float32 sums find the same token."""
    logits = 3 * _normal(rng, VOCAB_SIZE)
    weights = sampling.weights_reference(logits, **SETTINGS[size])
    edges = np.cumsum(np.maximum(weights, 0)) / np.maximum(weights, 0).sum()
    step = next(s for s in range(10000) if np.abs(sampling.uniform_reference(0, s) - edges).min() > 1e-4)
    return {
        "logits": logits,
        "weights": np.zeros(VOCAB_SIZE, np.int64),
        "out": np.zeros(1, np.int32),
        "number": np.array([sampling.uniform_reference(0, step)], np.float32),  # for the libraries
        "step": step,
        "settings": SETTINGS[size],
    }


def _sample(a):
    sampling.sample(a.logits, a.weights, a.out, VOCAB_SIZE, seed=0, step=a.step, **a.settings)


def _sampling_expected(a):
    weights = sampling.weights_reference(a.logits, **a.settings)
    return np.array([sampling.draw_reference(weights, sampling.uniform_reference(0, a.step))])


def _numpy_sample(a):
    k, p = a.settings.get("k"), a.settings.get("p")
    probabilities = np.exp((a.logits - a.logits.max()) / np.float32(a.settings["temperature"]))
    if k is not None or p is not None:
        order = np.argsort(-a.logits)[:k]
        kept = probabilities[order]
        if p is not None:
            running = np.cumsum(kept)
            kept[running - kept >= p * running[-1]] = 0  # those in front of which p was reached
        probabilities[...] = 0
        probabilities[order] = kept
    running = np.cumsum(probabilities)
    a.out[0] = np.searchsorted(running, a.number[0] * running[-1], side="right")


def _torch_sample(a):
    """Sort, cut, softmax, and the running sum at which the number lies; the usual way, but with a number given."""
    import torch

    k, p = a.settings.get("k"), a.settings.get("p")
    scaled = a.logits / a.settings["temperature"]
    if k is not None:
        values, order = torch.topk(scaled, k)
    elif p is not None:
        values, order = torch.sort(scaled, descending=True)
    if k is None and p is None:
        probabilities = torch.softmax(scaled, 0)
    else:
        kept = torch.softmax(values, 0)
        if p is not None:
            kept = kept.masked_fill(torch.cumsum(kept, 0) - kept >= p, 0)
        probabilities = torch.zeros_like(scaled).scatter_(0, order, kept)
    running = torch.cumsum(probabilities, 0)
    a.out.copy_(torch.searchsorted(running, a.number * running[-1:], right=True))


LADDERS = [
    _gelu_ladder(
        "gelu",
        "GELU in its tanh form",
        ch13.gelu_kernel,
        ch13.gelu_reference,
        {"cpu": ("NumPy, step by step", _numpy_gelu), "gpu": ("`torch` gelu", _torch_gelu("tanh"))},
    ),
    _gelu_ladder(
        "gelu_erf",
        "Exact GELU",
        ch13.gelu_erf,
        ch13.gelu_erf_reference,
        {"gpu": ("`torch` gelu", _torch_gelu("none"))},
    ),
    Ladder(
        name="swiglu",
        title="SwiGLU, tokens × d_ff",
        unit="GB/s",
        sizes={"cpu": [(1, 11008), (256, 11008)], "gpu": [(1, 11008), (1024, 11008), (4096, 11008)]},
        make=_swiglu_inputs,
        work=lambda size: 12 * size[0] * size[1],
        versions={"silu, then multiply": _silu_then_multiply, "swiglu": _swiglu, "swiglu_fused": _swiglu_fused},
        expected=lambda a: ch13.swiglu_fused_reference(a.gate_up).ravel(),
        library={"cpu": ("NumPy, step by step", _numpy_swiglu), "gpu": ("`torch` silu, mul", _torch_swiglu)},
    ),
    _rope_ladder(
        "interleaved",
        "RoPE, interleaved",
        rope.rope_interleaved_v1_sincos,
        rope.rope_interleaved_v2_table,
        rope.rope_interleaved_reference,
        {"cpu": ("NumPy, complex", _numpy_interleaved), "gpu": ("`torch`, complex", _torch_interleaved)},
    ),
    _rope_ladder(
        "halves",
        "RoPE, halves",
        rope.rope_halves_v1_sincos,
        rope.rope_halves_v2_table,
        rope.rope_halves_reference,
        {"cpu": ("NumPy, step by step", _numpy_halves), "gpu": ("`torch`, step by step", _torch_halves)},
    ),
    Ladder(
        name="kv_append",
        title="Appending to the cache, heads × tokens × head_dim",
        unit="GB/s",
        sizes={"cpu": [(12, 1, 64), (12, 1024, 64)], "gpu": [(12, 1, 64), (12, 1024, 64), (32, 4096, 128)]},
        make=_append_inputs,
        work=lambda size: 16 * np.prod(size, dtype=float),
        versions={"kv_append": _kv_append},
        expected=lambda a: np.stack(kv.kv_append_reference(a.k, a.v, a.out[0], a.out[1], a.first)),
        library={"cpu": ("NumPy, slices", _library_append), "gpu": ("`torch`, slices", _library_append)},
        tolerance=0,
    ),
    Ladder(
        name="kv_read",
        title="Reading half of a cache, heads × tokens × head_dim",
        unit="GB/s",
        sizes={"cpu": [(12, 64, 64), (12, 1024, 64)], "gpu": [(12, 64, 64), (12, 1024, 64), (32, 4096, 128)]},
        make=_read_inputs,
        work=lambda size: 8 * np.prod(size, dtype=float),
        versions={"kv_read": _kv_read, "kv_gather": _kv_gather},
        expected=lambda a: a.cache[:, : a.T],
        library={"cpu": ("NumPy, slice", _library_read), "gpu": ("`torch`, slice", _library_read)},
        tolerance=0,
    ),
    Ladder(
        name="projection",
        title="Attention of one query a head in float16, and the matrix behind it, heads × tokens × head_dim",
        unit="GB/s",
        sizes={"cpu": [(12, 100, 64)], "gpu": [(12, 100, 64), (12, 400, 64), (12, 1024, 64)]},
        make=_projection_inputs,
        work=lambda size: 2 * (2 * size[0] * size[1] * size[2] + (size[0] * size[2]) ** 2),
        versions={
            "decode_v3_chunks, gemv_bias_residual": _combined_by_attention,
            "decode_v4_parts, gemv_parts_residual": _combined_by_the_product,
        },
        expected=_projection_expected,
        library={"cpu": ("NumPy, by way of float32", _numpy_projection), "gpu": ("`torch`", _torch_projection)},
        tolerance=4e-3,
    ),
    Ladder(
        name="sampling",
        title=f"Sampling one of {VOCAB_SIZE} tokens, logits a second",
        unit="M/s",
        share="library",
        sizes={"cpu": list(SETTINGS), "gpu": list(SETTINGS)},
        make=_sampling_inputs,
        work=lambda size: VOCAB_SIZE,
        versions={"sample": _sample},
        expected=_sampling_expected,
        library={"cpu": ("NumPy, by sorting", _numpy_sample), "gpu": ("`torch`, by sorting", _torch_sample)},
        tolerance=0,
        label=str,
    ),
]
QUICK = {  # for the demo
    "gelu": [256],
    "gelu_erf": [64],
    "swiglu": [(64, 11008)],
    "rope_interleaved": [(12, 256, 64)],
    "rope_halves": [(12, 256, 64)],
    "kv_append": [(12, 1, 64), (12, 256, 64)],
    "kv_read": [(12, 256, 64)],
    "projection": [(12, 100, 64)],
    "sampling": ["temperature", "top-k 50, top-p 0.9"],
}
