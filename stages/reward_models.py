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
    """

    def __init__(self, name: str) -> None:
        self._tokenizer: Any = models.load_tokenizer(name)
        context = getattr(models.load_config(name).get_text_config(), "max_position_embeddings", 0)
        self.limit = min(self._tokenizer.model_max_length, context or sys.maxsize)

    def tokens(self, prompt: str, completion: str) -> list[int]:
        """Token ids, as many as there are."""
        if self._tokenizer.chat_template is None:
            return self._tokenizer.encode(prompt + completion, split_special_tokens=True)
        said = [("user", prompt), ("assistant", completion)]
        return conversation(self._tokenizer, said, answered=True)

    def within(self, texts: Sequence[tuple[str, str]]) -> tuple[list[list[int]], int]:
        """Token ids of prompts with completions, the last ones that fit; how many were cut."""
        found = [self.tokens(*text) for text in texts]
        return [text[-self.limit :] for text in found], sum(len(t) > self.limit for t in found)


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
