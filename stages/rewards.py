"""Rewards: what says how good each of some texts is. Higher is better.

`vader` and `textblob` are there by name; others are declared under `rewards` in params.yaml. A
reward is asked for many texts at once and answers with as many finite numbers, or is refused.
Rewards load what they need when they are loaded themselves, and not before.
"""

import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from stages import tfidf
from stages.artefacts import digest
from stages.params import (
    BUILT_IN,
    ClassifierReward,
    LengthReward,
    ModelReward,
    Params,
    PatternReward,
    PythonReward,
    Reads,
    ThresholdReward,
    WordsReward,
    read_reward,
)
from stages.params import Reward as Declared

FOLDER = Path("data/rewards")


class Text(NamedTuple):
    """What a reward reads."""

    prompt: str
    completion: str


Measure = Callable[[Sequence[Text]], Sequence[float]]


@dataclass(frozen=True)
class Reward:
    """A reward, ready to be asked.

    Args:
        name: in params.yaml.
        identity: all that its numbers depend on but the texts.
        measure: a number a text; whatever it returns is checked.
    """

    name: str
    identity: dict[str, str]
    measure: Measure

    def __call__(self, texts: Sequence[Text]) -> list[float]:
        """The reward of every text, in their order.

        Raises:
            ValueError: if the answer is not one finite number a text.
        """
        found: Any = self.measure(texts)
        if isinstance(found, str) or not hasattr(found, "__len__"):
            raise ValueError(
                f"reward '{self.name}': no list of numbers, got {found!r:.60} for {len(texts)} "
                "texts; return one number for each of them"
            )
        if len(found) != len(texts):
            raise ValueError(
                f"reward '{self.name}': not one number a text, got {len(found)} for {len(texts)} "
                "texts; return one for each of them, in their order"
            )
        for row, (text, value) in enumerate(zip(texts, found, strict=True)):
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(
                    f"reward '{self.name}': no finite number for text {row} of {len(texts)}, got "
                    f"{value!r:.60} for {text.prompt + text.completion!r:.80}; mend the reward, or "
                    "leave such texts out"
                )
        return [float(value) for value in found]


def load_reward(params: Params, name: str) -> Reward:
    """The reward called `name` in params.yaml.

    Raises:
        ValueError: if there is none, or what it needs is missing or wrong.
    """
    if name in BUILT_IN:
        measure = {"vader": _vader, "textblob": _textblob}[name]()
        return Reward(name, {"kind": "programmatic", "reward": name}, measure)
    params.check_reward_is_known("reward", name)
    return made(params, name, params.reward(name))


def written_reward(params: Params, written: dict[str, Any], where: str) -> Reward:
    """A reward that is written where it is used, and so has that place for its name."""
    return made(params, where, read_reward(written, where))


def check_reward(params: Params, name: str) -> None:
    """Refuse a declared reward whose files are missing, damaged, or not where DVC watches them."""
    declared = params.reward(name)
    if isinstance(declared, ModelReward):
        _check_model(f"rewards.{name}.model", declared.model)
    else:
        made(params, name, declared)


def made(params: Params, name: str, declared: Declared) -> Reward:
    """A declared reward, ready to be asked."""
    identity = {"kind": _kind(declared), "reward": name}
    match declared:
        case WordsReward():
            # Not \b: a word may begin or end with another sign, as `c++` does.
            words = "|".join(map(re.escape, declared.words))
            pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE)
            identity |= {"matches": pattern.pattern, "count": str(declared.count)}
            return Reward(name, identity, _matches(pattern, declared.count, declared.reads))
        case PatternReward():
            pattern = re.compile(declared.pattern)
            identity |= {"matches": pattern.pattern, "count": str(declared.count)}
            return Reward(name, identity, _matches(pattern, declared.count, declared.reads))
        case LengthReward():
            identity |= {"unit": declared.length}
            return Reward(name, identity, _each(_length(params, declared), declared.reads))
        case ClassifierReward():
            path = watched(f"rewards.{name}.classifier", declared.classifier)
            identity |= {"file": digest(path)[:12]}
            return Reward(name, identity, _each(tfidf.load(path).log_odds, declared.reads))
        case PythonReward():
            function, identity["file"] = _function(f"rewards.{name}.python", declared.python)
            return Reward(name, identity | {"function": declared.python}, function)
        case ModelReward():
            from stages.reward_models import RewardModel

            _check_model(f"rewards.{name}.model", declared.model)
            model = RewardModel(declared.model, num_threads=declared.num_threads)
            return Reward(name, {"kind": "reward_model", "model": model.name}, model)
        case ThresholdReward():
            other, above = load_reward(params, declared.of), declared.above
            identity |= {"above": str(above), **{f"of_{k}": v for k, v in other.identity.items()}}
            return Reward(name, identity, lambda texts: [float(r > above) for r in other(texts)])


