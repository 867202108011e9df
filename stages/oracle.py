"""Side by side with TRL, where it is installed: the same token ids in, the same loss out.

TRL's trainers tokenise a few sentences and are asked for their loss on them, under a tiny random
policy and another random reference. Ours is computed from the token ids in the very batch that
they read, on the same models, by `prefopt.scoring`. `COMPARISONS` is the table of what is compared,
with every convention in which the two differ; `NOT_HERE` names what TRL alone has.
"""

import copy
import importlib.metadata
import random
import tempfile
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub import constants as hub
from jaxtyping import Float
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl.import_utils import TRLExperimentalWarning
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from prefopt.batches import Labelled, Pairs, Rankings, Scored, SharedPairs, WeightedPairs
from prefopt.divergences import DIVERGENCES, alpha
from prefopt.losses import LOSSES
from prefopt.losses.likelihood import nll
from prefopt.packing import Row
from prefopt.proofs import Case, Proof, mapped
from prefopt.psi import psi
from prefopt.scoring import token_logps, token_logps_and_collisions

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

# Relative to losses above 1; log-probabilities are float32 on both sides.
TOLERANCE = 2e-6

# Chosen sides are shorter than, longer than and as long as rejected ones.
PAIRS = [
    {"prompt": "the sky is", "chosen": " blue", "rejected": " a large green cheese"},
    {"prompt": "tea", "chosen": " or coffee or nothing at all", "rejected": " is green"},
    {"prompt": "one and one", "chosen": " is two", "rejected": " is one"},
    {"prompt": "is the cheese blue or green", "chosen": " it is", "rejected": " nothing is"},
]
COMPLETIONS = [
    {"prompt": "the sky is", "completion": " blue", "label": True},
    {"prompt": "tea", "completion": " is a large green cheese", "label": False},
    {"prompt": "one and one", "completion": " is two", "label": True},
    {"prompt": "is the cheese blue", "completion": " nothing is", "label": False},
    {"prompt": "coffee or tea", "completion": " it is tea at one and coffee at two", "label": True},
]
CONTROL = ["<s>", "</s>", "<pad>"]
WORDS = sorted({word for row in PAIRS for text in row.values() for word in text.split()})
VOCABULARY = {token: i for i, token in enumerate([*CONTROL, *WORDS])}
COMMON: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
ARCHITECTURES: tuple[PreTrainedConfig, ...] = (
    LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        **COMMON,
    ),
    GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **COMMON),
)
# Of the policy and of the reference: some of their WPO weights exceed 1, and KTO's estimate of the
# KL is positive under one architecture alone.
SEEDS = (2, 3)

Collated = dict[str, Any]
Number = Float[Tensor, ""]


@dataclass(frozen=True)
class Reading:
    """What a trainer of TRL's reads.

    Args:
        batch: as the trainer collates it.
        rows: its completions; of pairs, the chosen ones and then the rejected ones.
        policy: what the trainer has a copy of.
        reference: likewise.
    """

    batch: Collated
    rows: list[Row]
    policy: PreTrainedModel
    reference: PreTrainedModel

    @property
    def chosen(self) -> list[Row]:
        return self.rows[: len(self.rows) // 2]

    def scored(self, rows: Sequence[Row]) -> Scored:
        logp, reference_logp = (
            torch.stack([logps.sum() for logps in token_logps(model, rows)])
            for model in (self.policy, self.reference)
        )
        return Scored(logp, reference_logp, torch.tensor([len(row.completion) for row in rows]))


# What becomes of log-probabilities before a loss reads them.

View = Callable[[Scored], Scored]


def as_read(scored: Scored) -> Scored:
    return scored


def per_token(scored: Scored) -> Scored:
    return replace(
        scored,
        logp=scored.logp / scored.tokens,
        reference_logp=scored.reference_logp / scored.tokens,
    )


def without_reference(scored: Scored) -> Scored:
    """Under a reference that is indifferent: 0 nats for every completion."""
    return replace(scored, reference_logp=torch.zeros_like(scored.reference_logp))


def per_token_without_reference(scored: Scored) -> Scored:
    return per_token(without_reference(scored))


# Negative log-likelihoods of chosen completions, which differ in what the mean is taken over.

Term = Callable[[Reading], Number]


def nothing(reading: Reading) -> Number:
    return torch.tensor(0.0)


def nll_over_completions(reading: Reading) -> Number:
    """Ours: of each completion's mean."""
    return -reading.scored(reading.chosen).mean_logp.mean()


def nll_over_tokens(reading: Reading) -> Number:
    chosen = reading.scored(reading.chosen)
    return nll(chosen, int(chosen.tokens.sum()))


def nll_over_all_tokens(reading: Reading) -> Number:
    """Those of prompts included, but for the first."""
    wholes = [[*row.prompt, *row.completion] for row in reading.chosen]
    scored = reading.scored([Row(tokens[:1], tokens[1:]) for tokens in wholes])
    return nll(scored, int(scored.tokens.sum()))


# What TRL's collators make.


def rows_of_masked(batch: Collated) -> list[Row]:
    """One tensor, chosen completions before rejected ones, and a mask of the completions."""
    return _rows(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])


