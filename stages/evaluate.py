"""Statistics of one run, from verdicts and samples alone: `python -m stages.evaluate RUN`."""

import argparse
import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np

from prefopt.diagnostics import (
    Finding,
    Moved,
    Written,
    by_decile,
    degeneration_findings,
    displacement_findings,
)
from prefopt.metrics import best_of_kl_bound, displacement, distinct
from prefopt.statistics.intervals import cells, complete, points, win_rate
from prefopt.statistics.length import length_controlled
from stages.artefacts import (
    GENERATIONS_SCHEMA,
    LOGRATIOS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    SAMPLES_SCHEMA,
    TEMPLATES,
    generations_of,
    judgements_of,
    logratios_of,
    looks_of,
    map_table,
    metrics_of,
    program,
    read_table,
    samples_of,
    stage,
)
from stages.best_of import best_of
from stages.params import Params, load_params
from stages.rewards import Text, load_reward
from stages.templates import read_templates
from stages.tracking import track_evaluation
from stages.verdicts import Table, judgements, prompts_of, questions, rows_where, samples

SIDES = ("chosen", "rejected")
LOOK: Sequence[str] = (
    "step",
    "completions",
    "kl",
    "kl_standard_error",
    "reward",
    "reward_standard_error",
)
NUM_BOOTSTRAP = 20  # evaluations of a revision, as Choi et al. 2024 draw their bands


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    params = load_params()
    evaluation, seed = params.evaluation, params.compute.seed
    relevant = {
        "evaluation": evaluation.model_dump(),
        "gold": params.label.reward,
        "seed": seed,
        "run": params.runs[name],
    }
    best = best_of(params, name)
    with stage(
        f"evaluate@{name}",
        inputs=[
            PROMPTS,
            TEMPLATES,
            judgements_of(name),
            samples_of(name),
            samples_of("sft"),
            logratios_of(name),
            generations_of(name),
        ],
        outputs=[metrics_of(name), looks_of(name)],
        params=relevant,
    ) as workspace:
        prompts = prompts_of(evaluation.split)
        ours, theirs = samples(name, prompts), samples("sft", prompts)
        judged = judgements(name, prompts)
        logratios = arrays_of(name)
        metrics = {
            **win_rates(judged, ours, theirs, evaluation.num_resamples, seed),
            **sample_metrics(judged, ours, theirs, params.label.reward),
            **(kl_of_best(best.best_of) if best else {}),
            "displacement": _rounded(
                asdict(displacement(logratios["chosen"], logratios["rejected"]))
            ),
            "findings": [_finding(found) for found in findings(logratios, ours, theirs)],
            "deciles": deciles(logratios),
            **revisions(name, evaluation.split, seed),
        }
        text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
        workspace.partial(metrics_of(name)).write_text(text)
        seen = looks(name, params)
        with open(workspace.partial(looks_of(name)), "w", newline="") as file:
            writer = csv.DictWriter(file, LOOK, lineterminator="\n")
            writer.writeheader()
            writer.writerows(seen)
    track_evaluation(
        name,
        recipe=params.recipe,
        metrics=flatten(metrics),
        by_step=[(int(look["step"]), {"looks/reward": look["reward"]}) for look in seen],
    )


def arrays_of(name: str) -> dict[str, np.ndarray]:
    """Columns of a run's log-ratios, 48 bytes a pair: what medians and tenths are taken of.

    In 64 bits, because sums of float32 would have other digits.
    """
    columns = map_table(logratios_of(name), LOGRATIOS_SCHEMA)
    arrays = {name: column.values.to_numpy() for name, column in columns.items()}
    return {name: array.astype(f"{array.dtype.kind}8") for name, array in arrays.items()}


def win_rates(
    judged: Table, ours: Table, theirs: Table, num_resamples: int, seed: int
) -> dict[str, Any]:
    """Win rates and length-controlled ones: opponent -> judge -> estimate.

    Where length cannot be told from quality, the reason stands in the estimate's place.
    """
    gold_tokens = map_table(PROMPTS, PROMPTS_SCHEMA)["gold_tokens"]
    our_lengths = _lengths(ours)
    gold_lengths = {prompt: len(gold_tokens[prompt]) for prompt in our_lengths}
    lengths = {"sft": _lengths(theirs), "gold": gold_lengths}
    rates: dict[str, dict[str, Any]] = {}
    controlled: dict[str, dict[str, Any]] = {}
    for opponent, judge in questions([judged]):
        rows = rows_where(judged, opponent=opponent, judge=judge)
        prompts, verdicts = np.array(rows["prompt"]), rows["verdict"]
        counts = {key: verdicts.count(key) for key in ("policy", "opponent", "tie")}
        estimate = win_rate(points(verdicts), prompts)
        rates.setdefault(opponent, {})[judge] = _rounded(asdict(estimate)) | counts
        longer = np.array(
            [our_lengths[prompt] - lengths[opponent][prompt] for prompt in rows["prompt"]]
        )
        try:
            estimate = length_controlled(
                points(verdicts), longer, prompts, seed=seed, num_resamples=num_resamples
            )
        except ValueError as error:
            controlled.setdefault(opponent, {})[judge] = {"refused": str(error)}
        else:
            controlled.setdefault(opponent, {})[judge] = _rounded(asdict(estimate))
    return {"win_rate": rates, "length_controlled": controlled}


def _lengths(table: Table) -> dict[int, int]:
    """Prompt -> tokens of its completion."""
    return dict(zip(table["prompt"], map(len, table["tokens"]), strict=True))