def watched(where: str, path: str) -> Path:
    """A file or folder in `data/rewards`: the stages that ask rewards depend on that folder.

    Raises:
        ValueError: if it is not there.
    """
    found = Path(path)
    if not found.resolve().is_relative_to(FOLDER.resolve()) or not found.exists():
        raise ValueError(
            f"{where}: nothing within {FOLDER}, got '{path}'; copy it there, so that what depends "
            "on it is made again when it changes"
        )
    return found


def _check_model(where: str, model: str) -> None:
    from stages import models
    from stages.reward_models import check

    if models.is_local(model):
        watched(where, model)
    check(where, model)


def _kind(declared: Declared) -> str:
    return type(declared).__name__.removesuffix("Reward").lower()


def _read(text: Text, reads: Reads) -> str:
    return text.completion if reads == "completion" else text.prompt + text.completion


def _each(measure: Callable[[str], float], reads: Reads) -> Measure:
    return lambda texts: [measure(_read(text, reads)) for text in texts]


def _matches(pattern: re.Pattern[str], count: bool, reads: Reads) -> Measure:
    if count:
        return _each(lambda text: float(sum(1 for _ in pattern.finditer(text))), reads)
    return _each(lambda text: float(pattern.search(text) is not None), reads)


def _length(params: Params, declared: LengthReward) -> Callable[[str], float]:
    if declared.length == "characters":
        return len
    if declared.length == "words":
        return lambda text: len(text.split())
    from stages.models import load_tokenizer

    tokenizer = load_tokenizer(params.base)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _function(where: str, named: str) -> tuple[Measure, str]:
    """A function of a module in `data/rewards` or of an installed one, and its file's digest.

    Raises:
        ValueError: if there is no such module, no such function, or it lies elsewhere.
    """
    module, _, name = named.partition(":")
    own = FOLDER / f"{module}.py"
    spec = (
        importlib.util.spec_from_file_location(module, own)
        if own.is_file()
        else _installed(where, module)
    )
    if spec is None or spec.loader is None or spec.origin is None:
        raise ValueError(
            f"{where}: no such module, got '{module}'; write {own}, or install the package that "
            "has it"
        )
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    if not callable(getattr(loaded, name, None)):
        raise ValueError(f"{where}: no such function in {spec.origin}, got '{name}'; mend the name")
    return getattr(loaded, name), digest(Path(spec.origin))[:12]


def _installed(where: str, module: str) -> ModuleSpec | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package that it would be in
        return None
    origin = Path(spec.origin) if spec is not None and spec.origin is not None else Path("/")
    if origin.is_relative_to(Path.cwd()) and "site-packages" not in origin.parts:
        raise ValueError(
            f"{where}: neither in {FOLDER} nor of an installed package, got '{module}' at "
            f"{origin}; move it there, so that what depends on it is made again"
        )
    return spec


def _vader() -> Measure:
    """Compound sentiment in [-1, 1]. Hutto and Gilbert 2014."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return _each(lambda text: analyzer.polarity_scores(text)["compound"], "text")


def _textblob() -> Measure:
    """Polarity in [-1, 1] of TextBlob's pattern lexicon, made apart from VADER's."""
    from textblob.en import sentiment

    return _each(lambda text: sentiment(text)[0], "text")
