"""Exercise ch14/long_prompt: from a prompt of any length to 64 more tokens, each of them out as soon as it is made.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch14/long_prompt
"""

import common  # picks the backend, so before numba.cuda

# isort: split
from itertools import islice

from ch14_mini_llm.engine.request import RequestError, check_tokens
from ch14_mini_llm.model.config import GPT2Config
from ch14_mini_llm.naive.gpt2 import GPT2


def generate(model, tokens, max_new, stop=None):
    """Yield the token ids that follow ``tokens``, most likely ones, each before the next one is worked on.

    model: its ``forward(tokens)`` returns the id that follows. tokens: a list of ids, left as it is. max_new: at least
    1; so many ids are made, or fewer if the id ``stop`` comes, which is not yielded.
    Raises `RequestError`, before the first forward, if the prompt is empty, an id is not in the vocabulary, or prompt
    and new tokens together are more than ``model.config.n_ctx``.
    """
    # --- your code begins ---
    check_tokens(tokens, model.config.vocab_size)
    length, n_ctx = len(tokens) + max_new, model.config.n_ctx
    if length > n_ctx:
        raise RequestError(
            f"{len(tokens)} prompt tokens and {max_new} new ones make {length}, but the context (n_ctx) is {n_ctx}: "
            "shorten the prompt, or ask for fewer"
        )
    text = list(tokens)
    for _ in range(max_new):
        token = model.forward(text)
        if token == stop:
            return
        text.append(token)
        yield token
    # --- your code ends ---


# What follows is given: it makes models of weights in memory, and watches what your loop does with them.

MODELS = {}


class WatchedGPT2(GPT2):
    """The capstone's model; ``contexts`` keeps what each forward was given."""

    def forward(self, tokens, choose=None):
        self.contexts.append(list(tokens))
        return super().forward(tokens, choose)


def make(name, config, tensors):
    """Make the model that the function below knows by ``name``."""
    MODELS[name] = WatchedGPT2(GPT2Config(**config), tensors)


def watch(name, tokens, max_new, stop=None):
    """What comes out of `generate`, at most one token more than asked for, as a dict.

    tokens: what came out. forwards: how many forwards had been started when each token came out. contexts: what each
    forward was given. prompt: the list that `generate` was given, afterwards. error: the text of a `RequestError`.
    """
    model, made, forwards, error = MODELS[name], [], [], None
    model.contexts = []
    try:
        for token in islice(generate(model, tokens, max_new, stop), max_new + 1):
            made.append(token)
            forwards.append(len(model.contexts))
    except RequestError as refused:
        error = str(refused)
    return {"tokens": made, "forwards": forwards, "contexts": model.contexts, "prompt": tokens, "error": error}
