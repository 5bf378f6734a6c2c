"""Counts of parameters and bytes, held to the modules on the meta device and to what autograd is seen to keep."""

import gc

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ling_flow.errors import UserError
from ling_flow.kernels import linear_cross_entropy
from ling_flow.model.config import ModelConfig
from ling_flow.model.family import FAMILY, tensor_counts
from ling_flow.model.hf import published_tensors
from ling_flow.model.memory import (
    LOGITS_CHUNK_ELEMENTS,
    Layout,
    layer_activation_bytes,
    logits_bytes,
    naive_logits_bytes,
    training_memory,
)
from ling_flow.model.presets import model_preset, tiny
from ling_flow.model.transformer import BailingMoeV2ForCausalLM
from ling_flow.training.optimizer import hidden_matrices


def changed(**changes: object) -> ModelConfig:
    return ModelConfig.model_validate({**tiny().model_dump(), **changes})


def on_meta(config: ModelConfig) -> BailingMoeV2ForCausalLM:
    with torch.device("meta"):
        return BailingMoeV2ForCausalLM(config)


@pytest.mark.parametrize(
    ("name", "total", "mtp", "tensors"),
    [
        ("mini", 16_255_638_528, 827_861_248, 14_813),
        ("flash", 102_889_697_280, 3_306_180_864, 24_161),
        ("one_t", 999_705_309_184, 13_222_584_576, 59_243),
    ],
)
def test_the_modules_have_the_published_counts(name: str, total: int, mtp: int, tensors: int) -> None:
    config = model_preset(name)
    model = on_meta(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total + mtp
    assert len(published_tensors(model)) == tensors + 783
    assert tensor_counts(config) == (tensors, 783)
    alone = config.model_copy(update={"num_nextn_predict_layers": 0})
    published = published_tensors(on_meta(alone))
    biases = [tensor.numel() for tensor in published.values() if tensor.dtype == torch.float32]
    assert sum(tensor.numel() for tensor in published.values()) - sum(biases) == total
    assert len(published) == tensors
    assert sum(biases) == alone.parameter_counts().expert_bias
    assert tensor_counts(alone) == (tensors, 0)
    if (checkpoint := FAMILY[name].checkpoint_bfloat16) is not None:
        assert (checkpoint, FAMILY[name].checkpoint_float32) == (total, sum(biases))


def kept_bytes(model: BailingMoeV2ForCausalLM, rows: Tensor) -> int:
    """Bytes that exist for the sake of the backward pass after a forward pass: every storage once, parameters aside."""
    gc.collect()
    sizes: dict[int, int] = {}
    alive = []  # or an address could be given out twice

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def reachable() -> list[Tensor]:
        return [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]

    old = {tensor.untyped_storage().data_ptr() for tensor in [*model.state_dict().values(), *reachable()]}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.loss(rows)
    if model.recompute:  # a layer's input is then held by a Python closure
        for tensor in reachable():
            note(tensor)
    assert loss.loss.requires_grad
    return sum(size for pointer, size in sizes.items() if pointer not in old)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
        {"num_shared_experts": 0, "num_experts_per_tok": 4, "num_nextn_predict_layers": 2},
        {"num_key_value_heads": 2, "num_shared_experts": 2, "moe_intermediate_size": 32},
    ],
)
@pytest.mark.usefixtures("unpadded_experts")
def test_activations_are_what_autograd_keeps(precision: str, changes: dict[str, int]) -> None:
    config = changed(**changes, torch_dtype=precision)
    layout = Layout.model_validate({"precision": precision, "micro_batch": 8})
    length, applications = 128, 1 + config.num_nextn_predict_layers
    tokens = 8 * length
    memory = training_memory(config, layout, length)
    head = applications * layout.element * config.hidden_size * (tokens + config.vocab_size)  # the losses' gradients
    rows = torch.randint(config.vocab_size, (8, length + 1), generator=torch.Generator().manual_seed(0))
    model = BailingMoeV2ForCausalLM(config)
    model.init_weights(0)
    assert memory.activations + head == pytest.approx(kept_bytes(model, rows), rel=0.02)

    model.recompute = True
    largest = layer_activation_bytes(config, False, tokens, layout.element)
    if config.num_nextn_predict_layers:
        largest += tokens * (5 * config.hidden_size * layout.element + 12)
    assert memory.activations_recompute - largest + head == pytest.approx(kept_bytes(model, rows), rel=0.04)
    assert memory.activations_recompute < memory.activations


