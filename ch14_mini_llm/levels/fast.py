"""GPT-2 as fast as a GPU lets it: the level ``fast`` of ``--engine``.

Weights and activations are float16, sums and the residual stream float32. A prompt goes through chapter 9's tensor-core
product and chapter 12's FlashAttention. A step over one token is five launches a layer, whose arguments never change:
position, tokens and the random numbers' step are in device memory. So it is recorded once, as a CUDA graph, and
replayed; while the host reads one token, the next is already being made.

This file defines no kernel: chapters 9, 12 and 13 do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import common  # picks the backend, so before numba.cuda

# isort: split
import numpy as np
from numba import cuda

from ch14_mini_llm.engine.request import RequestError, Sampling, check_tokens
from ch14_mini_llm.levels.base import Model
from ch14_mini_llm.model.config import LAYER_NORM_EPS, GPT2Config
from chapters.ch03_indexing.kernels import blocks_2d
from chapters.ch07_warp_reduce.norms import layernorm_launch, layernorm_row
from chapters.ch09_gemm.gemv_tensor import (
    fold_norm,
    fold_norm_launch,
    gemv_bias_residual,
    gemv_residual_launch,
    gemv_tensor_launch,
)
from chapters.ch09_gemm.pipeline import gemm_bias, gemm_bias_launch, gemm_bias_residual
from chapters.ch12_flash.decode_half import HEAD_DIMS, chunks_launch, decode_v4_parts, lse_stride_of, parts_workspace
from chapters.ch12_flash.tensor_core import HEAD_DIM_MAX, flash_v4, flash_v4_launch
from chapters.ch13_llm_ops.fused import (
    append_token,
    append_token_launch,
    embed_at,
    gemm_bias_gelu,
    gemv_ln_gelu,
    gemv_ln_logits,
    gemv_ln_qkv,
    gemv_parts_residual,
    pick_best,
    pick_best_launch,
    split_qkv_append,
    split_qkv_append_launch,
)
from chapters.ch13_llm_ops.kv_cache import kv_advance, kv_advance_launch
from chapters.ch13_llm_ops.sampling import check_sampling, draw_token_at, filter_logits, sample_launch
from common.graph import Graph
from common.trace import Launch, trace

EPS = np.float32(LAYER_NORM_EPS)
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
PROMPT_STEP = 64  # lengths of prompts that have a graph
BEFORE_TOKENS = 3  # places of the state for the step number, as int64, and pos
AHEAD = 2  # steps under way while the host waits for the first of them


class FastGPT2(Model):
    """A GPT-2 in float16 with a key-value cache, a graph for its steps, and every buffer allocated once.

    Arguments as for `Model`. Raises `RequestError` as it does, and for sizes the kernels do not take: a head_dim other
    than 8, 16, 32, 64, 128, a d_model or d_ff that is not a multiple of 8 or too large for them or for the device.
    """

    def __init__(
        self,
        config: GPT2Config,
        tensors: dict[str, np.ndarray],
        max_length: int | None = None,
        on_tensor: Callable[[str, int], None] | None = None,
    ) -> None:
        super().__init__(config, tensors, max_length, on_tensor)
        T, d, n_head, head_dim = self.max_length, config.d_model, config.n_head, config.head_dim
        half = {"h": d, "qkv": 3 * d, "q": d, "att": d, "ff": config.d_ff}
        self._half = {name: cuda.device_array(T * width, np.float16) for name, width in half.items()}
        self._x = cuda.device_array((T, d), np.float32)
        self._x_flat = self._x.reshape(T * d)
        self._lse = cuda.device_array(n_head * T, np.float32)
        caches = [cuda.device_array((n_head, T, head_dim), np.float16) for _ in range(2 * config.n_layer)]
        self.k_cache, self.v_cache = caches[: config.n_layer], caches[config.n_layer :]
        parts, lse = parts_workspace(T, n_head, head_dim)
        self._parts, self._parts_lse = cuda.device_array(parts, np.float16), cuda.to_device(np.zeros(lse, np.float32))

        self.logits = cuda.device_array(config.vocab_size, np.float32)
        self._head = gemv_tensor_launch(config.vocab_size, d)
        self._best = cuda.device_array(self._head[0], np.float32)
        self._best_token = cuda.device_array(self._head[0], np.int32)
        self._drawn = cuda.device_array(1, np.int32)
        self._shares = None  # of tokens in a draw; only sampling needs them
        self._state = cuda.to_device(np.zeros(BEFORE_TOKENS + T + 1, np.int32))  # all that a request sets: one copy
        self._step_number, self._pos = self._state[:2].view(np.int64), self._state[2:3]
        self._tokens = self._state[BEFORE_TOKENS:]
        self._shown = cuda.mapped_array(T + 1, np.int32)  # the tokens in the host's memory
        self._fold_norms()
        self._graphs = {}  # of a step, by sampling
        self._prompts = {}  # by length: None for one that was launched once

    # --- what a level offers -----------------------------------------------------------------------------------------

    def prefill(self, tokens: Sequence[int]) -> int:
        """Forget the cache, run over a prompt, and return the most likely token id after it."""
        self._prefill(tokens, None)
        cuda.synchronize()
        return int(self._shown[len(tokens)])

    def stream(self, tokens: Sequence[int], max_new: int, sampling: Sampling | None = None) -> Iterator[int]:
        """Yield `max_new` token ids that follow `tokens`, as soon as the host has them; -1: all logits are NaN.

        One stream at a time: another prompt takes the cache.
        """
        self._prefill(tokens, sampling)
        self._mark()()
        yield int(self._shown[len(tokens)])  # before the graph is recorded: a first token should not wait for that
        done, launched = deque(), 1
        for made in range(1, max_new):
            while launched < min(made + AHEAD, max_new):
                step = self._graph(sampling)
                step.replay()
                done.append(step.mark())
                launched += 1
            done.popleft()()
            yield int(self._shown[len(tokens) + made])

    def trace_step(self, tokens: Sequence[int], sampling: Sampling | None = None) -> list[Launch]:
        """Every kernel launch of the step over the last of `tokens`, those before it being in the cache."""
        self._put(tokens)
        if len(tokens) > 1:
            self._prompt(len(tokens) - 1)
            self._move_to(len(tokens) - 1)
        self._embed(1)
        with trace() as launches:
            self._step(sampling)
        return launches

    @property
    def notes(self) -> list[str]:
        """What this device lacks and what is done instead, for people; empty if nothing is."""
        if common.BACKEND != "gpu":
            return ["no GPU: steps are launched one by one, and the compiled CPU stands in for tensor cores"]
        cc = tuple(cuda.get_current_device().compute_capability)
        found = []
        if cc < (8, 0):
            found.append("no background copies before sm_80: tiles pass through registers, products of 16 x 8 x 8")
        if cc < (9, 0):
            found.append("no dependent launches before sm_90: each kernel of a step waits for the one before it")
        return found

    # --- a prompt ----------------------------------------------------------------------------------------------------

    def _prefill(self, tokens: Sequence[int], sampling: Sampling | None) -> None:
        self._put(tokens)
        self._run_prompt(len(tokens))
        self._move_to(len(tokens) - 1)
        self._choose(len(tokens) - 1, sampling)

    def _run_prompt(self, T: int) -> None:
        """The network over the prompt of T tokens in the buffer, at first by launches, and from then on by a graph.

        A prompt is run as one of the next length in `PROMPT_STEP` more: no token sees those behind it, which are 0, and
        what they leave in the cache is overwritten before it is read. So a few graphs serve all lengths. To record one
        takes as long as to launch it, so a length that comes once is launched.
        """
        padded = min((T + PROMPT_STEP - 1) // PROMPT_STEP * PROMPT_STEP, self.max_length)
        if padded not in self._prompts:
            self._prompt(T)
            self._prompts[padded] = None
            return
        if self._prompts[padded] is None:
            self._prompts[padded] = Graph(lambda: self._prompt(padded), warm=True)
        self._prompts[padded].replay()

    def _prompt(self, T: int) -> None:
        """The network over the first T tokens: residual stream in `_x`, keys and values in the cache."""
        d, d_ff, n_head, head_dim = self.config.d_model, self.config.d_ff, self.config.n_head, self.config.head_dim
        x, pos = self._x, self._pos
        h, att, ff, qkv = (self._rows(name, T) for name in ("h", "att", "ff", "qkv"))
        q, lse = self._half["q"][: T * d].reshape(n_head, T, head_dim), self._lse[: n_head * T].reshape(n_head, T)
        flash, scale = flash_v4(head_dim), np.float32(head_dim**-0.5)

        self._embed(T)
        for layer, m in enumerate(self.layers):
            k, v = self.k_cache[layer], self.v_cache[layer]
            layernorm_row[layernorm_launch(T, d)](x, *self._plain_norm, h, d, EPS)
            gemm_bias[gemm_bias_launch(T, 3 * d)](h, m["attn.c_attn.weight"], m["attn.c_attn.bias"], qkv, T, 3 * d, d)
            split_qkv_append[split_qkv_append_launch(T, d)](qkv, q, k, v, pos, T, d, head_dim)
            flash[flash_v4_launch(T, n_head, head_dim)](q, k, v, att, lse, T, 0, scale, 1)
            gemm_bias_residual[gemm_bias_launch(T, d)](att, m["attn.c_proj.weight"], m["attn.c_proj.bias"], x, T, d, d)
            layernorm_row[layernorm_launch(T, d)](x, *self._plain_norm, h, d, EPS)
            gemm_bias_gelu[gemm_bias_launch(T, d_ff)](h, m["mlp.c_fc.weight"], m["mlp.c_fc.bias"], ff, T, d_ff, d)
            gemm_bias_residual[gemm_bias_launch(T, d)](ff, m["mlp.c_proj.weight"], m["mlp.c_proj.bias"], x, T, d, d_ff)

    # --- a step ------------------------------------------------------------------------------------------------------

    def _embed(self, T: int) -> None:
        """T tokens from position pos on become the first T rows of the residual stream."""
        d, embeddings = self.config.d_model, (self.weights["wte.weight"], self.weights["wpe.weight"])
        embed_at[blocks_2d(T, d)](self._tokens, self._pos, *embeddings, self._x, T, d)

    def _step(self, sampling: Sampling | None) -> None:
        """The network over the token at position pos, whose embedding is row 0 of `_x`, and the choice of the next.

        The same launches for every token. The last one leaves the next token's embedding where this one's was.
        """
        d, d_ff, n_head, head_dim = self.config.d_model, self.config.d_ff, self.config.n_head, self.config.head_dim
        x, pos, q, ff = self._x_flat, self._pos, self._half["q"], self._half["ff"]
        attention, scale = (self._parts, self._parts_lse), np.float32(head_dim**-0.5)
        attend = chunks_launch(self.max_length, n_head, head_dim)
        lse_stride = lse_stride_of(attend[0][0])

        for layer, m in enumerate(self.layers):
            k, v, matrix = self.k_cache[layer], self.v_cache[layer], self._folded(m, "attn.c_attn")
            gemv_ln_qkv[gemv_tensor_launch(3 * d, d)](x, *matrix, q, k, v, pos, d, head_dim, EPS)
            decode_v4_parts[attend](q, k, v, *attention, pos, head_dim, scale)
            matrix = m["attn.c_proj.weight"], m["attn.c_proj.bias"]
            gemv_parts_residual[gemv_residual_launch(d, d)](*attention, *matrix, x, pos, d, head_dim, lse_stride)
            matrix = self._folded(m, "mlp.c_fc")
            gemv_ln_gelu[gemv_tensor_launch(d_ff, d)](x, *matrix, ff, 1, d_ff, d, EPS)
            matrix = m["mlp.c_proj.weight"], m["mlp.c_proj.bias"]
            gemv_bias_residual[gemv_residual_launch(d, d_ff)](ff, *matrix, x, 1, d, d_ff)
        self._choose(0, sampling)

    def _choose(self, at: int, sampling: Sampling | None) -> None:
        """Logits of row `at` of the residual stream, the token after position pos, and its embedding as row 0."""
        d, vocab_size, w = self.config.d_model, self.config.vocab_size, self.weights
        best, shown = (self._best, self._best_token), (self._tokens, self._shown, self._pos)
        embeddings = w["wte.weight"], w["wpe.weight"], self._x_flat
        gemv_ln_logits[self._head](self._x_flat, at, *self._head_matrix, self.logits, *best, vocab_size, d, EPS)
        if sampling is None:
            pick_best[pick_best_launch()](*best, self._head[0], vocab_size, *shown, *embeddings)
            return
        s = sampling
        if self._shares is None:
            self._shares = cuda.device_array(vocab_size, np.int64)
        n, temperature, k, p, seed, _ = check_sampling(vocab_size, s.temperature, s.top_k, s.top_p, s.seed)
        filter_logits[sample_launch()](self.logits, self._shares, n, temperature, k, p)
        draw_token_at[sample_launch()](self._shares, self._drawn, n, seed, self._step_number)
        append_token[append_token_launch()](self._drawn, *shown, self._step_number, *embeddings)

    def _graph(self, sampling: Sampling | None) -> Graph:
        """The graph of a step, recorded when it is first needed; one for greedy steps, one for the last sampling."""
        if sampling not in self._graphs:
            greedy = self._graphs.get(None)
            state, shown = self._state.copy_to_host(), self._shown.copy()
            made = Graph(lambda: self._step(sampling))  # runs it once: put everything back as it was
            self._state.copy_to_device(state)
            self._shown[:] = shown
            self._embed(1)
            self._graphs = {sampling: made} if greedy is None else {None: greedy, sampling: made}
        return self._graphs[sampling]

    # --- buffers and weights -----------------------------------------------------------------------------------------

    def _put(self, tokens: Sequence[int]) -> None:
        """Check a prompt, copy it to the device and move the end of the cache to its beginning."""
        check_tokens(tokens, self.config.vocab_size)
        self.check_length(len(tokens))
        cuda.synchronize()  # no step of an earlier request is under way
        state = np.zeros(self._state.size, np.int32)
        state[BEFORE_TOKENS:][: len(tokens)] = tokens
        self._state.copy_to_device(state)

    def _move_to(self, position: int) -> None:
        if position:
            kv_advance[kv_advance_launch()](self._pos, position)

    def _mark(self) -> Callable[[], None]:
        """Waits, when called, for what was launched so far."""
        if common.BACKEND != "gpu":
            return lambda: None
        event = cuda.event(timing=False)
        event.record()
        return event.synchronize

    def _fold_norms(self) -> None:
        """Every layer norm's weight and bias into the matrix behind it: see chapter 9's `gemv_ln`.

        GPT-2's last matrix is also its embedding, so that one is a copy.
        """
        d, vocab_size, w = self.config.d_model, self.config.vocab_size, self.weights
        self._plain_norm = cuda.to_device(np.ones(d, np.float32)), cuda.to_device(np.zeros(d, np.float32))
        for m in self.layers:
            for name, norm in (("attn.c_attn", "ln_1"), ("mlp.c_fc", "ln_2")):
                matrix, bias = m[f"{name}.weight"], m[f"{name}.bias"]
                m[f"{name}.row_sums"] = cuda.device_array(len(bias), np.float32)
                into = matrix, m[f"{name}.row_sums"], bias
                self._fold(matrix, bias, m[f"{norm}.weight"], m[f"{norm}.bias"], into)
        none = cuda.to_device(np.zeros(vocab_size, np.float32))
        head = cuda.device_array((vocab_size, d), np.float16), cuda.device_array(vocab_size, np.float32), none
        self._fold(w["wte.weight"], none, w["ln_f.weight"], w["ln_f.bias"], head)
        self._head_matrix = head

    @staticmethod
    def _fold(matrix, bias, ln_weight, ln_bias, into) -> None:
        N, d = matrix.shape
        fold_norm[fold_norm_launch(N)](matrix, bias, ln_weight, ln_bias, *into, N, d)

    @staticmethod
    def _folded(m, name: str) -> tuple:
        return m[f"{name}.weight"], m[f"{name}.row_sums"], m[f"{name}.bias"]

    def _rows(self, name: str, T: int):
        buffer = self._half[name]
        width = buffer.size // self.max_length
        return buffer[: T * width].reshape(T, width)

    def _upload(self, name: str, tensor: np.ndarray):
        """A weight on the device: matrices in float16, (out, in), embeddings as they are; vectors in float32."""
        if name.endswith(MATRICES):
            tensor = tensor.T
        dtype = np.float16 if tensor.ndim == 2 else np.float32
        return cuda.to_device(np.ascontiguousarray(tensor, dtype=dtype))

    def _check(self) -> None:
        config = self.config
        known = [size for size in HEAD_DIMS if size <= HEAD_DIM_MAX]
        if config.head_dim not in known:
            sizes = ", ".join(map(str, known))
            raise RequestError(f"head_dim is {config.head_dim}; engine fast has attention for {sizes}: use engine kv")
        for field in ("d_model", "d_ff"):
            if getattr(config, field) % 8:
                size = getattr(config, field)
                raise RequestError(
                    f"{field} is {size}; engine fast needs a multiple of 8 (16 bytes of float16): use engine kv"
                )
