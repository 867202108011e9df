"""Pretrain the project's own base LM: `python -m stages.pretrain recipes/base.yaml`.

Text is cut into blocks of the context's length and trained with the loop and the scoring of SFT:
a block is a completion of its first token. Killed at any time, the same command resumes.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefopt.checkpoints import Checkpoints, Metrics
from prefopt.generation import sample
from prefopt.loop import Optimisation, fit
from prefopt.packing import Row, Steps
from prefopt.scoring import token_logps
from stages.artefacts import program
from stages.models import DTYPES, bos, eos, save, with_engine
from stages.params import Pretrain, load_pretrain

OPENINGS = ["This movie", "The acting", "I watched this", "A film about", "The worst part"]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", help="read the text from here instead of the recipe's source")
    parser.add_argument("--out", type=Path, default=Path("data/base"))
    arguments = parser.parse_args()
    recipe = load_pretrain(arguments.recipe)
    torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed)

    work = Path(".prefopt/pretrain")
    work.mkdir(parents=True, exist_ok=True)
    training, held_out = split(read_texts(arguments.data or recipe.data, recipe.column), recipe)
    tokenizer = train_tokenizer(training, recipe)
    stream = encode(training, tokenizer, work / "tokens.npy")

    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=bos(tokenizer),
            eos_token_id=eos(tokenizer),
            pad_token_id=list(SPECIAL).index("pad_token"),
        )
    ).eval()
    train(policy, stream, recipe, Checkpoints(work / "checkpoints", every=recipe.checkpoint_every))

    figures = {
        "parameters": sum(p.numel() for p in policy.parameters()),
        "reviews trained on": len(training),
        "tokens seen": recipe.num_steps * recipe.batch_size * recipe.context,
        "held-out reviews": len(held_out),
        "bits per byte on held-out reviews": bits_per_byte(policy, held_out, tokenizer, recipe),
    }
    samples = sampled(policy, tokenizer, recipe)
    policy.generation_config.eos_token_id = eos(tokenizer)
    torch.nn.Module.to(policy, torch.bfloat16)
    save(policy, tokenizer, arguments.out)
    card = model_card(arguments.recipe, recipe, figures, samples)
    (arguments.out / "README.md").write_text(card)


def read_texts(source: str, column: str) -> list[str]:
    """Texts of a hub data set, or of the `*.jsonl.gz` files of a local directory."""
    from datasets import concatenate_datasets, load_dataset

    if Path(source).is_dir():
        files = sorted(str(path) for path in Path(source).glob("*.jsonl.gz"))
        if not files:
            raise ValueError(f"data: no *.jsonl.gz file in '{source}'; name a folder that has some")
        rows = load_dataset("json", data_files=files, split="train")
    else:
        splits = load_dataset(source)
        rows = concatenate_datasets([splits["train"], splits["test"]])
    return [" ".join(text.replace("<br />", "\n").split(" ")).strip() for text in rows[column]]


def split(texts: list[str], recipe: Pretrain) -> tuple[list[str], list[str]]:
    """Drop repeated texts, shuffle, and hold some out."""
    texts = sorted(set(texts))
    random.Random(recipe.seed).shuffle(texts)
    return texts[recipe.num_held_out :], texts[: recipe.num_held_out]


def train_tokenizer(texts: list[str], recipe: Pretrain) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=recipe.context, **SPECIAL
    )


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, cache: Path) -> np.ndarray:
    """All texts as one stream of token ids: bos, text, eos, bos, text, eos, ..."""
    if cache.exists():
        return np.load(cache)
    ids: list[int] = []
    for start in tqdm(range(0, len(texts), 1000), desc="tokenise", unit="k reviews"):
        for row in tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]:
            ids += [bos(tokenizer), *row, eos(tokenizer)]
    stream = np.array(ids, dtype=np.uint16)
    np.save(cache, stream)
    return stream


def train(
    policy: LlamaForCausalLM, stream: np.ndarray, recipe: Pretrain, checkpoints: Checkpoints
) -> None:
    blocks = stream[: len(stream) // recipe.context * recipe.context].reshape(-1, recipe.context)
    num_epochs = math.ceil(recipe.num_steps * recipe.batch_size / len(blocks)) + 1
    steps = Steps(len(blocks), recipe.batch_size, num_epochs, recipe.seed)

    def objective(step: int) -> Iterator[tuple[Tensor, Metrics]]:
        chosen = steps[step]
        num_tokens = len(chosen) * (recipe.context - 1)
        for start in range(0, len(chosen), recipe.micro_batch_size):
            rows = [block_row(blocks[i]) for i in chosen[start : start + recipe.micro_batch_size]]
            logps = token_logps(policy, rows, compute_dtype=DTYPES[recipe.compute_dtype])
            yield -torch.cat(logps).sum() / num_tokens, {}

    optimisation = Optimisation(
        learning_rate=recipe.learning_rate,
        schedule="linear",
        warmup=recipe.warmup,
        weight_decay=recipe.weight_decay,
        beta2=0.95,
    )
    started = time.monotonic()
    with tqdm(total=recipe.num_steps, desc="pretrain", unit="step", mininterval=20) as bar:

        def log(metrics: Metrics) -> None:
            bar.set_postfix(
                nats=f"{metrics['loss']:.3f}", hours=(time.monotonic() - started) / 3600
            )
            bar.update()

        fit(policy, objective, recipe.num_steps, optimisation, log=log, checkpoints=checkpoints)


def block_row(block: np.ndarray) -> Row:
    ids = block.tolist()
    return Row(prompt=ids[:1], completion=ids[1:])


@torch.no_grad()
def bits_per_byte(
    policy: LlamaForCausalLM,
    texts: list[str],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Pretrain,
) -> float:
    """Cross-entropy of held-out texts in bits over their UTF-8 bytes.

    Each text counts whole, its eos included, in windows of the context.
    """
    nats, num_bytes = 0.0, 0
    for text in tqdm(texts, desc="held out", unit="review", mininterval=10):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [eos(tokenizer)]
        num_bytes += len(text.encode())
        window = recipe.context - 1
        for start in range(0, len(ids), window):
            row = Row(prompt=[bos(tokenizer)], completion=ids[start : start + window])
            nats -= token_logps(policy, [row])[0].sum().item()
    return nats / math.log(2) / num_bytes


def sampled(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Pretrain
) -> list[str]:
    """The first samples of fixed openings, none left out."""
    prompts = [
        [bos(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in OPENINGS
    ]
    completions = sample(
        with_engine(policy),
        prompts,
        [recipe.seed + row for row in range(len(prompts))],
        max_new_tokens=60,
        temperature=0.8,
        eos=eos(tokenizer),
        batch_size=len(prompts),
        progress=lambda _: None,
    )
    return [
        opening + completion
        for opening, completion in zip(
            OPENINGS,
            tokenizer.batch_decode(completions, skip_special_tokens=True),
            strict=True,
        )
    ]


def model_card(path: Path, recipe: Pretrain, figures: dict[str, float], samples: list[str]) -> str:
    numbers = "\n".join(
        f"| {name} | {f'{value:.4f}' if isinstance(value, float) else f'{value:,}'} |"
        for name, value in figures.items()
    )
    quoted = "\n\n".join("> " + " ".join(text.split()) for text in samples)
    return f"""---
license: mit
language: en
library_name: transformers
---

# The base of the default recipe

A small causal LM of English movie reviews: Llama architecture, {recipe.num_layers} layers of
width {recipe.hidden_size}, {recipe.vocab_size:,} byte-level BPE tokens, context {recipe.context},
weights in bfloat16. It exists to be fine-tuned and aligned in minutes on a CPU; it knows nothing
but how reviews sound, repeats their opinions and prejudices, and is of no other use.

| | |
|---|---|
{numbers}
| seed | {recipe.seed} |

Data: the IMDB Large Movie Review Dataset v1.0 (Maas et al., ACL 2011), `{recipe.data}`,
training and test reviews together, labels unused; {recipe.num_held_out} reviews held out.
Tokenizer and weights are this project's own work. Made by

    python -m stages.pretrain {path}

## Samples

The first sample of each opening at temperature 0.8, unedited but for line breaks.

{quoted}
"""


if __name__ == "__main__":
    program(main)
