"""What may be shown: text without the passwords in its URLs and without what secret environment variables hold."""

from __future__ import annotations

import os
import re

_SECRET_NAME = re.compile(r"SECRET|PASSWORD|PASSWD|TOKEN(?![A-Z])|ACCESS_KEY(?!_ID)|API_KEY|PRIVATE_KEY", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s'\"]+@")
_SHORTEST = 6  # characters; a shorter value stands in too many words


def secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, by its name."""
    return _SECRET_NAME.search(name) is not None


def has_password(text: str) -> bool:
    """Whether there is a URL with user or password in it."""
    return _USER_INFO.search(text) is not None


def redact(text: str) -> str:
    """`text` with `***` in place of users and passwords in URLs, and of the values of secret environment variables."""
    for name, value in os.environ.items():
        value = value.strip()
        if len(value) >= _SHORTEST and value in text and secret_name(name):
            text = text.replace(value, "***")
    return _USER_INFO.sub("***@", text)
