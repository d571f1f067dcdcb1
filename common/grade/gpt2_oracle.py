"""A GPT-2 in NumPy and float64, with random weights: what the exercises of chapter 14 are compared with.

sizes: a dict of the six numbers of ``GPT2Config``. tensors: as `weights` makes them.
"""

import numpy as np

from .student import random


def weights(sizes, seed=0, wte=1.0, wpe=1.0):
    """Random weights, all of a size that matters: {tensor: float32}, named and shaped as in the weight file.

    wte, wpe: the spread of the embeddings. With 1 a token is followed by itself, mostly; with 0.2 and 0.5 texts vary.
    """
    rng, d, d_ff = random(seed), sizes["d_model"], sizes["d_ff"]
    shapes = {"wte.weight": (sizes["vocab_size"], d), "wpe.weight": (sizes["n_ctx"], d)}
    for i in range(sizes["n_layer"]):
        wide = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, d_ff), "mlp.c_proj": (d_ff, d)}
        for part, shape in wide.items():
            shapes |= {f"h.{i}.{part}.weight": shape, f"h.{i}.{part}.bias": shape[1:]}
        shapes |= {f"h.{i}.ln_{k}.{what}": (d,) for k in (1, 2) for what in ("weight", "bias")}
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    made = {}
    for key, shape in shapes.items():
        noise = rng.standard_normal(shape).astype(np.float32)
        scale = 0.1 if len(shape) == 1 else shape[0] ** -0.5
        scale = {"wte.weight": wte, "wpe.weight": wpe}.get(key, scale)
        made[key] = noise * np.float32(scale) + np.float32("ln_" in key and key.endswith("weight"))
    return made


def oracle(sizes, tensors, tokens, causal=True, scale=None):
    """(logits, K, V) of ``tokens``, in float64.

    logits: (T, vocab_size), those that follow each position. K, V: (n_layer, n_head, T, head_dim). causal, scale: of
    attention; with other values than these, what a model gives that has it wrong. None is 1 / sqrt(head_dim).
    """
    T, w = len(tokens), tensors
    heads = lambda a: a.reshape(T, sizes["n_head"], -1).transpose(1, 0, 2)
    linear = lambda a, part: a @ w[f"{part}.weight"].astype(np.float64) + w[f"{part}.bias"]

    def norm(a, part):
        centred = a - a.mean(1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * w[f"{part}.weight"] + w[f"{part}.bias"]

    x, keys, values = w["wte.weight"][tokens].astype(np.float64) + w["wpe.weight"][:T], [], []
    for i in range(sizes["n_layer"]):
        q, k, v = (heads(a) for a in np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=1))
        keys, values = [*keys, k], [*values, v]
        scores = q @ k.transpose(0, 2, 1) * (q.shape[2] ** -0.5 if scale is None else scale)
        scores = np.where(np.tri(T, dtype=bool) | (not causal), scores, -np.inf)
        e = np.exp(scores - scores.max(2, keepdims=True))
        x = x + linear((e / e.sum(2, keepdims=True) @ v).transpose(1, 0, 2).reshape(T, -1), f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        h = h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
        x = x + linear(h, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].astype(np.float64).T, np.stack(keys), np.stack(values)


def prompt(sizes, n, seed=0):
    """``n`` random token ids."""
    return random(seed).integers(0, sizes["vocab_size"], n).tolist()
