"""What GPT-2's decoding is measured beside: four peers in torch, made of the same weights as our models.

`TransformersEager` and `TransformersStatic` are Hugging Face's GPT-2 with its two caches, `CompiledDecode` is a small
GPT-2 in plain torch whose decoding step torch compiles into one CUDA graph, `TunedDecode` the same with the compiler
allowed to look for the best kernels. All take the most likely token every time,
at batch 1, and none reads a token back before the last one is made: the device never waits for Python to look.

    peer = TransformersEager(config, tensors)
    peer.generate([15496, 11], 8)  # -> 8 token ids

The way the last two work is that of gpt-fast (https://github.com/meta-pytorch/gpt-fast).
"""

import contextlib
import inspect

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ch14_mini_llm.model.config import LAYER_NORM_EPS, GPT2Config
from ch14_mini_llm.model.llama import EMBEDDING, HEAD, llama_tensors
from ch14_mini_llm.model.quantize import unpacked


def default_device():
    """``"cuda"`` if torch has a GPU to use, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _on_device(tensors, device, dtype):
    """{name: torch tensor} of a dict of arrays; copied first, because a memory-mapped file cannot be written to."""
    return {name: torch.from_numpy(np.array(value)).to(device, dtype) for name, value in tensors.items()}


class Peer:
    """A GPT-2 of another make. Use one of the subclasses.

    config: a `GPT2Config`; tensors: name -> array, as `load_weights` gives them. max_length: the longest sequence in
    tokens, for what is allocated once (by default config.n_ctx; `reserve` changes it). device: a torch device, by
    default the GPU if there is one. dtype: of weights and activations, by default float16 on a GPU, else float32.
    """

    name = ""  # in tables

    def __init__(self, config: GPT2Config, tensors, max_length=None, device=None, dtype=None):
        self.config = config
        self.device = torch.device(device or default_device())
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self.length = 0  # tokens in the cache
        self._build(tensors)
        self.reserve(config.n_ctx if max_length is None else max_length)

    @property
    def note(self):
        """What a reader of the figures should know, or None."""
        return None

    def reserve(self, max_length):
        """Make room for sequences of ``max_length`` tokens, and no more where that would slow shorter ones down."""
        self.max_length = max_length

    def prefill(self, tokens):
        """Run the prompt ``tokens`` (a list of ids) and return the id that follows, as an int: the device is done."""
        if not 1 <= len(tokens) <= min(self.max_length, self.config.n_ctx):
            raise ValueError(f"{len(tokens)} tokens; this model takes 1 to {min(self.max_length, self.config.n_ctx)}")
        self.length = len(tokens)
        with torch.no_grad():
            return int(self._prefill(torch.tensor([tokens], device=self.device)))

    def decode(self, token, n):
        """The ``n`` ids that follow what was run so far and then ``token``, as a list: n steps of one token each."""
        if self.length + n > min(self.max_length, self.config.n_ctx):
            raise ValueError(f"{self.length} tokens and {n} more; there is room for {self.max_length}")
        self.length += n
        with torch.no_grad():
            return self._decode(token, n) if n else []

    def generate(self, tokens, max_new):
        """A list of the ``max_new`` ids that follow the prompt ``tokens``."""
        first = self.prefill(tokens)
        return [first, *self.decode(first, max_new - 1)]


# --- Hugging Face ----------------------------------------------------------------------------------------------------


class TransformersEager(Peer):
    """transformers' GPT-2 as it comes: a cache that grows, no compiling, attention by torch's own kernels.

    The loop is written out: ``generate()`` would spend more time on its options than here on a step.
    """

    name = "transformers, eager"

    def _build(self, tensors):
        from transformers import GPT2Config as TheirConfig
        from transformers import GPT2LMHeadModel

        c = self.config
        config = TheirConfig(
            n_layer=c.n_layer, n_head=c.n_head, n_embd=c.d_model, n_inner=c.d_ff, n_positions=c.n_ctx,
            vocab_size=c.vocab_size, bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1,
            layer_norm_epsilon=LAYER_NORM_EPS, attn_implementation="sdpa",
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config).to(self.device, self.dtype).eval()
        assert self.model.config._attn_implementation == "sdpa"
        state = {f"transformer.{name}": value for name, value in _on_device(tensors, self.device, self.dtype).items()}
        state["lm_head.weight"] = state["transformer.wte.weight"]
        self.model.load_state_dict(state)

    def _cache(self):
        """An empty cache."""
        from transformers import DynamicCache

        return DynamicCache()

    def _step(self, ids):
        """The id (1, 1) int64 that follows ``ids`` (1, T) int64, both on the device."""
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def _prefill(self, ids):
        self.cache = self._cache()
        return self._step(ids)

    def _decode(self, token, n):
        made = [torch.tensor([[token]], device=self.device)]
        for _ in range(n):
            made.append(self._step(made[-1]))
        return torch.cat(made[1:]).flatten().tolist()


class TransformersLlama(TransformersEager):
    """transformers' Llama as it comes. config: a `LlamaConfig`; tensors: as `load_weights` gives them, few bits too."""

    def _build(self, tensors):
        from transformers import LlamaConfig, LlamaForCausalLM

        c = self.config
        config = LlamaConfig(
            hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer, head_dim=c.head_dim,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, vocab_size=c.vocab_size,
            rms_norm_eps=c.epsilon, max_position_embeddings=c.n_ctx, tie_word_embeddings=c.tied_head,
            rope_parameters={"rope_type": "default", "rope_theta": c.rotary_base}, attn_implementation="sdpa",
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).to(self.device, self.dtype).eval()
        arrays = {name: unpacked(tensors[name]) for name, _ in llama_tensors(c)}
        state = {name if name == HEAD else f"model.{name}": value
                 for name, value in _on_device(arrays, self.device, self.dtype).items()}  # fmt: skip
        state.setdefault(HEAD, state[f"model.{EMBEDDING}"])
        self.model.load_state_dict(state)

    def logits(self, tokens):
        """The logits that follow each of ``tokens``: (len(tokens), vocab_size)."""
        with torch.no_grad():
            return self.model(torch.tensor([tokens], device=self.device)).logits[0].float().cpu().numpy()


