"""The report's tables: for the page, for Markdown and for a terminal."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np

from prefopt.statistics.correction import corrected_win_rate
from prefopt.statistics.intervals import Estimate, cells, complete, points, proportion_intervals
from prefopt.statistics.power import Design, detectable_effect
from stages.best_of import best_of
from stages.params import Params
from stages.results import OPPONENTS, Reference, Result

EN_DASH = "\N{EN DASH}"
LATE_STEPS = 10  # over which the moments of a policy's samples are averaged
NO_DIFFERENCE = "no significant difference"  # the verdict of a comparison that found none


@dataclass(frozen=True)
class Cell:
    """What a cell shows; `value` is what its column is sorted by."""

    text: str
    note: str = ""
    best: bool = False
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of the result table; its first cell is SFT's, then one per run."""

    group: str
    head: str
    cells: list[Cell]


def result_columns(params: Params, results: Sequence[Result], reference: Reference) -> list[Column]:
    """The result table, for the page and for Markdown alike."""
    label = params.label.reward

    def column(group: str, head: str, sft: Cell, cell: Callable[[dict[str, Any]], Cell]) -> Column:
        return Column(group, head, [sft, *(cell(result.metrics) for result in results)])

    def number(
        group: str, head: str, key: str, sft: float | None, form: str, within: str = ""
    ) -> Column:
        def cell(metrics: dict[str, Any]) -> Cell:
            value = (metrics[within] if within else metrics)[key]
            return Cell(signed(value, form), value=value)

        return column(group, head, Cell("" if sft is None else signed(sft, form)), cell)

    def kl(metrics: dict[str, Any]) -> Cell:
        is_bound = metrics.get("kl_is_bound")
        note = "at most" if is_bound else f"± {metrics['kl_standard_error']:.2f}"
        return Cell(signed(metrics["kl"], ".2f"), note, value=metrics["kl"])

    return [
        *(
            win_rate_column(params, opponent, judge, results)
            for opponent in OPPONENTS
            for judge in params.evaluation.judges
        ),
        column("policy", "KL, nats", Cell("0"), kl),
        number("policy", f"reward ({label})", "reward", reference.reward, ".3f"),
        number("completions", "tokens", "length", reference.length, ".1f"),
        number("completions", "distinct 2-grams", "distinct_2", reference.distinct_2, ".3f"),
        number("completions", "NLL a token", "nll_under_sft", reference.nll, ".2f"),
        number("displacement", "chosen fell", "chosen_fell", None, ".0%", "displacement"),
        number("displacement", "both fell", "both_fell", None, ".0%", "displacement"),
        number("displacement", "median chosen", "median_chosen", 0.0, "+.2f", "displacement"),
        number("displacement", "median rejected", "median_rejected", 0.0, "+.2f", "displacement"),
    ]


def win_rate_column(params: Params, opponent: str, judge: str, results: Sequence[Result]) -> Column:
    """A judge's win rates over an opponent, best the highest of those that are no best-of-N."""
    rates = [result.metrics["win_rate"][opponent][judge] for result in results]
    trained = [not best_of(params, result.name) for result in results]
    highest = max((r["value"] for r, ok in zip(rates, trained, strict=True) if ok), default=None)
    cells = [
        Cell(
            f"{rate['value']:.2f}",
            interval(rate),
            is_trained and rate["value"] == highest,
            rate["value"],
        )
        for rate, is_trained in zip(rates, trained, strict=True)
    ]
    head = f"{judge} (gold reward)" if judge == params.label.reward else judge
    return Column(f"win rate over {OPPONENTS[opponent]}", head, [Cell(""), *cells])


def interval(estimate: dict[str, float], form: str = ".2f") -> str:
    return f"{signed(estimate['low'], form)}{EN_DASH}{signed(estimate['high'], form)}"


