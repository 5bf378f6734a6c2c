"""Versions of models for tests of the registry, and several processes that promote them at once."""

from __future__ import annotations

import subprocess
import sys

from ling_flow.evaluation.gate import Gate
from ling_flow.flow.promotion import Registry, Version

GATES = (Gate(metric="score", threshold=0.3, min_change=-0.1),)
PROMOTES = (
    "import sys; from ling_flow.flow.promotion import Registry; r = Registry(sys.argv[1])\n"
    "for n in map(int, sys.argv[3:]): r.promote(r.version(sys.argv[2], n), (), by_hand=True)"
)


def register(registry: Registry, name: str, fingerprint: str, score: float = 0.5) -> Version:
    artifact = f"/root/preference_pass/{fingerprint}/model"
    return registry.register(name, artifact, fingerprint, {"score": score}, {"layers": 4}, GATES)


def aliases(registry: Registry, name: str) -> tuple[int | None, int | None]:
    """Numbers of champion and previous."""
    champion, previous = registry.by_alias(name, "champion"), registry.by_alias(name, "previous")
    return champion.number if champion else None, previous.number if previous else None


def promote_at_once(registry: Registry, name: str) -> None:
    """Two processes promote three versions in different orders; every decision must know the one before it."""
    for number in range(3):
        register(registry, name, f"f{number}")
    orders = (("1", "2", "3"), ("3", "2", "1"))
    command = [sys.executable, "-c", PROMOTES, registry.tracking_uri, name]
    workers = [subprocess.Popen([*command, *order]) for order in orders]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    moves = [record for record in registry.promotions(name) if record.moves]
    champion = None
    for record in moves:
        assert record.entry.champion_before == champion
        champion = record.entry.version
    assert aliases(registry, name) == (champion, moves[-1].entry.champion_before)
