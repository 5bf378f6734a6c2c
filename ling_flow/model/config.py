"""Architecture of a Ling 2.0 model under the names of the published `config.json` (Ling 2.0 §2, bailing_moe_v2). No
torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ling_flow.config import StrictModel, parse
from ling_flow.errors import UserError

# What every Ling 2.0 model has in common. Engines read these keys, and some fail in silence where one is missing:
# vLLM uses LayerNorm for the query-key norm without `use_rmsnorm`; the remote code falls back to full rotary, softmax
# scores and a bf16 router.
FIXED_KEYS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "hidden_act": "silu",
    "moe_router_enable_expert_bias": True,
    "norm_topk_prob": True,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
}
# Written for the engines; bear nothing on the numbers, so any value is accepted when read.
HEADER_KEYS: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "auto_map": {
        "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
        "AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model",
        "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
    },
    "transformers_version": "4.52.3",
    "use_cache": True,
}


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters, from the formulas; `expert_bias` is a float32 buffer and stands beside the parameters.

    `total`, `active` and `active_non_embedding` leave out the MTP layer, as the published figures do; `mtp` is what
    it adds.
    """

    total: int
    expert_bias: int
    active: int
    active_non_embedding: int
    mtp: int


class Yarn(StrictModel):
    """Context extension by YaRN (arXiv 2309.00071), as `rope_scaling` in the published config: 32K to 128K with factor
    4."""

    type: Literal["yarn"] = Field("yarn", description="the method")
    factor: float = Field(gt=1, description="how many times longer the context becomes")
    original_max_position_embeddings: int = Field(ge=1, description="longest sequence before the extension, tokens")


class RouterLoss(StrictModel):
    """Optional losses on the routers' scores, of training only. Ling 2.0 balances by `expert_bias` and needs none."""

    balance: float = Field(0, ge=0, description="coefficient of the balance loss (DeepSeek-V3 §2.1.2); 0: none")
    balance_over: Literal["sequence", "batch"] = Field(
        "sequence", description="what is to be balanced: every sequence by itself, or all tokens of a forward pass"
    )
    z: float = Field(0, ge=0, description="coefficient of the z-loss; Ling's released scripts have 3.5e-6; 0: none")

    @property
    def wanted(self) -> bool:
        return self.balance > 0 or self.z > 0


