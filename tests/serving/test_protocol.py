from typing import Any

import pytest
from pydantic import ValidationError

from ling_flow.serving.protocol import ChatRequest

USER = {"role": "user", "content": "hi"}


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [USER], **fields})


@pytest.mark.parametrize(
    ("messages", "enable", "thinking", "system"),
    [
        ([USER], False, False, None),
        ([USER], True, True, None),
        ([{"role": "system", "content": "detailed thinking on"}, USER], False, True, None),
        ([{"role": "system", "content": "Be brief.\ndetailed thinking on"}, USER], False, True, "Be brief."),
        ([{"role": "system", "content": "Be brief.\ndetailed thinking off"}, USER], True, False, "Be brief."),
        ([{"role": "system", "content": "Be brief."}, USER], True, True, "Be brief."),
        ([{"role": "system", "content": "on detailed thinking"}, USER], False, False, "on detailed thinking"),
    ],
)
def test_thinking_switch(messages: list[dict[str, str]], enable: bool, thinking: bool, system: str | None) -> None:
    got, switch = request(messages=messages, chat_template_kwargs={"enable_thinking": enable}).conversation()
    assert switch is thinking
    assert got == ([] if system is None else [{"role": "system", "content": system}]) + [USER]


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "3 + 4?"}]
    messages, _ = request(messages=[{"role": "user", "content": parts, "name": "ann"}]).conversation()
    assert messages == [{"role": "user", "content": "What is 3 + 4?"}]


def test_spellings_of_clients() -> None:
    assert request(stop="x").stop == ["x"]
    assert request(stop=None, temperature=None, chat_template_kwargs=None).temperature == 1.0
    assert request(max_tokens=3).length == request(max_completion_tokens=3).length == 3
    assert request().length is None
    assert request(parallel_tool_calls=True).parallel_tool_calls


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "robot", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"temperature": -1},
        {"top_p": 0},
        {"max_tokens": 0},
        {"max_tokens": 1, "max_completion_tokens": 1},
        {"n": 2},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": [""]},
        {"logprobs": True},
        {"parallel_tool_calls": False},
    ],
)
def test_what_we_cannot_do_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(**fields)
