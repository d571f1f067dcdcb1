"""The sizes of a GPT-2, and the epsilon of its layer norms, which is the same for all sizes.

`weights.py` says what a model of these sizes has in its file, and imports this module: so the two properties that ask
it import it only then.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from ch14_mini_llm.model.header import LIMITS, WeightsError

LAYER_NORM_EPS = 1e-5


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

    def __post_init__(self) -> None:
        for field, value in asdict(self).items():
            low, high = LIMITS[field]
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise WeightsError(f"{field} is {value!r}; it must be an integer from {low} to {high}")
            if not low <= value <= high:
                raise WeightsError(f"{field} is {value}; it must be from {low} to {high}")
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
