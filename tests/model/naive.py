"""A second model, written token by token from the formulas (Ling 2.0 §2; ling2-facts §1.2) in float64: slow and plain.

Documents of a row are run one by one, as if there were no packing.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ling_flow.model.config import ModelConfig, RouterLoss
from ling_flow.model.hf import published_tensors
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

Tensors = dict[str, Tensor]
PADDING = -1


def doubles(model: BailingMoeV2ForCausalLM) -> Tensors:
    """The weights by their published names."""
    return {name: tensor.detach().double().clone() for name, tensor in published_tensors(model).items()}


@dataclass
class Choice:
    """What one router did with one token."""

    row: int
    logits: Tensor
    experts: list[int]


@dataclass
class NaiveModel:
    w: Tensors
    c: ModelConfig
    row: int = 0
    choices: dict[int, list[Choice]] = field(default_factory=dict)  # by layer

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean() + self.c.rms_norm_eps) * self.w[f"{name}.weight"]

    def mlp(self, x: Tensor, prefix: str) -> Tensor:
        gate = self.w[f"{prefix}.gate_proj.weight"] @ x
        up = self.w[f"{prefix}.up_proj.weight"] @ x
        return self.w[f"{prefix}.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)

    def moe(self, x: Tensor, layer: int) -> Tensor:
        c, prefix = self.c, f"model.layers.{layer}.mlp"
        logits = self.w[f"{prefix}.gate.weight"] @ x
        scores = 1 / (1 + torch.exp(-logits))
        biased = (scores + self.w[f"{prefix}.gate.expert_bias"]).tolist()
        size = c.num_experts // c.n_group
        groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
        best = sorted(groups, key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))[: c.topk_group]
        chosen = sorted((e for group in best for e in group), key=lambda e: -biased[e])[: c.num_experts_per_tok]
        self.choices.setdefault(layer, []).append(Choice(self.row, logits, chosen))
        out = self.mlp(x, f"{prefix}.shared_experts") if c.num_shared_experts else torch.zeros_like(x)
        total = sum(scores[e] for e in chosen) if len(chosen) > 1 else 1.0
        for e in chosen:
            out = out + c.routed_scaling_factor * scores[e] / total * self.mlp(x, f"{prefix}.experts.{e}")
        return out

    def angle(self, i: int, position: int) -> float:
        """What pair i of a head turns by."""
        c = self.c
        frequency = c.rope_theta ** (-2 * i / c.rotary_dim)
        if (yarn := c.rope_scaling) is not None:
            # The element at which a head turns `turns` times in the original context.
            at = [
                c.rotary_dim
                * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
                / (2 * math.log(c.rope_theta))
                for turns in (32, 1)
            ]
            low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), c.rotary_dim - 1)
            slowed = min(max((i - low) / (high - low if high > low else 1e-3), 0), 1)
            frequency = frequency * (1 - slowed) + frequency / yarn.factor * slowed
        return position * frequency

    def turned(self, x: Tensor, position: int) -> Tensor:
        half = self.c.rotary_dim // 2
        scale = 1.0 if self.c.rope_scaling is None else 0.1 * math.log(self.c.rope_scaling.factor) + 1
        out = list(x)
        for i in range(half):
            cos, sin = scale * math.cos(self.angle(i, position)), scale * math.sin(self.angle(i, position))
            out[i] = x[i] * cos - x[i + half] * sin
            out[i + half] = x[i + half] * cos + x[i] * sin
        return torch.stack(out)

    def attention(self, xs: list[Tensor], prefix: str) -> list[Tensor]:
        heads, kv, width = self.c.num_attention_heads, self.c.num_key_value_heads, self.c.head_dim
        queries, keys, values = [], [], []
        for position, x in enumerate(xs):
            parts = (self.w[f"{prefix}.query_key_value.weight"] @ x).split(width)  # [Q | K | V]
            queries.append([self.turned(self.norm(p, f"{prefix}.query_layernorm"), position) for p in parts[:heads]])
            after = parts[heads : heads + kv]
            keys.append([self.turned(self.norm(p, f"{prefix}.key_layernorm"), position) for p in after])
            values.append(parts[heads + kv :])
        outs = []
        for position in range(len(xs)):
            per_head = []
            for head in range(heads):
                group = head // (heads // kv)
                scores = torch.stack(
                    [queries[position][head] @ keys[j][group] / math.sqrt(width) for j in range(position + 1)]
                )
                shares = torch.exp(scores) / torch.exp(scores).sum()
                per_head.append(sum(shares[j] * values[j][group] for j in range(position + 1)))
            outs.append(self.w[f"{prefix}.dense.weight"] @ torch.cat(per_head))
        return outs

    def layer(self, hs: list[Tensor], index: int) -> list[Tensor]:
        prefix = f"model.layers.{index}"
        attended = self.attention([self.norm(h, f"{prefix}.input_layernorm") for h in hs], f"{prefix}.attention")
        hs = [h + a for h, a in zip(hs, attended, strict=True)]
        normed = [self.norm(h, f"{prefix}.post_attention_layernorm") for h in hs]
        dense = index < self.c.first_k_dense_replace
        return [
            h + (self.mlp(n, f"{prefix}.mlp") if dense else self.moe(n, index)) for h, n in zip(hs, normed, strict=True)
        ]

    def embedding(self, token: int) -> Tensor:
        return self.w["model.word_embeddings.weight"][token]

    def trunk(self, tokens: list[int]) -> list[Tensor]:
        hs = [self.embedding(token) for token in tokens]
        for index in range(self.c.num_hidden_layers):
            hs = self.layer(hs, index)
        return [self.norm(h, "model.norm") for h in hs]

    def logits(self, h: Tensor) -> Tensor:
        return self.w["lm_head.weight"] @ h

    def nll(self, h: Tensor, target: int) -> Tensor:
        logits = self.logits(h)
        return torch.log(torch.exp(logits).sum()) - logits[target]

    def losses(
        self, rows: list[list[int]], mask: list[list[bool]] | None = None, documents: list[list[int]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(cross-entropy, sum over MTP layers of their cross-entropies); fills `choices`."""
        c = self.c
        trunk_terms: list[Tensor] = []
        mtp_terms: list[list[Tensor]] = [[] for _ in range(c.num_nextn_predict_layers)]
        for self.row, row in enumerate(rows):
            numbers = [0] * len(row) if documents is None else documents[self.row]
            starts = [i for i in range(len(row)) if i == 0 or numbers[i] != numbers[i - 1]]
            for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
                if numbers[start] == PADDING:
                    continue
                counts = [mask is None or mask[self.row][i - 1] for i in range(start, end)]  # as targets
                document = row[start:end]
                # The last token of a row is only ever a target; that of an earlier document goes in, to no effect.
                hs = self.trunk(document[:-1] if end == len(row) else document)
                trunk_terms += [self.nll(hs[i], t) for i, t in enumerate(document[1:]) if counts[i + 1]]
                for depth in range(1, c.num_nextn_predict_layers + 1):
                    index = c.num_hidden_layers + depth - 1
                    prefix = f"model.layers.{index}"
                    us = []
                    for i in range(len(document) - depth - 1):
                        embedding = self.norm(self.embedding(document[i + depth]), f"{prefix}.enorm")
                        both = torch.cat([embedding, self.norm(hs[i], f"{prefix}.hnorm")])
                        us.append(self.w[f"{prefix}.eh_proj.weight"] @ both)
                    hs = [self.norm(u, f"{prefix}.final_layernorm") for u in self.layer(us, index)]
                    targets = document[depth + 1 :]
                    mtp_terms[depth - 1] += [self.nll(h, t) for h, t, counted in
                                             zip(hs, targets, counts[depth + 1 :], strict=True) if counted]  # fmt: skip
        zero = torch.zeros((), dtype=torch.float64)
        return mean(trunk_terms), sum((mean(terms) for terms in mtp_terms), zero)

    def counts(self, layer: int) -> list[int]:
        """Tokens that chose each expert."""
        chosen = [e for choice in self.choices[layer] for e in choice.experts]
        return [chosen.count(e) for e in range(self.c.num_experts)]

    def router_loss(self, settings: RouterLoss) -> Tensor:
        """Over all routers, of the tokens that went through them."""
        total = torch.zeros((), dtype=torch.float64)
        experts, top_k = self.c.num_experts, self.c.num_experts_per_tok
        for choices in self.choices.values():
            parts = [choices]
            if settings.balance_over == "sequence":
                parts = [[x for x in choices if x.row == row] for row in sorted({x.row for x in choices})]
            balance = torch.zeros((), dtype=torch.float64)
            for part in parts:
                for e in range(experts):
                    share = sum(torch.sigmoid(x.logits)[e] / torch.sigmoid(x.logits).sum() for x in part) / len(part)
                    chosen = sum(e in x.experts for x in part)
                    balance = balance + experts / (top_k * len(part)) * chosen * share
            z = sum(torch.log(torch.exp(x.logits).sum()) ** 2 for x in choices) / len(choices)
            total = total + settings.balance * balance / len(parts) + settings.z * z
        return total


def mean(terms: list[Tensor]) -> Tensor:
    return sum(terms) / len(terms) if terms else torch.zeros((), dtype=torch.float64)  # type: ignore[return-value]
