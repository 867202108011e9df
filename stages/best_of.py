"""Best-of-N as a run: `{best_of: 4}`. Nothing is trained; the policy is a way to sample from SFT.

Of N completions that SFT draws of a prompt, the one of the highest gold reward is kept, and the
earliest of those where several have it.
"""

from collections.abc import Sequence

from stages.params import BestOf, Params, checked


def best_of(params: Params, run: str) -> BestOf | None:
    """The run as best-of-N; None if it trains by a loss, or is SFT itself.

    Raises:
        ValueError: if it is best-of-N and says anything else beside it.
    """
    row = params.runs.get(run, {})
    return checked(BestOf, row, f"runs.{run}") if "best_of" in row else None


def first_best(rewards: Sequence[float], size: int) -> list[int]:
    """Numbers of the kept ones, of draws that lie together in groups of `size`."""
    return [
        max(range(start, start + size), key=rewards.__getitem__)
        for start in range(0, len(rewards), size)
    ]
