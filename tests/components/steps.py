"""Steps before the ones under test: the smallest corpus and base model, as artifacts."""

from ling_flow.config import StrictModel
from ling_flow.data.build import build_corpus
from ling_flow.data.sources import ReasoningSource
from ling_flow.flow.component import Dataset, Input, Model, Output, Resources, component
from tests.alignment.micro import EASY


class Seed(StrictModel):
    seed: int = 0


class Base(Seed):
    bfloat16: bool = False


class Nothing(StrictModel):
    pass


@component(version=1, resources=Resources())
def micro_corpus(config: Seed, corpus: Output[Dataset]) -> Nothing:
    """Conversations about one-digit sums."""
    sources = [ReasoningSource(name="chat", tasks=list(EASY), documents=60, style="chat")]
    statistics = build_corpus(
        corpus.path, sources, vocab_size=300, validation_share=0.1, tokenizer_characters=4000, seed=config.seed
    ).statistics
    corpus.contract.update(
        tokenizer=statistics.tokenizer_digest,
        chat_template=statistics.chat_template_digest,
        vocab_size=statistics.vocab_size,
    )
    return Nothing()


@component(version=1, resources=Resources())
def micro_base(config: Base, corpus: Input[Dataset], model: Output[Model]) -> Nothing:
    """A model that has learnt nothing, and likes to open thinking blocks."""
    import torch

    from ling_flow.data.tokenizer import Tokenizer
    from ling_flow.model.hf import save_pretrained
    from tests.alignment.micro import model as micro_model

    network = micro_model(config.seed, vocab_size=corpus.contract["vocab_size"])
    with torch.no_grad():
        think = Tokenizer.load(corpus.path / "tokenizer").token_id("<think>")
        network.lm_head.weight[think] = network.lm_head.weight.mean(0) + 0.02
    if config.bfloat16:
        network.to(torch.bfloat16)
        network.config = network.config.model_copy(update={"torch_dtype": "bfloat16"})
    save_pretrained(network, model.path, corpus.path / "tokenizer")
    model.contract.update(corpus.contract, context_length=network.config.max_position_embeddings)
    return Nothing()
