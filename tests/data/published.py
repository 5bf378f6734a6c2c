"""A stand-in for the published tokenizer directory, whose `tokenizer.json` is not at hand: the special tokens with
their published ids (ling2-facts §1.7), after as many ordinary ids as the published vocabulary has. Merges and ordinary
ids are not the published ones, nor are the names between `<|role_end|>` and `<role>`.
"""

import json
from pathlib import Path
from typing import Any

from ling_flow.data.chat import CHAT_TEMPLATE, SPECIAL_TOKENS, THINK_TOKENS
from ling_flow.data.tokenizer import train_tokenizer

START_OF_TEXT, END_OF_TEXT, ROLE_END, ROLE, ROLE_CLOSE = 156891, 156892, 156895, 157151, 157152
NAMES = {
    "bos_token": "<|startoftext|>",
    "cls_token": "[CLS]",
    "eos_token": "<|role_end|>",
    "gmask_token": "[gMASK]",
    "pad_token": "<|endoftext|>",
}
GENERATION = {"bos_token_id": START_OF_TEXT, "eos_token_id": [END_OF_TEXT, ROLE_END], "pad_token_id": END_OF_TEXT}


def write_published(directory: Path, texts: list[str]) -> None:
    """Write the directory; its merges are learnt from `texts`."""
    small = train_tokenizer(texts, 300 + len(SPECIAL_TOKENS) + len(THINK_TOKENS))
    small.save(directory)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    assert not {*SPECIAL_TOKENS, *THINK_TOKENS} & vocabulary.keys()
    for number in range(len(vocabulary), START_OF_TEXT):
        vocabulary[f"unused {number}"] = number
    special = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>"]
    special += [f"<|reserved_token_{number}|>" for number in range(ROLE - ROLE_END - 1)]
    special += ["<role>", "</role>"]
    content["added_tokens"] = [_added(START_OF_TEXT + place, text) for place, text in enumerate(special)]
    path.write_text(json.dumps(content))
    config = {
        **NAMES,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "fast_tokenizer": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    for name, data in (("tokenizer_config", config), ("special_tokens_map", NAMES), ("generation_config", GENERATION)):
        (directory / f"{name}.json").write_text(json.dumps(data))


def _added(number: int, text: str) -> dict[str, Any]:
    spaces = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": text, **spaces, "special": True}
