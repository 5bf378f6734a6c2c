"""The Ling 2.0 causal language model (bailing_moe_v2) with its multi-token-prediction layer and auxiliary-loss-free
balancing.

Shapes: B batch, S sequence, T = B·S tokens, D hidden, V vocabulary, E experts, N mixture-of-experts layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint

from ling_flow.config import parse
from ling_flow.errors import UserError
from ling_flow.kernels.linear_cross_entropy import linear_cross_entropy, linear_logprobs
from ling_flow.kernels.rotary import rotary_frequencies, rotary_tables, yarn_frequencies, yarn_scale
from ling_flow.model.attention import Attention, CacheView, KVCache
from ling_flow.model.config import ModelConfig, RouterLoss, Yarn
from ling_flow.model.layers import MLP, Embedding, Forward, Gate, Linear, RMSNorm, RouterReport, SparseMoE
from ling_flow.model.packing import PADDING, pack


class LossOutput(NamedTuple):
    """In nats per token; only `loss` carries a gradient."""

    loss: Tensor  # cross_entropy + mtp_loss_scaling_factor · mtp_cross_entropy + router
    cross_entropy: Tensor
    mtp_cross_entropy: Tensor  # sum over the MTP layers
    router: Tensor  # the routers' losses times their coefficients, sum over layers
    row_cross_entropy_B: Tensor  # mean over each row's targets, NaN where it has none


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
        self, h_BSD: Tensor, shared: Forward, cache: CacheView | None = None
    ) -> tuple[Tensor, RouterReport | None]:
        """The new states, and what the router did where there is one."""
        h_BSD = h_BSD + self.attention(self.input_layernorm(h_BSD), shared.rotary, cache, shared.packing)
        normed_BSD = self.post_attention_layernorm(h_BSD)
        if not isinstance(self.mlp, SparseMoE):
            return h_BSD + self.mlp(normed_BSD), None
        y_BSD, report = self.mlp(normed_BSD, shared)
        return h_BSD + y_BSD, report


class MTPLayer(DecoderLayer):
    """Multi-token prediction (Ling 2.0 §2.2): the k-th layer (from 1) takes the states of the one before (the trunk's
    after its final norm) at i and the embedding of token i+k, and predicts token i+k+1."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def predict(self, h_BSD: Tensor, embedding_BSD: Tensor, shared: Forward) -> tuple[Tensor, RouterReport | None]:
        """Hidden states (B, S, D) for the shared output head."""
        u_BSD = self.eh_proj(torch.cat([self.enorm(embedding_BSD), self.hnorm(h_BSD)], dim=-1))
        u_BSD, report = self(u_BSD, shared)
        return self.final_layernorm(u_BSD), report


