"""Statistics of one run, from verdicts and samples alone: `python -m stages.evaluate RUN`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.metrics import displacement, distinct
from prefopt.statistics.intervals import points, win_rate
from prefopt.statistics.length import length_controlled
from stages.artefacts import (
    JUDGEMENTS_SCHEMA,
    LOGRATIOS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    SAMPLES_SCHEMA,
    judgements_of,
    logratios_of,
    metrics_of,
    program,
    read_table,
    samples_of,
    stage,
)
from stages.params import load_params
from stages.tracking import track_evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    name = parser.parse_args().run
    params = load_params()
    evaluation = params.evaluation
    relevant = {
        "evaluation": evaluation.model_dump(),
        "gold": params.label.reward,
        "seed": params.compute.seed,
    }
    with stage(
        f"evaluate@{name}",
        inputs=[
            PROMPTS,
            judgements_of(name),
            samples_of(name),
            samples_of("sft"),
            logratios_of(name),
        ],
        outputs=[metrics_of(name)],
        params=relevant,
    ) as workspace:
        metrics = {
            **win_rates(name, evaluation.num_resamples, params.compute.seed),
            **sample_metrics(name, params.label.reward),
            "displacement": displaced(name),
        }
        text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
        workspace.partial(metrics_of(name)).write_text(text)
    track_evaluation(name, recipe=params.recipe, metrics=flatten(metrics))


def win_rates(name: str, num_resamples: int, seed: int) -> dict[str, Any]:
    """Win rates and length-controlled ones: opponent -> judge -> estimate.

    Where length cannot be told from quality, the reason stands in the estimate's place.
    """
    judgements = read_table(judgements_of(name), JUDGEMENTS_SCHEMA)
    ours, theirs = _lengths(samples_of(name)), {"sft": _lengths(samples_of("sft"))}
    theirs["gold"] = dict(enumerate(map(len, read_table(PROMPTS, PROMPTS_SCHEMA)["gold_tokens"])))
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for opponent, judge, *row in zip(
        *(judgements[key] for key in ("opponent", "judge", "prompt", "verdict")), strict=True
    ):
        found.setdefault((opponent, judge), []).append((row[0], row[1]))
    rates: dict[str, dict[str, Any]] = {}
    controlled: dict[str, dict[str, Any]] = {}
    for (opponent, judge), rows in found.items():
        prompts = np.array([prompt for prompt, _ in rows])
        verdicts = [verdict for _, verdict in rows]
        counts = {key: verdicts.count(key) for key in ("policy", "opponent", "tie")}
        estimate = win_rate(points(verdicts), prompts)
        rates.setdefault(opponent, {})[judge] = _rounded(asdict(estimate)) | counts
        longer = np.array([ours[prompt] - theirs[opponent][prompt] for prompt, _ in rows])
        try:
            estimate = length_controlled(
                points(verdicts), longer, prompts, seed=seed, num_resamples=num_resamples
            )
        except ValueError as error:
            controlled.setdefault(opponent, {})[judge] = {"refused": str(error)}
        else:
            controlled.setdefault(opponent, {})[judge] = _rounded(asdict(estimate))
    return {"win_rate": rates, "length_controlled": controlled}


def _lengths(samples: Path) -> dict[int, int]:
    """Prompt -> tokens of its completion."""
    table = read_table(samples, SAMPLES_SCHEMA)
    return dict(zip(table["prompt"], map(len, table["tokens"]), strict=True))


def sample_metrics(name: str, gold: str) -> dict[str, float]:
    """What a run's samples say of its policy.

    `kl` is the Monte-Carlo estimate of KL(policy || reference) in nats a sequence;
    `nll_under_sft` is nats a token, beside SFT's own.
    """
    samples = read_table(samples_of(name), SAMPLES_SCHEMA)
    sft = read_table(samples_of("sft"), SAMPLES_SCHEMA)
    judgements = read_table(judgements_of(name), JUDGEMENTS_SCHEMA)
    rewards = [
        reward
        for reward, judge, opponent in zip(
            judgements["policy_reward"], judgements["judge"], judgements["opponent"], strict=True
        )
        if judge == gold and opponent == "sft"
    ]
    logratio = np.array(samples["logp"]) - np.array(samples["reference_logp"])
    lengths = [len(tokens) for tokens in samples["tokens"]]
    sft_lengths = [len(tokens) for tokens in sft["tokens"]]
    return _rounded(
        {
            "kl": float(logratio.mean()),
            "kl_standard_error": float(logratio.std(ddof=1) / len(logratio) ** 0.5),
            "reward": float(np.mean(rewards)),
            "length": float(np.mean(lengths)),
            "distinct_2": distinct(samples["tokens"], 2),
            "nll_under_sft": -sum(samples["reference_logp"]) / sum(lengths),
            "nll_of_sft": -sum(sft["reference_logp"]) / sum(sft_lengths),
        }
    )


def displaced(name: str) -> dict[str, float]:
    logratios = read_table(logratios_of(name), LOGRATIOS_SCHEMA)
    return _rounded(
        asdict(displacement(np.array(logratios["chosen"]), np.array(logratios["rejected"])))
    )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under slash-separated names; words are left out."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif not isinstance(value, str):
            flat[prefix + key] = float(value)
    return flat


def _rounded(values: dict[str, float]) -> dict[str, Any]:
    return {key: round(value, 6) for key, value in values.items()}


if __name__ == "__main__":
    program(main)