def rows_of_sides(batch: Collated) -> list[Row]:
    """A tensor a side, and labels that are -100 but for the completions."""
    return [
        row
        for side in ("chosen", "rejected")
        for row in _rows(
            batch[f"{side}_input_ids"],
            batch[f"{side}_attention_mask"],
            batch[f"{side}_labels"] != -100,
        )
    ]


def _rows(tokens: Tensor, real: Tensor, completion: Tensor) -> list[Row]:
    return [
        Row(row[mask.bool() & ~written.bool()].tolist(), row[written.bool()].tolist())
        for row, mask, written in zip(tokens, real, completion, strict=True)
    ]


@dataclass(frozen=True)
class Trainer:
    """One of TRL's.

    Args:
        type: its class.
        config: the class of its settings.
        examples: what it tokenises and collates, all of it into one batch.
        rows: the completions of that batch.
        reads_reference: whether it takes one.
    """

    type: Any
    config: Any
    examples: list[dict[str, Any]]
    rows: Callable[[Collated], list[Row]]
    reads_reference: bool


DPO = Trainer(DPOTrainer, DPOConfig, PAIRS, rows_of_masked, reads_reference=True)
KTO = Trainer(KTOTrainer, KTOConfig, COMPLETIONS, rows_of_masked, reads_reference=True)
CPO = Trainer(CPOTrainer, CPOConfig, PAIRS, rows_of_sides, reads_reference=False)
ORPO = Trainer(ORPOTrainer, ORPOConfig, PAIRS, rows_of_sides, reads_reference=False)
# It takes pairs apart: chosen completions first.
KTO_ON_PAIRS = replace(KTO, examples=PAIRS)


@dataclass(frozen=True)
class Comparison:
    """One of our losses, and how TRL is asked for the same number.

    Args:
        loss: its name.
        hyperparameters: its own.
        trainer: TRL's.
        settings: of the trainer.
        law: TRL's name for the loss, and what is mapped.
        variant: what tells the row from others of the same loss.
        view: what becomes of our log-probabilities first.
        preference: P(chosen > rejected), for a loss that reads it, or that reads a list of the two
            with rewards whose softmax it is.
        scale: of our loss.
        term: what our loss lacks.
        flipped: share of TRL's loss that is taken with chosen and rejected exchanged.
    """

    loss: str
    hyperparameters: dict[str, Any]
    trainer: Trainer
    settings: dict[str, Any]
    law: str
    variant: str = ""
    view: View = as_read
    preference: float = 1.0
    scale: float = 1.0
    term: Term = nothing
    flipped: float = 0.0

    @property
    def case(self) -> Case:
        return Case(LOSSES[self.loss], self.hyperparameters, self.variant)

    def evidence(self, reading: Reading) -> Any:
        """The batch that our loss reads."""
        return BATCHES[self.case.loss.evidence](self, reading)

    def ours(self, reading: Reading) -> float:
        losses = self.case(self.evidence(reading))
        return (self.scale * losses.mean() + self.term(reading)).item()

    def theirs(self, trainer: Any, batch: Collated) -> float:
        loss = _loss_of(trainer, batch)
        if not self.flipped:
            return loss
        exchanged = {name: torch.cat(tensor.chunk(2)[::-1]) for name, tensor in batch.items()}
        return (1 - self.flipped) * loss + self.flipped * _loss_of(trainer, exchanged)


