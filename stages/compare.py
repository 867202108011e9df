"""Which runs differ, and where all of them stand: `python -m stages.compare`."""

import json
from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Float

from prefopt.statistics.comparison import compare
from prefopt.statistics.intervals import cells, points
from prefopt.statistics.ratings import Games, ratings
from stages.artefacts import (
    COMPARISON,
    FRONTIER,
    PROMPTS,
    judgements_of,
    program,
    samples_of,
    stage,
)
from stages.families import families
from stages.frontier import metrics_of, reward_against_kl, table_of
from stages.params import load_params
from stages.tracking import track_comparison
from stages.verdicts import Table, judgements, prompts_of, questions


def main() -> None:
    params = load_params()
    num_resamples, seed = params.evaluation.num_resamples, params.compute.seed
    with stage(
        "compare",
        inputs=[
            PROMPTS,
            *(judgements_of(name) for name in params.runs),
            *(samples_of(name) for name in params.runs),
        ],
        outputs=[COMPARISON, FRONTIER],
        params={
            "runs": params.runs,
            "split": params.evaluation.split,
            "gold": params.label.reward,
            "num_resamples": num_resamples,
            "seed": seed,
        },
    ) as workspace:
        prompts = prompts_of(params.evaluation.split)
        tables = {name: judgements(name, prompts) for name in params.runs}
        found = {
            "win_rate": differences(tables, families(params.runs), num_resamples, seed),
            "ratings": elo(tables, num_resamples, seed),
            "frontier": reward_against_kl(params, tables, prompts),
        }
        text = json.dumps(found, indent=2, allow_nan=False) + "\n"
        workspace.partial(COMPARISON).write_text(text)
        table = table_of(found["frontier"])
        workspace.partial(FRONTIER).write_text(table)
    if metrics := metrics_of(found["frontier"]):
        track_comparison(recipe=params.recipe, metrics=metrics, files={FRONTIER.name: table})


def differences(
    tables: dict[str, Table], families: dict[str, list[str]], num_resamples: int, seed: int
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Opponent -> judge -> every pair of families, Holm's correction over the pairs of each.

    Raises:
        ValueError: if runs were not judged on the same prompts.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for opponent, judge in questions(tables.values()):
        values = {
            family: _cells([_rows(tables[name], opponent, judge) for name in names])
            for family, names in families.items()
        }
        judged = {family: table.shape[1] for family, table in values.items()}
        if len(set(judged.values())) > 1:
            raise ValueError(
                f"comparison by {judge} over {opponent}: runs were judged on other prompts, got "
                f"{judged}; run `dvc repro`"
            )
        pairs = compare(values, seed=seed, num_flips=num_resamples)
        found.setdefault(opponent, {})[judge] = [_rounded(asdict(pair)) for pair in pairs]
    return found


def elo(tables: dict[str, Table], num_resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Judge -> run or opponent -> Elo, that of SFT being 1000."""
    opponents = [opponent for opponent, _ in questions(tables.values())]
    names = list(dict.fromkeys([*opponents, *tables]))
    place = {name: number for number, name in enumerate(names)}
    found: dict[str, dict[str, Any]] = {}
    for judge in dict.fromkeys(judge for _, judge in questions(tables.values())):
        rows = [
            (place[name], place[opponent], verdict, prompt)
            for name, table in tables.items()
            for opponent, by, verdict, prompt in zip(
                table["opponent"], table["judge"], table["verdict"], table["prompt"], strict=True
            )
            if by == judge
        ]
        first, second, verdicts, prompts = zip(*rows, strict=True)
        games = Games(names, np.array(first), np.array(second), points(verdicts), np.array(prompts))
        rated = ratings(games, anchor="sft", seed=seed, num_resamples=num_resamples)
        found[judge] = {name: _rounded(asdict(rating)) for name, rating in rated.items()}
    return found


def _rows(table: Table, opponent: str, judge: str) -> tuple[list[str], list[int]]:
    """Verdicts and their prompts."""
    rows = zip(table["opponent"], table["judge"], table["verdict"], table["prompt"], strict=True)
    found = [(verdict, prompt) for *key, verdict, prompt in rows if key == [opponent, judge]]
    return [verdict for verdict, _ in found], [prompt for _, prompt in found]


def _cells(trainings: list[tuple[list[str], list[int]]]) -> Float[np.ndarray, "seeds prompts"]:
    return cells(
        points([verdict for verdicts, _ in trainings for verdict in verdicts]),
        np.array([prompt for _, prompts in trainings for prompt in prompts]),
        np.array([seed for seed, (_, prompts) in enumerate(trainings) for _ in prompts]),
    )


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


if __name__ == "__main__":
    program(main)
