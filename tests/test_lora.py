"""Laws of adapters: a policy with them is another policy, without them its own reference."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, llama
from safetensors import safe_open
from test_engine import (
    CONFIGS,
    Twins,
    plainly,
    relative_error,
    shuffled_rows,
    twins_of,
    weighted,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefopt.packing import Row
from prefopt.scoring import packs, token_logps
from stages import complete, models, reference, sft, train
from stages.artefacts import (
    CHECKED,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    LOGRATIOS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    REVISIONS,
    REVISIONS_SCHEMA,
    SAMPLES_SCHEMA,
    SFT,
    TEMPLATES,
    curve_of,
    logratios_of,
    model_of,
    read_table,
    samples_of,
    write_table,
)
from stages.evidence import Evidence
from stages.params import Lora, load_params
from stages.store import key_of
from stages.templates import Template, Templates, write_templates

Write = Callable[..., dict[str, Any]]

LORA = Lora(rank=3, alpha=6.0, targets="all-linear")
LORA_WRITTEN = {"rank": 3, "alpha": 6.0, "targets": "all-linear"}
ROWS = [Row([5, 6, 7], [8]), Row([5, 6, 7], [9, 10, 11]), Row([4], [9, 8])]


def moved(policy: PreTrainedModel) -> PreTrainedModel:
    """Away from where adapters begin, as training moves them."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)
    return policy


@pytest.fixture(scope="module", params=[*CONFIGS])
def adapted(request: pytest.FixtureRequest) -> Twins:
    """A model under our attention and under its own, with the same adapters, far from zero."""
    twins = twins_of(CONFIGS[request.param])
    for policy in twins:
        models.add_adapters(policy, LORA, seed=0)
        moved(policy)
    return twins


@pytest.mark.parametrize("num_completions", [1, 3, 8])
def test_packed_rows_of_an_adapted_policy_score_as_single_unpadded_ones(
    adapted: Twins, num_completions: int
) -> None:
    rows = shuffled_rows(num_completions)
    assert packs(adapted.ours)
    found = token_logps(adapted.ours, rows)
    expected = [plainly(adapted.plain, row) for row in rows]
    for logps, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(logps, alone, rtol=0, atol=1e-10)
    slopes, wanted = (
        adapter_gradients(model, logps)
        for model, logps in ((adapted.ours, found), (adapted.plain, expected))
    )
    for name, slope in wanted.items():
        assert slope.norm() > 1e-6, name
        assert relative_error(slopes[name], slope) < 1e-6, name


def test_packed_rows_of_an_adapted_policy_err_in_float32_by_rounding_alone(
    adapted: Twins,
) -> None:
    rows = shuffled_rows(4)
    single = adapted.float()
    assert packs(single.ours)
    found = token_logps(single.ours, rows)
    expected = [plainly(single.plain, row) for row in rows]
    assert found[0].dtype == torch.float32
    assert relative_error(torch.cat(found), torch.cat(expected)) < 1e-5
    slopes, wanted = (
        torch.cat([slope.flatten() for slope in adapter_gradients(model, logps).values()])
        for model, logps in ((single.ours, found), (single.plain, expected))
    )
    assert relative_error(slopes, wanted) < 1e-5


def adapter_gradients(model: torch.nn.Module, logps: Any) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    slopes = torch.autograd.grad(weighted(logps), [*trained.values()])
    return dict(zip(trained, slopes, strict=True))


