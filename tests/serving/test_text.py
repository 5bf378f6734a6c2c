from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_flow.data.chat import parse_completion
from ling_flow.serving.text import ReasoningSplitter, TextStream


def decode(tokens: list[int]) -> str:
    """Every token is one byte, as in the worst case of a byte-level tokenizer."""
    return bytes(tokens).decode(errors="replace")


def streamed(text: str, stop: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(decode, stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()], stream.stopped


@given(st.text())
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, stopped = streamed(text, [])
    assert "".join(pieces) == text
    assert not stopped


def test_a_piece_is_never_half_a_character() -> None:
    pieces, _ = streamed("a→ü😀b", [])
    assert [piece for piece in pieces if piece] == ["a", "→", "ü", "😀", "b"]


def test_bytes_that_are_no_character_do_not_hold_the_rest_back() -> None:
    stream = TextStream(decode, [])
    pieces = [stream.push(token) for token in [0xFF, *b"ab", 0xC3]]
    assert pieces == ["", "\ufffda", "b", ""]
    assert stream.flush() == "\ufffd"


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_stop_text_ends_the_text_and_is_never_sent(text: str, stop: list[str]) -> None:
    pieces, stopped = streamed(text, stop)
    joined = "".join(pieces)
    assert stopped == any(mark in text for mark in stop)
    if not stopped:
        assert joined == text
        return
    assert text.startswith(joined)
    assert not any(mark in joined for mark in stop)
    assert any(text[len(joined) :].startswith(mark) for mark in stop)


def test_what_the_last_token_begins_after_a_stop_text_is_not_sent() -> None:
    pieces = {0: b"a b", 1: b" \xe2\x80", 2: b"\xb0"}

    def joined(tokens: Sequence[int]) -> str:
        return b"".join(pieces[token] for token in tokens).decode(errors="replace")

    stream = TextStream(joined, ["b "])
    assert [stream.push(0), stream.push(1), stream.stopped, stream.flush()] == ["a ", "", True, ""]


def test_text_that_might_become_a_stop_text_waits() -> None:
    stream = TextStream(decode, ["END"])
    assert [stream.push(token) for token in b"xENxE"] == ["x", "", "", "ENx", ""]
    assert stream.flush() == "E"


def split(text: str, size: int) -> dict[str, str]:
    splitter, channels = ReasoningSplitter(), {"reasoning_content": "", "content": ""}
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    for pieces in [*map(splitter.push, parts), splitter.flush()]:
        for channel, piece in pieces:
            assert piece
            channels[channel] += piece
    return channels


TAGGED = st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "a", "b", "<", "/"]), max_size=10).map("".join)


@given(TAGGED, st.integers(1, 5))
def test_split_piece_by_piece_as_in_one_go(text: str, size: int) -> None:
    reasoning, answer = parse_completion(text)
    assert split(text, size) == {"reasoning_content": reasoning or "", "content": answer}


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_published_form(size: int) -> None:
    text = "\n<think>\n3 + 4\n= 7\n</think>\n\nThe answer is 7."
    assert split(text, size) == {"reasoning_content": "3 + 4\n= 7", "content": "The answer is 7."}


def test_reasoning_is_sent_before_it_is_complete() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push("\n<think>\nfirst") == [("reasoning_content", "first")]
    assert splitter.push(" then</thi") == [("reasoning_content", " then")]
    assert splitter.push("nk>\n\nseven") == [("content", "seven")]
