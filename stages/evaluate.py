"""Statistics of one run, from verdicts and samples alone: `python -m stages.evaluate RUN`."""

import argparse
import json
from dataclasses import asdict
from typing import Any

import numpy as np

from prefopt.metrics import bootstrap, displacement, distinct, points
from stages.artefacts import (
    JUDGEMENTS_SCHEMA,
    LOGRATIOS_SCHEMA,
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
        inputs=[judgements_of(name), samples_of(name), samples_of("sft"), logratios_of(name)],
        outputs=[metrics_of(name)],
        params=relevant,
    ) as workspace:
        metrics = {
            "win_rate": win_rates(name, evaluation.num_resamples, params.compute.seed),
            **sample_metrics(name, params.label.reward),
            "displacement": displaced(name),
        }
        text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
        workspace.partial(metrics_of(name)).write_text(text)
    track_evaluation(name, recipe=params.recipe, metrics=flatten(metrics))


def win_rates(name: str, num_resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Opponent -> judge -> win rate with its interval; ties count one half."""
    table = read_table(judgements_of(name), JUDGEMENTS_SCHEMA)
    verdicts: dict[tuple[str, str], list[str]] = {}
    for opponent, judge, verdict in zip(
        table["opponent"], table["judge"], table["verdict"], strict=True
    ):
        verdicts.setdefault((opponent, judge), []).append(verdict)
    rates: dict[str, dict[str, Any]] = {}
    for (opponent, judge), found in verdicts.items():
        estimate = bootstrap(points(found), seed=seed, num_resamples=num_resamples)
        counts = {key: found.count(key) for key in ("policy", "opponent", "tie")}
        rates.setdefault(opponent, {})[judge] = _rounded(asdict(estimate)) | counts
    return rates


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
    """Nested metrics under slash-separated names."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def _rounded(values: dict[str, float]) -> dict[str, Any]:
    return {key: round(value, 6) for key, value in values.items()}


if __name__ == "__main__":
    program(main)
