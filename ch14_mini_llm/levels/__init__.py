"""The levels of the engine: the same model, from the readable forward pass to what a GPU can do."""

from __future__ import annotations

from ch14_mini_llm.engine.request import RequestError

ENGINES = {
    "naive": "the readable forward pass over the whole sequence at each step, float32 (naive/gpt2.py); the oracle",
    "kv": "naive with a key-value cache: a step runs over one token (levels/kv.py)",
    "fast": "float16, tensor cores, FlashAttention, and a step as one CUDA graph (levels/fast.py)",
}


def make_engine(level: str, config, tensors, max_length=None, on_tensor=None):
    """A model of the level ``naive``, ``kv`` or ``fast``; the other arguments, and the errors raised, as `GPT2`'s.

    Raises `RequestError` for another level.
    """
    if level not in ENGINES:
        raise RequestError(f"engine is {level!r}; it must be one of {', '.join(ENGINES)}")
    if level == "naive":
        from ch14_mini_llm.naive.gpt2 import GPT2 as engine
    elif level == "kv":
        from ch14_mini_llm.levels.kv import CachedGPT2 as engine
    else:
        from ch14_mini_llm.levels.fast import FastGPT2 as engine
    return engine(config, tensors, max_length, on_tensor)
