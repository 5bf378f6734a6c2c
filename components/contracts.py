"""What the edges between steps must agree on, checked before anything is spent."""

from __future__ import annotations

from ling_flow.errors import UserError
from ling_flow.flow.component import Dataset, Input, Model

TOKENIZER_KEYS = ("tokenizer", "chat_template", "vocab_size")


def check_same_tokenizer(model: Input[Model], corpus: Input[Dataset]) -> None:
    """
    Raises:
        UserError: the model was not trained on tokens of this corpus' tokenizer and chat template.
    """
    for key in TOKENIZER_KEYS:
        ours, theirs = model.contract.get(key), corpus.contract.get(key)
        if ours != theirs:
            raise UserError(
                f"{model.ref}: {key} is {str(ours)[:12]}, but {corpus.ref} has {str(theirs)[:12]}; "
                "give the corpus that the model was trained on"
            )
