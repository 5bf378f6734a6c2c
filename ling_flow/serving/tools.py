"""Calls of tools in an answer: `<tool_call>⏎{"name": …, "arguments": {…}}⏎</tool_call>`, the published form."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ling_flow.serving.text import Piece, overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_ESCAPED = re.compile(r"\\.", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A function that the model wants to have called; `arguments` is the JSON text of an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_openai(self) -> dict[str, Any]:
        """As in `message.tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def split_calls(pieces: Iterable[Piece]) -> Iterator[Piece | Call]:
    """The pieces of an answer, the calls in its content taken out; reasoning stays as it is."""
    splitter = CallSplitter()
    for channel, text in pieces:
        for part in splitter.push(text) if channel == "content" else [text]:
            yield part if isinstance(part, Call) else (channel, part)
    for part in splitter.flush():
        yield part if isinstance(part, Call) else ("content", part)


class CallSplitter:
    """Takes the calls out of an answer while it is written: text comes as it is certain, a call when it is whole.

    A mark that no well-formed call follows is text like any other. Blanks between text and a call are dropped: the chat
    format puts them there.
    """

    def __init__(self) -> None:
        self._held = ""
        self._blanks = ""  # after the text that was sent; sent with the text that follows
        self._begun = False  # there was text that is not blank

    def push(self, text: str) -> list[str | Call]:
        """What is certain now, in order."""
        self._held += text
        return self._take(final=False)

    def flush(self) -> list[str | Call]:
        """What was held back, at the end of the answer."""
        return self._take(final=True)

    def _take(self, final: bool) -> list[str | Call]:
        out: list[str | Call] = []
        while OPEN in self._held:
            before, _, rest = self._held.partition(OPEN)
            end = _end_of_call(rest)
            if end < 0 and not final and (rest.strip() == "" or rest.lstrip().startswith("{")):
                out += self._text(before)  # the call is not whole yet
                self._held = OPEN + rest
                return out
            call = parse_call(rest[:end]) if end >= 0 else None
            if call is None:
                out += self._text(before + OPEN)
                self._held = rest
            else:
                out += [*self._text(before), call]
                self._blanks, self._held = "", rest[end + len(CLOSE) :]
        sure = len(self._held) - (0 if final else overlap(self._held, OPEN))
        out += self._text(self._held[:sure])
        self._held = self._held[sure:]
        return out

    def _text(self, text: str) -> list[str]:
        text = self._blanks + text if self._begun else text.lstrip()
        sent = text.rstrip()
        self._blanks = text[len(sent) :]
        self._begun = self._begun or bool(sent)
        return [sent] if sent else []


def _end_of_call(text: str) -> int:
    """Where the mark is that closes a call, -1 if it has not come; in a JSON string it is a part of the arguments."""
    end = text.find(CLOSE)
    while end >= 0 and _ESCAPED.sub("", text[:end]).count('"') % 2 == 1:
        end = text.find(CLOSE, end + 1)
    return end


def parse_call(text: str) -> Call | None:
    """The call in the text between two marks; None where it is not a JSON object with a name and an object of
    arguments."""
    try:
        data = json.loads(text)
        if not (isinstance(data, dict) and data.get("name") and isinstance(data["name"], str)):
            return None
        if not isinstance(data.get("arguments"), dict):
            return None
        arguments = json.dumps(data["arguments"], ensure_ascii=False, allow_nan=False)
        (data["name"] + arguments).encode()  # half a surrogate pair cannot be sent
    except (ValueError, RecursionError):
        return None
    return Call(data["name"], arguments)
