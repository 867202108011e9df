"""Pairs as texts: the pipeline's own, or a data set's."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    map_table,
)
from stages.sources import TURN, read_texts


class TextPair(NamedTuple):
    """Two completions of a prompt, of which one is preferred.

    Args:
        split: train or validation.
        prompt: its text.
        chosen: a completion.
        rejected: the other.
        preference: P(chosen > rejected).
    """

    split: str
    prompt: str
    chosen: str
    rejected: str
    preference: float

    @property
    def opening(self) -> str:
        """What the prompt begins with: of a dialogue its first turn, which others may share."""
        return self.prompt.split(TURN)[0]

    def is_held_out(self, share: float) -> bool:
        """Whether the pair is of a share of openings, the same ones however the pairs grow."""
        digest = hashlib.sha256(self.opening.encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64


def pairs_of(source: str) -> Iterator[TextPair]:
    """The pairs of the pipeline, or of a data set with chosen and rejected completions.

    Args:
        source: the path of the pipeline's pairs, or of JSON lines.

    Raises:
        ValueError: if a row of the data set has no pair.
    """
    if Path(source) == PAIRS:
        yield from labelled_pairs()
        return
    for text in read_texts(Path(source), prompt_words=1):
        if not text.rejected:
            raise ValueError(
                f"{text.where}: has no pair, got a completion alone; give chosen and rejected"
            )
        yield TextPair("train", text.prompt, text.completion, text.rejected, 1.0)


def labelled_pairs() -> Iterator[TextPair]:
    """The pipeline's pairs."""
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
    candidates = map_table(CANDIDATES, CANDIDATES_SCHEMA)
    completions = map_table(COMPLETIONS, COMPLETIONS_SCHEMA)
    pairs = map_table(PAIRS, PAIRS_SCHEMA)
    texts: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[str, str]] = {}

    def know(row: int, tokens: list[int], text: str) -> None:
        prompt = tuple(prompts["tokens"][row])
        texts[prompt, tuple(tokens)] = (prompts["text"][row], text)

    for column in ("gold", "rejected"):
        for row, tokens in enumerate(prompts[f"{column}_tokens"]):
            know(row, tokens, prompts[column][row])
    for row, tokens, text in zip(
        candidates["prompt"], candidates["tokens"], candidates["text"], strict=True
    ):
        know(row, tokens, text)

    def text_of(row: int) -> tuple[str, str]:
        return texts[tuple(completions["prompt"][row]), tuple(completions["completion"][row])]

    for split, chosen, rejected, preference in zip(
        *(pairs[name] for name in PAIRS_SCHEMA.names), strict=True
    ):
        prompt, better = text_of(chosen)
        yield TextPair(split, prompt, better, text_of(rejected)[1], preference)
