"""The published Ling 2.0 chat format (ling2-facts §9): rendering, encoding, and reading a completion.

The format exists twice, as Jinja text for other engines and as `render` here; tests hold them to the same golden
strings. What the template itself writes as a mark (`<role>`, `<think>`, `<tool_call>`, …) is `Control`; message text
never turns into one, whatever it says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ling_flow.errors import UserError

if TYPE_CHECKING:
    from ling_flow.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""`role` (system, user, assistant, tool), `content`; an assistant's may hold `reasoning_content` and `tool_calls`."""


class Control(str):
    """A mark of the format: one token where the vocabulary has it as one, otherwise text like any other."""


START_OF_TEXT, END_OF_TEXT, ROLE_END = Control("<|startoftext|>"), Control("<|endoftext|>"), Control("<|role_end|>")
ROLE, ROLE_CLOSE = Control("<role>"), Control("</role>")
SPECIAL_TOKENS = (START_OF_TEXT, END_OF_TEXT, Control("[CLS]"), Control("[gMASK]"), ROLE_END, ROLE, ROLE_CLOSE)
CHAT_TOKENS = (START_OF_TEXT, END_OF_TEXT, ROLE_END, ROLE, ROLE_CLOSE)
"""Those of the special tokens that a vocabulary must have for the chat format."""
THINK, THINK_CLOSE = Control("<think>"), Control("</think>")
THINK_TOKENS = (THINK, THINK_CLOSE)
"""Single tokens of ours, not special: they stay visible when special tokens are skipped in decoding. A published
vocabulary may lack them; then they are written as text."""
_MARKS = re.compile("(</?(?:think|tools|tool_call|tool_response)>)")

TOOLS_HEADER = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_FOOTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n'
)

# Engines pass `enable_thinking` through (`chat_template_kwargs`); absent means off, as in the published file.
CHAT_TEMPLATE = (
    "{%- set newest = namespace(user=messages | length) -%}\n"
    "{%- for message in messages -%}\n"
    "{%- if message.role == 'user' and not (message.content.startswith('<tool_response>')"
    " and message.content.endswith('</tool_response>')) -%}{%- set newest.user = loop.index0 -%}{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{{- '<role>SYSTEM</role>' -}}\n"
    "{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n' -}}{%- endif -%}\n"
    "{%- if tools -%}\n"
    f"{{{{- {json.dumps(TOOLS_HEADER)} -}}}}\n"
    "{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}\n"
    f"{{{{- {json.dumps(TOOLS_FOOTER)} -}}}}\n"
    "{%- endif -%}\n"
    "{{- 'detailed thinking ' + ('on' if enable_thinking else 'off') + '<|role_end|>' -}}\n"
    "{%- for message in messages -%}\n"
    "{%- set text = message.content if message.content is string else '' -%}\n"
    "{%- if message.role == 'system' -%}\n"
    "{%- if not loop.first -%}{{- '<role>SYSTEM</role>' + text + '<|role_end|>' -}}{%- endif -%}\n"
    "{%- elif message.role == 'user' -%}\n"
    "{{- '<role>HUMAN</role>' + text + '<|role_end|>' -}}\n"
    "{%- elif message.role == 'assistant' -%}\n"
    "{%- set thought = '' -%}\n"
    "{%- if message.reasoning_content is string -%}\n"
    "{%- set thought = message.reasoning_content -%}\n"
    "{%- elif '</think>' in text -%}\n"
    "{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}\n"
    "{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}\n"
    "{%- endif -%}\n"
    "{{- '<role>ASSISTANT</role>' -}}\n"
    "{%- if thought and loop.index0 > newest.user -%}"
    "{{- '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') -}}"
    "{%- else -%}{{- text -}}{%- endif -%}\n"
    "{%- for entry in message.tool_calls or [] -%}\n"
    "{%- set call = entry.function or entry -%}\n"
    "{%- if text or not loop.first -%}{{- '\\n' -}}{%- endif -%}\n"
    '{{- \'<tool_call>\\n{"name": "\' + call.name + \'", "arguments": \' -}}\n'
    "{{- call.arguments if call.arguments is string else call.arguments | tojson -}}\n"
    "{{- '}\\n</tool_call>' -}}\n"
    "{%- endfor -%}\n"
    "{{- '<|role_end|>' -}}\n"
    "{%- elif message.role == 'tool' -%}\n"
    "{%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<role>OBSERVATION</role>' -}}{%- endif -%}\n"
    "{{- '\\n<tool_response>\\n' + text + '\\n</tool_response>' -}}\n"
    "{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|role_end|>' -}}{%- endif -%}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}{%- endif -%}\n"
)


def chat_template_digest() -> str:
    """SHA-256 of the template: part of the contract on every edge that carries a tokenizer."""
    return hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()


