"""Turn candidates into pairs, and into rankings: `python -m stages.label`.

By the gold reward (the best against the worst of a prompt's candidates, or two candidates and a
Bradley-Terry coin), or by the data's own pairs and lists.

With `label.num_ranked` K a prompt's first K candidates are its ranking, as they were drawn: what
was drawn twice stands there twice, as it weighs twice in any mean under the reference, and equal
rewards stay equal. The prompt's pair is of the same K. A prompt of fewer candidates, or whose K
candidates are all one completion, has no ranking; how many those are is said.
"""

import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    LISTS,
    LISTS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    RANKINGS,
    RANKINGS_SCHEMA,
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

BLOCK = 1024  # prompts that are held at a time


@dataclass(frozen=True)
class Pair:
    """Numbers of two completions of one prompt; `preference` is P(chosen > rejected)."""

    chosen: int
    rejected: int
    preference: float

    @property
    def sides(self) -> list[int]:
        """Both numbers, the lower one first."""
        return sorted((self.chosen, self.rejected))


@dataclass(frozen=True)
class Ranking:
    """Numbers of K completions of one prompt, and the reward of each."""

    completions: list[int]
    rewards: list[float]


@dataclass(frozen=True)
class Written:
    """What a prompt's labels are as they are written.

    Args:
        split: train or validation.
        prompt: token ids.
        completions: different ones, in the order of their rows in `completions`.
        pair: numbers are places among them.
        ranking: numbers are places among them too.
    """

    split: str
    prompt: list[int]
    completions: Sequence[list[int]]
    pair: Pair | None
    ranking: Ranking | None = None

    def rows(self, templates: Templates | None) -> list[tuple[list[int], list[int]]]:
        """The rows of `completions`, prompt and completion.

        All completions of the prompt; with templates also both sides of the pair under the prompt
        that shows the first, and both under the one that shows the second.
        """
        rows = [(self.prompt, tokens) for tokens in self.completions]
        if templates is not None and self.pair is not None:
            sides = [self.completions[place] for place in self.pair.sides]
            for shown in sides:
                revised = templates.revision_of(self.prompt, shown)
                rows += [(revised, tokens) for tokens in sides]
        return rows

    def pair_row(self, first: int) -> dict[str, Any]:
        """The row of `pairs`; the prompt's first row of `completions` is `first`."""
        assert self.pair is not None
        return {
            "split": self.split,
            "chosen": first + self.pair.chosen,
            "rejected": first + self.pair.rejected,
            "preference": self.pair.preference,
        }

    def ranking_row(self, first: int) -> dict[str, Any]:
        assert self.ranking is not None
        return {
            "split": self.split,
            "completions": [first + place for place in self.ranking.completions],
            "rewards": self.ranking.rewards,
        }

    def revision_row(self, first: int) -> dict[str, int]:
        """Both sides of the pair under the prompts that show the rejected, and the chosen one."""
        assert self.pair is not None
        place = {
            "rejected": self.pair.sides.index(self.pair.rejected),
            "chosen": self.pair.sides.index(self.pair.chosen),
        }
        revised = first + len(self.completions)
        return {
            f"{side}_given_{shown}": revised + 2 * place[shown] + place[side]
            for shown in place
            for side in ("chosen", "rejected")
        }


def main() -> None:
    params = load_params()
    num_ranked = params.label.num_ranked
    relevant = {
        "label": params.label.model_dump(),
        "rewards": params.rewards,
        "revision": params.revision.train,
        "seed": params.compute.seed,
    }
    with stage(
        "label",
        inputs=[PROMPTS, LISTS, TEMPLATES, CANDIDATES],
        outputs=[COMPLETIONS, PAIRS, RANKINGS, REVISIONS],
        params=relevant,
    ) as workspace:
        prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
        candidates = map_table(CANDIDATES, CANDIDATES_SCHEMA)
        if params.label.method == "given":
            found = given(prompts, map_table(LISTS, LISTS_SCHEMA), num_ranked)
        else:
            reward = load_reward(params, params.label.reward)
            found = judged(prompts, candidates, reward, params.label, params.compute.seed)
        templates = read_templates() if params.revision.train else None
        num_prompts, num_rows, num_pairs, num_rankings = 0, 0, Counter[str](), Counter[str]()
        with (
            TableWriter(workspace.partial(COMPLETIONS), COMPLETIONS_SCHEMA) as completions_table,
            TableWriter(workspace.partial(PAIRS), PAIRS_SCHEMA) as pairs_table,
            TableWriter(workspace.partial(RANKINGS), RANKINGS_SCHEMA) as rankings_table,
            TableWriter(workspace.partial(REVISIONS), REVISIONS_SCHEMA) as revisions_table,
        ):
            for block in blocks(found, BLOCK):
                rows = [labels.rows(templates) for labels in block]
                firsts = list(itertools.accumulate(map(len, rows), initial=num_rows))
                num_rows = firsts.pop()
                num_prompts += len(block)
                flat = list(itertools.chain(*rows))
                completions_table.extend(
                    {"prompt": [row[0] for row in flat], "completion": [row[1] for row in flat]}
                )
                placed = list(zip(block, firsts, strict=True))
                paired = [(labels, first) for labels, first in placed if labels.pair]
                ranked = [(labels, first) for labels, first in placed if labels.ranking]
                pairs_table.extend(
                    columns([labels.pair_row(first) for labels, first in paired], PAIRS_SCHEMA)
                )
                rankings_table.extend(
                    columns(
                        [labels.ranking_row(first) for labels, first in ranked], RANKINGS_SCHEMA
                    )
                )
                if templates is not None:
                    revisions = [labels.revision_row(first) for labels, first in paired]
                    revisions_table.extend(columns(revisions, REVISIONS_SCHEMA))
                num_pairs.update(labels.split for labels, _ in paired)
                num_rankings.update(labels.split for labels, _ in ranked)
        sys.stderr.write(
            f"label: {num_pairs.total()} of {num_prompts} prompts have a pair; what is compared of "
            "the others does not differ\n"
        )
        if num_ranked is not None:
            sys.stderr.write(
                f"label: {num_rankings.total()} of {num_prompts} prompts have a ranking of "
                f"{num_ranked}; the others have fewer completions, or one alone\n"
            )
        if not num_pairs["train"]:
            raise ValueError(
                f"label: no pair was found, got {len(prompts['text'])} prompts and "
                f"{len(candidates['text'])} candidates; method 'given' needs data with chosen and "
                "rejected, the others need candidates whose rewards differ"
            )
        if num_ranked is not None and not num_rankings["train"]:
            raise ValueError(
                f"label.num_ranked: no training prompt has so many completions with rewards, got "
                f"{num_ranked}; method 'given' needs data with completions and rewards, or set it "
                "to null"
            )


