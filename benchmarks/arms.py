"""The contestants: TRL's DPOTrainer in several settings, and this project's scoring.

All of them read the same weights and add to the same gradients: they are copies of one policy
that share its parameters.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import trl.trainer.utils as trl_utils
from huggingface_hub import constants as hub
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from benchmarks import costs
from benchmarks.data import END, NUM_CONTROL, PAD, Example
from prefopt.batches import Pairs, Rankings, Scored
from prefopt.costs import Work
from prefopt.losses.listwise import infonca
from prefopt.losses.pairwise import dpo
from prefopt.packing import Row
from prefopt.scoring import packs, score, token_logps
from stages import models

# Small, because float32 sums of thousands of nats differ in their last digits: at 0.1 that alone
# would move some losses by the tolerance.
BETA = 0.01


@dataclass(frozen=True)
class Arm:
    """One way of making a step's loss and gradients.

    Args:
        name: its key in results.
        title: what readers see.
        step: adds a batch's gradients to the parameters and returns its loss.
        work: what the layers are given, by formula.
    """

    name: str
    title: str
    step: Callable[[Sequence[Example]], float]
    work: Callable[[Sequence[Example]], Work]


@dataclass(frozen=True)
class Settings:
    """What all arms of a run have in common.

    Args:
        device: where they run.
        compute_dtype: of matrix products; parameters are float32.
        attention: of the padded arms, by Hugging Face's name.
    """

    device: torch.device
    compute_dtype: torch.dtype
    attention: str = "sdpa"


@contextmanager
def quiet() -> Generator[str, None, None]:
    """A folder for TRL, which is kept from drawing progress bars and from reporting its use."""
    offline, silent = hub.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled()
    hub.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            torch.random.fork_rng(),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing`", FutureWarning)
            yield folder
    finally:
        hub.HF_HUB_OFFLINE = offline
        if not silent:
            datasets.enable_progress_bars()


def sharing(policy: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A copy with the very same parameters, attending another way."""
    twin = copy.deepcopy(policy, {id(weight): weight for weight in policy.parameters()})
    if attention == models.attention.NAME:
        twin = models.with_engine(twin)
        assert packs(twin)
    else:
        twin.set_attn_implementation(attention)
    return twin


# This project.


def reference_logps(
    reference: PreTrainedModel, pool: Sequence[Example], settings: Settings
) -> dict[int, list[float]]:
    """What is cached: the reference's log-probability of every completion, by its identity."""
    engine = sharing(reference, models.attention.NAME)
    rows = [row for example in pool for row in example.rows]
    scored = score(
        engine,
        rows,
        token_budget=4096,
        compute_dtype=settings.compute_dtype,
        progress=lambda _: None,
    )
    sums = iter([sum(logps) for logps in scored])
    return {id(example): [next(sums) for _ in example.rows] for example in pool}


def ours(
    policy: PreTrainedModel, cached: dict[int, list[float]], settings: Settings, *, pack: bool
) -> Arm:
    """Packed rows with shared prompts, or padded ones; DPO on pairs, InfoNCA on longer lists."""
    engine = sharing(policy, models.attention.NAME if pack else settings.attention).eval()

    def step(batch: Sequence[Example]) -> float:
        rows = [row for example in batch for row in example.rows]
        logps = token_logps(engine, rows, compute_dtype=settings.compute_dtype)
        expected = [logp for example in batch for logp in cached[id(example)]]
        loss = _loss(logps, expected, rows, len(batch))
        loss.backward()
        return loss.item()

    if pack:
        return Arm("packed", "ours, packed", step, costs.packed)
    return Arm("padded", "ours, padded", step, costs.padded)


def ours_reading(policy: PreTrainedModel, settings: Settings) -> Arm:
    """The reference pass as it fills the store: a forward pass a prompt, without gradient."""
    engine = sharing(policy, models.attention.NAME).eval()

    def step(batch: Sequence[Example]) -> float:
        sums = [
            sum(logps)
            for example in batch
            for logps in score(
                engine,
                example.rows,
                token_budget=sum(map(len, example.rows)),
                compute_dtype=settings.compute_dtype,
                progress=lambda _: None,
            )
        ]
        return sum(sums) / len(sums)

    return Arm("packed", "ours, packed", step, costs.packed)


def _loss(
    logps: Sequence[Tensor], expected: Sequence[float], rows: Sequence[Row], num_prompts: int
) -> Tensor:
    scored = Scored(
        logp=torch.stack([logp.sum() for logp in logps]).view(num_prompts, -1),
        reference_logp=torch.tensor(expected, device=logps[0].device).view(num_prompts, -1),
        tokens=torch.tensor([len(row.completion) for row in rows], device=logps[0].device).view(
            num_prompts, -1
        ),
    )
    k = scored.logp.shape[1]
    if k > 2:
        rewards = torch.arange(k, 0, -1.0, device=logps[0].device).expand(num_prompts, -1)
        return infonca(Rankings(scored, rewards), beta=BETA, temperature=1.0).mean()
    chosen, rejected = (
        Scored(scored.logp[:, i], scored.reference_logp[:, i], scored.tokens[:, i]) for i in (0, 1)
    )
    pairs = Pairs(chosen, rejected, torch.ones(num_prompts, device=logps[0].device))
    # What a run logs of a step.
    for value in (chosen.logratio, rejected.logratio, pairs.margin, (pairs.margin > 0).float()):
        value.mean().item()
    return dpo(pairs, beta=BETA).mean()


