"""GPT-2's names, and the roles that stand behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ch14_mini_llm.model.config import LAYER_NORM_EPS, GPT2Config
from ch14_mini_llm.model.roles import Layer, Linear, Model, Norm

# role in a `Layer` -> names of its tensors, behind "h.{layer}."
NORMS = {"norm_1": "ln_1", "norm_2": "ln_2"}
LINEARS = {"qkv": "attn.c_attn", "proj": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}


def gpt2(
    config: GPT2Config,
    tensors: Mapping[str, np.ndarray],
    upload: Callable[[np.ndarray, str], object],
    on_tensor: Callable[[str, int], None] | None = None,
) -> Model:
    """A GPT-2's tensors (of `load_weights`) as a `Model`.

    upload(array, kind): copies an array to the device, in the type and layout wanted; kind: "matrix" (n_in, n_out),
    "embedding" or "vector". on_tensor(name, n_values): called after each upload.
    """

    def put(name, kind="vector"):
        array = upload(tensors[name], kind)
        if on_tensor is not None:
            on_tensor(name, tensors[name].size)
        return array

    def norm(name):
        return Norm(put(f"{name}.weight"), put(f"{name}.bias"), LAYER_NORM_EPS)

    def linear(name):
        return Linear(put(f"{name}.weight", "matrix"), put(f"{name}.bias"), *tensors[f"{name}.weight"].shape)

    def layer(index):
        norms = {role: norm(f"h.{index}.{name}") for role, name in NORMS.items()}
        return Layer(index, **norms, **{role: linear(f"h.{index}.{name}") for role, name in LINEARS.items()})

    embedding = put("wte.weight", "embedding"), put("wpe.weight", "embedding")
    layers = tuple(layer(index) for index in range(config.n_layer))
    return Model(
        config.n_head, config.n_head, config.head_dim, config.d_model, config.d_ff, config.n_ctx, config.vocab_size,
        embedding, layers, norm("ln_f"), Linear(embedding[0], None, config.d_model, config.vocab_size),
    )  # fmt: skip
