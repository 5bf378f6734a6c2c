"""The OpenAI chat API over one model, without the network: a request in, answer objects out."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ling_flow.data.chat import encode_prompt
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.errors import UserError
from ling_flow.generation.engine import stream
from ling_flow.model.hf import load_pretrained
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.serving.protocol import ChatRequest
from ling_flow.serving.text import Piece, ReasoningSplitter, TextStream
from ling_flow.serving.tools import Call, split_calls


class Completion:
    """One answer while it is written. Iterate over it once for its pieces and calls of tools; the counts and the finish
    reason are final afterwards. `close` it where nobody waits for it any more."""

    def __init__(
        self, model: BailingMoeV2ForCausalLM, tokenizer: Tokenizer, request: ChatRequest, prompt: list[int], length: int
    ) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.prompt_tokens = len(prompt)
        self.completion_tokens = 0
        self.finish_reason = "length"
        seed = secrets.randbits(63) if request.seed is None else request.seed
        self._tokens = stream(model, prompt, length, request.temperature, tokenizer.stop_ids, seed, request.top_p)
        self._stop_ids = tokenizer.stop_ids
        self._text = TextStream(tokenizer.decode, request.stop)
        self._may_call = bool(request.offered_tools)
        self._closed = False

    def close(self) -> None:
        """Write no further token, and free what the answer holds; from any thread."""
        self._closed = True
        with contextlib.suppress(ValueError):  # a token is being computed in another thread, which then ends by itself
            self._tokens.close()

    def __iter__(self) -> Iterator[Piece | Call]:
        parts = split_calls(self._pieces()) if self._may_call else self._pieces()
        called = False
        for part in parts:
            called = called or isinstance(part, Call)
            yield part
        if called and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"

    def _pieces(self) -> Iterator[Piece]:
        splitter = ReasoningSplitter()
        for token in self._tokens:
            self.completion_tokens += 1
            if token in self._stop_ids:
                self.finish_reason = "stop"
                break
            yield from splitter.push(self._text.push(token))
            if self._text.stopped:
                self.finish_reason = "stop"
                break
            if self._closed:
                break
        self._tokens.close()
        yield from splitter.push(self._text.flush())
        yield from splitter.flush()

    @property
    def usage(self) -> dict[str, int]:
        """Token counts under their OpenAI names."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class ChatModel:
    """A model and its tokenizer, ready to answer. Safe to use from several threads: a request shares only weights."""

    def __init__(self, model: BailingMoeV2ForCausalLM, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model.eval(), tokenizer
        self.context_length = model.config.max_position_embeddings

    @classmethod
    def load(cls, directory: Path) -> ChatModel:
        """Read a Hugging Face checkpoint directory, onto the GPU if there is one.

        Raises:
            UserError: a file is missing or damaged.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(load_pretrained(directory, device), Tokenizer.load(directory))

    def start(self, request: ChatRequest) -> Completion:
        """Check a request and make its answer, of which nothing is computed yet.

        Raises:
            UserError: prompt and answer do not fit the context.
        """
        messages, thinking = request.conversation()
        if not messages:
            raise UserError("messages: hold nothing but the thinking switch; add a user message")
        prompt = encode_prompt(self._tokenizer, messages, thinking, request.offered_tools)
        room = self.context_length - len(prompt)
        if room < 1:
            raise UserError(
                f"messages: the prompt has {len(prompt)} tokens; the context of {self.context_length} tokens must hold "
                "it and at least one token of the answer"
            )
        length = room if request.length is None else request.length
        if length > room:
            raise UserError(
                f"max_tokens: {length} are asked, but the prompt has {len(prompt)} tokens, which leaves {room} of the "
                f"context of {self.context_length} tokens"
            )
        return Completion(self._model, self._tokenizer, request, prompt, length)


def answer(completion: Completion, model_name: str) -> dict[str, Any]:
    """The whole answer as a `chat.completion` object."""
    texts: dict[str, str] = {}
    calls = []
    for part in completion:
        if isinstance(part, Call):
            calls.append(part.to_openai())
        else:
            channel, text = part
            texts[channel] = texts.get(channel, "") + text
    message: dict[str, Any] = {"role": "assistant", "content": None if calls else "", **texts}
    if calls:
        message["tool_calls"] = calls
    return {
        **_head(completion, model_name, "chat.completion"),
        "choices": [{"index": 0, "message": message, "finish_reason": completion.finish_reason, "logprobs": None}],
        "usage": completion.usage,
    }


def chunks(completion: Completion, model_name: str, include_usage: bool) -> Iterator[dict[str, Any]]:
    """The answer as `chat.completion.chunk` objects; joined they hold what `answer` returns."""
    head = _head(completion, model_name, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}]}

    yield chunk({"role": "assistant", "content": ""}, None)
    calls = 0
    for part in completion:
        if isinstance(part, Call):
            yield chunk({"tool_calls": [{"index": calls, **part.to_openai()}]}, None)
            calls += 1
        else:
            channel, text = part
            yield chunk({channel: text}, None)
    yield chunk({}, completion.finish_reason)
    if include_usage:
        yield {**head, "choices": [], "usage": completion.usage}


def _head(completion: Completion, model_name: str, kind: str) -> dict[str, Any]:
    return {"id": completion.id, "object": kind, "created": completion.created, "model": model_name}
