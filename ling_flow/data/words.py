"""Words of a text as filters compare them: other case, Unicode forms and emphasis are the same text.

In scripts that put no blanks between words every character is a word.
"""

from __future__ import annotations

import functools
import re
import unicodedata

UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Myanmar
    "\u1780-\u17ff"  # Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"  # Kana and iteration marks
    "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"  # Han
)
"""As ranges of a character class. Hangul is not among them: Korean has blanks."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
# A star is a sign between two blanks or two words (`3 * 4`, `3*4`) and emphasis elsewhere (`**all**`, `*all*`), and so
# are underscores at the edge of a word. Control characters: what re.ASCII does not take for space.
_SIGN = r"[^\w\s*`~\x1c-\x1f]|\*(?:(?=\s)(?<=\s\*)|(?=\w)(?<=\w\*))"
ASCII_WORD = re.compile(r"\w+", re.ASCII)
ANY_WORD = re.compile(rf"[^\W{UNSPACED}]+|(?=\w)[{UNSPACED}]")
ASCII_WORD_OR_SIGN = re.compile(rf"[^\W_]\w*(?<!_)|{_SIGN}", re.ASCII)
ANY_WORD_OR_SIGN = re.compile(rf"[^\W_{UNSPACED}][^\W{UNSPACED}]*(?<!_)|(?=\w)[{UNSPACED}]|{_SIGN}")
TYPED = {other: sign for sign, others in (("'", "‘’‛′"), ('"', "“”„‟"), ("-", "‐‒–—―−")) for other in others}
"""Signs of typography, and what is typed for them."""


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores; single characters of scripts without blanks."""
    text = _folded(text)
    return (ASCII_WORD if text.isascii() else ANY_WORD).findall(text)


def words_and_signs(text: str) -> list[str]:
    """`words` and, in their places, every other sign but those of emphasis (as in Markdown)."""
    text = _folded(text)
    return (ASCII_WORD_OR_SIGN if text.isascii() else ANY_WORD_OR_SIGN).findall(text)


def is_unspaced(word: str) -> bool:
    """Whether a word is a character of a script without blanks."""
    return _UNSPACED.match(word) is not None


def _folded(text: str) -> str:
    """Without case, and in one Unicode form: no full-width letters, no soft hyphens, no accents apart from letters."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", text).casefold()
    for character in set(text):
        plain = _plain(character)
        if plain != character:
            text = text.replace(character, plain)
    return text


@functools.cache
def _plain(character: str) -> str:
    """Nothing for a character that is drawn onto others or not at all; for typography what is typed."""
    if character.isascii():
        return character
    return "" if unicodedata.category(character) in ("Cf", "Mn", "Mc", "Me") else TYPED.get(character, character)
