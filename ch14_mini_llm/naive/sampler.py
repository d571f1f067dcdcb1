"""Chapter 13's sampling in the form that a forward pass takes."""

from __future__ import annotations

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.request import Sampling
from chapters.ch13_llm_ops.sampling import sample


class Sampler:
    """Chapter 13's sampling in the form that `GPT2.forward` takes; call number s of it is step s of the seed."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.sampling, self.vocab_size, self.step = sampling, vocab_size, 0
        self.weights = cuda.device_array(vocab_size, np.int64)

    def __call__(self, logits, next_token) -> None:
        """Draw `next_token` (1,) int32 from `logits` (vocab_size,) float32, both on the device."""
        s = self.sampling
        sample(logits, self.weights, next_token, self.vocab_size, s.temperature, s.top_k, s.top_p, s.seed, self.step)
        self.step += 1


def chooser(sampling: Sampling | None, vocab_size: int) -> Sampler | None:
    """A `Sampler`, or None for the most likely token every time."""
    sampling = sampling and sampling.plain()
    return None if sampling is None else Sampler(sampling, vocab_size)
