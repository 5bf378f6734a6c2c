"""The last task of a run on Kubeflow: closes the run in MLflow, whatever became of the steps."""

from __future__ import annotations

import os
import time

from ling_flow.errors import SystemFault
from ling_flow.flow.events import report_failure

STATUS = {"SUCCEEDED": "finished", "CANCELLED": "killed", "CANCELED": "killed"}  # all others: failed
PATIENCE_SECONDS = 600.0  # for a store that is away; Kubeflow does not retry exit tasks
WAIT_SECONDS = 15.0


def close_run(state: str) -> None:
    """Close the MLflow run of this Kubeflow run as `state` (of all steps together) says; ends the process on failure.

    A run that Kubeflow's own MLflow plugin made (MLFLOW_RUN_ID) is closed by that plugin.
    """
    from ling_flow.flow.tracking import finish_kfp_run

    uri, run = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("LING_FLOW_KFP_RUN_ID")
    if not uri or not run or os.environ.get("MLFLOW_RUN_ID"):
        return
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            finish_kfp_run(uri, run, STATUS.get(state, "failed"))
            return
        except SystemFault as error:
            if time.monotonic() + WAIT_SECONDS > until:
                raise SystemExit(report_failure("close_run", error)) from None
            time.sleep(WAIT_SECONDS)
