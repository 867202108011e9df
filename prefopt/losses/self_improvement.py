"""Losses that train a policy to write and to improve what is written."""

from jaxtyping import Float
from torch import Tensor

from prefopt.batches import Revisions
from prefopt.domains import Fraction, Positive

PerPair = Float[Tensor, " batch"]


def srpo(revisions: Revisions, *, beta: Positive, alpha: Fraction) -> PerPair:
    """Self-improving robust preference optimisation: the generator's and the improver's regression.

    Choi et al. 2024 (arXiv:2406.01660). R is a log-ratio under the plain prompt, R(a|b) that of a
    under the prompt that shows b.

    Args:
        revisions: evidence.
        beta: weight of both KLs.
        alpha: weight of the improver, inside (0, 1): at 0 neither role is identified, at 1 the
            generator is not trained.

    Optimum:
        Improver pi_ref(y|y') exp(P(y > y')/beta)/Z(y'), generator pi_ref(y)/Z(y), normalised;
        neither depends on who wrote the pairs.

    Elsewhere:
        No trainer has it; "SRPO" and "RPO" name other methods there. These terms, from sampled
        labels, equal four times the generator's and twice the improver's population loss, so alpha
        here is alpha/(2 - alpha) there: 0.8 is 2/3.
    """
    plain = revisions.chosen.logratio - revisions.rejected.logratio
    w_given_l = revisions.chosen_given_rejected.logratio
    l_given_l = revisions.rejected_given_rejected.logratio
    w_given_w = revisions.chosen_given_chosen.logratio
    l_given_w = revisions.rejected_given_chosen.logratio
    generator = (beta * (w_given_l - l_given_w + plain) - 1) ** 2
    worsened = (0.5 - beta * (w_given_l - l_given_l)) ** 2
    kept = (0.5 - beta * (w_given_w - l_given_w)) ** 2
    return (1 - alpha) * generator + alpha * (worsened + kept)
