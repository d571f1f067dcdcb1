"""A GPT-2 to be timed: its sizes, and weights that have learned nothing, on which the time does not depend."""

import numpy as np

from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.model.weights import tensor_table

GPT2_124M = GPT2Config(n_layer=12, n_head=12, d_model=768, d_ff=3072, n_ctx=1024, vocab_size=50257)


def random_weights(config, seed=0, std=0.02):
    """{name: fp16 array of the shape in `tensor_table`}: what a GPT-2 holds before its training.

    Matrices and embeddings are normal with standard deviation ``std``, biases 0, layer norm's weights 1.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape, _ in tensor_table(config):
        if len(shape) == 2:
            tensors[name] = (std * rng.standard_normal(shape, dtype=np.float32)).astype(np.float16)
        else:
            tensors[name] = np.full(shape, ".ln_" in f".{name}" and name.endswith("weight"), np.float16)
    return tensors
