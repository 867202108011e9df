"""How often the intervals hold the truth: `python -m benchmarks.coverage`.

Simulated judging with a known win rate: prompts differ in difficulty (their win probabilities are
beta distributed), training seeds differ, the judge errs, ties, and prefers what it reads first.
Writes results/coverage.json and coverage.md, the same table for people.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from prefopt.statistics.comparison import difference_intervals
from prefopt.statistics.intervals import proportion_intervals

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "coverage.json"
PAGE = HERE / "coverage.md"

NUM_SIMULATIONS = 6000
CLAIMED, TOLERATED = 0.95, 0.02
# Of a difference, how much more may be covered: where hardly any prompt tells two runs apart, its
# interval is too wide, which claims too little and never too much.
TOLERATED_OVER = 0.04
RATES = (0.5, 0.6, 0.8, 0.95)
PROMPTS = (50, 100, 256, 1000)

JUDGE_NOISE = 0.1  # of the verdicts that are no ties, how many a judge turns round
CONCENTRATION = 2.0  # of the prompts' beta distribution; its variance is p (1 - p) / 3
FIRST_ADVANTAGE = 0.1  # what being read first adds to an even prompt's win probability
TIES = 0.4  # ties to a win that is missing
VALUES_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Design:
    """What was judged of each prompt.

    Args:
        seeds: trainings of the run.
        orders: presentations, 2 for both orders.
        seed_effect: standard deviation over trainings of an even prompt's win probability.
    """

    title: str
    seeds: int
    orders: int
    seed_effect: float


DESIGNS = (
    Design("one training, one order", 1, 1, 0.0),
    Design("one training, both orders", 1, 2, 0.0),
    Design("three equal trainings, both orders", 3, 2, 0.0),
    Design("three trainings, both orders", 3, 2, 0.05),
)
# Win rates of two runs on the same prompts.
PAIRS = ((0.5, 0.5), (0.6, 0.65), (0.8, 0.9), (0.95, 0.97))


def simulated(
    rates: Sequence[float],
    num_prompts: int,
    design: Design,
    num_simulations: int,
    generator: np.random.Generator,
) -> list[Float[np.ndarray, "simulations seeds prompts"]]:
    """Points of one run for each win rate, on the same prompts; their expectation is the rate.

    A prompt has the same quantile of difficulty for every run.
    """
    from scipy.special import betaincinv

    shape = (num_simulations, design.seeds, design.orders, num_prompts)
    quantiles = generator.random((num_simulations, 1, 1, num_prompts))
    grid = np.linspace(0, 1, 10_001)
    runs: list[Float[np.ndarray, "simulations seeds prompts"]] = []
    for rate in rates:
        # Ties first, then errors: what is left is the judge's own probability of a win.
        ties = TIES * (1 - rate)
        seen = (rate - ties / 2) / (1 - ties)
        noise = 2 * JUDGE_NOISE * (1 - seen)
        share = (seen - noise) / (1 - 2 * noise)
        inverse = betaincinv(CONCENTRATION * share, CONCENTRATION * (1 - share), grid)
        wins = np.interp(quantiles, grid, inverse)
        effects = generator.normal(0, design.seed_effect, (num_simulations, design.seeds, 1, 1))
        wins = moved(wins, np.clip(effects, -0.25, 0.25))
        wins = noise + (1 - 2 * noise) * wins
        if design.orders == 2:
            wins = moved(wins, FIRST_ADVANTAGE * np.array([[1.0], [-1.0]]))
        drawn = generator.random(shape)
        points = (drawn < wins * (1 - ties)) + 0.5 * (drawn >= 1 - ties)
        runs.append(points.mean(2))
    return runs


def moved(
    probability: Float[np.ndarray, "*#all"], effect: Float[np.ndarray, "*#all"]
) -> Float[np.ndarray, "*all"]:
    """Moved by the effect at 1/2, less at the ends; effects symmetric about 0 keep the mean."""
    return probability + 4 * effect * probability * (1 - probability)


def covered(
    truth: float, low: Float[np.ndarray, " many"], high: Float[np.ndarray, " many"]
) -> float:
    return float(((low <= truth) & (truth <= high)).mean())


def measure(
    num_simulations: int = NUM_SIMULATIONS,
    designs: Sequence[Design] = DESIGNS,
    sizes: Sequence[int] = PROMPTS,
) -> dict[str, Any]:
    """Coverage and mean width of every cell."""
    generator = np.random.default_rng(0)
    cells: list[dict[str, Any]] = []
    for design in designs:
        for size in sizes:
            for truths in [*((rate,) for rate in RATES), *PAIRS]:
                wanted = truths[0] - truths[1] if len(truths) == 2 else truths[0]
                found = [
                    _intervals(truths, size, design, count, generator)
                    for count in _portions(num_simulations, design, size)
                ]
                low, high = (np.concatenate(side) for side in zip(*found, strict=True))
                cells.append(
                    {
                        "design": design.title,
                        "prompts": size,
                        "truths": list(truths),
                        "coverage": round(covered(wanted, low, high), 4),
                        "width": round(float((high - low).mean()), 4),
                    }
                )
    return {
        "simulations": num_simulations,
        "designs": [asdict(design) for design in designs],
        "cells": cells,
    }


def _portions(num_simulations: int, design: Design, size: int) -> list[int]:
    at_once = max(1, VALUES_AT_ONCE // (size * design.seeds * design.orders))
    starts = range(0, num_simulations, at_once)
    return [min(at_once, num_simulations - start) for start in starts]


def _intervals(
    truths: Sequence[float], size: int, design: Design, count: int, generator: np.random.Generator
) -> tuple[Float[np.ndarray, " many"], Float[np.ndarray, " many"]]:
    runs = simulated(truths, size, design, count, generator)
    if len(runs) == 2:
        _, low, high, _ = difference_intervals(*runs)
    else:
        _, low, high, _ = proportion_intervals(runs[0])
    return low, high


def outside(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells whose interval covers less or more than is tolerated."""
    return [
        cell
        for cell in results["cells"]
        if not -TOLERATED
        <= round(cell["coverage"] - CLAIMED, 6)
        <= (TOLERATED_OVER if is_difference(cell) else TOLERATED)
    ]


