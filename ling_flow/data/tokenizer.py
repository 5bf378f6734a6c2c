"""Byte-level BPE in the Hugging Face file format, with the published special tokens (ling2-facts §1.7).

`train_tokenizer` learns one in which every digit is a token of its own and the special tokens have the highest ids;
`Tokenizer.load` reads that, or the published one with its own ids. Nothing is added at the beginning or the end of an
encoded text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ling_flow.data.chat import (
    CHAT_TEMPLATE,
    CHAT_TOKENS,
    END_OF_TEXT,
    ROLE_END,
    SPECIAL_TOKENS,
    START_OF_TEXT,
    THINK_TOKENS,
)
from ling_flow.errors import UserError

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS) + len(THINK_TOKENS)
"""All bytes and the special tokens, no merges."""

# One digit; a word with the space before it; signs with the space before them and, before a digit, the space after them
# (`47 + 38` is 5 tokens); blanks, the last one left to the word that follows.
PIECES = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+(?: (?=\p{N}))?|\s+(?!\S)|\s+"


class Tokenizer:
    """A tokenizer that reads user text as text: only `encode_rendered` and `token_id` give special tokens.

    `eos_id` (`<|endoftext|>`) ends a document and pads a batch, `role_end_id` ends a turn; a chat stops at either
    (`stop_ids`).
    """

    def __init__(self, text: str) -> None:
        """`text`: content of a `tokenizer.json`. What it says of truncation and padding does not count.

        Raises:
            UserError: it lacks a token of the chat format, or encodes by chance.
        """
        from tokenizers import Tokenizer as Engine

        content = json.loads(text)
        if content["model"].get("dropout"):
            raise UserError(
                f"tokenizer: has model.dropout {content['model']['dropout']}, which encodes a text differently each "
                "time; set it to null"
            )
        self._json = text
        self._full = Engine.from_str(text)
        # The same vocabulary without added tokens: `<role>` in a document is six ordinary characters here.
        self._plain = Engine.from_str(json.dumps({**content, "added_tokens": []}))
        for engine in (self._full, self._plain):
            engine.no_truncation()
            engine.no_padding()
        self._marks = {token["content"] for token in content["added_tokens"]}
        for token in CHAT_TOKENS:
            if not self.is_mark(token):
                raise UserError(f"tokenizer: has no special token {token!r}")
        self.eos_id = self.token_id(END_OF_TEXT)
        self.role_end_id = self.token_id(ROLE_END)
        self.stop_ids = frozenset({self.eos_id, self.role_end_id})

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included: one more than the highest, as ids may be left out."""
        return 1 + max(self._full.get_vocab(with_added_tokens=True).values())

    @property
    def digest(self) -> str:
        """SHA-256 of `tokenizer.json`."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def is_mark(self, text: str) -> bool:
        """Whether `text` is an added token, which only the chat format writes; user text gives no such token."""
        return text in self._marks

    def token_id(self, token: str) -> int:
        """The id of a token given by its exact text.

        Raises:
            UserError: the vocabulary has no such token.
        """
        found = self._full.token_to_id(token)
        if found is None:
            raise UserError(f"tokenizer: has no token {token!r}")
        return int(found)

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text; special tokens written in it are taken as characters."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_rendered_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that we rendered in the chat format ourselves: special tokens are read as such."""
        return [encoding.ids for encoding in self._full.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_rendered(self, text: str) -> list[int]:
        """`encode_rendered_batch` of one text."""
        return self.encode_rendered_batch([text])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out."""
        return str(self._full.decode([int(token) for token in ids], skip_special_tokens=False))

    def save(self, directory: Path) -> None:
        """Write the Hugging Face files, as published: `tokenizer_config.json` holds the chat template,
        `generation_config.json` where engines stop (its place is beside the weights too)."""
        published = {
            "bos_token": START_OF_TEXT,
            "eos_token": ROLE_END,
            "pad_token": END_OF_TEXT,
            "cls_token": "[CLS]",
            "gmask_token": "[gMASK]",
        }
        # A name without its token would make Hugging Face append the token to the vocabulary.
        named = {name: token for name, token in published.items() if self.is_mark(token)}
        config = {
            **named,
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        }
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self._json)
        _write_json(directory / "tokenizer_config.json", config)
        _write_json(directory / "special_tokens_map.json", named)
        generation = {
            "bos_token_id": self.token_id(START_OF_TEXT),
            "eos_token_id": sorted(self.stop_ids),
            "pad_token_id": self.eos_id,
        }
        _write_json(directory / "generation_config.json", generation)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a tokenizer, ours or the published one: its directory, of whose files only `tokenizer.json` counts, or
        that file, or the fsspec URL of either.

        Raises:
            UserError: `tokenizer.json` is missing, damaged, lacks the tokens of the chat format, or has a dropout.
        """
        file = _json_file(path)
        content = _read(file)
        try:
            return cls(content.decode())
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
            raise UserError(f"{file}: not a tokenizer file ({' '.join(str(error).split())})") from None


def tokenizer_digest(path: Path | str) -> str:
    """`Tokenizer.digest` of the tokenizer at `path`, which is read but not parsed.

    Raises:
        UserError: there is no `tokenizer.json`.
    """
    return hashlib.sha256(_read(_json_file(path))).hexdigest()


def _json_file(path: Path | str) -> str:
    text = str(path)
    return text if text.endswith(".json") else f"{text.rstrip('/')}/tokenizer.json"


def _read(file: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(file, "rb") as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; expected a tokenizer directory or its tokenizer.json") from None
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from `texts` until there are `vocab_size` ids, special ones included (or the texts give no more).

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Engine

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size: must be at least {SMALLEST_VOCABULARY} (got {vocab_size})")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(THINK_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer)
    engine.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    engine.add_tokens([AddedToken(token, normalized=False, special=False) for token in THINK_TOKENS])
    return Tokenizer(engine.to_str())
