import functools
import json
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from ling_flow.data.chat import CHAT_TOKENS, parse_completion
from ling_flow.data.tokenizer import Tokenizer, train_tokenizer
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


TEXTS = ["hello world, what is 3 + 4? hello the  world"] * 4
KINDS = ["byte-level", "metaspace", "llama"]


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """Of each kind in use: bytes as letters; blanks as a letter of words; the same, unknown characters as bytes."""
    if kind == "byte-level":
        return train_tokenizer(TEXTS, 300)
    engine = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    engine.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=["<unk>", *bytes_], show_progress=False))
    learnt = json.loads(engine.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    llama = kind == "llama"
    engine = tokenizers.Tokenizer(models.BPE(learnt["vocab"], merges, unk_token="<unk>", byte_fallback=llama))
    if llama:
        engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        engine.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        engine.pre_tokenizer = pre_tokenizers.Metaspace()
        engine.decoder = decoders.Metaspace()
    engine.add_special_tokens(list(CHAT_TOKENS))
    return Tokenizer(engine.to_str())


def pieces_of(tokens: Sequence[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(tokenizer.decode, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
def test_blanks_stay_with_every_kind_of_tokenizer(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer.encode("hello world")
    pieces = pieces_of(tokens, tokenizer)
    assert "".join(pieces) == "hello world"
    assert len([piece for piece in pieces if piece]) == len(tokens) == 2
    tokens = tokenizer.encode("hello the world")
    assert "".join(pieces_of(tokens, tokenizer, ["o w", "e w"])) == "hello th"


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text("helo wrd  \n→😀", max_size=20))
def test_pieces_join_to_what_the_tokenizer_decodes(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer.encode(text)
    pieces = pieces_of(tokens, tokenizer)
    assert "".join(pieces) == tokenizer.decode(tokens)
    if kind != "metaspace":  # to which → is unknown, and which takes a leading blank for its own
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace"])
@given(data=st.data())
def test_also_where_the_tokens_are_arbitrary(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    ids = st.integers(0, tokenizer.vocab_size + 3)  # also ids without a token
    tokens = data.draw(st.lists(ids, max_size=16))
    assert "".join(pieces_of(tokens, tokenizer)) == tokenizer.decode(tokens)


def test_bytes_that_are_no_character_do_not_spoil_what_was_sent() -> None:
    tokenizer = tokenizer_of("llama")
    tokens = [*tokenizer.encode("hello →"), tokenizer.token_id("<0xFF>"), *tokenizer.encode("o")]
    assert "".join(pieces_of(tokens, tokenizer)) == "hello →\ufffd o"


@pytest.mark.parametrize("text", [" hello", "→", "", "\xff"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_work_grows_with_the_text_and_not_with_its_square(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    if text == "\xff":  # bytes that never become a character
        tokens = [tokenizer.token_id("ÿ" if kind == "byte-level" else "<0xFF>")]
    else:
        tokens = tokenizer.encode(text) or [tokenizer.vocab_size]  # or an id without a token
    decoded = 0

    def counting(tokens: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return tokenizer.decode(tokens)

    stream = TextStream(counting, [])
    for _ in range(500):
        for token in tokens:
            stream.push(token)
    stream.flush()
    assert decoded < 50 * 500 * len(tokens)


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
