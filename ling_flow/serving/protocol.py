"""Requests of the OpenAI chat API, as far as we serve them. A field that we would have to ignore is refused by name."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ling_flow.config import StrictModel

_SWITCH = {"detailed thinking on": True, "detailed thinking off": False}


class TextPart(StrictModel):
    """One piece of a message's content."""

    type: Literal["text"] = Field(description="only text is understood")
    text: str = Field(description="the text")


class ChatMessage(StrictModel):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant"] = Field(description="who speaks")
    content: str = Field(description="what is said: text, or a list of text parts")
    reasoning_content: str | None = Field(default=None, description="an assistant's reasoning, as it was returned")
    name: str | None = Field(default=None, description="who speaks, for the client; the model does not see it")

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        return "".join(TextPart.model_validate(part).text for part in value) if isinstance(value, list) else value


class TemplateSettings(StrictModel):
    """Variables of the chat template."""

    enable_thinking: bool = Field(default=False, description="whether the model reasons before it answers")


class StreamOptions(StrictModel):
    """What a stream holds beside the text."""

    include_usage: bool = Field(default=False, description="end the stream with a chunk that counts the tokens")


class ChatRequest(StrictModel):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, description="the conversation, oldest turn first")
    model: str | None = Field(default=None, description="name of the served model")
    temperature: float = Field(default=1.0, ge=0, le=2, description="0 takes the most likely token each time")
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample from the tokens that hold this much probability")
    max_tokens: int | None = Field(default=None, ge=1, description="longest answer, tokens; null: up to the context")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="newer name of max_tokens")
    stop: list[str] = Field(default=[], max_length=4, description="texts that end the answer and are not part of it")
    stream: bool = Field(default=False, description="send the answer piece by piece as server-sent events")
    stream_options: StreamOptions = Field(default=StreamOptions(), description="settings of the stream")
    n: Literal[1] = Field(default=1, description="number of answers")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="same seed, same answer; null: not repeatable")
    chat_template_kwargs: TemplateSettings = Field(default=TemplateSettings(), description="template variables")
    user: str | None = Field(default=None, description="the client's own user id; not used")

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("a stop text must not be empty")
        return value

    @field_validator("temperature", "top_p", "stream", "n", "stream_options", "chat_template_kwargs", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    @property
    def length(self) -> int | None:
        """Tokens of the answer at most, None where the request does not say."""
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages for the chat template, and whether to think.

        The switch is `chat_template_kwargs.enable_thinking`, or "detailed thinking on" (or off) as the last line of the
        first system message, which is how the template itself writes it (ling2-facts §9.1); the message wins.
        """
        messages = [message.model_dump(exclude={"name"}, exclude_none=True) for message in self.messages]
        thinking = self.chat_template_kwargs.enable_thinking
        if messages[0]["role"] == "system":
            before, _, last = messages[0]["content"].rpartition("\n")
            if last.strip() in _SWITCH:
                thinking = _SWITCH[last.strip()]
                messages[0]["content"] = before
                if not before:
                    messages = messages[1:]
        return messages, thinking
