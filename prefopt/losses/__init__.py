"""Every objective by name: `LOSSES[name]`.

The table is data, and reading it imports no torch. Its formulas are in the symbols of the batch
(`prefopt.batches`) and the loss's hyperparameters; `prefopt.losses.formulas` reads them, and the
proofs hold each function against its own row.

`sg` stops the gradient; `score`, `derivative` and `f` are the divergence's; sums, means and
softmaxes run over the K completions of a prompt, or over the micro-batch where a row says that it
couples examples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Loss:
    """An entry of the table.

    Args:
        name: as written in params.yaml, and the function's.
        family: the module that holds the function.
        evidence: the batch type.
        formula: the loss of one example.
        reward: a completion's implicit reward under the objective, in u, logp, n.
        at_reference: the loss where the policy is the reference; empty where that says nothing.
        paper: authors, year and arXiv number.
        reads: log-probabilities as a `sum` over tokens or as their `mean`.
        reference: whether the reference is read.
        couples: whether examples of a micro-batch change each other's loss.
    """

    name: str
    family: str
    evidence: str
    formula: str
    reward: str
    at_reference: str
    paper: str
    reads: str = "sum"
    reference: bool = True
    couples: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        """Batch and keyword hyperparameters in, one number per example out."""
        from prefopt.losses import (
            distributional,
            listwise,
            pairwise,
            reference_free,
            reinforcement,
            self_improvement,
            unpaired,
        )

        families = (
            distributional,
            listwise,
            pairwise,
            reference_free,
            reinforcement,
            self_improvement,
            unpaired,
        )
        (module,) = (m for m in families if m.__name__ == f"prefopt.losses.{self.family}")
        return vars(module)[self.name]


_EXO = (
    "sigmoid(beta*h)*(log_sigmoid(beta*h) - log(1 - label_smoothing))"
    " + sigmoid(-beta*h)*(log_sigmoid(-beta*h) - log(label_smoothing))"
)
_SRPO = (
    "(1 - alpha)*(beta*(u_w_given_l - u_l_given_w + u_w - u_l) - 1)**2"
    " + alpha*((1/2 - beta*(u_w_given_l - u_l_given_l))**2"
    " + (1/2 - beta*(u_w_given_w - u_l_given_w))**2)"
)
_KTO = (
    "desirable*desirable_weight*(1 - sigmoid(beta*(u - sg(max(0, mean(u_mismatched))))))"
    " + (1 - desirable)*undesirable_weight*(1 - sigmoid(beta*(sg(max(0, mean(u_mismatched))) - u)))"
)
_P, _LOG_P = "softmax(r/temperature)", "log_softmax(r/temperature)"
_Q, _LOG_Q = "softmax(beta*u)", "log_softmax(beta*u)"

# fmt: off
LOSSES: dict[str, Loss] = {
    row.name: row
    for row in (
        # name, family, evidence,
        # formula,
        # implicit reward, value at the reference, paper
        Loss("dpo", "pairwise", "Pairs",
             "-(1 - label_smoothing)*log_sigmoid(beta*h) - label_smoothing*log_sigmoid(-beta*h)",
             "beta*u", "log(2)", "Rafailov et al. 2023, 2305.18290"),
        Loss("rdpo", "pairwise", "Pairs",
             "(label_smoothing*log_sigmoid(-beta*h) - (1"
             " - label_smoothing)*log_sigmoid(beta*h))/(1 - 2*label_smoothing)",
             "beta*u", "log(2)", "Chowdhury et al. 2024, 2403.00409"),
        Loss("ipo", "pairwise", "Pairs",
             "(h - 1/(2*tau))**2",
             "tau*u", "1/(4*tau**2)", "Azar et al. 2023, 2310.12036"),
        Loss("psi_po", "pairwise", "Pairs",
             "(h - (psi(p) - psi(1 - p))/(2*tau))**2",
             "tau*u", "((psi(p) - psi(1 - p))/(2*tau))**2", "Azar et al. 2023, 2310.12036"),
        Loss("hinge", "pairwise", "Pairs",
             "max(0, 1 - beta*h)",
             "beta*u", "1", "Liu et al. 2023, 2309.06657"),
        Loss("f_dpo", "pairwise", "Pairs",
             "-log_sigmoid(beta*(score(u_w) - score(u_l)))",
             "beta*score(u)", "log(2)",
             "Wang et al. 2023, 2309.16240; Pipano et al. 2026, 2602.06788"),
        Loss("exo_pref", "pairwise", "Pairs",
             _EXO,
             "beta*u", "-log(2) - log(label_smoothing*(1 - label_smoothing))/2",
             "Ji et al. 2024, 2402.00856"),
        Loss("chi_po", "pairwise", "Pairs",
             "-log_sigmoid(min(2*max_reward, max(-2*max_reward, beta*(u_w + exp(u_w) - u_l"
             " - exp(u_l)))))",
             "beta*(u + exp(u) - 1)", "log(2)", "Huang et al. 2024, 2407.13399"),
        Loss("sppo", "pairwise", "Pairs",
             "(u_w - 1/(2*beta))**2 + (u_l + 1/(2*beta))**2",
             "beta*u", "1/(2*beta**2)", "Wu et al. 2024, 2405.00675"),
        Loss("dpop", "pairwise", "Pairs",
             "-log_sigmoid(beta*(h - penalty*max(0, -u_w)))",
             "beta*u", "log(2)", "Pal et al. 2024, 2402.13228"),
        Loss("apo_zero", "pairwise", "Pairs",
             "1 - sigmoid(beta*u_w) + sigmoid(beta*u_l)",
             "beta*u", "1", "D'Oosterlinck et al. 2024, 2408.06266"),
        Loss("apo_down", "pairwise", "Pairs",
             "sigmoid(beta*u_w) + 1 - sigmoid(beta*h)",
             "beta*u", "1", "D'Oosterlinck et al. 2024, 2408.06266"),
        Loss("nca_pair", "pairwise", "Pairs",
             "-log_sigmoid(beta*u_w) - log_sigmoid(-beta*u_w)/2 - log_sigmoid(-beta*u_l)/2",
             "beta*u", "2*log(2)", "Chen et al. 2024, 2402.05369"),
        Loss("bco_pair", "pairwise", "Pairs",
             "-log_sigmoid(beta*u_w) - log_sigmoid(-beta*u_l)",
             "beta*u", "2*log(2)", "Jung et al. 2024, 2404.04656"),
        Loss("cal_dpo", "pairwise", "Pairs",
             "-log_sigmoid(h) + calibration*((u_w - 1/(2*beta))**2 + (u_l + 1/(2*beta))**2)",
             "beta*u", "log(2) + calibration/(2*beta**2)", "Xiao et al. 2024, 2412.14516"),
        Loss("dpo_norm", "pairwise", "Pairs",
             "-log_sigmoid(beta*(u_w/n_w - u_l/n_l))",
             "beta*u/n", "log(2)", "Lambert et al. 2024, 2411.15124", reads="mean"),
        Loss("r_dpo", "pairwise", "Pairs",
             "-log_sigmoid(beta*h + alpha*(n_w - n_l))",
             "beta*u + alpha*n", "-log_sigmoid(alpha*(n_w - n_l))", "Park et al. 2024, 2403.19159"),
        Loss("ld_dpo", "pairwise", "SharedPairs",
             "-log_sigmoid(beta*(alpha*h + (1 - alpha)*h_shared))",
             "beta*(alpha*u + (1 - alpha)*u_shared)", "log(2)", "Liu et al. 2024, 2409.06411"),
        Loss("wpo", "pairwise", "WeightedPairs",
             "-sg(weight)*log_sigmoid(beta*h)",
             "beta*u", "weight*log(2)", "Zhou et al. 2024, 2406.11827"),
        Loss("tdpo1", "pairwise", "SequentialPairs",
             "-log_sigmoid(beta*(h - (kl_l - kl_w)))",
             "beta*(u + kl)", "log(2)", "Zeng et al. 2024, 2404.11999"),
        Loss("tdpo2", "pairwise", "SequentialPairs",
             "-log_sigmoid(beta*(h - alpha*(kl_l - sg(kl_w))))",
             "beta*(u + alpha*kl)", "log(2)", "Zeng et al. 2024, 2404.11999"),
        Loss("simpo", "reference_free", "Pairs",
             "-log_sigmoid(beta*(logp_w/n_w - logp_l/n_l) - gamma)",
             "beta*logp/n", "", "Meng et al. 2024, 2405.14734", reads="mean", reference=False),
        Loss("cpo", "reference_free", "Pairs",
             "-log_sigmoid(beta*(logp_w - logp_l)) - nll_weight*logp_w/n_w",
             "beta*logp", "", "Xu et al. 2024, 2401.08417", reference=False),
        Loss("orpo", "reference_free", "Pairs",
             "-logp_w/n_w - odds_weight*log_sigmoid(log_odds(logp_w/n_w) - log_odds(logp_l/n_l))",
             "log_odds(logp/n)", "", "Hong et al. 2024, 2403.07691", reads="mean", reference=False),
        Loss("slic", "reference_free", "Pairs",
             "max(0, delta - logp_w + logp_l) - nll_weight*logp_w",
             "logp", "", "Zhao et al. 2023, 2305.10425", reference=False),
        Loss("preferred_ft", "reference_free", "Pairs",
             "-logp_w",
             "logp", "", "Rafailov et al. 2023, 2305.18290", reference=False),
        Loss("dpo_rw", "listwise", "Rankings",
             f"-sum({_P}*{_LOG_Q})",
             "beta*u", "log(k)", "Ji et al. 2024, 2402.00856"),
        Loss("exo_rw", "listwise", "Rankings",
             f"sum({_Q}*({_LOG_Q} - {_LOG_P}))",
             "beta*u", f"-log(k) - mean({_LOG_P})", "Ji et al. 2024, 2402.00856"),
        Loss("infonca", "listwise", "Rankings",
             f"-sum({_P}*{_LOG_Q})",
             "beta*u", "log(k)", "Chen et al. 2024, 2402.05369"),
        Loss("nca", "listwise", "Rankings",
             f"-sum({_P}*log_sigmoid(beta*u)) - mean(log_sigmoid(-beta*u))",
             "beta*u", "2*log(2)", "Chen et al. 2024, 2402.05369"),
        Loss("f_po", "listwise", "Rankings",
             f"sum({_P}*f({_LOG_Q} - {_LOG_P}))",
             "beta*u", f"sum({_P}*f(-log(k) - {_LOG_P}))", "Han et al. 2024, 2410.21662"),
        Loss("kto", "unpaired", "Labelled",
             _KTO,
             "beta*u", "(desirable*desirable_weight + (1 - desirable)*undesirable_weight)/2",
             "Ethayarajh et al. 2024, 2402.01306", couples=True),
        Loss("srpo", "self_improvement", "Revisions",
             _SRPO,
             "beta*u", "1 - alpha/2", "Choi et al. 2024, 2406.01660"),
        Loss("f_dpg", "distributional", "Samples",
             "-sg(exp(logp - logp_q)*(max(floor, -derivative(logp - logp_p)) - baseline))*logp",
             "", "", "Go et al. 2023, 2302.08215", reference=False),
        Loss("rloo", "reinforcement", "Rollouts",
             "-sg(exp(logp - logp_q)*(r - beta*u - baseline))*logp",
             "beta*u", "", "Ahmadian et al. 2024, 2402.14740"),
        Loss("ppo", "reinforcement", "Rollouts",
             "-min(exp(logp - logp_q)*(r - beta*u_q - baseline), min(1 + clip, max(1 - clip,"
             " exp(logp - logp_q)))*(r - beta*u_q - baseline))",
             "beta*u", "", "Schulman et al. 2017, 1707.06347"),
    )
}
# fmt: on