def logps_of(policy: PreTrainedModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(token_logps(policy, ROWS, compute_dtype=dtype))


@pytest.mark.parametrize("dtype", models.DTYPES.values(), ids=models.DTYPES)
def test_adapters_change_no_bit_before_they_are_trained(base: Path, dtype: torch.dtype) -> None:
    policy = models.load_policy(str(base))
    before = logps_of(policy, dtype)
    models.add_adapters(policy, LORA, seed=0)
    assert torch.equal(logps_of(policy, dtype), before)
    assert not torch.equal(logps_of(moved(policy), dtype), before)


def test_adapters_begin_as_the_seed_says_and_leave_the_stream_alone() -> None:
    def begun(seed: int) -> list[torch.Tensor]:
        policy = llama()
        models.add_adapters(policy, LORA, seed=seed)
        return [p.detach() for n, p in policy.named_parameters() if "lora_A" in n]

    stream = torch.random.get_rng_state()
    first, again, other = begun(0), begun(0), begun(1)
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


@pytest.fixture
def labelled(base: Path, write_params: Write) -> Path:
    """Prompts, pairs and an SFT policy, as stages leave them; it is the base."""
    write_params(
        **{
            "train.lora": LORA_WRITTEN,
            "watch.every": None,
            "train.batch_size": 4,
            "train.learning_rate": 0.05,
            "train.num_epochs": 4,
            "data.max_completion_tokens": 8,
            "evaluation.split": "test",
            "runs": {
                "dpo": {"loss": "dpo", "beta": 0.1},
                "kto": {"loss": "kto", "beta": 0.1},
                "tdpo": {"loss": "tdpo2", "beta": 0.1, "alpha": 0.5},
            },
        }
    )
    models.save(models.load_policy(str(base)), byte_tokenizer(), SFT)
    prompts = [[0, 70 + i] for i in range(12)]
    columns: dict[str, list[Any]] = {name: [""] * 12 for name in PROMPTS_SCHEMA.names}
    columns |= {
        "split": ["train"] * 8 + ["test"] * 4,
        "tokens": prompts,
        "gold_tokens": [[80, 81, 1]] * 12,
        "rejected_tokens": [[]] * 12,
    }
    write_table(PROMPTS, columns, PROMPTS_SCHEMA)
    plain = Template([[0], "prompt", []])
    write_templates(TEMPLATES, Templates(plain, Template([[0], "prompt", "completion"]), eos=1))
    completions = {
        "prompt": [prompt for prompt in prompts[:8] for _ in "ab"],
        "completion": [[90 + i, 91, 92][: 1 + i % 3] for i in range(16)],
    }
    write_table(COMPLETIONS, completions, COMPLETIONS_SCHEMA)
    pairs = {
        "split": ["train"] * 8,
        "chosen": [*range(0, 16, 2)],
        "rejected": [*range(1, 16, 2)],
        "preference": [1.0] * 8,
    }
    write_table(PAIRS, pairs, PAIRS_SCHEMA)
    write_table(REVISIONS, {name: [] for name in REVISIONS_SCHEMA.names}, REVISIONS_SCHEMA)
    reference.main()
    return SFT


def run(program: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    program.main()


@pytest.fixture(autouse=True)
def no_courier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.tracking._start_courier", lambda: None)


def test_the_stored_reference_is_the_policy_with_its_adapters_off(labelled: Path) -> None:
    evidence = Evidence()
    policy = models.load_policy(str(SFT))
    frozen = models.frozen(policy, load_params().train)
    models.make_trainable(policy, load_params().train, seed=0)
    moved(policy)
    # A prompt's completions together, as the reference is scored.
    stored = [evidence.reference[row] for row in (0, 1)]
    rows = [evidence.rows[row] for row in (0, 1)]
    policy.disable_adapters()
    off = [logp.tolist() for logp in token_logps(policy, rows)]
    policy.enable_adapters()
    assert off == stored
    assert [logp.tolist() for logp in token_logps(frozen, rows)] == stored
    assert [logp.tolist() for logp in token_logps(policy, rows)] != stored


def test_a_live_reference_beside_adapters_holds_no_weights_of_its_own(labelled: Path) -> None:
    policy = models.load_policy(str(SFT))
    optimiser = load_params().train
    shared = models.frozen(policy, optimiser)
    copied = models.frozen(policy, optimiser.model_copy(update={"lora": None}))
    models.add_adapters(policy, LORA, seed=0)
    own = {weight.data_ptr() for weight in policy.parameters()}
    assert {weight.data_ptr() for weight in shared.parameters()} < own
    assert not {weight.data_ptr() for weight in copied.parameters()} & own
    assert not any(weight.requires_grad for weight in shared.parameters())


@pytest.mark.parametrize("name", ["kto", "tdpo"])
def test_a_live_reference_that_shares_weights_gives_the_bits_of_one_that_does_not(
    labelled: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(train, monkeypatch, name)
    shared = curve_of(name).read_bytes()
    alone = models.load_policy(str(SFT)).requires_grad_(False)
    monkeypatch.setattr(models, "frozen", lambda policy, optimiser: alone)
    run(train, monkeypatch, name)
    assert curve_of(name).read_bytes() == shared


def test_a_run_with_adapters_leaves_them_alone_and_what_follows_reads_them(
    labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(train, monkeypatch, "dpo")
    directory = model_of("dpo")
    weights = sorted(path.name for path in directory.glob("*.safetensors"))
    assert weights == ["adapter_model.safetensors"]
    assert not list(directory.glob("*.bin"))
    with safe_open(directory / weights[0], "pt") as tensors:
        assert all("lora_" in name for name in tensors.keys())  # noqa: SIM118
    identity = json.loads((directory / models.ADAPTED).read_text())
    assert identity == {
        "model": "artefacts/models/sft",
        # The digest that the reference is stored under.
        "weights": key_of(SFT, load_params().compute)["weights"],
    }
    # Of a set, whose order is another in every process.
    targets = json.loads((directory / models.ADAPTER_CONFIG).read_text())["target_modules"]
    assert targets == sorted(targets)
    # Merged, as this project reads it, and as peft does, which knows nothing of it.
    merged = models.load_policy(str(directory))
    assert not [name for name, _ in merged.named_modules() if "lora" in name]
    by_peft = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert [name for name, _ in by_peft.named_modules() if "lora" in name]
    for row in ROWS:
        (found,) = token_logps(merged, [row])
        torch.testing.assert_close(found, plainly(by_peft, row), rtol=0, atol=1e-4)
    losses = column(curve_of("dpo"), "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.6
    logratios = read_table(logratios_of("dpo"), LOGRATIOS_SCHEMA)
    rows = Evidence().rows_of("Pairs", 0)
    with torch.no_grad():
        chosen, _ = (logp.sum().item() for logp in token_logps(merged, rows))
    stored = sum(Evidence().reference[0])
    assert logratios["chosen"][0] == pytest.approx(chosen - stored, abs=1e-3)
    run(complete, monkeypatch, "dpo")
    samples = read_table(samples_of("dpo"), SAMPLES_SCHEMA)
    assert samples["logp"] != samples["reference_logp"]


def column(path: Path, name: str) -> list[float]:
    header, *lines = [line.split(",") for line in path.read_text().splitlines()]
    return [float(line[header.index(name)]) for line in lines]


def test_adapters_of_other_weights_are_refused(
    labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(train, monkeypatch, "dpo")
    models.save(moved(models.load_policy(str(SFT))), byte_tokenizer(), SFT)
    with pytest.raises(ValueError, match=r"models/dpo: adapters of other weights than 'artefacts"):
        models.load_policy(str(model_of("dpo")))


def test_an_sft_with_adapters_is_saved_whole(
    labelled: Path, monkeypatch: pytest.MonkeyPatch, write_params: Write
) -> None:
    write_params(**{"sft.lora": LORA_WRITTEN, "sft.batch_size": 4, "sft.learning_rate": 0.05})
    CHECKED.touch()
    before = logps_of(models.load_policy("data/base"))
    run(sft, monkeypatch)
    assert sorted(path.name for path in SFT.glob("*.safetensors")) == ["model.safetensors"]
    plain = AutoModelForCausalLM.from_pretrained(SFT, dtype=torch.float32)
    assert not [name for name, _ in plain.named_modules() if "lora" in name]
    assert not torch.allclose(logps_of(models.load_policy(str(SFT))), before, atol=0.1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("q_prj", "lora.targets: not of this model, got ['q_prj']"),
        ("lm_head", "lora.targets: embeddings and the LM head take no adapters, got ['lm_head']"),
        ("embed_tokens", "lora.targets: embeddings and the LM head take no adapters, got"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        models.add_adapters(llama(), Lora(rank=2, alpha=4, targets=[target]), seed=0)