def signed(value: float, form: str) -> str:
    """A number with a true minus sign, and no minus zero."""
    text = format(value, form)
    if not re.search("[1-9]", text):
        text = text.lstrip("-+")
    return text.replace("-", "\N{MINUS SIGN}")


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def certainty_rows(
    params: Params, results: Sequence[Result], cards: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """How sure every win rate is: one row a run, an opponent and a judge.

    `card` and `corrected` are None of the gold reward and of judges that were not examined.
    `holds_gold` is whether the corrected interval holds what the gold reward itself gives; None
    where the exam's labels are not the gold reward's, or refuse the correction.
    """
    rows: list[dict[str, Any]] = []
    for opponent in OPPONENTS:
        for judge in params.evaluation.judges:
            card = None if judge == params.label.reward else cards.get(judge)
            for result in results:
                rate = result.metrics["win_rate"][opponent][judge]
                controlled = result.metrics["length_controlled"][opponent][judge]
                fixed = corrected(rate, card["confusion"]) if card else None
                gold = result.metrics["win_rate"][opponent][params.label.reward]["value"]
                rows.append(
                    {
                        "run": result,
                        "opponent": OPPONENTS[opponent],
                        "judge": judge,
                        "rate": rate,
                        "controlled": None if "refused" in controlled else controlled,
                        "refused": controlled.get("refused", ""),
                        "card": card,
                        "corrected": fixed,
                        "holds_gold": _holds(gold, card, fixed),
                    }
                )
    return rows


def _holds(gold: float, card: dict[str, Any] | None, fixed: dict[str, Any] | None) -> bool | None:
    if not card or not fixed or "refused" in fixed or card["exam"]["source"] != "pairs":
        return None
    return fixed["low"] <= gold <= fixed["high"]


def corrected(
    rate: Mapping[str, float], confusion: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """A win rate without the errors that the judge's exam shows, or why there is none: `refused`.

    Args:
        rate: what the judge gave.
        confusion: of its card, label -> verdict -> items.
    """
    sides = {"first": "policy", "second": "opponent"}
    items = [
        (sides.get(verdict, verdict), sides[label])
        for label, counts in confusion.items()
        for verdict, count in counts.items()
        for _ in range(count)
    ]
    observed = Estimate(*(rate[field.name] for field in fields(Estimate)))
    try:
        found = corrected_win_rate(observed, [v for v, _ in items], [label for _, label in items])
    except ValueError as error:
        return {"refused": str(error)}
    return asdict(found)


def power(params: Params, results: Sequence[Result]) -> dict[str, Any]:
    """What this evaluation could have seen, by the gold reward over SFT.

    Ties are their share over all runs; the correlation of two runs' points on a prompt is the
    median of all pairs of runs, None where there is one run or none has any spread.
    """
    judge = params.label.reward
    rates = [result.metrics["win_rate"]["sft"][judge] for result in results]
    verdicts = sum(rate[key] for rate in rates for key in ("policy", "opponent", "tie"))
    ties = sum(rate["tie"] for rate in rates) / verdicts
    num_prompts = min(rate["num_prompts"] for rate in rates)
    table = np.array(
        [
            points([j.verdict for (_, *key), j in r.judgements.items() if key == ["sft", judge]])
            for r in results
        ]
    )
    table = table[:, ~np.isnan(table).any(0)]
    table = table[table.std(1) > 0]
    correlation = None
    if len(table) > 1:
        correlations = np.corrcoef(table)[np.triu_indices(len(table), 1)]
        correlation = float(np.clip(np.median(correlations), -0.99, 0.99))
    return {
        "num_prompts": num_prompts,
        "ties": ties,
        "correlation": correlation,
        "one": detectable_effect(num_prompts, Design(ties=ties)),
        "two": None
        if correlation is None
        else detectable_effect(num_prompts, Design(ties=ties, correlation=correlation)),
    }


def matrices(params: Params, comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run against every run, an opponent and a judge each; the gold reward's first."""
    found: list[dict[str, Any]] = []
    judges = sorted(params.evaluation.judges, key=lambda judge: judge != params.label.reward)
    for opponent in OPPONENTS:
        for judge in judges:
            pairs = comparison["win_rate"][opponent][judge]
            if pairs:
                names = list(dict.fromkeys(n for p in pairs for n in (p["first"], p["second"])))
                cells = {
                    key: cell
                    for pair in pairs
                    for key, cell in (
                        ((pair["first"], pair["second"]), _difference(pair, 1)),
                        ((pair["second"], pair["first"]), _difference(pair, -1)),
                    )
                }
                found.append(
                    {
                        "opponent": OPPONENTS[opponent],
                        "judge": judge,
                        "names": names,
                        "cells": cells,
                        "significant": sum(p["verdict"] != NO_DIFFERENCE for p in pairs),
                        "pairs": len(pairs),
                    }
                )
    return found


def _difference(pair: dict[str, Any], sign: int) -> dict[str, Any]:
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    won = pair["verdict"] != NO_DIFFERENCE
    return {
        "text": signed(sign * pair["value"], "+.2f"),
        "p": p_value(pair["corrected"]),
        "title": f"{pair['verdict']}: {signed(sign * pair['value'], '+.3f')}, 95% interval "
        f"{signed(low, '+.3f')} to {signed(high, '+.3f')}, p {p_value(pair['p'])}, by Holm "
        f"{p_value(pair['corrected'])}",
        "level": ("better" if sign * pair["value"] > 0 else "worse") if won else "",
    }


def elo_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Everybody's rating by every judge, best first by the first judge."""
    by_judge = comparison["ratings"]
    first = next(iter(by_judge.values()))
    names = sorted(first, key=lambda name: -first[name]["elo"])
    return [
        {"name": name, "ratings": {judge: rated[name] for judge, rated in by_judge.items()}}
        for name in names
    ]


def setting_rows(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Every objective at every strength where it stands; nothing if no objective was swept."""
    frontier = comparison["frontier"]
    return [
        {"objective": objective, "strength": strength, **place}
        for objective, settings in frontier["places"].items()
        for strength, place in settings.items()
        if frontier["curves"]
    ]


def target_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Of runs that learn from their own samples: their target as it was fitted, and how near it is.

    `moments` are (feature, lambda, the target's, the policy's mean over the last steps).
    """
    rows: list[dict[str, Any]] = []
    for result in results:
        fit = {
            column.removeprefix("fit/"): values[0]
            for column, values in result.curve.items()
            if column.startswith("fit/") and values and not math.isnan(values[0])
        }
        if not fit:
            continue
        features = [key.removeprefix("lambda/") for key in fit if key.startswith("lambda/")]
        late = {f: _late_mean(result.curve[f"moments/{f}"]) for f in features}
        moments = [(f, fit[f"lambda/{f}"], fit[f"moment/{f}"], late[f]) for f in features]
        rows.append({"run": result, "fit": fit, "moments": moments})
    return rows


def _late_mean(values: Sequence[float]) -> float:
    late = [value for value in values[-LATE_STEPS:] if not math.isnan(value)]
    return sum(late) / len(late)


def agreements(params: Params, results: Sequence[Result]) -> list[dict[str, Any]]:
    """How often each two judges give the same verdict, runs and opponents pooled.

    The interval is over prompts, each with the mean of its verdicts. `table` is first judge's
    verdict -> second judge's -> share of all.
    """
    found: list[dict[str, Any]] = []
    judges = params.evaluation.judges
    for number, first in enumerate(judges):
        for second in judges[number + 1 :]:
            both = [
                (prompt, one.verdict, result.judgements[prompt, opponent, second].verdict)
                for result in results
                for (prompt, opponent, judge), one in result.judgements.items()
                if judge == first
            ]
            same = np.array([float(a == b) for _, a, b in both])
            by_prompt = complete(cells(same, np.array([prompt for prompt, *_ in both])))
            value, low, high, _ = (float(x[0]) for x in proportion_intervals(by_prompt[None]))
            verdicts = sorted({v for _, *pair in both for v in pair}, key=_order_of_verdict)
            found.append(
                {
                    "first": first,
                    "second": second,
                    "estimate": {"value": value, "low": low, "high": high},
                    "verdicts": verdicts,
                    "table": {
                        a: {b: sum(v == [a, b] for _, *v in both) / len(both) for b in verdicts}
                        for a in verdicts
                    },
                }
            )
    return found


def _order_of_verdict(verdict: str) -> tuple[int, str]:
    known = ["policy", "tie", "opponent"]
    return (known.index(verdict) if verdict in known else len(known), verdict)


def spans(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """Groups of neighbouring columns with their widths."""
    starts = [i for i, c in enumerate(columns) if i == 0 or columns[i - 1].group != c.group]
    return [(columns[a].group, b - a) for a, b in pairwise([*starts, len(columns)])]


def markdown(params: Params, results: Sequence[Result], columns: Sequence[Column]) -> str:
    heads = ["run", "loss", *(f"{column.group}: {column.head}" for column in columns)]
    rows = [["sft", "the reference"], *([f"`{r.name}`", r.specification] for r in results)]
    lines = [heads, ["---", "---", *["---:"] * len(columns)]]
    for number, row in enumerate(rows):
        cells = [column.cells[number] for column in columns]
        lines.append([*row, *(" ".join(filter(None, [c.text, c.note])) or EN_DASH for c in cells)])
    table = "\n".join("| " + " | ".join(line).replace("\n", " ") + " |" for line in lines)
    return (
        f"# {params.recipe}\n\n{table}\n\n"
        "Win rates with 95% intervals (Wilson's, on an effective sample size clustered by prompt), "
        "ties counting one half; KL to the reference in nats a completion, ± its standard error; "
        "NLL under SFT in nats.\n"
    )


def summary(params: Params, results: Sequence[Result]) -> str:
    """The main figures of each run for a terminal of 100 columns."""
    judges = params.evaluation.judges
    heads = [f"over SFT, {judge}" for judge in judges] + ["KL", "reward", "NLL/SFT's"]
    lines = ["run".ljust(18) + "".join(head.rjust(21) for head in heads[: len(judges)])]
    lines[0] += "".join(head.rjust(10) for head in heads[len(judges) :])
    for result in results:
        metrics = result.metrics
        line = result.name.ljust(18)
        for judge in judges:
            rate = metrics["win_rate"]["sft"][judge]
            line += f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]".rjust(21)
        ratio = metrics["nll_under_sft"] / metrics["nll_of_sft"]
        line += f"{metrics['kl']:10.2f}{metrics['reward']:10.3f}{ratio:10.3f}"
        lines.append(line)
    return "\n".join(lines) + "\n"