def test_logits_are_those_of_our_head_and_of_a_plain_one() -> None:
    assert linear_cross_entropy.CHUNK_ELEMENTS["cuda"] == LOGITS_CHUNK_ELEMENTS
    config, layout = changed(num_nextn_predict_layers=0), Layout(precision="float32", micro_batch=8)
    tokens, hidden, rows = 8 * 128, config.hidden_size, config.vocab_size
    # Gradients of states and head, and one chunk's logits: here all. In bfloat16 the head's is summed in float32 first.
    assert logits_bytes(config, layout, 128) == 4 * (tokens * hidden + rows * hidden + tokens * rows)
    narrow = Layout(precision="bfloat16", micro_batch=8)
    assert logits_bytes(config, narrow, 128) == 2 * (tokens * hidden + 3 * rows * hidden + tokens * rows)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.numel() == tokens * rows:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    states_TD = torch.randn(tokens, hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        functional.cross_entropy((states_TD @ torch.randn(hidden, rows)).float(), torch.zeros(tokens, dtype=torch.long))
    assert naive_logits_bytes(config, layout, 128) == 2 * sum(kept.values()) + 4 * rows * hidden
    # With many tokens it is the chunk that bounds ours, and the plain one grows on.
    mini = model_preset("mini")
    many = Layout(micro_batch=16)
    assert naive_logits_bytes(mini, many, 4096) > 8 * logits_bytes(mini, many, 4096)


@pytest.mark.parametrize(
    ("precision", "optimizer", "bytes_each"),
    [("float32", "adamw", (4, 4, 8)), ("bfloat16", "adamw", (2, 4, 12)), ("bfloat16", "adamw8bit", (2, 4, 6.03125))],
)
def test_bytes_per_parameter(precision: str, optimizer: str, bytes_each: tuple[float, ...]) -> None:
    config = tiny()
    layout = Layout.model_validate({"precision": precision, "optimizer": optimizer})
    memory, counts = training_memory(config, layout, 128), config.parameter_counts()
    parameters, biases = counts.total + counts.mtp, 4 * (counts.expert_bias + config.num_experts)
    assert memory.weights - biases == parameters * bytes_each[0]
    assert memory.gradients == parameters * bytes_each[1]
    assert memory.optimizer == round(parameters * bytes_each[2])


@pytest.mark.parametrize("changes", [{}, {"first_k_dense_replace": 2, "num_nextn_predict_layers": 2}])
def test_muon_keeps_one_momentum_of_hidden_matrices(changes: dict[str, int]) -> None:
    config = changed(**changes)
    model = on_meta(config)
    hidden = hidden_matrices(model)
    kept = sum(parameter.numel() * (4 if parameter in hidden else 8) for parameter in model.parameters())
    layout = {"precision": "float32", "optimizer": "muon"}
    memory = training_memory(config, Layout.model_validate(layout), 128)
    assert memory.optimizer == kept
    divided = training_memory(config, Layout.model_validate({**layout, "data": 4}), 128)
    assert divided.optimizer == pytest.approx(kept / 4, rel=1e-3)


def parameters_of(model: BailingMoeV2ForCausalLM, layers: range, expert: int) -> int:
    """Parameters of these layers on one of `expert` ranks."""
    held = 0
    for index in layers:
        for name, parameter in model.model.layers[index].named_parameters():
            held += parameter.numel() // (expert if ".experts." in name else 1)
    return held


@pytest.mark.parametrize("pipeline", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 64])
def test_the_fullest_rank_of_a_pipeline(pipeline: int, micro_batch: int) -> None:
    config = changed(num_hidden_layers=5)  # with the MTP layer, six
    layout = Layout(
        data=4, expert=4, pipeline=pipeline, sharding="none", precision="float32", micro_batch=micro_batch,
        recompute=False,
    )  # fmt: skip
    memory = training_memory(config, layout, 128)
    # Few tokens: the tables weigh most, and the last stage has the head and, for the MTP layer, the embedding. Many:
    # the first stage, which keeps as many micro-batches as there are stages.
    stage = 0 if micro_batch > 1 else pipeline - 1
    assert memory.stage == stage
    layers = range(stage * 6 // pipeline, (stage + 1) * 6 // pipeline)
    table = config.vocab_size * config.hidden_size
    tables = 2 if pipeline == 1 or stage > 0 else 1
    last = stage == pipeline - 1
    held = parameters_of(on_meta(config), layers, 4) + tables * table + (config.hidden_size if last else 0)
    routers = sum(index >= config.first_k_dense_replace for index in layers)
    assert memory.weights == 4 * held + 4 * config.num_experts * routers
    if not last:
        kept = [layer_activation_bytes(config, index == 0, micro_batch * 128, 4) for index in layers]
        assert memory.activations == pipeline * sum(kept)
        thin = pipeline * len(layers) * micro_batch * 128 * config.hidden_size * 4
        assert memory.activations_recompute == thin + max(kept)
        assert memory.logits == 0


def test_sharding_divides_what_it_says() -> None:
    config, data, expert = model_preset("mini"), 16, 8
    none, zero1, fsdp = (
        training_memory(config, Layout.model_validate({"data": data, "expert": expert, "sharding": sharding}), 4096)
        for sharding in ("none", "zero1", "fsdp")
    )
    held = parameters_of(on_meta(config), range(21), expert) + 2 * config.vocab_size * 2048 + 2048
    routed = 20 * 256 * 3 * 2048 * 512 // expert
    divided = -(-(held - routed) // data) + routed // (data // expert)  # the same experts are on data/expert ranks
    assert (none.weights, none.gradients, none.optimizer) == (2 * held + 20 * 1024, 4 * held, 12 * held)
    assert (zero1.weights, zero1.gradients, zero1.optimizer) == (none.weights, none.gradients, 12 * divided)
    assert (fsdp.gradients, fsdp.optimizer) == (4 * divided, 12 * divided)
    assert fsdp.weights == 2 * divided + 20 * 1024
    assert none.gathered == zero1.gathered == 0 < fsdp.gathered
    assert none.activations == zero1.activations == fsdp.activations


def test_total_is_the_sum_with_the_activations_of_the_choice() -> None:
    for recompute in (False, True):
        memory = training_memory(tiny(), Layout(recompute=recompute), 128)
        fixed = memory.weights + memory.gradients + memory.optimizer + memory.logits
        assert memory.total == fixed + (memory.activations_recompute if recompute else memory.activations)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert": 3, "data": 4}, r"layout\.expert: must divide data \(4\), got 3"),
        ({"expert": 3, "data": 3}, r"layout\.expert: must divide num_experts \(16\), got 3"),
        ({"pipeline": 6}, r"layout\.pipeline: must be at most 5, the model's layers, got 6"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        training_memory(tiny(), Layout(**changes), 128)
