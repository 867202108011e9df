"""Sampling beside transformers' `generate`: `python -m benchmarks.generation`.

Each contestant samples the same prompts from the same weights with random numbers of its own, so
lengths differ a little; what counts is completion tokens a second of CPU time.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.meters import machine, timed
from prefopt.generation import sample
from prefopt.packing import Row
from prefopt.scoring import token_logps
from stages import models
from stages.params import load_params
from stages.prepare import first_of_each_prompt
from stages.sources import read_texts

REVIEWS = Path("data/reviews.json")
OUT = Path(__file__).parent / "results/generation-cpu.json"
ROUNDS = 3
# Optimiser steps of SFT, after which completions end where the reviews' sentences do.
STEPS = 40
BATCH = 32


@dataclass(frozen=True)
class Workload:
    """What is sampled.

    Args:
        title: of its table.
        prompts: token ids.
        completions: of each prompt.
        max_new_tokens: of a completion.
    """

    title: str
    prompts: list[list[int]]
    completions: int
    max_new_tokens: int


Sampler = Callable[[Workload, int], list[int]]


@dataclass(frozen=True)
class Contestants:
    """The same weights under two attentions: `generate` pads, so it needs a model with masks."""

    ours: PreTrainedModel
    theirs: Any
    eos: int
    pad: int

    def samplers(self) -> dict[str, Sampler]:
        return {
            "generate, 8 prompts": self._generate(8, in_order=False),
            "generate, 8 prompts, sorted by length": self._generate(8, in_order=True),
            "ours, 64 rows of one prompt length": self._ours(self.theirs, 64),
            "ours, 8 lanes": self._ours(self.ours, 8),
            "ours, 64 lanes": self._ours(self.ours, 64),
        }

    def _generate(self, batch_size: int, *, in_order: bool) -> Sampler:
        def run(work: Workload, seed: int) -> list[int]:
            torch.manual_seed(seed)
            prompts = sorted(work.prompts, key=len) if in_order else work.prompts
            lengths: list[int] = []
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                longest = max(map(len, batch))
                tokens = torch.full((len(batch), longest), self.pad)
                mask = torch.zeros_like(tokens)
                for line, seen, prompt in zip(tokens, mask, batch, strict=True):
                    line[longest - len(prompt) :] = torch.tensor(prompt)
                    seen[longest - len(prompt) :] = 1
                made: Any = self.theirs.generate(
                    tokens,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=work.completions,
                    max_new_tokens=work.max_new_tokens,
                    eos_token_id=self.eos,
                    pad_token_id=self.pad,
                    use_cache=True,
                )
                for row in made[:, longest:].tolist():
                    lengths.append(row.index(self.eos) + 1 if self.eos in row else len(row))
            return lengths

        return run

    def _ours(self, policy: PreTrainedModel, batch_size: int) -> Sampler:
        def run(work: Workload, seed: int) -> list[int]:
            prompts = [prompt for prompt in work.prompts for _ in range(work.completions)]
            completions = sample(
                policy,
                prompts,
                [seed * 1_000_003 + row for row in range(len(prompts))],
                max_new_tokens=work.max_new_tokens,
                temperature=1.0,
                eos=self.eos,
                batch_size=batch_size,
                progress=lambda _: None,
            )
            return list(map(len, completions))

        return run


def tuned(base: str, rows: Sequence[Row], directory: Path) -> None:
    """Teach the base where a sentence ends, and save it."""
    policy = models.load_policy(base)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=5e-4, weight_decay=0.0)
    for step in range(STEPS):
        loss = -torch.cat(token_logps(policy, rows[step * BATCH : (step + 1) * BATCH])).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    models.save(policy, models.load_tokenizer(base), directory)


def rows_of_reviews(base: str, prompt_words: int, longest: int) -> list[Row]:
    texts = list(first_of_each_prompt(read_texts(REVIEWS, prompt_words)))
    tokenizer = models.load_tokenizer(base)

    def ids(column: list[str]) -> list[list[int]]:
        return tokenizer(column, add_special_tokens=False)["input_ids"]

    bos, eos = models.bos(tokenizer), models.eos(tokenizer)
    return [
        Row([bos, *prompt], [*completion, eos][:longest])
        for prompt, completion in zip(
            ids([text.prompt for text in texts]),
            ids([text.completion for text in texts]),
            strict=True,
        )
    ]


def ragged(rows: Sequence[Row], number: int) -> Iterator[list[int]]:
    """Prompts of 9 to 135 tokens: as many sentences end to end as that takes."""
    stream = [token for row in rows for token in (*row.prompt[1:], *row.completion[:-1])]
    start = 0
    for length in np.random.default_rng(0).integers(9, 136, number).tolist():
        yield [rows[0].prompt[0], *stream[start : start + length - 1]]
        start += length


def measure(contestants: Contestants, work: Workload, rounds: int) -> dict[str, Any]:
    """All rounds of a workload, the contestants in alternating order."""
    samplers = contestants.samplers()
    taken: dict[str, dict[str, list[float]]] = {
        name: {"tokens": [], "compute_seconds": [], "wall_seconds": []} for name in samplers
    }
    for number in range(-1, rounds):
        order = list(samplers)[:: 1 if number % 2 else -1]
        # The first round warms up, and counts for nothing.
        part = Workload(work.title, work.prompts[:8], work.completions, 4)
        for name in order:
            lengths: list[int] = []
            now = part if number < 0 else work

            def run(name: str = name, now: Workload = now, seed: int = number + 1) -> None:
                lengths.extend(samplers[name](now, seed))  # noqa: B023, called at once

            took = timed(run, torch.device("cpu"))
            if number >= 0:
                taken[name]["tokens"].append(sum(lengths))
                taken[name]["compute_seconds"].append(took.compute)
                taken[name]["wall_seconds"].append(took.wall)
    return {
        "title": work.title,
        "prompts": len(work.prompts),
        "prompt_tokens": [min(map(len, work.prompts)), max(map(len, work.prompts))],
        "completions": work.completions,
        "max_new_tokens": work.max_new_tokens,
        "samplers": taken,
    }


def workloads(rows: Sequence[Row], longest: int, number: int) -> list[Workload]:
    short = [list(row.prompt) for row in rows[:number]]
    long = list(ragged(rows, number // 2))
    few = max(8, number // 6)
    return [
        Workload("the default's prompts, one sample each", short, 1, longest),
        Workload("the default's prompts, six samples each", short[:few], 6, longest),
        Workload("prompts of 9 to 135 tokens, one sample each", long, 1, 96),
        Workload("prompts of 9 to 135 tokens, six samples each", long[: few // 2], 6, 96),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    params = load_params()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    longest = params.data.max_completion_tokens
    rows = rows_of_reviews(params.base, params.data.prompt_words, longest)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    rows = [rows[i] for i in order]
    directory = Path(".prefopt/benchmark")
    tuned(params.base, rows, directory)
    tokenizer = models.load_tokenizer(str(directory))
    ours = models.load_policy(str(directory))
    theirs = models.load_policy(str(directory))
    theirs.set_attn_implementation("sdpa")
    eos = models.eos(tokenizer)
    pad = tokenizer.pad_token_id
    contestants = Contestants(ours, theirs, eos, pad if isinstance(pad, int) else eos)
    tables: list[dict[str, Any]] = []
    for work in workloads(rows[STEPS * BATCH :], longest, chosen.prompts):
        tables.append(measure(contestants, work, chosen.rounds))
        sys.stderr.write(f"{work.title}: {sum_of_seconds(tables[-1]):.0f} s\n")
        results = {"machine": machine(torch.device("cpu")), "tables": tables}
        chosen.out.write_text(json.dumps(results, indent=1) + "\n")


def sum_of_seconds(table: dict[str, Any]) -> float:
    return sum(sum(taken["wall_seconds"]) for taken in table["samplers"].values())


if __name__ == "__main__":
    main()
