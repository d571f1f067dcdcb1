"""The model that a level runs."""

from __future__ import annotations

from collections.abc import Callable

from ch14_mini_llm.engine.dtypes import check_dtype
from ch14_mini_llm.engine.sizes import check_level
from ch14_mini_llm.model.roles import Model
from ch14_mini_llm.model.upload import float16_model, panels_model

MODELS = {"kv": panels_model, "fast": float16_model}


def model_of(config, tensors, level: str, on_tensor: Callable | None = None, dtype: str | None = None) -> Model:
    """The weights that `load_weights` gives on the device, as a level takes them; on_tensor, dtype: as for `Engine.of`.
    Raises `RequestError`."""
    check_level(level)
    return MODELS[level](config, tensors, on_tensor, check_dtype(level, dtype))
