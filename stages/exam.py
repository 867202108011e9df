"""A judge's report card, from labelled items: `python -m stages.exam JUDGE [--on SOURCE]`.

A source is `pairs` (those that the gold reward labelled), a JSON, JSON-lines or CSV file, a folder
of them (each file is a group), or `hub:OWNER/NAME:SPLIT`. An item has `prompt` (or `input`), and
`output_1`, `output_2` and `label` (1 or 2), or `chosen` and `rejected`. Time and money go into a
record of their own in `.prefopt/cards`, because they are not the same twice.
"""

import argparse
import csv
import hashlib
import heapq
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.judging import length_slope, wilson
from stages.artefacts import (
    CANDIDATES,
    COMPLETIONS,
    PAIRS,
    PROMPTS,
    card_of,
    program,
    stage,
)
from stages.cards import expenses_of
from stages.judges import PARSED, Asked, Comparison, Judgement, is_watched, load_judge
from stages.ledger import opened
from stages.pairs import labelled_pairs
from stages.params import Params, load_params

POINTS = {"policy": 1.0, "tie": 0.5, "opponent": 0.0}  # of an item's first text


@dataclass(frozen=True)
class Item:
    """Two texts for a prompt, of which one is known to be better."""

    prompt: str
    first: str
    second: str
    first_is_better: bool
    group: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("judge")
    parser.add_argument("--on", metavar="SOURCE", help="print a card of these items, all of them")
    arguments = parser.parse_args()
    params, name = load_params(), arguments.judge
    if arguments.on:
        items = list(read_items(arguments.on))
        sys.stdout.write(as_json(examined(params, name, items, arguments.on)))
        return
    settings = params.exam
    in_pipeline = settings.source == "pairs"
    if (
        not in_pipeline
        and not settings.source.startswith("hub:")
        and not is_watched(settings.source)
    ):
        raise ValueError(
            f"exam.source: neither pairs nor in data/judges, got '{settings.source}'; put it "
            "there, so that cards are made again when it changes"
        )
    inputs = [PROMPTS, CANDIDATES, COMPLETIONS, PAIRS]
    with stage(
        f"exam@{name}",
        inputs=inputs,
        outputs=[card_of(name)],
        params={
            "exam": settings.model_dump(),
            "judges": params.judges,
            "rewards": params.rewards,
        },
    ) as workspace:
        found = pairs_as_items() if in_pipeline else read_items(settings.source)
        # By digest, not by place: files are often sorted by what they hold.
        items = heapq.nsmallest(settings.num_items, found, key=_digest)
        workspace.partial(card_of(name)).write_text(
            as_json(examined(params, name, items, settings.source))
        )


def examined(params: Params, name: str, items: Sequence[Item], source: str) -> dict[str, Any]:
    """The card; what it took is written beside the ledgers."""
    if not items:
        raise ValueError(f"exam: no items, got '{source}'; name another source")
    judge = load_judge(params, name, "exam")
    started = time.monotonic()
    judgements = judge.judge(
        [
            Comparison(number, item.prompt, item.first, item.second, "second")
            for number, item in enumerate(items)
        ]
    )
    seconds = time.monotonic() - started
    _write_expenses(name, judge, seconds, len(items))
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.group, []).append(number)
    identity = json.dumps([asdict(item) for item in items]).encode()
    return {
        "judge": name,
        "identity": judge.identity,
        "exam": {"source": Path(source).name, "items": hashlib.sha256(identity).hexdigest()},
        **card(items, judgements),
        "groups": {
            group: card([items[n] for n in numbers], [judgements[n] for n in numbers])
            for group, numbers in groups.items()
            if group
        },
    }


