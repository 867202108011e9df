"""Bradley-Terry ratings of all that was compared, on Elo's scale."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

ELO_A_NAT = 400 / math.log(10)
RESAMPLES_AT_ONCE = 1000


@dataclass(frozen=True)
class Rating:
    """Elo of one participant; the anchor's is certain."""

    elo: float
    low: float
    high: float


@dataclass(frozen=True)
class Games:
    """Verdicts between participants, one a row.

    Args:
        names: of the participants.
        first: a row's first participant, as a place in `names`.
        second: its second.
        points: the first's; NaN is left out.
        prompts: which prompt it was about.
    """

    names: list[str]
    first: Integer[np.ndarray, " games"]
    second: Integer[np.ndarray, " games"]
    points: Float[np.ndarray, " games"]
    prompts: Integer[np.ndarray, " games"]


def ratings(
    games: Games,
    *,
    anchor: str,
    anchored_at: float = 1000.0,
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> dict[str, Rating]:
    """Elo by the likeliest Bradley-Terry model, prompts resampled for the intervals.

    P(i beats j) = 1 / (1 + 10^((elo_j - elo_i) / 400)): Bradley and Terry 1952 (Biometrika
    39:324), on Elo's scale. A tie is half a win for either. Every pair of participants
    that met is given one more tie, without which one that won everything would have no finite
    rating (Caron and Doucet 2012, arXiv:1011.1761, with a prior for each pair).
    Intervals are percentiles over prompts drawn with replacement, all games of a prompt together.

    Raises:
        ValueError: if the anchor played no game, or somebody has no chain of games to the anchor.
    """
    known = ~np.isnan(games.points)
    first, second = games.first[known], games.second[known]
    points, (names, prompt) = (
        games.points[known],
        np.unique(games.prompts[known], return_inverse=True),
    )
    size = len(games.names)
    # wins[prompt, i, j]: what i won from j.
    wins = np.zeros((len(names), size, size))
    np.add.at(wins, (prompt, first, second), points)
    np.add.at(wins, (prompt, second, first), 1 - points)
    met = (wins + wins.transpose(0, 2, 1)).sum(0) > 0
    _check_connected(games.names, met, anchor)
    at = games.names.index(anchor)
    prior = met / 2

    def elo(of: Float[np.ndarray, "fits n n"]) -> Float[np.ndarray, "fits n"]:
        strength = _strengths(of + prior)
        return anchored_at + ELO_A_NAT * (strength - strength[:, at, None])

    value = elo(wins.sum(0)[None])[0]
    generator = np.random.default_rng(seed)
    found = np.empty((num_resamples, size))
    for start in range(0, num_resamples, RESAMPLES_AT_ONCE):
        many = min(RESAMPLES_AT_ONCE, num_resamples - start)
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), many)
        resampled = (drawn @ wins.reshape(len(names), -1)).reshape(many, size, size)
        found[start : start + many] = elo(resampled)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {
        name: Rating(float(value[i]), float(low[i]), float(high[i]))
        for i, name in enumerate(games.names)
    }


def _check_connected(names: list[str], met: np.ndarray, anchor: str) -> None:
    reached = np.array([name == anchor for name in names])
    for _ in names:
        reached = reached | met[reached].any(0)
    if not reached.all():
        apart = [name for name, is_reached in zip(names, reached, strict=True) if not is_reached]
        raise ValueError(
            f"ratings: no chain of games leads from '{anchor}' to some, got {', '.join(apart)}; "
            "judge them against one that is connected"
        )


def _strengths(wins: Float[np.ndarray, "fits n n"]) -> Float[np.ndarray, "fits n"]:
    """Log-strengths of greatest likelihood, mean 0, by Newton's method with cut steps."""
    size = wins.shape[-1]
    games, won = wins + wins.transpose(0, 2, 1), wins.sum(2)
    strength = np.zeros(wins.shape[:2])
    for _ in range(200):
        p = 0.5 * (1 + np.tanh((strength[:, :, None] - strength[:, None, :]) / 2))
        slope = won - (games * p).sum(2)
        curve = games * p * (1 - p)
        # The likelihood is blind to a common shift; 1 in every cell forbids it.
        hessian = np.eye(size) * curve.sum(2)[:, :, None] - curve + 1.0
        step = np.linalg.solve(hessian, slope[..., None])[..., 0]
        step /= np.maximum(1.0, np.abs(step).max(1, keepdims=True))
        strength = strength + step
        if np.abs(step).max() < 1e-9:
            return strength
    raise AssertionError("ratings: Newton's method has not converged")
