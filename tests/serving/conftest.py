"""A checkpoint small enough for any test: it has learnt one question by heart, with thinking and without."""

from pathlib import Path

import pytest

CONTEXT = 96  # tokens
QUESTION = "What is 3 + 4?"
REASONING = "3 + 4\n= 7"
ANSWER = "The answer is 7."


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from ling_flow.data.chat import encode_answer, encode_prompt
    from ling_flow.data.tokenizer import train_tokenizer
    from ling_flow.model.config import ModelConfig
    from ling_flow.model.hf import save_pretrained
    from ling_flow.model.transformer import BailingMoeV2ForCausalLM

    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer([f"{QUESTION} {ANSWER} {REASONING} detailed thinking on off"] * 4, 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT,
        torch_dtype="float32",
    )
    torch.set_num_threads(1)
    model = BailingMoeV2ForCausalLM(config)
    model.init_weights(0)
    question = [{"role": "user", "content": QUESTION}]
    rows = [
        encode_prompt(tokenizer, question, thought is not None) + encode_answer(tokenizer, thought, ANSWER)
        for thought in (None, REASONING)
    ]
    longest = max(map(len, rows))
    tokens_BS1 = torch.tensor([row + [tokenizer.eos_id] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = model.loss(tokens_BS1).loss
    while loss > 0.05:  # nats per token; fewer than 50 steps
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = model.loss(tokens_BS1).loss
    tokenizer.save(directory)
    save_pretrained(model, directory)
    return directory
