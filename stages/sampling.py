"""Completions by the engine that `compute.generation` names."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from prefopt.generation import sample
from stages import models
from stages.params import Compute

Tokens = list[list[int]]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: at least 1.
        temperature: greater than 0.
        eos: token id at which a completion ends.
        batch_size: rows decoded together.
    """

    max_new_tokens: int
    temperature: float
    eos: int
    batch_size: int


class Sampler(Protocol):
    """One policy's completions: one a prompt, from its own seed."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, title: str
    ) -> Tokens: ...


def check(compute: Compute) -> None:
    """Refuse an engine that is not installed.

    Raises:
        ValueError: naming the remedy.
    """
    if compute.generation == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "compute.generation: vLLM is not installed, got 'vllm'; `pip install vllm` on a "
            "machine with a GPU, or take 'torch'"
        )


def sampler(directory: Path, sampling: Sampling, compute: Compute) -> Sampler:
    """The policy in a directory, loaded once, ready to complete prompts.

    Args:
        directory: of the policy.
        sampling: how.
        compute: the engine and its dtype.
    """
    check(compute)
    if compute.generation == "vllm":
        return _by_vllm(directory, sampling, compute)
    policy = models.load_policy(str(directory))

    def complete(prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, title: str) -> Tokens:
        with tqdm(total=len(prompts), desc=title, unit="completion", mininterval=5) as bar:
            return sample(
                policy,
                prompts,
                seeds,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                eos=sampling.eos,
                batch_size=sampling.batch_size,
                progress=bar.update,
            )

    return complete


def _by_vllm(directory: Path, sampling: Sampling, compute: Compute) -> Sampler:
    """vLLM's samples are seeded row by row too, but with random numbers and kernels of its own.

    So they are not those of `sample`, and may change with vLLM's version, the GPU, and, unless
    VLLM_BATCH_INVARIANT=1 is set where vLLM supports it, with a row's neighbours.
    """
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    engine = LLM(
        model=str(directory),
        dtype=compute.dtype,
        seed=compute.seed,
        max_num_seqs=sampling.batch_size,
        skip_tokenizer_init=True,
        trust_remote_code=False,
        # Not the sampling defaults that a model directory may carry.
        generation_config="vllm",
    )

    def complete(prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, title: str) -> Tokens:
        settings = [
            SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                seed=seed,
                # A model may name several ends of its own; here it is `eos` alone.
                ignore_eos=True,
                stop_token_ids=[sampling.eos],
                detokenize=False,
            )
            for seed in seeds
        ]
        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with tqdm(total=len(prompts), desc=title, unit="completion", mininterval=5) as bar:
            outputs = engine.generate(tokens, settings, use_tqdm=False)
            bar.update(len(outputs))
        return [list(output.outputs[0].token_ids) for output in outputs]

    return complete
