"""Time and memory of a step's loss and gradients, ours beside TRL's.

`python -m benchmarks.steps` measures all of it, `--help` says how to measure less, or on a GPU.

All contestants live in one process and take turns in alternating order, a fresh batch each round.
A round whose losses or gradient norms differ fails the benchmark.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from benchmarks import costs
from benchmarks.arms import (
    Arm,
    Settings,
    Tokenised,
    ours,
    ours_reading,
    quiet,
    reference_logps,
    trainer_of,
    trl,
    trl_reading,
)
from benchmarks.data import (
    HH,
    RANKED,
    TLDR,
    ULTRAFEEDBACK,
    Example,
    Lengths,
    examples,
    random_batches,
    sorted_batches,
)
from benchmarks.meters import Took, machine, matmul_peak, peak_memory, timed
from prefopt.costs import necessary, price_of, useful_tokens

RESULTS = Path(__file__).parent / "results"
# Relative, in float32; low precision is rounded differently by every layout.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4
LOW_PRECISION_TOLERANCE = 5e-2
# Steps before the measured ones; their memory is measured, for which freed memory must be given
# back to the system, and that takes time.
MEMORY_ROUNDS = 2
# Batches in the pool from which sorted ones are taken.
SORTED_POOL = 64
CONTEXT = 1024

ALL, NO_TRL = ("trl", "trl_as_shipped", "trl_live", "padded", "packed"), ("padded", "packed")
AGAINST_BEST = ("trl", "padded", "packed")
READING = ("trl", "packed")


def _llama(vocab: int, width: int, layers: int, heads: int, inner: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )


SMALL = _llama(8192, 384, 6, 6, 1024)
LARGE_VOCABULARY = _llama(50257, 256, 4, 4, 704)
TINY = _llama(4096, 128, 2, 4, 352)
# Shapes of published models, with random weights: only a GPU is fast enough for them.
PUBLISHED = {
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    ),
}


@dataclass(frozen=True)
class Table:
    """One comparison.

    Args:
        name: its key in results.
        title: what readers see.
        config: of the policy.
        lengths: of the data.
        arms: who takes part; the last is ours.
        prompts: in a batch.
        rounds: measured.
        completions: of a prompt.
        in_order: whether batches are of a pool sorted by length.
        reading: whether a step is the reference's pass over a batch, without gradients; arms are
            then "trl" and "packed".
    """

    name: str
    title: str
    config: Any
    lengths: Lengths
    arms: tuple[str, ...]
    prompts: int
    rounds: int
    completions: int = 2
    in_order: bool = False
    reading: bool = False

    def batches(self, seed: int) -> list[list[Example]]:
        number = MEMORY_ROUNDS + self.rounds
        drawn = examples(
            self.lengths,
            self.prompts * (SORTED_POOL if self.in_order else number),
            completions=self.completions,
            vocab_size=self.config.vocab_size,
            seed=seed,
        )
        if self.in_order:
            ordered = sorted_batches(drawn, self.prompts, number)
            # Not from short to long: those whose memory is measured are of middling length.
            middle = len(ordered) // 2
            return ordered[middle : middle + 2] + ordered[:middle] + ordered[middle + 2 :]
        return random_batches(drawn, self.prompts)


def tables(config: Any, vocabulary: Any, prompts: int, rounds: int) -> list[Table]:
    """All comparisons; no `vocabulary`, no table of it."""
    families = {"tldr": TLDR, "hh": HH, "ultrafeedback": ULTRAFEEDBACK}
    titles = {"tldr": "TL;DR", "hh": "HH", "ultrafeedback": "UltraFeedback"}
    made = [
        Table(name, f"{titles[name]} lengths, random order", config, of, ALL, prompts, rounds)
        for name, of in families.items()
    ]
    made += [
        Table(
            f"{name}_sorted",
            f"{titles[name]} lengths, sorted by length",
            config,
            of,
            AGAINST_BEST,
            prompts,
            rounds,
            in_order=True,
        )
        for name, of in families.items()
    ]
    made += [
        Table(
            f"k{k}",
            f"{k} completions of a prompt",
            config,
            RANKED,
            NO_TRL,
            max(1, prompts // 2),
            rounds,
            completions=k,
        )
        for k in (2, 4, 8)
    ]
    made += [
        Table(
            f"reference_{name}",
            f"{titles[name]} lengths, random order: the reference's pass alone",
            config,
            of,
            READING,
            prompts,
            rounds,
            reading=True,
        )
        for name, of in families.items()
    ]
    if vocabulary is not None:
        title = f"HH lengths, random order, a vocabulary of {vocabulary.vocab_size}"
        made.append(Table("vocabulary", title, vocabulary, HH, AGAINST_BEST, prompts, rounds))
    return made


def measure(table: Table, settings: Settings, *, seed: int = 0) -> dict[str, Any]:
    """All rounds of a table.

    Raises:
        ArithmeticError: if contestants do not agree.
    """
    began = time.perf_counter()
    policy, reference = (_random(table.config, settings, seed=seed + i) for i in (1, 2))
    batches = table.batches(seed)
    pool = [example for batch in batches for example in batch]
    cached = reference_logps(reference, pool, settings)
    with quiet() as folder:
        arms = _arms(table, policy, reference, pool, cached, folder, settings)
        rounds = [
            _round(arms, policy, batch, number, settings) for number, batch in enumerate(batches)
        ]
    price = price_of(policy, reading=table.reading)
    rows = [costs.rows_of(batch) for batch in batches]
    peak = matmul_peak(settings.device, settings.compute_dtype)
    kept = slice(MEMORY_ROUNDS, None)
    return {
        "name": table.name,
        "title": table.title,
        "model": _described(table.config, policy),
        "lengths": dataclasses.asdict(table.lengths),
        "prompts": table.prompts,
        "completions": table.completions,
        "sorted": table.in_order,
        "seconds": time.perf_counter() - began,
        "matmul_peak": peak,
        "useful_tokens": [useful_tokens(of) for of in rows[kept]],
        "necessary_flop": [price.of(necessary(of)) for of in rows[kept]],
        "arms": {
            arm.name: {
                "title": arm.title,
                "compute_seconds": [taken[arm.name].took.compute for taken in rounds[kept]],
                "wall_seconds": [taken[arm.name].took.wall for taken in rounds[kept]],
                "memory_bytes": [taken[arm.name].memory for taken in rounds[:MEMORY_ROUNDS]],
                "slots": [arm.work(batch).slots for batch in batches[kept]],
                "flop": [price.of(arm.work(batch)) for batch in batches[kept]],
                "loss_deviation": max(taken[arm.name].loss_deviation for taken in rounds),
                "norm_deviation": max(taken[arm.name].norm_deviation for taken in rounds),
            }
            for arm in arms
        },
    }


@dataclass(frozen=True)
class Taken:
    """One arm's part of a round; deviations are relative to the first arm's."""

    took: Took
    memory: int | None
    loss_deviation: float
    norm_deviation: float


def _round(
    arms: Sequence[Arm],
    policy: PreTrainedModel,
    batch: Sequence[Example],
    number: int,
    settings: Settings,
) -> dict[str, Taken]:
    start = number // 2 % len(arms)
    order = [*arms[start:], *arms[:start]]
    if number % 2:
        order.reverse()
    measured: dict[str, tuple[Took, int | None, float, float]] = {}
    for arm in order:
        for weight in policy.parameters():
            # Gradients are allocated beforehand, for everyone.
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.zero_()
        gc.collect()
        losses: list[float] = []

        def step(arm: Arm = arm, losses: list[float] = losses) -> None:
            losses.append(arm.step(batch))

        took, memory = Took(0.0, 0.0), None
        if number < MEMORY_ROUNDS:
            memory = peak_memory(step, settings.device)
        else:
            took = timed(step, settings.device)
        norms = [weight.grad.norm() for weight in policy.parameters() if weight.grad is not None]
        measured[arm.name] = took, memory, losses[0], torch.stack(norms).norm().item()
    _, _, loss, norm = measured[arms[0].name]
    taken = {
        # A pass without gradients leaves all norms at 0.
        name: Taken(took, memory, abs(a_loss / loss - 1), abs(a_norm - norm) / (norm or 1.0))
        for name, (took, memory, a_loss, a_norm) in measured.items()
    }
    precise = settings.compute_dtype == torch.float32
    for name, part in taken.items():
        off_loss = part.loss_deviation > (LOSS_TOLERANCE if precise else LOW_PRECISION_TOLERANCE)
        off_norm = part.norm_deviation > (NORM_TOLERANCE if precise else LOW_PRECISION_TOLERANCE)
        if off_loss or off_norm:
            raise ArithmeticError(
                f"round {number}: '{name}' does not agree with '{arms[0].name}', got a loss off "
                f"by {part.loss_deviation:.1e} and a gradient norm off by "
                f"{part.norm_deviation:.1e}, relatively"
            )
    return taken


def _arms(
    table: Table,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    pool: Sequence[Example],
    cached: dict[int, list[float]],
    folder: str,
    settings: Settings,
) -> list[Arm]:
    if table.reading:
        trainer = trainer_of(policy, reference, pool, folder, settings, live=True)
        tokenised = Tokenised(trainer, pool, cached)
        return [trl_reading(trainer, tokenised), ours_reading(reference, settings)]
    made: dict[str, Arm] = {
        "padded": ours(policy, cached, settings, pack=False),
        "packed": ours(policy, cached, settings, pack=True),
    }
    if "trl" in table.arms:
        trainer = trainer_of(policy, reference, pool, folder, settings, live=False)
        tokenised = Tokenised(trainer, pool, cached)
        made["trl"] = trl("trl", "TRL at its best", trainer, tokenised, only_completions=True)
        made["trl_as_shipped"] = trl(
            "trl_as_shipped", "TRL as shipped", trainer, tokenised, only_completions=False
        )
    if "trl_live" in table.arms:
        trainer = trainer_of(policy, reference, pool, folder, settings, live=True)
        tokenised = Tokenised(trainer, pool, cached)
        made["trl_live"] = trl(
            "trl_live",
            "TRL, live reference, checkpointing",
            trainer,
            tokenised,
            only_completions=False,
        )
    # On CUDA TRL scores only completions as it is shipped: one of the two is enough.
    on_cuda = settings.device.type == "cuda"
    return [made[name] for name in table.arms if not (on_cuda and name == "trl_as_shipped")]


def _random(config: Any, settings: Settings, *, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with settings.device:
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _described(config: Any, policy: PreTrainedModel) -> dict[str, Any]:
    return {
        "family": config.model_type,
        "parameters": sum(weight.numel() for weight in policy.parameters()),
        "vocabulary": config.vocab_size,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "inner": config.intermediate_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, a minute in all")
    parser.add_argument("--out", type=Path, help="results/cpu.json, or cuda.json beside it")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")
    parser.add_argument("--model", choices=["small", *PUBLISHED], default="small")
    parser.add_argument("--attention", default="sdpa", help="of TRL and of ours, padded")
    parser.add_argument("--prompts", type=int, default=8, help="in a batch")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tables", nargs="+", help="only those; what --out has of others stays")
    parser.add_argument("--arms", nargs="+", help="only those, of tables that have them")
    chosen = parser.parse_args()
    name = chosen.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Settings(
        torch.device(name),
        torch.bfloat16 if chosen.bf16 else torch.float32,
        chosen.attention,
    )
    if chosen.quick:
        wanted = tables(TINY, None, prompts=4, rounds=3)
    elif chosen.model == "small":
        wanted = tables(SMALL, LARGE_VOCABULARY, chosen.prompts, chosen.rounds)
    else:
        wanted = tables(PUBLISHED[chosen.model], None, chosen.prompts, chosen.rounds)
    if chosen.arms is not None:
        wanted = [
            dataclasses.replace(table, arms=tuple(arm for arm in table.arms if arm in chosen.arms))
            for table in wanted
        ]
    names = [table.name for table in wanted]
    out: Path = chosen.out or RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[str, Any]] = {}
    if chosen.tables is not None:
        if out.exists():
            before = json.loads(out.read_text())["tables"]
            measured = {table["name"]: table for table in before}
        wanted = [table for table in wanted if table.name in chosen.tables]
    for table in wanted:
        measured[table.name] = measure(table, settings)
        sys.stderr.write(f"{table.name}: {measured[table.name]['seconds']:.0f} s\n")
        results = {
            "machine": machine(settings.device),
            "device": settings.device.type,
            "compute_dtype": str(settings.compute_dtype).removeprefix("torch."),
            "attention": settings.attention,
            "tables": [measured[name] for name in names if name in measured],
        }
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