class BailingMoeV2Model(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        self.word_embeddings = Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        layers: list[DecoderLayer] = [DecoderLayer(config, index) for index in range(depth)]
        layers += [MTPLayer(config, depth + index) for index in range(config.num_nextn_predict_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class BailingMoeV2ForCausalLM(nn.Module):
    """Ling 2.0. Weights are uninitialised until `init_weights` or `hf.load_pretrained`; float32 parts stay float32 in
    any type.

    Attributes:
        recompute: keep only each layer's input in training (and on a GPU its experts' index map, 8 bytes per token and
            choice), and compute the rest again in the backward pass: less memory, a third more time, the same bits.
        compute_dtype: type of the activations and of the products with weights; that of the weights unless changed.
            Training in bfloat16 keeps float32 weights and sets this. Router and loss are float32 always.
    """

    def __init__(self, config: ModelConfig, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.model = BailingMoeV2Model(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.compute_dtype: torch.dtype | None = None
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

    def set_context(self, max_position_embeddings: int, rope_theta: float, rope_scaling: Yarn | None) -> None:
        """Change the longest allowed sequence and the rotary embedding, as a context extension does (Ling 2.0 §3.2)."""
        changes = {
            "max_position_embeddings": max_position_embeddings,
            "rope_theta": rope_theta,
            "rope_scaling": None if rope_scaling is None else rope_scaling.model_dump(),
        }
        self.config = parse(ModelConfig, {**self.config.model_dump(), **changes}, "model")
        self._rotary = None

    def _rotary_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the positions, with room for the head dimension."""
        if self._rotary is None or self._rotary[0].device != positions.device:
            config, yarn = self.config, self.config.rope_scaling
            every = torch.arange(config.max_position_embeddings, device=positions.device)
            if yarn is None:
                self._rotary = rotary_tables(every, rotary_frequencies(config.rotary_dim, config.rope_theta))
            else:
                frequencies = yarn_frequencies(
                    config.rotary_dim, config.rope_theta, yarn.factor, yarn.original_max_position_embeddings
                )
                self._rotary = rotary_tables(every, frequencies, yarn_scale(yarn.factor))
        cos, sin = self._rotary
        return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)

    # Running

    def hidden_states(self, input_ids_BS: Tensor, cache: KVCache | None = None) -> Tensor:
        """States (B, S, D) after the final norm. With a cache, the ids continue the sequences in it.

        Raises:
            UserError: the sequence is longer than max_position_embeddings.
        """
        length = input_ids_BS.shape[1]
        start = 0 if cache is None else cache.length
        self._check_length(start + length)
        slots_S = torch.arange(start, start + length, device=input_ids_BS.device)
        if cache is None:
            return self._trunk(input_ids_BS, Forward(self._rotary_tables(slots_S)))[0]
        shared = Forward(self._rotary_tables((slots_S - cache.padding_B.unsqueeze(1)).clamp(min=0)))
        visible_B1SL = _visible(slots_S, cache.padding_B)
        views = [CacheView(k, v, start, visible_B1SL) for k, v in zip(cache.keys, cache.values, strict=True)]
        cache.length += length
        return self._trunk(input_ids_BS, shared, views)[0]

    def _trunk(
        self, input_ids_BS: Tensor, shared: Forward, views: list[CacheView] | None = None
    ) -> tuple[Tensor, Tensor]:
        """States after the final norm, and the sum of the routers' losses."""
        h_BSD = self._embed(input_ids_BS)
        router_loss = torch.zeros((), device=h_BSD.device)
        for index, layer in enumerate(self.model.layers[: self.config.num_hidden_layers]):
            if views is not None:
                h_BSD, report = layer(h_BSD, shared, views[index])
            elif self.recompute and torch.is_grad_enabled():
                h_BSD, report = checkpoint(layer, h_BSD, shared, use_reentrant=False, preserve_rng_state=False)
            else:
                h_BSD, report = layer(h_BSD, shared)
            router_loss = router_loss + self._count(layer, report)
        return self.model.norm(h_BSD), router_loss

    def _embed(self, input_ids_BS: Tensor) -> Tensor:
        h_BSD = self.model.word_embeddings(input_ids_BS)
        return h_BSD if self.compute_dtype is None else h_BSD.to(self.compute_dtype)

    def _count(self, layer: nn.Module, report: RouterReport | None) -> Tensor | float:
        """The router's loss. In training its counts are added to those since the last update."""
        if report is None:
            return 0.0
        assert isinstance(layer, DecoderLayer)
        assert isinstance(layer.mlp, SparseMoE)
        if self.training and torch.is_grad_enabled():
            layer.mlp.gate.expert_counts += report.counts_E
        return report.loss

    def forward(self, input_ids_BS: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, S, V), float32. With a cache, the ids continue the sequences in it."""
        return self.lm_head(self.hidden_states(input_ids_BS, cache)).float()

    def loss(
        self,
        tokens_BS1: Tensor,
        mask_BS: Tensor | None = None,
        documents_BS1: Tensor | None = None,
        router_loss: RouterLoss | None = None,
        of_targets: Sequence[int] | None = None,
        of_routed: Sequence[tuple[int, int]] | None = None,
    ) -> LossOutput:
        """Next-token loss of rows of S+1 tokens, plus that of the MTP layers, each a mean over its valid targets.

        Args:
            tokens_BS1: token ids; position i predicts i+1.
            mask_BS: true where the target `tokens_BS1[:, i+1]` counts; None: all do.
            documents_BS1: number of the document that each token belongs to, `packing.PADDING` for none. Documents of a
                row do not see each other, positions start again with each, no token is predicted from another
                document, and padding is left out of the routers' counts. None: each row is one document.
            router_loss: losses on the routers; None: none.
            of_targets: of a batch that these rows are a part of, the valid targets of the next token and of each MTP
                layer. The losses are then this part's share of the batch's means, and those of all parts add up to it.
                None: these rows are all.
            of_routed: the same for the routers' losses: rows with a token that counts, and such tokens, for the trunk
                and for each MTP layer.

        Raises:
            UserError: the sequence is longer than max_position_embeddings.
        """
        length = tokens_BS1.shape[1] - 1
        routed: Sequence[tuple[int, int] | None] = of_routed or [None] * (1 + self.config.num_nextn_predict_layers)
        shared = self._forward(tokens_BS1[:, :-1], documents_BS1, router_loss, of_routed=routed[0])
        h_BSD, router = self._trunk(tokens_BS1[:, :-1], shared)
        valid_BS = _valid(mask_BS, documents_BS1, 1)
        row_B = torch.empty(len(tokens_BS1), device=h_BSD.device)
        of_targets = of_targets or [0] * (1 + self.config.num_nextn_predict_layers)  # 0: those given
        cross_entropy = self._cross_entropy(h_BSD, tokens_BS1[:, 1:], valid_BS, of_targets[0], row_B)
        mtp_cross_entropy = torch.zeros_like(cross_entropy)
        for depth in range(1, min(self.config.num_nextn_predict_layers, length - 1) + 1):
            # The last `depth` positions have no target; attention is causal, so leaving them out changes nothing else.
            columns = length - depth
            layer = self.model.layers[self.config.num_hidden_layers + depth - 1]
            assert isinstance(layer, MTPLayer)
            valid_BS = _valid(mask_BS, documents_BS1, depth + 1)
            embedding_BSD = self._embed(tokens_BS1[:, depth:-1])
            shared = self._forward(tokens_BS1[:, :columns], documents_BS1, router_loss, depth, routed[depth])
            if self.recompute and torch.is_grad_enabled():
                h_BSD, report = checkpoint(
                    layer.predict, h_BSD[:, :columns], embedding_BSD, shared, use_reentrant=False,
                    preserve_rng_state=False,
                )  # fmt: skip
            else:
                h_BSD, report = layer.predict(h_BSD[:, :columns], embedding_BSD, shared)
            router = router + self._count(layer, report)
            mtp_cross_entropy = mtp_cross_entropy + self._cross_entropy(
                h_BSD, tokens_BS1[:, depth + 1 :], valid_BS, of_targets[depth]
            )
        loss = cross_entropy + self.config.mtp_loss_scaling_factor * mtp_cross_entropy + router
        return LossOutput(loss, cross_entropy.detach(), mtp_cross_entropy.detach(), router.detach(), row_B)

    def _forward(
        self,
        inputs_BS: Tensor,
        documents_BS1: Tensor | None,
        router_loss: RouterLoss | None,
        depth: int = 0,
        of_routed: tuple[int, int] | None = None,
    ) -> Forward:
        """What the layers are told. The MTP layer number `depth` counts the positions that have a target for it."""
        if documents_BS1 is None:
            self._check_length(inputs_BS.shape[1])
            positions_S = torch.arange(inputs_BS.shape[1], device=inputs_BS.device)
            return Forward(self._rotary_tables(positions_S), router_loss=router_loss, of_routed=of_routed)
        documents_BS = documents_BS1[:, : inputs_BS.shape[1]]
        packing = pack(documents_BS)
        self._check_length(packing.longest)
        counted_BS = documents_BS != PADDING if depth == 0 else _valid(None, documents_BS1, depth + 1)
        return Forward(self._rotary_tables(packing.positions_BS), packing, counted_BS, router_loss, of_routed)

    def token_logprobs(
        self, tokens_BS1: Tensor, mask_BS: Tensor | None = None, documents_BS1: Tensor | None = None
    ) -> Tensor:
        """log p(token i+1 | tokens of its document up to i), float32 (B, S), 0 where `mask_BS` is false or the next
        token belongs to another document; differentiable. Arguments as in `loss`."""
        h_BSD, _ = self._trunk(tokens_BS1[:, :-1], self._forward(tokens_BS1[:, :-1], documents_BS1, None))
        valid_BS = _valid(mask_BS, documents_BS1, 1)
        if valid_BS is None:
            valid_BS = torch.ones_like(tokens_BS1[:, 1:], dtype=torch.bool)
        # The head is applied to these positions alone.
        logprobs_T = linear_logprobs(h_BSD[valid_BS], self.lm_head.weight.to(h_BSD.dtype), tokens_BS1[:, 1:][valid_BS])
        return logprobs_T.new_zeros(valid_BS.shape).masked_scatter(valid_BS, logprobs_T)

    def _cross_entropy(
        self, h_BSD: Tensor, targets_BS: Tensor, mask_BS: Tensor | None, of: int = 0, row_B: Tensor | None = None
    ) -> Tensor:
        """Mean over the counted targets; 0 where there are none. The head is applied to the counted positions alone.

        Args:
            of: divide by so many targets instead.
            row_B: filled with the mean of each row.
        """
        if mask_BS is None:
            hidden_TD, targets_T = h_BSD.flatten(0, 1), targets_BS.flatten()
        else:
            hidden_TD, targets_T = h_BSD[mask_BS], targets_BS[mask_BS]
        losses_T = None if row_B is None else torch.empty(len(targets_T), device=h_BSD.device)
        loss = linear_cross_entropy(hidden_TD, self.lm_head.weight.to(hidden_TD.dtype), targets_T, losses_T=losses_T)
        if row_B is not None and losses_T is not None:
            if mask_BS is None:
                torch.mean(losses_T.view(targets_BS.shape), 1, out=row_B)
            else:
                spread_BS = losses_T.new_zeros(mask_BS.shape).masked_scatter_(mask_BS, losses_T)
                torch.div(spread_BS.sum(1), mask_BS.sum(1), out=row_B)
        return loss / max(of or targets_T.numel(), 1)

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

    @torch.no_grad()
    def update_expert_bias(self, rate: float) -> float:
        """After an optimizer step: b += rate·(sign(e) - mean sign(e)), e = mean(n) - n. The n are the experts' token
        counts since the last update, summed over all ranks of the default process group, and start again from zero.

        Returns:
            max(n)/mean(n) - 1, mean over layers: 0 is perfect balance.
        """
        gates = self.gates()
        if not gates:
            return 0.0
        counts_NE = torch.stack([gate.expert_counts for gate in gates])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts_NE)  # integers: exact, in any order
        counts_NE = counts_NE.double()
        sign_NE = torch.sign(counts_NE.mean(1, keepdim=True) - counts_NE)
        change_NE = rate * (sign_NE - sign_NE.mean(1, keepdim=True))
        for gate, change_E in zip(gates, change_NE, strict=True):
            gate.expert_bias += change_E
            gate.expert_counts.zero_()
        mean_N = counts_NE.mean(1)
        return float((counts_NE.amax(1) / mean_N - 1)[mean_N > 0].mean()) if mean_N.any() else 0.0


def _visible(slots_S: Tensor, padding_B: Tensor) -> Tensor:
    """(B, 1, S, L) true where the slot holds a real token not after the query's; a padding slot sees itself, so that
    no row is empty."""
    all_L = torch.arange(int(slots_S[-1]) + 1, device=slots_S.device)
    causal_SL = all_L <= slots_S.unsqueeze(1)
    real_BL = all_L >= padding_B.unsqueeze(1)
    itself_SL = all_L == slots_S.unsqueeze(1)
    return ((causal_SL & real_BL.unsqueeze(1)) | itself_SL).unsqueeze(1)


def _valid(mask_BS: Tensor | None, documents_BS1: Tensor | None, ahead: int) -> Tensor | None:
    """(B, S+1-ahead), true at i where token i+ahead is a target: not masked, and in the document of token i."""
    valid_BS = None if mask_BS is None else mask_BS[:, ahead - 1 :]
    if documents_BS1 is None:
        return valid_BS
    before_BS, after_BS = documents_BS1[:, :-ahead], documents_BS1[:, ahead:]
    same_BS = (before_BS == after_BS) & (before_BS != PADDING)
    return same_BS if valid_BS is None else same_BS & valid_BS
