"""The report's figures: the same bytes for the same results, on light and dark pages."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from stages.families import common_name, sweeps
from stages.params import Params
from stages.results import COLOURS, MARKERS, OPPONENTS, Reference, Result

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

    from prefopt.classification import Curves

# Where a point's name may stand, in points from it: at its corners first, then farther out.
DIRECTIONS = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)]
LABEL_OFFSETS = [(x * far, y * far) for far in (7, 13, 22, 34, 50, 70) for x, y in DIRECTIONS]
# The figures' other colours, and the page's names for them: inline they follow light and dark.
INK, MUTED, GRID, PAPER = "#1f2430", "#69707d", "#e2e5ea", "#fffffe"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)", PAPER: "var(--card)"}
FIGURE_FONT = "DejaVu Sans"  # comes with matplotlib, so that layouts are the same everywhere
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# Completions a look; of fewer a mean reward in [-1, 1] may be off by 0.1 and more.
LEAST_WATCHED = 24
# What a run that learns from its own samples measures while it trains.
MEASURES = {
    "target/kl_p_pi": "KL(target || policy), nats",
    "target/kl_pi_p": "KL(policy || target), nats",
    "target/tv": "total variation to the target",
    "target/js": "Jensen-Shannon to the target, nats",
    "samples/reward": "mean reward of samples",
    "samples/kl": "KL(policy || reference), nats",
    "samples/entropy": "entropy, nats a completion",
    "samples/distinct_1": "distinct 1-grams",
    "samples/distinct_2": "distinct 2-grams",
    "samples/distinct_3": "distinct 3-grams",
    "samples/self_bleu": "Self-BLEU",
    "samples/ess_share": "effective share of samples",
}
TOLD = "told: "  # begins the ids that `save` makes titles of
STYLE_OF_FIGURES: "dict[RcKeyType, Any]" = {
    "svg.hashsalt": "prefopt",
    "svg.fonttype": "none",
    "font.family": FIGURE_FONT,
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "legend.frameon": False,
}


def draw(
    directory: Path,
    params: Params,
    results: Sequence[Result],
    reference: Reference,
    comparison: dict[str, Any],
    reward_models: Mapping[str, Any],
) -> list[str]:
    """Write every figure as an SVG file; returns their names."""
    with rc_context(STYLE_OF_FIGURES):
        drawn = {
            "win_rates": draw_win_rates(params, results),
            "reward_kl": draw_frontier(params, results, reference, comparison["frontier"]),
            "length": draw_length(params, results, reference),
            "displacement": draw_displacement(results),
            "logratios": draw_logratios(results),
            "curves": draw_curves(results),
        }
        if paths := watched_paths(results, comparison["frontier"]):
            drawn["reward_kl_steps"] = draw_paths(params, results, paths)
        if measures := measures_of(results):
            drawn["measures"] = draw_measures(results, measures)
        if "revisions" in results[0].metrics:
            drawn["revisions"] = draw_revisions(params, results)
        if reward_models:
            drawn["reliability"] = draw_reliability(reward_models)
        for name, figure in drawn.items():
            save(figure, directory / f"{name}.svg")
    return list(drawn)


def draw_win_rates(params: Params, results: Sequence[Result]) -> Figure:
    judges = params.evaluation.judges
    figure = new_figure(max(10.2, 1.6 + 3.6 * len(judges)), 1.2 + 0.5 * len(results))
    grid = figure.subplots(len(OPPONENTS), len(judges), sharex=True, sharey=True, squeeze=False)
    for row, opponent in zip(grid, OPPONENTS, strict=True):
        for axes, judge in zip(row, judges, strict=True):
            rows_of_runs(axes, results)
            axes.axvline(0.5, color=MUTED, linewidth=1)
            for place, result in enumerate(results):
                rate = result.metrics["win_rate"][opponent][judge]
                axes.hlines(place, rate["low"], rate["high"], color=result.colour, linewidth=2)
                (point,) = axes.plot(
                    rate["value"], place, marker=result.marker, color=result.colour
                )
                tell(
                    point,
                    f"{result.name} over {OPPONENTS[opponent]} by {judge}: {rate['value']:.3f}, "
                    f"95% interval {rate['low']:.3f} to {rate['high']:.3f}; {rate['policy']} won, "
                    f"{rate['tie']} tied, {rate['opponent']} lost",
                )
            gold = ", the gold reward" if judge == params.label.reward else ""
            axes.set_title(f"over {OPPONENTS[opponent]}, by {judge}{gold}")
    for axes in grid[-1]:
        axes.set_xlabel("win rate")
    return figure


def draw_frontier(
    params: Params, results: Sequence[Result], reference: Reference, frontier: dict[str, Any]
) -> Figure:
    """Mean gold reward, and win rate over SFT by it, against KL to the reference.

    A point is an objective at one strength, its trainings together. Objectives of several strengths
    have their frontier with its band, and their points are named by their strength.
    """
    figure = new_figure(10.6, 4.6)
    rewards, rates = figure.subplots(1, 2)
    judge = params.label.reward
    points: dict[Axes, list[tuple[float, float, str]]] = {
        rewards: [(0.0, reference.reward, "SFT")],
        rates: [(0.0, 0.5, "SFT")],
    }
    bars: dict[Axes, list[tuple[tuple[float, float], tuple[float, float]]]]
    bars = {rewards: [], rates: []}
    for axes, ((x, y, _),) in points.items():
        axes.grid(True)
        (point,) = axes.plot(x, y, marker="o", markersize=9, color=INK, fillstyle="none")
        tell(point, f"SFT, the reference: KL 0, mean reward {reference.reward:.3f}")
        axes.margins(0.12)
        axes.set_xlabel("KL(policy || reference), nats a completion")
    rewards.axhline(reference.gold_reward, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    rates.axhline(0.5, color=MUTED, linewidth=1)
    by_name = {result.name: result for result in results}
    for objective, settings in frontier["places"].items():
        members = [by_name[place["runs"][0]] for place in settings.values()]
        colour, curve = members[0].colour, frontier["curves"].get(objective)
        if curve is not None:
            x = curve["budgets"]
            rewards.fill_between(
                x, curve["low"], curve["high"], color=colour, alpha=0.12, linewidth=0
            )
            rewards.plot(x, curve["frontier"], color=colour, linewidth=1.6, label=objective)
            places = list(settings.values())
            rates.plot(
                [place["kl"]["value"] for place in places],
                [place["win_rate"]["value"] for place in places],
                color=colour, linewidth=1.2, alpha=0.6,
            )  # fmt: skip
        for (strength, place), member in zip(settings.items(), members, strict=True):
            names = " + ".join(place["runs"])
            kl, reward, rate = place["kl"], place["reward"], place["win_rate"]
            x, spread = kl["value"], kl["standard_error"]
            error = reward["standard_error"]
            spent = f"at most {x:.2f}" if place["kl_is_bound"] else f"{x:.2f} ± {spread:.2f}"
            words = (
                f"{names} ({objective}{', ' if strength else ''}{strength}): KL {spent} nats, "
                f"reward {reward['value']:.3f} ± {error:.3f}, win rate over SFT "
                f"{rate['value']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
            )
            label = common_name(place["runs"]) if curve is None else strength.split()[-1]
            label = f"{label} (KL at most)" if place["kl_is_bound"] else label
            for axes, y, low, high in (
                (rewards, reward["value"], reward["value"] - error, reward["value"] + error),
                (rates, rate["value"], rate["low"], rate["high"]),
            ):
                axes.hlines(y, x - spread, x + spread, color=colour, linewidth=1)
                axes.vlines(x, low, high, color=colour, linewidth=1)
                (point,) = axes.plot(
                    x, y, marker=member.marker if curve is None else "o", color=colour,
                    markersize=8 if curve is None else 6,
                )  # fmt: skip
                tell(point, words)
                points[axes].append((x, y, label))
                bars[axes] += [((x - spread, y), (x + spread, y)), ((x, low), (x, high))]
    rewards.set_title(f"mean reward by {judge}")
    rates.set_title(f"win rate over SFT by {judge}")
    rewards.text(
        rewards.get_xlim()[1], reference.gold_reward, "gold ", ha="right", va="bottom", color=MUTED
    )
    handles, labels = rewards.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    for axes in (rewards, rates):
        label_points(axes, points[axes], bars[axes])
    return figure


def watched_paths(
    results: Sequence[Result], frontier: dict[str, Any]
) -> dict[str, dict[str, list[Any]]]:
    """Objective -> strength -> (step, KL, reward, its standard error) of every look.

    Over the trainings of a setting, whose looks are at the same steps; of settings whose looks have
    fewer than `LEAST_WATCHED` completions in all, nothing.
    """
    by_name = {result.name: result for result in results}
    found: dict[str, dict[str, list[Any]]] = {}
    for objective, settings in frontier["places"].items():
        for strength, place in settings.items():
            path: list[Any] = []
            # A training that ended early has fewer looks: then all have.
            for looks in zip(*(by_name[name].looks for name in place["runs"]), strict=False):
                if sum(look["completions"] for look in looks) >= LEAST_WATCHED:
                    kl, reward = (float(np.mean([x[k] for x in looks])) for k in ("kl", "reward"))
                    errors = [look["reward_standard_error"] for look in looks]
                    error = float(np.linalg.norm(errors)) / len(errors)
                    path.append((int(looks[0]["step"]), kl, reward, error))
            if path:
                found.setdefault(objective, {})[strength] = path
    return found


def draw_paths(
    params: Params, results: Sequence[Result], paths: dict[str, dict[str, list[Any]]]
) -> Figure:
    """Reward against KL over the steps of training: a panel an objective, a line a strength."""
    colours = {
        objective: result.colour
        for objective, settings in sweeps(params.runs).items()
        for names in settings.values()
        for result in results
        if result.name in names
    }
    columns = min(3, len(paths))
    rows = -(-len(paths) // columns)
    figure = new_figure(max(6.0, 3.5 * columns), 0.4 + 3.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes in grid[len(paths) :]:
        axes.set_visible(False)
    for axes, (objective, settings) in zip(grid, paths.items(), strict=False):
        axes.grid(True)
        axes.set_title(objective)
        axes.set_xlabel("KL(policy || reference), nats")
        for number, (strength, path) in enumerate(settings.items()):
            steps, kl, reward, error = zip(*path, strict=True)
            alpha = 0.35 + 0.65 * (number + 1) / len(settings)
            colour = colours[objective]
            axes.plot(kl, reward, color=colour, alpha=alpha, linewidth=1.4)
            axes.vlines(
                kl, np.subtract(reward, error), np.add(reward, error), color=colour,
                alpha=0.4 * alpha, linewidth=1,
            )  # fmt: skip
            for step, x, y, spread in zip(steps, kl, reward, error, strict=True):
                is_last = step == steps[-1]
                (point,) = axes.plot(
                    x, y, marker="o", color=colour, alpha=alpha, markersize=6 if is_last else 3
                )
                tell(
                    point,
                    f"{objective}, {strength}, after step {step}: KL {x:.2f} nats, reward "
                    f"{y:.3f} ± {spread:.3f}",
                )
            axes.annotate(
                strength.split()[-1] if strength else "", (kl[-1], reward[-1]), (6, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
    for axes in grid[::columns]:
        axes.set_ylabel(f"mean reward by {params.label.reward}")
    return figure


def measures_of(results: Sequence[Result]) -> dict[str, str]:
    """What runs that learn from their own samples measured: column of the curve -> title."""
    columns = dict.fromkeys(column for result in results for column in result.curve)
    known = {column: title for column, title in MEASURES.items() if column in columns}
    prefix = "moments/"
    moments = {c: f"E[{c.removeprefix(prefix)}]" for c in columns if c.startswith(prefix)}
    return known | moments


def draw_measures(results: Sequence[Result], measures: dict[str, str]) -> Figure:
    """A panel a measure, a line for each run that has it."""
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    figure = new_figure(max(6.0, 3.5 * columns), 0.7 + 2.1 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(measures) :]:
        axes.set_visible(False)
    shown: dict[str, Any] = {}
    for axes, (column, title) in zip(grid, measures.items(), strict=False):
        for result in results:
            measured = [
                (step, value)
                for step, value in zip(
                    result.curve["step"], result.curve.get(column, []), strict=False
                )
                if np.isfinite(value)
            ]
            if measured:
                (shown[result.name],) = axes.plot(
                    *zip(*measured, strict=True), color=result.colour, linewidth=1.4,
                    marker=result.marker, markersize=3 if len(measured) < 30 else 0,
                )  # fmt: skip
                step, value = measured[-1]
                (point,) = axes.plot(step, value, marker=result.marker, color=result.colour)
                tell(point, f"{result.name}, {title} after step {step:.0f}: {value:.4g}")
        axes.grid(True)
        axes.set_title(title)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(axis="y", labelcolor=MUTED)
    for axes in grid[max(0, len(measures) - columns) : len(measures)]:
        axes.set_xlabel("step")
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=4)
    return figure


def draw_length(params: Params, results: Sequence[Result], reference: Reference) -> Figure:
    """Mean tokens of each run, and its win rate as judged and at equal length."""
    figure = new_figure(10.2, 1.4 + 0.3 * len(results))
    tokens, rates = figure.subplots(1, 2, sharey=True, width_ratios=[2, 3])
    judge = params.label.reward
    for axes, centre in ((tokens, reference.length), (rates, 0.5)):
        rows_of_runs(axes, results)
        axes.axvline(centre, color=MUTED, linewidth=1)
    for place, result in enumerate(results):
        colour, marker = result.colour, result.marker
        length = result.metrics["length"]
        tokens.hlines(place, reference.length, length, color=colour, linewidth=2, alpha=0.5)
        (point,) = tokens.plot(length, place, marker=marker, color=colour, markersize=7)
        tell(point, f"{result.name}: {length:.1f} tokens; SFT {reference.length:.1f}")
        judged = result.metrics["win_rate"]["sft"][judge]["value"]
        controlled = result.metrics["length_controlled"]["sft"][judge].get("value")
        if controlled is not None:
            rates.hlines(place, judged, controlled, color=colour, linewidth=2, alpha=0.5)
            (point,) = rates.plot(controlled, place, marker=marker, color=colour, markersize=7)
            tell(point, f"{result.name} at equal length: {controlled:.3f}; as judged {judged:.3f}")
        rates.plot(
            judged, place, marker=marker, color=colour, markersize=7,
            markerfacecolor=PAPER, markeredgewidth=1.6,
        )  # fmt: skip
    tokens.set_title("mean tokens; the line: SFT")
    rates.set_title(f"win rate by {judge}; hollow: as judged, full: at equal length")
    return figure


def draw_logratios(results: Sequence[Result]) -> Figure:
    """Log-ratios of chosen and rejected completions: over training, by length and by margin."""
    figure = new_figure(10.2, 0.8 + 1.0 * len(results))
    titles = {"step": "over training", "length": "by length", "margin": "by margin"}
    units = {"step": "step", "length": "tokens of the completion", "margin": "margin, nats"}
    grid = figure.subplots(len(results), len(titles), squeeze=False)
    for row, result in zip(grid, results, strict=True):
        deciles = result.metrics["deciles"]
        for axes, panel in zip(row, titles, strict=True):
            axes.axhline(0, color=MUTED, linewidth=0.8)
            for side, dashes in (("chosen", "-"), ("rejected", (0, (2.5, 1.5)))):
                if panel == "step" and f"logratios/{side}" not in result.curve:
                    continue  # it learned from no pairs
                if panel == "step":
                    x, y = result.curve["step"], result.curve[f"logratios/{side}"]
                else:
                    x, y = zip(*deciles[panel][side], strict=True)
                axes.plot(
                    x, y, color=result.colour, linestyle=dashes, linewidth=1.5,
                    marker="" if panel == "step" else "o", markersize=2.5,
                )  # fmt: skip
            axes.grid(True, axis="y")
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.tick_params(axis="y", labelcolor=MUTED, labelsize=7.5)
            # Margins are as far apart as runs are; the others share their scale.
            if panel != "margin":
                if result is not results[0]:
                    axes.sharex(grid[0, list(titles).index(panel)])
                axes.tick_params(labelbottom=result is results[-1])
            if result is results[0]:
                axes.set_title(titles[panel])
            if result is results[-1]:
                axes.set_xlabel(units[panel])
        name_row(row[0], result)
    figure.align_ylabels(grid[:, 0])
    return figure


def draw_revisions(params: Params, results: Sequence[Result]) -> Figure:
    """Win rate against gold of every revision, a panel a split, with the bootstrap's bands."""
    judge = params.label.reward
    splits = list(results[0].metrics["revisions"])
    figure = new_figure(4.9 * max(2, len(splits)), 3.8)
    grid = figure.subplots(1, max(2, len(splits)), sharey=True)
    for axes in grid[len(splits) :]:
        axes.set_visible(False)
    for axes, split in zip(grid, splits, strict=False):
        axes.axhline(0.5, color=MUTED, linewidth=1)
        for result in results:
            by_revision = result.metrics["revisions"][split]
            numbers = [int(key) for key in by_revision]
            found = [by_revision[key]["gold"][judge] for key in by_revision]
            means = np.array([one["bootstrap_mean"] for one in found])
            spread = np.array([one["bootstrap_deviation"] for one in found])
            axes.fill_between(
                numbers, means - spread, means + spread, color=result.colour, alpha=0.12,
                linewidth=0,
            )  # fmt: skip
            axes.plot(numbers, means, color=result.colour, linewidth=1.6, label=result.name)
            for number, one in zip(numbers, found, strict=True):
                (point,) = axes.plot(
                    number, one["bootstrap_mean"], marker=result.marker, color=result.colour
                )
                tell(
                    point,
                    f"{result.name}, revision {number}, {split}: {one['value']:.3f} over gold by "
                    f"{judge}, 95% interval {one['low']:.3f} to {one['high']:.3f}, bootstrap "
                    f"{one['bootstrap_mean']:.3f} ± {one['bootstrap_deviation']:.3f}",
                )
        axes.grid(True)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("revision")
        where = "out of distribution" if split == "shifted" else "in distribution"
        axes.set_title(f"{split}, {where}")
    grid[0].set_ylabel(f"win rate over gold by {judge}")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def draw_reliability(reward_models: Mapping[str, Any]) -> Figure:
    """How often each reward model's predictions on held-out pairs came true, by confidence."""
    figure = new_figure(4.6, 3.4)
    axes = figure.subplots()
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
    for number, (name, metrics) in enumerate(reward_models.items()):
        bins = metrics["reliability"]
        confidence, correct = ([each[key] for each in bins] for key in ("confidence", "correct"))
        spread = [
            [each["correct"] - each["low"] for each in bins],
            [each["high"] - each["correct"] for each in bins],
        ]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.errorbar(confidence, correct, spread, color=colour, linewidth=1.2, label=name)
        for each in bins:
            (point,) = axes.plot(
                each["confidence"], each["correct"], color=colour, marker=marker, markersize=5
            )
            tell(
                point,
                f"{name}: {each['num_pairs']:.0f} pairs, confidence {each['confidence']:.2f}, came "
                f"true {each['correct']:.2f}, 95% interval {each['low']:.2f} to {each['high']:.2f}",
            )
    axes.set(xlim=(0.49, 1.01), ylim=(0, 1.02), xlabel="confidence", ylabel="came true")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return figure


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, str]],
    bars: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    """Write each point's name at the nearest place around it that is still free."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # what is measured here must not move again
    pixels = figure.dpi / 72
    anchors = [axes.transData.transform(point[:2]) for point in points]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12).padded(pixels) for x, y in anchors]
    taken += [Bbox(axes.transData.transform(bar)).padded(pixels) for bar in bars]
    taken += [text.get_window_extent() for text in axes.texts]
    for (x, y, name), anchor in zip(points, anchors, strict=True):
        label = axes.annotate(name, (x, y), (0, 0), textcoords="offset points")
        size = label.get_window_extent().size
        label.remove()
        places: dict[tuple[int, int], Bbox] = {}
        for offset in LABEL_OFFSETS:
            # Left of its point a text ends there, above it stands on its place, and so on.
            corner = anchor + pixels * np.array(offset) + (np.sign(offset) - 1) / 2 * size
            places[offset] = Bbox([corner, corner + size])
        offset = min(
            LABEL_OFFSETS, key=lambda o: badness(places[o], anchor, anchors, taken, axes.bbox)
        )
        taken.append(places[offset])
        far = max(map(abs, offset)) > LABEL_OFFSETS[len(DIRECTIONS)][0]
        axes.annotate(
            name,
            (x, y),
            offset,
            textcoords="offset points",
            ha=("right", "center", "left")[int(np.sign(offset[0])) + 1],
            va=("top", "center", "bottom")[int(np.sign(offset[1])) + 1],
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7} if far else None,
        )


def badness(
    place: Bbox, anchor: Any, anchors: Sequence[Any], taken: Sequence[Bbox], frame: Bbox
) -> int:
    """Texts, points and bars under a label, and points that it is nearer to than to its own."""

    def distance(point: Any) -> float:
        return float(np.linalg.norm(np.clip(point, place.min, place.max) - point))

    outside = frame.padded(1).count_contains(place.corners()) < 4
    covered = sum(place.overlaps(other) for other in taken)
    # A far label has a line to its point, so that only near ones can be taken for another's.
    near = distance(anchor) < 30
    confusing = near and any(distance(other) < distance(anchor) for other in anchors)
    return covered + confusing + 100 * outside


def draw_displacement(results: Sequence[Result]) -> Figure:
    figure = new_figure(10.2, 1.4 + 0.3 * len(results))
    medians, shares = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    panels: list[tuple[Axes, str, str, str]] = [
        (medians, "median_rejected", "median_chosen", "median log-ratio, nats"),
        (shares, "both_fell", "chosen_fell", "share of pairs"),
    ]
    for axes, hollow, full, unit in panels:
        rows_of_runs(axes, results)
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, result in enumerate(results):
            values = result.metrics["displacement"]
            colour, marker = result.colour, result.marker
            axes.hlines(place, values[hollow], values[full], color=colour, linewidth=2, alpha=0.5)
            (point,) = axes.plot(values[full], place, marker=marker, color=colour, markersize=7)
            (ring,) = axes.plot(
                values[hollow], place, marker=marker, color=colour, markersize=7,
                markerfacecolor=PAPER, markeredgewidth=1.6,
            )  # fmt: skip
            for artist, key in ((point, full), (ring, hollow)):
                tell(artist, f"{result.name}: {key.replace('_', ' ')} {values[key]:.3g}")
        axes.set_xlabel(unit)
    medians.set_title("full: chosen, hollow: rejected")
    shares.set_title("full: chosen fell, hollow: both fell")
    shares.set_xlim(-0.03, 1.03)
    return figure


def draw_curves(results: Sequence[Result]) -> Figure:
    panels = {
        "loss": "loss",
        "rewards/margins": "margin of implicit rewards",
        "rewards/accuracies": "accuracy of implicit rewards",
    }
    figure = new_figure(10.2, 0.6 + 0.85 * len(results))
    grid = figure.subplots(len(results), len(panels), sharex="col", squeeze=False)
    for row, result in zip(grid, results, strict=True):
        for axes, (column, title) in zip(row, panels.items(), strict=True):
            if column not in result.curve:
                axes.axis("off")  # it learned from no pairs
                continue
            values = result.curve[column]
            first = next(iter(values), 0.0)  # A run that trains nothing has no steps.
            start = {"loss": first, "rewards/margins": 0.0, "rewards/accuracies": 0.5}[column]
            axes.axhline(start, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.plot(result.curve["step"], values, color=result.colour, linewidth=1.5)
            if f"validation/{column}" in result.curve:
                axes.plot(
                    result.curve["step"], result.curve[f"validation/{column}"], linestyle="none",
                    marker="o", markersize=3.5, color=INK, markerfacecolor=PAPER,
                )  # fmt: skip
            axes.grid(True, axis="y")
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.tick_params(axis="y", labelcolor=MUTED, labelsize=7.5)
            if column == "rewards/accuracies":
                axes.set_ylim(-0.05, 1.05)
                axes.set_yticks([0, 0.5, 1])
            if result is results[0]:
                axes.set_title(title)
            if result is results[-1]:
                axes.set_xlabel("step")
        name_row(row[0], result)
    figure.align_ylabels(grid[:, 0])
    return figure


def divergence_figure(name: str, curves: "Curves", path: Path) -> None:
    """f, f' and the score of one divergence as an SVG file, with what decides its use marked.

    Shaded is where the score falls: there f-DPO lowers the chosen completion.
    """
    with rc_context(STYLE_OF_FIGURES):
        figure = new_figure(9.4, 3.4)
        of_f, of_slope, of_score = figure.subplots(1, 3)
        draw_generator(of_f, curves)
        draw_slope(of_slope, curves)
        draw_score(of_score, curves)
        for axes in (of_f, of_slope, of_score):
            axes.grid(True)
            axes.tick_params(axis="y", labelcolor=MUTED)
        figure.suptitle(f"f(t) = {name}", x=0.01, ha="left", color=MUTED, fontsize=9)
        save(figure, path)


def draw_generator(axes: Axes, curves: "Curves") -> None:
    curve(axes, curves.ratios, curves.f, seen=np.array(curves.ratios) > 0.2)
    axes.set_title("f(t)", pad=20)
    axes.set_xlabel("t = policy/reference")
    if 0 < curves.argmin <= curves.ratios[-1]:
        smallest = float(np.interp(curves.argmin, curves.ratios, curves.f))
        axes.plot(curves.argmin, smallest, marker="o", markersize=5, color=INK)
        note(axes, f"smallest at t = {curves.argmin:.4g}")
    elif np.isfinite(curves.argmin):
        note(axes, f"smallest at t = {curves.argmin:.4g}, not shown")
    else:
        note(axes, "falls for ever")


def draw_slope(axes: Axes, curves: "Curves") -> None:
    curve(axes, curves.ratios, curves.derivative, seen=np.array(curves.ratios) > 0.3)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_title("f'(t)", pad=20)
    axes.set_xlabel("t = policy/reference")
    slope = curves.slope_at_zero
    verdict = "DPO-inducing" if slope == -np.inf else "not DPO-inducing"
    note(axes, f"f'(0+) = {slope:.4g}: {verdict}")
    if np.isfinite(slope):
        axes.plot(0, slope, marker="o", color=COLOURS[0], markerfacecolor=PAPER, clip_on=False)
    if 0 < curves.argmin <= curves.ratios[-1]:
        axes.plot(curves.argmin, 0, marker="o", markersize=5, color=INK)


def draw_score(axes: Axes, curves: "Curves") -> None:
    u = np.array(curves.logratios)
    curve(axes, curves.logratios, curves.score, seen=u > -0.7)
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_title("score f'(e^u) - f'(1)", pad=20)
    axes.set_xlabel("u = log t")
    falls = np.gradient(curves.score, u) < -1e-9
    axes.fill_between(
        u, 0, 1, where=falls.tolist(), transform=axes.get_xaxis_transform(), color=COLOURS[4],
        alpha=0.12, linewidth=0,
    )  # fmt: skip
    if curves.peak is None:
        note(axes, "falls from the start" if falls[0] else "never falls")
        return
    at, height = curves.peak
    note(axes, f"turns down at t = {np.exp(at):.4g}, from {height:.4g}")
    if u[0] <= at <= u[-1]:
        axes.plot(at, height, marker="o", markersize=5, color=INK)


def curve(axes: Axes, x: Sequence[float], y: Sequence[float], seen: Any) -> None:
    """A line, its axis as high as the part of it that must be seen; the rest may leave it."""
    axes.plot(x, y, color=COLOURS[0], linewidth=1.8)
    low, high = float(np.array(y)[seen].min()), float(np.array(y)[seen].max())
    low, high = min(low, 0.0), max(high, 0.0)
    room = 0.12 * max(high - low, 1e-9)
    axes.set_xlim(min(0.0, x[0]), x[-1])
    axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def note(axes: Axes, text: str) -> None:
    axes.text(0, 1.03, text, transform=axes.transAxes, ha="left", va="bottom", color=MUTED)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rows_of_runs(axes: Axes, results: Sequence[Result]) -> None:
    """One row a run, first on top, a rule behind each."""
    axes.set_yticks(range(len(results)), [result.name for result in results])
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.grid(True)


def name_row(axes: Axes, result: Result) -> None:
    """Whose row of panels this is."""
    axes.set_ylabel(result.name, rotation=0, ha="right", va="center", color=INK, fontweight="bold")


def tell(artist: Artist, words: str) -> None:
    """What a point says when it is pointed at."""
    artist.set_gid(TOLD + words)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    # Laid out with matplotlib's font, read in the reader's own, which is narrower.
    text = path.read_text().replace(f"'{FIGURE_FONT}'", FONTS)
    text = re.sub(rf'<g id="{TOLD}([^"]*)">', r'<g class="point"><title>\1</title>', text)
    path.write_text(text)


def inline(path: Path, name: str) -> Markup:
    """A figure as part of the page: the page's colours, its own names, no fixed size."""
    text = path.read_text()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<= )(id="|(?:xlink:)?href="#|clip-path="url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return Markup(text)
