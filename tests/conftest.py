"""The smallest true things: a random two-layer Llama, a byte tokenizer, an empty workplace."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis.configuration import set_hypothesis_home_dir
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PROJECT = Path(__file__).parents[1]
VOCAB_SIZE = 259  # 256 bytes and three control tokens

# Hypothesis would keep a folder in the project's root.
HYPOTHESIS_HOME = tempfile.TemporaryDirectory()
set_hypothesis_home_dir(HYPOTHESIS_HOME.name)


# Files that wait for servers and processes for minutes, the longest first. Where files are run at
# once, they begin: in the end nothing would be left to do beside them.
LONG = (
    "test_workers",
    "test_pipeline",
    "test_rounds_by_workers",
    "test_rounds",
    "test_flows",
    "test_rounds_by_schedule",
    "test_audit",
    "test_distributed",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_unconfigure() -> None:
    HYPOTHESIS_HOME.cleanup()


def llama(
    *, vocab_size: int = VOCAB_SIZE, hidden_size: int = 16, context: int = 64, seed: int = 0
) -> LlamaForCausalLM:
    """Two layers at random, with weights large enough that its distributions are far from flat."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=context,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        ).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    control = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*control, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that a stage runs in; the process outlives its stages."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def base(workplace: Path) -> Path:
    """A saved model with its tokenizer, in `data/base` of the workplace."""
    directory = Path("data/base")
    llama().save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def shipped_params() -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "params.yaml").read_text())


@pytest.fixture
def write_params(workplace: Path) -> Callable[..., dict[str, Any]]:
    """Write a params.yaml: the shipped one, with some values set by their dotted names."""

    def write(**changes: Any) -> dict[str, Any]:
        tree = shipped_params()
        for name, value in changes.items():
            *sections, key = name.split(".")
            node = tree
            for section in sections:
                node = node[section]
            node[key] = value
        Path("params.yaml").write_text(yaml.safe_dump(tree))
        return tree

    return write


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished pipeline, made once for all tests; who changes it puts it back."""
    from finished import finished_pipeline

    folder = tmp_path_factory.mktemp("finished")
    yield finished_pipeline(folder / "project")
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server that `python -m flows.pipeline` starts, with its settings and its client's."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("PREFECT_")]:
            patch.delenv(key)
        patch.setenv("PREFECT_HOME", str(home))
        from flows.server import own_server

        with own_server(home) as url:
            yield url
