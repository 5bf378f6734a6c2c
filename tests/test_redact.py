"""What is shown of values that hold secrets, and that every error and log line goes through it."""

from __future__ import annotations

import pytest

from ling_flow.errors import SystemFault, UserError
from ling_flow.flow import events
from ling_flow.redact import has_password, redact, secret_name


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("http://admin:hunter2@host:5000 is away", "http://***@host:5000 is away"),
        ("postgresql+psycopg2://ling@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        ("header b'Bearer s3cr3t-token\\n' is wrong", "header b'Bearer ***\\n' is wrong"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("mail a@b.example, user admin, 12345", "mail a@b.example, user admin, 12345"),
    ],
)
def test_passwords_and_secret_variables_are_not_shown(monkeypatch: pytest.MonkeyPatch, given: str, shown: str) -> None:
    monkeypatch.setenv("KFP_TOKEN", "s3cr3t-token\n")
    monkeypatch.setenv("SHORT_PASSWORD", "12345")  # would be found in too many words
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "mail a@b")
    assert redact(given) == shown
    assert has_password(given) == ("***@" in shown)


def test_names_of_secrets() -> None:
    secret = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "AWS_SESSION_TOKEN", "OPENAI_API_KEY")
    plain = ("AWS_ACCESS_KEY_ID", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "MLFLOW_TRACKING_USERNAME", "HOME")
    assert all(map(secret_name, secret)) and not any(map(secret_name, plain))


def test_errors_and_logs_show_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    for error in (UserError("correct horse"), SystemFault("correct horse"), ValueError("correct horse")):
        events.report_failure("step", error)
    events.emit("log", step="step", text="at http://u:p@host: correct horse")
    told = capsys.readouterr().err
    assert "correct horse" not in told and "u:p" not in told and "at http://***@host: ***" in told
