"""Statistics of verdicts: intervals, paired comparison, length control, ratings, power.

A verdict is worth 1 to a policy that wins, 1/2 in a tie, 0 when it loses; NaN stands for one that
is missing. Prompts are the unit that is sampled: whatever was judged on one prompt (samples, both
orders of presentation, several training seeds) shares its difficulty and is never counted as
independent. numpy, and scipy and statsmodels where they are used.
"""
