"""The sizes of a GPT-2 and of a Llama, and the epsilon of GPT-2's layer norms, which is the same for all sizes.

Other modules say what a model of these sizes has in its file, and import this one: so the properties that ask them
import them only then.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from ch14_mini_llm.model.header import LIMITS, WeightsError

LAYER_NORM_EPS = 1e-5


def check_sizes(config) -> None:
    """Raises `WeightsError` for a size of a configuration that is no integer or that no model can have."""
    for field, value in asdict(config).items():
        if field not in LIMITS:
            continue
        low, high = LIMITS[field]
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise WeightsError(f"{field} is {value!r}; it must be an integer from {low} to {high}")
        if not low <= value <= high:
            raise WeightsError(f"{field} is {value}; it must be from {low} to {high}")


@dataclass(frozen=True)
class GPT2Config:
    """The sizes of a GPT-2. Raises `WeightsError` for sizes no model can have.

    n_layer: transformer blocks; n_head: attention heads a block; d_model: width of the residual stream;
    d_ff: width of the MLP's hidden layer (4 * d_model in every published GPT-2); n_ctx: longest sequence in tokens;
    vocab_size: number of token ids.
    """

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    n_ctx: int
    vocab_size: int

    architecture: ClassVar[str] = "gpt2"

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.d_model % self.n_head:
            raise WeightsError(
                f"d_model is {self.d_model} and n_head is {self.n_head}; d_model must be a multiple of n_head, "
                "so that every head has the same width"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, d_model / n_head."""
        return self.d_model // self.n_head

    @property
    def n_parameters(self) -> int:
        """Number of stored values (the tied head counts once)."""
        from ch14_mini_llm.model.weights import tensor_table

        return sum(math.prod(shape) for _, shape, _ in tensor_table(self))

    @property
    def file_bytes(self) -> int:
        """Length in bytes of a weight file of these sizes, of the version that is written."""
        from ch14_mini_llm.model.weights import gpt2_layout

        return gpt2_layout(self).end


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama: as `GPT2Config`, and n_kv_head: heads of keys and values, each serving n_head / n_kv_head
    query heads; head_dim, which need not be d_model / n_head; epsilon: of its RMS norms; rotary_base: of its positions;
    tied_head: whether the output head is the token embedding. Raises `WeightsError` for what no model can have."""

    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_model: int
    d_ff: int
    n_ctx: int
    vocab_size: int
    epsilon: float
    rotary_base: float
    tied_head: bool

    architecture: ClassVar[str] = "llama"

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.n_head % self.n_kv_head:
            raise WeightsError(
                f"n_head is {self.n_head} and n_kv_head is {self.n_kv_head}; n_head must be a multiple of n_kv_head"
            )
        if self.head_dim % 2:
            raise WeightsError(f"head_dim is {self.head_dim}; it must be even: numbers are turned in pairs")

    @property
    def n_parameters(self) -> int:
        """Number of stored values (a tied head counts once)."""
        from ch14_mini_llm.model.llama import llama_tensors

        return sum(math.prod(shape) for _, shape in llama_tensors(self))
