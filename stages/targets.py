"""Targets of on-policy runs: how they are written in params.yaml, and fitted on the candidates.

A feature is a reward: one that is declared under `rewards`, by its name, or one that is written
where it is used, in the same words. `{REWARD_above: x}` is whether that reward is above x.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from prefopt import ebm
from prefopt.checkpoints import Metrics
from stages.artefacts import CANDIDATES, CANDIDATES_SCHEMA, Column, map_table
from stages.params import Name, Params, Positive, Strict, checked
from stages.rewards import Reward, Text, load_reward, written_reward


class Tilt(Strict):
    """The reference times exp(reward / beta): RLHF's optimum."""

    reward: Name
    beta: Positive
    log_z: Literal["per_prompt", "global"] = "per_prompt"


class Constraints(Strict):
    """The nearest to the reference whose features have these moments: GDC's family.

    A feature that is 0 or 1, with a moment of 0 or 1, is a factor: all else has probability 0.
    """

    moments: dict[Name, float]
    features: dict[Name, dict[str, Any] | Name]
    log_z: Literal["per_prompt", "global"] = "per_prompt"


Written = Tilt | Constraints


def read_target(written: Any, params: Params, where: str) -> Written:
    """A target as a run declares it, before anything is loaded.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(written, dict) or ("reward" in written) == ("moments" in written):
        raise ValueError(
            f"{where}: neither a tilt nor constraints, got {written!r}; give {{reward: NAME, beta: "
            "B}, or {moments: {NAME: M}, features: {NAME: REWARD}}"
        )
    if "reward" in written:
        tilt = checked(Tilt, written, where)
        params.check_reward_is_known(f"{where}.reward", tilt.reward)
        return tilt
    target = checked(Constraints, written, where)
    unmatched = sorted(target.moments.keys() ^ target.features.keys())
    if unmatched or not target.moments:
        raise ValueError(
            f"{where}: moments and features are not of the same names, got {unmatched} in one of "
            "them alone; give each feature one moment"
        )
    for name, feature in target.features.items():
        if isinstance(feature, str):
            params.check_reward_is_known(f"{where}.features.{name}", feature)
        else:
            feature_of(params, feature, f"{where}.features.{name}")
    return target


def feature_of(params: Params, written: dict[str, Any] | str, where: str) -> Reward:
    """A feature, ready to be asked."""
    if isinstance(written, str):
        return load_reward(params, written)
    (key, *others) = written or [""]
    if key.endswith("_above") and not others:
        written = {"above": written[key], "of": key.removesuffix("_above")}
    if "of" in written:
        params.check_reward_is_known(where, str(written["of"]))
    return written_reward(params, written, where)


@dataclass(frozen=True)
class Target:
    """A target, ready to score completions.

    Args:
        names: of the features; of a tilt the reward's.
        measures: those features.
        lambdas: theirs; of a tilt 1/beta.
        required: place of a feature -> the one value, 0 or 1, that the target allows.
        log_z: nats, by row of `prompts`; prompts of which no sample is allowed are not there.
        report: how it was fitted.
    """

    names: list[str]
    measures: list[Reward]
    lambdas: Float[Tensor, " features"]
    required: dict[int, float]
    log_z: dict[int, float]
    report: Metrics

    def measure(self, texts: Sequence[Text]) -> Float[Tensor, "texts features"]:
        """Features of texts."""
        return _measured(self.measures, texts)

    def scores(self, features: Float[Tensor, "texts features"]) -> Float[Tensor, " texts"]:
        """log P(y|x) - log a(y|x), before it is normalised; -inf where it is excluded."""
        allowed = _allowed(features, self.required)
        return torch.where(allowed, features @ self.lambdas, -math.inf)


def fitted_target(
    written: Written, params: Params, prompts: dict[str, Column], where: str, *, is_trained_on: bool
) -> Target:
    """The target on the candidates of the training split, which are samples of the reference.

    Args:
        written: the target.
        params: the experiment's.
        prompts: all of them.
        where: its place in params.yaml.
        is_trained_on: whether the loss reads it; of RLOO and PPO it is what metrics compare with.

    Raises:
        ValueError: if a feature or a moment is out of the candidates' reach, or they are too few.
    """
    rows, texts = _candidates(prompts)
    known = sorted(set(rows))
    numbers = {row: number for number, row in enumerate(known)}
    per_prompt = written.log_z == "per_prompt"
    groups = torch.tensor([numbers[row] if per_prompt else 0 for row in rows])
    if isinstance(written, Tilt):
        names, measures = [written.reward], [load_reward(params, written.reward)]
        features = _measured(measures, texts)
        lambdas, required = torch.tensor([1 / written.beta], dtype=torch.float64), {}
        target, report = ebm.normalised(features @ lambdas, groups), Metrics()
    else:
        names = list(written.moments)
        measures = [
            feature_of(params, written.features[name], f"{where}.features.{name}") for name in names
        ]
        features = _measured(measures, texts)
        moments = torch.tensor(list(written.moments.values()), dtype=torch.float64)
        required = _factors(features, moments)
        allowed = _allowed(features, required)
        places = [f"{where}.moments.{name}" for name in names]
        for place in required:
            ebm.check_occurs(features[:, place] == moments[place], places[place])
        free = [place for place in range(len(names)) if place not in required]
        fit = ebm.fitted(
            features[:, free],
            moments[free],
            groups,
            allowed=allowed,
            names=[places[place] for place in free],
        )
        lambdas, target = torch.zeros_like(moments), fit.target
        lambdas[free] = fit.lambdas
        reached = target.mean(features).tolist()
        report = Metrics({"fit/num_steps": fit.num_steps})
        report |= {f"fit/lambda/{name}": x for name, x in zip(names, lambdas.tolist(), strict=True)}
        report |= {f"fit/moment/{name}": x for name, x in zip(names, reached, strict=True)}
    if is_trained_on:
        ebm.check_ess(target, where)
    log_z = dict(
        zip(
            known,
            target.log_z.tolist() if per_prompt else [float(target.log_z[0])] * len(known),
            strict=True,
        )
    )
    log_z = {row: value for row, value in log_z.items() if value > -math.inf}
    report |= {
        "fit/kl": target.kl,
        "fit/ess": target.ess,
        "fit/num_samples": len(rows),
        "fit/num_prompts": len(log_z),
        "fit/num_prompts_left_out": len(known) - len(log_z),
    }
    if per_prompt:
        report |= {"fit/ess_of_a_prompt": target.typical_group_ess}
    return Target(names, measures, lambdas, required, log_z, report)


def _candidates(prompts: dict[str, Column]) -> tuple[list[int], list[Text]]:
    """Prompts' rows, and texts, of the training split's candidates."""
    table = map_table(CANDIDATES, CANDIDATES_SCHEMA)
    written: dict[int, str] = {}
    rows: list[int] = []
    texts: list[Text] = []
    for row, text in zip(table["prompt"], table["text"], strict=True):
        if row not in written:
            written[row] = prompts["split"][row]
        if written[row] == "train":
            rows.append(row)
            texts.append(Text(prompts["text"][row], text))
    return rows, texts


def _measured(measures: Sequence[Reward], texts: Sequence[Text]) -> Tensor:
    columns = [measure(texts) for measure in measures]
    return torch.tensor(columns, dtype=torch.float64).T


def _factors(features: Tensor, moments: Tensor) -> dict[int, float]:
    """Which features are 0 or 1 and shall always be the one of them."""
    binary = ((features == 0) | (features == 1)).all(0)
    certain = (moments == 0) | (moments == 1)
    places = (binary & certain).nonzero().flatten().tolist()
    return {place: moments[place].item() for place in places}


def _allowed(features: Tensor, required: dict[int, float]) -> Tensor:
    allowed = torch.ones(len(features), dtype=torch.bool)
    for place, value in required.items():
        allowed &= features[:, place] == value
    return allowed
