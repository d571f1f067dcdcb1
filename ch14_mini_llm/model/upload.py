"""A model's weights on the device, as the levels want them: in panels for `Plain`, for `Few` and `Many` by columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import common  # noqa: F401  (picks the backend, so before numba.cuda)

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.request import RequestError
from ch14_mini_llm.model.config import GPT2Config, LlamaConfig
from ch14_mini_llm.model.few_bits import BITS, few_bits
from ch14_mini_llm.model.gpt2 import gpt2
from ch14_mini_llm.model.llama import MATRICES, llama, rows_of
from ch14_mini_llm.model.quantize import unpacked
from ch14_mini_llm.model.roles import Layer, Linear, Model, Norm
from chapters.ch09_gemm.gemv_tensor import fold_norm, fold_norm_launch
from chapters.ch09_gemm.panels import pack_columns, pack_columns_launch, pack_rows, pack_rows_launch, panels_shape
from chapters.ch12_flash.decode_half import HEAD_DIMS
from chapters.ch12_flash.tensor_core import HEAD_DIM_MAX
from chapters.ch13_llm_ops.fused_llama import paired_order, turned_order
from chapters.ch13_llm_ops.rope import rope_tables


def panels_model(
    config: GPT2Config | LlamaConfig,
    tensors: Mapping[str, object],
    on_tensor: Callable[[str, int], None] | None = None,
    dtype: str = "float32",
) -> Model:
    """Matrices in chapter 9's panels, in float32, float16, int8 or int4; vectors in float32. Embeddings, of which a
    step reads a row a token, stay in float16 if they are: converting them would take longer than a step, and change
    nothing. Raises `RequestError` for sizes that come in no groups of few bits."""
    bits = BITS.get(dtype)
    made = _llama_panels if isinstance(config, LlamaConfig) else _gpt2_panels
    return made(config, tensors, on_tensor, np.dtype("float32" if bits else dtype), bits)


def _table_type(tensor, dtype, kind: str):
    """The type for a tensor that is no matrix of a product."""
    if kind == "vector":
        return np.float32
    return np.float16 if getattr(tensor, "dtype", None) == np.float16 else dtype


def _packed(array, pack, launch, K: int, N: int, dtype):
    panels = cuda.device_array(panels_shape(K, N), dtype)
    pack[launch(K, N)](array, panels, K, N)
    return panels


def _gpt2_panels(config, tensors, on_tensor, dtype, bits) -> Model:
    def upload(array, kind):
        if kind == "matrix" and bits:
            return few_bits([np.ascontiguousarray(array.T, dtype=np.float32)], bits)
        if kind == "matrix":
            array = cuda.to_device(np.ascontiguousarray(array))
            return _packed(array, pack_columns, pack_columns_launch, *array.shape, dtype)
        return cuda.to_device(np.ascontiguousarray(array, dtype=_table_type(array, dtype, kind)))

    model = gpt2(config, tensors, upload, on_tensor)
    if bits:
        weight = few_bits([tensors["wte.weight"]], bits)
    else:
        weight = _packed(model.head.weight, pack_rows, pack_rows_launch, config.d_model, config.vocab_size, dtype)
    no_bias = cuda.to_device(np.zeros(config.vocab_size, np.float32))
    return replace(model, head=replace(model.head, weight=weight, bias=no_bias))


def _llama_panels(config, tensors, on_tensor, dtype, bits) -> Model:
    def upload(given, kind):
        if kind == "zeros":
            return cuda.to_device(np.zeros(given[0], np.float32))
        if kind in MATRICES and bits:
            return few_bits(given, bits)
        wanted = dtype if kind in MATRICES else _table_type(given[0], dtype, kind)
        array = rows_of(given, lambda tensor: unpacked(tensor, wanted))
        if kind in MATRICES:
            return _packed(cuda.to_device(array), pack_rows, pack_rows_launch, *array.shape[::-1], dtype)
        return cuda.to_device(array)

    return llama(config, tensors, upload, _rotary(config), on_tensor)


def _rotary(config: LlamaConfig) -> tuple:
    return tuple(map(cuda.to_device, rope_tables(config.n_ctx, config.head_dim, config.rotary_base)))


def why_not_fast(config) -> str | None:
    """What about a model's sizes the level ``fast`` has no kernels for; None if it has."""
    known = [size for size in HEAD_DIMS if size <= HEAD_DIM_MAX]
    if config.head_dim not in known:
        return f"head_dim is {config.head_dim}; engine fast has attention for {', '.join(map(str, known))}"
    for field in ("d_model", "d_ff"):
        if getattr(config, field) % 8:
            return f"{field} is {getattr(config, field)}; engine fast needs a multiple of 8 (16 bytes of float16)"
    return None


