"""Reward models: sequence classifiers that read a prompt with its completion.

A classifier has one logit, or two, whose difference is then the reward. Prompt and completion are a
conversation where the tokenizer has a chat template, and stand one after the other where it has
none. A text longer than the model reads loses its beginning, and how many did is said.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefopt.packing import micro_batches
from prefopt.rewarding import rewards
from stages import models
from stages.choice import conversation, pinned

TOKEN_BUDGET = 4096  # of padded texts that are read at once


class Reader:
    """How a reward model reads texts: the same when it is trained and when it is asked.

    Args:
        name: a folder or a hub id, of a model of any kind.
        limit: of a text's tokens, if the model could read more.
    """

    def __init__(self, name: str, *, limit: int = sys.maxsize) -> None:
        self._tokenizer: Any = models.load_tokenizer(name)
        config = models.load_config(name).get_text_config()
        context = getattr(config, "max_position_embeddings", sys.maxsize)
        self.limit = min(self._tokenizer.model_max_length, context, limit)

    def tokens(self, prompt: str, completion: str) -> list[int]:
        """Token ids, as many as there are."""
        if self._tokenizer.chat_template is None:
            return self._tokenizer.encode(prompt + completion, split_special_tokens=True)
        said = [("user", prompt), ("assistant", completion)]
        return conversation(self._tokenizer, said, answered=True)

    def within(self, texts: Sequence[tuple[str, str]]) -> tuple[list[list[int]], int]:
        """Token ids of prompts with completions, the last ones that fit; how many were cut."""
        # Else it would warn of texts that are about to be cut.
        self._tokenizer.model_max_length = sys.maxsize
        found = [self.tokens(*text) for text in texts]
        return [text[-self.limit :] for text in found], sum(len(t) > self.limit for t in found)

    def save_with(self, model: models.PreTrainedModel, directory: Path) -> None:
        """Write the model with this tokenizer, which knows the limit."""
        self._tokenizer.model_max_length = self.limit
        models.save(model, self._tokenizer, directory)


class RewardModel:
    """A sequence classifier, ready to be asked.

    Args:
        name: a folder or a hub id.
        num_threads: other counts give other bits.
    """

    def __init__(self, name: str, *, num_threads: int) -> None:
        self._reader = Reader(name)
        self._model = models.load_classifier(name)
        self._num_threads = num_threads
        self.name = pinned(name, self._model, models.load_tokenizer(name))

    def __call__(self, texts: Sequence[tuple[str, str]]) -> list[float]:
        """The reward of every prompt with its completion; the same text has the same one."""
        distinct = list(dict.fromkeys(texts))
        tokens, num_cut = self._reader.within(distinct)
        if num_cut:
            sys.stderr.write(
                f"{self.name}: {num_cut} of {len(distinct)} texts are longer than the "
                f"{self._reader.limit} tokens that it reads; their beginnings are left out\n"
            )
        before = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)
        found = dict(zip(distinct, predicted(self._model, tokens), strict=True))
        torch.set_num_threads(before)
        return [found[text] for text in texts]


@torch.no_grad()
def predicted(model: models.PreTrainedModel, texts: Sequence[Sequence[int]]) -> list[float]:
    """Rewards of any number of texts, as token ids."""
    found = [0.0] * len(texts)
    for batch in micro_batches(range(len(texts)), list(map(len, texts)), TOKEN_BUDGET):
        values = rewards(model, [texts[i] for i in batch])
        for i, value in zip(batch, values.tolist(), strict=True):
            found[i] = value
    return found


def check(where: str, name: str) -> None:
    """Refuse a model that is no reward model, before its weights are read.

    Raises:
        ValueError: naming the remedy.
    """
    if models.is_local(name) and not any(Path(name).glob("*.safetensors")):
        raise ValueError(
            f"{where}: no weights there, got no *.safetensors in '{name}'; save the model with "
            "save_pretrained"
        )
    try:
        config = models.load_config(name)
    except OSError as error:
        raise ValueError(
            f"{where}: '{name}' cannot be loaded, got {error}; restore its files, or mend the name"
        ) from error
    if config.num_labels not in (1, 2):
        raise ValueError(
            f"{where}: '{name}' is no reward model, got {config.num_labels} labels; one with 1 or "
            "2 is needed"
        )
    architectures = config.architectures or []
    if not any("ForSequenceClassification" in each for each in architectures):
        raise ValueError(
            f"{where}: '{name}' is no sequence classifier, got {architectures}; name one, or train "
            "one from it under reward_models"
        )


def check_base(where: str, name: str) -> None:
    """Refuse to train from a model whose changes DVC would not see, or whose weights are no files.

    Raises:
        ValueError: naming the remedy.
    """
    if name.startswith("package:"):
        raise ValueError(
            f"{where}: weights inside a package cannot be trained to classify, got '{name}'; take "
            "sft, which was trained from them"
        )
    if name == "sft" or not models.is_local(name):
        return
    folders = (Path("data/base"), Path("data/rewards"))
    if not any(Path(name).resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError(
            f"{where}: neither in data/base nor in data/rewards, got '{name}'; copy it there, so "
            "that what depends on it is made again, or give sft or a hub id"
        )
    models.check(name)