class TransformersStatic(TransformersEager):
    """transformers' GPT-2 with its cache of a fixed size: it is allocated once, attention masks what is empty."""

    name = "transformers, static cache"

    def reserve(self, max_length):
        super().reserve(max_length)
        self.cache = None

    def _cache(self):
        from transformers import StaticCache

        if self.cache is not None:  # the buffers are kept, as in a program that answers one prompt after the other
            self.cache.reset()
            return self.cache
        options = {
            "max_cache_len": self.max_length,
            "max_batch_size": 1,
            "batch_size": 1,
            "device": self.device,
            "dtype": self.dtype,
        }
        known = inspect.signature(StaticCache.__init__).parameters  # most of them in older versions only
        return StaticCache(self.model.config, **{name: value for name, value in options.items() if name in known})


# --- plain torch, compiled -------------------------------------------------------------------------------------------


class _Linear(nn.Linear):
    """x (1, T, in) -> (1, T, out)."""

    def forward(self, x):
        if x.shape[1] == 1:  # apart, so that the compiler makes one kernel of the product, the bias and what follows
            return F.linear(x, self.weight) + self.bias
        return F.linear(x, self.weight, self.bias)


class _Attention(nn.Module):
    """Causal self-attention with keys and values in buffers (1, n_head, L, head_dim)."""

    def __init__(self, config):
        super().__init__()
        d = config.d_model
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.c_attn, self.c_proj = _Linear(d, 3 * d), _Linear(d, d)
        self.register_buffer("keys", None, persistent=False)
        self.register_buffer("values", None, persistent=False)

    def forward(self, x, position, mask):
        heads = (1, x.shape[1], self.n_head, self.head_dim)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        if self.keys is not None:
            self.keys[:, :, position], self.values[:, :, position] = k, v
        if mask is None:  # a prompt: all there is to look at are its own keys
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class _MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc, self.c_proj = _Linear(config.d_model, config.d_ff), _Linear(config.d_ff, config.d_model)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.d_model, LAYER_NORM_EPS) for _ in range(2))
        self.attn, self.mlp = _Attention(config), _MLP(config)

    def forward(self, x, position, mask):
        x = x + self.attn(self.ln_1(x), position, mask)
        return x + self.mlp(self.ln_2(x))


