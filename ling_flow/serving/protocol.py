"""Requests of the OpenAI chat API, as far as we serve them. A field that we would have to ignore is refused by name."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from ling_flow.config import StrictModel


def _is_unicode(value: Any) -> Any:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not valid Unicode") from None
    return value


Text = Annotated[str, AfterValidator(_is_unicode)]
_SWITCH = {"detailed thinking on": True, "detailed thinking off": False}


class TextPart(StrictModel):
    """One piece of a message's content."""

    type: Literal["text"] = Field(description="only text is understood")
    text: Text = Field(description="the text")


class CalledFunction(StrictModel):
    """What a call calls."""

    name: Text = Field(min_length=1, description="name of the function")
    arguments: Text = Field(description="JSON text of its arguments")


class ToolCall(StrictModel):
    """A call that an assistant made, as it was returned."""

    id: str = Field(min_length=1, description="what the tool's response refers to")
    type: Literal["function"] = Field(description="only functions are called")
    function: CalledFunction = Field(description="which function, and with which arguments")


class Function(StrictModel):
    """A function that the model may have called."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$", description="its name")
    description: Text | None = Field(default=None, description="what it does, for the model")
    parameters: Annotated[dict[str, Any], AfterValidator(_is_unicode)] | None = Field(
        default=None, description="JSON schema of its arguments, for the model"
    )
    strict: Literal[False] | None = Field(default=None, description="arguments are never held to the schema")


class Tool(StrictModel):
    """One tool on offer."""

    type: Literal["function"] = Field(description="only functions are known")
    function: Function = Field(description="the function")


class ChatMessage(StrictModel):
    """One turn of the conversation."""

    role: Literal["system", "user", "assistant", "tool"] = Field(description="who speaks")
    content: Text | None = Field(default=None, description="what is said: text, or a list of text parts")
    tool_calls: list[ToolCall] | None = Field(default=None, description="an assistant's calls, as they were returned")
    tool_call_id: str | None = Field(default=None, description="role tool: the call that this is the response to")
    reasoning_content: Text | None = Field(default=None, description="an assistant's reasoning, as it was returned")
    name: str | None = Field(default=None, description="who speaks, for the client; the model does not see it")
    # Null in every message that a client of OpenAI returns as it was given.
    refusal: None = Field(default=None, description="null")
    annotations: None = Field(default=None, description="null")
    audio: None = Field(default=None, description="null")
    function_call: None = Field(default=None, description="null")

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        return "".join(TextPart.model_validate(part).text for part in value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content: must be text; only an assistant's message with tool_calls may leave it out")
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls: must stand in a message of role assistant, not {self.role}")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("tool_call_id: must name the call that this is the response to")
        if self.role != "tool" and self.tool_call_id is not None:
            raise ValueError(f"tool_call_id: must stand in a message of role tool, not {self.role}")
        return self


class TemplateSettings(StrictModel):
    """Variables of the chat template."""

    enable_thinking: bool = Field(default=False, description="whether the model reasons before it answers")


class TextFormat(StrictModel):
    """The one format of an answer."""

    type: Literal["text"] = Field(description="only text is written")


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
    tools: list[Tool] = Field(default=[], description="functions that the model may have called")
    tool_choice: Literal["none", "auto"] = Field(default="auto", description="whether it may; none hides the tools")
    chat_template_kwargs: TemplateSettings = Field(default=TemplateSettings(), description="template variables")
    user: str | None = Field(default=None, description="the client's own user id; not used")
    # What clients send that set every field; any other value is refused.
    logprobs: Literal[False] | None = Field(default=None, description="false: none are returned")
    frequency_penalty: float | None = Field(default=None, ge=0, le=0, description="0: there is none")
    presence_penalty: float | None = Field(default=None, ge=0, le=0, description="0: there is none")
    response_format: TextFormat | None = Field(default=None, description="type text")
    parallel_tool_calls: Literal[True] | None = Field(default=None, description="true: an answer may hold many calls")
    store: Literal[False] | None = Field(default=None, description="false: nothing is kept")

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

    @field_validator("messages")
    @classmethod
    def _responses_follow_their_calls(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        """Puts responses in the order of their calls: the chat format has no ids."""
        ordered: list[ChatMessage] = []
        while len(ordered) < len(messages):
            where = len(ordered)
            if messages[where].role == "tool":
                raise ValueError(f"message {where} responds to no call of the assistant's message before it")
            ids = [call.id for call in messages[where].tool_calls or []]
            responses = {message.tool_call_id: message for message in messages[where + 1 : where + 1 + len(ids)]}
            if len(responses) < len(ids) or responses.keys() != set(ids):
                raise ValueError(f"message {where} must be followed by one response of role tool to each of its calls")
            ordered += [messages[where], *(responses[call_id] for call_id in ids)]
        return ordered

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _choice_is_free(cls, value: Any) -> Any:
        if value not in (None, "none", "auto"):
            raise ValueError("must be 'none' or 'auto'; a call cannot be forced here")
        return "auto" if value is None else value

    @field_validator(
        "temperature", "top_p", "stream", "n", "stream_options", "tools", "chat_template_kwargs", mode="before"
    )
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

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools for the chat template; none under `tool_choice` none, so that there is nothing to call."""
        tools = self.tools if self.tool_choice == "auto" else []
        return [tool.model_dump(exclude={"function": {"strict"}}, exclude_unset=True) for tool in tools]

    def conversation(self) -> tuple[list[dict[str, Any]], bool]:
        """The messages for the chat template, and whether to think.

        The switch is `chat_template_kwargs.enable_thinking`, or "detailed thinking on" (or off) as the last line of the
        first system message, which is how the template itself writes it (ling2-facts §9.1); the message wins.
        """
        messages = [
            message.model_dump(exclude={"name", "tool_call_id"}, exclude_none=True) for message in self.messages
        ]
        thinking = self.chat_template_kwargs.enable_thinking
        if messages[0]["role"] == "system":
            before, _, last = messages[0]["content"].rpartition("\n")
            if last.strip() in _SWITCH:
                thinking = _SWITCH[last.strip()]
                messages[0]["content"] = before
                if not before:
                    messages = messages[1:]
        return messages, thinking
