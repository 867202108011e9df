"""A sweep is rows: every combination of some values, written under `runs` of params.yaml."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from prefopt.losses import LOSSES
from stages.families import put, trained
from stages.params import (
    PARAMS,
    did_you_mean,
    load_params,
    params_of,
    run_line,
    values_of,
    with_runs,
)
from stages.runs import bind

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """What a sweep adds to params.yaml.

    Args:
        new: the rows that are not there yet, by name.
        there: the name that a row would have -> the run that is the same training already.
        text: params.yaml with the new rows.
    """

    new: Rows
    there: dict[str, str]
    text: str

    @property
    def lines(self) -> list[str]:
        return [run_line(name, row) for name, row in self.new.items()]

    def write(self) -> None:
        if self.new:
            PARAMS.write_text(self.text)


def read_options(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """`--beta 0.1,0.3 --seed=0,1` as values by the place in a row, in that order.

    Raises:
        ValueError: if an option has no values, a value no option, or an option comes twice.
    """
    found: dict[str, list[Any]] = {}
    left = list(arguments)
    while left:
        option, is_joined, values = left.pop(0).partition("=")
        if not option.startswith("--"):
            raise ValueError(
                f"sweep: a value without an option, got '{option}'; write --KEY VALUE,VALUE"
            )
        if not is_joined:
            values = left.pop(0) if left else ""
        key = option.removeprefix("--").replace("-", "_")
        if key in found:
            raise ValueError(f"{option}: given twice, got '{values}' too; join the values")
        found[key] = values_of(values, option)
    if not found:
        raise ValueError("sweep: nothing to vary, got no option; write --beta 0.03,0.1,0.3")
    return found


def plan(name: str, options: Mapping[str, Sequence[Any]]) -> Sweep:
    """Every combination of the options' values, upon the run or the loss called `name`.

    All rows are checked as `check` would check them, so that one that is refused writes none. A
    row that an existing run already trains, under whatever name, is not written again: a training
    that stood there twice would pass for two seeds.

    Raises:
        ValueError: if there is no such run or loss, a row is refused, or its name is another row's.
    """
    params = load_params()
    runs = params.runs
    if name not in runs and name not in LOSSES:
        known = [*runs, *LOSSES]
        raise ValueError(
            f"sweep: no such run or loss, got '{name}'; runs are {', '.join(runs)}"
            + did_you_mean(name, known)
        )
    start = runs.get(name, {"loss": name})
    asked: Rows = {}
    for values in product(*options.values()):
        combination = dict(zip(options, values, strict=True))
        row = dict(start)
        for place, value in combination.items():
            row = put(row, place, value)
        row_name = "_".join([name, *(_word(key, value) for key, value in combination.items())])
        if row_name in asked:
            raise ValueError(
                f"runs.{row_name}: two rows of this sweep have this name, got {asked[row_name]} "
                f"and {row}; sweep them apart, from runs of other names"
            )
        asked[row_name] = row
    trains = {trained(row, params.compute.seed): run for run, row in runs.items()}
    there: dict[str, str] = {}
    for row_name, row in asked.items():
        if row_name in runs and trained(runs[row_name], params.compute.seed) != trained(
            row, params.compute.seed
        ):
            raise ValueError(
                f"runs.{row_name}: says something else already, got {runs[row_name]} where the "
                f"sweep has {row}; rename that run, or remove it"
            )
        if (same := trains.get(trained(row, params.compute.seed))) is not None:
            there[row_name] = same
    new = {row_name: row for row_name, row in asked.items() if row_name not in there}
    text = with_runs(PARAMS.read_text(), new)
    grown = params_of(text)
    assert grown.runs == {**runs, **new}
    for row_name in new:
        bind(grown, row_name)
    return Sweep(new, there, text)


def _word(place: str, value: Any) -> str:
    """A part of a name, of a name's characters: beta0p03, seed1, divergence_squared_log."""
    key = place.replace(".", "_")
    text = re.sub(r"(?<=\d)\.(?=\d)", "p", str(value).lower())
    text = re.sub(r"-(?=\d)", "m", text)
    text = re.sub(r"[^a-z0-9]+", "_", text).strip("_")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{key}{text}" if is_number else f"{key}_{text}"
