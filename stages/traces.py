"""Where rows of the data went: `python -m stages.traces TEXT`, or `row:IDENTITY`.

Prints JSON for `prefopt impact`. A row's identity is a digest of its texts, so that it is the same
in every run and every split that the row may come to lie in.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
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
    SAMPLES_SCHEMA,
    map_table,
    program,
    samples_of,
)
from stages.params import Params, load_params

TEXTS = ("text", "gold", "rejected")
PREFIX = "row:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wanted")
    wanted = parser.parse_args().wanted
    found = list(traces(wanted, load_params()))
    if not found:
        raise ValueError(
            f"{PROMPTS}: no row holds these words or has this identity, got '{wanted}'; it was "
            "never used, or give other words of its text"
        )
    sys.stdout.write(json.dumps(found) + "\n")


def traces(wanted: str, params: Params) -> Iterator[dict[str, Any]]:
    """The rows that are meant: where each lies, how often it was used, and by which stages."""
    prompts = map_table(PROMPTS, PROMPTS_SCHEMA)
    texts = zip(*(prompts[column] for column in TEXTS), strict=True)
    rows = {
        number: identity(*row)
        for number, row in enumerate(texts)
        if identity(*row) == wanted or wanted.casefold() in "".join(row).casefold()
    }
    sampled = Counter(map_table(CANDIDATES, CANDIDATES_SCHEMA)["prompt"])
    completions = map_table(COMPLETIONS, COMPLETIONS_SCHEMA)["prompt"]
    paired = Counter(
        tuple(completions[chosen]) for chosen in map_table(PAIRS, PAIRS_SCHEMA)["chosen"]
    )
    evaluated = {
        name: set(map_table(samples_of(name), SAMPLES_SCHEMA)["prompt"])
        for name in ("sft", *params.runs)
    }
    for number, name in rows.items():
        split = prompts["split"][number]
        samples = [run for run, drawn in evaluated.items() if number in drawn]
        uses = {
            "times in SFT's data": int(split == "train"),
            "candidates": sampled[number],
            "pairs": paired[tuple(prompts["tokens"][number])],
            "evaluation samples": len(samples),
        }
        stages = {
            "sft": uses["times in SFT's data"],
            "sample": uses["candidates"],
            "label": uses["pairs"],
            "opponent": "sft" in samples,
            **{f"complete@{run}": run in samples for run in params.runs},
        }
        yield {
            "identity": name,
            "number": number,
            "split": split,
            "text": prompts["text"][number] + prompts["gold"][number],
            "uses": {what: count for what, count in uses.items() if count},
            "stages": [stage for stage, used in stages.items() if used],
        }


def identity(*texts: str) -> str:
    """Of a row's texts: the same wherever the row lies."""
    return PREFIX + hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


if __name__ == "__main__":
    program(main)
