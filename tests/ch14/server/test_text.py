"""What leaves as text: stop texts in a stream, characters of several tokens, log-probabilities with their text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch14_mini_llm.server.text import StopMatcher, TextStream
from ch14_mini_llm.tokenizer import encode
from ch14_mini_llm.tokenizer.own import GPT2Tokenizer

TEXTS = st.text("ab ", max_size=30)


def whole_answer(text, stops):
    """The text up to the stop that is completed first, by trying every place."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(deadline=None, max_examples=400)
@given(TEXTS, st.lists(st.text("ab ", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 30), max_size=10))
def test_deltas_join_up_to_the_text_before_the_stop(text, stops, cuts):
    matcher, places = StopMatcher(stops), sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    deltas = [matcher.push(text[begin:end]) for begin, end in zip(places, places[1:])]
    found = matcher.found
    deltas.append(matcher.finish())
    assert ("".join(deltas), found) == whole_answer(text, stops)


def test_no_more_is_held_back_than_may_become_a_stop():
    matcher = StopMatcher(["\n\nUser:", "END"])
    assert [matcher.push(piece) for piece in ("one E", "two\n", "three\n\nU", "s", "x\n")] == [
        "one ", "Etwo", "\nthree", "", "\n\nUsx",
    ]  # fmt: skip
    assert matcher.finish() == "\n" and not matcher.found


@pytest.mark.parametrize("text", ["naïve café", "👩‍👩‍👧 and 🇩🇪🇫🇷", "e\u0301\u0323 combining", "日本語"])
def test_characters_of_several_tokens_leave_whole(text):
    tokens, stream = encode(text), TextStream(GPT2Tokenizer())
    deltas = [stream.push(token)[0] for token in tokens]
    assert "".join(deltas) + stream.finish()[0] == text and "\ufffd" not in "".join(deltas)
    assert stream.n_tokens == len(tokens)


def test_a_character_that_is_cut_off_is_replaced_at_the_end_alone():
    tokens, stream = encode("a 👩"), TextStream(GPT2Tokenizer())
    deltas = [stream.push(token)[0] for token in tokens[:-1]]
    assert "\ufffd" not in "".join(deltas) and "".join(deltas) + stream.finish()[0] == "a \ufffd"


def test_entries_leave_with_the_first_character_of_their_token():
    tokens, stream = encode("one two three four"), TextStream(GPT2Tokenizer(), ["three f"])
    left = [stream.push(token, number) for number, token in enumerate(tokens)]
    assert [text for text, _ in left] == ["one", " two", " ", ""] and stream.stopped
    assert [entries for _, entries in left] == [[(0, 0)], [(3, 1)], [(7, 2)], []]
    assert stream.finish() == ("", [])


def test_of_several_stops_the_one_that_is_completed_first():
    for pieces in (["abcd"], ["a", "b", "c", "d"]):
        matcher = StopMatcher(["bcd", "c"])
        assert "".join(map(matcher.push, pieces)) == "ab" and matcher.found
