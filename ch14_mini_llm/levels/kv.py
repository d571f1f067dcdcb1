"""GPT-2 with a key-value cache: the level ``kv`` of ``--engine``.

A token's key and value do not change once they are computed, so a step runs over the new token alone and reads those of
the others from the cache (chapter 13). Everything else is `GPT2` as it is, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.request import RequestError, Sampling
from ch14_mini_llm.levels.sampler import chooser
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.naive.gpt2 import GPT2
from chapters.ch12_flash.decode import decode_attention, decode_splits, decode_workspace
from chapters.ch13_llm_ops.kv_cache import kv_append, kv_launch
from common.trace import Launch, trace


class CachedGPT2(GPT2):
    """A `GPT2` that runs over each token once. Arguments, and the `RequestError` raised, are those of `GPT2`.

    k_cache, v_cache: a layer each, (n_head, max_length, head_dim) float32 on the device. length: tokens in the cache.
    """

    def __init__(
        self,
        config: GPT2Config,
        tensors: dict[str, np.ndarray],
        max_length: int | None = None,
        on_tensor: Callable[[str, int], None] | None = None,
    ) -> None:
        super().__init__(config, tensors, max_length, on_tensor)
        shape = (config.n_head, self.max_length, config.head_dim)
        self.k_cache = [cuda.device_array(shape, np.float32) for _ in range(config.n_layer)]
        self.v_cache = [cuda.device_array(shape, np.float32) for _ in range(config.n_layer)]
        self.length = 0
        self._pos = cuda.device_array(1, np.int32)
        n_split = decode_splits(self.max_length, config.n_head)
        pairs, sums = decode_workspace(config.n_head, n_split, config.head_dim)
        self._pairs, self._sums = cuda.device_array(pairs, np.float32), cuda.device_array(sums, np.float32)

    def prefill(self, tokens: Sequence[int], choose: Callable | None = None) -> int:
        """Forget the cache, run over a prompt, and return the id that follows it; `choose` as in `GPT2.forward`."""
        T = self.put(tokens)
        self.length = 0
        return self._run(T, 0, choose)

    def decode(self, token: int, choose: Callable | None = None) -> int:
        """Run over one more token and return the id that follows it. Raises `RequestError` if the cache is full."""
        if self.length == self.max_length:
            raise RequestError(f"the cache is full: it has {self.length} of {self.max_length} tokens; start again")
        return self._run(self.put([token]), self.length, choose)

    def stream(self, tokens: Sequence[int], max_new: int, sampling: Sampling | None = None) -> Iterator[int]:
        """Yield `max_new` token ids that follow `tokens`: a prefill, then a step a token. One stream at a time."""
        choose = chooser(sampling, self.config.vocab_size)
        token = self.prefill(tokens, choose)
        yield token
        for _ in range(max_new - 1):
            token = self.decode(max(token, 0), choose)
            yield token

    def trace_step(self, tokens: Sequence[int], sampling: Sampling | None = None) -> list[Launch]:
        """Every kernel launch of the step over the last of `tokens`, those before it being in the cache."""
        choose = chooser(sampling, self.config.vocab_size)
        if len(tokens) > 1:
            self.prefill(tokens[:-1])
        else:
            self.length = 0
        with trace() as launches:
            self.decode(tokens[-1], choose)
        return launches

    def _run(self, T: int, first: int, choose: Callable | None) -> int:
        self._pos.copy_to_device(np.array([first], np.int32))
        token = super()._run(T, first, choose)
        self.length = first + T
        return token

    def _attend(self, b: SimpleNamespace, T: int, layer: int, first: int) -> None:
        n_head, head_dim = self.config.n_head, self.config.head_dim
        k_cache, v_cache = self.k_cache[layer], self.v_cache[layer]
        stored = b.k, b.v, k_cache, v_cache, self._pos
        kv_append[kv_launch(n_head, T, head_dim)](*stored, T, self.max_length, head_dim)
        if first == 0:
            return super()._attend(b, T, layer, first)
        q, att = b.q.reshape(n_head, head_dim), b.att.reshape(n_head, head_dim)
        decode_attention(q, k_cache, v_cache, self._pairs, self._sums, att, first + T, head_dim**-0.5)
