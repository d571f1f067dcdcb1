"""The checks of ch14/guesses: see `common.grade`. Texts are in letters: each is a random token, a blank is none.

Tokens are even, except for what the pretend model says behind a wrong guess: that is odd.
"""

import string

from common.grade import Wrong, check, random

REPEATS = "abcdefg" * 8
CHANGES = "abcdefghij abcdXfghij abcdXfgYij kbcdefgYij abcdXfgYij abcdXfghZj"
FEW = "abcabdabcabcabdbababcbcaabcabdabcccabcabdbabdabccccbcabd"
FRESH = string.ascii_letters
KINDS = {REPEATS: "repeats itself", CHANGES: "repeats itself with changes", FEW: "has four tokens", FRESH: "is all new"}


def ids(letters, seed=0):
    """Tokens for letters; "0" is the token 0."""
    names = dict(zip(FRESH, (2 * (1 + random(14, seed).permutation(len(FRESH)))).tolist())) | {"0": 0}
    return [names[letter] for letter in letters if letter != " "]


# --- guess -----------------------------------------------------------------------------------------------------------


def oracle(tokens, size, most, last=None):
    """What `guess` must find. last: the last place that counts; any one in front of the text's end by default."""
    last = len(tokens) - 1 if last is None else last
    places = [end for end in range(size, last + 1) if tokens[end - size : end] == tokens[len(tokens) - size :]]
    behind = tokens[places[-1] :] if places else []
    return (behind * (most + 1))[:most]


def asked(tokens, size, most):
    return f"tokens = {tokens}, size = {size}, most = {most}"


def found(student, tokens, size, most):
    try:
        got = student.call("guess", tokens, size, most, on=asked(tokens, size, most)).value
    except Wrong as wrong:
        if "ZeroDivisionError" in wrong.seen:  # no token stands behind the text's own end
            wrong.hint = "end"
        raise
    check(isinstance(got, list), f"guess returned {got}, not a list, on {asked(tokens, size, most)}", "list")
    return got


def differ(got, expected, tokens, size, most, hint):
    check(got == expected, f"guessed {got}, expected {expected}, on {asked(tokens, size, most)}", hint)


def test_found(student):
    once, far = ids("xyabcdefzuvwabcdef"), ids(FRESH + "abc", 1)
    for tokens, size, most in ((once, 3, 4), (once, 3, 6), (far, 3, 1), (far, 3, 7)):
        got, expected = found(student, tokens, size, most), oracle(tokens, size, most)
        n = len(got)
        part = n > 0 and (got[: len(expected)] == expected or got == expected[:n])
        differ(got, expected, tokens, size, most, "most" if part else "place" if n else "end")
    differ(found(student, once, 3, 0), [], once, 3, 0, "most")
    decoys = "xaqybz a", "xabq ycbz aw ab", "xabcq uvbcy pabz cbaw abc", "xabcdeq uvbcdey pabcdz edcbaw abcde"
    for size, letters in zip((1, 2, 3, 5), decoys):
        tokens = ids(letters, size)
        for most in (1, 5):
            differ(found(student, tokens, size, most), oracle(tokens, size, most), tokens, size, most, "whole")
    for size, letters in ((1, "abcd"), (2, "aba"), (3, "xabcyzpbc"), (4, "xabcdyabcpbcdabd"), (3, "abcdacb")):
        tokens = ids(letters, size)
        differ(found(student, tokens, size, 3), [], tokens, size, 3, "whole")
    for size in (1, 2, 3, 4):
        for n in range(size + 1):
            differ(found(student, [8] * n, size, 2), [], [8] * n, size, 2, "whole")


def test_last(student):
    for size, key in ((3, "abc"), (1, "a"), (2, "ab"), (4, "abcd")):
        for text in ("x K uvpq K wyrs K", "K uvpq K wyrs K zopq K xyuv K", "K K wyrs K"):
            tokens = ids(text.replace("K", key), size)
            for most in (1, 4):
                differ(found(student, tokens, size, most), oracle(tokens, size, most), tokens, size, most, "last")
    overlaps = (3, "xabayzababa", 2), (2, "xaayzaaa", 1), (4, "xababyzuababab", 2), (3, "xaaaycaaaa", 1)
    for size, letters, most in overlaps:
        tokens = ids(letters, size)
        differ(found(student, tokens, size, most), oracle(tokens, size, most), tokens, size, most, "overlap")


