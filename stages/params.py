"""params.yaml and recipes -> frozen types; the only reader of YAML.

Every value is checked before any expensive work, and every refusal names the place, the value and
the remedy. What a run may say is its loss's business: `stages.runs`.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
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
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

OWN_PAIRS = "artefacts/pairs.parquet"  # those of the pipeline

Model = TypeVar("Model", bound=BaseModel)

Count = Annotated[StrictInt, Field(ge=1)]
Several = Annotated[StrictInt, Field(ge=2)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
# Names become stage names, file names and parts of commands, so their characters are few.
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
BUILT_IN = ("vader", "textblob")  # rewards that need no declaration
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
    split_by: Literal["shuffle", "digest"]
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


class Descent(Strict):
    """What every training says of its steps."""

    learning_rate: Positive
    num_epochs: Count
    batch_size: Count
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Share
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Positive
    top_layers: Annotated[StrictInt, Field(ge=0)]


class Optimiser(Descent):
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


class Sft(Optimiser):
    num_epochs: Annotated[StrictInt, Field(ge=0)]


class Sample(Strict):
    num_prompts: Count
    num_completions: Several
    num_validation_prompts: Annotated[StrictInt, Field(ge=0)]
    temperature: Positive
    batch_size: Count


class Label(Strict):
    method: Literal["best_against_worst", "bradley_terry", "given"]
    reward: Name
    scale: Positive
    num_ranked: Annotated[StrictInt, Field(ge=2, le=16)] | None


Reads = Literal["text", "completion"]  # the prompt with its completion, or the completion alone


class WordsReward(Strict):
    """Whether the text has one of these words, or how often; whole words, in any case."""

    words: Annotated[list[Annotated[str, Field(pattern=r"\S")]], Field(min_length=1)]
    count: StrictBool = False
    reads: Reads = "text"


class PatternReward(Strict):
    """Whether the text has a match of a regular expression, or how many."""

    pattern: Annotated[str, Field(min_length=1)]
    count: StrictBool = False
    reads: Reads = "text"

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"must be a regular expression of Python's re, got {pattern!r} ({error}); mend it"
            ) from None
        return pattern


class LengthReward(Strict):
    """How long the text is; tokens are those of the base's tokenizer."""

    length: Literal["characters", "words", "tokens"]
    reads: Reads = "completion"


class ClassifierReward(Strict):
    """The log-odds of a logistic regression on TF-IDF: a JSON file."""

    classifier: str
    reads: Reads = "text"


class PythonReward(Strict):
    """A function of your own, `module:function`, from texts to as many numbers."""

    python: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


class ModelReward(Strict):
    """A sequence classifier that is there: a folder or a hub id."""

    model: str
    num_threads: Count = 1


class TrainedReward(Strict):
    """A reward model that the stage `reward` trains."""

    trained: Name


class ThresholdReward(Strict):
    """Whether another reward is above a number."""

    above: float
    of: Name


Reward = (
    WordsReward
    | PatternReward
    | LengthReward
    | ClassifierReward
    | PythonReward
    | ModelReward
    | TrainedReward
    | ThresholdReward
)
# By the key that each of them alone has.
REWARDS: dict[str, type[Reward]] = {
    "words": WordsReward,
    "pattern": PatternReward,
    "length": LengthReward,
    "classifier": ClassifierReward,
    "python": PythonReward,
    "model": ModelReward,
    "trained": TrainedReward,
    "above": ThresholdReward,
}


class RewardTraining(Descent):
    """How the stage `reward` trains a reward model.

    `pairs` are the pipeline's, or a path to JSON lines; `margin` times the gold reward's lead is by
    how much a chosen completion should lead; `held_out` is a share of what prompts begin with.
    """

    base: str
    pairs: str
    margin: Annotated[float, Field(ge=0)] = 0.0
    held_out: Share = 0.2
    max_tokens: Count = 512
    seed: Annotated[StrictInt, Field(ge=0)] | None = None
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: Share = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    top_layers: Annotated[StrictInt, Field(ge=0)] = 0


