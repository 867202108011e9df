"""What a step has to compute, by formula, and how fast a device computes.

A row is a prompt P with a completion C. Operations are floating-point ones, multiplications and
additions counted apart.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prefopt.packing import Row, slots_of


@dataclass(frozen=True)
class Work:
    """What a forward pass computes.

    Args:
        slots: token slots that pass through the layers.
        attended: pairs of a query and a key that it sees.
        scored: positions that pass through the LM head.
    """

    slots: int
    attended: int
    scored: int


def necessary(rows: Sequence[Row]) -> Work:
    """The least that scores these rows: every distinct prompt once, all but completions' ends."""
    prompts = {tuple(row.prompt) for row in rows}
    attended = sum(len(prompt) * (len(prompt) + 1) // 2 for prompt in prompts)
    for row in rows:
        fed = len(row.completion) - 1
        attended += fed * len(row.prompt) + fed * (fed + 1) // 2
    return Work(slots_of(rows), attended, sum(len(row.completion) for row in rows))


def useful_tokens(rows: Sequence[Row]) -> int:
    """The fewest that can be read: every distinct prompt once, every completion."""
    return slots_of(rows) + len(rows)


@dataclass(frozen=True)
class Price:
    """Operations of a forward and a backward pass that repeats nothing, for each unit of `Work`."""

    slot: float
    attended: float
    scored: float

    def of(self, work: Work) -> float:
        return self.slot * work.slots + self.attended * work.attended + self.scored * work.scored


def price_of(policy: nn.Module, *, reading: bool = False) -> Price:
    """What this policy costs as it trains now, of any family of dense layers.

    A product with a matrix costs 2 operations a number forwards, as many again for the gradient of
    what enters it, and as many for its own: frozen weights take none, and nothing flows back below
    the first that trains. Attention, whose scores are made again, costs 2.5 times as much
    backwards.

    Args:
        policy: a Hugging Face causal LM.
        reading: of a forward pass alone.
    """
    model: Any = policy
    config = model.config.get_text_config()
    # Families without attention have no heads.
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    trains = not reading
    flows_back = embeddings.requires_grad
    slot = attended = 0.0
    depths: set[int] = set()
    for name, weight in model.get_decoder().named_parameters():
        depth = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        if weight is embeddings or depth is None:
            continue
        flows_back |= weight.requires_grad
        if weight.ndim == 2:
            slot += 2 * weight.numel() * (1 + trains * (flows_back + weight.requires_grad))
        if depth not in depths:
            depths.add(depth)
            attended += 4 * width * (1 + 2.5 * trains * flows_back)
    return Price(slot, attended, 2.0 * head.numel() * (1 + trains * (1 + head.requires_grad)))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a matrix product just now, in operations a second."""
    # On a CPU short enough that some product is never interrupted.
    size = 8192 if device.type == "cuda" else 512
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    times: list[float] = []
    for _ in range(16):
        started = time.perf_counter()
        product = left @ right
        # Asking for a number waits for the device.
        product[0, 0].item()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times)