def test_round(student):
    texts = {"xabcyabc": 3, "abcabc": 3, "aaaa": 3, "ababa": 3, "xyabcdab": 2, "uaa": 1, "uvabca": 1}
    for letters, size in texts.items():
        tokens = ids(letters, len(letters))
        for most in (5, 7, 12):
            differ(found(student, tokens, size, most), oracle(tokens, size, most), tokens, size, most, "round")
    for seed in range(12):
        for size in (1, 2, 3):
            tokens = random(14, seed, size).integers(0, 3, 12 + seed).tolist()
            differ(found(student, tokens, size, 8), oracle(tokens, size, 8), tokens, size, 8, "round")


# --- accepted --------------------------------------------------------------------------------------------------------


def counted(student, guesses, made):
    on = f"guesses = {guesses}, made = {made}"
    got = student.call("accepted", guesses, made, on=on).value
    check(isinstance(got, list), f"accepted returned {got}, not a list, on {on}", "list")
    right = next((i for i, one in enumerate(guesses) if made[i] != one), len(guesses))
    expected, n = made[: right + 1], len(got)
    if got == expected:
        return
    if n > right + 1:
        hint = "behind"
    elif n < right:
        hint = "further"
    else:
        hint = "bonus" if right == len(guesses) else "own"
    check(False, f"{got} counts, expected {expected}, on {on}", hint)


def test_counted(student):
    a, b, c, d, e, f, g, h = ids("abcdefgh")
    counted(student, [a, b, c, d, e], [a, b, c, f, g, h])
    counted(student, [a, b, c, d, e, f, g], [a, h, b, c, d, e, f, g])
    counted(student, [a, b, c, d], [a, e, c, d, f])  # behind the wrong one, others look right
    counted(student, [a, b, c], [a, b, c, d])
    counted(student, [a], [a, b])
    counted(student, [a, b, c], [d, a, b, c])
    counted(student, [a, a, a], [b, a, a, a])
    counted(student, [a], [b, a])
    counted(student, [], [a])
    for seed in range(10):
        numbers = random(14, seed, 5).integers(0, 2, 13).tolist()
        counted(student, numbers[:6], numbers[6:])


# --- generate --------------------------------------------------------------------------------------------------------


def described(letters, n_prompt, max_new, size, most, stop):
    text = f"a text that {KINDS[letters]}" if letters in KINDS else f"the text {ids(letters)}"
    end = "" if stop is None else f", stop = {stop}"
    return f"{text}, of which {n_prompt} tokens are the prompt, max_new = {max_new}, size = {size}, most = {most}{end}"


def watch(student, letters, n_prompt, max_new, size, most, stop=None, endless="loop"):
    """``(what generate did, its text, the input in words)``. endless: the hint if it does not end."""
    on, text = described(letters, n_prompt, max_new, size, most, stop), ids(letters)
    seen = student.call("watch", text, n_prompt, max_new, size, most, stop, on=on).value
    check(not seen["endless"], f"generate had not ended after {len(seen['steps']) - 1} steps, on {on}", endless)
    check(isinstance(seen["tokens"], list), f"generate returned {seen['tokens']}, not a list, on {on}", "list")
    return seen, text, on


RUNS = [
    (*text, *sizes)
    for text in ((FRESH, 10), (REPEATS, 10), (CHANGES, 12), (FEW, 8), (REPEATS, 1))
    for sizes in ((21, 3, 7), (2, 3, 7), (1, 3, 7), (24, 2, 3), (25, 1, 1), (23, 4, 5), (17, 1, 6), (9, 2, 12))
]