def columns(rows: Sequence[Mapping[str, Any]], schema: Any) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in schema.names}


def given(prompts: Table, lists: Table, num_ranked: int | None) -> Iterator[Written]:
    """The own labels of the training split, then those of the validation split."""
    for wanted in ("train", "validation"):
        for row, split in enumerate(prompts["split"]):
            if split != wanted:
                continue
            prompt, rewards = prompts["tokens"][row], lists["rewards"][row]
            if num_ranked is not None and rewards:
                rewards = rewards[:num_ranked]
                completions = lists["completions"][row][:num_ranked]
                pair = best_against_worst(rewards)
                yield labelled(split, prompt, completions, rewards, pair, num_ranked)
            elif prompts["rejected"][row]:
                sides = prompts["gold_tokens"][row], prompts["rejected_tokens"][row]
                yield Written(split, prompt, sides, Pair(0, 1, preference=1.0))


def judged(
    prompts: Table, candidates: Table, reward: Reward, label: Label, seed: int
) -> Iterator[Written]:
    """Labels of candidates by the gold reward, prompt by prompt."""
    coin = random.Random(seed)
    # Candidates of one prompt lie together.
    numbered = itertools.groupby(enumerate(candidates["prompt"]), key=lambda member: member[1])
    for row, members in numbered:
        numbers = [number for number, _ in itertools.islice(members, label.num_ranked)]
        texts = [Text(prompts["text"][row], candidates["text"][number]) for number in numbers]
        rewards = reward(texts)
        if label.method == "best_against_worst":
            pair = best_against_worst(rewards)
        else:
            pair = bradley_terry(rewards, label.scale, coin)
        yield labelled(
            prompts["split"][row],
            prompts["tokens"][row],
            [candidates["tokens"][number] for number in numbers],
            rewards,
            pair,
            label.num_ranked,
        )


def best_against_worst(rewards: Sequence[float]) -> Pair:
    """The first of the highest reward is preferred to the first of the lowest."""
    return Pair(rewards.index(max(rewards)), rewards.index(min(rewards)), preference=1.0)


def bradley_terry(rewards: Sequence[float], scale: float, coin: random.Random) -> Pair:
    """Two at random; the coin falls by the sigmoid of what one is ahead of the other."""
    chosen, rejected = coin.sample(range(len(rewards)), 2)
    # The sigmoid, as a hyperbolic tangent because that cannot overflow.
    ahead = (rewards[chosen] - rewards[rejected]) / scale
    preference = 0.5 * (1 + math.tanh(ahead / 2))
    if coin.random() > preference:
        chosen, rejected, preference = rejected, chosen, 1 - preference
    return Pair(chosen, rejected, preference)


def labelled(
    split: str,
    prompt: list[int],
    completions: Sequence[list[int]],
    rewards: Sequence[float],
    pair: Pair,
    num_ranked: int | None,
) -> Written:
    """A prompt's labels with the completions that they need, each once.

    Args:
        split: of the prompt.
        prompt: token ids.
        completions: candidates, token ids.
        rewards: theirs.
        pair: of their numbers; left out if its rewards or its tokens do not differ.
        num_ranked: K, where a ranking is wanted.
    """
    differ = rewards[pair.chosen] != rewards[pair.rejected] and (
        completions[pair.chosen] != completions[pair.rejected]
    )
    ranked = num_ranked == len(completions) and any(
        tokens != completions[0] for tokens in completions
    )
    needed = range(len(completions)) if ranked else pair.sides if differ else []
    different = list(dict.fromkeys(tuple(completions[number]) for number in needed))
    place = {number: different.index(tuple(completions[number])) for number in needed}
    return Written(
        split,
        prompt,
        [list(tokens) for tokens in different],
        Pair(place[pair.chosen], place[pair.rejected], pair.preference) if differ else None,
        Ranking(list(place.values()), list(rewards)) if ranked else None,
    )


if __name__ == "__main__":
    program(main)