def is_difference(cell: dict[str, Any]) -> bool:
    return len(cell["truths"]) == 2


def too_wide(results: dict[str, Any]) -> list[str]:
    """Sentences on the differences that cover more than a win rate may."""
    differences = [cell for cell in results["cells"] if is_difference(cell)]
    limit = CLAIMED + TOLERATED
    over = [cell for cell in differences if round(cell["coverage"] - limit, 6) > 0]
    if not over:
        return []
    named = [
        f"{name_of(cell['truths'])} on {cell['prompts']} prompts, {cell['design']} "
        f"({cell['coverage']:.3f})"
        for cell in over
    ]
    return [
        f"Of {len(differences)} differences {len(over)} cover more than {limit:g}: "
        f"{'; '.join(named)}. There the interval is wider than it need be; up to "
        f"{CLAIMED + TOLERATED_OVER:g} is tolerated of differences, and no less than "
        f"{CLAIMED - TOLERATED:g} of anything.",
        "",
    ]


def name_of(truths: Sequence[float]) -> str:
    return " against ".join(f"{truth:g}" for truth in truths)


def page(results: dict[str, Any]) -> str:
    """The table for people, in Markdown."""
    sizes = list(dict.fromkeys(cell["prompts"] for cell in results["cells"]))
    error = math.sqrt(CLAIMED * (1 - CLAIMED) / results["simulations"])
    lines = [
        "# How often the 95% intervals hold the truth",
        "",
        f"Shares of {results['simulations']} simulations, mean widths in brackets; chance alone "
        f"moves a share by {error:.3f} (standard error). `python -m benchmarks.coverage` makes "
        "this page.",
        "",
        f"Prompts' win probabilities are beta distributed (a + b = {CONCENTRATION:g}); the judge "
        f"turns {JUDGE_NOISE:.0%} of its verdicts round, gives what it reads first up to "
        f"{FIRST_ADVANTAGE:g} more, and ties {TIES:g} times the share that is not won. The truth "
        "is the win rate that such a judge gives with endless prompts and trainings.",
        "",
        *too_wide(results),
    ]
    for design in results["designs"]:
        title = design["title"]
        spread = f": standard deviation {design['seed_effect']:g}" if design["seed_effect"] else ""
        cells = [cell for cell in results["cells"] if cell["design"] == title]
        lines += [
            f"## {title.capitalize()}{spread}",
            "",
            "| truth | " + " | ".join(f"{size} prompts" for size in sizes) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for truths in dict.fromkeys(tuple(cell["truths"]) for cell in cells):
            row = [cell for cell in cells if tuple(cell["truths"]) == truths]
            kind = "difference" if len(truths) == 2 else "win rate"
            shares = [f"{cell['coverage']:.3f} ({cell['width']:.3f})" for cell in row]
            lines.append(f"| {kind}, {name_of(truths)} | " + " | ".join(shares) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    results = measure()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    if missed := outside(results):
        sys.exit(f"coverage: more or less than is tolerated, got {missed}")


if __name__ == "__main__":
    main()
