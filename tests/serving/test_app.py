"""The HTTP API over a real socket; see conftest.py for the model."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch

from ling_flow.data.chat import encode_prompt
from ling_flow.data.tokenizer import Tokenizer
from ling_flow.generation.engine import generate
from ling_flow.model.hf import load_pretrained
from ling_flow.serving import chat
from ling_flow.serving.chat import ChatModel
from tests.serving.client import post, serving

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]
UNKNOWN = [{"role": "user", "content": "on off"}]
ANSWER, REASONING = "The answer is 7.", "3 + 4\n= 7"


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    with serving(ChatModel.load(checkpoint)) as url:
        yield url


def tool_called(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {"properties": {name: {}}}}}


def ask(url: str, **fields: Any) -> dict[str, Any]:
    status, text = post(url, {"messages": QUESTION, "temperature": 0, **fields})
    assert status == 200, text
    answer = json.loads(text)
    assert isinstance(answer, dict)
    return answer


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as response:
        return json.load(response)


def test_who_serves_what(url: str) -> None:
    assert get(f"{url}/health") == {"status": "ok", "model": "micro", "fingerprint": "f00d"}
    (card,) = get(f"{url}/v1/models")["data"]
    assert (card["id"], card["object"], card["fingerprint"], card["max_model_len"]) == ("micro", "model", "f00d", 96)


def test_the_answer_is_what_the_model_generates(url: str, checkpoint: Path) -> None:
    tokenizer, model = Tokenizer.load(checkpoint), load_pretrained(checkpoint).eval()
    prompt = encode_prompt(tokenizer, QUESTION, thinking=False)
    (expected,) = generate(model, [prompt], 12, 0.0, tokenizer.stop_ids, seed=0)
    answer = ask(url, max_tokens=12, model="micro")
    (choice,) = answer["choices"]
    text = tokenizer.decode(expected.tokens[:-1] if expected.finished else expected.tokens)
    assert (answer["object"], answer["model"]) == ("chat.completion", "micro")
    assert choice["message"] == {"role": "assistant", "content": text.strip()}
    assert choice["finish_reason"] == ("stop" if expected.finished else "length")
    counts = len(prompt), len(expected.tokens)
    assert answer["usage"] == {
        "prompt_tokens": counts[0],
        "completion_tokens": counts[1],
        "total_tokens": sum(counts),
    }


def test_a_stop_text_ends_the_answer(url: str) -> None:
    text = ask(url, max_tokens=12)["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    (choice,) = ask(url, max_tokens=12, stop=stop)["choices"]
    assert choice["message"]["content"] == text[: text.index(stop)].strip()
    assert choice["finish_reason"] == "stop"


def test_the_seed_decides_what_is_sampled(url: str) -> None:
    def sampled(seed: int) -> Any:
        return ask(url, messages=UNKNOWN, temperature=2, seed=seed, max_tokens=12)["choices"][0]["message"]

    assert sampled(1) == sampled(1) != sampled(2)


@pytest.mark.parametrize(
    "switch",
    [
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"messages": [{"role": "system", "content": "detailed thinking on"}, *QUESTION]},
    ],
)
def test_reasoning_is_kept_apart_from_the_answer(url: str, switch: dict[str, Any]) -> None:
    (choice,) = ask(url, **switch)["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "reasoning_content": REASONING}
    assert choice["finish_reason"] == "stop"


def test_without_thinking_there_is_no_reasoning(url: str) -> None:
    (choice,) = ask(url)["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER}
    assert choice["finish_reason"] == "stop"


def test_an_answer_cut_while_the_model_reasons_is_all_reasoning(url: str) -> None:
    (choice,) = ask(url, max_tokens=5, chat_template_kwargs={"enable_thinking": True})["choices"]
    assert choice["message"]["content"] == ""
    assert REASONING.startswith(choice["message"]["reasoning_content"])
    assert choice["finish_reason"] == "length"


def test_a_stream_holds_the_same_answer(url: str) -> None:
    whole = ask(url, max_tokens=12)
    status, text = post(
        url,
        {
            "messages": QUESTION,
            "temperature": 0,
            "max_tokens": 12,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )
    assert status == 200
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    *chunks, usage = map(json.loads, lines[:-1])
    assert {chunk["object"] for chunk in [*chunks, usage]} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert len(deltas) > 3
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (usage["usage"], usage["choices"]) == (whole["usage"], [])


def test_requests_at_the_same_time_do_not_disturb_each_other(url: str) -> None:
    def sampled(seed: int) -> Any:
        return ask(url, messages=UNKNOWN, temperature=2, seed=seed, max_tokens=10)["choices"]

    alone = [sampled(seed) for seed in range(4)]
    together: dict[int, Any] = {}

    def run(seed: int) -> None:
        together[seed] = sampled(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(4)] == alone


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (b"{", 400, None, "JSON"),
        ({"messages": []}, 400, "messages", "messages: "),
        ({"messages": QUESTION, "temperature": "hot"}, 400, "temperature", "temperature: "),
        ({"messages": QUESTION, "logprobs": True}, 400, "logprobs", "logprobs: Input should be False"),
        ({"messages": QUESTION, "frequency_penalty": 1}, 400, "frequency_penalty", "less than or equal to 0"),
        ({"messages": QUESTION, "top_k": 1}, 400, "top_k", "top_k: unknown or unsupported field"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "half of a surrogate pair"),
        ({"messages": QUESTION, "tools": [tool_called("x\udc00")]}, 400, None, "half of a surrogate pair"),
        ({"messages": QUESTION, "model": "gpt"}, 404, "model", "model: 'gpt' is not served here; 'micro' is"),
        ({"messages": [{"role": "system", "content": "detailed thinking on"}]}, 400, "messages", "messages: hold"),
    ],
)
def test_bad_requests(url: str, body: Any, status: int, param: str | None, message: str) -> None:
    got, text = post(url, body)
    error = json.loads(text)["error"]
    assert (got, error["type"]) == (status, "invalid_request_error")
    assert message in error["message"]
    if param is not None:
        assert error["param"] == param


def test_what_is_not_there_is_told_as_any_error(url: str) -> None:
    for path in ("/v1/embeddings", "/v1/chat/completions"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url + path, timeout=30)  # GET
        assert json.load(caught.value)["error"]["type"] == "invalid_request_error"


def test_the_least_temperature_and_top_p_are_greedy(url: str) -> None:
    greedy = ask(url)["choices"]
    assert ask(url, temperature=1e-38)["choices"] == ask(url, temperature=1, top_p=1e-300)["choices"] == greedy


def test_values_that_change_nothing_are_taken(url: str) -> None:
    neutral = {"logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0, "response_format": {"type": "text"}}
    first = ask(url, **neutral, store=False)
    # As a client returns it: the whole message object, every field set.
    said = {
        **first["choices"][0]["message"],
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
    }
    assert post(url, {"messages": [*QUESTION, said, *QUESTION]})[0] == 200


@pytest.mark.parametrize("streams", [False, True])
def test_an_answer_that_nobody_waits_for_ends(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    computed: list[int] = []
    ended = threading.Event()

    def slowly(*_: Any, **__: Any) -> Iterator[int]:
        try:
            for token in range(1000):
                computed.append(token)
                time.sleep(0.02)
                yield 5
        finally:
            ended.set()

    monkeypatch.setattr(chat, "stream", slowly)
    with serving(ChatModel.load(checkpoint)) as url:
        host, port = url.removeprefix("http://").split(":")
        client = HTTPConnection(host, int(port))
        body = json.dumps({"messages": QUESTION, "stream": streams})
        client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        until = time.monotonic() + 30
        while not computed and time.monotonic() < until:
            time.sleep(0.01)
        client.close()
        assert ended.wait(30)
    assert 0 < len(computed) < 1000


def told(text: str) -> tuple[str, Any, str]:
    """Type, field and message of the error that a body tells."""
    error = json.loads(text)["error"]
    return error["type"], error["param"], error["message"]


def broken(*_: Any, **__: Any) -> Iterator[int]:
    yield 5
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")


@pytest.mark.parametrize("reason", ["the model's logits are not finite", "OutOfMemoryError: CUDA out of memory."])
def test_a_failure_while_tokens_are_computed_is_the_servers(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    model = load_pretrained(checkpoint)
    if reason.startswith("the"):
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    else:
        monkeypatch.setattr(chat, "stream", broken)
    with serving(ChatModel(model, Tokenizer.load(checkpoint))) as url:
        status, whole = post(url, {"messages": QUESTION})
        assert (status, *told(whole)[:2]) == (500, "server_error", None)
        assert reason in told(whole)[2]
        assert "Traceback" in caplog.text
        status, text = post(url, {"messages": QUESTION, "stream": True})
    *_, last, done, end = text.split("\n\n")
    assert (status, done, end) == (200, "data: [DONE]", "")
    assert json.loads(last.removeprefix("data: ")) == json.loads(whole)


def test_any_other_failure_is_told_as_an_error_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> None:
        raise RuntimeError("a defect at https://ann:pass@host/")

    monkeypatch.setattr(ChatModel, "start", start)
    with serving(ChatModel.load(checkpoint)) as url:
        status, text = post(url, {"messages": QUESTION})
    message = "the server could not answer: RuntimeError: a defect at https://***@host/"
    assert (status, *told(text)) == (500, "server_error", None, message)


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(url: str, checkpoint: Path) -> None:
    messages = [{"role": "user", "content": "7 " * 60}]
    tokens = len(encode_prompt(Tokenizer.load(checkpoint), messages, thinking=False))
    status, text = post(url, {"messages": messages})
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, "messages")
    assert f"{tokens} tokens" in error["message"] and "96 tokens" in error["message"]


def test_more_tokens_than_the_context_has_left_are_refused_with_the_numbers(url: str) -> None:
    used = ask(url, max_tokens=1)["usage"]["prompt_tokens"]
    status, text = post(url, {"messages": QUESTION, "max_tokens": 96})
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, "max_tokens")
    assert f"the prompt has {used} tokens, which leaves {96 - used} of the context of 96 tokens" in error["message"]
