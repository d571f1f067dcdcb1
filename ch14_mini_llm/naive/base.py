"""What a listing needs besides its forward pass: weights on the device, checks, and the loop from token to token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.request import Sampling, check_length, check_max_length, check_tokens
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.weights import load_weights
from ch14_mini_llm.naive.sampler import chooser
from common.trace import Launch, trace


class Listing:
    """A model whose forward pass runs over the whole sequence at each step: the level ``naive`` of ``--engine``.

    config: the sizes. tensors: name -> fp16 or fp32 array, as `load_weights` gives them; they are copied to the device
    here, in float32. max_length: the longest sequence in tokens, at most (and by default) config.n_ctx.
    on_tensor(name, n_values): called after each upload. Raises `RequestError` if max_length is not in 1 ... n_ctx.
    """

    LAYER = "h.{}."  # in front of the names of a block's tensors

    def __init__(
        self,
        config: GPT2Config,
        tensors: dict[str, np.ndarray],
        max_length: int | None = None,
        on_tensor: Callable[[str, int], None] | None = None,
    ) -> None:
        self.config = config
        self.max_length = check_max_length(max_length, config.n_ctx)
        self.weights = {}
        for name, tensor in self.arrays(tensors):
            self.weights[name] = cuda.to_device(np.ascontiguousarray(tensor, dtype=np.float32))
            if on_tensor is not None:
                on_tensor(name, tensor.size)
        self.layers = [self._layer(layer) for layer in range(config.n_layer)]
        self._tokens = cuda.device_array(self.max_length, np.int32)

    @classmethod
    def from_file(cls, path: str | os.PathLike, **options) -> Listing:
        """The model in a weight file; options as for the class. Raises `WeightsError` like `load_weights`."""
        return cls(*load_weights(path), **options)

    def arrays(self, tensors: dict) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors in the layout that the listing's kernels take."""
        yield from tensors.items()

    def forward(self, tokens: Sequence[int], choose: Callable | None = None) -> int:
        """The token id that follows `tokens`: what a listing lists."""
        raise NotImplementedError

    def check_length(self, length: int) -> None:
        """Raises `RequestError` if a sequence of `length` tokens does not fit the buffers."""
        check_length(length, self.max_length, self.config.n_ctx)

    def put(self, tokens: Sequence[int]) -> int:
        """Check `tokens` and copy them to the device; returns how many there are."""
        check_tokens(tokens, self.config.vocab_size)
        self.check_length(len(tokens))
        self._tokens[: len(tokens)].copy_to_device(np.asarray(tokens, np.int32))
        return len(tokens)

    def prefill(self, tokens: Sequence[int]) -> int:
        """The most likely token id after a prompt, like `forward`: the name that all levels have for it."""
        return self.forward(tokens)

    def stream(self, tokens: Sequence[int], max_new: int, sampling: Sampling | None = None) -> Iterator[int]:
        """Yield `max_new` token ids that follow `tokens`, one step each; -1 where all logits are NaN.

        What the levels of ``--engine`` differ in. It checks nothing: `ch14_mini_llm.levels.generate.generate` does.
        """
        tokens, choose = list(tokens), chooser(sampling, self.config.vocab_size)
        for _ in range(max_new):
            tokens.append(self.forward(tokens, choose))
            yield tokens[-1]

    def trace_step(self, tokens: Sequence[int], sampling: Sampling | None = None) -> list[Launch]:
        """Every kernel launch of the step that follows `tokens`, in order, as `common.trace` records them."""
        choose = chooser(sampling, self.config.vocab_size)
        with trace() as launches:
            self.forward(tokens, choose)
        return launches

    def _layer(self, layer: int) -> dict:
        """The weights of one transformer block, by their names without ``h.{layer}.`` in front."""
        prefix = self.LAYER.format(layer)
        return {name.removeprefix(prefix): w for name, w in self.weights.items() if name.startswith(prefix)}