@dataclass(frozen=True)
class Answer:
    """What TRL says of a comparison.

    Args:
        reading: what it was asked about.
        loss: its own, mapped.
    """

    reading: Reading
    loss: float

    def error(self, comparison: Comparison) -> float:
        """How far ours is from it, relative to losses above 1."""
        return abs(comparison.ours(self.reading) - self.loss) / max(1.0, abs(self.loss))


# fmt: off
COMPARISONS: tuple[Comparison, ...] = (
    # our loss, its hyperparameters,
    # TRL's trainer, its settings,
    # TRL's name for the loss, and what is mapped
    Comparison("dpo", {"beta": 0.2},
               DPO, {"loss_type": "sigmoid", "beta": 0.2},
               "sigmoid"),
    Comparison("dpo", {"beta": 0.2, "label_smoothing": 0.1},
               DPO, {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.1},
               "sigmoid, which ignores label_smoothing: that share of it with the sides exchanged",
               variant="label_smoothing", flipped=0.1),
    Comparison("dpo", {"beta": 0.2},
               DPO, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.2},
               "sigmoid and half of sft, the chosen's NLL over all tokens of a micro-batch",
               variant="sft", term=lambda read: 0.5 * nll_over_tokens(read)),
    Comparison("dpo", {"beta": 0.2, "label_smoothing": 0.1},
               CPO, {"loss_type": "sigmoid", "beta": 0.2, "label_smoothing": 0.1, "cpo_alpha": 0.0},
               "CPOTrainer's sigmoid without NLL, which heeds label_smoothing: no reference",
               variant="no reference", view=without_reference),
    Comparison("rdpo", {"beta": 0.2, "label_smoothing": 0.1},
               DPO, {"loss_type": "robust", "beta": 0.2, "label_smoothing": 0.1},
               "robust"),
    Comparison("ipo", {"tau": 0.2},
               DPO, {"loss_type": "ipo", "beta": 0.2},
               "ipo, whose beta is tau: log-probabilities per token",
               view=per_token),
    Comparison("ipo", {"tau": 0.2},
               CPO, {"loss_type": "ipo", "beta": 0.2, "cpo_alpha": 0.0},
               "CPOTrainer's ipo without NLL: log-probabilities per token, no reference",
               variant="no reference", view=per_token_without_reference),
    Comparison("psi_po", {"tau": 0.2, "psi": psi("identity")},
               DPO, {"loss_type": "ipo", "beta": 0.2},
               "ipo: Psi is the identity, preferences are 1, log-probabilities per token",
               variant="identity", view=per_token),
    Comparison("hinge", {"beta": 0.2},
               DPO, {"loss_type": "hinge", "beta": 0.2},
               "hinge"),
    Comparison("f_dpo", {"beta": 0.2, "divergence": DIVERGENCES["reverse_kl"]},
               DPO, {"loss_type": "sigmoid", "beta": 0.2, "f_divergence_type": "reverse_kl"},
               "sigmoid with reverse_kl",
               variant="reverse_kl"),
    Comparison("f_dpo", {"beta": 0.2, "divergence": DIVERGENCES["forward_kl"]},
               DPO, {"loss_type": "sigmoid", "beta": 0.2, "f_divergence_type": "forward_kl"},
               "sigmoid with forward_kl",
               variant="forward_kl"),
    Comparison("f_dpo", {"beta": 0.2, "divergence": DIVERGENCES["jensen_shannon"]},
               DPO, {"loss_type": "sigmoid", "beta": 0.2, "f_divergence_type": "js_divergence"},
               "sigmoid with js_divergence",
               variant="jensen_shannon"),
    Comparison("f_dpo", {"beta": 0.2, "divergence": alpha(0.3)},
               DPO, {"loss_type": "sigmoid", "beta": 0.2, "f_divergence_type": "alpha_divergence",
                     "f_alpha_divergence_coef": 0.7},
               "sigmoid with alpha_divergence, whose coefficient is 1 - alpha",
               variant="alpha(0.3)"),
    Comparison("f_dpo", {"beta": 0.4, "divergence": DIVERGENCES["squared_hellinger"]},
               DPO, {"loss_type": "sigmoid", "beta": 0.2, "f_divergence_type": "alpha_divergence",
                     "f_alpha_divergence_coef": 0.5},
               "sigmoid with alpha_divergence, coefficient 1/2: half of our beta",
               variant="squared_hellinger"),
    Comparison("f_dpo", {"beta": 0.1, "divergence": DIVERGENCES["neyman_chi_squared"]},
               DPO, {"loss_type": "sigmoid", "beta": 0.2, "f_divergence_type": "alpha_divergence",
                     "f_alpha_divergence_coef": -1.0},
               "sigmoid with alpha_divergence, coefficient -1: twice our beta",
               variant="neyman_chi_squared"),
    Comparison("exo_pref", {"beta": 0.2, "label_smoothing": 0.1},
               DPO, {"loss_type": "exo_pair", "beta": 0.2, "label_smoothing": 0.1},
               "exo_pair"),
    Comparison("sppo", {"beta": 0.2},
               DPO, {"loss_type": "sppo_hard", "beta": 0.2},
               "sppo_hard"),
    Comparison("apo_zero", {"beta": 0.2},
               DPO, {"loss_type": "apo_zero", "beta": 0.2},
               "apo_zero"),
    Comparison("apo_zero", {"beta": 0.2},
               KTO_ON_PAIRS, {"loss_type": "apo_zero_unpaired", "beta": 0.2},
               "KTOTrainer's apo_zero_unpaired, a mean over both sides of pairs: half of it",
               variant="unpaired", scale=0.5),
    Comparison("apo_down", {"beta": 0.2},
               DPO, {"loss_type": "apo_down", "beta": 0.2},
               "apo_down"),
    Comparison("nca_pair", {"beta": 0.2},
               DPO, {"loss_type": "nca_pair", "beta": 0.2},
               "nca_pair"),
    Comparison("bco_pair", {"beta": 0.2},
               DPO, {"loss_type": "bco_pair", "beta": 0.2},
               "bco_pair"),
    Comparison("dpo_norm", {"beta": 0.2},
               DPO, {"loss_type": "sigmoid_norm", "beta": 0.2},
               "sigmoid_norm"),
    Comparison("ld_dpo", {"beta": 0.2, "alpha": 0.3},
               DPO, {"loss_type": "sigmoid", "beta": 0.2, "ld_alpha": 0.3},
               "sigmoid with ld_alpha"),
    Comparison("wpo", {"beta": 0.2},
               DPO, {"loss_type": "sigmoid", "beta": 0.2, "use_weighting": True},
               "sigmoid with use_weighting: weights not cut at 1"),
    Comparison("simpo", {"beta": 2.0, "gamma": 0.5},
               CPO, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0},
               "CPOTrainer's simpo, without the NLL that it adds unless cpo_alpha = 0"),
    Comparison("cpo", {"beta": 0.2, "nll_weight": 1.0},
               CPO, {"loss_type": "sigmoid", "beta": 0.2, "cpo_alpha": 1.0},
               "CPOTrainer's sigmoid: its NLL is over all tokens of a micro-batch",
               term=lambda read: nll_over_tokens(read) - nll_over_completions(read)),
    Comparison("slic", {"delta": 5.0, "nll_weight": 0.0},
               CPO, {"loss_type": "hinge", "beta": 0.2, "cpo_alpha": 0.0},
               "CPOTrainer's hinge without NLL: beta of it, with delta = 1/beta",
               scale=0.2),
    Comparison("orpo", {"odds_weight": 0.2},
               ORPO, {"beta": 0.2},
               "ORPOTrainer, whose beta is odds_weight: its NLL is over all tokens, of prompts too",
               term=lambda read: nll_over_all_tokens(read) - nll_over_completions(read)),
    Comparison("kto", {"beta": 0.2, "desirable_weight": 1.1, "undesirable_weight": 1.5},
               KTO, {"loss_type": "kto", "beta": 0.2, "desirable_weight": 1.1,
                     "undesirable_weight": 1.5},
               "KTOTrainer: mismatched completions are those of the row before"),
    # Lists of two: TRL has no longer ones.
    Comparison("dpo_rw", {"beta": 0.2, "temperature": 1.0},
               DPO, {"loss_type": "sigmoid", "beta": 0.2},
               "sigmoid: a list of two, its rewards infinitely apart"),
    Comparison("infonca", {"beta": 0.2, "temperature": 1.0},
               DPO, {"loss_type": "sigmoid", "beta": 0.2},
               "sigmoid: a list of two, its rewards infinitely apart"),
    Comparison("nca", {"beta": 0.2, "temperature": 1.0},
               DPO, {"loss_type": "nca_pair", "beta": 0.2},
               "nca_pair: a list of two, its rewards infinitely apart"),
    Comparison("exo_rw", {"beta": 0.2, "temperature": 1.0},
               DPO, {"loss_type": "exo_pair", "beta": 0.2, "label_smoothing": 0.1},
               "exo_pair: a list of two, the softmax of its rewards 1 - label_smoothing",
               preference=0.9),
    Comparison("f_po", {"beta": 0.2, "temperature": 1.0, "divergence": DIVERGENCES["reverse_kl"]},
               DPO, {"loss_type": "exo_pair", "beta": 0.2, "label_smoothing": 0.1},
               "exo_pair: a list of two, the softmax of its rewards 1 - label_smoothing",
               variant="reverse_kl", preference=0.9),
)
# fmt: on

