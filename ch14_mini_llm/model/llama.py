"""Llama's names, and the roles that stand behind them: tables, and no second forward.

Names are those of Hugging Face's checkpoints, without "model." in front; matrices are (n_out, n_in), as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ch14_mini_llm.model.config import LlamaConfig
from ch14_mini_llm.model.roles import Layer, Linear, Model, Norm

EMBEDDING, LAST_NORM, HEAD = "embed_tokens.weight", "norm.weight", "lm_head.weight"
# role in a `Layer` -> names of its tensors, behind "layers.{layer}."; several are one product, their rows one below the
# other
NORMS = {"norm_1": "input_layernorm.weight", "norm_2": "post_attention_layernorm.weight"}
LINEARS = {
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "proj": ("self_attn.o_proj.weight",),
    "up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "down": ("mlp.down_proj.weight",),
}
MATRICES = *LINEARS, "head"  # kinds of what is uploaded


def llama_tensors(config: LlamaConfig) -> list[tuple[str, tuple[int, ...]]]:
    """[(name, shape)] of a Llama's tensors, in file order."""
    d, q, kv = config.d_model, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    names = [name for several in LINEARS.values() for name in several]
    rows = dict(zip(names, (q, kv, kv, d, config.d_ff, config.d_ff, d), strict=True))
    n_in = {"self_attn.o_proj.weight": q, "mlp.down_proj.weight": config.d_ff}
    layer = [(name, (d,)) for name in NORMS.values()]
    layer += [(name, (n_out, n_in.get(name, d))) for name, n_out in rows.items()]
    tensors = [(EMBEDDING, (config.vocab_size, d))]
    tensors += [(f"layers.{i}.{name}", shape) for i in range(config.n_layer) for name, shape in layer]
    tensors.append((LAST_NORM, (d,)))
    return tensors if config.tied_head else [*tensors, (HEAD, (config.vocab_size, d))]


def llama(
    config: LlamaConfig,
    tensors: Mapping[str, object],
    upload: Callable[[list, str], object],
    rotary: tuple,
    on_tensor: Callable[[str, int], None] | None = None,
) -> Model:
    """A Llama's tensors (of `load_weights`) as a `Model`.

    upload(tensors, kind): copies some tensors, their rows one below the other, to the device, in the type and layout
    wanted; kind: a matrix's role in a `Layer`, or "head" (n_out, n_in each); "embedding", "vector" or "zeros", which
    are as many as the list's one number.
    rotary: cosines and sines on the device. on_tensor(name, n_values): called after each upload.
    """
    zeros: dict[int, object] = {}

    def put(names, kind="vector"):
        array = upload([tensors[name] for name in names], kind)
        if on_tensor is not None:
            for name in names if (kind, names) != ("head", [EMBEDDING]) else ():  # a tied head's have been counted
                on_tensor(name, tensors[name].size)
        return array

    def norm(name):
        return Norm(put([name]), None, config.epsilon)

    def linear(names, role):
        n_out, n_in = sum(tensors[name].shape[0] for name in names), tensors[names[0]].shape[1]
        if n_out not in zeros:
            zeros[n_out] = upload([n_out], "zeros")
        return Linear(put(names, role), zeros[n_out], n_in, n_out)

    def layer(index):
        norms = {role: norm(f"layers.{index}.{name}") for role, name in NORMS.items()}
        linears = {
            role: linear([f"layers.{index}.{name}" for name in names], role) for role, names in LINEARS.items()
        }
        return Layer(index, **norms, **linears)

    embedding = put([EMBEDDING], "embedding"), None
    layers = tuple(layer(index) for index in range(config.n_layer))
    head = linear([EMBEDDING if config.tied_head else HEAD], "head")
    return Model(
        config.n_head, config.n_kv_head, config.head_dim, config.d_model, config.d_ff, config.n_ctx, config.vocab_size,
        embedding, layers, norm(LAST_NORM), head, rotary, gated=True,
    )  # fmt: skip


def rows_of(tensors: list, unpack: Callable[[object], np.ndarray]) -> np.ndarray:
    """Some matrices as one, their rows one below the other."""
    return unpack(tensors[0]) if len(tensors) == 1 else np.concatenate([unpack(tensor) for tensor in tensors])
