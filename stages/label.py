"""Turn candidates into pairs: `python -m stages.label`.

By the gold reward (the best against the worst of a prompt's candidates, or two candidates and a
Bradley-Terry coin), or by the data's own pairs.
"""

import math
import random
from collections import defaultdict
from typing import Any

from stages import judges
from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    program,
    read_table,
    stage,
    write_table,
)
from stages.params import Label, load_params

Table = dict[str, list[Any]]


def main() -> None:
    params = load_params()
    relevant = {"label": params.label.model_dump(), "seed": params.compute.seed}
    with stage(
        "label", inputs=[PROMPTS, CANDIDATES], outputs=[COMPLETIONS, PAIRS], params=relevant
    ) as workspace:
        prompts = read_table(PROMPTS, PROMPTS_SCHEMA)
        candidates = read_table(CANDIDATES, CANDIDATES_SCHEMA)
        if params.label.method == "given":
            completions, pairs = given(prompts)
        else:
            chosen_among = judged(prompts, candidates, params.label, params.compute.seed)
            completions, pairs = compacted(prompts, candidates, chosen_among)
        if not pairs["chosen"]:
            raise ValueError(
                f"label: no pair was found, got {len(prompts['text'])} prompts and "
                f"{len(candidates['text'])} candidates; method 'given' needs data with chosen and "
                "rejected, the others need candidates whose rewards differ"
            )
        write_table(workspace.partial(COMPLETIONS), completions, COMPLETIONS_SCHEMA)
        write_table(workspace.partial(PAIRS), pairs, PAIRS_SCHEMA)


def given(prompts: Table) -> tuple[Table, Table]:
    """The training split's own pairs."""
    rows = [
        row
        for row, (split, rejected) in enumerate(
            zip(prompts["split"], prompts["rejected"], strict=True)
        )
        if split == "train" and rejected
    ]
    completions: Table = {"prompt": [], "completion": []}
    for row in rows:
        for column in ("gold_tokens", "rejected_tokens"):
            completions["prompt"].append(prompts["tokens"][row])
            completions["completion"].append(prompts[column][row])
    pairs = {
        "chosen": list(range(0, 2 * len(rows), 2)),
        "rejected": list(range(1, 2 * len(rows), 2)),
        "preference": [1.0] * len(rows),
    }
    return completions, pairs


def judged(prompts: Table, candidates: Table, label: Label, seed: int) -> Table:
    """Pairs of candidate rows; a prompt whose compared candidates have one reward gives none."""
    reward = judges.reward(label.reward)
    rewards = [
        reward(prompts["text"][row] + text)
        for row, text in zip(candidates["prompt"], candidates["text"], strict=True)
    ]
    by_prompt: defaultdict[int, list[int]] = defaultdict(list)
    for candidate, row in enumerate(candidates["prompt"]):
        by_prompt[row].append(candidate)
    coin = random.Random(seed)
    pairs: Table = {"chosen": [], "rejected": [], "preference": []}
    for group in by_prompt.values():
        if label.method == "best_against_worst":
            chosen = max(group, key=lambda candidate: rewards[candidate])
            rejected = min(group, key=lambda candidate: rewards[candidate])
            preference = 1.0
        else:
            chosen, rejected = coin.sample(group, 2)
            # The sigmoid, as a hyperbolic tangent because that cannot overflow.
            ahead = (rewards[chosen] - rewards[rejected]) / label.scale
            preference = 0.5 * (1 + math.tanh(ahead / 2))
            if coin.random() > preference:
                chosen, rejected, preference = rejected, chosen, 1 - preference
        if rewards[chosen] != rewards[rejected] and (
            candidates["tokens"][chosen] != candidates["tokens"][rejected]
        ):
            pairs["chosen"].append(chosen)
            pairs["rejected"].append(rejected)
            pairs["preference"].append(preference)
    return pairs


def compacted(prompts: Table, candidates: Table, pairs: Table) -> tuple[Table, Table]:
    """The candidates that pairs use as `completions`, and the pairs pointing there."""
    used = sorted({*pairs["chosen"], *pairs["rejected"]})
    row_of = {candidate: row for row, candidate in enumerate(used)}
    completions = {
        "prompt": [prompts["tokens"][candidates["prompt"][candidate]] for candidate in used],
        "completion": [candidates["tokens"][candidate] for candidate in used],
    }
    sides = {
        side: [row_of[candidate] for candidate in pairs[side]] for side in ("chosen", "rejected")
    }
    return completions, pairs | sides


if __name__ == "__main__":
    program(main)
