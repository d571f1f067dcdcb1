"""Which types of weights each level takes."""

from __future__ import annotations

from ch14_mini_llm.engine.request import RequestError

DTYPES = {  # the default first
    "naive": ("float32",), "kv": ("float32", "float16", "int8", "int4"), "fast": ("float16",),
}  # fmt: skip


def check_dtype(level: str, dtype: str | None) -> str:
    """The type of a level's weights; None: its default. Raises `RequestError` for one that it does not take."""
    if dtype is not None and dtype not in DTYPES[level]:
        levels = [other for other, dtypes in DTYPES.items() if dtype in dtypes]
        there = f"use engine {' or '.join(levels)}" if levels else f"use {' or '.join(DTYPES[level])}"
        raise RequestError(f"dtype is {dtype!r}; engine {level} keeps weights as {' or '.join(DTYPES[level])}: {there}")
    return dtype or DTYPES[level][0]
