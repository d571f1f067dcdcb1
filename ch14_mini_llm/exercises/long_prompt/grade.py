"""The checks of ch14/long_prompt: see `common.grade`. The oracle is a GPT-2 in NumPy."""

import pytest

from common.grade import check, gpt2_oracle

SIZES = dict(n_layer=2, n_head=2, d_model=64, d_ff=128, n_ctx=160, vocab_size=211)
WEIGHTS = gpt2_oracle.weights(SIZES, wte=0.2, wpe=0.5)
OTHER = dict(n_layer=1, n_head=2, d_model=64, d_ff=128, n_ctx=48, vocab_size=97)  # a limit is the model's, not 160
N_CTX, NEW = SIZES["n_ctx"], 64


def prompt(n, seed=0):
    return gpt2_oracle.prompt(SIZES, n, seed)


def follow(tokens, count):
    """The most likely tokens that follow, by the oracle."""
    text = list(tokens)
    for _ in range(count):
        text.append(int(gpt2_oracle.oracle(SIZES, WEIGHTS, text)[0][-1].argmax()))
    return text[len(tokens) :]


def with_zero(tokens, count):
    """``tokens`` so that 0 is in the text that follows: another token's name and 0 change places, in the model, too."""
    often = follow(tokens, count)[count // 2]
    WEIGHTS["wte.weight"][[0, often]] = WEIGHTS["wte.weight"][[often, 0]]
    return [{0: often, often: 0}.get(one, one) for one in tokens]


STOPPED = with_zero(prompt(20, seed=3), 24)


def told(n, max_new):
    return f"a prompt of {n} tokens, max_new = {max_new}"


def watch(student, tokens, max_new, on, stop=None, hint=None, other=False):
    """What `generate` did; a request that fits must not be refused. other: with the smaller model."""
    model = (OTHER, gpt2_oracle.weights(OTHER)) if other else (SIZES, WEIGHTS)
    student.call("make", "model", *model, on="making the model")
    answer = student.call("watch", "model", tokens, max_new, stop, on=on, hint=hint)
    seen = answer.value
    if hint is None:
        where = f" after {len(seen['tokens'])} tokens" if seen["tokens"] else ""
        check(seen["error"] is None, f"a RequestError{where}: {seen['error']}, on {on}", "fits")
        check(all(type(one) is int for one in seen["tokens"]), f"not all tokens are ints: {seen['tokens']}", "context")
    return seen, answer


def verify(tokens, made, on, hint):
    """Every token made must be a most likely one after those in front of it; one pass of the oracle tells all."""
    if not made:
        return
    logits = gpt2_oracle.oracle(SIZES, WEIGHTS, [*tokens, *(one % SIZES["vocab_size"] for one in made[:-1])])[0]
    for step, token in enumerate(made):
        row = logits[len(tokens) - 1 + step]
        right = 0 <= token < len(row) and row[token] > row.max() - 1e-3
        check(right, f"new token {step + 1} is {token}, expected {row.argmax()}, on {on}", hint)


@pytest.mark.parametrize("n", [17, 40, N_CTX - NEW])
def test_text(student, n):
    tokens, on = prompt(n), told(n, NEW)
    made = watch(student, tokens, NEW, on)[0]["tokens"]
    verify(tokens, made, on, "context")
    more = f"more than {NEW}" if len(made) > NEW else f"only {len(made)}"
    check(len(made) == NEW, f"{more} tokens came, on {on}", "count")


@pytest.mark.parametrize("n, max_new", [(1, 1), (17, 20), (N_CTX - 1, 1)])
def test_growth(student, n, max_new):
    tokens, on = prompt(n, seed=1), told(n, max_new)
    seen = watch(student, list(tokens), max_new, on)[0]
    for step, context in enumerate(seen["contexts"][:max_new]):
        expected = [*tokens, *seen["tokens"][:step]]
        what = f"a text of length {len(context)}" if len(context) != len(expected) else "another text"
        wrong = f"forward {step + 1} was given {what}, expected the whole of length {len(expected)}, on {on}"
        check(context == expected, wrong, "context")
    check(len(seen["contexts"]) == max_new, f"{len(seen['contexts'])} forwards for {max_new} tokens, on {on}", "count")
    now = seen["prompt"]
    check(now == tokens, f"the caller's list had {n} tokens and has {len(now)} now, on {on}", "grow")


def test_streaming(student):
    on = told(17, 12)
    seen = watch(student, prompt(17, seed=2), 12, on)[0]
    for step, forwards in enumerate(seen["forwards"]):
        late = f"when token {step + 1} came out, {forwards} forwards had been started, on {on}"
        check(forwards == step + 1, late, "stream")
    check(len(seen["tokens"]) == 12, f"{len(seen['tokens'])} tokens came, not 12, on {on}", "count")


def stopped(student, tokens, stop, expected, on):
    """``expected`` tokens must come, and then, after one more forward, nothing."""
    seen = watch(student, tokens, 24, on, stop)[0]
    made, forwards = seen["tokens"], len(seen["contexts"])
    verify(tokens, made[:expected], on, "stop")
    check(stop not in made, f"the stop token {stop} itself was yielded, on {on}", "stop")
    check(len(made) == expected, f"{len(made)} tokens came, expected {expected}, on {on}", "stop")
    wanted = min(expected + 1, 24)
    check(forwards == wanted, f"{forwards} forwards, of which {wanted} were needed, on {on}", "stop")


def test_stop(student):
    tokens = STOPPED
    text = follow(tokens, 24)
    places = [text.index(one) for one in dict.fromkeys(text)]  # where a token comes for the first time
    for place in (0, places[len(places) // 2]):
        on = f"{told(20, 24)}, stop = {text[place]}, which is token {place + 1} of the text"
        stopped(student, tokens, text[place], place, on)
    never = next(one for one in tokens if one not in text)
    stopped(student, tokens, never, 24, f"{told(20, 24)}, stop = {never}, which stands in the prompt only")
    assert 0 in text, "the case that distinguishes `if stop` from `is not None`"
    place = text.index(0)
    stopped(student, tokens, 0, place, f"{told(20, 24)}, stop = 0, which is token {place + 1} of the text")


def test_refused(student):
    for n, max_new in ((N_CTX - NEW + 1, NEW), (N_CTX, 1), (10, N_CTX)):
        on = f"{told(n, max_new)}, n_ctx = {N_CTX}"
        text = refusal(student, prompt(n, seed=4), max_new, on, "fits")
        check(str(N_CTX) in text, f"the error does not name the limit {N_CTX}: {text!r}, on {on}", "fits")
    refusal(student, [], 5, "an empty prompt", "tokens")
    for sizes in (SIZES, OTHER):
        for stranger in (sizes["vocab_size"], -1):
            tokens = gpt2_oracle.prompt(sizes, 30, seed=5)
            tokens[20] = stranger
            on = f"a prompt with the id {stranger}, of a vocabulary of {sizes['vocab_size']}"
            refusal(student, tokens, 5, on, "tokens", sizes is OTHER)
    limit, tokens = OTHER["n_ctx"], gpt2_oracle.prompt(OTHER, 41, seed=6)
    on = f"{told(41, 8)}, n_ctx = {limit}"
    text = refusal(student, tokens, 8, on, "fits", True)
    check(str(limit) in text, f"the error does not name the limit {limit}: {text!r}, on {on}", "fits")
    on = f"{told(41, 7)}, n_ctx = {limit}"
    seen, _ = watch(student, tokens, 7, on, other=True)
    check(len(seen["tokens"]) == 7, f"{len(seen['tokens'])} tokens came, not 7, on {on}", "fits")


def refusal(student, tokens, max_new, on, hint, other=False):
    """The text of the RequestError that must come, before anything else does."""
    seen, answer = watch(student, tokens, max_new, on, hint=hint, other=other)
    made = len(seen["tokens"])
    check(seen["error"] is not None, f"no RequestError, but {made} tokens, on {on}", hint)
    check(made == 0, f"{made} tokens came before the RequestError, on {on}", hint)
    started = len(seen["contexts"])
    check(started == 0, f"the RequestError came after a forward had been started, on {on}", hint)
    ran = len(answer.launches)
    check(ran == 0, f"{ran} kernels were launched before the RequestError, on {on}", hint)
    return seen["error"]
