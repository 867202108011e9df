"""One row of `runs`: its loss looked up, its hyperparameters checked and bound.

A loss's signature is its schema: its keyword names, domains and defaults are read from the
function itself, so a key that the chosen loss does not read is an error.
"""

import functools
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictInt, create_model

from prefopt.divergences import Divergence, divergence, dpo_inducing_divergence
from prefopt.domains import DPOInducing
from prefopt.losses import LOSSES, Loss
from prefopt.losses.formulas import hyperparameters_of
from prefopt.psi import Psi, psi
from stages.best_of import best_of
from stages.existing import existing_policy
from stages.params import Count, Optimiser, Params, Several, Strict, Watching, checked, did_you_mean
from stages.targets import Tilt, Written, read_target

# Evidence that pairs and rankings give, with policy and reference at hand.
TRAINABLE = (
    "Pairs",
    "SharedPairs",
    "WeightedPairs",
    "SequentialPairs",
    "Labelled",
    "Revisions",
    "Rankings",
)

# Evidence that the policy writes itself while it trains.
ON_POLICY = ("Samples", "Rollouts")

READERS: dict[Any, Any] = {
    Divergence: Annotated[Divergence, BeforeValidator(divergence)],
    DPOInducing: Annotated[Divergence, BeforeValidator(dpo_inducing_divergence)],
    Psi: Annotated[Psi, BeforeValidator(psi)],
}


class Options(Strict):
    """What a run may say beside its loss's hyperparameters and the optimiser's overrides."""

    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    seed: Annotated[StrictInt, Field(ge=0)] | None = None
    start: Annotated[str, Field(pattern=r"^data/models/[\w.-]+$")] | None = None


class Sampled(Strict):
    """What a run on the policy's own samples says of them, beside its target."""

    num_completions: Several = 4
    refresh: Count = 1


class SampledWithBaseline(Sampled):
    baseline: Literal["leave_one_out", "step", "none"] = "leave_one_out"


@dataclass(frozen=True)
class Draws:
    """How a run samples, and what for.

    Args:
        target: of the policy; for RL the reference's tilt by its reward and beta.
        num_completions: of each prompt of a step.
        refresh: steps whose samples are drawn at once, by the policy as it is before them.
        baseline: of rewards: the mean of the prompt's other samples, of the step's others, or none.
    """

    target: Written
    num_completions: int
    refresh: int
    baseline: Literal["leave_one_out", "step", "none"] = "leave_one_out"


OVERRIDES = ("learning_rate", "num_epochs", "lora")
WATCH_OVERRIDES = ("select", "max_kl")


@dataclass(frozen=True)
class Run:
    """One row of `runs`, ready to train.

    Args:
        loss: the row of the table of losses.
        hyperparameters: the loss's, all of them, as its function takes them.
        sft_weight: weight of the chosen completions' mean NLL a token, added to the loss.
        seed: of the order of pairs and of adapters; `compute.seed` if the run names none. Runs that
            differ in it alone are one objective, trained anew.
        optimiser: the `train` section with this run's overrides.
        watch: the `watch` section with this run's overrides.
        written: all as the person wrote it, for tracking.
        draws: of a run on the policy's own samples.
        start: the model whose weights the policy begins with; None begins with the reference.
    """

    loss: Loss
    hyperparameters: dict[str, Any]
    sft_weight: float
    seed: int
    optimiser: Optimiser
    watch: Watching
    written: dict[str, Any]
    draws: Draws | None = None
    start: str | None = None


