import math

import pytest
import torch

from ling_flow.alignment.lpo import (
    LpoResponse,
    collate,
    group_advantages,
    kl_to_reference,
    lpo_loss,
    sentence_of_token,
    token_pieces,
)


def sentences(text: str, minimum_tokens: int = 1) -> list[str]:
    """Split with one character per token."""
    groups: dict[int, str] = {}
    for character, sentence in zip(text, sentence_of_token(list(text), minimum_tokens), strict=True):
        groups[sentence] = groups.get(sentence, "") + character
    return list(groups.values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A b. C d! E?", ["A b.", " C d!", " E?"]),
        ("one\ntwo\n", ["one\n", "two\n"]),
        ("x = 3.14 so; y", ["x = 3.14 so;", " y"]),
        ("今天。明天！", ["今天。", "明天！"]),
        ("```a;\nb```\nc", ["```a;\nb```\n", "c"]),
        ("$a; b$ c; d", ["$a; b$ c;", " d"]),
        ("no mark", ["no mark"]),
        ("", []),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_the_token_that_holds_the_mark_stays_left() -> None:
    assert sentence_of_token(["a", "b", "c", ".\n\nD", "e", "f", "g", "h"]) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_short_sentences_are_merged() -> None:
    # "a." is too short and runs on; the tail "g" joins the sentence before it.
    assert sentence_of_token(["a", ".", " b", "c", ".", " d", "e", "f", ".", " g"]) == [0] * 5 + [1] * 5
    assert sentence_of_token(["a", "."]) == [0, 0]


def test_pieces_give_a_cut_character_to_its_last_token() -> None:
    raw = "a。b".encode()
    pieces = token_pieces(lambda ids: bytes(ids).decode(errors="replace"), list(raw))
    assert pieces == ["a", "", "", "。", "b"]


def test_advantages_are_standardised_and_equal_rewards_dropped() -> None:
    advantages = group_advantages([1.0, 0.0, 0.0, 1.0])
    assert advantages == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert group_advantages([0.3, 0.3, 0.3]) is None


def responses() -> list[LpoResponse]:
    return [
        LpoResponse([5, 6], [1, 2, 3, 4, 5], [-1.0, -1.0, -2.0, -0.5, -0.5], [0, 0, 0, 1, 1], 1.0, 1 / 8),
        LpoResponse([7], [1, 2, 3], [-1.0, -3.0, -2.0], [0, 0, 0], -1.0, 1 / 8),
    ]


def test_padding_and_alignment() -> None:
    batch = collate(responses())
    assert batch.tokens_1S1.tolist() == [[5, 6, 1, 2, 3, 4, 5, 7, 1, 2, 3]]
    assert batch.documents_1S1.tolist() == [[0] * 7 + [1] * 4]
    assert batch.mask_1S.int().tolist() == [[0, 1, 1, 1, 1, 1, 0, 1, 1, 1]]
    assert batch.response_BR.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.old_logprob_BR[1].tolist() == [-1.0, -3.0, -2.0, 0.0, 0.0]
    assert batch.spread(torch.arange(10.0).unsqueeze(0)).tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0]]


def objective_by_hand(changes: list[list[float]], clip: float) -> float:
    total = 0.0
    for response, change in zip(responses(), changes, strict=True):
        for sentence in sorted(set(response.sentences)):
            mine = [change[place] for place, other in enumerate(response.sentences) if other == sentence]
            ratio = math.exp(sum(mine) / len(mine))
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            total += len(mine) * min(ratio * response.advantage, bounded * response.advantage) * response.weight
    return total


def test_loss_is_the_published_objective() -> None:
    batch = collate(responses())
    changes = [[0.5, -0.4, 0.02, 0.01, -0.2], [0.3, -0.5, 0.05]]
    logprob_BR = batch.old_logprob_BR.clone()
    for row, change in enumerate(changes):
        logprob_BR[row, : len(change)] += torch.tensor(change)
    logprob_BR[~batch.response_BR] = -123.0  # padding must not count
    found = lpo_loss(logprob_BR, batch, clip=0.03)
    assert float(found.loss) == pytest.approx(-objective_by_hand(changes, 0.03), rel=1e-5)
    # Clipped: the first sentence (ratio above 1.03, advantage +) and the third (ratio below 0.97, advantage −).
    assert found.clipped == pytest.approx(6 / 8)


def test_no_gradient_through_clipped_sentences() -> None:
    batch = collate(responses()[:1])
    raised = torch.zeros_like(batch.old_logprob_BR)
    raised[0, :3] = 0.1  # first sentence, ratio 1.105 > 1.03
    logprob_BR = (batch.old_logprob_BR + raised).requires_grad_()
    lpo_loss(logprob_BR, batch, clip=0.03).loss.backward()
    gradient_R = logprob_BR.grad[0]
    assert gradient_R[:3].abs().max() == 0
    # The other sentence: r = 1, each token carries weight · Â.
    assert gradient_R[3:].tolist() == pytest.approx([-1 / 8, -1 / 8])


def test_kl_estimator() -> None:
    batch = collate(responses())
    assert float(kl_to_reference(batch.old_logprob_BR, batch.old_logprob_BR, batch)) == 0
    moved = kl_to_reference(batch.old_logprob_BR, batch.old_logprob_BR - 0.2, batch)
    assert float(moved) == pytest.approx(math.exp(-0.2) - 1 + 0.2, rel=1e-5)