def card(items: Sequence[Item], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """The facts of a report card, of all items with a verdict; gaps are counted beside them.

    `confusion` is label -> verdict -> items. `agreement` counts a tie one half. Of what was shown
    in both orders, `flip_rate` is the share of items on which they disagree; `first_position` is
    the share of single verdicts for the text shown first, 1/2 without bias. `length_slope` is the
    log-odds that a text gains by twice the characters, labels being equal.
    """
    sides = {"policy": "first", "opponent": "second"}
    confusion = {"first": Counter[str](), "second": Counter[str]()}
    for item, judgement in zip(items, judgements, strict=True):
        label = "first" if item.first_is_better else "second"
        confusion[label][sides.get(judgement.verdict, judgement.verdict)] += 1
    kept = [(i, j) for i, j in zip(items, judgements, strict=True) if j.verdict in PARSED]
    outcomes = np.array([POINTS[judgement.verdict] for _, judgement in kept])
    labels = np.array([float(item.first_is_better) for item, _ in kept])
    decided = {"policy", "opponent"}
    shown = [
        [
            side == judgement_of_side
            for side, judgement_of_side in (
                ("policy", judgement.policy_first),
                ("opponent", judgement.opponent_first),
            )
            if judgement_of_side in decided
        ]
        for judgement in judgements
    ]
    flips = [
        float(not judgement.order_consistent)
        for judgement, orders in zip(judgements, shown, strict=True)
        if len(orders) == 2
    ]
    lengths = np.array([[len(item.first), len(item.second)] for item, _ in kept], float)
    total = len(items)
    gaps = {
        f"{gap}_rate": sum(judgement.verdict == gap for judgement in judgements) / total
        for gap in ("unparsed", "refused", "missing")
    }
    slope = length_slope(outcomes, labels, *lengths.T) if kept else None
    return {
        "num_items": total,
        "confusion": {label: dict(sorted(counts.items())) for label, counts in confusion.items()},
        "agreement": _interval(1 - np.abs(outcomes - labels)),
        "flip_rate": _interval(np.array(flips)),
        "first_position": _interval(np.array([np.mean(orders) for orders in shown if orders])),
        "length_slope": {name: round(value, 6) for name, value in asdict(slope).items()}
        if slope
        else None,
        **{name: round(rate, 6) for name, rate in gaps.items()},
    }


def _interval(values: Any) -> dict[str, float] | None:
    """The mean with its interval; None of nothing, as of a reward's orders."""
    if not len(values):
        return None
    return {name: round(value, 6) for name, value in asdict(wilson(values)).items()}


def as_json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def pairs_as_items() -> Iterator[Item]:
    """The pipeline's pairs, which of the two comes first by their digest."""
    for pair in labelled_pairs():
        yield _in_either_order(pair.prompt, pair.chosen, pair.rejected, "")


def read_items(source: str) -> Iterator[Item]:
    """Items of a file, a folder of files or the hub.

    Raises:
        ValueError: naming the row that is none.
    """
    if source.startswith("hub:"):
        yield from _items(_hub_rows(source), source)
        return
    path = Path(source)
    if not path.exists():
        raise ValueError(f"exam: no such file or folder, got '{source}'; name another")
    files = (
        sorted(file for file in path.iterdir() if file.suffix in READERS)
        if (path.is_dir())
        else [path]
    )
    for file in files:
        if file.suffix not in READERS:
            raise ValueError(
                f"exam: '{file}' is of another kind, got '{file.suffix}'; "
                f"known: {', '.join(READERS)}"
            )
        group = file.stem if path.is_dir() else ""
        yield from _items(READERS[file.suffix](file), str(file), group)


def _items(rows: Iterable[Any], place: str, group: str = "") -> Iterator[Item]:
    for number, row in enumerate(rows, start=1):
        match row:
            case {"input": str(prompt), **rest} | {"prompt": str(prompt), **rest}:
                pass
            case _:
                raise _no_item(place, number, row)
        match rest:
            case {"output_1": str(first), "output_2": str(second), "label": 1 | 2 | "1" | "2"}:
                yield Item(prompt, first, second, int(rest["label"]) == 1, group)
            case {"chosen": str(chosen), "rejected": str(rejected)}:
                yield _in_either_order(prompt, chosen, rejected, group)
            case _:
                raise _no_item(place, number, row)


def _no_item(place: str, number: int, row: Any) -> ValueError:
    columns = sorted(row) if isinstance(row, dict) else type(row).__name__
    return ValueError(
        f"{place}: row {number} is no item, got {columns}; it needs prompt with output_1, "
        "output_2 and label (1 or 2), or with chosen and rejected"
    )


def _in_either_order(prompt: str, better: str, worse: str, group: str) -> Item:
    item = Item(prompt, better, worse, True, group)
    if int(_digest(item), 16) % 2:
        return item
    return Item(prompt, worse, better, False, group)


def _digest(item: Item) -> str:
    return hashlib.sha256(json.dumps(asdict(item)).encode()).hexdigest()


def _read_json(path: Path) -> list[Any]:
    rows = json.loads(path.read_text())
    return rows if isinstance(rows, list) else [rows]


def _read_lines(path: Path) -> Iterator[Any]:
    for number, line in enumerate(path.read_text().split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: no JSON, got {error}; mend it") from error


def _read_csv(path: Path) -> list[Any]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


READERS = {".json": _read_json, ".jsonl": _read_lines, ".csv": _read_csv}


def _hub_rows(source: str) -> Iterable[Any]:
    from datasets import load_dataset

    name, _, split = source.removeprefix("hub:").partition(":")
    return load_dataset(name, split=split or "test")


def _write_expenses(name: str, judge: Any, seconds: float, num_items: int) -> None:
    """What the exam took; of judges with a ledger, what all their calls took so far."""
    took: dict[str, Any] = {"items": num_items, "seconds": round(seconds, 3)}
    if isinstance(judge, Asked):
        with opened(judge.respondent.identity) as book:
            times = sorted(expense.seconds for expense in book.expenses if expense.seconds)
            took |= {
                "calls": book.calls,
                "cost": round(book.cost, 6),
                "prompt_tokens": sum(expense.prompt_tokens for expense in book.expenses),
                "completion_tokens": sum(expense.completion_tokens for expense in book.expenses),
                "seconds_a_call": {
                    "median": float(np.quantile(times, 0.5)),
                    "p95": float(np.quantile(times, 0.95)),
                }
                if times
                else None,
            }
    path = expenses_of(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(took))


if __name__ == "__main__":
    program(main)