class ModelConfig(StrictModel):
    """Architecture of a Ling 2.0 model. Everything the family shares (SwiGLU, RMSNorm, sigmoid router, no biases) is
    not a field."""

    vocab_size: int = Field(ge=2, description="rows of the embedding and of the output head, tokens")
    hidden_size: int = Field(ge=2, description="width of the residual stream, elements")
    intermediate_size: int = Field(ge=1, description="width of the feed-forward of the first dense layers, elements")
    moe_intermediate_size: int = Field(ge=1, description="width of one expert, routed or shared, elements")
    num_hidden_layers: int = Field(ge=1, description="decoder layers without the MTP layer, layers")
    first_k_dense_replace: int = Field(1, ge=0, description="layers at the bottom with a dense feed-forward, layers")
    num_attention_heads: int = Field(ge=1, description="query heads")
    num_key_value_heads: int = Field(ge=1, description="key-value heads; divides num_attention_heads")
    head_dim: int = Field(ge=2, description="width of one head, elements")
    num_experts: int = Field(ge=2, description="routed experts per layer")
    num_experts_per_tok: int = Field(ge=1, description="routed experts that one token uses")
    num_shared_experts: int = Field(1, ge=0, description="experts every token uses, neither gated nor scaled")
    n_group: int = Field(1, ge=1, description="groups of consecutive experts; divides num_experts")
    topk_group: int = Field(1, ge=1, description="groups a token may choose experts from")
    routed_scaling_factor: float = Field(
        2.5, gt=0, description="factor on the normalised weights of the chosen experts"
    )
    rms_norm_eps: float = Field(1e-6, gt=0, description="added to the mean square in RMSNorm")
    partial_rotary_factor: float = Field(0.5, gt=0, le=1, description="share of head_dim that is rotated")
    rope_theta: float = Field(1e4, gt=0, description="base of the rotary wavelengths; raised when the context grows")
    rope_scaling: Yarn | None = Field(None, description="YaRN, where the context was extended by it; null: none")
    max_position_embeddings: int = Field(4096, ge=1, description="longest sequence, tokens")
    num_nextn_predict_layers: int = Field(
        1, ge=0, description="multi-token-prediction layers; the k-th predicts the token k+1 places ahead"
    )
    mtp_loss_scaling_factor: float = Field(0.1, ge=0, description="weight of the MTP cross-entropy in the loss")
    initializer_range: float = Field(0.006, gt=0, description="standard deviation of the initial weights")
    eos_token_id: int = Field(0, ge=0, description="token that ends a document")
    pad_token_id: int = Field(0, ge=0, description="token that fills a batch")
    torch_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="type of the stored weights; expert_bias is always float32"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        def require(good: bool, message: str) -> None:
            if not good:
                raise ValueError(message)

        require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok must be at most num_experts ({self.num_experts}), got {self.num_experts_per_tok}",
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({self.num_key_value_heads})",
        )
        require(
            self.num_experts % self.n_group == 0,
            f"num_experts ({self.num_experts}) must be a multiple of n_group ({self.n_group})",
        )
        require(
            self.n_group == 1 or self.num_experts // self.n_group >= 2,
            f"n_group must leave at least 2 experts per group, got {self.num_experts} experts in {self.n_group} groups",
        )
        require(
            self.topk_group <= self.n_group,
            f"topk_group must be at most n_group ({self.n_group}), got {self.topk_group}",
        )
        require(
            self.num_experts_per_tok <= self.topk_group * (self.num_experts // self.n_group),
            f"num_experts_per_tok ({self.num_experts_per_tok}) must fit in topk_group ({self.topk_group}) groups "
            f"of {self.num_experts // self.n_group} experts",
        )
        require(
            self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace must be at most num_hidden_layers ({self.num_hidden_layers}), "
            f"got {self.first_k_dense_replace}",
        )
        require(
            self.rotary_dim >= 2 and self.rotary_dim % 2 == 0,
            f"partial_rotary_factor x head_dim must be an even number of at least 2, got {self.rotary_dim}",
        )
        if self.rope_scaling is not None:
            longest = int(self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings)
            require(
                self.max_position_embeddings == longest,  # engines take the factor from their ratio
                f"max_position_embeddings must be rope_scaling.factor x original_max_position_embeddings "
                f"({longest}), got {self.max_position_embeddings}",
            )
        for name in ("eos_token_id", "pad_token_id"):
            require(
                getattr(self, name) < self.vocab_size,
                f"{name} must be below vocab_size ({self.vocab_size}), got {getattr(self, name)}",
            )
        return self

    @property
    def rotary_dim(self) -> int:
        """Rotated elements of a head."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def shared_intermediate_size(self) -> int:
        """Width of all shared experts together (0: none)."""
        return self.moe_intermediate_size * self.num_shared_experts

    def parameter_counts(self) -> ParameterCounts:
        """Counts of parameters from the formulas (match the published models to the parameter)."""
        hidden = self.hidden_size
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        attention = hidden * (heads + 2 * kv_heads) * self.head_dim + heads * self.head_dim * hidden + 2 * self.head_dim
        layer = attention + 2 * hidden
        expert = 3 * hidden * self.moe_intermediate_size
        always = layer + hidden * self.num_experts + 3 * hidden * self.shared_intermediate_size
        moe_total = always + self.num_experts * expert
        moe_active = always + self.num_experts_per_tok * expert
        dense = layer + 3 * hidden * self.intermediate_size
        moe_layers = self.num_hidden_layers - self.first_k_dense_replace
        embeddings = 2 * self.vocab_size * hidden
        fixed = self.first_k_dense_replace * dense + hidden
        active_non_embedding = fixed + moe_layers * moe_active
        return ParameterCounts(
            total=embeddings + fixed + moe_layers * moe_total,
            expert_bias=moe_layers * self.num_experts,
            active=embeddings + active_non_embedding,
            active_non_embedding=active_non_embedding,
            mtp=self.num_nextn_predict_layers * (moe_total + 2 * hidden * hidden + 3 * hidden),
        )

    def to_hf(self) -> dict[str, Any]:
        """The published `config.json` as a mapping."""
        return {
            **HEADER_KEYS,
            **FIXED_KEYS,
            **self.model_dump(),
            "moe_shared_expert_intermediate_size": self.moe_intermediate_size,
            "rotary_dim": self.rotary_dim,  # read by engines that do not know partial_rotary_factor
        }

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """The architecture in a published `config.json`; keys this model has no use for are left aside.

        Raises:
            UserError: another model type, a variant that is not implemented (for example rope_scaling), or a wrong
            value.
        """
        if data.get("model_type") not in ("bailing_moe", "bailing_moe_v2"):
            raise UserError(f"{where}: model_type must be 'bailing_moe', got {data.get('model_type')!r}")
        for key, value in FIXED_KEYS.items():
            if key in data and data[key] != value:
                raise UserError(f"{where}.{key}: only {value!r} is supported, got {data[key]!r}")
        if "partial_rotary_factor" not in data and data.get("rotary_dim") and data.get("head_dim"):
            data = {**data, "partial_rotary_factor": data["rotary_dim"] / data["head_dim"]}  # as Ling-1T has it
        for key in ("partial_rotary_factor", "routed_scaling_factor", "rope_theta", "max_position_embeddings"):
            if key not in data:  # their defaults differ from engine to engine
                raise UserError(f"{where}.{key}: required field is missing")
        shared = data.get("moe_shared_expert_intermediate_size")
        if shared not in (None, data.get("moe_intermediate_size")):
            raise UserError(
                f"{where}.moe_shared_expert_intermediate_size: must equal moe_intermediate_size, got {shared!r}"
            )
        known = {name: data[name] for name in cls.model_fields if name in data}
        if isinstance(known.get("rope_scaling"), Mapping):
            scaling = dict(known["rope_scaling"])
            kind = scaling.pop("rope_type", scaling.get("type"))  # transformers writes the newer name, or both
            known["rope_scaling"] = {**scaling, "type": kind}
        known.setdefault("num_nextn_predict_layers", 0)
        return parse(cls, {name: value for name, value in known.items() if value is not None}, where)
