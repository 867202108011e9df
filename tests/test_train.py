"""Laws of a training stage: its evidence, its first step, its metrics."""

import math
from pathlib import Path

import pytest
import torch

from prefopt.batches import Pairs, Scored
from stages import train
from stages.artefacts import (
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    REFERENCE,
    REFERENCE_SCHEMA,
    write_table,
)
from stages.params import load_params
from stages.runs import bind


def test_step_0_is_refused_where_the_policy_is_not_the_reference() -> None:
    run = bind(load_params(), "dpo")
    train.check_step_0(torch.full((4,), math.log(2)), run)
    with pytest.raises(ValueError, match=r"step 0: the loss must be 0\.693147 .*run `dvc repro"):
        train.check_step_0(torch.tensor([math.log(2), 0.7]), run)
    with pytest.raises(ValueError, match="step 0"):
        train.check_step_0(torch.tensor([math.nan]), run)


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> train.Evidence:
    monkeypatch.chdir(tmp_path)
    COMPLETIONS.parent.mkdir()
    completions = {"prompt": [[1], [1], [1, 2]], "completion": [[3], [4, 5], [6, 7, 8]]}
    write_table(COMPLETIONS, completions, COMPLETIONS_SCHEMA)
    pairs = {"chosen": [2, 0], "rejected": [1, 1], "preference": [1.0, 0.75]}
    write_table(PAIRS, pairs, PAIRS_SCHEMA)
    reference = {"logps": [[-1.0], [-1.0, -2.0], [-1.0, -2.0, -4.0]]}
    write_table(REFERENCE, reference, REFERENCE_SCHEMA)
    return train.Evidence()


def test_a_batch_holds_the_rows_that_its_pairs_point_at(evidence: train.Evidence) -> None:
    logps = [torch.tensor([-0.5]), torch.tensor([-1.0, -1.0]), torch.tensor([-2.0]), torch.zeros(2)]
    pairs = evidence.assemble([1, 0], logps)
    assert pairs.chosen.reference_logp.tolist() == [-1.0, -7.0]
    assert pairs.rejected.reference_logp.tolist() == [-3.0, -3.0]
    assert pairs.chosen.logp.tolist() == [-0.5, -2.0]
    assert pairs.chosen.tokens.tolist() == [1, 3]
    assert pairs.rejected.tokens.tolist() == [2, 2]
    assert pairs.preference.tolist() == [0.75, 1.0]


def test_tokens_are_counted_with_their_prompts_and_without_padding(
    evidence: train.Evidence,
) -> None:
    assert evidence.num_tokens([0]) == (2 + 3) + (1 + 2)
    assert evidence.num_tokens([0, 1]) == evidence.num_tokens([0]) + (1 + 1) + (1 + 2)


def test_a_reference_of_other_rows_is_refused(evidence: train.Evidence) -> None:
    write_table(REFERENCE, {"logps": [[-1.0]]}, REFERENCE_SCHEMA)
    with pytest.raises(ValueError, match=r"not row for row with .*, got 1 rows for 3"):
        train.Evidence()


def test_the_metrics_of_micro_batches_add_up_to_those_of_the_step() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, 6, generator=generator)

    def pairs(of: slice) -> Pairs:
        part = numbers[:, of]
        tokens = torch.ones(part.shape[1], dtype=torch.long)
        return Pairs(
            chosen=Scored(part[0], part[1], tokens),
            rejected=Scored(part[2], part[3], tokens),
            preference=torch.ones(part.shape[1]),
        )

    whole = train.pair_metrics(pairs(slice(0, 6)), 0.5, 6)
    parts = [train.pair_metrics(pairs(of), 0.5, 6) for of in (slice(0, 2), slice(2, 6))]
    for name, value in whole.items():
        assert parts[0][name] + parts[1][name] == pytest.approx(value, abs=1e-6)
    assert whole["rewards/margins"] == pytest.approx(
        whole["rewards/chosen"] - whole["rewards/rejected"], abs=1e-6
    )
