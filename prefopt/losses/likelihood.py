"""The likelihood term that any loss on pairs may carry beside it."""

from jaxtyping import Float
from torch import Tensor

from prefopt.batches import Scored


def nll(chosen: Scored, num_tokens: int) -> Float[Tensor, ""]:
    """A micro-batch's share of the mean negative log-likelihood of chosen completions.

    Args:
        chosen: completions of the micro-batch.
        num_tokens: chosen tokens of the whole step, so that shares add up to the step's mean
            however it is cut.

    Returns:
        Nats a token.
    """
    return -chosen.logp.sum() / num_tokens
