"""Where a step runs: read from the environment, never part of its identity.

LING_FLOW_HOME           home directory, default `./.lingflow`
LING_FLOW_ARTIFACTS      artifact root (path or fsspec URL), default `$LING_FLOW_HOME/artifacts`
LING_FLOW_EVENTS         file that receives one JSON line per event; unset: plain lines on stderr
LING_FLOW_REBUILD        comma-separated step labels to redo although their artifacts exist
LING_FLOW_PARENT_RUN_ID  MLflow run that the step's run hangs under
MLFLOW_TRACKING_URI      where tracking goes; unset: no tracking
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


def spin_briefly() -> None:
    """Let OpenMP's idle threads sleep after a few microseconds of spinning; to be called before torch is imported.

    On a machine that does anything else, long spinning makes two threads several times slower than one (docs/log.md).
    NumPy's own threads gain nothing on arrays as small as ours.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "300")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@dataclass(frozen=True)
class Context:
    """The environment of a step; see the module's docstring for each field's variable."""

    home: Path
    artifacts: str
    events: Path | None = None
    rebuild: frozenset[str] = frozenset()
    parent_run_id: str | None = None
    tracking_uri: str | None = None

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Context:
        home = Path(environment.get("LING_FLOW_HOME") or ".lingflow").absolute()
        events = environment.get("LING_FLOW_EVENTS")
        return Context(
            home=home,
            artifacts=environment.get("LING_FLOW_ARTIFACTS") or str(home / "artifacts"),
            events=Path(events) if events else None,
            rebuild=frozenset(
                label.strip() for label in environment.get("LING_FLOW_REBUILD", "").split(",") if label.strip()
            ),
            parent_run_id=environment.get("LING_FLOW_PARENT_RUN_ID") or None,
            tracking_uri=environment.get("MLFLOW_TRACKING_URI") or None,
        )
