"""Exercise ch14/guesses: guess how a text goes on, have a model check several guesses in one step, and keep its text.

Edit between the marks only; the task is in README.md beside this file. Grade it: make grade EX=ch14/guesses
"""


def guess(tokens, size, most):
    """What stood behind the last ``size`` tokens when they stood in the text before, the last time: ``most`` tokens.

    tokens: a list of ids, left as it is; it may be shorter than ``size``. size: at least 1. most: at least 0. If fewer
    than ``most`` tokens stand behind that place, it goes on from there again. Returns [] if there is no such place.
    """
    # --- your code begins ---
    n, last = len(tokens), tokens[-size:]
    for end in range(n - 1, size - 1, -1):
        if tokens[end - size : end] == last:
            return [tokens[end + i % (n - end)] for i in range(most)]
    return []
    # --- your code ends ---


def accepted(guesses, made):
    """The new tokens of a step, as a list: at least one.

    made: what the model says behind each row, one more than there are guesses: made[0] behind the newest token, made[1]
    behind guesses[0], and so on.
    """
    # --- your code begins ---
    n_right = 0
    while n_right < len(guesses) and guesses[n_right] == made[n_right]:
        n_right += 1
    return made[: n_right + 1]
    # --- your code ends ---


def generate(step, tokens, max_new, size, most, stop=None):
    """The tokens that follow ``tokens``, as a list: ``max_new`` of them, or fewer if the id ``stop`` comes.

    step: ``step(text, guesses)`` runs the model over a text's newest token and guesses of the next ones; it returns
    ``made``, as `accepted` takes it. tokens: a list of ids, not empty, left as it is. max_new: at least 1. size, most:
    as `guess` takes them. stop: left out; None for none.
    """
    # --- your code begins ---
    text, end = list(tokens), len(tokens) + max_new
    while len(text) < end:
        guesses = guess(text, size, min(most, end - len(text) - 1))
        for token in accepted(guesses, step(text, guesses)):
            if token == stop:
                return text[len(tokens) :]
            text.append(token)
    return text[len(tokens) :]
    # --- your code ends ---


# What follows is given: a pretend model, whose steps are written down.


class Endless(Exception):
    """There have been far more steps than tokens were asked for."""


class Pretend:
    """A model that knows one text only: behind each of its tokens, in its place, it says the next one.

    Behind any other token it says one that does not stand in the text at all.
    """

    def __init__(self, text, most_steps):
        self.text, self.most_steps, self.steps = text, most_steps, []

    def step(self, tokens, guesses):
        tokens, guesses = list(tokens), list(guesses)
        self.steps.append({"tokens": tokens, "guesses": guesses})
        if len(self.steps) > self.most_steps:
            raise Endless
        return [self.behind(tokens + guesses[:i]) for i in range(len(guesses) + 1)]

    def behind(self, tokens):
        n = len(tokens)
        following = self.text[n % len(self.text)]
        return following if tokens[-1:] == self.text[n - 1 : n] else following + 1


def watch(text, n_prompt, max_new, size, most, stop=None):
    """What `generate` did, with the first ``n_prompt`` tokens of a text that the model knows, as a dict.

    tokens: what it returned. steps: what each step was given. prompt: its ``tokens``, afterwards. endless: whether it
    was stopped.
    """
    model, prompt = Pretend(text, 2 * max_new + 10), text[:n_prompt]
    try:
        made, endless = generate(model.step, prompt, max_new, size, most, stop), False
    except Endless:
        made, endless = [], True
    return {"tokens": made, "steps": model.steps, "prompt": prompt, "endless": endless}
