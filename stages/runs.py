"""One row of `runs`: its loss looked up, its hyperparameters checked and bound.

A loss's signature is its schema: its keyword names, domains and defaults are read from the
function itself, so a key that the chosen loss does not read is an error.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model

from prefopt.divergences import Divergence, divergence
from prefopt.losses import LOSSES
from stages.params import Optimiser, Params, checked, did_you_mean


@dataclass(frozen=True)
class Run:
    """One row of `runs`, ready to train.

    Args:
        loss: the loss with its hyperparameters bound; takes a batch.
        at_reference: the loss's value at policy = reference.
        beta: what turns a log-ratio into an implicit reward for the metrics (1 without a beta).
        optimiser: the `train` section with this run's overrides.
        hyperparameters: as the person wrote them, for tracking.
    """

    loss: Callable[..., Any]
    at_reference: float
    beta: float
    optimiser: Optimiser
    hyperparameters: dict[str, Any]


def bind(params: Params, name: str) -> Run:
    """The run `name`: its loss looked up, its hyperparameters checked and bound."""
    where = f"runs.{name}"
    if name not in params.runs:
        raise ValueError(
            f"{where}: no such run, got '{name}'; known: {', '.join(params.runs)}"
            + did_you_mean(name, params.runs)
        )
    row = dict(params.runs[name])
    loss_name = row.pop("loss", None)
    if not isinstance(loss_name, str) or loss_name not in LOSSES:
        raise ValueError(
            f"{where}.loss: no such loss, got {loss_name!r}; known: {', '.join(LOSSES)}"
            + did_you_mean(str(loss_name), LOSSES)
        )
    entry = LOSSES[loss_name]
    overrides = {key: row.pop(key) for key in ("learning_rate", "num_epochs") if key in row}
    optimiser = checked(Optimiser, {**params.train.model_dump(), **overrides}, where)
    schema = hyperparameter_schema(loss_name, entry.function)
    for key in row:
        if key not in schema.model_fields:
            reads = list(schema.model_fields)
            raise ValueError(
                f"{where}.{key}: no such parameter of '{loss_name}', got {row[key]!r}; it reads: "
                f"{', '.join(reads)}; any run may also set learning_rate, num_epochs"
                + did_you_mean(key, reads)
            )
    model = checked(schema, row, where)
    values = {key: getattr(model, key) for key in schema.model_fields}
    return Run(
        loss=functools.partial(entry.function, **values),
        at_reference=entry.at_reference(**values),
        beta=values.get("beta", 1.0),
        optimiser=optimiser,
        hyperparameters={"loss": loss_name, **row, **overrides},
    )


@functools.cache
def hyperparameter_schema(name: str, function: Callable[..., Any]) -> type[BaseModel]:
    """The keyword parameters of a loss as a pydantic model."""
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        annotation = parameter.annotation
        if annotation is Divergence:
            annotation = Annotated[Divergence, BeforeValidator(divergence)]
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (annotation, default)
    config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True
    )
    return create_model(name, __config__=config, **fields)


def check_runs(params: Params) -> None:
    for name in params.runs:
        bind(params, name)
