"""The training loop. On the same machine with the same number of threads, the same arguments give the same bits.

Run by every worker of a process group, it trains data-parallel: each takes its rows of every batch, and all make the
same update.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ling_flow.data.batches import Batch
from ling_flow.errors import SystemFault
from ling_flow.model.config import RouterLoss
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.parallel.data import DataParallel
from ling_flow.training.fp8 import Safeguard
from ling_flow.training.guard import GuardSettings, SpikeGuard


class BatchSource(Protocol):
    """`ling_flow.data.batches.Batches`, or anything that gives rows of S+1 tokens as a pure function of the step."""

    def batch(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as told to `on_step`.

    Attributes:
        step: steps done since the start of the run, this one included.
        loss, cross_entropy, mtp_cross_entropy: of the batch before the update, nats per token.
        source_cross_entropy: mean over the rows of each source, by its index in the batches' sources.
        gradient_norm: global L2 norm before clipping.
        load_violation: max(n)/mean(n) − 1 over the experts' token counts, mean over layers.
        skipped: no update was made: a spike, or a value that is not finite.
    """

    step: int
    loss: float
    cross_entropy: float
    mtp_cross_entropy: float
    gradient_norm: float
    learning_rate: float
    load_violation: float
    sequences: int
    tokens: int
    seconds: float
    skipped: bool
    source_cross_entropy: dict[int, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def train(
    model: BailingMoeV2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    batches: BatchSource,
    *,
    steps: int,
    schedule: Callable[[int], float],
    start_step: int = 0,
    first_batch_step: int = 0,
    gradient_clip: float = 1.0,
    expert_bias_update_rate: float = 1e-3,
    router_loss: RouterLoss | None = None,
    sequences_per_forward: int | None = None,
    guard: SpikeGuard | None = None,
    roll_back: Callable[[], int | None] | None = None,
    safeguard: Safeguard | None = None,
    on_watch: Callable[[int, Safeguard], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    checkpoint: Callable[[int], None] | None = None,
) -> None:
    """Run steps `start_step` … `steps` − 1 of a run, in place.

    Each step: batch → loss → backward → clip the global norm → AdamW → move the experts' biases by their token counts.

    Args:
        steps: the step to stop before, counted like `start_step` from the start of the run (not of the call).
        schedule: step → learning rate.
        first_batch_step: the step that draws batch 0 (where a stage began).
        router_loss: losses on the routers beside that of the tokens; None: none.
        sequences_per_forward: split each batch into forward passes of that many sequences; None: one pass.
        guard: which steps are not taken; None: those that are not finite.
        roll_back: puts model, optimizer and guard back to the last good checkpoint and returns its steps done, or None
            where there is none. Called when too many steps were skipped.
        safeguard: of a model in FP8: watches every `watch_every`-th step, and names what was not finite where a step is
            skipped.
        on_watch: called with the number of steps done after a pass that the safeguard watched.
        on_step: called after every step.
        checkpoint: called with the number of steps done after every step that is not rolled back; saves if it is time.

    Raises:
        SystemFault: too many steps were skipped, in a row or of the last ones, and no rollback is left.
    """
    guard = guard or SpikeGuard(GuardSettings(factor=None))
    workers = DataParallel()
    device = next(model.parameters()).device
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    step = start_step
    while step < steps:
        started = time.perf_counter()
        batch = batches.batch(step - first_batch_step + guard.state.batches_passed).to(device)
        learning_rate = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        every = 0 if safeguard is None else safeguard.settings.watch_every
        watched = safeguard if every and (step + 1) % every == 0 else None
        with contextlib.nullcontext() if watched is None else watched.watching():
            losses = _accumulate(model, batch, sequences_per_forward, router_loss, workers)
        workers.sum_gradients(parameters)
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip).item()
        taken = guard.takes(losses.loss, gradient_norm)
        if taken:
            optimizer.step()
            load_violation = model.update_expert_bias(expert_bias_update_rate)
        else:
            load_violation = model.update_expert_bias(0.0)  # forget this batch's counts
            if safeguard is not None and watched is None:  # once more, to see which operation it was
                watched = safeguard
                with safeguard.watching():
                    _accumulate(model, batch, sequences_per_forward, router_loss, workers)
                model.update_expert_bias(0.0)
        if watched is not None and on_watch is not None:
            on_watch(step + 1, watched)
        if on_step is not None:
            report = StepReport(
                step=step + 1,
                loss=losses.loss,
                cross_entropy=losses.cross_entropy,
                mtp_cross_entropy=losses.mtp_cross_entropy,
                gradient_norm=gradient_norm,
                learning_rate=learning_rate,
                load_violation=load_violation,
                sequences=len(batch.tokens),
                tokens=batch.token_count,
                seconds=time.perf_counter() - started,
                skipped=not taken,
                source_cross_entropy=losses.by_source,
            )
            on_step(report)
        if guard.exhausted:
            back_at = roll_back() if roll_back is not None and guard.may_roll_back else None
            if back_at is None:
                raise SystemFault(
                    f"step {step + 1}: loss ({losses.loss:g}) or gradient norm ({gradient_norm:g}) was not finite or a "
                    f"spike {guard.skipped}; a lower learning rate may help"
                )
            step = back_at
            continue
        if checkpoint is not None:
            checkpoint(step + 1)
        step += 1


class _Losses(NamedTuple):
    loss: float
    cross_entropy: float
    mtp_cross_entropy: float
    by_source: dict[int, float]


def _accumulate(
    model: BailingMoeV2ForCausalLM,
    batch: Batch,
    sequences_per_forward: int | None,
    router_loss: RouterLoss | None,
    workers: DataParallel,
) -> _Losses:
    """Backward over this worker's rows of the batch in parts; the mean losses of the whole batch."""
    totals = torch.zeros(3, device=batch.tokens.device)
    rows: list[Tensor] = []
    depths = range(1 + model.config.num_nextn_predict_layers)
    targets = [batch.targets(depth + 1) for depth in depths]
    routed = [batch.routed(depth) for depth in depths] if router_loss is not None and router_loss.wanted else None
    mine = workers.share(batch)
    for part in mine.split(sequences_per_forward or len(mine.tokens)):
        output = model.loss(
            part.tokens, documents_BS1=part.documents, router_loss=router_loss, of_targets=targets, of_routed=routed
        )
        output.loss.backward()
        totals += torch.stack([output.loss.detach(), output.cross_entropy, output.mtp_cross_entropy])
        rows.append(output.row_cross_entropy_B)
    by_source: dict[int, float] = {}
    if mine.sources is not None and batch.sources is not None:
        sums = torch.zeros(2, int(batch.sources.max()) + 1, device=batch.tokens.device)  # of losses, of rows
        row_B = torch.cat(rows)
        there_B = ~row_B.isnan()
        sums[0].index_add_(0, mine.sources[there_B], row_B[there_B])
        sums[1].index_add_(0, mine.sources[there_B], torch.ones_like(row_B[there_B]))
        total, count = workers.sum_(sums).tolist()
        by_source = {source: total[source] / count[source] for source in range(len(count)) if count[source]}
    loss, cross_entropy, mtp_cross_entropy = workers.sum_(totals).tolist()
    return _Losses(loss, cross_entropy, mtp_cross_entropy, by_source)
