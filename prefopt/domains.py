"""Hyperparameter domains as types: a loss's signature is its configuration schema.

The bounds are `annotated_types`, which pydantic reads; this package does not know pydantic.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from annotated_types import Interval as _Interval

from prefopt.divergences import Divergence

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Negative = Annotated[float, Lt(0)]
Smoothing = Annotated[float, Ge(0), Lt(0.5)]
OpenSmoothing = Annotated[float, Gt(0), Lt(0.5)]
Fraction = Annotated[float, _Interval(gt=0, lt=1)]
Share = Annotated[float, Ge(0), Le(1)]
# For losses that hold only where f'(0+) = -inf.
DPOInducing = Annotated[Divergence, "f'(0+) = -inf"]
