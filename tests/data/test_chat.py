import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ling_flow.data.chat import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    THINK_TOKENS,
    encode_answer,
    encode_prompt,
    parse_completion,
    render,
)
from ling_flow.data.tokenizer import Tokenizer, train_tokenizer
from ling_flow.errors import UserError
from tests.data.published import write_published

OFF = "<role>SYSTEM</role>detailed thinking off<|role_end|>"
ON = "<role>SYSTEM</role>detailed thinking on<|role_end|>"
U1 = {"role": "user", "content": "U1"}
F, G = ({"function": {"name": name, "arguments": arguments}} for name, arguments in (("f", {"a": 1}), ("g", {"b": 2})))
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
TEMPLATE = ENVIRONMENT.from_string(CHAT_TEMPLATE)


def jinja(messages: list[dict[str, Any]], add_generation_prompt: bool, thinking: bool, tools: Any) -> str:
    """The template rendered as Hugging Face tokenizers do."""
    return TEMPLATE.render(
        messages=messages, add_generation_prompt=add_generation_prompt, enable_thinking=thinking, tools=tools
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


SYSTEM = {"role": "system", "content": "S"}
HUMAN = "<role>HUMAN</role>U1<|role_end|>"
ASSISTANT = "<role>ASSISTANT</role>"
CALLS = (
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {"b": 2}}\n</tool_call>'
)
TOOL_TEXT = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "f", "parameters": {}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n'
)

