"""Programmatic rewards: what says how good one text is, without a model.

A reward reads the whole text, prompt and completion; higher is better. Rewards load what they need
when first asked.
"""

from collections.abc import Callable

Reward = Callable[[str], float]


def load_reward(name: str) -> Reward:
    """The reward called `name` in params.yaml."""
    return {"vader": _vader, "textblob": _textblob}[name]()


def _vader() -> Reward:
    """Compound sentiment in [-1, 1]. Hutto and Gilbert 2014."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


def _textblob() -> Reward:
    """Polarity in [-1, 1] of TextBlob's pattern lexicon, made apart from VADER's."""
    from textblob.en import sentiment

    return lambda text: sentiment(text)[0]