class TorchGPT2(nn.Module):
    """A GPT-2 in plain torch; modules are named like our tensors. Matrices are held as (out, in), as torch wants them.

    After `reserve` it has a cache for L tokens, and what the decoding step changes: ``token`` (1,) int64, the token to
    run; ``position`` (1,) int64, where it stands; ``made`` (L,) int64, at each position the token that follows it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.n_ctx, config.d_model)
        self.h = nn.ModuleList([_Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model, LAYER_NORM_EPS)

    @classmethod
    def of(cls, config, tensors, device, dtype):
        """The model of the weights ``tensors``, as `load_weights` gives them, on a torch device."""
        with torch.device("meta"):  # nothing is allocated that the next lines would throw away
            model = cls(config)
        state = _on_device(tensors, device, dtype)
        for name in state:
            if name.startswith("h.") and state[name].ndim == 2:
                state[name] = state[name].T.contiguous()
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False).eval()

    def reserve(self, length):
        """Make the cache for ``length`` tokens."""
        cache = (1, self.config.n_head, length, self.config.head_dim)
        sizes = {"token": 1, "position": 1, "made": length}
        reserve_buffers(self, [block.attn for block in self.h], cache, self.wte.weight, sizes)

    def forward(self, ids, position, mask=None):
        """Hidden states (1, T, d_model) after the last layer norm.

        ids: (1, T) int64; position: (T,) int64; mask: (1, L) bool, which entries of the cache the one token of ``ids``
        sees, or None for a prompt.
        """
        x = self.wte(ids) + self.wpe(position)
        for block in self.h:
            x = block(x, position, mask)
        return self.ln_f(x)

    def head(self, hidden):
        """Logits (…, vocab_size) of hidden states (…, d_model)."""
        return F.linear(hidden, self.wte.weight)


def reserve_buffers(model, attentions, cache, like, shapes):
    """Give each of ``attentions`` keys and values of the shape ``cache``, in the type of ``like`` and on its device,
    and the model buffers of these shapes, {name: shape}, int64, and ``columns``, the numbers of the cache's places.

    A CUDA graph may use all of them where they lie, and write to them.
    """
    zeros = lambda shape, dtype: torch.zeros(shape, dtype=dtype, device=like.device)
    buffers = [(module, name, zeros(cache, like.dtype)) for module in attentions for name in ("keys", "values")]
    buffers += [(model, name, zeros(shape, torch.int64)) for name, shape in shapes.items()]
    buffers.append((model, "columns", torch.arange(cache[2], device=like.device)))
    for module, name, value in buffers:
        torch._dynamo.mark_static_address(value)
        module.register_buffer(name, value, persistent=False)


def batch_shapes(n, length):
    """The buffers, for `reserve_buffers`, of a model of ``n`` sequences that `batched_peers.decode_batch` steps."""
    return {"token": (n, 1), "position": (1,), "made": (n, length)}


def decode_one_token(model):
    """One step of a `TorchGPT2`: runs its ``token``, and leaves the next token and position in the model's buffers.

    All it reads and writes are buffers of the model, so that a replay of its CUDA graph needs no copies around it.
    """
    mask = (model.columns <= model.position)[None]
    hidden = model(model.token[None], model.position, mask)
    token = model.head(hidden[:, -1]).argmax(-1)
    model.made[model.position] = token
    model.token.copy_(token)
    model.position.add_(1)
    return token


@contextlib.contextmanager
def tuning(tuned):
    """gpt-fast's two settings while a step is compiled, see `TunedDecode`; nothing unless ``tuned``."""
    from torch._inductor import config as inductor
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with contextlib.ExitStack() as settings:
        if tuned:
            settings.enter_context(inductor.patch(coordinate_descent_tuning=True))
            settings.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


