"""params.yaml and recipes -> frozen types; the only reader of YAML.

Every value is checked before any expensive work. A loss's signature is its schema: its keyword
names, domains and defaults are read from the function itself, so a key that the chosen loss does
not read is an error.
"""

import difflib
import functools
import inspect
import io
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    create_model,
    model_validator,
)

if TYPE_CHECKING:
    from prefopt.loop import Optimisation

PARAMS = Path("params.yaml")
MAX_BYTES = 1_000_000

Model = TypeVar("Model", bound=BaseModel)

Count = Annotated[StrictInt, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
# Names become stage names, file names and parts of commands, so their characters are few.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Reward = Literal["vader", "textblob"]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Compute(Strict):
    seed: Annotated[StrictInt, Field(ge=0)]
    num_threads: Count
    dtype: Literal["float32", "bfloat16"]
    token_budget: Count
    checkpoint_every: Count


class Data(Strict):
    source: str
    prompt_words: Count
    max_completion_tokens: Count
    num_train: Count | None
    num_validation: Count
    num_test: Count


class Optimiser(Strict):
    learning_rate: Positive
    num_epochs: Count
    batch_size: Count
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Share
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Positive
    top_layers: Annotated[StrictInt, Field(ge=0)]

    def optimisation(self) -> "Optimisation":
        """What the loop reads of it; epochs, batches and layers are the stage's business."""
        from prefopt.loop import Optimisation

        return Optimisation(
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )


class Sample(Strict):
    num_prompts: Count
    num_completions: Annotated[StrictInt, Field(ge=2)]
    temperature: Positive
    batch_size: Count


class Label(Strict):
    method: Literal["best_against_worst", "bradley_terry", "given"]
    reward: Reward
    scale: Positive


class Evaluation(Strict):
    split: Literal["validation", "test"]
    temperature: Positive
    judges: Annotated[list[Reward], Field(min_length=1)]
    num_resamples: Count


class Params(Strict):
    recipe: Name
    base: str
    compute: Compute
    data: Data
    sft: Optimiser
    sample: Sample
    label: Label
    train: Optimiser
    runs: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    evaluation: Evaluation

    @model_validator(mode="after")
    def _judges_include_the_gold_reward(self) -> "Params":
        judges = self.evaluation.judges
        if self.label.reward not in judges:
            raise ValueError(
                f"evaluation.judges: lacks '{self.label.reward}', which labels the pairs, got "
                f"{judges}; add it, and one judge that never labels"
            )
        if len(set(judges)) != len(judges):
            raise ValueError(
                f"evaluation.judges: names a judge twice, got {judges}; name each once"
            )
        if "sft" in self.runs:
            raise ValueError("runs.sft: 'sft' is the reference's own name, got a run; rename it")
        return self


class Pretrain(Strict):
    data: str
    column: str
    num_held_out: Count
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count
    context: Count
    num_steps: Count
    batch_size: Count
    micro_batch_size: Count
    learning_rate: Positive
    warmup: Share
    weight_decay: Annotated[float, Field(ge=0)]
    compute_dtype: Literal["float32", "bfloat16"]
    checkpoint_every: Count
    seed: Annotated[StrictInt, Field(ge=0)]
    num_threads: Count


class PretrainFile(Strict):
    pretrain: Pretrain


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


def load_params(path: Path = PARAMS) -> Params:
    """Read and check everything but the runs' hyperparameters, which need the losses: `bind`."""
    return _checked(Params, read_yaml(path), str(path))


def load_pretrain(path: Path) -> Pretrain:
    return _checked(PretrainFile, read_yaml(path), str(path)).pretrain


def read_yaml(path: Path) -> Any:
    """Parse a small YAML file, refusing aliases: a few lines of them can expand to gigabytes."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file, got nothing to read; run from the project's root")
    text = path.read_text()
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path}: too large, got {len(text)} bytes; at most {MAX_BYTES}")
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise ValueError(f"{path}: has a YAML alias, got '*'; write the value out")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML, got {error}; mend that line") from error


def dump_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def bind(params: Params, name: str) -> Run:
    """The run `name`: its loss looked up, its hyperparameters checked and bound."""
    from prefopt.losses import LOSSES

    where = f"runs.{name}"
    if name not in params.runs:
        raise ValueError(
            f"{where}: no such run, got '{name}'; known: {', '.join(params.runs)}"
            + _did_you_mean(name, params.runs)
        )
    row = dict(params.runs[name])
    loss_name = row.pop("loss", None)
    if not isinstance(loss_name, str) or loss_name not in LOSSES:
        raise ValueError(
            f"{where}.loss: no such loss, got {loss_name!r}; known: {', '.join(LOSSES)}"
            + _did_you_mean(str(loss_name), LOSSES)
        )
    entry = LOSSES[loss_name]
    overrides = {key: row.pop(key) for key in ("learning_rate", "num_epochs") if key in row}
    optimiser = _checked(Optimiser, {**params.train.model_dump(), **overrides}, where)
    schema = hyperparameter_schema(loss_name, entry.function)
    for key in row:
        if key not in schema.model_fields:
            reads = list(schema.model_fields)
            raise ValueError(
                f"{where}.{key}: no such parameter of '{loss_name}', got {row[key]!r}; it reads: "
                f"{', '.join(reads)}; any run may also set learning_rate, num_epochs"
                + _did_you_mean(key, reads)
            )
    model = _checked(schema, row, where)
    values = {key: getattr(model, key) for key in schema.model_fields}
    return Run(
        loss=functools.partial(entry.function, **values),
        at_reference=entry.at_reference(**values),
        beta=values.get("beta", 1.0),
        optimiser=optimiser,
        hyperparameters={"loss": loss_name, **row, **overrides},
    )


@functools.cache
def hyperparameter_schema(name: str, function: Callable[..., Any]) -> type[Strict]:
    """The keyword parameters of a loss as a pydantic model."""
    from prefopt.divergences import Divergence, divergence

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


def _checked(schema: type[Model], values: Any, where: str) -> Model:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_message(e, where, schema) for e in error.errors())) from None


def _message(error: Any, where: str, schema: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if path and where != str(PARAMS):
        path = f"{where}.{path}"
    got = error["input"]
    match error["type"]:
        case "extra_forbidden":
            known = _fields_at(schema, error["loc"][:-1])
            text = f"{path}: no such key, got {got!r}; known: {', '.join(known)}"
            return text + _did_you_mean(str(error["loc"][-1]), known)
        case "missing":
            return f"{path}: is missing, got nothing; add it"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{path}: {message}" if path else message
        case _:
            message = error["msg"].replace("Input should be", "must be")
            return f"{path or where}: {message}, got {got!r}; change it there"


def _fields_at(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        annotation = schema.model_fields[part].annotation
        assert isinstance(annotation, type)
        schema = annotation
    return list(schema.model_fields)


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean '{close[0]}'?" if close else ""


def apply_recipe(name: str) -> None:
    """Lay `recipes/NAME.yaml` over the committed params.yaml, keeping its comments.

    A recipe's `runs` replace the runs, any other section is merged key by key. Edits of a person
    in params.yaml that are neither committed nor a recipe's are never overwritten.

    Raises:
        ValueError: if there is no such recipe, or params.yaml holds such edits.
    """
    recipes = {path.stem: path for path in sorted(Path("recipes").glob("*.yaml"))}
    recipes.pop("base", None)  # makes data/base, `make base`
    if name not in recipes:
        raise ValueError(
            f"RECIPE: no such recipe, got '{name}'; known: {', '.join(recipes)}"
            + _did_you_mean(name, recipes)
        )
    committed = subprocess.run(
        ["git", "show", f"HEAD:./{PARAMS}"], capture_output=True, text=True, check=False
    )
    original = committed.stdout if committed.returncode == 0 else PARAMS.read_text()
    ours = {original, *(_overlaid(original, path.read_text()) for path in recipes.values())}
    if PARAMS.read_text() not in ours:
        raise ValueError(
            f"{PARAMS}: has edits of yours that recipe '{name}' would overwrite, got a file that "
            "is neither committed nor a recipe's; commit it, or `git checkout params.yaml`"
        )
    PARAMS.write_text(_overlaid(original, recipes[name].read_text()))


def _overlaid(original: str, recipe: str) -> str:
    from ruamel.yaml import YAML

    editor = YAML()
    editor.width = 120
    tree, overlay = editor.load(original), editor.load(recipe)
    for section, value in (overlay or {}).items():
        if isinstance(value, dict) and section != "runs":
            for key, leaf in value.items():
                tree[section][key] = leaf
        else:
            tree[section] = value
    stream = io.StringIO()
    editor.dump(tree, stream)
    return stream.getvalue() if overlay else original
