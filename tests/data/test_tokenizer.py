import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ling_flow.data.chat import CHAT_TEMPLATE, SPECIAL_TOKENS, THINK_TOKENS
from ling_flow.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer, train_tokenizer
from ling_flow.errors import UserError
from tests.data import published

TEXTS = ["def add(a, b):\n    return a + b\n", "47 + 38 = 85\n12345 + 1 = 12346", "The quick brown fox."] * 30


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 290)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="0123456789 +=\nab", max_size=40))
def test_every_digit_is_its_own_token(tokenizer: Tokenizer, text: str) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert [piece for piece in pieces if any(map(str.isdigit, piece))] == [sign for sign in text if sign.isdigit()]


def test_sums_take_few_tokens(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("47 + 38 = 85")] == [
        *"47",
        " + ",
        *"38",
        " = ",
        *"85",
    ]


@pytest.mark.parametrize("token", [*SPECIAL_TOKENS, *THINK_TOKENS])
def test_written_special_tokens_are_only_text(tokenizer: Tokenizer, token: str) -> None:
    special = tokenizer.token_id(token)
    assert special >= tokenizer.vocab_size - len(SPECIAL_TOKENS) - len(THINK_TOKENS)
    assert tokenizer.encode_rendered(f"a{token}b") == [*tokenizer.encode("a"), special, *tokenizer.encode("b")]
    plain = tokenizer.encode(f"a{token}b")
    assert special not in plain and tokenizer.decode(plain) == f"a{token}b"
    assert tokenizer.encode_batch([token]) == [tokenizer.encode(token)]


def test_nothing_is_added(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == [] == tokenizer.encode_rendered("")
    assert not {tokenizer.eos_id, tokenizer.token_id("<|startoftext|>")} & set(tokenizer.encode_rendered("hello"))


def test_vocabulary_size_and_determinism(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 290
    assert train_tokenizer(iter(TEXTS), 290).digest == tokenizer.digest
    assert train_tokenizer(TEXTS, 291).digest != tokenizer.digest
    assert train_tokenizer([], 5000).vocab_size == SMALLEST_VOCABULARY
    with pytest.raises(UserError, match=f"vocab_size: must be at least {SMALLEST_VOCABULARY}"):
        train_tokenizer(TEXTS, SMALLEST_VOCABULARY - 1)


def test_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    assert loaded.encode("47 + 38") == tokenizer.encode("47 + 38")
    data = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    assert loaded.digest == tokenizer.digest == hashlib.sha256(data).hexdigest()
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    special = json.loads((tmp_path / "tokenizer" / "special_tokens_map.json").read_text())
    for names in (config, special):
        assert (names["bos_token"], names["eos_token"]) == ("<|startoftext|>", "<|role_end|>")
        assert names["pad_token"] == "<|endoftext|>"
    assert json.loads((tmp_path / "tokenizer" / "generation_config.json").read_text()) == {
        "bos_token_id": tokenizer.token_id("<|startoftext|>"),
        "eos_token_id": [tokenizer.token_id("<|endoftext|>"), tokenizer.token_id("<|role_end|>")],
        "pad_token_id": tokenizer.token_id("<|endoftext|>"),
    }


def test_ids_of_the_published_tokenizer(tmp_path: Path) -> None:
    published.write_published(tmp_path / "published", TEXTS)
    given = Tokenizer.load(tmp_path / "published")
    assert given.vocab_size == 157153
    assert (given.eos_id, given.role_end_id) == (156892, 156895)
    assert given.stop_ids == {156892, 156895}
    assert [given.token_id(token) for token in ("<|startoftext|>", "<role>", "</role>")] == [156891, 157151, 157152]
    assert given.encode_rendered("<role>HUMAN</role>47<|role_end|>") == [
        157151, *given.encode("HUMAN"), 157152, *given.encode("47"), 156895,
    ]  # fmt: skip
    attack = "".join(SPECIAL_TOKENS)
    assert max(given.encode(attack)) < 156891 and given.decode(given.encode(attack)) == attack
    thinking = given.encode_rendered("\n<think>\nT\n</think>")  # ordinary text in this vocabulary
    assert thinking == given.encode("\n<think>\nT\n</think>") and max(thinking) < 156891
    given.save(tmp_path / "again")
    for name, expected in (("generation_config", published.GENERATION), ("special_tokens_map", published.NAMES)):
        assert json.loads((tmp_path / "again" / f"{name}.json").read_text()) == expected
    assert Tokenizer.load(tmp_path / "again").digest == given.digest


def test_ids_may_be_left_out(tokenizer: Tokenizer) -> None:
    content = json.loads(tokenizer._json)
    for token in content["added_tokens"]:
        token["id"] += 100
        content["model"]["vocab"][token["content"]] = token["id"]
    assert Tokenizer(json.dumps(content)).vocab_size == tokenizer.vocab_size + 100


def test_damaged_files_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"broken')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer file"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    foreign = json.loads((tmp_path / "tokenizer.json").read_text())
    foreign["added_tokens"] = [token for token in foreign["added_tokens"] if token["content"] != "<role>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign))
    with pytest.raises(UserError, match=r"tokenizer\.json: tokenizer: has no special token '<role>'"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({**foreign, "added_tokens": None}))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer file"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_of_a_given_file_do_not_count_and_dropout_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer as Engine

    engine = Engine.from_str(tokenizer._json)
    engine.enable_truncation(5)
    engine.enable_padding(length=100)
    given = Tokenizer(engine.to_str())
    texts = ["47 + 38 = 85, and so on", "x"]
    assert given.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert given.encode(texts[0]) == tokenizer.encode(texts[0])
    assert given.encode_rendered(f"<role>{texts[0]}") == tokenizer.encode_rendered(f"<role>{texts[0]}")
    content = json.loads(tokenizer._json)
    content["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json: tokenizer: has model\.dropout 0\.1, .* set it to null"):
        Tokenizer.load(tmp_path)
