"""What a layer reports, and what it is told of documents."""

import torch

from ling_flow.model.layers import Forward, Gate
from ling_flow.model.packing import PADDING, pack
from ling_flow.model.presets import tiny


def test_counted_tokens_are_counted_without_waiting_for_the_device() -> None:
    config = tiny()
    experts, top_k = config.num_experts, config.num_experts_per_tok
    generator = torch.Generator().manual_seed(0)
    logits_BSE = torch.randn(2, 7, experts, generator=generator)
    indices_BSK = logits_BSE.topk(top_k, dim=-1).indices
    counted_BS = torch.rand(2, 7, generator=generator) < 0.5
    rotary = (torch.empty(0), torch.empty(0))
    all_E = torch.bincount(indices_BSK.flatten(), minlength=experts)
    gate = Gate(config)
    counts_E = gate.report(indices_BSK, logits_BSE, all_E, Forward(rotary, counted_BS=counted_BS)).counts_E
    expected_E = torch.bincount(indices_BSK[counted_BS].flatten(), minlength=experts)
    assert torch.equal(counts_E, expected_E) and counts_E.dtype == torch.int64
    # A meta tensor has no values that could be waited for.
    shared = Forward(rotary, counted_BS=counted_BS.to("meta"))
    report = gate.report(*(part.to("meta") for part in (indices_BSK, logits_BSE, all_E)), shared)
    assert report.counts_E.shape == (experts,)


def test_documents_are_bounded_by_where_they_begin() -> None:
    packing = pack(torch.tensor([[4, 4, 5, 5, 5], [5, 0, PADDING, PADDING, PADDING]]))
    assert packing.lengths == [2, 3, 1, 1, 3]
    assert torch.equal(packing.bounds_N1, torch.tensor([0, 2, 5, 6, 7, 10], dtype=torch.int32))
    assert packing.longest == 3
    assert packing.positions_BS.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 0, 0]]
