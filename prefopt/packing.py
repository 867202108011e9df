"""Which rows make an optimiser step, and which of those a micro-batch."""

from collections.abc import Iterable, Iterator, Sequence

import torch


def steps_of_rows(num_rows: int, batch_size: int, num_epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of every optimiser step: each epoch a new permutation, no row left out.

    The last step of an epoch may be smaller than `batch_size`.
    """
    generator = torch.Generator().manual_seed(seed)
    steps: list[list[int]] = []
    for _ in range(num_epochs):
        order = torch.randperm(num_rows, generator=generator).tolist()
        steps += [order[i : i + batch_size] for i in range(0, num_rows, batch_size)]
    return steps


def micro_batches(
    rows: Iterable[int], lengths: Sequence[int], token_budget: int
) -> Iterator[list[int]]:
    """Cut `rows` into micro-batches of at most `token_budget` tokens after padding.

    Rows are sorted by length first, so that little is padded. A row longer than the budget makes
    a micro-batch of its own.
    """
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: (lengths[row], row)):
        if batch and (len(batch) + 1) * lengths[row] > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
