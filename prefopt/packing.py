"""Which rows make an optimiser step, which of those a micro-batch, and how one lies in memory."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

# A tile's padding may add this share to the pairs of a query and a key that its lines need, and so
# many a line: fewer tiles against less padding.
SLACK_SHARE = 0.3
SLACK_PAIRS = 1024


@dataclass(frozen=True)
class Row:
    """A completion of a prompt, as token ids; both have at least one token."""

    prompt: Sequence[int]
    completion: Sequence[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass(frozen=True)
class Tile:
    """Lines of like size that attend as one batch, as slots.

    A line is a row, or only its completion, which sees the prompt that another line computes.
    Shorter lines are padded at their end with slot 0, which no real query sees.

    Args:
        queries: the slots that look.
        keys: the slots that they see: their row from its beginning.
        first: places of the first queries among the keys; None where lines are rows, and it is 0.
    """

    queries: Int[Tensor, "lines time"]
    keys: Int[Tensor, "lines keys"]
    first: Int[Tensor, " lines"] | None

    def to(self, device: torch.device) -> "Tile":
        first = None if self.first is None else self.first.to(device)
        return Tile(self.queries.to(device), self.keys.to(device), first)


@dataclass
class Layout:
    """A packed row: every distinct prompt once, the completions of its rows after it.

    A completion's last token predicts nothing and has no slot.

    Args:
        tokens: token ids, slot by slot.
        positions: places in their own rows, by which position embeddings go.
        predictors: for every completion token, row by row, the slot whose output predicts it.
        targets: those completion tokens.
        lengths: completion tokens of each row.
        tiles: for attention; every slot looks in at least one of them.
        home: for every slot, its one place among the tiles' queries laid end to end.
        branches: a number for every prompt and every completion, slot by slot.
        trunks: the number of the slot's own prompt; with positions it says all that tiles say.
        calls: how many layers have attended by this layout.
        masks: what `prefopt.attention` keeps for its layers, by their windows.
    """

    tokens: Int[Tensor, " slots"]
    positions: Int[Tensor, " slots"]
    predictors: Int[Tensor, " targets"]
    targets: Int[Tensor, " targets"]
    lengths: list[int]
    tiles: list[Tile]
    home: Int[Tensor, " slots"]
    branches: Int[Tensor, " slots"]
    trunks: Int[Tensor, " slots"]
    calls: int = field(default=0)
    masks: dict[int | None, Any] = field(default_factory=dict[int | None, Any])

    def spans(self) -> list[slice]:
        """Where each row's completion lies among the targets."""
        ends = list(itertools.accumulate(self.lengths))
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def to(self, device: torch.device) -> "Layout":
        return Layout(
            self.tokens.to(device),
            self.positions.to(device),
            self.predictors.to(device),
            self.targets.to(device),
            self.lengths,
            [tile.to(device) for tile in self.tiles],
            self.home.to(device),
            self.branches.to(device),
            self.trunks.to(device),
        )


def slots_of(rows: Iterable[Row]) -> int:
    """Slots that rows take when packed."""
    rows = list(rows)
    prompts = {tuple(row.prompt) for row in rows}
    return sum(map(len, prompts)) + sum(len(row.completion) - 1 for row in rows)


def packed(rows: Sequence[Row]) -> Layout:
    """Lay rows into one packed row, those of one prompt beside each other."""
    tokens: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    trunks: list[int] = []
    slots: list[list[int]] = [[] for _ in rows]
    groups: dict[tuple[int, ...], list[int]] = {}
    whole: list[_Line] = []
    tails: list[_Line] = []
    for number, row in enumerate(rows):
        groups.setdefault(tuple(row.prompt), []).append(number)
    for prompt, members in groups.items():
        trunk = list(range(len(tokens), len(tokens) + len(prompt)))
        tokens += prompt
        positions += range(len(prompt))
        # A prompt goes by the number of the first of its rows, completions by numbers after those.
        branches += [members[0]] * len(prompt)
        for number in members:
            fed = list(rows[number].completion[:-1])
            slots[number] = [*trunk, *range(len(tokens), len(tokens) + len(fed))]
            tokens += fed
            positions += range(len(prompt), len(prompt) + len(fed))
            branches += [len(rows) + number] * len(fed)
        trunks += [members[0]] * (len(tokens) - len(trunks))
        longest = max(members, key=lambda number: len(slots[number]))
        for number in members:
            tail = _Line(slots[number], len(prompt))
            # A tail spares the prompt's queries; a row, the pairs that causality rules out.
            if number == longest or tail.time >= len(prompt):
                whole.append(_Line(slots[number], 0))
            elif tail.time:
                tails.append(tail)
    predictors = [
        slot for number, row in enumerate(rows) for slot in slots[number][len(row.prompt) - 1 :]
    ]
    tiles = [*_tiled(whole), *_tiled(tails)]
    return Layout(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        predictors=torch.tensor(predictors),
        targets=torch.tensor([token for row in rows for token in row.completion]),
        lengths=[len(row.completion) for row in rows],
        tiles=tiles,
        home=_homes(tiles, len(tokens)),
        branches=torch.tensor(branches),
        trunks=torch.tensor(trunks),
    )


