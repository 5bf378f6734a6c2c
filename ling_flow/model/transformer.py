"""The Ling 2.0 causal language model (bailing_moe_v2) with its multi-token-prediction layer and auxiliary-loss-free
balancing.

Shapes: B batch, S sequence, T = B·S tokens, D hidden, V vocabulary, E experts, N mixture-of-experts layers.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ling_flow.config import parse
from ling_flow.errors import UserError
from ling_flow.kernels.linear_cross_entropy import linear_cross_entropy, linear_logprobs
from ling_flow.kernels.rotary import rotary_tables
from ling_flow.model.attention import Attention, CacheView, KVCache
from ling_flow.model.config import ModelConfig
from ling_flow.model.layers import MLP, Gate, Linear, RMSNorm, SparseMoE


class LossOutput(NamedTuple):
    """`loss` = cross_entropy + mtp_loss_scaling_factor · mtp_cross_entropy, in nats per token; only `loss` carries a
    gradient."""

    loss: Tensor
    cross_entropy: Tensor
    mtp_cross_entropy: Tensor


class DecoderLayer(nn.Module):
    """`h += attention(norm(h)); h += feed_forward(norm(h))`."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        dense = index < config.first_k_dense_replace
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense else SparseMoE(config)

    def forward(
        self,
        h_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: CacheView | None = None,
        counted_BS: Tensor | None = None,
    ) -> Tensor:
        h_BSD = h_BSD + self.attention(self.input_layernorm(h_BSD), rotary, cache)
        normed_BSD = self.post_attention_layernorm(h_BSD)
        return h_BSD + (self.mlp(normed_BSD, counted_BS) if isinstance(self.mlp, SparseMoE) else self.mlp(normed_BSD))


