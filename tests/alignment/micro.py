"""The smallest tokenizer and model that the passes can run on."""

import functools

from ling_flow.data.reasoning import TaskSpec, problems
from ling_flow.data.tokenizer import Tokenizer, train_tokenizer
from ling_flow.model.config import ModelConfig
from ling_flow.model.transformer import BailingMoeV2ForCausalLM

EASY = (TaskSpec(name="chain_sum", difficulties=(1,)),)
TEXTS = ("detailed thinking on", "detailed thinking off", "SYSTEM HUMAN ASSISTANT")


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(list(TEXTS) * 20, 300)


def model(seed: int = 0, vocab_size: int | None = None) -> BailingMoeV2ForCausalLM:
    made = BailingMoeV2ForCausalLM(
        ModelConfig(
            vocab_size=vocab_size or tokenizer().vocab_size,
            hidden_size=32,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=160,
            initializer_range=0.02,
            torch_dtype="float32",
        )
    )
    made.init_weights(seed)
    return made.eval()


def easy_problems(count: int, seed: int = 0, split: str = "train"):
    return problems(EASY, count, seed, split)
