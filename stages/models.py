"""Load and save causal LMs and their tokenizers; devices and dtypes are chosen here alone.

A model is named by a local Hugging Face directory, a hub id, or `package:MODULE/FILE.gguf` for
weights that ship inside an installed Python package. Weights are safetensors or GGUF, never
pickles, and no model brings its own code.

A directory may hold adapters alone. It then names the model that they adapt and the digest of its
weights, and is loaded as that model with the adapters merged in.
"""

import copy
import functools
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from prefopt import attention
from prefopt.scoring import packs
from stages.artefacts import weights_digest
from stages.params import Lora, Optimiser

if TYPE_CHECKING:
    from peft import LoraConfig

# Not in the registry of masks too: so a model makes none, and packed rows need none.
AttentionInterface.register(attention.NAME, attention.attend)

ADAPTED = "adapted.json"  # beside adapters: which model they adapt
ADAPTER_CONFIG = "adapter_config.json"

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


def check_trainable(name: str, optimisers: Iterable[Optimiser]) -> None:
    """Refuse layers and modules to train that the model has not, before its weights are read.

    Raises:
        ValueError: naming the option.
    """
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(load_config(name))
    for optimiser in optimisers:
        make_trainable(copy.deepcopy(policy), optimiser, seed=0)


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
    """A causal LM in float32 on the device, in eval mode: dropout would make log-ratios lie.

    Raises:
        ValueError: if `name` holds adapters of other weights than those of the model that it names.
    """
    if (Path(name) / ADAPTED).is_file():
        return _load_adapted(Path(name))
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


def load_classifier(name: str) -> PreTrainedModel:
    """A sequence classifier in float32 on the device, in eval mode.

    Raises:
        ValueError: if its weights lack some of what a classifier has.
    """
    model, found = AutoModelForSequenceClassification.from_pretrained(
        **_source(name), dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(
            f"model: '{name}' lacks weights of a sequence classifier, got no "
            f"{', '.join(sorted(found['missing_keys']))}; they would be random: name a model that "
            "was trained to classify"
        )
    torch.nn.Module.to(model, device())
    return model.eval()


def with_engine(policy: PreTrainedModel) -> PreTrainedModel:
    """The policy attending as packed rows need it, if it can; as it did before, if not."""
    config: Any = policy.config
    before = config._attn_implementation
    policy.set_attn_implementation(attention.NAME)
    if not packs(policy):
        policy.set_attn_implementation(before)
    return policy


def save(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    adapted: Path | None = None,
) -> None:
    """Write a Hugging Face directory: safetensors, config and tokenizer.

    Args:
        policy: its adapters, if it has some, are merged into it unless `adapted` is given.
        tokenizer: goes with it.
        directory: is made.
        adapted: the directory that the policy was loaded from; adapters alone are then written.
    """
    if adapted is None or not has_adapters(policy):
        merged(policy).save_pretrained(directory)
    else:
        policy.save_pretrained(directory)
        # peft keeps the names as a set, whose order is another in every process.
        config = json.loads((directory / ADAPTER_CONFIG).read_text())
        config |= {
            "base_model_name_or_path": str(adapted),
            "target_modules": sorted(config["target_modules"]),
        }
        _write_json(directory / ADAPTER_CONFIG, config)
        identity = {"model": str(adapted), "weights": weights_digest(adapted)}
        _write_json(directory / ADAPTED, identity)
    tokenizer.save_pretrained(directory)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _load_adapted(directory: Path) -> PreTrainedModel:
    identity = json.loads((directory / ADAPTED).read_text())
    found = weights_digest(Path(identity["model"]))
    if found != identity["weights"]:
        raise ValueError(
            f"{directory}: adapters of other weights than '{identity['model']}' has now, got "
            f"{found[:12]} for {identity['weights'][:12]}; restore the model that they were "
            f"trained on, or train them again"
        )
    policy = load_policy(identity["model"])
    policy.load_adapter(str(directory))
    return merged(policy)


def make_trainable(policy: PreTrainedModel, optimiser: Optimiser, *, seed: int) -> None:
    """Say what of the policy trains: adapters, top layers or all of it; and what it remembers."""
    if optimiser.lora is not None:
        add_adapters(policy, optimiser.lora, seed=seed)
    else:
        train_only_top(policy, optimiser.top_layers)
    if optimiser.activation_checkpointing:
        checkpoint_activations(policy)


def add_adapters(policy: PreTrainedModel, lora: Lora, *, seed: int) -> None:
    """Add low-rank adapters, which alone train from here on; they change nothing until they do.

    Raises:
        ValueError: if the policy has no such modules, or they are its embeddings or its LM head.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            policy.add_adapter(_lora_config(policy, lora))
        except ValueError as error:
            raise ValueError(
                f"lora.targets: not of this model, got {lora.targets} ({error}); take all-linear, "
                "or names of its linear modules"
            ) from error
    # The engine reads the head's weight itself, and a tied one would be adapted by half.
    if any(map(_is_adapted, (policy.get_input_embeddings(), policy.get_output_embeddings()))):
        raise ValueError(
            f"lora.targets: embeddings and the LM head take no adapters, got {lora.targets}; name "
            "modules of the layers"
        )


def _lora_config(policy: PreTrainedModel, lora: Lora) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=lora.targets,
        # GPT-2's, whose weights lie transposed.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in policy.modules()),
    )


def has_adapters(policy: PreTrainedModel) -> bool:
    return hasattr(policy, "peft_config")


def _is_adapted(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def merged(policy: PreTrainedModel) -> PreTrainedModel:
    """The policy with its adapters added to its weights, in place; sampling then pays for none."""
    if not has_adapters(policy):
        return policy
    adapted: list[tuple[str, Any]] = [
        (name, module) for name, module in policy.named_modules() if _is_adapted(module)
    ]
    for name, module in adapted:
        module.merge()
        policy.set_submodule(name, module.get_base_layer())
    policy.delete_adapter("default")
    return policy


def frozen(policy: PreTrainedModel, optimiser: Optimiser) -> PreTrainedModel:
    """The reference of a policy that is about to train: what it is now.

    Where adapters alone will train, it is the policy without them and shares its weights: no second
    copy of them is held.
    """
    shared = policy.parameters() if optimiser.lora is not None else ()
    return copy.deepcopy(policy, {id(weight): weight for weight in shared}).requires_grad_(False)


def checkpoint_activations(policy: PreTrainedModel) -> None:
    """Keep of each layer only what enters it; the rest is computed again for the gradient.

    Hugging Face's own switch works in training mode alone, which would turn on dropout.
    """
    layers = [m for m in policy.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"activation_checkpointing: {type(policy).__name__} has no layers for it, got true; "
            "set it to false"
        )
    for layer in layers:
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def decoder_layers(policy: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's layers, by whatever name its family keeps them."""
    decoder: Any = policy.get_decoder()
    stacks = [child for child in decoder.children() if isinstance(child, torch.nn.ModuleList)]
    return [layer for stack in stacks for layer in stack]


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
