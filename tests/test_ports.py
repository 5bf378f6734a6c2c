"""Ports for servers that are about to start."""

import socket

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