def bind(params: Params, name: str) -> Run:
    """The run `name`: its loss looked up, its hyperparameters checked and bound."""
    where = f"runs.{name}"
    if name not in params.runs:
        raise ValueError(
            f"{where}: no such run, got '{name}'; known: {', '.join(params.runs)}"
            + did_you_mean(name, params.runs)
        )
    row = dict(params.runs[name])
    loss = _loss(row.pop("loss", None), where)
    overrides = {key: row.pop(key) for key in OVERRIDES if key in row}
    watched = {key: row.pop(key) for key in WATCH_OVERRIDES if key in row}
    options = {key: row.pop(key) for key in Options.model_fields if key in row}
    schema = hyperparameter_schema(loss)
    sampled = {key: row.pop(key) for key in _sampled_keys(loss) if key in row}
    for key in row:
        if key not in schema.model_fields:
            reads = list(schema.model_fields)
            reads += _sampled_keys(loss)
            others = ", ".join((*OVERRIDES, *WATCH_OVERRIDES, *Options.model_fields))
            raise ValueError(
                f"{where}.{key}: no such parameter of '{loss.name}', got {row[key]!r}; it reads: "
                f"{', '.join(reads)}; any run may also set {others}" + did_you_mean(key, reads)
            )
    model = checked(schema, row, where)
    said = checked(Options, options, where)
    run = Run(
        loss=loss,
        hyperparameters={key: getattr(model, key) for key in schema.model_fields},
        sft_weight=said.sft_weight,
        seed=params.compute.seed if said.seed is None else said.seed,
        optimiser=checked(Optimiser, {**params.train.model_dump(), **overrides}, where),
        watch=checked(Watching, {**params.watch.model_dump(), **watched}, where),
        written=dict(params.runs[name]),
        draws=_draws(loss, model, sampled, params, where),
        start=said.start,
    )
    _check_evidence(run, params, where)
    _check_watch(run.watch, params, where)
    return run


def _loss(name: Any, where: str) -> Loss:
    if not isinstance(name, str) or name not in LOSSES:
        raise ValueError(
            f"{where}.loss: no such loss, got {name!r}; known: {', '.join(LOSSES)}, or model or "
            "best_of in the place of a loss" + did_you_mean(str(name), LOSSES)
        )
    return LOSSES[name]


def _check_evidence(run: Run, params: Params, where: str) -> None:
    """Refuse what this pipeline's pairs and rankings cannot train."""
    loss = run.loss
    if run.start is not None and (run.optimiser.lora is not None or loss.evidence in ON_POLICY):
        raise ValueError(
            f"{where}.start: is for runs that train all weights on labels, got {run.start!r} "
            "with adapters or samples of its own; leave it out"
        )
    if loss.evidence in ON_POLICY:
        _check_on_policy(run, params, where)
    elif loss.evidence not in TRAINABLE:
        able = [row.name for row in LOSSES.values() if row.evidence in (*TRAINABLE, *ON_POLICY)]
        raise ValueError(
            f"{where}.loss: reads {loss.evidence}, which no stage makes, got '{loss.name}'; "
            f"trained are {', '.join(able)}"
        )
    if loss.evidence == "Revisions" and not params.revision.train:
        raise ValueError(
            f"{where}: '{loss.name}' reads pairs under revision prompts, got revision.train: "
            "false; set it to true"
        )
    if loss.evidence == "Rankings":
        if params.label.num_ranked is None:
            raise ValueError(
                f"{where}: '{loss.name}' reads rankings of K completions, got label.num_ranked: "
                "null; set it to K"
            )
        if run.sft_weight:
            raise ValueError(
                f"{where}.sft_weight: adds the NLL of a pair's chosen completion, got "
                f"{run.sft_weight} with '{loss.name}', which reads rankings; leave it out"
            )
    if loss.evidence == "Labelled" and run.optimiser.batch_size < 2:
        raise ValueError(
            f"{where}: '{loss.name}' compares with another pair's completion, got a batch_size of "
            f"{run.optimiser.batch_size}; set train.batch_size to at least 2"
        )
    utility = run.hyperparameters.get("psi")
    if utility is not None and not utility.affine and params.label.method != "bradley_terry":
        raise ValueError(
            f"{where}.psi: '{utility}' needs soft preferences, got labels that are certain "
            f"(label.method {params.label.method}); a hard label stands for its probability only "
            "under the identity: set label.method to bradley_terry, or psi to identity"
        )


