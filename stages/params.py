"""params.yaml and recipes -> frozen types; the only reader of YAML.

Every value is checked before any expensive work, and every refusal names the place, the value and
the remedy. What a run may say is its loss's business: `stages.runs`.
"""

import difflib
import re
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
PROGRAMMATIC = ("vader", "textblob")
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
    num_processes: Count


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
    num_ranked: Annotated[StrictInt, Field(ge=2, le=16)] | None


class Watching(Strict):
    every: Count | None
    num_generations: Annotated[StrictInt, Field(ge=0)]
    select: Select
    max_kl: Positive | None

    @property
    def writes(self) -> bool:
        """Whether a run writes completions while it trains."""
        return self.every is not None and self.num_generations > 0


class BestOf(Strict):
    """A row of `runs` that names no loss.

    Args:
        best_of: N.
        seed: of the draws; `compute.seed` if it names none.
    """

    best_of: Annotated[StrictInt, Field(ge=2, le=1024)]
    seed: Annotated[StrictInt, Field(ge=0)] | None = None


class Cost(Strict):
    """Prices of a million tokens, and the most that a judge may cost in all, in one currency."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]
    max: Positive


class EndpointJudge(Strict):
    """A model behind an OpenAI-compatible address; its key comes from the environment alone."""

    kind: Literal["endpoint"]
    model: str
    base_url: str | None = None
    key_variable: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] = "OPENAI_API_KEY"
    template: Name
    orders: Literal["both", "one"] = "both"
    max_calls: Count
    cost: Cost | None = None
    concurrency: Count = 8
    timeout: Positive = 60.0
    temperature: Annotated[float, Field(ge=0)] | None = 0.0
    max_tokens: Count = 300


class LocalJudge(Strict):
    """A causal LM on this machine: the likelier of the two answers."""

    kind: Literal["local"]
    model: str
    template: Name
    orders: Literal["both", "one"] = "both"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: Count = 1


class RewardModelJudge(Strict):
    """A sequence classifier; the text with the higher reward wins."""

    kind: Literal["reward_model"]
    model: str
    num_threads: Count = 1


class HumanJudge(Strict):
    """People's votes: a folder with RUN.csv, of columns prompt, opponent and verdict."""

    kind: Literal["human"]
    votes: str


Judge = EndpointJudge | LocalJudge | RewardModelJudge | HumanJudge
JUDGES: dict[str, type[Judge]] = {
    "endpoint": EndpointJudge,
    "local": LocalJudge,
    "reward_model": RewardModelJudge,
    "human": HumanJudge,
}


class Exam(Strict):
    source: str
    num_items: Count


class Evaluation(Strict):
    split: Literal["validation", "test"]
    temperature: Positive
    judges: Annotated[list[Name], Field(min_length=1)]
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
    judges: dict[Name, dict[str, Any]]
    exam: Exam
    evaluation: Evaluation

    def judge(self, name: str) -> Judge:
        """The declared judge called `name`."""
        written = self.judges[name]
        kind = written.get("kind")
        if kind not in JUDGES:
            raise ValueError(
                f"judges.{name}.kind: no such kind of judge, got {kind!r}; "
                f"known: {', '.join(JUDGES)}" + did_you_mean(str(kind), JUDGES)
            )
        return checked(JUDGES[kind], written, f"judges.{name}")

    @model_validator(mode="after")
    def _judges_are_known(self) -> "Params":
        for name in self.judges:
            if name in PROGRAMMATIC:
                raise ValueError(
                    f"judges.{name}: '{name}' is a programmatic judge's own name, got another "
                    "judge of that name; rename it"
                )
            self.judge(name)
        known = [*PROGRAMMATIC, *self.judges]
        for name in self.evaluation.judges:
            if name not in known:
                raise ValueError(
                    f"evaluation.judges: no such judge, got '{name}'; known: {', '.join(known)}"
                    + did_you_mean(name, known)
                )
        return self

    @model_validator(mode="after")
    def _enough_is_sampled_to_rank(self) -> "Params":
        ranked, sampled = self.label.num_ranked, self.sample.num_completions
        if self.label.method != "given" and ranked is not None and ranked > sampled:
            raise ValueError(
                f"label.num_ranked: more than a prompt has completions, got {ranked}; at most "
                f"sample.num_completions, {sampled}"
            )
        return self

    @model_validator(mode="after")
    def _steps_have_something_for_every_process(self) -> "Params":
        processes = self.compute.num_processes
        for name, section in (("sft", self.sft), ("train", self.train)):
            if processes > section.batch_size:
                raise ValueError(
                    f"compute.num_processes: more than a step has examples, got {processes} for "
                    f"{name}.batch_size {section.batch_size}; lower the one or raise the other"
                )
        return self

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
    tree = read_yaml(path)
    _refuse_secrets(tree, [], path)
    return checked(Params, tree, str(path))


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


# What looks like a credential, by its name or by itself. The value is never shown.
_SECRET_NAME = re.compile(
    r"(?i)(.*(api_?key|secret|passw(or)?d|credential|authorization)|key|token)"
)
_SECRET = re.compile(
    r"\b(sk|pk|rk|hf|gsk|xai|ghp|xox[bp])[-_][A-Za-z0-9_-]{16,}|\bAIza[\w-]{30,}|^Bearer |://[^/\s]*@"
)


def _refuse_secrets(tree: Any, place: list[str], path: Path) -> None:
    """What stands in params.yaml goes into git, locks, reports and trackers."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for name, value in items:
            _refuse_secrets(value, [*place, str(name)], path)
    elif isinstance(tree, str) and (
        _SECRET.search(tree) or (place and _SECRET_NAME.fullmatch(place[-1]))
    ):
        raise ValueError(
            f"{path}: '{'.'.join(place)}' holds what looks like a secret, got a value that is not "
            "shown; put it into an environment variable (OPENAI_API_KEY, or the judge's "
            "key_variable) and take a new one if this was ever committed"
        )


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
