"""The levels of the engine: the same model, from the readable forward pass to what a GPU can do."""

from __future__ import annotations

from ch14_mini_llm.engine.dtypes import check_dtype
from ch14_mini_llm.engine.request import RequestError

ENGINES = {
    "naive": "the readable forward pass over the whole sequence at each step, float32 (naive/gpt2.py); the oracle",
    "kv": "the engine in float32: keys and values in pages, a step runs over one token (forward/plain.py)",
    "fast": "the engine in float16: tensor cores, FlashAttention, a step as one CUDA graph (forward/few.py, many.py)",
}


def make_engine(level: str, config, tensors, max_length=None, on_tensor=None, dtype=None, speculate=None):
    """A model of the level ``naive``, ``kv`` or ``fast``; the other arguments, and the errors raised, as `GPT2`'s.

    dtype: of the weights, "float32" or "float16"; None: the level's default. speculate: "ngram" guesses tokens, not on
    the level ``naive``. Raises `RequestError` for another level, or what the level does not take.
    """
    if level not in ENGINES:
        raise RequestError(f"engine is {level!r}; it must be one of {', '.join(ENGINES)}")
    check_dtype(level, dtype)
    if level == "naive":
        if speculate is not None:
            raise RequestError("speculate is given, but the level naive has no guesses: use kv or fast", "speculate")
        if config.architecture == "llama":
            from ch14_mini_llm.naive.llama import Llama as Listed
        else:
            from ch14_mini_llm.naive.gpt2 import GPT2 as Listed
        return Listed(config, tensors, max_length, on_tensor)
    from ch14_mini_llm.levels.single import Single

    return Single(config, tensors, max_length, on_tensor, level, dtype, speculate)