def float16_model(
    config: GPT2Config | LlamaConfig,
    tensors: Mapping[str, object],
    on_tensor: Callable[[str, int], None] | None = None,
    dtype: str = "float16",
) -> Model:
    """Matrices in float16, (n_out, n_in), with the norms moved into them; embeddings in float16, vectors in float32.
    Raises `RequestError` for sizes that the kernels do not take."""
    problem = why_not_fast(config)
    if problem is not None:
        raise RequestError(f"{problem}: use engine kv")
    made = llama_float16 if isinstance(config, LlamaConfig) else _gpt2_float16
    return made(config, tensors, on_tensor)


def _gpt2_float16(config, tensors, on_tensor) -> Model:
    def upload(array, kind):
        dtype = np.float32 if kind == "vector" else np.float16
        return cuda.to_device(np.ascontiguousarray(array.T if kind == "matrix" else array, dtype=dtype))

    model = gpt2(config, tensors, upload, on_tensor)
    plain = cuda.to_device(np.ones(config.d_model, np.float32)), cuda.to_device(np.zeros(config.d_model, np.float32))
    no_bias = cuda.to_device(np.zeros(config.vocab_size, np.float32))
    head = cuda.device_array((config.vocab_size, config.d_model), np.float16)  # the embedding stays as it is
    return replace(
        model,
        layers=tuple(_folded_layer(layer, plain) for layer in model.layers),
        norm=replace(model.norm, weight=plain[0], bias=plain[1]),
        head=_folded(model.norm, replace(model.head, bias=no_bias), into=head),
    )


def llama_float16(
    config: LlamaConfig,
    tensors: Mapping[str, object],
    on_tensor: Callable[[str, int], None] | None = None,
    to_device: Callable[[list, type, np.ndarray | None], object] | None = None,
) -> Model:
    """`float16_model` of a Llama. Rows of which a kernel needs two at a time are made neighbours, see chapter 13's
    ``fused_llama.py``.

    to_device(tensors, dtype, order): some matrices, their rows one below the other, or a vector, as an array on the
    device; order: where each row comes from, None for the order they have. By default for tensors of `load_weights`.
    """
    orders = {
        "qkv": turned_order(config.n_head, config.n_kv_head, config.head_dim), "up": paired_order(config.d_ff),
    }  # fmt: skip
    to_device = to_device or _ordered

    def upload(given, kind):
        if kind == "zeros":
            return cuda.to_device(np.zeros(given[0], np.float32))
        return to_device(given, np.float32 if kind == "vector" else np.float16, orders.get(kind))

    model = llama(config, tensors, upload, _rotary(config), on_tensor)
    zeros = cuda.to_device(np.zeros(config.d_model, np.float32))
    scaled = lambda norm, linear: _folded(replace(norm, bias=zeros), linear, into=linear.weight)
    layers = [
        replace(layer, qkv=scaled(layer.norm_1, layer.qkv), up=scaled(layer.norm_2, layer.up)) for layer in model.layers
    ]
    return replace(model, layers=tuple(layers), head=scaled(model.norm, model.head))


def _ordered(tensors, dtype, order):
    array = rows_of(tensors, lambda tensor: unpacked(tensor, dtype))
    return cuda.to_device(array if order is None else array[order])


def _folded_layer(layer: Layer, plain: tuple) -> Layer:
    norms = {name: replace(getattr(layer, name), weight=plain[0], bias=plain[1]) for name in ("norm_1", "norm_2")}
    return replace(layer, qkv=_folded(layer.norm_1, layer.qkv), up=_folded(layer.norm_2, layer.up), **norms)


def _folded(norm: Norm, linear: Linear, into=None) -> Linear:
    """The linear layer with weight and bias of the norm in front of it in its own."""
    weight, n = linear.weight if into is None else into, linear.n_out
    row_sums = cuda.device_array(n, np.float32)
    source = linear.weight, linear.bias, norm.weight, norm.bias
    fold_norm[fold_norm_launch(n)](*source, weight, row_sums, linear.bias, n, linear.n_in)
    return replace(linear, weight=weight, row_sums=row_sums)