@dataclass(frozen=True)
class _Line:
    """Slots of a row, and from which on they look."""

    slots: list[int]
    first: int

    @property
    def time(self) -> int:
        return len(self.slots) - self.first


def _tiled(lines: list[_Line]) -> list[Tile]:
    tiles: list[Tile] = []
    chosen: list[_Line] = []
    for line in sorted(lines, key=lambda line: (len(line.slots), line.time)):
        if chosen and not _alike([*chosen, line]):
            tiles.append(_tile(chosen))
            chosen = []
        chosen.append(line)
    return [*tiles, _tile(chosen)] if chosen else tiles


def _alike(lines: list[_Line]) -> bool:
    """Whether padding costs less than another tile would."""
    needed = sum(line.time * len(line.slots) for line in lines)
    padded = len(lines) * max(line.time for line in lines) * max(len(line.slots) for line in lines)
    return padded <= (1 + SLACK_SHARE) * needed + SLACK_PAIRS * len(lines)


def _tile(lines: list[_Line]) -> Tile:
    first = torch.tensor([line.first for line in lines])
    return Tile(
        _padded([line.slots[line.first :] for line in lines]),
        _padded([line.slots for line in lines]),
        first if first.any() else None,
    )


def _padded(lines: list[list[int]]) -> Int[Tensor, "lines longest"]:
    padded = torch.zeros(len(lines), max(map(len, lines)), dtype=torch.long)
    for into, line in zip(padded, lines, strict=True):
        into[: len(line)] = torch.tensor(line)
    return padded


def _homes(tiles: list[Tile], num_slots: int) -> Int[Tensor, " slots"]:
    home = torch.empty(num_slots, dtype=torch.long)
    place = 0
    for tile in tiles:
        for line in tile.queries:
            # Slot 0 can only be the first of a line, or padding.
            real = line[: 1 + int(line[1:].count_nonzero())]
            # A shared prompt's slots are at home in each of its rows alike: any will do.
            home[real] = torch.arange(place, place + len(real))
            place += len(line)
    return home


class Steps:
    """Row numbers of every optimiser step: each epoch a new permutation, no row left out.

    The last step of an epoch may be smaller than `batch_size`. A step's numbers are made when they
    are asked for; of the permutations only one epoch's is held.
    """

    def __init__(self, num_rows: int, batch_size: int, num_epochs: int, seed: int) -> None:
        self._num_rows, self._batch_size, self._seed = num_rows, batch_size, seed
        self._steps_an_epoch = math.ceil(num_rows / batch_size)
        self._num_steps = num_epochs * self._steps_an_epoch
        self._held: tuple[int, Int[Tensor, " rows"]] | None = None

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> list[int]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        epoch, place = divmod(step, self._steps_an_epoch)
        if self._held is None or self._held[0] != epoch:
            self._held = epoch, self._permutation(epoch)
        start = place * self._batch_size
        return self._held[1][start : start + self._batch_size].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.__getitem__, range(len(self)))

    def _permutation(self, epoch: int) -> Int[Tensor, " rows"]:
        """The generator's state is that after the permutations of the epochs before."""
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(epoch):
            torch.randperm(self._num_rows, generator=generator, dtype=torch.int32)
        return torch.randperm(self._num_rows, generator=generator, dtype=torch.int32)


def micro_batches(
    rows: Iterable[int], lengths: Sequence[int] | Mapping[int, int], token_budget: int
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
