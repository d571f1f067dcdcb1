"""What the engine is compared with, both made of the same weights: a static batch in torch, and transformers' engine.

`StaticBatch` is gpt-fast's way of decoding (https://github.com/meta-pytorch/gpt-fast) with more than one sequence:
prompts of one length, keys and values in buffers of a fixed size, and a step that torch compiles into one CUDA graph.
Nothing joins or leaves, so the host has nothing to do. `PagedTransformers` is Hugging Face's own continuous batching,
which takes requests of any length, as our engine does. Both take the most likely token every time.

    seconds, tokens = StaticBatch(config, tensors, n=2, length=32).run([[15496, 11], [464, 995]], 8)

`Judge` says of anybody's tokens whether float32 would have chosen them, `steady` of their times how fast they came.
"""

import inspect
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.gpt2 import _summary
from benchmarks.torch_llama import TorchLlama
from ch14_mini_llm.model.config import LlamaConfig

MULTIPLE = 64  # the buffers' length is a multiple of it: 128 + 200 tokens get 384 places
PAGED_ROWS = 8192  # tokens of a step of transformers' engine, at most: its own default where there is memory


# --- a static batch, compiled ----------------------------------------------------------------------------------------


class _Attention(peers._Attention):
    """Causal self-attention of n sequences, with keys and values in buffers (n, n_head, L, head_dim)."""

    def forward(self, x, position, mask):
        heads = (*x.shape[:2], self.n_head, self.head_dim)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        self.keys[:, :, position], self.values[:, :, position] = k, v
        if mask is None:  # prompts: all there is to look at are their own keys
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class BatchedGPT2(peers.TorchGPT2):
    """A `TorchGPT2` of n sequences that are equally long.

    After `reserve`: ``token`` (n, 1) int64, the tokens to run; ``position`` (1,) int64, where they stand; ``made``
    (n, L) int64, at each position the token that follows it.
    """

    def __init__(self, config):
        super().__init__(config)
        for block in self.h:
            block.attn = _Attention(config)

    def reserve(self, n, length):
        """Make the cache for ``n`` sequences of ``length`` tokens."""
        cache, attentions = (n, self.config.n_head, length, self.config.head_dim), [block.attn for block in self.h]
        peers.reserve_buffers(self, attentions, cache, self.wte.weight, peers.batch_shapes(n, length))


def decode_batch(model):
    """One step of a `BatchedGPT2`: runs its ``token``, and leaves the next tokens and position in its buffers."""
    mask = (model.columns <= model.position)[None]
    hidden = model(model.token, model.position, mask)
    token = model.head(hidden[:, -1]).argmax(-1, keepdim=True)
    model.made[:, model.position] = token
    model.token.copy_(token)
    model.position.add_(1)


