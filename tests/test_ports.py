"""Ports for servers that are about to start."""

import socket
import tempfile
from pathlib import Path

import pytest

from ling_flow.errors import SystemFault
from ling_flow.ports import claim_port


def test_a_port_that_is_claimed_or_listened_at_is_not_given() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = int(taken.getsockname()[1])
        taken.listen()
        assert claim_port(port, patience=0.1) is None
    claim = claim_port(port)
    assert claim is not None
    assert claim_port(port) is None, "nothing listens there yet, but something will"
    claim.close()
    again = claim_port(port)
    assert again is not None
    again.close()


def test_a_place_that_cannot_be_written_to_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(SystemFault, match=r"file/ling_flow-ports-\d+: cannot be written to \(Not a dir"):
        claim_port(1)
