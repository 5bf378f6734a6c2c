"""From tokens to the text that is sent, piece by piece: whole characters, no stop text, reasoning by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from ling_flow.data.chat import THINK, THINK_CLOSE

Channel = Literal["reasoning_content", "content"]
Piece = tuple[Channel, str]
LONGEST_WAIT = 16
"""Tokens without text, or marks of broken characters, that are kept together: a character has four bytes at most."""


class TextStream:
    """Text of a growing token sequence; what could be part of a character or of a stop text is held back.

    A token's text may depend on those before it: many decoders drop the blank before the first one. So tokens are
    decoded behind a few earlier ones, whose text is taken off again.

    Args:
        decode: token ids → text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self._before: list[int] = []  # tokens that ended in a whole character and gave the text
        self._text_before = ""
        self._tokens: list[int] = []  # those after them
        self._taken = 0  # characters of their text that were taken already
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; `stopped` tells whether a stop text has come."""
        self._tokens.append(token)
        self._held += self._take()
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            self._tokens, self._taken = [], 0  # what the last token begins comes after the stop text
            return text
        keep = max((overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        text = self._held + self._text()[self._taken :]
        self._tokens, self._taken, self._held = [], 0, ""
        return text

    def _take(self) -> str:
        """The new text up to the end of its last whole character."""
        decoded = self._text()
        whole = decoded.rstrip("\ufffd")  # what a decoder writes for bytes that are no character, or not yet
        if len(decoded) - len(whole) > LONGEST_WAIT:
            whole = decoded
        text, self._taken = whole[self._taken :], max(self._taken, len(whole))
        if whole == decoded:
            alone = self._decode(self._tokens)
            if alone:  # without text they may be the blank that is dropped, and what follows would lose its own
                self._before, self._text_before = self._tokens, alone
            if alone or len(self._tokens) > LONGEST_WAIT:
                self._tokens, self._taken = [], 0
        return text

    def _text(self) -> str:
        """The text of the new tokens."""
        decoded = self._decode(self._before + self._tokens)
        if decoded.startswith(self._text_before):
            return decoded[len(self._text_before) :]
        return self._decode(
            self._tokens
        )  # bytes behind whole characters, which some decoders spoil until they are whole


class ReasoningSplitter:
    """Splits `⏎<think>⏎reasoning⏎</think>⏎⏎answer` while it is written; what does not begin with `<think>` is answer.

    Joined over all pieces both channels hold what `ling_flow.data.chat.parse_completion` finds in the whole text.
    """

    def __init__(self) -> None:
        self._state: Literal["start", "reasoning", "answer"] = "start"
        self._held = ""  # not yet sent; without leading blanks until the channel has text
        self._begun = False  # the present channel has text

    def push(self, text: str) -> list[Piece]:
        """What is certain now, by channel."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            lead = self._held.lstrip()
            if THINK.startswith(lead):  # nothing yet, or a part of the mark
                return []
            thinks = lead.startswith(THINK)
            self._state, self._held = ("reasoning", lead.removeprefix(THINK)) if thinks else ("answer", lead)
        if self._state == "reasoning":
            before, closed, after = self._held.partition(THINK_CLOSE)
            self._held = before
            pieces += self._send("reasoning_content", 0 if closed else overlap(before, THINK_CLOSE))
            if closed:
                self._state, self._held, self._begun = "answer", after, False
        if self._state == "answer":
            pieces += self._send("content", 0)
        return pieces

    def flush(self) -> list[Piece]:
        """What was held back, at the end of the text."""
        text = self._held.strip()
        if not text or (self._state == "start" and text == THINK):
            return []
        lead = self._held if self._begun else self._held.lstrip()
        return [("reasoning_content" if self._state == "reasoning" else "content", lead.rstrip())]

    def _send(self, channel: Channel, keep: int) -> list[Piece]:
        """The held text but for its last `keep` characters and the blanks before them: they may be the end."""
        if not self._begun:
            self._held = self._held.lstrip()
        text = self._held[: len(self._held) - keep].rstrip()
        if not text:
            return []
        self._held, self._begun = self._held[len(text) :], True
        return [(channel, text)]


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
