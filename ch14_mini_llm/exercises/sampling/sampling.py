"""Exercise ch14/sampling: draw the next token instead of taking the likeliest, without the logits leaving the device.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch14/sampling
"""

import common  # picks the backend, so before numba.cuda

# isort: split
import math

import numpy as np
from numba import cuda

from ch14_mini_llm.engine.request import RequestError
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.naive.gpt2 import GPT2
from chapters.ch13_llm_ops.sampling import draw_token, filter_logits, sample_launch


class Sampler:
    """Turns logits into a token: temperature, top-k, one draw. Call number s of it, from 0, is step s of the seed."""

    def __init__(self, vocab_size, temperature, top_k, seed):
        """temperature: above 0 and finite. top_k: 1 to vocab_size. seed: 0 to 2**64 - 1.

        Raises `RequestError`, naming the setting, its value and its limits, if temperature or top_k is out of range.
        """
        # --- your code begins ---
        raise NotImplementedError("your code")
        # --- your code ends ---

    def __call__(self, logits, next_token):
        """Draw next_token (1,) int32 from logits (vocab_size,) float32; both are on the device, and stay there."""
        # --- your code begins ---
        raise NotImplementedError("your code")
        # --- your code ends ---


# What follows is given: it calls your sampler, on logits and in the capstone's model, and counts copies to the host.

MODELS = {}


class Copies:
    """While it is open, ``elements`` counts what is copied to the host of arrays like ``array``."""

    def __init__(self, array):
        self.kind, self.elements = type(array), 0

    def __enter__(self):
        self.original = self.kind.copy_to_host

        def copy_to_host(array, *args, **options):
            self.elements += array.size
            return self.original(array, *args, **options)

        self.kind.copy_to_host = copy_to_host
        return self

    def __exit__(self, *error):
        self.kind.copy_to_host = self.original


def draws(logits, temperature, top_k, seed, steps):
    """The first ``steps`` tokens that a new sampler draws from the same logits, (steps,) int32, and a second figure.

    The figure: how many elements your sampler copied to the host. (The loop reads the token itself: that is allowed.)
    """
    sampler = Sampler(len(logits), temperature, top_k, seed)
    on_device, next_token = cuda.to_device(logits), cuda.to_device(np.full(1, -7, np.int32))
    tokens, copied = np.empty(steps, np.int32), 0
    for step in range(steps):
        with Copies(on_device) as copies:
            sampler(on_device, next_token)
        copied += copies.elements
        tokens[step] = next_token.copy_to_host()[0]
    return tokens, copied


def make(name, config, tensors):
    """Make the model that the function below knows by ``name``."""
    MODELS[name] = GPT2(GPT2Config(**config), tensors)


def text(name, tokens, max_new, temperature, top_k, seed):
    """What the model writes behind ``tokens`` with a new sampler, and how many elements came to the host for it."""
    model, made = MODELS[name], []
    sampler = Sampler(model.config.vocab_size, temperature, top_k, seed)
    with Copies(model.logits) as copies:
        for _ in range(max_new):
            made.append(model.forward([*tokens, *made], choose=sampler))
    return made, copies.elements


def refusal(vocab_size, temperature, top_k):
    """The text of the `RequestError` for these settings, or None if there is none."""
    try:
        Sampler(vocab_size, temperature, top_k, 1)
    except RequestError as error:
        return str(error)
    return None