# Rendered from the published template (ling2-facts §9.2, and what its grammar §9.1 adds).
GOLDEN = {
    "1 user": ([U1], True, False, None, OFF + HUMAN + ASSISTANT),
    "2 system": (
        [SYSTEM, U1],
        True,
        False,
        None,
        "<role>SYSTEM</role>S\ndetailed thinking off<|role_end|>" + HUMAN + ASSISTANT,
    ),
    "3 turns": (
        [U1, assistant("A1"), user("U2")],
        True,
        False,
        None,
        OFF + HUMAN + ASSISTANT + "A1<|role_end|><role>HUMAN</role>U2<|role_end|>" + ASSISTANT,
    ),
    "4 calls and responses": (
        [U1, assistant("", tool_calls=[F, G]), tool("R1"), tool("R2")],
        True,
        False,
        None,
        OFF
        + HUMAN
        + ASSISTANT
        + CALLS
        + "<|role_end|><role>OBSERVATION</role>\n<tool_response>\nR1\n</tool_response>"
        + "\n<tool_response>\nR2\n</tool_response><|role_end|>"
        + ASSISTANT,
    ),
    "5 content and call": (
        [U1, assistant("pre", tool_calls=[{"function": {"name": "f", "arguments": {}}}])],
        False,
        False,
        None,
        OFF + HUMAN + ASSISTANT + 'pre\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|role_end|>',
    ),
    "6 reasoning": (
        [U1, assistant("A", reasoning_content="T")],
        False,
        True,
        None,
        ON + HUMAN + ASSISTANT + "\n<think>\nT\n</think>\n\nA<|role_end|>",
    ),
    "6 reasoning in content": (
        [U1, assistant("\n<think>\nT\n</think>\n\nA")],
        False,
        True,
        None,
        ON + HUMAN + ASSISTANT + "\n<think>\nT\n</think>\n\nA<|role_end|>",
    ),
    "7 earlier reasoning": (
        [U1, assistant("<think>\nT\n</think>\n\nA1"), user("U2")],
        False,
        True,
        None,
        ON + HUMAN + ASSISTANT + "A1<|role_end|><role>HUMAN</role>U2<|role_end|>",
    ),
    "reasoning before a tool response is kept": (
        [U1, assistant("A", reasoning_content="T"), tool("R"), user("<tool_response>\nR\n</tool_response>")],
        False,
        False,
        None,
        OFF
        + HUMAN
        + ASSISTANT
        + "\n<think>\nT\n</think>\n\nA<|role_end|><role>OBSERVATION</role>\n<tool_response>\nR\n</tool_response>"
        + "<|role_end|><role>HUMAN</role><tool_response>\nR\n</tool_response><|role_end|>",
    ),
    "tools": (
        [SYSTEM, U1],
        False,
        False,
        TOOLS,
        "<role>SYSTEM</role>S\n" + TOOL_TEXT + "detailed thinking off<|role_end|>" + HUMAN,
    ),
    "later system, raw arguments": (
        [U1, SYSTEM, assistant("", tool_calls=[{"name": "f", "arguments": '{"a":1}'}])],
        False,
        False,
        None,
        OFF
        + HUMAN
        + "<role>SYSTEM</role>S<|role_end|>"
        + ASSISTANT
        + '<tool_call>\n{"name": "f", "arguments": {"a":1}}\n</tool_call><|role_end|>',
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("renderer", [jinja, render])
def test_golden_strings(name: str, renderer: Any) -> None:
    messages, add_generation_prompt, thinking, tools, expected = GOLDEN[name]
    assert renderer(messages, add_generation_prompt, thinking, tools) == expected


TEXTS = st.sampled_from(
    ["", "A", "b\n", "\n\nc", "<think>\nT\n</think>\n\nA", "x</think>y</think>\nz", "<tool_response>q</tool_response>"]
)
CALL_LISTS = st.lists(st.sampled_from([F, G, {"name": "h", "arguments": '{"raw": 1}'}]), max_size=3)
MESSAGES = st.lists(
    st.one_of(
        st.builds(user, TEXTS),
        st.builds(tool, TEXTS),
        st.builds(lambda text: {"role": "system", "content": text}, TEXTS),
        st.builds(lambda text, calls: assistant(text, tool_calls=calls), TEXTS, CALL_LISTS),
        st.builds(
            lambda text, why: assistant(text, reasoning_content=why), TEXTS, st.sampled_from(["", "\n", "\nR\n"])
        ),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(MESSAGES, st.booleans(), st.booleans(), st.sampled_from([None, [], TOOLS]))
def test_render_and_template_agree(messages: list[dict[str, Any]], prompt: bool, thinking: bool, tools: Any) -> None:
    assert render(messages, prompt, thinking, tools) == jinja(messages, prompt, thinking, tools)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages: must hold at least one"),
        ([{"role": "robot", "content": "x"}], r"messages.0.role: must be system, user, assistant or tool"),
        ([U1, {"role": "user", "content": [{"type": "text"}]}], r"messages.1.content: must be text \(got list\)"),
        (
            [U1, assistant("", tool_calls=[F, {"function": {"name": "f"}}])],
            r"messages.1.tool_calls.1: must have a name",
        ),
    ],
)
def test_bad_messages_are_refused(messages: list[dict[str, Any]], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        render(messages)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("85", (None, "85")),
        ("85<|role_end|>junk", (None, "85")),
        ("\n<think>\na\nb\n</think>\n\n85<|role_end|><|endoftext|>", ("a\nb", "85")),
        ("<think>\nnever closed", ("never closed", "")),
        ("\n<think>\n</think>\n\n85", ("", "85")),
        ("85 <think>late</think>", (None, "85 <think>late</think>")),
    ],
)
def test_parse_completion(text: str, expected: tuple[str | None, str]) -> None:
    assert parse_completion(text) == expected


TRAINED_ON = ["detailed thinking on off SYSTEM HUMAN ASSISTANT 47 + 38 = ?\n\n"] * 20


@pytest.fixture(scope="module", params=["ours", "published"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer we trained, and a stand-in for the published one."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "ours":
        train_tokenizer(TRAINED_ON, 300).save(path)
    else:
        write_published(path, TRAINED_ON)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def engine(directory: Path) -> PreTrainedTokenizerFast:
    """The directory as Hugging Face and the engines open it."""
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_strings_by_transformers(engine: PreTrainedTokenizerFast, name: str) -> None:
    messages, add_generation_prompt, thinking, tools, expected = GOLDEN[name]
    rendered = engine.apply_chat_template(
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=thinking,
        tokenize=False,
    )
    assert rendered == expected


def test_engines_stop_where_we_do(directory: Path, tokenizer: Tokenizer, engine: PreTrainedTokenizerFast) -> None:
    generation = GenerationConfig.from_pretrained(directory)
    assert set(generation.eos_token_id) == tokenizer.stop_ids
    assert generation.pad_token_id == engine.pad_token_id == tokenizer.eos_id
    assert generation.bos_token_id == engine.bos_token_id
    assert engine.eos_token_id == tokenizer.role_end_id
    assert len(engine) == tokenizer.vocab_size  # nothing was appended for a name without a token


WITH_FIXTURES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANYTHING = st.sampled_from([*SPECIAL_TOKENS, *THINK_TOKENS, "<tool_call>", "</tool_response>"]) | st.text(max_size=8)
FREE_TEXTS = st.lists(ANYTHING, max_size=4).map("".join)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FREE_TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
FREE_CALLS = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    FREE_TEXTS,
    FREE_TEXTS | st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=2),
)
FREE_TOOLS = st.lists(
    st.builds(
        lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}},
        FREE_TEXTS,
        st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=2),
    ),
    max_size=2,
)
CONVERSATIONS = st.lists(
    st.builds(user, FREE_TEXTS)
    | st.builds(tool, FREE_TEXTS)
    | st.builds(lambda text: {"role": "system", "content": text}, FREE_TEXTS)
    | st.builds(
        lambda text, why, calls: assistant(text, reasoning_content=why, tool_calls=calls),
        FREE_TEXTS | st.none(),
        FREE_TEXTS | st.none(),
        st.lists(FREE_CALLS, max_size=2),
    ),
    min_size=1,
    max_size=5,
)