class MTPLayer(DecoderLayer):
    """Multi-token prediction (Ling 2.0 §2.2): from the trunk's final state at i and the embedding of token i+1,
    predicts token i+2."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def predict(
        self, h_BSD: Tensor, next_embedding_BSD: Tensor, rotary: tuple[Tensor, Tensor], counted_BS: Tensor | None
    ) -> Tensor:
        """Hidden states (B, S, D) for the shared output head."""
        u_BSD = self.eh_proj(torch.cat([self.enorm(next_embedding_BSD), self.hnorm(h_BSD)], dim=-1))
        return self.final_layernorm(self(u_BSD, rotary, None, counted_BS))


class BailingMoeV2Model(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        self.word_embeddings = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        layers: list[DecoderLayer] = [DecoderLayer(config, index) for index in range(depth)]
        layers += [MTPLayer(config, depth + index) for index in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class BailingMoeV2ForCausalLM(nn.Module):
    """Ling 2.0. Weights are uninitialised until `init_weights` or `hf.load_pretrained`; float32 parts stay float32 in
    any type."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = BailingMoeV2Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.to(getattr(torch, config.torch_dtype))

    # Setting up

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, initializer_range) matrices, unit norms, zero biases. Depends on `seed` and names only: not on
        threads or order."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            parameter.copy_(
                torch.empty(parameter.shape).normal_(0.0, self.config.initializer_range, generator=generator)
            )
        for gate in self.gates():
            gate.expert_bias.zero_()
            gate.expert_counts.zero_()

    def set_rope_theta(self, theta: float) -> None:
        """Change the rotary base, as a context extension does (Ling 2.0 §3.2)."""
        self._change(rope_theta=theta)

    def set_max_position_embeddings(self, length: int) -> None:
        """Change the longest allowed sequence (tokens)."""
        self._change(max_position_embeddings=length)

    def _change(self, **changes: float) -> None:
        self.config = parse(ModelConfig, {**self.config.model_dump(), **changes}, "model")
        self._rotary = None

    def _rotary_tables(self, positions_S: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the positions, with room for the head dimension."""
        if self._rotary is None or self._rotary[0].device != positions_S.device:
            every = torch.arange(self.config.max_position_embeddings, device=positions_S.device)
            self._rotary = rotary_tables(every, self.config.rotary_dim, self.config.rope_theta)
        cos, sin = self._rotary
        return cos[positions_S].unsqueeze(-2), sin[positions_S].unsqueeze(-2)

    # Running

    def hidden_states(
        self, input_ids_BS: Tensor, cache: KVCache | None = None, counted_BS: Tensor | None = None
    ) -> Tensor:
        """States (B, S, D) after the final norm. `counted_BS` marks the tokens that count for load balancing (None:
        all).

        Raises:
            UserError: the sequence is longer than max_position_embeddings.
        """
        length = input_ids_BS.shape[1]
        start = 0 if cache is None else cache.length
        self._check_length(start + length)
        slots_S = torch.arange(start, start + length, device=input_ids_BS.device)
        if cache is None:
            rotary = self._rotary_tables(slots_S)
        else:
            rotary = self._rotary_tables((slots_S - cache.padding_B.unsqueeze(1)).clamp(min=0))
            visible_B1SL = _visible(slots_S, cache.padding_B)
        h_BSD = self.model.word_embeddings(input_ids_BS)
        for index, layer in enumerate(self.model.layers[: self.config.num_hidden_layers]):
            view = None if cache is None else CacheView(cache.keys[index], cache.values[index], start, visible_B1SL)
            h_BSD = layer(h_BSD, rotary, view, counted_BS)
        if cache is not None:
            cache.length += length
        return self.model.norm(h_BSD)

    def forward(self, input_ids_BS: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, S, V), float32. With a cache, the ids continue the sequences in it."""
        return self.lm_head(self.hidden_states(input_ids_BS, cache)).float()

    def loss(self, tokens_BS1: Tensor, mask_BS: Tensor | None = None) -> LossOutput:
        """Next-token loss of rows of S+1 tokens, plus the MTP loss.

        Args:
            tokens_BS1: token ids; position i predicts i+1.
            mask_BS: true where the target `tokens_BS1[:, i+1]` counts; None: all do. What follows the last counted
            target of a row
                is taken for padding and left out of the router's counts.

        Raises:
            UserError: the sequence is longer than max_position_embeddings.
        """
        inputs_BS, targets_BS = tokens_BS1[:, :-1], tokens_BS1[:, 1:]
        counted_BS = None if mask_BS is None else mask_BS.flip(1).cumsum(1).flip(1) > 0
        h_BSD = self.hidden_states(inputs_BS, counted_BS=counted_BS)
        cross_entropy = self._cross_entropy(h_BSD, targets_BS, mask_BS)
        mtp_cross_entropy = torch.zeros_like(cross_entropy)
        if self.config.num_nextn_predict_layers and inputs_BS.shape[1] > 1:
            # The last position has no token i+2; attention is causal, so leaving it out changes nothing else.
            layer = self.model.layers[-1]
            assert isinstance(layer, MTPLayer)
            rotary = self._rotary_tables(torch.arange(inputs_BS.shape[1] - 1, device=inputs_BS.device))
            counted_BS = None if counted_BS is None else counted_BS[:, 1:]
            next_embedding_BSD = self.model.word_embeddings(targets_BS[:, :-1])
            mtp_BSD = layer.predict(h_BSD[:, :-1], next_embedding_BSD, rotary, counted_BS)
            mtp_cross_entropy = self._cross_entropy(
                mtp_BSD, targets_BS[:, 1:], None if mask_BS is None else mask_BS[:, 1:]
            )
        loss = cross_entropy + self.config.mtp_loss_scaling_factor * mtp_cross_entropy
        return LossOutput(loss, cross_entropy.detach(), mtp_cross_entropy.detach())

    def token_logprobs(self, tokens_BS1: Tensor) -> Tensor:
        """log p(token i+1 | tokens up to i), float32 (B, S); differentiable."""
        h_BSD = self.hidden_states(tokens_BS1[:, :-1])
        return linear_logprobs(h_BSD.flatten(0, 1), self.lm_head.weight, tokens_BS1[:, 1:].flatten()).view(
            h_BSD.shape[:2]
        )

    def _cross_entropy(self, h_BSD: Tensor, targets_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Mean over the counted targets; 0 where there are none."""
        hidden_TD, targets_T = h_BSD.flatten(0, 1), targets_BS.flatten()
        if mask_BS is None:
            return linear_cross_entropy(hidden_TD, self.lm_head.weight, targets_T) / targets_T.numel()
        mask_T = mask_BS.flatten().float()
        return linear_cross_entropy(hidden_TD, self.lm_head.weight, targets_T, mask_T) / mask_T.sum().clamp(min=1.0)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_position_embeddings:
            raise UserError(
                f"sequence of {length} tokens is longer than max_position_embeddings "
                f"({self.config.max_position_embeddings}); shorten it or raise max_position_embeddings"
            )

    # Load balancing without an auxiliary loss (Ling 2.0 §2.2)

    def gates(self) -> list[Gate]:
        """The routers, bottom to top; that of the MTP layer last."""
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, SparseMoE)]

    def max_violation(self) -> float:
        """max(n)/mean(n) - 1 over the experts' counts n since the last update, averaged over layers; 0 is perfect
        balance."""
        counts_NE = torch.stack([gate.expert_counts for gate in self.gates()]).float()
        return float((counts_NE.amax(1) / counts_NE.mean(1).clamp(min=1e-9) - 1).mean()) if counts_NE.any() else 0.0

    @torch.no_grad()
    def update_expert_bias(self, rate: float) -> None:
        """After an optimizer step: b += rate·(sign(e) - mean sign(e)), e = mean(n) - n; then the counts start again
        from zero."""
        for gate in self.gates():
            counts_E = gate.expert_counts.float()
            sign_E = torch.sign(counts_E.mean() - counts_E)
            gate.expert_bias += rate * (sign_E - sign_E.mean())
            gate.expert_counts.zero_()


def _visible(slots_S: Tensor, padding_B: Tensor) -> Tensor:
    """(B, 1, S, L) true where the slot holds a real token not after the query's; a padding slot sees itself, so that
    no row is empty."""
    all_L = torch.arange(int(slots_S[-1]) + 1, device=slots_S.device)
    causal_SL = all_L <= slots_S.unsqueeze(1)
    real_BL = all_L >= padding_B.unsqueeze(1)
    itself_SL = all_L == slots_S.unsqueeze(1)
    return ((causal_SL & real_BL.unsqueeze(1)) | itself_SL).unsqueeze(1)
