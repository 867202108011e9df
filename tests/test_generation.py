"""Laws of sampling: every row is its own random stream, and follows the policy."""

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import llama
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
)

from prefopt.cache import Cache
from prefopt.generation import sample
from stages.models import with_engine

# Nine tokens, so that `eos` is drawn often.
POLICY = with_engine(llama(vocab_size=9))
EOS = 1

TINY: dict[str, Any] = {
    "vocab_size": 9,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HEADS: dict[str, Any] = TINY | {
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SHORT_SIGHTED: dict[str, Any] = HEADS | {"head_dim": 8, "sliding_window": 4}
WITH_LANES = {
    "qwen2": Qwen2Config(**HEADS),
    "gpt2": GPT2Config(**TINY, num_attention_heads=2, max_position_embeddings=64),
    "mistral, sliding window": MistralConfig(**SHORT_SIGHTED),
    "gemma2, sliding window, soft cap": Gemma2Config(**SHORT_SIGHTED, query_pre_attn_scalar=8),
    "gpt-oss, sliding window, sinks": GptOssConfig(
        **SHORT_SIGHTED,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}
WITHOUT_LANES = {
    "bloom, masks of its own": BloomConfig(**TINY, num_attention_heads=2),
    "mamba, no keys": MambaConfig(**TINY, state_size=4),
    "jamba, states and keys": JambaConfig(
        **HEADS, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=4
    ),
}


def made(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Of models that cannot be given packed rows.
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return with_engine(AutoModelForCausalLM.from_config(config).eval())


def sampled(
    prompts: list[list[int]],
    seeds: list[int],
    *,
    max_new_tokens: int = 12,
    temperature: float = 1.0,
    batch_size: int = 64,
    policy: PreTrainedModel = POLICY,
) -> list[list[int]]:
    return sample(
        policy,
        prompts,
        seeds,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos=EOS,
        batch_size=batch_size,
        progress=lambda _: None,
    )


# Of one to eight tokens, each several times.
PROMPTS = [[0, *([3, 4, 5, 6, 7] * 2)[: i % 8]] for i in range(40)]
SEEDS = list(range(100, 140))


def next_token(
    prompt: list[int], temperature: float = 1.0, policy: PreTrainedModel = POLICY
) -> torch.Tensor:
    with torch.no_grad():
        logits = policy(torch.tensor([prompt]), use_cache=False).logits
    return (logits[0, -1] / temperature).softmax(-1)


def without_a_cache(policy: PreTrainedModel, prompt: list[int], seed: int) -> list[int]:
    uniforms = torch.rand(12, generator=torch.Generator().manual_seed(seed))
    drawn: list[int] = []
    for uniform in uniforms.tolist():
        cumulative = next_token([*prompt, *drawn], policy=policy).cumsum(0)
        # By inversion: the first token whose cumulative probability exceeds the uniform.
        drawn.append(int((cumulative <= uniform).sum().clamp(max=8)))
        if drawn[-1] == EOS:
            break
    return drawn


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_row_does_not_depend_on_its_neighbours(batch_size: int) -> None:
    together = sampled(PROMPTS, SEEDS, batch_size=batch_size)
    assert sampled(PROMPTS[::-1], SEEDS[::-1], batch_size=batch_size) == together[::-1]
    for row in range(0, len(PROMPTS), 5):
        assert sampled([PROMPTS[row]], [SEEDS[row]]) == [together[row]]


@pytest.mark.parametrize("family", [*WITH_LANES, *WITHOUT_LANES])
def test_every_family_samples_as_without_a_cache(family: str) -> None:
    policy = made((WITH_LANES | WITHOUT_LANES)[family])
    expected = [without_a_cache(policy, p, s) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    if family in WITHOUT_LANES:
        with pytest.warns(UserWarning, match="decodes rows of one prompt length together"):
            assert sampled(PROMPTS, SEEDS, policy=policy) == expected
    for batch_size in (5, 64):
        assert sampled(PROMPTS, SEEDS, policy=policy, batch_size=batch_size) == expected


def test_rows_of_one_prompt_length_together_sample_the_same() -> None:
    policy = llama(vocab_size=9)
    with pytest.warns(UserWarning, match="LlamaForCausalLM decodes rows of one prompt length"):
        together = sampled(PROMPTS, SEEDS, policy=policy, batch_size=7)
    assert together == sampled(PROMPTS, SEEDS, batch_size=7)


def test_a_model_whose_lanes_are_wrong_does_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = with_engine(llama(vocab_size=9))
    expected = sampled(PROMPTS, SEEDS)

    def blind(cache: Cache, window: int | None) -> torch.Tensor:
        return (cache._ages == 0)[:, None, None]  # pyright: ignore[reportPrivateUsage]

    monkeypatch.setattr(Cache, "visible", blind)
    with pytest.warns(UserWarning, match="unlike lengths change its log-probabilities"):
        assert sampled(PROMPTS, SEEDS, policy=policy) == expected


def shapes_of_forwards(prompts: list[list[int]], **options: Any) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        shapes.append(tuple(inputs["input_ids"].shape))

    hook = POLICY.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        sampled(prompts, list(range(len(prompts))), **options)
    finally:
        hook.remove()
    return shapes


def test_a_prompt_of_several_samples_is_computed_once() -> None:
    sampled(PROMPTS, SEEDS)
    prompts = [[0, 3, 4, 5], [0, 5, 6, 7], [0, 3, 4, 5], [0, 3, 4, 5]]
    # Of two prompts all tokens but the last, which every row reads itself.
    assert shapes_of_forwards(prompts, max_new_tokens=1) == [(1, 6), (4, 1)]


def test_a_lane_is_taken_again_at_once() -> None:
    lengths = [len(completion) for completion in sampled(PROMPTS, list(range(40)))]
    steps = shapes_of_forwards(PROMPTS, batch_size=4)[1:]
    assert sum(rows for rows, _ in steps) == sum(lengths)
    # Until no row waits, no lane is empty.
    full = [rows for rows, _ in steps].index(3)
    assert {rows for rows, _ in steps[:full]} == {4}
    assert len(steps) - full < 12


def test_prompts_beyond_the_budget_are_computed_when_they_are_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = sampled(PROMPTS, SEEDS)
    monkeypatch.setattr("prefopt.generation.PROMPT_BUDGET", 8)
    assert sampled(PROMPTS, SEEDS, batch_size=3) == expected
    prompts = [shape for shape in shapes_of_forwards(PROMPTS, batch_size=3) if shape[0] == 1]
    assert max(tokens for _, tokens in prompts) <= 8


def test_a_model_that_was_saved_without_its_cache_samples_with_one() -> None:
    policy = with_engine(llama(vocab_size=9))
    policy.config.use_cache = False
    policy.generation_config.use_cache = False
    assert sampled(PROMPTS, SEEDS, policy=policy) == sampled(PROMPTS, SEEDS)
    forwards: list[int] = []
    policy.register_forward_pre_hook(lambda *_: forwards.append(1))
    sampled([[0, 3, 4]], [5], policy=policy, max_new_tokens=1)
    assert len(forwards) == 2


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
    expected = [without_a_cache(POLICY, p, s) for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert sampled(PROMPTS, SEEDS) == expected


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_first_tokens_follow_the_policys_softmax(temperature: float) -> None:
    count = 5_000
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


def test_progress_is_told_every_row_once_as_it_ends() -> None:
    told: list[int] = []
    sample(
        POLICY,
        PROMPTS,
        SEEDS,
        max_new_tokens=12,
        temperature=1.0,
        eos=EOS,
        batch_size=4,
        progress=told.append,
    )
    assert sum(told) == len(PROMPTS)
    assert len(told) > len(PROMPTS) / 4
    assert 0 not in told


def test_nothing_is_sampled_of_nothing() -> None:
    assert sampled([], []) == []
