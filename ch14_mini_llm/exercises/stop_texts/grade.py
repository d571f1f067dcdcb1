"""The checks of ch14/stop_texts: see `common.grade`. The oracle tries every place where a text may end."""

import pytest

from common.grade import check

TEXT = "The capital of France is Paris.\nUser: and of Spain?\nUser: none"
AAB = "xaaab aab"


def oracle(text, stops):
    """``(what is shown of a text that has come so far, whether a stop text has ended it)``."""
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            return text[: end - max(map(len, done))], True
    keep = max([n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])], default=0)
    return text[: len(text) - keep], False


def cut(text, *sizes):
    """A text in pieces of these sizes, over and over."""
    pieces, at, turn = [], 0, 0
    while at < len(text):
        pieces.append(text[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
    return pieces


def case(stops, pieces):
    return f"the stops {', '.join(map(repr, stops))} and the pieces {'|'.join(pieces)!r}"


def watch(student, stops, pieces, on=False):
    seen = student.call("watch", stops, pieces, on, on=case(stops, pieces)).value
    what = f"not a text but {seen['deltas']}, on {case(stops, pieces)}"
    check(all(isinstance(delta, str) for delta in seen["deltas"]), what)
    return seen


def same(student, stops, pieces, hint):
    """The whole that is shown, and whether a stop text was found, must be the oracle's."""
    seen, (shown, found) = watch(student, stops, pieces), oracle("".join(pieces), stops)
    expected = shown if found else "".join(pieces)
    made = "".join(seen["deltas"])
    check(made == expected, f"{made!r} was shown, expected {expected!r}, on {case(stops, pieces)}", hint)
    check(seen["found"][-1] == found, f"found is {seen['found'][-1]}, on {case(stops, pieces)}", hint)


def test_whole(student):
    for stop in ("\nUser:", ".", "capital", "T", "none", "user:", "absent", "is Paris.\n"):
        same(student, [stop], [TEXT], "cut")
    same(student, ["b"], ["a b "], "cut")
    same(student, ["x"], ["nothing", "", " of it "], "cut")


@pytest.mark.parametrize("sizes", [(1,), (2, 1), (3, 7, 5), (40, 1)])
def test_across(student, sizes):
    for stop in ("\nUser:", "France is", "is Paris.\n", "user:", "User: none"):
        same(student, [stop], cut(TEXT, *sizes), "across")
    for text, stop in ((AAB, "aab"), ("ababac", "abac"), ("aaaaaaab", "aaab"), ("ab abc", "abc")):
        same(student, [stop], cut(text, *sizes), "overlap")


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (6,)])
def test_early(student, sizes):
    """After each piece as much has been shown as may be, and no more."""
    for stops in (["\nUser:"], ["is Paris.\n"], ["of Spain???"], ["User: never"]):
        pieces = cut(TEXT, *sizes)
        seen = watch(student, stops, pieces)
        for n in range(1, len(seen["found"]) + 1):
            expected, shown = oracle("".join(pieces[:n]), stops)[0], "".join(seen["deltas"][:n])
            what = f"after piece {n} {shown!r} has been shown, expected {expected!r}, on {case(stops, pieces)}"
            check(shown == expected, what, "held" if len(shown) < len(expected) else "across")


def test_several(student):
    for stops in (["zz", "cde"], ["cde", "zz"], ["cdefg!", "def"], ["def", "cdefg!"]):
        same(student, stops, cut("abcdefgh", 1), "each")
    for stops in (["bcd", "c"], ["c", "bcd"], ["abcdefgh", "ef", "d"], ["e", "bcdef"]):
        for sizes in ((8,), (1,), (3,)):
            same(student, stops, cut("abcdefgh", *sizes), "first")
    for stops in (["b", "ab"], ["ab", "b"], ["d", "cd", "bcd"]):
        for sizes in ((8,), (1,)):
            same(student, stops, cut("xabcd", *sizes), "longest")


def test_end(student):
    for stops, pieces in ((["END"], ["the E"]), (["END"], ["the", " E", "N"]), (["aaab"], ["a", "a", "a"])):
        same(student, stops, pieces, "finish")
    seen = watch(student, ["END"], ["the E", "ND of ", "it END", "EN"], on=True)
    made = "".join(seen["deltas"])
    check(made == "the ", f"{made!r} was shown in all, expected 'the ', with pieces behind the stop text", "after")
    check(seen["found"] == [False, True, True, True], f"found was {seen['found']}", "after")
