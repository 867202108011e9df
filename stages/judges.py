"""Judges: what says which of two completions of a prompt is better.

A reward reads the whole text, prompt and completion; the higher one wins, equal ones tie. Rewards
load what they need when first asked.
"""

from collections.abc import Callable
from typing import Literal

Reward = Callable[[str], float]
Verdict = Literal["policy", "opponent", "tie"]


def reward(name: str) -> Reward:
    """The reward called `name` in params.yaml."""
    return {"vader": _vader, "textblob": _textblob}[name]()


def verdict(policy_reward: float, opponent_reward: float) -> Verdict:
    if policy_reward == opponent_reward:
        return "tie"
    return "policy" if policy_reward > opponent_reward else "opponent"


def _vader() -> Reward:
    """Compound sentiment in [-1, 1]. Hutto and Gilbert 2014."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


def _textblob() -> Reward:
    """Polarity in [-1, 1] of TextBlob's pattern lexicon, made apart from VADER's."""
    from textblob.en import sentiment

    return lambda text: sentiment(text)[0]