def render(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The conversation as text, exactly as `CHAT_TEMPLATE` renders it.

    Raises:
        UserError: no messages, an unknown role, content that is not text, or a tool call without name or arguments.
    """
    return "".join(pieces(messages, add_generation_prompt, thinking, tools))


def pieces(
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[str]:
    """`render` in pieces, what the template writes as a mark being `Control`."""
    if not messages:
        raise UserError("messages: must hold at least one message")
    texts = [_text(message, where) for where, message in enumerate(messages)]
    roles = [message["role"] for message in messages]
    newest_user = max(
        (where for where, role in enumerate(roles) if role == "user" and not _is_tool_response(texts[where])),
        default=len(roles),
    )

    out: list[str] = [*_role("SYSTEM")]
    if roles[0] == "system":
        out.append(texts[0] + "\n")
    if tools:
        out += [*_marked(TOOLS_HEADER), *("\n" + _json(tool) for tool in tools), *_marked(TOOLS_FOOTER)]
    out += [f"detailed thinking {'on' if thinking else 'off'}", ROLE_END]
    for where, (role, text, message) in enumerate(zip(roles, texts, messages, strict=True)):
        if role == "system" and where > 0:
            out += [*_role("SYSTEM"), text, ROLE_END]
        elif role == "user":
            out += [*_role("HUMAN"), text, ROLE_END]
        elif role == "assistant":
            out += [*_role("ASSISTANT"), *_assistant(message, text, where, where > newest_user), ROLE_END]
        elif role == "tool":
            if where == 0 or roles[where - 1] != "tool":
                out += _role("OBSERVATION")
            out += [*_marked("\n<tool_response>\n"), text, *_marked("\n</tool_response>")]
            if where == len(roles) - 1 or roles[where + 1] != "tool":
                out.append(ROLE_END)
    if add_generation_prompt:
        out += _role("ASSISTANT")
    return out


def _text(message: Message, where: int) -> str:
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant", "tool"):
        raise UserError(f"messages.{where}.role: must be system, user, assistant or tool (got {role!r})")
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, str):
        raise UserError(f"messages.{where}.content: must be text (got {type(content).__name__})")
    return content


def _is_tool_response(text: str) -> bool:
    """A user turn that only carries a tool's response does not begin a new question."""
    return text.startswith("<tool_response>") and text.endswith("</tool_response>")


def _role(name: str) -> list[str]:
    return [ROLE, name, ROLE_CLOSE]


def _marked(text: str) -> list[str]:
    """Text of the template itself, its marks as `Control`."""
    return [Control(part) if _MARKS.fullmatch(part) else part for part in _MARKS.split(text)]


def _assistant(message: Message, text: str, where: int, keep_reasoning: bool) -> list[str]:
    thought = message.get("reasoning_content")
    if not isinstance(thought, str):
        before, found, after = text.rpartition(THINK_CLOSE)
        thought = before.split(THINK_CLOSE)[0].split(THINK)[-1].strip("\n") if found else ""
        text = after.lstrip("\n") if found else text
    out = answer_pieces(thought.strip("\n"), text.lstrip("\n")) if keep_reasoning and thought else [text]
    for number, entry in enumerate(message.get("tool_calls") or []):
        call = entry.get("function") or entry
        if not isinstance(call.get("name"), str) or "arguments" not in call:
            raise UserError(f"messages.{where}.tool_calls.{number}: must have a name and arguments")
        arguments = call["arguments"] if isinstance(call["arguments"], str) else _json(call["arguments"])
        lead = "\n" if text or number > 0 else ""
        body = f'{{"name": "{call["name"]}", "arguments": {arguments}}}'
        out += [*_marked(f"{lead}<tool_call>\n"), body, *_marked("\n</tool_call>")]
    return out


def answer_pieces(reasoning: str | None, answer: str) -> list[str]:
    """The body of an assistant turn, reasoning first where there is some."""
    if reasoning is None:
        return [answer]
    return [*_marked("\n<think>\n"), reasoning, *_marked("\n</think>\n\n"), answer]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def parse_completion(text: str) -> tuple[str | None, str]:
    """What the model wrote after `<role>ASSISTANT</role>` → (reasoning or None, answer).

    Text from the first end-of-turn token on is dropped. Reasoning that is never closed leaves an empty answer.
    """
    for end in (ROLE_END, END_OF_TEXT):
        text = text.split(end)[0]
    if not text.lstrip().startswith(THINK):
        return None, text.strip()
    reasoning, _, answer = text.lstrip().removeprefix(THINK).partition(THINK_CLOSE)
    return reasoning.strip(), answer.strip()


def encode_pieces(tokenizer: Tokenizer, parts: Sequence[str]) -> list[int]:
    """Token ids of `pieces`. Ordinary text between two marks is encoded as a whole, as other engines do."""
    ids: list[int] = []
    text = ""
    for part in parts:
        if isinstance(part, Control) and tokenizer.is_mark(part):
            ids += tokenizer.encode(text)
            ids.append(tokenizer.token_id(part))
            text = ""
        else:
            text += part
    return ids + tokenizer.encode(text)


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], thinking: bool, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Token ids of the conversation up to where the assistant begins to write."""
    return encode_pieces(tokenizer, pieces(messages, True, thinking, tools))


def encode_answer(tokenizer: Tokenizer, reasoning: str | None, answer: str) -> list[int]:
    """Token ids of an assistant's turn, `<|role_end|>` included: what a model learns to write after `encode_prompt`."""
    return encode_pieces(tokenizer, [*answer_pieces(reasoning, answer), ROLE_END])
