"""Where a step runs: read from the environment, never part of its identity.

LING_FLOW_HOME           home directory, default `./.lingflow`
LING_FLOW_ARTIFACTS      artifact root (path or fsspec URL), default `$LING_FLOW_HOME/artifacts`
LING_FLOW_EVENTS         file that receives one JSON line per event; `-`: such lines on stderr; unset: plain lines there
LING_FLOW_REBUILD        JSON list of labels of steps to redo although their artifacts exist
LING_FLOW_NO_CACHE       1: redo every step
LING_FLOW_LABELS         JSON object, fingerprint → label: what a step is called where its component does not decide
LING_FLOW_RUN_ON         where heavy components run: process (default, here), ray-job (at RAY_ADDRESS), rayjob (KubeRay)
LING_FLOW_JOB            how such jobs are run, JSON of `ling_flow.flow.job_settings`
LING_FLOW_PARENT_RUN_ID  MLflow run that the step's run hangs under
MLFLOW_TRACKING_URI      where tracking goes; unset: no tracking
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from ling_flow.errors import UserError

RunOn = Literal["process", "ray-job", "rayjob"]


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
    no_cache: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None
    tracking_uri: str | None = None
    run_on: RunOn = "process"
    job: str = "{}"

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Context:
        home = Path(environment.get("LING_FLOW_HOME") or ".lingflow").absolute()
        events = environment.get("LING_FLOW_EVENTS")
        run_on = environment.get("LING_FLOW_RUN_ON") or "process"
        if run_on not in get_args(RunOn):
            raise UserError(f"LING_FLOW_RUN_ON: must be one of {', '.join(get_args(RunOn))}, got '{run_on}'")
        return Context(
            home=home,
            artifacts=environment.get("LING_FLOW_ARTIFACTS") or str(home / "artifacts"),
            events=Path(events) if events else None,
            rebuild=frozenset(_json_of_texts(environment, "LING_FLOW_REBUILD", list)),
            no_cache=environment.get("LING_FLOW_NO_CACHE") == "1",
            labels=_json_of_texts(environment, "LING_FLOW_LABELS", dict),
            parent_run_id=environment.get("LING_FLOW_PARENT_RUN_ID") or None,
            tracking_uri=environment.get("MLFLOW_TRACKING_URI") or None,
            run_on=run_on,  # type: ignore[arg-type]
            job=environment.get("LING_FLOW_JOB") or "{}",
        )


def _json_of_texts(environment: Mapping[str, str], name: str, kind: type) -> Any:
    """The variable `name`, JSON of a list or an object of texts; an empty one where it is not set."""
    text = environment.get(name)
    if not text:
        return kind()
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    texts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(item, str) for item in texts):
        example = '["step"]' if kind is list else '{"fingerprint": "step"}'
        raise UserError(f"{name}: must be JSON like {example}, got '{text}'")
    return value
