"""A Llama in plain torch, to decode with and to judge by, as `peers.TorchGPT2` is for a GPT-2; and Llamas to be timed.

The step is gpt-fast's (https://github.com/meta-pytorch/gpt-fast): one product for queries, keys and values, keys and
values in buffers of a fixed size, torch's ``scaled_dot_product_attention`` over all of them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import peers
from ch14_mini_llm.model.config import LlamaConfig
from ch14_mini_llm.model.llama import EMBEDDING, HEAD, LAST_NORM, LINEARS, NORMS, llama_tensors
from ch14_mini_llm.model.quantize import unpacked

SHAPES = {  # published ones; n_ctx is what is timed here, which is less than theirs
    "smollm2-135m": LlamaConfig(30, 9, 3, 64, 576, 1536, 2048, 49152, 1e-5, 1e5, True),
    "llama-3.2-1b": LlamaConfig(16, 32, 8, 64, 2048, 8192, 2048, 128256, 1e-5, 5e5, True),
    "llama-2-7b": LlamaConfig(32, 32, 32, 128, 4096, 11008, 2048, 32000, 1e-5, 1e4, False),
}


def random_llama(config, device, seed=0, std=0.02):
    """{name: float16 torch tensor on the device}: what a Llama holds before its training, on which time does not
    depend. Matrices are normal with standard deviation ``std``, norms' weights 1."""
    generator = torch.Generator(device).manual_seed(seed)

    def tensor(shape):
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.float16, device=device)
        return torch.empty(shape, dtype=torch.float16, device=device).normal_(0, std, generator=generator)

    return {name: tensor(shape) for name, shape in llama_tensors(config)}


def to_numba(tensors, dtype, order):
    """For `llama_float16`: torch tensors that are on the device as an array there."""
    from numba import cuda

    joined = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    joined = joined.to(torch.float32 if dtype == np.float32 else torch.float16)
    if order is not None:
        joined = joined[torch.from_numpy(order).to(joined.device)]
    if not joined.is_cuda:
        return cuda.to_device(joined.numpy().copy())
    joined = joined.clone()  # what is done to it must not reach the one who gave it
    torch.cuda.synchronize()
    return cuda.as_cuda_array(joined)


class _Norm(nn.Module):
    def __init__(self, weight, eps):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight)

    def forward(self, x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class _Block(nn.Module):
    """weights: of `LINEARS`' roles, (out, in) each, and of `NORMS`."""

    def __init__(self, config, weights):
        super().__init__()
        self.config = config
        self.norm_1, self.norm_2 = (_Norm(weights[name], config.epsilon) for name in ("norm_1", "norm_2"))
        for name in LINEARS:
            self.register_buffer(name, weights[name])
        for name in ("keys", "values"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, x, position, mask, cos, sin):
        c, (n, length) = self.config, x.shape[:2]
        widths = [heads * c.head_dim for heads in (c.n_head, c.n_kv_head, c.n_kv_head)]
        parts = F.linear(self.norm_1(x), self.qkv).split(widths, dim=-1)
        q, k, v = (part.view(n, length, -1, c.head_dim).transpose(1, 2) for part in parts)
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        if self.keys is not None:
            self.keys[:, :, position], self.values[:, :, position] = k, v
        grouped = {"enable_gqa": c.n_kv_head < c.n_head}
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
        else:
            y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, **grouped)
        x = x + F.linear(y.transpose(1, 2).reshape(n, length, -1), self.proj)
        gate, value = F.linear(self.norm_2(x), self.up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * value, self.down)


def _turned(x, cos, sin):
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, low * sin + high * cos], dim=-1)


class TorchLlama(nn.Module):
    """A Llama of n sequences that are equally long; buffers as a `batched_peers.BatchedGPT2` has them."""

    def __init__(self, config, tensors, device, dtype):
        super().__init__()
        self.config = config
        put = lambda *names: torch.cat([_tensor(tensors[name], device, dtype) for name in names])
        self.register_buffer("embedding", put(EMBEDDING))
        self.register_buffer("lm_head", self.embedding if config.tied_head else put(HEAD))
        blocks = []
        for i in range(config.n_layer):
            weights = {role: put(f"layers.{i}.{name}") for role, name in NORMS.items()}
            weights |= {role: put(*(f"layers.{i}.{name}" for name in names)) for role, names in LINEARS.items()}
            blocks.append(_Block(config, weights))
        self.blocks, self.norm = nn.ModuleList(blocks), _Norm(put(LAST_NORM), config.epsilon)
        half = config.head_dim // 2
        rates = config.rotary_base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        angles = torch.arange(config.n_ctx, dtype=torch.float64, device=device)[:, None] * rates
        self.register_buffer("cos", angles.cos().to(dtype))
        self.register_buffer("sin", angles.sin().to(dtype))

    @classmethod
    def of(cls, config, tensors, device, dtype):
        """The model of the weights ``tensors``, of `load_weights` or `random_llama`, on a torch device."""
        return cls(config, tensors, torch.device(device), dtype).requires_grad_(False).eval()

    def reserve(self, n, length):
        """Make the cache for ``n`` sequences of ``length`` tokens."""
        cache = (n, self.config.n_kv_head, length, self.config.head_dim)
        peers.reserve_buffers(self, self.blocks, cache, self.embedding, peers.batch_shapes(n, length))

    def forward(self, ids, position, mask=None):
        """Hidden states (n, T, d_model) after the last norm; arguments as `peers.TorchGPT2`'s."""
        x, cos, sin = F.embedding(ids, self.embedding), self.cos[position], self.sin[position]
        for block in self.blocks:
            x = block(x, position, mask, cos, sin)
        return self.norm(x)

    def head(self, hidden):
        """Logits (…, vocab_size) of hidden states (…, d_model)."""
        return F.linear(hidden, self.lm_head)


def _tensor(tensor, device, dtype):
    if not isinstance(tensor, torch.Tensor):
        tensor = torch.from_numpy(unpacked(tensor))
    return tensor.to(device, dtype)
