"""A model on the device as records of what its weights are for: no names of a checkpoint below this line.

A transformer block is a norm, a product that makes queries, keys and values, attention, a product back; another norm, a
product up, an activation, a product down. What differs from model to model is in the records, not in the forward.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FewBits:
    """A weight of 8 or 4 bits. arrays: on the device, as the products of chapter 9's ``quantized.py`` take them."""

    bits: int
    arrays: tuple

    @property
    def dtype(self) -> str:
        """As `Engine.of` takes it."""
        return f"int{self.bits}"


@dataclass(frozen=True)
class Linear:
    """y = x @ weight + bias. weight: on the device, in chapter 9's panels or `FewBits`, or for the level ``fast``
    (n_out, n_in). bias: (n_out,), or None.

    row_sums: (n_out,), if a layer norm in front has been moved into weight and bias, see chapter 9's ``fold_norm``.
    """

    weight: object
    bias: object
    n_in: int
    n_out: int
    row_sums: object = None


@dataclass(frozen=True)
class Norm:
    """A layer norm, or without a bias an RMS norm. weight, bias: (d_model,) on the device. eps: added to the variance,
    or to the mean square."""

    weight: object
    bias: object
    eps: float


@dataclass(frozen=True)
class Layer:
    """One transformer block. qkv: queries, keys and values of a row one behind the other. up: in a gated model, a row's
    d_ff gates and then its d_ff values."""

    index: int
    norm_1: Norm
    qkv: Linear
    proj: Linear
    norm_2: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Model:
    """A whole model.

    embedding: of tokens (vocab_size, d_model), and of positions (n_ctx, d_model), None where they are rotary. head: if
    it is tied, its weight has the numbers of the embedding, in the layout of a product. n_kv_head: key heads, each
    serving n_head / n_kv_head heads. rotary: (cosines, sines), (n_ctx, head_dim / 2) each, or None. gated: SwiGLU, not
    GELU.
    """

    n_head: int
    n_kv_head: int
    head_dim: int
    d_model: int
    d_ff: int
    n_ctx: int
    vocab_size: int
    embedding: tuple
    layers: tuple[Layer, ...]
    norm: Norm
    head: Linear
    rotary: tuple | None = None
    gated: bool = False
