"""Laws of the diagnostics: each alarm sounds for its own fault and for no other."""

import numpy as np
import pytest
from conftest import shipped_params

from prefopt import diagnostics
from prefopt.diagnostics import (
    Finding,
    Moved,
    Written,
    by_decile,
    degeneration_findings,
    displacement_findings,
    moved_off_both,
)
from prefopt.divergences import DIVERGENCES
from prefopt.losses import LOSSES


def moved(chosen: list[float], rejected: list[float]) -> Moved:
    pairs = len(chosen)
    return Moved(
        chosen=np.array(chosen),
        rejected=np.array(rejected),
        chosen_reference=np.full(pairs, -10.0),
        rejected_reference=np.full(pairs, -12.0),
        chosen_tokens=np.full(pairs, 8),
        rejected_tokens=np.full(pairs, 8),
    )


def written(
    rows: list[list[int]], nats: float = 3.0, ended: float = 1.0, copies: int = 20
) -> Written:
    tokens = rows * copies
    return Written(
        tokens=tokens,
        logp=np.array([-nats * len(row) for row in tokens]),
        ended=np.arange(len(tokens)) < ended * len(tokens),
    )


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.level for finding in findings}


ORDINARY = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2]]


def test_the_reference_itself_gives_no_finding() -> None:
    found = displacement_findings(moved([0.0] * 4, [0.0] * 4))
    found += degeneration_findings(written(ORDINARY), written(ORDINARY))
    assert {finding.level for finding in found} == {"fine"}
    assert all(not finding.remedies for finding in found)


def test_mass_off_both_is_the_log_ratio_of_the_pairs_masses() -> None:
    pair = moved([1.0], [-3.0])
    before = np.exp(-10.0) + np.exp(-12.0)
    after = np.exp(-9.0) + np.exp(-15.0)
    assert moved_off_both(pair) == pytest.approx([np.log(after / before)])


def test_displacement_alarms_when_both_fall_and_not_when_only_the_rejected_falls() -> None:
    both = levels(displacement_findings(moved([-1.0] * 10, [-3.0] * 10)))
    assert set(both.values()) == {"alarm"}
    rejected = levels(displacement_findings(moved([0.5] * 10, [-3.0] * 10)))
    assert set(rejected.values()) == {"fine"}


def test_a_third_of_pairs_falling_is_watched() -> None:
    found = levels(displacement_findings(moved([-1.0] * 3 + [1.0] * 7, [-1.0] * 10)))
    assert found == {"both_fell": "watch", "chosen_fell": "fine", "moved_off_both": "fine"}


LONGER = [[*row, 11, 12, 13, 14, 15] for row in ORDINARY]
STAMMER = [[1, 2, 3, 4, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize(
    ("policy", "alarm"),
    [
        (written(ORDINARY, nats=1.0), "entropy"),
        (written(STAMMER), "repetition"),
        (written(LONGER), "length"),
        (written([row[:5] for row in ORDINARY]), "length"),
        (written(ORDINARY, ended=0.5), "ended"),
    ],
    ids=["entropy", "repetition", "longer", "shorter", "cut"],
)
def test_each_degeneration_sounds_its_own_alarm(policy: Written, alarm: str) -> None:
    found = levels(degeneration_findings(policy, written(ORDINARY)))
    assert [name for name, level in found.items() if level != "fine"] == [alarm]
    assert found[alarm] == "alarm"


def test_deciles_are_of_equal_size_and_in_order() -> None:
    by = np.arange(100.0)[::-1]
    groups = by_decile(values=2 * by, by=by)
    assert [at for at, _ in groups] == [4.5 + 10 * i for i in range(10)]
    assert all(value == 2 * at for at, value in groups)


def test_equal_values_are_never_parted() -> None:
    by = np.array([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0])
    groups = by_decile(values=np.arange(10.0), by=by)
    assert groups == [(1.0, 0.0), (2.0, 4.5), (3.0, 9.0)]


def test_few_pairs_make_few_groups() -> None:
    assert by_decile(np.array([1.0, 2.0]), np.array([5.0, 4.0])) == [(4.0, 2.0), (5.0, 1.0)]


def test_every_remedy_is_a_key_and_a_value_that_a_run_may_have() -> None:
    named = {
        remedy
        for group in ("DISPLACEMENT", "LENGTH", "COLLAPSE", "DRIFT")
        for remedy in getattr(diagnostics, f"AGAINST_{group}")
    }
    known = {f"loss: {loss}" for loss in LOSSES} | {f"divergence: {name}" for name in DIVERGENCES}
    options = {"sft_weight", "beta", "max_kl", *shipped_params()["train"]}
    assert named <= known | options
