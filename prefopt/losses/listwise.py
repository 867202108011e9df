"""Losses on K completions of a prompt with rewards r: q = softmax(beta u) against p = softmax(r/T).

u are log-ratios, T the temperature. Each returns one loss per prompt, in nats. At K = 2 a pair is
a list whose p is its preference.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prefopt.batches import Rankings
from prefopt.divergences import Divergence
from prefopt.domains import Positive

PerPrompt = Float[Tensor, " batch"]


def dpo_rw(rankings: Rankings, *, beta: Positive, temperature: Positive) -> PerPrompt:
    """The cross-entropy of q under p: the forward KL(p || q), which covers p's modes.

    Ji et al. 2024 (arXiv:2402.00856), DPO with rewards.

    Args:
        rankings: evidence.
        beta: beta_pi there, the policy's temper.
        temperature: beta_r there, of the reward's softmax.

    Gradient:
        dL/du_k = beta (q_k - p_k)

    Optimum:
        pi_ref exp(r/(beta temperature)), normalised, in the limit of all completions as candidates.

    Elsewhere:
        EXO's repository: dpo-rw. At K = 2 with p one-hot it is DPO.
    """
    p = F.softmax(rankings.rewards / temperature, -1)
    return -(p * F.log_softmax(beta * rankings.completions.logratio, -1)).sum(-1)


def exo_rw(rankings: Rankings, *, beta: Positive, temperature: Positive) -> PerPrompt:
    """KL(q || p), the reverse KL, which seeks p's mode as RLHF does.

    Ji et al. 2024 (arXiv:2402.00856), EXO with rewards; candidates must come from pi_ref.

    Args:
        rankings: evidence.
        beta: beta_pi there, the policy's temper.
        temperature: beta_r there, of the reward's softmax.

    Gradient:
        dL/du_k = beta q_k (log(q_k/p_k) - KL(q || p))

    Optimum:
        pi_ref exp(r/(beta temperature)), normalised; for K towards infinity the gradient is that
        of KL(pi^beta || p), in the direction of KL-regularised RL.

    Elsewhere:
        EXO's repository: exo-rw, with temp 0.8 dividing both models' logits. TRL has K = 2 alone,
        as exo_pair.
    """
    log_q = F.log_softmax(beta * rankings.completions.logratio, -1)
    log_p = F.log_softmax(rankings.rewards / temperature, -1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def infonca(rankings: Rankings, *, beta: Positive, temperature: Positive) -> PerPrompt:
    """InfoNCA: the same function as dpo_rw under its own name.

    Chen et al. 2024 (arXiv:2402.05369).

    Args:
        rankings: evidence.
        beta: scale of the log-ratios.
        temperature: alpha there, of the reward's softmax.

    Gradient:
        dL/du_k = beta (q_k - p_k)

    Optimum:
        As dpo_rw's.

    Elsewhere:
        NCA's repository: InfoNCA.
    """
    return dpo_rw(rankings, beta=beta, temperature=temperature)


def nca(rankings: Rankings, *, beta: Positive, temperature: Positive) -> PerPrompt:
    """Noise-contrastive alignment: each log-ratio is learnt absolutely, K noise terms holding it.

    Chen et al. 2024 (arXiv:2402.05369).

    Args:
        rankings: evidence.
        beta: scale of the log-ratios.
        temperature: alpha there, of the reward's softmax.

    Gradient:
        dL/du_k = -beta p_k sigmoid(-beta u_k) + (beta/K) sigmoid(beta u_k)

    Optimum:
        sigmoid(beta u_k) = p_k/(p_k + 1/K), so beta u_k = log(K p_k).

    Elsewhere:
        NCA's repository: NCA. TRL 1.16: nca_pair, its K = 2 form with a hard label.
    """
    scores = beta * rankings.completions.logratio
    p = F.softmax(rankings.rewards / temperature, -1)
    return -(p * F.logsigmoid(scores)).sum(-1) - F.logsigmoid(-scores).mean(-1)


def f_po(
    rankings: Rankings, *, beta: Positive, temperature: Positive, divergence: Divergence
) -> PerPrompt:
    """D_f(q || p) for any f: EXO with another divergence between the two softmaxes.

    Han et al. 2024 (arXiv:2410.21662), f-PO.

    Args:
        rankings: evidence.
        beta: the policy's temper.
        temperature: of the reward's softmax.
        divergence: any; reverse_kl gives exo_rw, forward_kl dpo_rw less p's entropy.

    Gradient:
        dL/du_k = beta q_k (f'(q_k/p_k) - sum_j q_j f'(q_j/p_j))

    Optimum:
        As exo_rw's, for every f with f(1) its only zero.

    Elsewhere:
        f-PO's repository: alpha, jeff, sh (squared Hellinger), exo.
    """
    log_q = F.log_softmax(beta * rankings.completions.logratio, -1)
    log_p = F.log_softmax(rankings.rewards / temperature, -1)
    return (log_p.exp() * divergence.f(log_q - log_p)).sum(-1)