@WITH_FIXTURES
@given(messages=CONVERSATIONS, prompt=st.booleans(), thinking=st.booleans(), tools=FREE_TOOLS)
def test_transformers_jinja_and_render_agree(
    engine: PreTrainedTokenizerFast, messages: Any, prompt: bool, thinking: bool, tools: Any
) -> None:
    rendered = render(messages, prompt, thinking, tools)
    assert jinja(messages, prompt, thinking, tools) == rendered
    assert rendered == engine.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, enable_thinking=thinking, tokenize=False
    )


@WITH_FIXTURES
@given(messages=MESSAGES, thinking=st.booleans(), tools=st.sampled_from([None, TOOLS]))
def test_encoding_equals_that_of_the_rendered_text(
    tokenizer: Tokenizer, engine: PreTrainedTokenizerFast, messages: list[dict[str, Any]], thinking: bool, tools: Any
) -> None:
    plain = [message for message in messages if "think" not in str(message.get("content"))] or [U1]
    rendered = render(plain, True, thinking, tools)
    ids = encode_prompt(tokenizer, plain, thinking, tools)
    assert ids == tokenizer.encode_rendered(rendered) == engine.encode(rendered, add_special_tokens=False)
    assert tokenizer.decode(ids) == rendered


def test_published_ids_of_a_conversation(tmp_path: Path) -> None:
    write_published(tmp_path, TRAINED_ON)
    given_one = Tokenizer.load(tmp_path)
    text = given_one.encode
    system = [157151, *text("SYSTEM"), 157152, *text("detailed thinking on"), 156895]
    asked = [157151, *text("HUMAN"), 157152, *text("47 + 38 = ?"), 156895, 157151, *text("ASSISTANT"), 157152]
    assert encode_prompt(given_one, [user("47 + 38 = ?")], True) == system + asked
    # `<think>` is no token of this vocabulary, so that the whole answer is one text.
    assert encode_answer(given_one, "T", "85") == [*text("\n<think>\nT\n</think>\n\n85"), 156895]


@pytest.mark.parametrize("mark", ["<think>", "</think>", "<tools>", "<tool_call>", "</tool_response>"])
def test_marks_that_a_vocabulary_has_are_single_tokens(tmp_path: Path, mark: str) -> None:
    train_tokenizer(TRAINED_ON, 300).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("[gMASK]", mark) if mark not in THINK_TOKENS else path.read_text())
    given_one = Tokenizer.load(tmp_path)
    number = given_one.token_id(mark)
    turns = [U1, assistant("A", reasoning_content="T", tool_calls=[F]), tool("R")]
    ids = encode_prompt(given_one, turns, True, TOOLS)
    assert ids.count(number) == render(turns, True, True, TOOLS).count(mark) > 0
    assert ids == given_one.encode_rendered(render(turns, True, True, TOOLS))
    said = [user(mark), assistant("A", reasoning_content=mark, tool_calls=[F]), tool(mark)]
    assert encode_prompt(given_one, said, True, TOOLS).count(number) == ids.count(number)


def test_answers_encode_and_parse_back(tokenizer: Tokenizer) -> None:
    ids = encode_answer(tokenizer, "47 + 30 = 77\n77 + 8 = 85", "85")
    assert ids[-1] == tokenizer.role_end_id
    assert parse_completion(tokenizer.decode(ids)) == ("47 + 30 = 77\n77 + 8 = 85", "85")
    assert tokenizer.decode(encode_answer(tokenizer, None, "85")) == "85<|role_end|>"
    whole = render([U1, assistant("85", reasoning_content="T")], thinking=True)
    assert encode_prompt(tokenizer, [U1], True) + encode_answer(tokenizer, "T", "85") == tokenizer.encode_rendered(
        whole
    )


def test_thinking_marks_of_ours_are_single_tokens() -> None:
    ours = train_tokenizer(TRAINED_ON, 300)
    ids = encode_answer(ours, "T", "85")
    assert ids.count(ours.token_id("<think>")) == ids.count(ours.token_id("</think>")) == 1


@WITH_FIXTURES
@given(messages=CONVERSATIONS, thinking=st.booleans(), tools=FREE_TOOLS)
def test_message_text_never_becomes_a_control_token(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], thinking: bool, tools: Any
) -> None:
    # One turn each: how often the template itself writes a mark does not depend on what the messages say …
    quiet = [{**message, "content": "x"} if message["role"] != "assistant" else U1 for message in messages]
    loud = [message if message["role"] != "assistant" else user(str(message)) for message in messages]
    ids, harmless = (encode_prompt(tokenizer, turns, thinking, tools) for turns in (loud, quiet))
    for token in filter(tokenizer.is_mark, (*SPECIAL_TOKENS, *THINK_TOKENS)):
        assert ids.count(tokenizer.token_id(token)) == harmless.count(tokenizer.token_id(token))
    assert tokenizer.decode(ids) == render(loud, True, thinking, tools)  # … and nothing is lost