# Names of TRL's that have no row, and why. Beside them: f-divergences of losses other than sigmoid.
NOT_HERE = {
    "aot": "sorts a micro-batch's margins of policy and of reference before it compares them",
    "aot_unpaired": "sorts a micro-batch's log-ratios of both sides before it compares them",
    "discopop": "blends the logistic loss with an exponential one",
    "alphapo": "simpo on (1 - P^-alpha)/alpha, P the exponential of the mean log-probability",
}


def side_by_side(comparisons: Iterable[Comparison] = COMPARISONS) -> Iterator[Proof]:
    """One proof a comparison: the worse error of a two-layer Llama and a two-layer GPT-2."""
    release = ".".join(importlib.metadata.version("trl").split(".")[:2])
    for comparison in comparisons:
        # numpy's maximum, because NaN is an error too.
        error = np.max([answer.error(comparison) for answer in answers(comparison)])
        law = f"TRL {release}: {comparison.law}"
        yield Proof(str(comparison.case), law, float(error), TOLERANCE)


def answers(comparison: Comparison) -> list[Answer]:
    """TRL's, one for each of `ARCHITECTURES`."""
    return [_answer(comparison, config) for config in ARCHITECTURES]


def _answer(comparison: Comparison, config: PreTrainedConfig) -> Answer:
    with _left_as_found() as folder:
        policy, reference = (_model(config, seed=seed) for seed in SEEDS)
        trainer = _trainer(comparison, policy, reference, folder)
        batch = trainer.data_collator(list(trainer.train_dataset))
        reading = Reading(batch, comparison.trainer.rows(batch), policy, reference)
        return Answer(reading, comparison.theirs(trainer, batch))


