"""Judges' report cards: of those that were examined, what the exam found and what it took."""

import json
from pathlib import Path
from typing import Any

from stages.artefacts import WORK, card_of
from stages.params import Params, load_params


def expenses_of(judge: str) -> Path:
    """What its last exam took. Not an artefact, because it is not the same twice."""
    return WORK / "cards" / f"{judge}.json"


def load_cards(params: Params) -> dict[str, dict[str, Any]]:
    """Judge -> its report card, of those that were examined."""
    return {
        judge: json.loads(card_of(judge).read_text())
        for judge in params.evaluation.judges
        if card_of(judge).exists()
    }


def described_cards() -> str:
    """The cards for a terminal, of all judges that were examined; empty if none was."""
    return "\n".join(
        f"{judge}, examined on {card['num_items']} items of {card['exam']['source']}:\n"
        f"  {_findings(card)}\n"
        f"  {_expenses(judge)}"
        for judge, card in load_cards(load_params()).items()
    )


def _findings(card: dict[str, Any]) -> str:
    slope = card["length_slope"]
    gaps = sum(card[f"{gap}_rate"] for gap in ("unparsed", "refused", "missing"))
    return "; ".join(
        [
            f"agreement {_estimate(card['agreement'])}",
            f"flips {_estimate(card['flip_rate'])}",
            f"first position {_estimate(card['first_position'])}",
            f"length slope {slope['value']:+.2f} ± {slope['standard_error']:.2f}"
            if slope
            else "length slope none",
            f"no verdict {gaps:.1%}",
        ]
    )


def _estimate(found: dict[str, float] | None) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" if found else "none"


def _expenses(judge: str) -> str:
    path = expenses_of(judge)
    if not path.exists():
        return "cost and latency: not known here, because the exam ran elsewhere"
    took = json.loads(path.read_text())
    times = took.get("seconds_a_call")
    if not times:
        return f"mean {took['seconds'] / took['items']:.2g} s an item"
    paid = f", {took['cost']:.4f} paid" if took["cost"] else ""
    return (
        f"median {times['median']:.3g} s a verdict, 95% within {times['p95']:.3g} s; "
        f"{took['calls']} calls{paid}"
    )