def sample_metrics(judged: Table, ours: Table, theirs: Table, gold: str) -> dict[str, float]:
    """What a run's samples say of its policy.

    `kl` is the Monte-Carlo estimate of KL(policy || reference) in nats a sequence;
    `nll_under_sft` is nats a token, beside SFT's own.
    """
    rewards = rows_where(judged, judge=gold, opponent="sft")["policy_reward"]
    logratio = np.array(ours["logp"]) - np.array(ours["reference_logp"])
    lengths = [len(tokens) for tokens in ours["tokens"]]
    sft_lengths = [len(tokens) for tokens in theirs["tokens"]]
    return _rounded(
        {
            "kl": float(logratio.mean()),
            "kl_standard_error": float(logratio.std(ddof=1) / len(logratio) ** 0.5),
            "reward": float(np.mean(rewards)),
            "length": float(np.mean(lengths)),
            "distinct_2": distinct(ours["tokens"], 2),
            "nll_under_sft": -sum(ours["reference_logp"]) / sum(lengths),
            "nll_of_sft": -sum(theirs["reference_logp"]) / sum(sft_lengths),
        }
    )


def kl_of_best(n: int) -> dict[str, float | bool]:
    """In the place of an estimate, which would need to know how likely a completion is kept."""
    return {"kl": round(best_of_kl_bound(n), 6), "kl_standard_error": 0.0, "kl_is_bound": True}


def findings(logratios: dict[str, np.ndarray], ours: Table, theirs: Table) -> list[Finding]:
    """Displacement of the training pairs, degeneration of the samples."""
    eos = read_templates().eos
    moved = Moved(**logratios)
    return [
        *displacement_findings(moved),
        *degeneration_findings(_written(ours, eos), _written(theirs, eos)),
    ]


def _written(table: Table, eos: int) -> Written:
    return Written(
        tokens=table["tokens"],
        logp=np.array(table["logp"]),
        ended=np.array([tokens[-1:] == [eos] for tokens in table["tokens"]]),
    )


def _finding(found: Finding) -> dict[str, Any]:
    return _rounded(asdict(found)) | {"remedies": list(found.remedies)}


def looks(name: str, params: Params) -> list[dict[str, float]]:
    """What the gold reward says of the run's completions while it trained: one row a look.

    KL as the look estimated it, in nats a sequence; each mean with its standard error.
    """
    table = read_table(generations_of(name), GENERATIONS_SCHEMA)
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)["text"]
    texts = [
        Text(prompts[prompt], text)
        for prompt, text in zip(table["prompt"], table["text"], strict=True)
    ]
    table["reward"] = load_reward(params, params.label.reward)(texts) if texts else []
    found: list[dict[str, float]] = []
    for step in dict.fromkeys(table["step"]):
        rows = rows_where(table, step=step)
        means = [_mean(rows["kl"]), _mean(rows["reward"])]
        found.append(dict(zip(LOOK, (step, len(rows["kl"]), *means[0], *means[1]), strict=True)))
    return found


def _mean(values: list[float]) -> tuple[float, float]:
    """With its standard error, of a single value 0."""
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return round(float(np.mean(values)), 6), round(error, 6)


def deciles(logratios: dict[str, np.ndarray]) -> dict[str, Any]:
    """Median log-ratios, nats, in tenths of the pairs: grouped by -> side -> (place, median).

    By the completion's own tokens, and by the margin, where the pair stands.
    """
    margin = logratios["chosen"] - logratios["rejected"]
    by = {
        "length": {side: logratios[f"{side}_tokens"].astype(float) for side in SIDES},
        "margin": dict.fromkeys(SIDES, margin),
    }
    return {
        grouped: {
            side: [
                [round(place, 6), round(median, 6)]
                for place, median in by_decile(logratios[side], of_side[side])
            ]
            for side in SIDES
        }
        for grouped, of_side in by.items()
    }


def revisions(name: str, split: str, seed: int) -> dict[str, Any]:
    """Win rates of every revision on both splits: split -> revision -> opponent -> judge.

    `bootstrap_mean` and `bootstrap_deviation` are those of 20 evaluations on resampled prompts:
    the bands of Choi et al. 2024 (arXiv:2406.01660), beside which stands the interval.
    Nothing where completions were not revised and no split is shifted.
    """
    count = max(read_table(samples_of(name), SAMPLES_SCHEMA)["revision"]) + 1
    splits = {key: rows for key in (split, "shifted") if (rows := prompts_of(key))}
    if count == 1 and len(splits) == 1:
        return {}
    found: dict[str, Any] = {}
    for (key, prompts), revision in product(splits.items(), range(count)):
        judged = judgements(name, prompts, revision)
        for opponent, judge in questions([judged]):
            rows = rows_where(judged, opponent=opponent, judge=judge)
            worth, numbers = points(rows["verdict"]), np.array(rows["prompt"])
            estimate = asdict(win_rate(worth, numbers))
            values = complete(cells(worth, numbers)).mean(0)
            random = np.random.default_rng(seed)
            drawn = random.integers(len(values), size=(NUM_BOOTSTRAP, len(values)))
            means = values[drawn].mean(1)
            estimate["bootstrap_mean"] = float(means.mean())
            estimate["bootstrap_deviation"] = float(means.std(ddof=1))
            by_opponent = found.setdefault(key, {}).setdefault(str(revision), {})
            by_opponent.setdefault(opponent, {})[judge] = _rounded(estimate)
    return {"revisions": found}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under slash-separated names; words and lists are left out."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif not isinstance(value, str | list):
            flat[prefix + key] = float(value)
    return flat


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}


if __name__ == "__main__":
    program(main)