class CompiledDecode(Peer):
    """A GPT-2 in plain torch: the prompt runs eagerly, the decoding step is compiled and replayed as one CUDA graph.

    compile: whether to compile; by default on a GPU only.
    """

    name = "torch.compile, CUDA graph"
    tuned = False

    def __init__(self, *args, compile=None, **options):
        self._compile = compile
        super().__init__(*args, **options)

    def _build(self, tensors):
        self.compiles = self.device.type == "cuda" if self._compile is None else self._compile
        self.model = TorchGPT2.of(self.config, tensors, self.device, self.dtype)
        self._skips = _graphs_skipped()  # so far

    @property
    def note(self):
        if not self.compiles:
            return "not compiled: there is no GPU"
        return "torch made no CUDA graph of the step" if _graphs_skipped() > self._skips else None

    def reserve(self, max_length):
        super().reserve(max_length)
        self.model.reserve(-(-max_length // 8) * 8)  # rows of the mask that start at multiples of 16 bytes
        self._step = decode_one_token
        if self.compiles:  # a new one, because an old one would compile again for sizes that vary
            self._step = torch.compile(decode_one_token, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def _prefill(self, ids):
        hidden = self.model(ids, torch.arange(ids.shape[1], device=self.device))
        return self.model.head(hidden[:, -1]).argmax(-1)

    def _decode(self, token, n):
        start = self.length - n
        self.model.token.fill_(token)
        self.model.position.fill_(start)
        with tuning(self.tuned):
            for _ in range(n):
                torch.compiler.cudagraph_mark_step_begin()
                self._step(self.model)
        return self.model.made[start : start + n].tolist()


class TunedDecode(CompiledDecode):
    """`CompiledDecode` with gpt-fast's two settings: the compiler makes all kernels itself, and tries variants of each.

    One row times a matrix reaches the memory's bandwidth only with the compiler's own kernels, which it makes when it
    may tune them; and its own for the attention of one row are better than those that attention comes with.
    """

    name = "torch.compile, tuned, CUDA graph"
    tuned = True


def _graphs_skipped():
    """How often torch's compiler has run something without a CUDA graph that was to have one."""
    from torch._dynamo.utils import counters

    return counters["inductor"]["cudagraph_skips"]


PEERS = {
    "eager": TransformersEager,
    "static": TransformersStatic,
    "compiled": CompiledDecode,
    "tuned": TunedDecode,
}


# --- the judge -------------------------------------------------------------------------------------------------------


def logit_gaps(config, tensors, prompt, tokens, device=None):
    """By how much the logit of each token of ``tokens`` falls short of the largest one, (n,) float32 on the host.

    The logits are those of a plain float32 forward pass in torch over ``prompt`` and then ``tokens``: 0 is the token
    that float32 takes, a small gap a near tie, and a wrong model's tokens have large ones.
    """
    model = TorchGPT2.of(config, tensors, device or default_device(), torch.float32)
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.wte.weight.device)
    with torch.no_grad():
        hidden = model(ids, torch.arange(ids.shape[1], device=ids.device))[0, len(prompt) - 1 :]
        logits = model.head(hidden)
        chosen = logits.gather(1, torch.tensor(tokens, device=ids.device)[:, None])[:, 0]
        return (logits.amax(1) - chosen).cpu().numpy()