# TRL.


class Tokenised:
    """TRL's own tokenisation of the pool, asserted to be the very token ids of ours.

    Args:
        trainer: of TRL's, which has tokenised `pool`.
        pool: all examples.
        cached: the reference's log-probabilities, which the collator passes on.
    """

    def __init__(
        self, trainer: Any, pool: Sequence[Example], cached: dict[int, list[float]]
    ) -> None:
        self.examples: dict[int, dict[str, Any]] = {}
        for example, read in zip(pool, trainer.train_dataset, strict=True):
            chosen, rejected = example.rows
            assert read["prompt_ids"] == chosen.prompt
            assert read["chosen_ids"] == chosen.completion
            assert read["rejected_ids"] == rejected.completion
            logps = dict(
                zip(("ref_chosen_logps", "ref_rejected_logps"), cached[id(example)], strict=True)
            )
            names = ("prompt_ids", "chosen_ids", "rejected_ids")
            self.examples[id(example)] = {name: read[name] for name in names} | logps

    def __call__(self, batch: Sequence[Example]) -> list[dict[str, Any]]:
        return [self.examples[id(example)] for example in batch]


def trainer_of(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pool: Sequence[Example],
    folder: str,
    settings: Settings,
    *,
    live: bool,
) -> Any:
    """A DPOTrainer; `live` is its default: a reference that runs at every step, checkpointing.

    Its `precompute_ref_log_probs` would run the reference over the pool through its own padded
    batches; it is told instead that this is done.
    """
    trainer: Any = DPOTrainer(
        model=sharing(policy, settings.attention),
        ref_model=sharing(reference, settings.attention),
        args=DPOConfig(
            output_dir=folder,
            beta=BETA,
            max_length=1024,
            use_cpu=settings.device.type == "cpu",
            bf16=settings.compute_dtype == torch.bfloat16,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            gradient_checkpointing=live,
        ),
        train_dataset=datasets.Dataset.from_list([_text(example) for example in pool]),
        processing_class=_tokenizer(policy.config.vocab_size),
    )
    trainer.precompute_ref_logps = not live
    # Under bf16 this wraps the forward pass in autocast, as `train` would.
    trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model)
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    return trainer


def trl(
    name: str, title: str, trainer: Any, tokenised: Tokenised, *, only_completions: bool
) -> Arm:
    """The trainer's own collator, then its `training_step`, which ends with the backward pass.

    Args:
        name: of the arm.
        title: of the arm.
        trainer: with or without a live reference.
        tokenised: what it collates.
        only_completions: score these positions alone, as TRL does on CUDA; on a CPU it scores
            all of them, unless it is told that it has Triton there.
    """
    device = next(trainer.model.parameters()).device

    def step(batch: Sequence[Example]) -> float:
        with _compacting(only_completions):
            inputs = trainer.data_collator(tokenised(batch))
            loss = trainer.training_step(trainer.model_wrapped, inputs)
        return loss.item()

    def work(batch: Sequence[Example]) -> Work:
        return costs.padded(batch, score_all=not only_completions and device.type == "cpu")

    return Arm(name, title, step, work)


def trl_reading(trainer: Any, tokenised: Tokenised) -> Arm:
    """What `precompute_ref_log_probs` does with a batch; its LM head scores completions only."""

    def step(batch: Sequence[Example]) -> float:
        with _compacting(True):
            inputs = trainer.data_collator(tokenised(batch))
            sums = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
        return torch.stack(sums).mean().item()

    return Arm("trl", "TRL at its best", step, costs.padded)


@contextmanager
def _compacting(on: bool) -> Generator[None, None, None]:
    """Let TRL's LM head, but not its kernels, believe that the device has Triton."""
    if not on:
        yield
        return
    module: Any = trl_utils
    original = module._use_triton
    module._use_triton = lambda device: True
    try:
        yield
    finally:
        module._use_triton = original


def _text(example: Example) -> dict[str, str]:
    """TRL adds the end-of-sequence token itself."""
    chosen, rejected = example.rows
    return {
        "prompt": _words(chosen.prompt),
        "chosen": " " + _words(chosen.completion[:-1]),
        "rejected": " " + _words(rejected.completion[:-1]),
    }


def _words(tokens: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A token a word."""
    vocabulary = {"<s>": 0, "</s>": END, "<pad>": PAD}
    vocabulary |= {f"w{token}": token for token in range(NUM_CONTROL, vocab_size)}
    words = Tokenizer(WordLevel(vocabulary))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