def _sampled_keys(loss: Loss) -> tuple[str, ...]:
    """What a run of this loss says of its samples."""
    match loss.evidence:
        case "Samples":
            return ("target", *SampledWithBaseline.model_fields)
        case "Rollouts":
            return ("reward", *Sampled.model_fields)
        case _:
            return ()


def _draws(
    loss: Loss, hyperparameters: Any, sampled: dict[str, Any], params: Params, where: str
) -> Draws | None:
    if loss.evidence not in ON_POLICY:
        return None
    (what, *_) = _sampled_keys(loss)
    if what not in sampled:
        raise ValueError(f"{where}.{what}: is missing, got nothing; '{loss.name}' needs one")
    if loss.evidence == "Samples":
        target = read_target(sampled.pop(what), params, f"{where}.{what}")
        return Draws(target, **checked(SampledWithBaseline, sampled, where).model_dump())
    reward = sampled.pop(what)
    params.check_reward_is_known(f"{where}.{what}", str(reward))
    target = Tilt(reward=reward, beta=hyperparameters.beta)
    return Draws(target, **checked(Sampled, sampled, where).model_dump())


def _check_on_policy(run: Run, params: Params, where: str) -> None:
    """Refuse what a training on the policy's own samples does not do."""
    if params.compute.num_processes > 1:
        raise ValueError(
            f"{where}: '{run.loss.name}' samples while it trains, which one process does, got "
            f"compute.num_processes {params.compute.num_processes}; set it to 1"
        )
    if params.sample.temperature != 1:
        raise ValueError(
            f"{where}: '{run.loss.name}' takes candidates for samples of the reference, got "
            f"sample.temperature {params.sample.temperature}; set it to 1"
        )
    if run.sft_weight:
        raise ValueError(
            f"{where}.sft_weight: is of chosen completions, and '{run.loss.name}' has no pairs, "
            f"got {run.sft_weight}; leave it out"
        )
    if run.watch.select != "last":
        raise ValueError(
            f"{where}: select '{run.watch.select}' reads a loss on pairs, and '{run.loss.name}' "
            "has none; set select to last"
        )


def _check_watch(watch: Watching, params: Params, where: str) -> None:
    """Refuse a choice among looks that will not see what it chooses by."""
    if watch.max_kl is not None and not watch.writes:
        raise ValueError(
            f"{where}: max_kl is estimated from completions that a run writes at looks, got "
            f"watch.every {watch.every} and watch.num_generations {watch.num_generations}; set "
            "both, or max_kl to null"
        )
    if watch.select == "last":
        return
    sampled = params.label.method != "given"
    if not watch.every or (sampled and not params.sample.num_validation_prompts):
        raise ValueError(
            f"{where}: select '{watch.select}' reads validation pairs at looks, got watch.every "
            f"{watch.every} and sample.num_validation_prompts "
            f"{params.sample.num_validation_prompts}; set both, or select to last"
        )
    if params.evaluation.split == "validation":
        raise ValueError(
            f"{where}: select '{watch.select}' chooses a model by the validation split, got "
            "evaluation.split validation, whose figures would flatter it; evaluate on test, or set "
            "select to last"
        )


@functools.cache
def hyperparameter_schema(loss: Loss) -> type[BaseModel]:
    """The keyword parameters of a loss as a pydantic model."""
    fields: dict[str, Any] = {}
    for name, parameter in hyperparameters_of(loss).items():
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (READERS.get(parameter.annotation, parameter.annotation), default)
    config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )
    return create_model(loss.name, __config__=config, **fields)


def check_runs(params: Params) -> list[Run]:
    """All runs that train, bound; every row of `runs` is checked."""
    trained = [
        name
        for name in params.runs
        if best_of(params, name) is None and existing_policy(params, name) is None
    ]
    return [bind(params, name) for name in trained]
