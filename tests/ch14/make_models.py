"""Random GPT-2 models for tests: a PyTorch one and the same one as a weight file."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "data"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def make_hf_model(folder, n_layer, n_head, d_model, n_ctx, vocab_size, seed, d_ff=None):
    """A random transformers GPT-2, saved under `folder` and converted by data/download_gpt2.py.

    Returns (path of the .bin, the torch model in eval mode). Every parameter is random, biases and layer norm too, so
    that dropping one shows; all are rounded to fp16 first, so that both models hold the same numbers.
    """
    import download_gpt2
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = Path(folder)
    config = GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=d_model, n_positions=n_ctx, vocab_size=vocab_size, n_inner=d_ff,
        bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if ".ln_" in name and name.endswith("weight"):
                noise = 1 + 0.2 * noise
            elif name.endswith("bias"):
                noise = 0.1 * noise
            else:
                # unit-variance outputs: rows of an embedding have norm 1, matrices are (in, out)
                fan_in = d_model if ".wte." in name or ".wpe." in name else parameter.shape[0]
                noise = noise / fan_in**0.5
            parameter.copy_(noise.half().float())
    model.save_pretrained(folder / "hf")
    path = folder / "model.bin"
    download_gpt2.convert(folder / "hf", path)
    return path, model
