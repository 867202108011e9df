"""The README's tables are the library's."""

import math

import pytest
from conftest import PROJECT

from prefopt.divergences import DIVERGENCES, Divergence
from prefopt.losses import LOSSES, Loss
from prefopt.losses.formulas import hyperparameters_of

README = (PROJECT / "README.md").read_text().splitlines()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=lambda loss: loss.name)
def test_every_loss_has_its_row(loss: Loss) -> None:
    reads = ", ".join(hyperparameters_of(loss))
    assert f"| `{loss.name}` | `{loss.formula}` | {reads} | {loss.paper} |" in README


@pytest.mark.parametrize("row", DIVERGENCES.values(), ids=repr)
def test_every_divergence_has_its_row(row: Divergence) -> None:
    def number(x: float) -> str:
        return {math.inf: "none: f falls for ever", -math.inf: "-inf"}.get(x, f"{x:.6g}")

    facts = (row.convex, row.dpo_inducing, row.displacement_resistant)
    cells = [number(row.slope_at_zero), number(row.argmin), *("yes" if x else "no" for x in facts)]
    assert f"| `{row.name}` | `{row.expression}` | {' | '.join(cells)} |" in README


def test_no_row_is_of_something_that_is_not_there() -> None:
    named = {line.split("`")[1] for line in README if line.startswith("| `")}
    named -= {"loss:", "divergence:"}
    assert named == {*LOSSES, *DIVERGENCES, "{alpha: a}", "{squared_log: c}"}
