"""Keys and values of rows that are being decoded: one lane a row, all lanes allocated once.

A lane is as long as the longest row may become, and rows in neighbouring lanes may be of any
length. Layers are known by the order in which they attend.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LayerKeys = Float[Tensor, "kv_heads tokens width"]
LayerValues = Float[Tensor, "kv_heads tokens value_width"]


class Cache:
    """Lanes 0, 1, ... of which a step uses the first so many.

    Args:
        num_lanes: rows at a time.
        length: tokens that a lane has room for.
    """

    def __init__(self, num_lanes: int, length: int) -> None:
        self.num_lanes, self.length = num_lanes, length
        self.calls = 0
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._ages = torch.empty(0)
        self._visible: dict[int | None, Bool[Tensor, "lanes 1 1 keys"]] = {}

    def enter(self, lane: int, prefix: Sequence[tuple[LayerKeys, LayerValues]]) -> None:
        """Give a lane to a row whose first tokens have been computed, layer by layer."""
        for number, (keys, values) in enumerate(prefix):
            held_keys, held_values = self._layer(number, keys, values)
            held_keys[lane, :, : keys.shape[1]] = keys
            held_values[lane, :, : values.shape[1]] = values

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copy the first tokens of one lane into another."""
        for held in self._layers:
            for tensor in held:
                tensor[target, :, :tokens] = tensor[source, :, :tokens]

    def start(self, positions: Sequence[int], device: torch.device) -> Tensor:
        """Begin a step in which each lane's next token has this position, and say them."""
        on_device = torch.tensor(positions, device=device)
        keys = torch.arange(max(positions) + 1, device=device)
        self._positions = on_device
        self._ages = on_device[:, None] - keys
        self._visible = {}
        self.calls = 0
        return on_device

    def extended(
        self,
        key: Float[Tensor, "lanes kv_heads 1 width"],
        value: Float[Tensor, "lanes kv_heads 1 value_width"],
    ) -> tuple[Float[Tensor, "lanes kv_heads keys width"], Tensor]:
        """Keep a layer's keys and values of this step; returns all that its lanes hold."""
        held = self._layer(self.calls, key[0], value[0])
        self.calls += 1
        lanes, longest = self._ages.shape
        for tensor, new in zip(held, (key, value), strict=True):
            tensor[torch.arange(lanes, device=key.device), :, self._positions] = new[:, :, 0]
        keys, values = (tensor[:lanes, :, :longest] for tensor in held)
        return keys, values

    def visible(self, window: int | None) -> Bool[Tensor, "lanes 1 1 keys"]:
        """Which keys this step's queries see, of a sliding window too."""
        if window not in self._visible:
            seen = self._ages >= 0
            if window is not None:
                seen &= self._ages < window
            self._visible[window] = seen[:, None, None]
        return self._visible[window]

    def _layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if number == len(self._layers):
            # Zeros, because what no query sees still meets a weight of zero.
            keys, values = (
                like.new_zeros(self.num_lanes, like.shape[0], self.length, like.shape[2])
                for like in (key, value)
            )
            self._layers.append((keys, values))
        return self._layers[number]
