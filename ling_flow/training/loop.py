"""The training loop. On the same machine with the same number of threads, the same arguments give the same bits.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ling_flow.data.batches import Batch
from ling_flow.errors import SystemFault
from ling_flow.model.config import RouterLoss
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.fp8 import Safeguard

MAX_SKIPPED_IN_A_ROW = 5


class BatchSource(Protocol):
    """`ling_flow.data.batches.Batches`, or anything that gives rows of S+1 tokens as a pure function of the step."""

    def batch(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, as told to `on_step`.

    Attributes:
        step: steps done since the start of the run, this one included.
        loss, cross_entropy, mtp_cross_entropy: of the batch before the update, nats per token.
        gradient_norm: global L2 norm before clipping.
        load_violation: max(n)/mean(n) − 1 over the experts' token counts, mean over layers.
        skipped: no update was made, as loss or gradient was not finite.
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
    safeguard: Safeguard | None = None,
    on_watch: Callable[[int, Safeguard], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    save: Callable[[int], None] | None = None,
    save_every: int = 0,
) -> None:
    """Run steps `start_step` … `steps` − 1 of a run, in place.

    Each step: batch → loss → backward → clip the global norm → AdamW → move the experts' biases by their token counts.

    Args:
        steps: the step to stop before, counted like `start_step` from the start of the run (not of the call).
        schedule: step → learning rate.
        first_batch_step: the step that draws batch 0 (where a stage began).
        router_loss: losses on the routers beside that of the tokens; None: none.
        sequences_per_forward: split each batch into forward passes of that many sequences; None: one pass.
        safeguard: of a model in FP8: watches every `watch_every`-th step, and names what was not finite where a step is
            skipped.
        on_watch: called with the number of steps done after a pass that the safeguard watched.
        on_step: called after every step.
        save: called with the number of steps done, every `save_every` steps counted back from the end, included.

    Raises:
        SystemFault: loss or gradient was not finite for several steps in a row.
    """
    device = next(model.parameters()).device
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    model.train()
    skipped_in_a_row = 0
    for step in range(start_step, steps):
        started = time.perf_counter()
        batch = batches.batch(step - first_batch_step).to(device)
        learning_rate = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        every = 0 if safeguard is None else safeguard.settings.watch_every
        watched = safeguard if every and (step + 1) % every == 0 else None
        with contextlib.nullcontext() if watched is None else watched.watching():
            loss, cross_entropy, mtp_cross_entropy = _accumulate(model, batch, sequences_per_forward, router_loss)
        gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip)
        skipped = not bool(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        if skipped:
            load_violation = model.update_expert_bias(0.0)  # forget this batch's counts
            if safeguard is not None and watched is None:  # once more, to see which operation it was
                watched = safeguard
                with safeguard.watching():
                    _accumulate(model, batch, sequences_per_forward, router_loss)
                model.update_expert_bias(0.0)
        else:
            optimizer.step()
            load_violation = model.update_expert_bias(expert_bias_update_rate)
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        if watched is not None and on_watch is not None:
            on_watch(step + 1, watched)
        if on_step is not None:
            report = StepReport(
                step=step + 1,
                loss=loss.item(),
                cross_entropy=cross_entropy.item(),
                mtp_cross_entropy=mtp_cross_entropy.item(),
                gradient_norm=gradient_norm.item(),
                learning_rate=learning_rate,
                load_violation=load_violation,
                sequences=len(batch.tokens),
                tokens=len(batch.tokens) * (batch.tokens.shape[1] - 1),
                seconds=time.perf_counter() - started,
                skipped=skipped,
            )
            on_step(report)
        if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise SystemFault(
                f"step {step + 1}: loss ({loss.item():g}) or gradient norm ({gradient_norm.item():g}) was not finite "
                f"for {skipped_in_a_row} steps in a row; a lower learning rate may help"
            )
        if save is not None and save_every and (steps - step - 1) % save_every == 0:
            save(step + 1)


def _accumulate(
    model: BailingMoeV2ForCausalLM,
    batch: Batch,
    sequences_per_forward: int | None,
    router_loss: RouterLoss | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward over the batch in parts; returns the batch's mean loss, cross-entropy and MTP cross-entropy."""
    totals = [torch.zeros((), device=batch.tokens.device) for _ in range(3)]
    targets = batch.targets()
    for part in batch.split(sequences_per_forward or len(batch.tokens)):
        share = part.targets() / max(targets, 1)  # a part's loss is a mean over its own targets
        output = model.loss(part.tokens, documents_BS1=part.documents, router_loss=router_loss)
        (output.loss * share).backward()
        for total, value in zip(totals, output[:3], strict=True):
            total += value.detach() * share
    return totals[0], totals[1], totals[2]
