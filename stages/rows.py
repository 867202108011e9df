"""Completions of prompts as the engine reads them, from tables that are mapped and not held."""

from collections.abc import Iterator

from prefopt.packing import Row
from stages.artefacts import Column


class Rows:
    """Rows of a table by number, each made when it is asked for."""

    def __init__(self, prompts: Column, completions: Column) -> None:
        self.prompts, self.completions = prompts, completions

    def __len__(self) -> int:
        return len(self.completions)

    def __getitem__(self, row: int) -> Row:
        return Row(self.prompts[row], self.completions[row])

    def __iter__(self) -> Iterator[Row]:
        return self.following(0)

    def following(self, first: int) -> Iterator[Row]:
        """Rows from this one on."""
        return map(self.__getitem__, range(first, len(self)))
