"""Findings of all runs with what counters them: tried in this comparison, or how to try it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.params import Params
from stages.results import Result

LEVELS = ("fine", "watch", "alarm")
# What the losses that are proposed as remedies read; tests hold it against their signatures.
READS = {
    "dpop": ("beta", "penalty"),
    "cal_dpo": ("beta", "calibration"),
    "nca_pair": ("beta",),
    "r_dpo": ("beta", "alpha"),
    "ld_dpo": ("beta", "alpha"),
    "dpo_norm": ("beta",),
    "simpo": ("beta", "gamma"),
}
YOURS = "\N{HORIZONTAL ELLIPSIS}"  # a value that nobody can choose but the reader


@dataclass(frozen=True)
class Tried:
    """A run of this comparison that has a remedy, and the worst that was found of it."""

    run: Result
    remedy: str
    level: str


@dataclass
class Advice:
    """Findings that the same remedies counter.

    Args:
        names: of the findings.
        runs: that have one of them above `fine`.
        tried: runs of this comparison that have a remedy.
        lines: of params.yaml, which would try the others.
    """

    names: list[str]
    runs: list[Result]
    tried: list[Tried] = field(default_factory=list[Tried])
    lines: list[str] = field(default_factory=list[str])


def advice(params: Params, results: Sequence[Result]) -> list[Advice]:
    """One a group of findings, where a run has one that is not fine."""
    groups: dict[tuple[str, ...], Advice] = {}
    for result in results:
        for found in result.metrics["findings"]:
            if found["remedies"]:
                group = groups.setdefault(tuple(found["remedies"]), Advice([], []))
                group.names += [found["name"]] if found["name"] not in group.names else []
                group.runs += [result] if result not in group.runs else []
    for remedies, group in groups.items():
        # What is proposed starts from a run that needs it and whose numbers can be kept.
        start = next((run for run in group.runs if "beta" in params.runs[run.name]), group.runs[0])
        for remedy in remedies:
            having = [r for r in results if _has(params, params.runs[r.name], remedy)]
            group.tried += [Tried(run, remedy, _worst(run, group.names)) for run in having]
            line = None if having else _line(params, start, remedy)
            group.lines += [line] if line else []
    return list(groups.values())


def _worst(result: Result, names: Sequence[str]) -> str:
    levels = [found["level"] for found in result.metrics["findings"] if found["name"] in names]
    return max(levels, key=LEVELS.index)


def _has(params: Params, row: dict[str, Any], remedy: str) -> bool:
    key, _, value = remedy.partition(": ")
    if value:
        # A divergence is a remedy of losses on pairs; f-DPG's is what its samples are weighed by.
        return row.get(key) == value and (key == "loss" or row.get("loss") == "f_dpo")
    if key == "learning_rate":
        return row.get(key, params.train.learning_rate) < params.train.learning_rate
    if key == "beta":
        others = [other["beta"] for other in params.runs.values() if _same_but_beta(row, other)]
        return bool(others) and row["beta"] > min(others)
    return bool(row.get(key))


def _same_but_beta(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return "beta" in other and row | {"beta": other["beta"]} == other and row != other


def _line(params: Params, result: Result, remedy: str) -> str | None:
    """A line under `runs` that tries a remedy on a run; None where it has no such number."""
    row = params.runs[result.name]
    key, _, value = remedy.partition(": ")
    match key:
        case "loss":
            made = {"loss": value} | {name: row.get(name, YOURS) for name in READS[value]}
            return _written(value, made)
        case "divergence":
            made = {"loss": "f_dpo", "beta": row.get("beta", YOURS), "divergence": value}
            return _written(value, made)
        case "learning_rate":
            halved = row.get(key, params.train.learning_rate) / 2
            return _written(f"{result.name}_slower", row | {key: halved})
        case "beta":
            doubled = row | {key: 2 * row[key]} if key in row else None
            return _written(f"{result.name}_closer", doubled) if doubled else None
        case _:
            return _written(f"{result.name}_{key}", row | {key: YOURS})


def _written(name: str, row: dict[str, Any]) -> str:
    return f"{name}: {{{', '.join(f'{key}: {value}' for key, value in row.items())}}}"
