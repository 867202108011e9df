"""Turn candidates into pairs: `python -m stages.label`.

By the gold reward (the best against the worst of a prompt's candidates, or two candidates and a
Bradley-Terry coin), or by the data's own pairs.
"""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    REVISIONS,
    REVISIONS_SCHEMA,
    TEMPLATES,
    Column,
    TableWriter,
    blocks,
    map_table,
    program,
    stage,
)
from stages.params import Label, load_params
from stages.rewards import Reward, Text, load_reward
from stages.templates import Templates, read_templates

Table = Mapping[str, Column] | Mapping[str, Sequence[Any]]

BLOCK = 1024  # pairs that are held at a time


@dataclass(frozen=True)
class Pair:
    """Numbers of two candidates of one prompt; `preference` is P(chosen > rejected)."""

    chosen: int
    rejected: int
    preference: float


@dataclass(frozen=True)
class Written:
    """A pair as it is written.

    Args:
        split: train or validation.
        prompt: token ids.
        completions: two, in the order of their rows in `completions`.
        chosen: 0 or 1, the place of the chosen one.
        preference: P(chosen > rejected).
    """

    split: str
    prompt: list[int]
    completions: tuple[list[int], list[int]]
    chosen: int
    preference: float

    def rows(self, templates: Templates | None) -> list[tuple[list[int], list[int]]]:
        """The pair's rows of `completions`, prompt and completion.

        Both completions of the prompt; with templates also both of the prompt that shows the
        first, and both of the one that shows the second.
        """
        prompts = [self.prompt]
        if templates is not None:
            prompts += [templates.revision_of(self.prompt, shown) for shown in self.completions]
        return [(prompt, tokens) for prompt in prompts for tokens in self.completions]

    def pointers(self, first: int) -> dict[str, int]:
        """Rows of both sides, the pair's first row being `first`."""
        return {"chosen": first + self.chosen, "rejected": first + 1 - self.chosen}

    def revision_pointers(self, first: int) -> dict[str, int]:
        """Rows of both sides under the prompts that show the rejected, and the chosen one."""
        shown = {"rejected": 1 - self.chosen, "chosen": self.chosen}
        return {
            f"{side}_given_{other}": row + 2 + 2 * place
            for other, place in shown.items()
            for side, row in self.pointers(first).items()
        }


def main() -> None:
    params = load_params()
    relevant = {
        "label": params.label.model_dump(),
        "rewards": params.rewards,
        "revision": params.revision.train,
        "seed": params.compute.seed,
    }
    with stage(
        "label",
        inputs=[PROMPTS, TEMPLATES, CANDIDATES],
        outputs=[COMPLETIONS, PAIRS, REVISIONS],
        params=relevant,
    ) as workspace:
        prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
        candidates = map_table(CANDIDATES, CANDIDATES_SCHEMA)
        if params.label.method == "given":
            found = given(prompts)
        else:
            reward = load_reward(params, params.label.reward)
            pairs = judged(prompts, candidates, reward, params.label, params.compute.seed)
            found = written(prompts, candidates, pairs)
        templates = read_templates() if params.revision.train else None
        num_rows = num_pairs = 0
        with (
            TableWriter(workspace.partial(COMPLETIONS), COMPLETIONS_SCHEMA) as completions_table,
            TableWriter(workspace.partial(PAIRS), PAIRS_SCHEMA) as pairs_table,
            TableWriter(workspace.partial(REVISIONS), REVISIONS_SCHEMA) as revisions_table,
        ):
            for block in blocks(found, BLOCK):
                rows = [pair.rows(templates) for pair in block]
                firsts = list(itertools.accumulate(map(len, rows), initial=num_rows))
                num_rows = firsts.pop()
                prompted, completed = zip(*itertools.chain(*rows), strict=True)
                completions_table.extend({"prompt": prompted, "completion": completed})
                placed = list(zip(block, firsts, strict=True))
                pairs_table.extend(
                    {
                        "split": [pair.split for pair in block],
                        **columns([pair.pointers(first) for pair, first in placed]),
                        "preference": [pair.preference for pair in block],
                    }
                )
                if templates is not None:
                    revisions_table.extend(
                        columns([pair.revision_pointers(first) for pair, first in placed])
                    )
                num_pairs += sum(pair.split == "train" for pair in block)
        if not num_pairs:
            raise ValueError(
                f"label: no pair was found, got {len(prompts['text'])} prompts and "
                f"{len(candidates['text'])} candidates; method 'given' needs data with chosen and "
                "rejected, the others need candidates whose rewards differ"
            )


def columns(rows: Sequence[Mapping[str, int]]) -> dict[str, list[int]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def given(prompts: Table) -> Iterator[Written]:
    """The own pairs of the training split, then those of the validation split."""
    for wanted in ("train", "validation"):
        for row, split in enumerate(prompts["split"]):
            if split == wanted and prompts["rejected"][row]:
                sides = prompts["gold_tokens"][row], prompts["rejected_tokens"][row]
                yield Written(split, prompts["tokens"][row], sides, chosen=0, preference=1.0)


def judged(
    prompts: Table, candidates: Table, reward: Reward, label: Label, seed: int
) -> Iterator[Pair]:
    """Pairs of candidates; a prompt whose compared candidates have one reward gives none."""
    coin = random.Random(seed)
    # Candidates of one prompt lie together.
    numbered = itertools.groupby(enumerate(candidates["prompt"]), key=lambda member: member[1])
    for row, members in numbered:
        prompt = prompts["text"][row]
        numbers = [number for number, _ in members]
        texts = [Text(prompt, candidates["text"][number]) for number in numbers]
        rewards = dict(zip(numbers, reward(texts), strict=True))
        if label.method == "best_against_worst":
            chosen, rejected = (
                max(rewards, key=rewards.__getitem__),
                min(rewards, key=rewards.__getitem__),
            )
            preference = 1.0
        else:
            chosen, rejected = coin.sample(list(rewards), 2)
            # The sigmoid, as a hyperbolic tangent because that cannot overflow.
            ahead = (rewards[chosen] - rewards[rejected]) / label.scale
            preference = 0.5 * (1 + math.tanh(ahead / 2))
            if coin.random() > preference:
                chosen, rejected, preference = rejected, chosen, 1 - preference
        if rewards[chosen] != rewards[rejected] and (
            candidates["tokens"][chosen] != candidates["tokens"][rejected]
        ):
            yield Pair(chosen, rejected, preference)


def written(prompts: Table, candidates: Table, pairs: Iterable[Pair]) -> Iterator[Written]:
    """Pairs with their tokens, those of the earlier candidate first."""
    for pair in pairs:
        numbers = sorted((pair.chosen, pair.rejected))
        first, second = (candidates["tokens"][number] for number in numbers)
        row = candidates["prompt"][pair.chosen]
        yield Written(
            prompts["split"][row],
            prompts["tokens"][row],
            (first, second),
            numbers.index(pair.chosen),
            pair.preference,
        )


if __name__ == "__main__":
    program(main)