def read_reward(written: dict[str, Any], where: str) -> Reward:
    """A reward as it is declared; one of its keys says which kind it is."""
    kinds = [kind for kind in REWARDS if kind in written]
    if len(kinds) != 1:
        raise ValueError(
            f"{where}: no reward of one kind, got {written!r}; give exactly one of "
            f"{', '.join(REWARDS)}"
        )
    return checked(REWARDS[kinds[0]], written, where)


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


class ExistingPolicy(Strict):
    """A row of `runs` that trains nothing: a model that is there, in data/models, or SFT's."""

    model: Annotated[str, Field(pattern=r"^(data/models/[\w.-]+|artefacts/models/sft)$")]


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


class HumanJudge(Strict):
    """People's votes: a folder with RUN.csv, of columns prompt, opponent and verdict."""

    kind: Literal["human"]
    votes: str


Judge = EndpointJudge | LocalJudge | HumanJudge
JUDGES: dict[str, type[Judge]] = {
    "endpoint": EndpointJudge,
    "local": LocalJudge,
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


class Drift(Strict):
    """How far new data may be from the last accepted ones; `stages.drift` says what is measured."""

    min_growth: Annotated[float, Field(ge=0)]
    max_growth: Positive
    max_length_change: Annotated[float, Field(ge=0)]
    max_duplicates: Annotated[float, Field(ge=0, le=1)]
    max_contradicted: Annotated[float, Field(ge=0, le=1)]


class Gate(Strict):
    """What a challenger must be to become the champion; `stages.gate` says how it is measured."""

    judge: Name
    alpha: Annotated[float, Field(gt=0, lt=1)]
    max_kl: Positive
    max_length: Positive
    max_displacement: Annotated[float, Field(ge=0, le=1)]
    min_agreement: Annotated[float, Field(ge=0, le=1)]


class Retrain(Strict):
    source: str | None
    run: Name
    warm_start: StrictBool
    drift: Drift
    gate: Gate


class Params(Strict):
    recipe: Name
    base: str
    compute: Compute
    data: Data
    sft: Sft
    sample: Sample
    label: Label
    revision: Revision
    train: Optimiser
    watch: Watching
    runs: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    rewards: dict[Name, dict[str, Any]]
    reward_models: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    judges: dict[Name, dict[str, Any]]
    exam: Exam
    evaluation: Evaluation
    retrain: Retrain

    @property
    def known_rewards(self) -> list[str]:
        return [*BUILT_IN, *self.rewards]

    def reward(self, name: str) -> Reward:
        """The declared reward called `name`."""
        return read_reward(self.rewards[name], f"rewards.{name}")

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

    def reward_model(self, name: str) -> RewardTraining:
        """How the reward model called `name` is trained."""
        if name not in self.reward_models:
            raise ValueError(
                f"reward_models: no such reward model, got '{name}'; known: "
                f"{', '.join(self.reward_models)}" + did_you_mean(name, self.reward_models)
            )
        return checked(RewardTraining, self.reward_models[name], f"reward_models.{name}")

    @model_validator(mode="after")
    def _reward_models_are_sound(self) -> "Params":
        for name in self.reward_models:
            training = self.reward_model(name)
            if training.margin and (training.pairs != OWN_PAIRS or self.label.method == "given"):
                raise ValueError(
                    f"reward_models.{name}.margin: is of the gold reward that labelled the pairs, "
                    f"got {training.margin} for pairs that it did not label; set it to 0"
                )
        return self

    @model_validator(mode="after")
    def _rewards_are_known(self) -> "Params":
        for name in self.rewards:
            if name in BUILT_IN:
                raise ValueError(
                    f"rewards.{name}: '{name}' is built in, got another reward of that name; "
                    "rename it"
                )
            declared = self.reward(name)
            if isinstance(declared, ThresholdReward):
                self._check_threshold(name, declared)
            if isinstance(declared, TrainedReward) and (declared.trained not in self.reward_models):
                raise ValueError(
                    f"rewards.{name}.trained: no such reward model, got '{declared.trained}'; "
                    f"known: {', '.join(self.reward_models)}"
                    + did_you_mean(declared.trained, self.reward_models)
                )
        self.check_reward_is_known("label.reward", self.label.reward)
        if self.label.method != "given" and self._is_trained(self.label.reward):
            raise ValueError(
                f"label.reward: would label the pairs that trained it, got '{self.label.reward}'; "
                "copy its folder from artefacts/rewards to data/rewards and name it there by "
                "`model`"
            )
        return self

    def _is_trained(self, name: str) -> bool:
        """Whether a reward rests on a model of `reward_models`."""
        written = self.rewards.get(name, {})
        return "trained" in written or ("above" in written and self._is_trained(written["of"]))

    def check_reward_is_known(self, where: str, name: str) -> None:
        """Refuse a name that no reward has."""
        if name not in self.known_rewards:
            raise ValueError(
                f"{where}: no such reward, got '{name}'; known: {', '.join(self.known_rewards)}"
                + did_you_mean(name, self.known_rewards)
            )

    def _check_threshold(self, name: str, declared: ThresholdReward) -> None:
        self.check_reward_is_known(f"rewards.{name}.of", declared.of)
        if declared.of in self.rewards and "above" in self.rewards[declared.of]:
            raise ValueError(
                f"rewards.{name}.of: is 0 or 1 itself, got '{declared.of}', which has a "
                "threshold; name a reward without one"
            )

    @model_validator(mode="after")
    def _judges_are_known(self) -> "Params":
        for name in self.judges:
            if name in self.known_rewards:
                raise ValueError(
                    f"judges.{name}: '{name}' is a reward's name, which judges by itself, got "
                    "another judge of that name; rename it"
                )
            self.judge(name)
        known = [*self.known_rewards, *self.judges]
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
    return params_of(_text_of(path), path)


def params_of(text: str, path: Path = PARAMS) -> Params:
    """What `load_params` would make of a file of this text."""
    tree = _parsed(text, path)
    _refuse_secrets(tree, [], path)
    return checked(Params, tree, str(path))


def with_runs(text: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of params.yaml with these rows after its last run; all else stays as it is written.

    Raises:
        ValueError: if the runs are written in braces.
    """
    root = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    (runs,) = (value for key, value in root.value if key.value == "runs")
    if runs.flow_style:
        raise ValueError(
            f"{PARAMS}:{runs.start_mark.line + 1}: runs are written in braces, got '{{'; write "
            "one run a line"
        )
    lines = text.splitlines(keepends=True)
    end = runs.value[-1][1].end_mark
    # Of a block it is where the next one begins, past comments that belong to that one.
    last = end.line if end.column else end.line - 1
    while not lines[last].strip() or lines[last].lstrip().startswith("#"):
        last -= 1
    lines[last] = lines[last].rstrip("\n") + "\n"
    indent = " " * runs.start_mark.column
    lines[last + 1 : last + 1] = [f"{indent}{run_line(*item)}\n" for item in rows.items()]
    return "".join(lines)


def run_line(name: str, row: Mapping[str, Any]) -> str:
    """A run as params.yaml has it, on one line."""
    return dump_yaml({name: dict(row)}, width=math.inf).strip()


def values_of(text: str, where: str) -> list[Any]:
    """Values with commas between them, each read as params.yaml would read it.

    But 1e-4 is a number, which YAML takes for a word because it has no point.

    Raises:
        ValueError: if it is no YAML, or a value comes twice.
    """
    try:
        found = [_number(value) for value in yaml.safe_load(f"[{text}]")]
    except yaml.YAMLError as error:
        raise ValueError(
            f"{where}: not valid YAML, got '{text}'; write values with commas between them"
        ) from error
    if not found:
        raise ValueError(f"{where}: no values, got '{text}'; write them with commas between them")
    for number, value in enumerate(found):
        if value in found[:number]:
            raise ValueError(f"{where}: a value twice, got {value!r}; keep one")
    return found


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def load_pretrain(path: Path) -> Pretrain:
    return checked(PretrainFile, read_yaml(path), str(path)).pretrain


def read_yaml(path: Path) -> Any:
    """Parse a small YAML file, refusing aliases: a few lines of them can expand to gigabytes."""
    return _parsed(_text_of(path), path)


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file, got nothing to read; run from the project's root")
    return path.read_text()


def _parsed(text: str, path: Path) -> Any:
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


def dump_yaml(tree: Any, *, width: float = 80) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=width)


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
