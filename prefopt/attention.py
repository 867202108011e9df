"""Attention over packed rows: every completion sees its own prompt and itself, and nobody else.

`attend` has the signature of Hugging Face's attention functions and is registered there by the
caller. A forward pass that is given a `layout` (`prefopt.packing.Layout`) runs over one packed row;
one that is given a `cache` (`prefopt.cache.Cache`) adds a token to every row that is being decoded;
without either it is plain causal attention, for padded rows and for the models' own caches.

A packed row is read in one of two ways, which `backend` names:

- "tiles": its lines are gathered and go through the fused kernels, or are written out where a
  family caps scores or has sinks. On every device; what is tested and measured.
- "blocks": FlexAttention over the whole row under a block mask, on CUDA, where gathering would cost
  more than it saves. Its mathematics are tested against the tiles on a CPU, uncompiled and without
  gradients; compiled, and on a GPU, it has not been run. It knows neither sinks nor float64 nor
  heads narrower than 16, which go by tiles.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from prefopt.cache import Cache
from prefopt.packing import Layout

NAME = "prefopt"
NARROWEST_HEAD = 16  # of FlexAttention

Queries = Float[Tensor, "batch heads time width"]
Keys = Float[Tensor, "batch heads keys width"]
Values = Float[Tensor, "batch heads keys value_width"]


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads time width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    value: Float[Tensor, "batch kv_heads keys value_width"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    layout: Layout | None = None,
    record: list[tuple[Tensor, Tensor]] | None = None,
    cache: Cache | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch time heads value_width"], None]:
    """One layer's attention; see the module.

    Args:
        module: the layer; only its place in the model is used, to count calls.
        query: one head a query head.
        key: one head a group of query heads.
        value: likewise.
        attention_mask: what the model made of a mask, for rows that are not packed.
        scaling: of the scores; 1/sqrt(width) by default.
        dropout: must be off, or log-ratios would not be zero at step 0.
        sliding_window: positions that a query looks back, itself included.
        softcap: scores are softcap * tanh(scores/softcap).
        s_aux: one sink logit a head, which takes attention and gives nothing.
        layout: of the packed row, of which there is one in the batch.
        record: takes the packed row's keys and values, layer by layer.
        cache: of rows of which each has one token in the batch.
    """
    assert dropout == 0.0, "attention dropout is on; put the policy into eval mode"
    special = Special(scaling, sliding_window, softcap, s_aux)
    if cache is not None:
        return _decoded(query, *cache.extended(key, value), cache.visible(sliding_window), special)
    if record is not None:
        record.append((key[0], value[0]))
    if layout is not None:
        layout.calls += 1
        if backend(query.device) == "blocks" and _fits_blocks(query, value, special):
            return by_blocks(query, key, value, layout, special, _compiled()), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if layout is not None:
        return by_tiles(query, key, value, layout, special), None
    output = _rows(query, key, value, attention_mask, special)
    return output.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Special:
    """What some families add to plain attention; `attend` says what each is."""

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def backend(device: torch.device) -> str:
    """How packed rows are read on a device, but for what only tiles can do."""
    return "blocks" if device.type == "cuda" else "tiles"


def by_tiles(
    query: Float[Tensor, "1 heads slots width"],
    key: Float[Tensor, "1 heads slots width"],
    value: Float[Tensor, "1 heads slots value_width"],
    layout: Layout,
    special: Special,
) -> Float[Tensor, "1 slots heads value_width"]:
    """Tile by tile, each a batch of lines gathered from the packed row."""
    # By slots, whose numbers lie together in memory.
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    parts = [
        _rows(
            _gathered(query, tile.queries),
            _gathered(key, tile.keys),
            _gathered(value, tile.keys),
            None,
            special,
            tile.first,
        )
        .transpose(1, 2)
        .flatten(0, 1)
        for tile in layout.tiles
    ]
    # Every slot is taken from the one place in the tiles that is its own.
    return torch.cat(parts).index_select(0, layout.home)[None]


def by_blocks(
    query: Float[Tensor, "1 heads slots width"],
    key: Float[Tensor, "1 kv_heads slots width"],
    value: Float[Tensor, "1 kv_heads slots value_width"],
    layout: Layout,
    special: Special,
    kernel: Callable[..., Any],
) -> Float[Tensor, "1 slots heads value_width"]:
    """As `by_tiles`; all layers of one window share a block mask, which stays with the layout.

    Args:
        query: one head a query head.
        key: one head a group of query heads.
        value: likewise.
        layout: of the packed row.
        special: without sinks.
        kernel: `flex_attention`, compiled or not.
    """
    window, cap = special.window, special.softcap
    if window not in layout.masks:
        slots = len(layout.tokens)
        reach = slots if window is None else window
        places, branches, trunks = layout.positions, layout.branches, layout.trunks
        layout.masks[window] = create_block_mask(
            lambda _row, _head, looking, seen: (
                ((branches[seen] == branches[looking]) | (branches[seen] == trunks[looking]))
                & (places[seen] <= places[looking])
                & (places[looking] - places[seen] < reach)
            ),
            None,
            None,
            slots,
            slots,
            query.device,
        )
    output = kernel(
        query,
        key,
        value,
        score_mod=None
        if cap is None
        else lambda score, _row, _head, _looking, _seen: cap * torch.tanh(score / cap),
        block_mask=layout.masks[window],
        scale=special.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """For all lengths at once; otherwise every new one would be compiled anew."""
    return torch.compile(flex_attention, dynamic=True)


def _fits_blocks(query: Tensor, value: Tensor, special: Special) -> bool:
    return (
        special.sinks is None
        and query.dtype != torch.float64
        and min(query.shape[3], value.shape[3]) >= NARROWEST_HEAD
    )


def _decoded(
    query: Float[Tensor, "lanes heads 1 width"],
    key: Float[Tensor, "lanes kv_heads keys width"],
    value: Float[Tensor, "lanes kv_heads keys value_width"],
    visible: Tensor,
    special: Special,
) -> tuple[Float[Tensor, "lanes 1 heads value_width"], None]:
    """One query a lane; those that share keys lie in the place of time, so no key is copied."""
    lanes, heads, _, width = query.shape
    grouped = query.reshape(lanes, key.shape[1], -1, width)
    output = _rows(grouped, key, value, visible, special)
    return output.reshape(lanes, 1, heads, -1), None


def _gathered(
    x: Float[Tensor, "slots heads width"], slots: Int[Tensor, "lines time"]
) -> Float[Tensor, "lines heads time width"]:
    """Lines of slots out of the packed row, as a batch of their own."""
    return x.index_select(0, slots.flatten()).unflatten(0, slots.shape).transpose(1, 2)


def _rows(
    query: Queries,
    key: Keys,
    value: Values,
    mask: Tensor | None,
    special: Special,
    first: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch heads time value_width"]:
    """Causal attention within each row of a batch; keys may be older than the first query.

    `first` are the first queries' places among the keys; the last query has the last key without.
    """
    time, keys = query.shape[2], key.shape[2]
    if mask is not None:
        allowed = mask[..., :keys]
    else:
        allowed = _allowed(time, keys, first, special.window, query.device)
    if special.softcap is not None or special.sinks is not None:
        return _written_out(query, key, value, allowed, special)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        is_causal=allowed is None and time > 1,
        scale=special.scaling,
    )


def _allowed(
    time: int, keys: int, first: Tensor | None, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys a query sees; None where plain causality says it."""
    if first is None and not (1 < time < keys or (window is not None and window < keys)):
        return None
    if first is None:
        first = torch.tensor([keys - time], device=device)
    # Padding beyond the keys looks from the last of them: who sees nothing gives no number.
    places = (first[:, None] + torch.arange(time, device=device)).clamp(max=keys - 1)
    ages = places[:, None, :, None] - torch.arange(keys, device=device)
    return (ages >= 0) & (ages < (keys if window is None else window))


def _written_out(
    query: Queries, key: Keys, value: Values, allowed: Tensor | None, special: Special
) -> Float[Tensor, "batch heads time value_width"]:
    """As the fused kernels, with soft-capped scores and sinks."""
    scale = query.shape[-1] ** -0.5 if special.scaling is None else special.scaling
    scores = scale * query @ key.transpose(-1, -2)
    if special.softcap is not None:
        scores = special.softcap * torch.tanh(scores / special.softcap)
    time, keys = scores.shape[-2:]
    if allowed is None:
        allowed = torch.ones(time, keys, dtype=torch.bool, device=query.device).tril(keys - time)
    if allowed.dtype == torch.bool:
        scores = scores.masked_fill(~allowed, -torch.inf)
    else:
        scores = scores + allowed
    if special.sinks is not None:
        # While decoding, queries that share keys lie in the place of time.
        sinks = special.sinks.view(1, scores.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks.to(scores.dtype)], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights @ value
