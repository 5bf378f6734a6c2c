"""Calls of tools: their form in the text, and the HTTP API over a model that writes what a test tells it to."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ling_flow.data.chat import encode_prompt, pieces
from ling_flow.serving import chat as module
from ling_flow.serving.chat import ChatModel
from ling_flow.serving.tools import Call, CallSplitter, parse_call
from tests.serving.client import post, serving

ADD = {
    "type": "function",
    "function": {"name": "add", "description": "sum", "parameters": {"type": "object", "properties": {"a": {}}}},
}
QUESTION = {"role": "user", "content": "What is 3 + 4?"}


def written(name: str, arguments: Any) -> str:
    """A call as the chat format renders it."""
    turn = {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]}
    return "".join(pieces([QUESTION, turn])).partition("<role>ASSISTANT</role>")[2].removesuffix("<|role_end|>")


CALL = written("add", {"a": 3, "b": [4]})
BAD = '<tool_call>\n{"name": "add", "arguments": {"a": 3\n</tool_call>'


def split(text: str, size: int = 10**9) -> tuple[str, list[tuple[str, Any]]]:
    """The text beside the calls, and the calls."""
    splitter, texts, calls = CallSplitter(), "", []
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    for found in [*map(splitter.push, parts), splitter.flush()]:
        for part in found:
            assert part
            if isinstance(part, Call):
                calls.append((part.name, json.loads(part.arguments)))
            else:
                texts += part
    return texts, calls


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "left", "calls"),
    [
        (f"I add.\n{CALL}", "I add.", [("add", {"a": 3, "b": [4]})]),
        (f"{CALL}\n{written('f', {})}", "", [("add", {"a": 3, "b": [4]}), ("f", {})]),
        (f"one\n{CALL}\ntwo", "one\ntwo", [("add", {"a": 3, "b": [4]})]),
        (f"one {BAD}", f"one {BAD}", []),
        (f"{BAD}\n{CALL}", BAD, [("add", {"a": 3, "b": [4]})]),
        (f'<tool_call>\n{{"a\n{CALL}', '<tool_call>\n{"a', [("add", {"a": 3, "b": [4]})]),
        (f"a <tool_call> is like {CALL}", "a <tool_call> is like", [("add", {"a": 3, "b": [4]})]),
        (written("f", {"x": '"</tool_call>\\'}), "", [("f", {"x": '"</tool_call>\\'})]),
        ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", [("f", {})]),
        (CALL.removesuffix("</tool_call>"), CALL.removesuffix("\n</tool_call>"), []),
        ("a < b <tool", "a < b <tool", []),
        ("", "", []),
    ],
)
def test_calls_are_taken_out_of_the_text(text: str, left: str, calls: list[Any], size: int) -> None:
    assert split(text, size) == (left, calls)


MARKS = st.sampled_from(
    ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', CALL, '"', "\n", " ", "a", "<"]
)


@given(st.lists(MARKS, max_size=10).map("".join), st.integers(1, 7))
def test_in_pieces_as_in_one_go(text: str, size: int) -> None:
    text = text.strip()  # what the answer's own splitter does before
    left, calls = split(text)
    assert split(text, size) == (left, calls)
    if not calls:
        assert left == text


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(NAMES | st.just("</tool_call>"), VALUES | st.just("<tool_call>"), max_size=3), st.integers(1, 9))
def test_what_the_chat_format_renders_comes_back(arguments: dict[str, Any], size: int) -> None:
    assert split(written("f", arguments), size) == ("", [("f", arguments)])


@pytest.mark.parametrize(
    "text",
    [
        "", "7", "[]", "{}", '{"name": "f"}', '{"name": "", "arguments": {}}', '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": "{}"}', '{"name": "f", "arguments": {"x": NaN}}', '{"name": "f", "arguments": {}',
        '{"name": "f", "arguments": {"x": 1e999}}', '{"name": "f", "arguments": {"x": "\\ud800"}}',
        '{"name": "f", "arguments": ' + '{"x": ' * 100_000, '{"name": "f", "arguments": {}} x',
    ],
)  # fmt: skip
def test_what_is_no_call(text: str) -> None:
    assert parse_call(text) is None


def test_text_does_not_wait_for_a_call() -> None:
    splitter = CallSplitter()
    assert splitter.push("I add. <tool") == ["I add."]
    assert splitter.push("box>") == [" <toolbox>"]
    assert splitter.push("\n<tool_call>\n") == []
    assert splitter.push('{"name": "f", "arguments": {}}\n</tool_c') == []
    (call,) = splitter.push("all>")
    assert isinstance(call, Call) and (call.name, call.arguments) == ("f", "{}")
    assert splitter.flush() == []


# Over HTTP


@pytest.fixture(scope="module")
def chat(checkpoint: Path) -> ChatModel:
    chat = ChatModel.load(checkpoint)
    chat.context_length = 2000  # tokens; of the tools' signatures alone there are hundreds
    return chat


@pytest.fixture(scope="module")
def url(chat: ChatModel) -> Iterator[str]:
    with serving(chat) as url:
        yield url


class Script:
    """Stands in for the model: writes `text`, and remembers the prompt."""

    def __init__(self, chat: ChatModel) -> None:
        self.text, self.prompt, self._tokenizer = "", list[int](), chat._tokenizer

    def stream(self, model: Any, prompt: list[int], length: int, *settings: Any) -> Iterator[int]:
        self.prompt = prompt
        yield from [*self._tokenizer.encode(self.text), self._tokenizer.role_end_id][:length]


@pytest.fixture
def script(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script(chat)
    monkeypatch.setattr(module, "stream", script.stream)
    return script


def ask(url: str, **fields: Any) -> dict[str, Any]:
    status, text = post(url, {"messages": [QUESTION], "tools": [ADD], **fields})
    assert status == 200, text
    (choice,) = json.loads(text)["choices"]
    assert isinstance(choice, dict)
    return choice


def deltas(url: str, **fields: Any) -> tuple[list[dict[str, Any]], str]:
    """What a stream brings after its first chunk, and its finish reason."""
    status, text = post(url, {"messages": [QUESTION], "tools": [ADD], "stream": True, **fields})
    assert status == 200, text
    first, *between, last = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"][0]["delta"] == {}
    return [chunk["choices"][0]["delta"] for chunk in between], last["choices"][0]["finish_reason"]


def test_calls_in_an_answer(url: str, script: Script) -> None:
    script.text = f"\n<think>\n{CALL}?\n</think>\n\nI add.\n{CALL}\n{written('add', {'a': 'ü'})}"
    choice = ask(url)
    calls = choice["message"].pop("tool_calls")
    assert choice["message"] == {"role": "assistant", "content": "I add.", "reasoning_content": f"{CALL}?"}
    assert choice["finish_reason"] == "tool_calls"
    assert [call["type"] for call in calls] == ["function"] * 2
    assert [call["function"] for call in calls] == [
        {"name": "add", "arguments": '{"a": 3, "b": [4]}'},
        {"name": "add", "arguments": '{"a": "ü"}'},
    ]
    assert len({call["id"] for call in calls}) == 2


def test_calls_in_a_stream(url: str, script: Script) -> None:
    script.text = f"I add these two.\n{CALL}\n{written('add', {})}"
    got, finish_reason = deltas(url)
    assert finish_reason == "tool_calls"
    *texts, one, two = got
    assert len(texts) > 3
    assert "".join(delta["content"] for delta in texts) == "I add these two."
    for index, (delta, arguments) in enumerate([(one, '{"a": 3, "b": [4]}'), (two, "{}")]):
        (call,) = delta["tool_calls"]
        assert call.pop("id").startswith("call_")
        assert call == {"index": index, "type": "function", "function": {"name": "add", "arguments": arguments}}


@pytest.mark.parametrize("text", [BAD, CALL.removesuffix("</tool_call>").strip(), f"so: {BAD} then"])
def test_a_malformed_call_is_text(url: str, script: Script, text: str) -> None:
    script.text = text
    assert ask(url) == {
        "index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", "logprobs": None,
    }  # fmt: skip
    got, finish_reason = deltas(url)
    assert ("".join(delta["content"] for delta in got), finish_reason) == (text, "stop")


def test_an_answer_cut_within_its_second_call(url: str, script: Script, chat: ChatModel) -> None:
    script.text = f"{CALL}\n{CALL}"
    choice = ask(url, max_tokens=len(chat._tokenizer.encode(script.text)) - 3)
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["message"]["content"] and CALL.startswith(choice["message"]["content"])


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None, "tool_choice": "auto"}])
def test_without_tools_on_offer_nothing_is_called(
    url: str, script: Script, chat: ChatModel, fields: dict[str, Any]
) -> None:
    script.text = CALL
    choice = ask(url, **fields)
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": CALL}, "stop")
    assert script.prompt == encode_prompt(chat._tokenizer, [QUESTION], False)


def test_the_model_reads_tools_calls_and_responses_in_the_chat_format(
    url: str, script: Script, chat: ChatModel
) -> None:
    script.text = f"I add.\n{CALL}\n{written('add', {'a': 1})}"
    said = ask(url)["message"]
    one, two = (call["id"] for call in said["tool_calls"])
    responses = [{"role": "tool", "tool_call_id": call, "content": text} for call, text in ((two, "2nd"), (one, "1st"))]
    script.text = "7"
    assert ask(url, messages=[QUESTION, said, *responses], tool_choice="auto")["message"]["content"] == "7"
    before = encode_prompt(chat._tokenizer, [QUESTION], False, [ADD])
    assert script.prompt[: len(before)] == before
    assert chat._tokenizer.decode(script.prompt[len(before) :]) == (
        f"I add.\n{CALL}\n{written('add', {'a': 1})}<|role_end|><role>OBSERVATION</role>"  # responses as the calls
        "\n<tool_response>\n1st\n</tool_response>\n<tool_response>\n2nd\n</tool_response><|role_end|>"
        "<role>ASSISTANT</role>"
    )


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice", "tool_choice: must be 'none' or 'auto'; a call cannot be forced"),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, "tool_choice", "must be 'none' or 'auto'"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "tools.0.function: "),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "tools.0.type: "),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name",
            "tools.0.function.name",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]},
            "tools.0.function.strict",
            "tools.0.function.strict: ",
        ),
    ],
)
def test_requests_that_we_cannot_serve(url: str, fields: dict[str, Any], param: str, message: str) -> None:
    status, text = post(url, {"messages": [QUESTION], "tools": [ADD], **fields})
    error = json.loads(text)["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert message in error["message"]


def called(*ids: str) -> dict[str, Any]:
    calls = [{"id": name, "type": "function", "function": {"name": "add", "arguments": "{}"}} for name in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def response(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": "7"}


UNANSWERED = "messages: message 1 must be followed by one response of role tool to each of its calls"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([response("x")], "messages: message 1 responds to no call of the assistant's message before it"),
        ([called("x"), response("x"), response("x")], "messages: message 3 responds to no call"),
        ([called("x")], UNANSWERED),
        ([called("x", "y"), response("x")], UNANSWERED),
        ([called("x"), response("y")], UNANSWERED),
        ([called("x"), QUESTION, response("x")], UNANSWERED),
        ([called("x", "x"), response("x"), response("x")], UNANSWERED),
        ([{"role": "tool", "content": "7"}], "messages.1: tool_call_id: must name the call"),
        ([{**QUESTION, "tool_call_id": "x"}], "messages.1: tool_call_id: must stand in a message of role tool"),
        ([{**called("x"), "role": "user"}], "messages.1: tool_calls: must stand in a message of role assistant"),
        ([{"role": "assistant"}], "messages.1: content: must be text"),
        ([{"role": "tool", "tool_call_id": "x", "content": None}], "messages.1: content: must be text"),
    ],
)
def test_calls_and_responses_that_do_not_fit(url: str, messages: list[dict[str, Any]], message: str) -> None:
    status, text = post(url, {"messages": [QUESTION, *messages]})
    assert status == 400
    assert json.loads(text)["error"]["message"].startswith(message)
