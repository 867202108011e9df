"""Reward against KL by objective and strength: the frontier's table, from samples and verdicts."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from prefopt.metrics import best_of_kl_bound
from prefopt.statistics.frontier import Setting, compare_frontiers
from prefopt.statistics.intervals import points, win_rate
from stages.best_of import best_of
from stages.families import sweeps
from stages.params import Params
from stages.verdicts import Table, rows_where, samples

COLUMNS = ("objective", "strength", "trainings", "kl", "reward", "win_rate")


def reward_against_kl(
    params: Params, tables: Mapping[str, Table], prompts: range
) -> dict[str, Any]:
    """Where every setting stands by the gold reward, and which frontier is above which.

    Best-of-N stands at the most KL that it can have, whatever the reward.

    Args:
        params: the experiment's.
        tables: the verdicts of each run on these prompts.
        prompts: of the evaluation.
    """
    judged = {
        name: _by_prompt(rows_where(table, judge=params.label.reward, opponent="sft"))
        for name, table in tables.items()
    }
    written = {name: _by_prompt(samples(name, prompts)) for name in tables}
    found = sweeps(params.runs)

    def kl(name: str) -> np.ndarray:
        if best := best_of(params, name):  # SFT wrote its samples: their log-ratios are 0.
            return np.full(len(prompts), best_of_kl_bound(best.best_of))
        return np.subtract(written[name]["logp"], written[name]["reference_logp"])

    def setting(names: list[str]) -> Setting:
        return Setting(
            kl=np.array([kl(name) for name in names]),
            reward=np.array([judged[name]["policy_reward"] for name in names]),
        )

    frontiers = compare_frontiers(
        {
            objective: {words: setting(names) for words, names in settings.items()}
            for objective, settings in found.items()
        },
        np.array(next(iter(judged.values()))["opponent_reward"]),
        seed=params.compute.seed,
        num_resamples=params.evaluation.num_resamples,
    )
    tree = _rounded(asdict(frontiers))
    for objective, settings in found.items():
        for words, names in settings.items():
            rate = win_rate(
                points([verdict for name in names for verdict in judged[name]["verdict"]]),
                np.array([prompt for name in names for prompt in judged[name]["prompt"]]),
                np.repeat(range(len(names)), len(judged[names[0]]["prompt"])),
            )
            tree["places"][objective][words] |= {
                "runs": names,
                "win_rate": _rounded(asdict(rate)),
                "kl_is_bound": best_of(params, names[0]) is not None,
            }
    return tree


def table_of(frontier: dict[str, Any]) -> str:
    """One row a setting, for `dvc plots`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for objective, settings in frontier["places"].items():
        for words, place in settings.items():
            values = [place[column]["value"] for column in COLUMNS[3:]]
            writer.writerow([objective, words, len(place["runs"]), *values])
    return text.getvalue()


def metrics_of(frontier: dict[str, Any]) -> dict[str, float]:
    """What a tracker shows of the frontiers; nothing where nothing was swept."""
    gains = {name: curve["gain"] for name, curve in frontier["curves"].items()}
    return {
        f"frontier/{name}/gain{suffix}": gain[key]
        for name, gain in gains.items()
        for suffix, key in (("", "value"), ("_low", "low"), ("_high", "high"))
    }


def _by_prompt(table: Table) -> Table:
    order = np.argsort(table["prompt"], kind="stable")
    return {column: [values[row] for row in order] for column, values in table.items()}


def _rounded(tree: Any) -> Any:
    match tree:
        case float():
            return round(tree, 6)
        case dict():
            return {key: _rounded(value) for key, value in tree.items()}
        case list() | tuple():
            return [_rounded(value) for value in tree]
        case _:
            return tree
