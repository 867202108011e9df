"""Laws of sampling: every row is its own random stream, and follows the policy."""

from collections import Counter

import pytest
import torch
from conftest import llama

from prefopt.generation import sample

# Nine tokens, so that `eos` is drawn often.
POLICY = llama(vocab_size=9)
EOS = 1


def sampled(
    prompts: list[list[int]],
    seeds: list[int],
    *,
    max_new_tokens: int = 12,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> list[list[int]]:
    return sample(
        POLICY,
        prompts,
        seeds,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos=EOS,
        batch_size=batch_size,
        progress=lambda _: None,
    )


PROMPTS = [[0, *([3, 4, 5, 6, 7] * 2)[: 1 + i % 7]] for i in range(40)]
SEEDS = list(range(100, 140))


def next_token(prompt: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return (POLICY(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_row_does_not_depend_on_its_neighbours(batch_size: int) -> None:
    alone = [sampled([p], [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert sampled(PROMPTS, SEEDS, batch_size=batch_size) == alone
    backwards = sampled(PROMPTS[::-1], SEEDS[::-1], batch_size=batch_size)
    assert backwards[::-1] == alone


def test_a_prompt_of_several_samples_is_computed_once() -> None:
    shapes: list[tuple[int, ...]] = []
    hook = POLICY.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    try:
        together = sampled([[0, 3, 4], [0, 5, 6], [0, 3, 4], [0, 3, 4]], [1, 2, 3, 4])
    finally:
        hook.remove()
    assert shapes[:2] == [(2, 3), (4, 1)]
    alone = [sampled([p], [s])[0] for p, s in (([0, 3, 4], 1), ([0, 5, 6], 2), ([0, 3, 4], 3))]
    assert together[:3] == alone


def test_another_seed_is_another_sample() -> None:
    many = sampled([[0, 3]] * 200, list(range(200)))
    assert len({tuple(completion) for completion in many}) > 50
    assert sampled([[0, 3]] * 2, [7, 7])[0] == sampled([[0, 3]], [7])[0]


def test_torchs_global_seed_is_neither_read_nor_moved() -> None:
    state = torch.get_rng_state()
    first = sampled(PROMPTS, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert sampled(PROMPTS, SEEDS) == first


def test_a_completion_ends_at_the_first_eos_or_at_the_limit() -> None:
    completions = sampled(PROMPTS * 5, list(range(200)), max_new_tokens=6)
    for completion in completions:
        assert EOS not in completion[:-1]
        assert completion[-1] == EOS or len(completion) == 6
    assert {completion[-1] == EOS for completion in completions} == {True, False}


def test_a_longer_limit_continues_the_same_completion() -> None:
    short, long = (sampled(PROMPTS, SEEDS, max_new_tokens=n) for n in (4, 12))
    assert [completion[:4] for completion in long] == short


def test_sampling_equals_decoding_without_a_cache() -> None:
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        uniforms = torch.rand(12, generator=torch.Generator().manual_seed(seed))
        expected: list[int] = []
        for uniform in uniforms.tolist():
            cumulative = next_token([*prompt, *expected]).cumsum(0)
            # By inversion: the first token whose cumulative probability exceeds the uniform.
            expected.append(int((cumulative <= uniform).sum().clamp(max=8)))
            if expected[-1] == EOS:
                break
        assert sampled([prompt], [seed]) == [expected]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_first_tokens_follow_the_policys_softmax(temperature: float) -> None:
    count = 20_000
    prompt = [0, 3, 5]
    first = sampled(
        [prompt] * count,
        list(range(count)),
        max_new_tokens=1,
        temperature=temperature,
        batch_size=count,
    )
    found = Counter(completion[0] for completion in first)
    expected = next_token(prompt, temperature) * count
    pooled = expected >= 5
    observed = torch.tensor([float(found[token]) for token in range(9)])
    chi_square = ((observed - expected) ** 2 / expected)[pooled].sum().item()
    # The 99.9 % quantile of chi-square with eight degrees of freedom.
    assert chi_square < 26.12


def test_progress_is_told_every_row_once() -> None:
    told: list[int] = []
    sample(
        POLICY,
        PROMPTS,
        SEEDS,
        max_new_tokens=2,
        temperature=1.0,
        eos=EOS,
        batch_size=4,
        progress=told.append,
    )
    assert sum(told) == len(PROMPTS)
