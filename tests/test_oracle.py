"""Our losses beside TRL's, which is the oracle and must be installed."""

import inspect
import os
import random
import re
import socket
import tempfile
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import constants as hub

from prefopt.batches import WeightedPairs
from prefopt.divergences import alpha
from prefopt.losses import LOSSES
from prefopt.proofs import Proof
from stages.oracle import (
    COMPARISONS,
    CPO,
    DPO,
    KTO,
    NOT_HERE,
    ORPO,
    TOLERANCE,
    Answer,
    Comparison,
    Trainer,
    answers,
    side_by_side,
)

# fmt: off
WHOLLY_TRLS = {
    "dpo", "rdpo", "ipo", "hinge", "f_dpo", "exo_pref", "sppo", "apo_zero", "apo_down", "nca_pair",
    "bco_pair", "dpo_norm", "ld_dpo", "wpo", "simpo", "cpo", "slic", "orpo", "kto",
}
# TRL has their case of two completions, or of hard preferences.
PARTLY_TRLS = {"psi_po", "dpo_rw", "exo_rw", "infonca", "nca", "f_po"}
# fmt: on


def name(comparison: Comparison) -> str:
    return str(comparison.case)


def comparison_of(case: str) -> Comparison:
    (found,) = (comparison for comparison in COMPARISONS if name(comparison) == case)
    return found


@pytest.fixture(scope="module")
def proofs() -> dict[str, Proof]:
    return {proof.case: proof for proof in side_by_side()}


@pytest.fixture(scope="module")
def answered() -> dict[str, list[Answer]]:
    return {name(comparison): answers(comparison) for comparison in COMPARISONS}


every_comparison = pytest.mark.parametrize("comparison", COMPARISONS, ids=name)


@every_comparison
def test_every_loss_that_trl_has_agrees_with_it(
    comparison: Comparison, proofs: dict[str, Proof]
) -> None:
    proof = proofs[name(comparison)]
    assert proof.holds, proof
    assert proof.law == f"TRL 1.16: {comparison.law}"


def test_every_comparison_has_a_name_of_its_own(proofs: dict[str, Proof]) -> None:
    assert len(proofs) == len(COMPARISONS)


def test_every_loss_that_claims_a_name_of_trls_is_compared() -> None:
    compared = {comparison.loss for comparison in COMPARISONS}
    assert compared == WHOLLY_TRLS | PARTLY_TRLS
    claim = re.compile(r"TRL 1\.16[^.]*?(loss_type|Trainer|use_weighting|ld_alpha)")
    claimants = {
        loss.name for loss in LOSSES.values() if claim.search(inspect.getdoc(loss.function) or "")
    }
    assert claimants >= WHOLLY_TRLS - {"slic"}
    assert claimants <= compared


@every_comparison
def test_a_hyperparameter_off_by_a_hundredth_is_found_out(
    comparison: Comparison, answered: dict[str, list[Answer]]
) -> None:
    for key, value in comparison.hyperparameters.items():
        # Rewards that are infinitely apart are so at every temperature.
        if isinstance(value, float) and not (key == "temperature" and comparison.preference == 1):
            off = comparison.hyperparameters | {key: value + 0.01}
            wrong = replace(comparison, hyperparameters=off)
            errors = [answer.error(wrong) for answer in answered[name(comparison)]]
            assert max(errors) > 100 * TOLERANCE, key


def test_trls_alpha_taken_for_ours_is_found_out() -> None:
    right = comparison_of("f_dpo(alpha(0.3))")
    theirs = alpha(right.settings["f_alpha_divergence_coef"])
    wrong = replace(right, hyperparameters=right.hyperparameters | {"divergence": theirs})
    (proof,) = side_by_side([wrong])
    assert not proof.holds
    assert proof.error > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("case", "without"),
    [
        ("dpo(label_smoothing)", {"flipped": 0.0}),
        ("ipo", {"view": comparison_of("dpo").view}),
        ("ipo(no reference)", {"view": comparison_of("ipo").view}),
        ("dpo(no reference)", {"view": comparison_of("dpo").view}),
        ("cpo", {"term": comparison_of("dpo").term}),
        ("orpo", {"term": comparison_of("cpo").term}),
        ("apo_zero(unpaired)", {"scale": 1.0}),
        ("slic", {"scale": 1.0}),
        ("exo_rw", {"preference": 1 - 0.11}),
    ],
)
def test_a_map_that_is_left_out_is_found_out(case: str, without: dict[str, Any]) -> None:
    (proof,) = side_by_side([replace(comparison_of(case), **without)])
    assert not proof.holds
    assert proof.error > 100 * TOLERANCE


def test_trl_does_not_cut_the_weights_of_wpo(answered: dict[str, list[Answer]]) -> None:
    comparison = comparison_of("wpo")
    for answer in answered["wpo"]:
        batch = comparison.evidence(answer.reading)
        assert batch.weight.max() > 1
        cut = WeightedPairs(batch.pairs, batch.weight.clamp(max=1))
        assert abs(comparison.case(cut).mean().item() - answer.loss) > 100 * TOLERANCE


def test_trls_estimate_of_the_kl_is_cut_under_one_model_only(
    answered: dict[str, list[Answer]],
) -> None:
    comparison = comparison_of("kto")
    estimates = [
        comparison.evidence(answer.reading).mismatched.logratio.mean().item()
        for answer in answered["kto"]
    ]
    assert min(estimates) < -0.1 < 0.1 < max(estimates)


def about(trainer: Trainer, setting: str) -> Any:
    """What TRL's own configuration says of a setting."""
    (found,) = (field.metadata for field in fields(trainer.config) if field.name == setting)
    return found


def compared(trainer: Trainer, setting: str) -> set[str]:
    """The values of a setting in the table."""
    values = [
        row.settings.get(setting, []) for row in COMPARISONS if row.trainer.type is trainer.type
    ]
    return {x for value in values for x in ([value] if isinstance(value, str) else value)}


def test_every_loss_type_of_trls_is_compared_or_excused() -> None:
    listed = about(DPO, "loss_type")["help"].split("If multiple")[0]
    names = set[str](re.findall(r"`'(\w+)'`", listed))
    assert len(names) == 15
    assert compared(DPO, "loss_type") == names - set(NOT_HERE)
    for trainer in (KTO, CPO):
        choices = set(about(trainer, "loss_type")["choices"])
        assert compared(trainer, "loss_type") == choices - set(NOT_HERE)
        names |= choices
    assert set(NOT_HERE) <= names
    assert compared(ORPO, "loss_type") == set()


def test_every_divergence_of_trls_is_compared() -> None:
    listed = about(DPO, "f_divergence_type")["help"].split("Only")[0]
    known = re.findall(r"`(\w+)`", listed)
    assert len(known) == 4
    assert compared(DPO, "f_divergence_type") == set(known)


def process() -> dict[str, Any]:
    """What a library may change behind one's back."""
    return {
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "warnings": list(warnings.filters),
        "offline": hub.HF_HUB_OFFLINE,
        "bars": datasets.are_progress_bars_disabled(),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
    }


def test_the_process_is_left_as_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Not what an earlier test may have left.
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(1)
    datasets.enable_progress_bars()
    asked = list[Any]()
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host, **_: asked.append(host))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)  # where TRL does not report its use
    before = process()
    for case in ("dpo", "kto", "simpo", "orpo"):
        answers(comparison_of(case))
        assert process() == before
    assert not list(tmp_path.iterdir())
    assert not asked
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
