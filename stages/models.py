"""Load and save causal LMs and their tokenizers; devices and dtypes are chosen here alone.

A model is named by a local Hugging Face directory, a hub id, or `package:MODULE/FILE.gguf` for
weights that ship inside an installed Python package. Weights are safetensors or GGUF, never
pickles, and no model brings its own code.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from prefopt import attention
from prefopt.scoring import packs

# Not in the registry of masks too: so a model makes none, and packed rows need none.
AttentionInterface.register(attention.NAME, attention.attend)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_up(*, seed: int, num_threads: int) -> None:
    """Fix what a result may depend on: the seed, the thread count, deterministic kernels."""
    torch.set_num_threads(num_threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=device().type == "cuda")


def check(name: str) -> None:
    """Refuse a model that cannot be loaded whole, or a tokenizer that does not fit it.

    Raises:
        ValueError: naming the file and the remedy.
    """
    if is_local(name):
        directory = Path(name)
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"base: '{name}' is no model directory, got no config.json there; "
                "name a folder written by save_pretrained, or `git checkout data/base`"
            )
        weights = sorted(directory.glob("*.safetensors"))
        if not weights:
            raise ValueError(
                f"base: '{name}' has no *.safetensors, got none; restore the file, or convert "
                "pickled weights with save_pretrained"
            )
        for file in weights:
            try:
                with safe_open(file, "pt") as tensors:
                    assert list(tensors.keys())
            except SafetensorError as error:
                raise ValueError(
                    f"{file}: damaged weights, got {error}; restore the file"
                ) from error
        index = directory / "model.safetensors.index.json"
        named = json.loads(index.read_text())["weight_map"].values() if index.exists() else []
        missing = sorted(set(named) - {file.name for file in weights})
        if missing:
            raise ValueError(f"{directory}: weights are missing, got no {missing}; restore them")
    try:
        tokenizer, config = load_tokenizer(name), load_config(name)
    except OSError as error:
        raise ValueError(
            f"base: '{name}' cannot be loaded, got {error}; restore its files, or mend the name"
        ) from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"base: '{name}' has a tokenizer that does not fit its model, got {len(tokenizer)} "
            f"tokens for {config.vocab_size} embeddings; take the one that it was trained with"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"base: '{name}' has no end-of-sequence token, got none; set eos_token in its tokenizer"
        )


def is_local(name: str) -> bool:
    """Whether `name` is a path: it starts with a dot or a slash, or with a folder that exists."""
    return name.startswith((".", "/")) or Path(Path(name).parts[0]).is_dir()


def load_config(name: str) -> Any:
    return AutoConfig.from_pretrained(**_source(name))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(**_source(name))


def bos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before every prompt; a tokenizer without one starts with its end of sequence."""
    token = tokenizer.bos_token_id
    return token if isinstance(token, int) else eos(tokenizer)


def eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token at which a completion ends."""
    token = tokenizer.eos_token_id
    assert isinstance(token, int)
    return token


def load_policy(name: str) -> PreTrainedModel:
    """A causal LM in float32 on the device, in eval mode: dropout would make log-ratios lie."""
    policy = AutoModelForCausalLM.from_pretrained(
        **_source(name), dtype=torch.float32, use_safetensors=True
    )
    if "gguf_file" in _source(name):
        # A model read from GGUF calls itself quantized and then refuses to be saved.
        weights = policy.state_dict()
        config = policy.config
        delattr(config, "quantization_config")
        policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        policy.load_state_dict(weights)
        policy.tie_weights()
    torch.nn.Module.to(policy, device())
    return with_engine(policy.eval())


def with_engine(policy: PreTrainedModel) -> PreTrainedModel:
    """The policy attending as packed rows need it, if it can; as it did before, if not."""
    config: Any = policy.config
    before = config._attn_implementation
    policy.set_attn_implementation(attention.NAME)
    if not packs(policy):
        policy.set_attn_implementation(before)
    return policy


def save(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a Hugging Face directory: safetensors, config and tokenizer."""
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_only_top(policy: PreTrainedModel, num_layers: int) -> None:
    """Freeze all but the top layers, the final norm included; 0 trains everything."""
    if num_layers == 0:
        return
    decoder: Any = policy.get_decoder()
    if num_layers > len(decoder.layers):
        raise ValueError(
            f"top_layers: more than the model has, got {num_layers}; at most {len(decoder.layers)}"
        )
    policy.requires_grad_(False)
    decoder.layers[-num_layers:].requires_grad_(True)
    decoder.norm.requires_grad_(True)


def _source(name: str) -> dict[str, Any]:
    if not name.startswith("package:"):
        return {"pretrained_model_name_or_path": name}
    module, file = name.removeprefix("package:").split("/", 1)
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"base: package '{module}' is not installed, got nothing; `make repro RECIPE=...` "
            "installs what its recipe needs"
        )
    folder = spec.submodule_search_locations[0]
    return {"pretrained_model_name_or_path": folder, "gguf_file": file}
