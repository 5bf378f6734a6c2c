"""`lingflow plan --preset mini|flash|one_t`: the family's figures beside the published ones. Neither torch nor kfp."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from ling_flow.config import parse
from ling_flow.errors import UserError
from ling_flow.model.config import ModelConfig
from ling_flow.model.cost import CostOptions, training_cost
from ling_flow.model.family import FAMILY, PUBLISHED_TOKENS, tensor_counts
from ling_flow.model.flops import Flops, forward_flops_per_token, training_flops_per_token
from ling_flow.model.memory import Layout, naive_logits_bytes, training_memory
from ling_flow.model.presets import model_preset
from ling_flow.scaling.leverage import dense_equivalent, leverage_of
from ling_flow.training.curriculum import EXTENSION, stage_configs

if TYPE_CHECKING:
    from rich.table import Table

CONTEXTS = (4096, 32768, 131072)
"""Context lengths of the family's stages (report §3.2)."""


def family_figures(asked: str, options: Mapping[str, Any], layout: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The figures of every member by preset name, as JSON data: parameters, FLOPs per token (training), memory in
    bytes, cost, the dense model of equal loss, the curriculum as configs of pre-training, and what is published.

    Args:
        options: fields of `CostOptions`.
        layout: `FIELD=VALUE` changes of the `Layout` of the member `asked`; the others keep their own.

    Raises:
        UserError: a wrong option, or a layout that does not fit the member.
    """
    chosen = parse(CostOptions, options, "")
    changes = dict(_assignment(text) for text in layout)
    return {name: _figures(name, chosen, changes if name == asked else {}) for name in FAMILY}


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--layout {text}: expected FIELD=VALUE; fields: {', '.join(Layout.model_fields)}")
    return name, value


def _figures(preset: str, options: CostOptions, changes: Mapping[str, str]) -> dict[str, Any]:
    config, published = model_preset(preset), FAMILY[preset]
    layout = parse(Layout, {**published.layout.model_dump(), **changes}, "layout")
    tensors, mtp_tensors = tensor_counts(config)
    memory = training_memory(config, layout, options.context)
    dense = dense_equivalent(config, options.context, options.tokens)
    return {
        "preset": preset,
        "name": published.name,
        "parameters": {**asdict(config.parameter_counts()), "tensors": tensors, "mtp_tensors": mtp_tensors},
        "flops_per_token": _flops(config, options),
        "training_memory": {
            **asdict(memory),
            "total": memory.total,
            "logits_materialised": naive_logits_bytes(config, layout, options.context),
            "layout": layout.model_dump(),
            "ranks": layout.ranks,
        },
        "training_cost": {
            **asdict(training_cost(config, options)),
            "tokens": options.tokens,
            "mfu": options.mfu,
            "peak_tflops": options.peak,
            "watts": options.power,
        },
        "dense_equivalent": {
            "leverage": dense.leverage,
            "leverage_at_1e22": leverage_of(config, 1e22),
            "parameters": dense.config.parameter_counts().total,
            "non_embedding": dense.config.parameter_counts().active_non_embedding,
            "hidden_size": dense.config.hidden_size,
            "num_hidden_layers": dense.config.num_hidden_layers,
            "training_cost": asdict(training_cost(dense.config, options)),
        },
        "curriculum": {"stages": stage_configs(preset), "extension": EXTENSION.model_dump()},
        "published": {
            "total": published.total,
            "active": published.active,
            "active_non_embedding": published.active_non_embedding,
            "checkpoint_bfloat16": published.checkpoint_bfloat16,
            "checkpoint_float32": published.checkpoint_float32,
            "tokens": PUBLISHED_TOKENS,
            "law_flops": published.law_flops,
        },
    }


def _flops(config: ModelConfig, options: CostOptions) -> dict[str, Any]:
    training = training_flops_per_token(config, options.context, options.scores)
    return {
        **{part.name: getattr(training, part.name) for part in fields(Flops)},
        **{name: getattr(training, name) for name in ("attention", "experts", "mtp", "non_embedding", "total")},
        "total_recompute": training_flops_per_token(config, options.context, options.scores, recompute=True).total,
        "forward": forward_flops_per_token(config, options.context, options.scores).total,
        "attention_scores_by_context": {
            str(context): training_flops_per_token(config, context, options.scores).attention_scores
            for context in CONTEXTS
        },
        "context": options.context,
        "scores": options.scores,
    }


def family_table(figures: Mapping[str, Mapping[str, Any]], asked: str) -> Table:
    """The members side by side, `asked` marked; what is published stands below ours, dim."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name, member in figures.items():
        own = name == asked
        table.add_column(("▸ " if own else "") + member["name"], justify="right", style="bold" if own else "")
    for columns in zip(*(_rows(member) for member in figures.values()), strict=True):
        label = columns[0][0]
        minor = label.startswith("    ")
        table.add_row(label, *(text for _, text in columns), style="dim" if minor else "")
    return table


def _rows(member: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, value) of every row of one member's column; sections have no value, what only compares is indented
    twice."""
    parameters, flops, memory = member["parameters"], member["flops_per_token"], member["training_memory"]
    cost, dense, published = member["training_cost"], member["dense_equivalent"], member["published"]

    yield "Parameters", ""
    for name, label in (("total", "total"), ("active", "active"), ("active_non_embedding", "active, no embeddings")):
        yield f"  {label}", f"{parameters[name]:,}"
        yield "    published", _short(published[name])
    yield "    published checkpoint", _whole(published["checkpoint_bfloat16"])
    yield "  expert biases (float32)", f"{parameters['expert_bias']:,}"
    yield "    published checkpoint", _whole(published["checkpoint_float32"])
    yield "  MTP layer, not in the total", f"{parameters['mtp']:,}"
    yield "  tensors + the MTP layer's", f"{parameters['tensors']:,} + {parameters['mtp_tensors']}"

    yield f"FLOPs per trained token ({flops['context']:,}, {flops['scores']})", ""
    for part in ("attention_projections", "attention_scores"):
        yield f"  {part.replace('_', ' ')}", _short(flops[part])
    for context, value in flops["attention_scores_by_context"].items():
        yield f"    scores at {int(context):,}", _short(value)
    for part in ("dense", "router", "routed_experts", "shared_experts", "head", "mtp", "total"):
        yield f"  {part.replace('_', ' ')}", _short(flops[part])
    yield "  total with recomputation", _short(flops["total_recompute"])

    layout = memory["layout"]
    yield "GiB on the fullest rank", ""
    yield "  data × pipeline (expert) ranks", f"{layout['data']} × {layout['pipeline']} ({layout['expert']})"
    yield "  weights, optimizer", f"{layout['precision']}, {layout['optimizer']}"
    yield "  sharding", layout["sharding"]
    yield "  sequences per micro-batch", str(layout["micro_batch"])
    yield "  fullest stage", f"{memory['stage'] + 1} of {layout['pipeline']}"
    for part in ("weights", "gradients", "optimizer"):
        yield f"  {part}", _gib(memory[part])
    yield "  a layer gathered by fsdp", _gib(memory["gathered"])
    yield "  activations", _gib(memory["activations"])
    yield "  activations with recomputation", _gib(memory["activations_recompute"])
    yield "  output head and loss", _gib(memory["logits"])
    yield "    logits materialised", _gib(memory["logits_materialised"])
    yield "  total (recomputation)", f"{_gib(memory['total'])} ({'on' if layout['recompute'] else 'off'})"

    yield f"Training on {_short(cost['tokens'])} tokens", ""
    yield "  FLOPs by the laws (M·D)", f"{cost['law_flops']:.3g}"
    yield "    by the published learning rate", f"{published['law_flops']:.3g}"
    yield "  FLOPs with head and MTP", f"{cost['flops']:.3g}"
    yield f"  GPU-hours ({cost['peak_tflops']:g} TFLOP/s × {cost['mfu']:g})", _short(cost["gpu_hours"])
    yield f"  kWh at {cost['watts']:g} W per GPU", _short(cost["energy_kwh"])

    curriculum = member["curriculum"]
    first, extension = curriculum["stages"][0], curriculum["extension"]
    yield "Curriculum: tokens × length, reasoning", ""
    for stage in curriculum["stages"]:
        mixture = stage["mixture"]
        reasoning = 1 - mixture["general"] - mixture.get("long_documents", 0)
        label = f"  {stage['stage'].replace('_', ' ')}"
        yield label, f"{_short(stage['tokens'])} × {stage['sequence_length']:,}, {reasoning:.0%}"
    reach = int(extension["factor"] * extension["original_max_position_embeddings"])
    yield "  extension, not trained", f"YaRN to {reach:,}"
    yield "  learning rate, constant", f"{first['learning_rate']:.3g}"
    yield "  tokens per batch", _short(first["batch_tokens"])

    yield "Dense model of equal loss (EL law)", ""
    yield "  leverage at M·D", f"{dense['leverage']:.1f}"
    yield "  leverage at 1e22 FLOPs", f"{dense['leverage_at_1e22']:.1f}"
    yield "    published", "> 7"
    yield "  parameters without embeddings", _short(dense["non_embedding"])
    yield "  layers × width", f"{dense['num_hidden_layers']} × {dense['hidden_size']}"
    yield "  GPU-hours", _short(dense["training_cost"]["gpu_hours"])
    yield "  kWh", _short(dense["training_cost"]["energy_kwh"])


def _whole(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _gib(number: int) -> str:
    return f"{number / 2**30:.1f}"


def _short(number: float | None) -> str:
    """Three digits and a letter: 16.3 B."""
    if number is None:
        return "–"
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number / size:.0f}{letter}"
    return f"{number:.3g}"
