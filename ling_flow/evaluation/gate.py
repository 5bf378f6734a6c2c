"""Gates: what a model must show before it may be promoted, and the verdict on each in one sentence."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.errors import UserError

ROUNDING = 1e-9  # 0.7 - 0.8 is a little less than -0.1
_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


class Gate(StrictModel):
    """`metric comparison threshold`, and where there is a champion, also better than it by at least `min_change`."""

    metric: str = Field(min_length=1, description="name of a metric of the evaluation")
    comparison: Literal[">=", ">", "<=", "<"] = Field(
        default=">=", description="how the metric must compare with the threshold; also says which direction is better"
    )
    threshold: float = Field(allow_inf_nan=False, description="bound on the metric, in the metric's unit")
    min_change: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="least improvement over the champion, in the metric's unit and the comparison's direction; "
        "negative tolerates a small loss; null compares with no champion",
    )


class GateVerdict(StrictModel):
    """The outcome of one gate."""

    gate: Gate = Field(description="the gate that was judged")
    passed: bool = Field(description="whether the model may pass")
    value: float | None = Field(description="the candidate's metric; null where it is not a finite number")
    champion: float | None = Field(description="the champion's metric; null where none was compared")
    sentence: str = Field(description="the verdict and its reason, for people")


def judge(
    gates: Sequence[Gate],
    metrics: Mapping[str, float],
    champion: Mapping[str, float] | None = None,
    caveat: str = "",
) -> list[GateVerdict]:
    """One verdict for each gate.

    Args:
        gates: what is asked.
        metrics: the candidate's metrics by name.
        champion: the champion's metrics, or None where nothing has been promoted yet: then `min_change` is not asked.
        caveat: what makes the champion's metrics hard to compare with the candidate's, for the sentence; the gate is no
            looser for it.

    Raises:
        UserError: a gate names a metric that the evaluation does not report.
    """
    return [_judge(index, gate, metrics, champion, caveat) for index, gate in enumerate(gates)]


def _judge(
    index: int, gate: Gate, metrics: Mapping[str, float], champion: Mapping[str, float] | None, caveat: str
) -> GateVerdict:
    if gate.metric not in metrics:
        raise UserError(f"gates.{index}.metric: no metric '{gate.metric}'; the evaluation reports {', '.join(metrics)}")
    value = metrics[gate.metric]
    if not math.isfinite(value):
        sentence = f"failed: {gate.metric} is {value}, not a finite number"
        return GateVerdict(gate=gate, passed=False, value=None, champion=None, sentence=sentence)

    passed = _COMPARE[gate.comparison](value, gate.threshold)
    reason = f"{gate.metric} is {value:.4g}, asked {gate.comparison} {gate.threshold:.4g}"
    best = None
    if gate.min_change is not None and champion is not None:
        best = champion.get(gate.metric)
        if best is None:  # of an older evaluation
            reason += f"; not compared with the champion: its evaluation reports no {gate.metric}"
        elif not math.isfinite(best):
            reason += f"; not compared with the champion: its {gate.metric} is {best}, not a finite number"
            best = None
        else:
            change = value - best if gate.comparison in (">=", ">") else best - value
            passed = passed and change >= gate.min_change - ROUNDING
            reason += f"; {change:+.4g} better than the champion's {best:.4g}, asked at least {gate.min_change:+.4g}"
            reason += f" ({caveat})" if caveat else ""
    sentence = f"{'passed' if passed else 'failed'}: {reason}"
    return GateVerdict(gate=gate, passed=passed, value=value, champion=best, sentence=sentence)
