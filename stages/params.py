"""params.yaml and recipes -> frozen types; the only reader of YAML.

Every value is checked before any expensive work, and every refusal names the place, the value and
the remedy. What a run may say is its loss's business: `stages.runs`.
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

PARAMS = Path("params.yaml")
MAX_BYTES = 1_000_000

Model = TypeVar("Model", bound=BaseModel)

Count = Annotated[StrictInt, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
# Names become stage names, file names and parts of commands, so their characters are few.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Reward = Literal["vader", "textblob"]
# `last`, or a metric of a look: of the loss the lowest, of the others the highest.
Select = Literal[
    "last", "validation/loss", "validation/rewards/accuracies", "validation/rewards/margins"
]


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Compute(Strict):
    seed: Annotated[StrictInt, Field(ge=0)]
    num_threads: Count
    dtype: Literal["float32", "bfloat16"]
    generation: Literal["torch", "vllm"]
    token_budget: Count
    checkpoint_every: Count


class Data(Strict):
    source: str
    prompt_words: Count
    max_completion_tokens: Count
    num_train: Count | None
    num_validation: Count
    num_test: Count
    chat: bool
    shifted: str
    num_shifted: Annotated[StrictInt, Field(ge=0)]


class Revision(Strict):
    template: str
    train: bool
    rounds: Annotated[StrictInt, Field(ge=0, le=100)]


class Lora(Strict):
    """Low-rank adapters; their dropout is always 0, because it would make log-ratios lie."""

    rank: Count
    alpha: Positive
    targets: str | Annotated[list[str], Field(min_length=1)]

    @field_validator("targets", mode="before")
    @classmethod
    def _named_or_all(cls, targets: Any) -> Any:
        if targets == "all-linear" or isinstance(targets, list):
            return targets
        raise ValueError(
            f"must be all-linear or a list of names of modules, got {targets!r}; change it there"
        )


class Optimiser(Strict):
    learning_rate: Positive
    num_epochs: Count
    batch_size: Count
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Share
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Positive
    top_layers: Annotated[StrictInt, Field(ge=0)]
    lora: Lora | None
    activation_checkpointing: StrictBool

    @model_validator(mode="after")
    def _one_choice_of_what_trains(self) -> "Optimiser":
        if self.lora is not None and self.top_layers:
            raise ValueError(
                f"top_layers: adapters train in the place of layers, got {self.top_layers} with "
                "lora; set top_layers to 0, or lora to null"
            )
        return self


class Sample(Strict):
    num_prompts: Count
    num_completions: Annotated[StrictInt, Field(ge=2)]
    num_validation_prompts: Annotated[StrictInt, Field(ge=0)]
    temperature: Positive
    batch_size: Count


class Label(Strict):
    method: Literal["best_against_worst", "bradley_terry", "given"]
    reward: Reward
    scale: Positive


class Watching(Strict):
    every: Count | None
    num_generations: Annotated[StrictInt, Field(ge=0)]
    select: Select
    max_kl: Positive | None

    @property
    def writes(self) -> bool:
        """Whether a run writes completions while it trains."""
        return self.every is not None and self.num_generations > 0


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
    revision: Revision
    train: Optimiser
    watch: Watching
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


def load_params(path: Path = PARAMS) -> Params:
    """Read and check everything but the runs' hyperparameters: `stages.runs.bind` does."""
    return checked(Params, read_yaml(path), str(path))


def load_pretrain(path: Path) -> Pretrain:
    return checked(PretrainFile, read_yaml(path), str(path)).pretrain


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
        _refuse_repeated_keys(yaml.compose(text, yaml.SafeLoader), path)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML, got {error}; mend that line") from error


def _refuse_repeated_keys(node: yaml.Node | None, path: Path) -> None:
    """YAML would keep the last of them and say nothing."""
    if isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"{path}:{line}: a key twice, got '{key.value}'; keep one")
            seen.add(key.value)
            _refuse_repeated_keys(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value, path)


def dump_yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def checked(schema: type[Model], values: Any, where: str) -> Model:
    """`values` as the schema's frozen type; `where` is a file, or a path inside params.yaml."""
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
            return text + did_you_mean(str(error["loc"][-1]), known)
        case "missing":
            return f"{path}: is missing, got nothing; add it"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{path}: {message}" if path else message
        case _:
            message = error["msg"].replace("Input should be", "must be")
            return f"{path or where}: {message}, got {got!r}; change it there"


def _fields_at(schema: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        annotation = schema.model_fields[part].annotation
        # A section that may be null is a union with None.
        (schema,) = [t for t in get_args(annotation) or [annotation] if t is not NoneType]
    return list(schema.model_fields)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: the nearest known word, if one is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f". Did you mean '{close[0]}'?" if close else ""