@torch.no_grad()
def _loss_of(trainer: Any, batch: Collated) -> float:
    return trainer.compute_loss(trainer.model, batch).item()


@contextmanager
def _left_as_found() -> Generator[str, None, None]:
    """A folder for the time being, while TRL is kept quiet; afterwards both are as before.

    Its trainers seed every generator, draw progress bars, warn of their own settings and, unless
    the hub is offline, report their use to it.
    """
    states = random.getstate(), np.random.get_state()
    offline, silent = hub.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled()
    # The environment's HF_HUB_OFFLINE was read when the hub was imported.
    hub.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            torch.random.fork_rng(devices=[]),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings(
                "ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning
            )
            yield folder
    finally:
        hub.HF_HUB_OFFLINE = offline
        if not silent:
            datasets.enable_progress_bars()
        random.setstate(states[0])
        np.random.set_state(states[1])


def _model(config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def _trainer(
    comparison: Comparison, policy: PreTrainedModel, reference: PreTrainedModel, folder: str
) -> Any:
    """TRL's trainer, on copies of the models: it patches their forward pass."""
    kind = comparison.trainer
    models = {"model": copy.deepcopy(policy)}
    if kind.reads_reference:
        models["ref_model"] = copy.deepcopy(reference)
    settings = kind.config(
        output_dir=folder,
        per_device_train_batch_size=2 * len(kind.examples),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        report_to="none",
        **comparison.settings,
    )
    return kind.type(
        **models,
        args=settings,
        train_dataset=datasets.Dataset.from_list(kind.examples),
        processing_class=_tokenizer(),
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token a word."""
    words = Tokenizer(WordLevel(VOCABULARY))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


# The batches that our losses read.


def _pairs(comparison: Comparison, reading: Reading) -> Pairs:
    return _paired(comparison, reading.scored(reading.rows))


def _paired(comparison: Comparison, scored: Scored) -> Pairs:
    half = len(scored.logp) // 2
    viewed = comparison.view(scored)
    return Pairs(
        chosen=mapped(viewed, lambda _, tensor: tensor[:half]),
        rejected=mapped(viewed, lambda _, tensor: tensor[half:]),
        preference=torch.full((half,), comparison.preference),
    )


def _shared_pairs(comparison: Comparison, reading: Reading) -> SharedPairs:
    half = len(reading.chosen)
    others = [*reading.rows[half:], *reading.rows[:half]]
    cut = [
        Row(row.prompt, row.completion[: len(other.completion)])
        for row, other in zip(reading.rows, others, strict=True)
    ]
    return SharedPairs(
        whole=_pairs(comparison, reading), shared=_paired(comparison, reading.scored(cut))
    )


def _weighted_pairs(comparison: Comparison, reading: Reading) -> WeightedPairs:
    read = token_logps_and_collisions(reading.policy, reading.rows)
    means = [(logps - collisions).mean() for logps, collisions in zip(*read, strict=True)]
    chosen, rejected = torch.stack(means).chunk(2)
    return WeightedPairs(_pairs(comparison, reading), torch.exp(chosen + rejected))


def _rankings(comparison: Comparison, reading: Reading) -> Rankings:
    scored = reading.scored(reading.rows)
    completions: Scored = mapped(scored, lambda _, tensor: torch.stack(tensor.chunk(2), -1))
    preference = torch.full((len(completions.logp),), comparison.preference)
    return Rankings(completions, torch.stack([preference, 1 - preference], -1).log())


def _labelled(comparison: Comparison, reading: Reading) -> Labelled:
    before = [reading.rows[-1], *reading.rows[:-1]]
    mismatched = [
        Row(row.prompt, other.completion) for row, other in zip(reading.rows, before, strict=True)
    ]
    return Labelled(
        completions=reading.scored(reading.rows),
        desirable=reading.batch["label"],
        mismatched=reading.scored(mismatched),
    )


BATCHES: dict[str, Callable[[Comparison, Reading], Any]] = {
    "Pairs": _pairs,
    "SharedPairs": _shared_pairs,
    "WeightedPairs": _weighted_pairs,
    "Rankings": _rankings,
    "Labelled": _labelled,
}
