import unicodedata

import pytest

from ling_flow.data.words import is_unspaced, words, words_and_signs


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Zoë's café", unicodedata.normalize("NFD", "ZOË\u2019S\u00a0CAFÉ")),
        ("ab 12 + 13 =", "ａｂ １２ ＋ １３ ＝"),
        ("croissants every day", "croi\u00adssants \u200bevery \ufeffday"),
        ('a "quoted" - word', "a “quoted” – word"),
        ("straße", "STRASSE"),
        ("all of them, and more", "**all** of *them*, `and` __more__"),
        ("snake_case and x", "snake_case _and_ ~~x~~"),
        ("สมชาย มี", "สมชายมี"),
        ("한국어 말", unicodedata.normalize("NFD", "한국어 말")),
    ],
)
def test_the_same_words_in_other_forms(one: str, other: str) -> None:
    assert words_and_signs(one) == words_and_signs(other)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("47+38=?", ["47", "+", "38", "=", "?"]),
        ("3 * 4, 3*4", ["3", "*", "4", ",", "3", "*", "4"]),
        ("def __init__(a_b, _c):", ["def", "init", "(", "a_b", ",", "c", ")", ":"]),
        ("请计算37加五", ["请", "计", "算", "37", "加", "五"]),
        ("りんごを三", ["り", "ん", "ご", "を", "三"]),
        ("บ้าน", ["บ", "า", "น"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("élève déjà", ["élève", "déjà"]),
        ("a\x1cb\tc", ["a", "b", "c"]),
        ("", []),
    ],
)
def test_words_and_signs(text: str, expected: list[str]) -> None:
    assert words_and_signs(text) == expected
    assert words_and_signs(f"{text} é") == [*expected, "é"]  # the other expressions, the same words
    if "_" not in text:
        assert words(text) == [word for word in expected if word.isalnum()]


def test_words_of_ascii_text_are_runs_of_letters_digits_and_underscores() -> None:
    assert words("The cat_s, _on_ 2 mats!") == ["the", "cat_s", "_on_", "2", "mats"]


def test_scripts_without_blanks() -> None:
    assert all(map(is_unspaced, "语りกກកက"))
    assert not any(map(is_unspaced, ("a", "é", "한", "7", "。")))
