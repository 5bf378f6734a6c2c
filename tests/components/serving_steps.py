"""Two small components that give register and deploy something to work on: a model and its evaluation."""

from pydantic import Field

from ling_flow.config import StrictModel
from ling_flow.flow.component import Input, Metrics, Model, Output, Resources, component

VOCABULARY = 300


class Seed(StrictModel):
    """Which random weights."""

    seed: int = Field(description="seed of the weights")


class Measured(StrictModel):
    """What the evaluation is to say."""

    well_formed: float = Field(description="share of well-formed answers, 0 to 1")
    asked: str = Field("", description="digest of what it asks")


@component(version=1, resources=Resources(cpus=1, memory_gib=1))
def train(config: Seed, model: Output[Model]) -> Seed:
    """A checkpoint with random weights."""
    from ling_flow.data.tokenizer import train_tokenizer
    from ling_flow.model.config import ModelConfig
    from ling_flow.model.hf import save_pretrained
    from ling_flow.model.transformer import BailingMoeV2ForCausalLM

    tokenizer = train_tokenizer(["What is 3 + 4? The answer is 7."] * 4, VOCABULARY)
    architecture = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        torch_dtype="float32",
    )
    network = BailingMoeV2ForCausalLM(architecture)
    network.init_weights(config.seed)
    tokenizer.save(model.path)
    save_pretrained(network, model.path)
    return config


@component(version=1, resources=Resources(cpus=1, memory_gib=1))
def measure(config: Measured, model: Input[Model], metrics: Output[Metrics]) -> Measured:
    """An evaluation that says what it is told to."""
    _write(config, metrics)
    return config


@component(version=1, resources=Resources(cpus=1, memory_gib=1))
def measure_candidate(config: Measured, candidate: Input[Model], metrics: Output[Metrics]) -> Measured:
    """The same by a user who calls the model something else."""
    _write(config, metrics)
    return config


@component(version=1, resources=Resources(cpus=1, memory_gib=1))
def measure_against(
    config: Measured, model: Input[Model], reference: Input[Model], metrics: Output[Metrics]
) -> Measured:
    """The same beside another model, of which it says nothing."""
    _write(config, metrics)
    return config


def _write(config: Measured, metrics: Output[Metrics]) -> None:
    from ling_flow.evaluation.report import Evaluation

    evaluation = Evaluation(
        problems=1,
        exact_match_thinking_on=0.5,
        exact_match_thinking_off=0.5,
        exact_match_easiest=0.5,
        chance_easiest=0.1,
        well_formed=config.well_formed,
        thinking_switch_obeyed=1.0,
        validation_loss=2.0,
        validation_loss_by_source={},
        tasks=[],
        samples=[],
    )
    (metrics.path / "evaluation.json").write_text(evaluation.model_dump_json())
    if config.asked:
        metrics.contract["asked"] = config.asked