class StaticBatch:
    """``n`` sequences of at most ``length`` tokens, prompts and new ones together.

    tuned: with gpt-fast's two settings, see `peers.TunedDecode`. compile: by default on a GPU only. config, tensors,
    device, dtype: as for `peers.Peer`.
    """

    name = "torch.compile, static batch"

    def __init__(self, config, tensors, n, length, tuned=False, device=None, dtype=None, compile=None):
        self.device = torch.device(device or peers.default_device())
        gpu = self.device.type == "cuda"
        kind = TorchLlama if isinstance(config, LlamaConfig) else BatchedGPT2
        self.model = kind.of(config, tensors, self.device, dtype or (torch.float16 if gpu else torch.float32))
        self.n, self.tuned, self.compiles = n, tuned, gpu if compile is None else compile
        self.length = min(-(-length // MULTIPLE) * MULTIPLE, config.n_ctx)
        self.model.reserve(n, self.length)
        self._step, self._skips = decode_batch, peers._graphs_skipped()
        if self.compiles:
            self._step = torch.compile(decode_batch, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @property
    def note(self):
        """What a reader of the figures should know, or None."""
        if not self.compiles:
            return "not compiled: there is no GPU"
        return "torch made no CUDA graph of the step" if peers._graphs_skipped() > self._skips else None

    def run(self, prompts, new):
        """(seconds of the last ``new - 1`` steps, a list of ``new`` tokens for each) behind prompts of one length."""
        start, model = len(prompts[0]), self.model
        if len(prompts) != self.n or {len(prompt) for prompt in prompts} != {start} or start + new > self.length:
            raise ValueError(f"this takes {self.n} prompts of one length, and {self.length} tokens with the new ones")
        with torch.no_grad():
            ids = torch.tensor(prompts, device=self.device)
            hidden = model(ids, torch.arange(start, device=self.device))
            first = model.head(hidden[:, -1]).argmax(-1, keepdim=True)
            model.token.copy_(first)
            model.position.fill_(start)
            self._wait()
            begun = time.perf_counter()
            with peers.tuning(self.tuned):
                for _ in range(new - 1):
                    torch.compiler.cudagraph_mark_step_begin()
                    self._step(model)  # nobody reads a token before the last one: the device never waits
            self._wait()
            seconds = time.perf_counter() - begun
        return seconds, torch.cat([first, model.made[:, start : start + new - 1]], 1).tolist()

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# --- transformers' continuous batching -------------------------------------------------------------------------------


class PagedTransformers(peers.TransformersEager):
    """transformers' GPT-2 with its continuous batching: keys and values in pages, a thread that plans the steps.

    Attention is torch's ``scaled_dot_product_attention``, for which that engine builds a mask of all queries times all
    keys of a step, and uses no CUDA graphs. It prefers the package flash-attn, which has to be built for each torch.
    """

    name = "transformers, continuous batching"

    def _build(self, tensors):
        from transformers import logging
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        logging.set_verbosity_error()  # its advice to use flash-attn, at each call
        super()._build(tensors)
        self._known = inspect.signature(ContinuousBatchingConfig).parameters
        if "auto_switch_to_flash" not in self._known:  # as in 5.17, where "sdpa" alone is without pages
            self.model.set_attn_implementation("paged|sdpa")

    def _config(self, requests):
        """Room for all ``requests`` at once; everything else as it comes, but without sharing of prompts."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        options = {"max_requests_per_batch": len(requests), "allow_block_sharing": False, "auto_switch_to_flash": False}
        config = ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in self._known})
        page = getattr(config, "page_size", None) or config.block_size
        config.num_blocks = sum((len(prompt) + new) // page + 2 for prompt, new in requests)
        prompts = sum(len(prompt) for prompt, _ in requests)
        config.max_batch_tokens = max(len(requests), min(prompts, PAGED_ROWS))
        return config

    def runs(self, requests, times=1, warm=8):
        """Run ``requests``, pairs of a prompt and how many new tokens, ``times`` times.

        warm: before, they run once for at most so many new tokens. Returns [(seconds to the last token, [tokens of
        each request], [the times at which it had them])]. Raises RuntimeError if a request fails.
        """
        from transformers import GenerationConfig

        options = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=warm)
        settings = {"generation_config": options, "continuous_batching_config": self._config(requests)}
        with self.model.continuous_batching_context_manager(**settings) as manager:
            self._run(manager, [(prompt, min(new, warm)) for prompt, new in requests])
            return [self._run(manager, requests) for _ in range(times)]

    @staticmethod
    def _run(manager, requests):
        start, found = time.perf_counter(), {}
        ids = [manager.add_request(prompt, max_new_tokens=new, record_timestamps=True) for prompt, new in requests]
        while len(found) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            if result is not None and result.error or result is None and not manager.is_running():
                raise RuntimeError(f"transformers: {result.error if result is not None else 'its thread has ended'}")
        seconds, results = time.perf_counter() - start, [found[id] for id in ids]
        return seconds, [result.generated_tokens for result in results], [result.timestamps for result in results]


# --- as rows of a table: b is a `benchmarks.engine.Bench` ------------------------------------------------------------

SETTINGS = {"compiled": False, "tuned": True}  # of a static batch: is it tuned
PEERS = (*SETTINGS, "transformers")
TUNED_MOST = 1  # sequences: with 8 to 256 the tuned kernels were 4 to 25 % slower on an H200, and took minutes to find


def static_row(b, prompts, new):
    """The rate of decoding of a static batch with each of the settings asked for; the figure is the faster one's."""
    found, n, length = {}, len(prompts), len(prompts[0]) + new
    wanted = [name for name in SETTINGS if name in b.peers]
    if n > TUNED_MOST and len(wanted) > 1:
        wanted.remove("tuned")
    for setting in wanted if b.device == "cuda" else wanted[:1]:  # nothing is compiled on a CPU: they are the same
        b.progress(f"{n} at once, {StaticBatch.name}, {setting}")
        torch.compiler.reset()  # of one function it keeps a few versions only, and complains about the next
        batch = StaticBatch(b.config, b.tensors, n, length, SETTINGS[setting], b.device)
        batch.run(prompts, new)  # compiles, and warms up
        runs = [batch.run(prompts, new) for _ in range(b.repeats)]
        rates = _summary([n * (new - 1) / seconds for seconds, _ in runs])
        found[setting] = {"tokens_s": rates, "note": batch.note, "worst_gap": b.check(prompts, runs[-1][1])}
        del batch  # its memory, before the next one needs it
    best = max(found, key=lambda setting: found[setting]["tokens_s"][0])
    compiled = {"setting": best, "settings": {name: row["tokens_s"] for name, row in found.items()}}
    return found[best] | (compiled if b.device == "cuda" else {})


def paged_row(b, requests, decoding=False):
    """The rate of transformers' engine, measured once, because it is slow. requests: pairs, as for its `runs`.

    decoding: while all of them decode, instead of from the first moment to the last token.
    """
    b.progress(f"{len(requests)} requests, {PagedTransformers.name}")
    ((seconds, tokens, stamps),) = PagedTransformers(b.config, b.tensors, device=b.device).runs(requests)
    rate = steady(stamps)[0] if decoding else sum(map(len, tokens)) / seconds
    return {"tokens_s": _summary([rate]), "worst_gap": b.check([prompt for prompt, _ in requests], tokens)}


# --- what tokens and their times say ---------------------------------------------------------------------------------


def steady(stamps):
    """(tokens a second while all sequences decode, how many new tokens they have then in the mean).

    stamps: of each sequence, the times at which the host had its tokens. The clock starts when the last to begin has
    its first one. All before is done then; to wait for the device would give away a step that may be under way.
    Raises RuntimeError if there is no step in which all decode.
    """
    start, end = max(times[0] for times in stamps), min(times[-1] for times in stamps)
    rate, made = 0.0, []
    for times in stamps:
        inside = [number for number, stamp in enumerate(times) if start <= stamp <= end]
        if len(inside) < 2:
            raise RuntimeError("there is no step in which all sequences decode: let them make more tokens")
        rate += (len(inside) - 1) / (times[inside[-1]] - times[inside[0]])
        made.append((inside[1] + inside[-1]) / 2)
    return rate, statistics.mean(made)


class Judge:
    """A plain float32 forward pass in torch, as `peers.logit_gaps` has it; kept, because many are judged."""

    def __init__(self, config, tensors, device=None):
        kind = TorchLlama if isinstance(config, LlamaConfig) else peers.TorchGPT2
        self.device = torch.device(device or peers.default_device())
        self.model = kind.of(config, tensors, self.device, torch.float32)

    def gap(self, prompt, tokens, among=1):
        """How far the logit of a token of ``tokens`` is below the ``among``-th largest one, at most; NaN for a NaN."""
        ids = torch.tensor([[*prompt, *tokens[:-1]]], device=self.device)
        with torch.no_grad():
            hidden = self.model(ids, torch.arange(ids.shape[1], device=ids.device))[0, len(prompt) - 1 :]
            logits = self.model.head(hidden)
            chosen = logits.gather(1, torch.tensor(tokens, device=ids.device)[:, None])[:, 0]
            return float((logits.topk(among, 1).values[:, -1] - chosen).max().clamp(min=0))
