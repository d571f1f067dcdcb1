"""What the models of all levels have in common: sizes, weights on the device, and how long a sequence may be."""

from __future__ import annotations

import os
from collections.abc import Callable

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.request import RequestError
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.weights import load_weights


class Model:
    """A GPT-2's weights on the device, to be made into a model of some level.

    config: the sizes. tensors: name -> fp16 or fp32 array, as `load_weights` gives them; they are copied to the device
    here, as `_upload` says. max_length: the longest sequence in tokens, at most (and by default) config.n_ctx.
    on_tensor(name, n_values): called after each upload. Raises `RequestError` if max_length is not in 1 ... n_ctx, or
    as `_check`.
    """

    def __init__(
        self,
        config: GPT2Config,
        tensors: dict[str, np.ndarray],
        max_length: int | None = None,
        on_tensor: Callable[[str, int], None] | None = None,
    ) -> None:
        self.config = config
        self.max_length = config.n_ctx if max_length is None else max_length
        if not 1 <= self.max_length <= config.n_ctx:
            raise RequestError(f"max_length is {self.max_length}; this model's context is 1 to {config.n_ctx} tokens")
        self._check()
        self.weights = {}
        for name, tensor in tensors.items():
            self.weights[name] = self._upload(name, tensor)
            if on_tensor is not None:
                on_tensor(name, tensor.size)
        self.layers = [self._layer(layer) for layer in range(config.n_layer)]

    @classmethod
    def from_file(cls, path: str | os.PathLike, **options) -> Model:
        """The model in a weight file; options as for the class. Raises `WeightsError` like `load_weights`."""
        return cls(*load_weights(path), **options)

    def check_length(self, length: int) -> None:
        """Raises `RequestError` if a sequence of `length` tokens does not fit the buffers."""
        if length > self.max_length:
            longer = f" or make the model with max_length up to {self.config.n_ctx}"
            raise RequestError(
                f"{length} tokens, but the buffers of this model are for {self.max_length}: shorten the sequence"
                + (longer if self.max_length < self.config.n_ctx else "")
            )

    def _check(self) -> None:
        """Raises `RequestError` for sizes that the level's kernels do not take."""

    def _upload(self, name: str, tensor: np.ndarray):
        """A weight on the device: in float32, as it is stored."""
        return cuda.to_device(np.ascontiguousarray(tensor, dtype=np.float32))

    def _layer(self, layer: int) -> dict:
        """The weights of one transformer block, by their names without ``h.{layer}.``."""
        prefix = f"h.{layer}."
        return {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}
