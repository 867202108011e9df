"""vLLM in the place of this project's own loop: what it is handed, and what happens without it."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stages.params import Compute
from stages.sampling import Sampling, check, sampler

VLLM = Compute(
    seed=3,
    num_processes=1,
    num_threads=1,
    dtype="bfloat16",
    generation="vllm",
    token_budget=64,
    checkpoint_every=5,
)


def sampled() -> list[list[int]]:
    sampling = Sampling(max_new_tokens=4, temperature=0.7, eos=1, batch_size=16)
    complete = sampler(Path("model"), sampling, VLLM)
    return complete([[0, 5], [0, 6, 7]], [11, 12], title="test")


def test_without_vllm_its_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for refused in (lambda: check(VLLM), sampled):
        with pytest.raises(ValueError, match=r"compute\.generation: vLLM is not installed, got"):
            refused()
    check(VLLM.model_copy(update={"generation": "torch"}))


def test_vllm_is_handed_token_ids_and_every_rows_own_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any) -> None:
            handed["engine"] = options

        def generate(self, prompts: Any, settings: Any, *, use_tqdm: bool) -> list[Any]:
            handed["prompts"] = prompts
            handed["settings"] = [vars(of) for of in settings]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(8, 1))]) for _ in prompts]

    module = ModuleType("vllm")
    vars(module).update(LLM=LLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: module)
    assert sampled() == [[8, 1], [8, 1]]
    assert handed["prompts"] == [{"prompt_token_ids": [0, 5]}, {"prompt_token_ids": [0, 6, 7]}]
    assert handed["engine"] == {
        "model": "model",
        "dtype": "bfloat16",
        "seed": 3,
        "max_num_seqs": 16,
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "generation_config": "vllm",
    }
    assert handed["settings"] == [
        {
            "temperature": 0.7,
            "max_tokens": 4,
            "seed": seed,
            "ignore_eos": True,
            "stop_token_ids": [1],
            "detokenize": False,
        }
        for seed in (11, 12)
    ]
