"""Laws of scoring: a completion's log-probability is its own, whoever lies beside it."""

import random

import pytest
import torch
from conftest import VOCAB_SIZE, llama
from torch import Tensor

from prefopt.packing import Row
from prefopt.scoring import score, token_logps

POLICY = llama()


def rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of unlike lengths; among them a prompt and a completion of one token."""
    draw = random.Random(seed)
    made = [Row([0], [5]), Row([0, 7], [1])]
    while len(made) < count:
        prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 9))]
        made.append(Row(prompt, [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 12))]))
    draw.shuffle(made)
    return made


def plainly(row: Row) -> Tensor:
    """Log-probabilities of one unpadded row, from the logits of all its positions."""
    tokens = torch.tensor([*row.prompt, *row.completion])
    with torch.no_grad():
        logps = POLICY(tokens[None], use_cache=False).logits[0].log_softmax(-1)
    start = len(row.prompt)
    return logps[range(start - 1, len(tokens) - 1), tokens[start:]]


def scored(batch: list[Row], token_budget: int) -> list[list[float]]:
    return score(
        POLICY,
        batch,
        token_budget=token_budget,
        compute_dtype=torch.float32,
        progress=lambda _: None,
    )


def test_token_logps_are_the_log_softmax_of_every_unpadded_row() -> None:
    batch = rows(24)
    for row, logps in zip(batch, token_logps(POLICY, batch), strict=True):
        assert logps.dtype == torch.float32
        torch.testing.assert_close(logps, plainly(row), rtol=0, atol=1e-5)


def test_completions_of_one_token_are_scored() -> None:
    batch = [Row([0, 4, 9], [token]) for token in range(VOCAB_SIZE)]
    total = torch.cat(token_logps(POLICY, batch)).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("token_budget", [1, 40, 100, 10_000])
def test_padding_and_micro_batches_change_nothing_and_rows_keep_their_order(
    token_budget: int,
) -> None:
    batch = rows(30)
    for row, logps in zip(batch, scored(batch, token_budget), strict=True):
        assert logps == pytest.approx(plainly(row).tolist(), abs=1e-5)


def test_a_neighbour_changes_nothing() -> None:
    row, short, long = Row([0, 3, 4], [8, 9, 1]), Row([0], [1]), Row([0] * 20, [2] * 30)
    alone = token_logps(POLICY, [row])[0]
    for neighbours in ([row, short], [short, row, long], [long, row]):
        beside = token_logps(POLICY, neighbours)[neighbours.index(row)]
        torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)


def test_progress_is_told_every_row_once() -> None:
    told: list[int] = []
    score(POLICY, rows(11), token_budget=40, compute_dtype=torch.float32, progress=told.append)
    assert sum(told) == 11
    assert len(told) > 1


def test_the_gradient_is_that_of_the_plain_log_probability() -> None:
    policy = llama(seed=1)
    batch = rows(6)
    torch.cat(token_logps(policy, batch)).sum().backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    for row in batch:
        tokens = torch.tensor([*row.prompt, *row.completion])
        logps = policy(tokens[None], use_cache=False).logits[0].log_softmax(-1)
        start = len(row.prompt)
        logps[range(start - 1, len(tokens) - 1), tokens[start:]].sum().backward()
    assert set(found) == {name for name, _ in policy.named_parameters()}
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_bfloat16_products_give_float32_results_near_those_of_float32() -> None:
    batch = rows(6)
    rough = token_logps(POLICY, batch, compute_dtype=torch.bfloat16)
    for row, logps in zip(batch, rough, strict=True):
        assert logps.dtype == torch.float32
        # Eight bits of mantissa through two layers.
        torch.testing.assert_close(logps, plainly(row), rtol=0.05, atol=0.3)
        assert not torch.equal(logps, plainly(row))