def test_text(student):
    for letters, n_prompt, max_new, size, most in RUNS:
        seen, text, on = watch(student, letters, n_prompt, max_new, size, most)
        made, prompt, expected = seen["tokens"], text[:n_prompt], text[n_prompt : n_prompt + max_new]
        check(seen["prompt"] == prompt, f"the list of the caller was {prompt} and is {seen['prompt']}, on {on}", "copy")
        check(made[:n_prompt] != prompt, f"what was returned begins with the prompt, on {on}", "new")
        late = len(seen["steps"][-1]["tokens"]) >= n_prompt + max_new if seen["steps"] else True
        count = f"{len(made)} tokens came, not {max_new}, on {on}"
        check(len(made) <= max_new, count, "loop" if late else "room")
        at = next((i for i, (one, right) in enumerate(zip(made, expected)) if one != right), None)
        if at is not None:
            check(False, f"new token {at + 1} is {made[at]}, expected {expected[at]}, on {on}", "text")
        check(len(made) == max_new, count, "loop")
        for i, step in enumerate(seen["steps"]):
            n = len(step["tokens"])
            what = f"step {i + 1} was given another text than prompt and new tokens, on {on}"
            check(n >= n_prompt and step["tokens"] == text[:n], what, "text")


def needed(text, n_prompt, max_new, size, most, stop=None):
    """How many steps it takes."""
    steps, made = 0, 0
    while made < max_new:
        start = n_prompt + made
        guesses = oracle(text[:start], size, min(most, max_new - made - 1))
        right = next((i for i, one in enumerate(guesses) if one != text[start + i]), len(guesses))
        steps, made = steps + 1, made + right + 1
        if stop in text[start : start + right + 1]:
            break
    return steps


def test_steps(student):
    for letters, n_prompt, max_new, size, most in RUNS:
        seen, text, on = watch(student, letters, n_prompt, max_new, size, most)
        steps, fewest = seen["steps"], needed(text, n_prompt, max_new, size, most)
        some = fewest == max_new or any(step["guesses"] for step in steps)
        check(some, f"none of {len(steps)} steps had a guess, where {fewest} are enough, on {on}", "guesses")
        for i, step in enumerate(steps):
            tokens, got = step["tokens"], step["guesses"]
            left = n_prompt + max_new - len(tokens)
            check(left > 0, f"step {i + 1} began when all tokens were there, on {on}", "loop")
            expected = oracle(tokens, size, min(most, left - 1))
            what = f"step {i + 1} had the guesses {got}, expected {expected}, with {left} tokens left to make, on {on}"
            short = 0 < len(got) < len(expected) == left - 1 or not got and len(expected) == left - 1 == 1
            check(got == expected, what, "room" if len(got) > left - 1 or short else "handed")
        check(len(steps) <= fewest, f"{len(steps)} steps, and {fewest} are enough, on {on}", "several")


def stopped(student, letters, n_prompt, stop, count, hint=None, fewer="counts"):
    """``count`` tokens must come, and no step after that with the stop token. fewer: the hint if fewer come."""
    sizes = 20, 3, 7
    seen, text, on = watch(student, letters, n_prompt, *sizes, stop, hint or "middle")
    made, expected = seen["tokens"], text[n_prompt : n_prompt + count]
    if made != expected:
        fitting = "stop" if made == [*expected, stop] else fewer if len(made) < count else "middle"
        check(False, f"the new tokens are {made}, expected {expected}, on {on}", hint or fitting)
    steps, fewest = len(seen["steps"]), needed(text, n_prompt, *sizes, stop)
    check(steps <= fewest, f"{steps} steps, and {fewest} are enough, on {on}", hint or "middle")


def test_stop(student):
    new, q = string.ascii_uppercase, ids("Q")[0]
    stopped(student, FRESH, 8, ids("n")[0], 5)
    again, of = "abcdefghijklm" * 3, ids("abcdefghijklm")
    stopped(student, again, 16, q, 20)  # never
    stopped(student, "Q" + again, 17, q, 20)  # in the prompt only
    for at, token in enumerate(of[3:11]):  # the first of seven right guesses, …, the token behind them
        stopped(student, again, 16, token, at, fewer="early")
    stopped(student, again, 16, of[12], 9, fewer="early")  # in the second step
    other = "abcdQfghijkl abcdRfghij" + new[:13]
    stopped(student, other, 15, q, 20)  # a guess that is wrong
    stopped(student, other, 15, ids("f")[0] + 1, 20)  # said behind a guess that is wrong
    stopped(student, other, 15, ids("f")[0], 2)  # … in the place of the stop token, which counts in the next step
    stopped(student, "abcdefgh ijk0lmnopqrs" + new, 8, 0, 3, "zero")
    stopped(student, "abcde0fghij abc de0fghij" + new, 14, 0, 2, "zero")
