"""Laws of packed rows: they are single unpadded rows, only cheaper, or they are not used."""

import copy
import itertools
import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from prefopt import head
from prefopt.attention import NAME, Special, attend, backend, by_blocks, by_tiles
from prefopt.generation import sample
from prefopt.packing import SLACK_PAIRS, SLACK_SHARE, Row, Tile, packed, slots_of
from prefopt.scoring import (
    batches,
    packs,
    token_logps,
    token_logps_and_collisions,
    token_logps_and_kls,
)
from stages import models

quick = settings(deadline=None, derandomize=True)

VOCAB = 61
WINDOW = 4
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
# Heads whose width is not hidden_size / heads, where the family allows it.
WIDE = SHAPE | {"head_dim": 16}
BY_LAYER = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# Caps low enough to bend these models' scores and logits.
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**WIDE),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**WIDE),
    "mistral": transformers.MistralConfig(**WIDE, sliding_window=WINDOW),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
    ),
    "gemma2": transformers.Gemma2Config(**WIDE, **BY_LAYER, **CAPS, query_pre_attn_scalar=8),
    "gemma3": transformers.Gemma3TextConfig(**WIDE, **BY_LAYER, query_pre_attn_scalar=8),
    "cohere": transformers.CohereConfig(**SHAPE, logit_scale=0.5),
    "granite": transformers.GraniteConfig(
        **SHAPE, logits_scaling=2.0, attention_multiplier=0.4, residual_multiplier=0.7
    ),
    "gpt_oss": transformers.GptOssConfig(
        **WIDE,
        **BY_LAYER,
        num_local_experts=3,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    ),
}
# The fused kernels know neither soft caps nor sinks.
OWN_ATTENTION = {"gemma2": "eager", "gpt_oss": "eager"}


class Twins(NamedTuple):
    """A random model under our attention and under its own, in float64."""

    ours: nn.Module
    plain: nn.Module

    def float(self) -> "Twins":
        return Twins(copy.deepcopy(self.ours).float(), copy.deepcopy(self.plain).float())


class ExactSoftmax(TorchFunctionMode):
    """Hugging Face's eager attention takes its softmax in float32, even of float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.softmax and args[0].dtype == torch.float64:
            kwargs = {**kwargs, "dtype": None}
        return func(*args, **kwargs)


def made(config: PreTrainedConfig, attention: str) -> Any:
    # Grouped kernels for experts know no float64.
    experts = {"experts_implementation": "eager"} if config.model_type == "gpt_oss" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=attention, **experts
        )
        # Biases start at 0 and the norms' weights at 1, where mistakes with them do not show.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval().double()


def twins_of(config: PreTrainedConfig) -> Twins:
    return Twins(made(config, NAME), made(config, OWN_ATTENTION.get(config.model_type, "sdpa")))


@pytest.fixture(scope="module", params=[*CONFIGS])
def twins(request: pytest.FixtureRequest) -> Twins:
    return twins_of(CONFIGS[request.param])


@pytest.fixture(scope="module")
def grouped() -> Twins:
    return twins_of(CONFIGS["llama"])


def shuffled_rows(num_completions: int) -> list[Row]:
    """Of every prompt so many completions, out of order.

    Among the prompts one of one token, and two of which one begins the other; among a prompt's
    completions one of one token, and two that are equal.
    """
    draw = random.Random(num_completions)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(count)]

    long = tokens(11)
    rows: list[Row] = []
    for prompt in ([5], long[:4], long, tokens(17)):
        completions = [tokens(1), *(tokens(draw.randint(2, 14)) for _ in range(num_completions))]
        completions = completions[-num_completions:] if num_completions < 3 else completions[:-1]
        if num_completions > 1:
            completions[-1] = completions[-2]
        rows += [Row(prompt, completion) for completion in completions]
    rows.append(Row([7, 5], [3]))
    draw.shuffle(rows)
    return rows


def plainly(model: Any, row: Row) -> Tensor:
    """Log-probabilities of one unpadded row, from the logits of all its positions."""
    tokens = torch.tensor([*row.prompt, *row.completion])
    with ExactSoftmax():
        logps = model(tokens[None], use_cache=False).logits[0].log_softmax(-1)
    start = len(row.prompt)
    return logps[range(start - 1, len(tokens) - 1), tokens[start:]]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))


def weighted(logps: Sequence[Tensor]) -> Tensor:
    """A sum in which every token has its own weight, of either sign."""
    flat = torch.cat(list(logps))
    return flat @ torch.linspace(-1, 2, len(flat), dtype=flat.dtype).cos()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("num_completions", [1, 2, 4, 8])
def test_packed_rows_have_the_log_probabilities_and_gradients_of_single_unpadded_rows(
    twins: Twins, num_completions: int
) -> None:
    rows = shuffled_rows(num_completions)
    assert packs(twins.ours)
    found = token_logps(twins.ours, rows)
    expected = [plainly(twins.plain, row) for row in rows]
    for logps, alone in zip(found, expected, strict=True):
        assert logps.dtype == torch.float64
        torch.testing.assert_close(logps, alone, rtol=0, atol=1e-10)
    slopes = gradients(twins.ours, weighted(found))
    for name, slope in gradients(twins.plain, weighted(expected)).items():
        assert slope.norm() > 1e-6, name
        assert relative_error(slopes[name], slope) < 1e-6, name


@pytest.mark.parametrize("num_completions", [1, 4])
def test_float32_errs_by_rounding_alone(twins: Twins, num_completions: int) -> None:
    rows = shuffled_rows(num_completions)
    single = twins.float()
    assert packs(single.ours)
    found = token_logps(single.ours, rows)
    expected = [plainly(single.plain, row) for row in rows]
    assert found[0].dtype == torch.float32
    assert relative_error(torch.cat(found), torch.cat(expected)) < 1e-5
    slopes = gradients(single.ours, weighted(found))
    wanted = gradients(single.plain, weighted(expected))
    assert (
        relative_error(
            torch.cat([slopes[name].flatten() for name in wanted]),
            torch.cat([slope.flatten() for slope in wanted.values()]),
        )
        < 1e-5
    )


def test_the_company_of_a_row_changes_nothing(twins: Twins) -> None:
    rows = shuffled_rows(4)
    with torch.no_grad():
        together = token_logps(twins.ours, rows)
        backwards = token_logps(twins.ours, rows[::-1])[::-1]
        in_pairs = [
            logps
            for i in range(0, len(rows), 2)
            for logps in token_logps(twins.ours, rows[i : i + 2])
        ]
        for i, row in enumerate(rows):
            (alone,) = token_logps(twins.ours, [row])
            for beside in (together[i], backwards[i], in_pairs[i]):
                torch.testing.assert_close(beside, alone, rtol=0, atol=1e-12)


def test_the_model_runs_over_one_row_in_which_every_prompt_lies_once(grouped: Twins) -> None:
    rows = shuffled_rows(8)
    assert packs(grouped.ours)
    seen: list[tuple[int, ...]] = []
    decoder: Any = grouped.ours.get_decoder()
    hook = decoder.embed_tokens.register_forward_pre_hook(
        lambda _, inputs: seen.append(tuple(inputs[0].shape))
    )
    with torch.no_grad():
        token_logps(grouped.ours, rows)
    hook.remove()
    assert seen == [(1, slots_of(rows))]
    assert slots_of(rows) < 0.6 * sum(map(len, rows))


def test_packed_collisions_and_divergences_are_those_of_unpadded_rows(grouped: Twins) -> None:
    rows = shuffled_rows(3)
    changed = copy.deepcopy(CONFIGS["llama"])
    changed.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
    reference = twins_of(changed)
    with torch.no_grad():
        _, collisions = token_logps_and_collisions(grouped.ours, rows)
        logps, kls = token_logps_and_kls(grouped.ours, reference.ours, rows)
        for i, row in enumerate(rows):
            tokens = torch.tensor([[*row.prompt, *row.completion]])
            own, other = (
                model(tokens, use_cache=False).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
                for model in (grouped.plain, reference.plain)
            )
            exact = {"rtol": 0, "atol": 1e-10}
            torch.testing.assert_close(collisions[i], own.exp().square().sum(-1).log(), **exact)
            torch.testing.assert_close(kls[i], (other.exp() * (other - own)).sum(-1), **exact)
            torch.testing.assert_close(logps[i], plainly(grouped.plain, row), **exact)


@pytest.mark.filterwarnings("ignore:.* decodes rows of one prompt length together")
def test_generation_draws_the_same_tokens_under_either_attention(twins: Twins) -> None:
    draw = random.Random(0)
    # Some longer than the window before they begin, others only after.
    prompts = [[draw.randrange(VOCAB) for _ in range(n)] for n in (1, 2, 9, 9, 9, 14)]
    drawn = [
        sample(
            model,
            prompts,
            range(len(prompts)),
            max_new_tokens=9,
            temperature=1.0,
            eos=1,
            batch_size=2,
            progress=lambda _: None,
        )
        for model in twins
    ]
    assert drawn[0] == drawn[1]
    assert max(map(len, drawn[0])) == 9


UNSAFE = {
    # Keeps a state; no layer attends.
    "mamba": (
        transformers.MambaConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, initializer_range=0.3
        ),
        "0 of 2 layers attend by them",
    ),
    # Its positions are slopes in a mask of its own, which restarting positions do not reach.
    "bloom": (
        transformers.BloomConfig(
            vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3
        ),
        "0 of 2 layers attend by them",
    ),
    # One layer attends, and the convolution of the other reaches over into neighbours.
    "hybrid": (
        transformers.Lfm2Config(
            **SHAPE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
        ),
        "1 of 2 layers attend by them",
    ),
}


@pytest.mark.parametrize("family", UNSAFE)
def test_a_model_that_cannot_be_packed_is_refused_with_the_reason(family: str) -> None:
    config, reason = UNSAFE[family]
    policy = made(config, NAME)
    with pytest.warns(UserWarning, match=f"cannot be given packed rows: {reason}, scores differ"):
        assert not packs(policy)
    # Once said is enough: warnings are errors here.
    assert not packs(policy)


@pytest.mark.parametrize(
    "family",
    [
        "mamba",
        "bloom",
        "hybrid",
    ],
)
def test_a_model_that_cannot_be_packed_scores_as_well_in_padded_rows(family: str) -> None:
    config, _ = UNSAFE[family]
    rows = shuffled_rows(2)
    policy = made(config, "eager")
    with torch.no_grad(), ExactSoftmax():
        expected = [plainly(policy, row) for row in rows]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            models.with_engine(policy)
        assert policy.config._attn_implementation != NAME
        for logps, alone in zip(token_logps(policy, rows), expected, strict=True):
            torch.testing.assert_close(logps, alone, rtol=0, atol=1e-10)
    for batch in batches(policy, range(len(rows)), lambda i: [rows[i]], 60):
        assert len(batch) * max(len(rows[i]) for i in batch) <= 60


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the attention function that models find under our name."""
    registry = AttentionInterface._global_mapping
    assert registry[NAME] is attend
    return lambda function: monkeypatch.setitem(registry, NAME, function)


def test_restarting_positions_need_our_attention() -> None:
    """Hugging Face takes every completion for a document of its own, and says nothing."""
    plain, rows = made(CONFIGS["llama"], "sdpa"), shuffled_rows(4)
    layout = packed(rows)
    with torch.no_grad():
        logits = plain(layout.tokens[None], position_ids=layout.positions[None], use_cache=False)
        logps = logits.logits[0].log_softmax(-1)[layout.predictors, layout.targets]
        expected = torch.cat([plainly(plain, row) for row in rows])
    assert (logps - expected).abs().max() > 1


def test_an_attention_that_ignores_the_layout_is_found_out(attention: Any) -> None:
    def deaf(*arguments: Any, layout: Any = None, **options: Any) -> Any:
        if layout is not None:
            layout.calls += 1
        return attend(*arguments, **options)

    attention(deaf)
    policy, rows = made(CONFIGS["llama"], NAME), shuffled_rows(2)
    with pytest.warns(UserWarning, match=r"2 of 2 layers attend by them, scores differ by"):
        assert not packs(policy)
    with torch.no_grad():
        for row, logps in zip(rows, token_logps(policy, rows), strict=True):
            torch.testing.assert_close(logps, plainly(policy, row), rtol=0, atol=1e-10)


def test_an_attention_that_gives_no_number_is_found_out(attention: Any) -> None:
    def broken(*arguments: Any, layout: Any = None, **options: Any) -> Any:
        output, weights = attend(*arguments, layout=layout, **options)
        return output if layout is None else output * torch.nan, weights

    attention(broken)
    with pytest.warns(UserWarning, match=r"scores differ by nan"):
        assert not packs(made(CONFIGS["llama"], NAME))


def test_an_attention_that_refuses_the_layout_is_reported_with_its_reason(attention: Any) -> None:
    def strict(*arguments: Any, layout: Any = None, **options: Any) -> Any:
        if layout is not None:
            raise TypeError("what layout?")
        return attend(*arguments, **options)

    attention(strict)
    with pytest.warns(UserWarning, match=r"it refuses them \(what layout\?\)"):
        assert not packs(made(CONFIGS["llama"], NAME))


def test_a_policy_is_packed_only_while_it_attends_by_our_function() -> None:
    policy, rows = made(CONFIGS["llama"], "sdpa"), shuffled_rows(2)
    with torch.no_grad():
        expected = [plainly(policy, row) for row in rows]
        for implementation in ("sdpa", NAME, "sdpa", NAME):
            policy.set_attn_implementation(implementation)
            assert packs(policy) == (implementation == NAME)
            for logps, alone in zip(token_logps(policy, rows), expected, strict=True):
                torch.testing.assert_close(logps, alone, rtol=0, atol=1e-10)


def test_attention_dropout_is_refused() -> None:
    query = torch.zeros(1, 2, 3, 4)
    with pytest.raises(AssertionError, match="dropout is on"):
        attend(nn.Module(), query, query, query, None, dropout=0.1)


@pytest.mark.parametrize("time", [1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 4])
def test_keys_of_a_cache_are_older_than_the_first_query(
    time: int, softcap: float | None, window: int | None
) -> None:
    """The last queries of a causal row, given alone with all keys, are those of the whole row."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 9, 5, generator=draw, dtype=torch.float64) for heads in (4, 2, 2)
    )
    special = {"softcap": softcap, "sliding_window": window}
    whole, _ = attend(nn.Module(), query, key, value, None, **special)
    last, _ = attend(nn.Module(), query[:, :, -time:], key, value, None, **special)
    torch.testing.assert_close(last, whole[:, -time:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_completions", [1, 2, 4])
@pytest.mark.parametrize(
    "special",
    [
        Special(),
        Special(window=WINDOW),
        Special(softcap=2.0),
        Special(scaling=0.7, window=WINDOW, softcap=2.0),
    ],
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_attend_as_tiles_do(special: Special, num_completions: int) -> None:
    """The mathematics of what CUDA compiles; a CPU runs it as it is written."""
    layout = packed(shuffled_rows(num_completions))
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, len(layout.tokens), width, generator=draw)
        for heads, width in ((4, 16), (2, 16), (2, 24))
    )
    found = by_blocks(query, key, value, layout, special, flex_attention)
    for_each = [x.repeat_interleave(2, 1) for x in (key, value)]
    expected = by_tiles(query, *for_each, layout, special)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    mask = layout.masks[special.window]
    again = by_blocks(query, key, value, layout, special, flex_attention)
    assert layout.masks[special.window] is mask
    assert torch.equal(again, found)


def test_packed_rows_are_read_by_blocks_on_cuda_alone() -> None:
    assert [backend(torch.device(name)) for name in ("cpu", "mps", "cuda")] == [
        "tiles",
        "tiles",
        "blocks",
    ]


def test_a_saved_policy_packs_when_loaded_and_its_files_do_not_name_our_attention(
    base: Path,
) -> None:
    policy = models.load_policy(str(base))
    assert packs(policy)
    rows = [Row([5, 6, 7], [8]), Row([5, 6, 7], [9, 10, 11])]
    with torch.no_grad():
        for row, logps in zip(rows, token_logps(policy, rows), strict=True):
            torch.testing.assert_close(logps, plainly(llama(), row), rtol=0, atol=1e-5)
    models.save(policy, models.load_tokenizer(str(base)), Path("saved"))
    for file in Path("saved").glob("*.json"):
        assert NAME not in json.dumps(json.loads(file.read_text())), file
    assert AutoModelForCausalLM.from_pretrained("saved").config._attn_implementation == "sdpa"
    assert packs(models.load_policy("saved"))


Pairs = list[tuple[list[int], list[int]]]
# Few tokens, so that prompts are often equal or begin one another, and completions are equal.
TOKENS = st.lists(st.integers(3, 4), min_size=1, max_size=30)
PROMPTS = st.one_of(st.sampled_from([[3], [3, 4], [3, 4, 3]]), TOKENS)
# Rows are made in the tests: beartype draws at random, which strategies may not.
PAIRS = st.lists(st.tuples(PROMPTS, TOKENS), min_size=1, max_size=12)


def rows_of(pairs: Pairs) -> list[Row]:
    return [Row(*pair) for pair in pairs]


class Line(NamedTuple):
    """Slots of a tile's line without the padding, and which of them look."""

    keys: list[int]
    queries: list[int]


def lines_of(tile: Tile) -> list[Line]:
    """Slot 0 is padding unless it comes first."""
    return [
        Line(*([line[0], *(slot for slot in line[1:] if slot)] for line in pair))
        for pair in zip(tile.keys.tolist(), tile.queries.tolist(), strict=True)
    ]


def lines(rows: Sequence[Row]) -> list[Line]:
    return [line for tile in packed(rows).tiles for line in lines_of(tile)]


@quick
@given(PAIRS)
def test_slots_are_distinct_prompts_and_all_but_the_last_token_of_completions(
    pairs: Pairs,
) -> None:
    rows = rows_of(pairs)
    layout = packed(rows)
    prompts = {tuple(row.prompt) for row in rows}
    expected = sum(map(len, prompts)) + sum(len(row.completion) - 1 for row in rows)
    assert len(layout.tokens) == len(layout.positions) == len(layout.home) == expected
    assert slots_of(rows) == expected
    assert slots_of(iter(rows)) == expected


@quick
@given(PAIRS)
def test_the_lines_of_the_tiles_are_rows_whose_ends_look(pairs: Pairs) -> None:
    rows = rows_of(pairs)
    layout = packed(rows)
    wanted = sorted((*row.prompt, *row.completion[:-1]) for row in rows)
    for tile in layout.tiles:
        first = [0] * len(tile.keys) if tile.first is None else tile.first.tolist()
        for line, place in zip(lines_of(tile), first, strict=True):
            assert line.queries == line.keys[place:]
            assert layout.positions[line.keys].tolist() == list(range(len(line.keys)))
            # No row's line is there more often than the row is.
            wanted.remove(tuple(layout.tokens[line.keys].tolist()))
    # Rows without a line are prompts alone, which others of theirs begin with.
    read = {tuple(layout.tokens[line.queries].tolist()) for line in lines(rows)}
    for row in wanted:
        assert any(line[: len(row)] == row for line in read)


def test_short_completions_of_a_long_prompt_attend_without_computing_it_again() -> None:
    prompt = list(range(3, 43))
    short, long, longest = (Row(prompt, [3] * count) for count in (8, 45, 60))
    first, second = sorted(lines([short, short]), key=lambda line: len(line.queries))
    assert (len(first.queries), len(second.queries)) == (7, 47)
    # As long as its prompt, a causal row is cheaper than a rectangle under a mask.
    assert sorted(len(line.queries) for line in lines([longest, short, long])) == [7, 84, 99]


@quick
@given(PAIRS)
def test_every_slot_is_at_home_in_one_place_and_every_place_holds_a_slot(pairs: Pairs) -> None:
    rows = rows_of(pairs)
    layout = packed(rows)
    places = torch.cat([tile.queries.flatten() for tile in layout.tiles])
    assert places[layout.home].tolist() == list(range(len(layout.tokens)))
    # And that place is within a line, not its padding, which sees what it should not.
    seen = torch.cat([_positions_seen(tile).flatten() for tile in layout.tiles])
    assert seen[layout.home].tolist() == layout.positions.tolist()


def _positions_seen(tile: Tile) -> Tensor:
    """The place among its line's keys of every query, padding included."""
    columns = torch.arange(tile.queries.shape[1]).expand(tile.queries.shape)
    return columns if tile.first is None else columns + tile.first[:, None]


@quick
@given(PAIRS)
def test_targets_and_their_predictors_lie_in_the_order_of_rows(pairs: Pairs) -> None:
    rows = rows_of(pairs)
    layout = packed(rows)
    assert layout.lengths == [len(row.completion) for row in rows]
    own: list[int] = []
    for row, span in zip(rows, layout.spans(), strict=True):
        assert layout.targets[span].tolist() == list(row.completion)
        before, *fed = layout.predictors[span].tolist()
        assert layout.positions[[before, *fed]].tolist() == list(
            range(len(row.prompt) - 1, len(row) - 1)
        )
        assert layout.tokens[fed].tolist() == list(row.completion[:-1])
        # The prompt's slots lie together and end with the first predictor.
        trunk = range(before + 1 - len(row.prompt), before + 1)
        assert layout.tokens[list(trunk)].tolist() == list(row.prompt)
        # Some line shows a completion its own prompt and itself, if it has slots at all.
        assert not fed or any(line.keys == [*trunk, *fed] for line in lines(rows))
        own += fed
    assert len(set(own)) == len(own)


@quick
@given(PAIRS)
def test_no_tile_is_padded_beyond_the_slack(pairs: Pairs) -> None:
    for tile in packed(rows_of(pairs)).tiles:
        inside = lines_of(tile)
        assert tile.queries.shape[1] == max(len(line.queries) for line in inside)
        assert tile.keys.shape[1] == max(len(line.keys) for line in inside)
        needed = sum(len(line.queries) * len(line.keys) for line in inside)
        padded = tile.queries.numel() * tile.keys.shape[1]
        assert padded <= (1 + SLACK_SHARE) * needed + SLACK_PAIRS * len(inside)


EXAMPLES = st.lists(st.lists(st.tuples(PROMPTS, TOKENS), min_size=1, max_size=3), max_size=12)


@quick
@given(EXAMPLES, st.integers(1, 150), st.randoms())
def test_packed_batches_keep_the_order_and_the_budget(
    grouped: Twins, groups: list[Pairs], budget: int, draw: random.Random
) -> None:
    examples = [rows_of(pairs) for pairs in groups]
    assert packs(grouped.ours)
    numbers = list(range(len(examples)))
    draw.shuffle(numbers)
    cuts = batches(grouped.ours, numbers, lambda i: examples[i], budget)
    assert [number for cut in cuts for number in cut] == numbers
    slots = [slots_of(rows) for rows in examples]
    for cut in cuts:
        together = slots_of(row for i in cut for row in examples[i])
        assert (together <= budget) or len(cut) == 1
        if any(slots[i] > budget for i in cut):
            assert len(cut) == 1
    for cut, following in itertools.pairwise(cuts):
        # No batch is left with room for the next example.
        assert sum(slots[i] for i in cut) + slots[following[0]] > budget


POSITIONS, WIDTH = 13, 7


def head_inputs(
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias, all of which want gradients, and targets."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw, dtype=dtype).requires_grad_()
        for shape in ((POSITIONS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    )
    # Some of them twice.
    targets = torch.randint(0, 9, (POSITIONS,), generator=draw)
    return hidden, weight, bias, targets


# No piece of one row fits; one row; three and a shorter last piece; all but one; all at once.
LARGEST = [1, VOCAB, 3 * VOCAB + 5, (POSITIONS - 1) * VOCAB, POSITIONS * VOCAB]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("largest", LARGEST)
def test_the_head_in_pieces_is_the_head(
    largest: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = head_inputs()
    wanted = [hidden, weight, *([bias] if with_bias else [])]
    logits = hidden @ weight.T + (bias if with_bias else 0)
    expected = logits.log_softmax(-1)[range(POSITIONS), targets]
    monkeypatch.setattr(head, "LARGEST", largest)
    found = head.target_logps(hidden, weight, bias if with_bias else None, targets, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    slopes = torch.autograd.grad(weighted([found]), wanted)
    for slope, exact in zip(slopes, torch.autograd.grad(weighted([expected]), wanted), strict=True):
        torch.testing.assert_close(slope, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("largest", LARGEST)
def test_the_heads_gradient_is_that_of_finite_differences(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LARGEST", largest)
    hidden, weight, bias, targets = head_inputs()
    assert torch.autograd.gradcheck(
        lambda *inputs: head.target_logps(*inputs, targets, torch.float32), (hidden, weight, bias)
    )


def test_a_frozen_head_passes_the_gradient_on(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = head_inputs()
    weight, bias = weight.detach(), bias.detach()
    slopes: list[Tensor] = []
    for largest in (VOCAB, POSITIONS * VOCAB):
        monkeypatch.setattr(head, "LARGEST", largest)
        found = head.target_logps(hidden, weight, bias, targets, torch.float32)
        slopes += torch.autograd.grad(weighted([found]), hidden)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("largest", LARGEST)
def test_bfloat16_products_in_pieces_round_as_the_whole_does(
    largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = head_inputs(torch.float32)
    wanted = [hidden, weight, bias]
    exact = head.target_logps(hidden, weight, bias, targets, torch.float32)
    whole = head.target_logps(hidden, weight, bias, targets, torch.bfloat16)
    monkeypatch.setattr(head, "LARGEST", largest)
    pieces = head.target_logps(hidden, weight, bias, targets, torch.bfloat16)
    assert exact.dtype == whole.dtype == pieces.dtype == torch.float32
    assert not torch.equal(pieces, exact)
    unit = 2.0**-8  # of rounding to bfloat16
    assert relative_error(pieces, exact) < unit
    assert relative_error(pieces, whole) < unit
    for name, rough in {"pieces": pieces, "whole": whole}.items():
        slopes = torch.autograd.grad(weighted([rough]), wanted)
        exacts = torch.autograd.grad(weighted([exact]), wanted, retain_graph=True)
        for slope, other in zip(slopes, exacts, strict=True):
            assert slope.dtype == torch.float32
            assert relative_error(slope, other) < 2 * unit, name


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in returned if isinstance(returned, tuple | list) else [returned]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return returned


def largest_tensor(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> int:
    with LargestTensor() as seen:
        head.target_logps(hidden, weight, bias, targets, torch.float32).sum().backward()
    return seen.numel


@pytest.mark.parametrize("times", [1, 10, 100])
@pytest.mark.parametrize("largest", [1, VOCAB, 3 * VOCAB + 5, 12 * VOCAB])
def test_logits_never_take_more_than_their_share_of_memory(
    times: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = head_inputs()
    hidden, targets = hidden.detach().repeat(times, 1).requires_grad_(), targets.repeat(times)
    assert largest_tensor(hidden, weight, bias, targets) == hidden.shape[0] * VOCAB
    monkeypatch.setattr(head, "LARGEST", largest)
    found = largest_tensor(hidden, weight, bias, targets)
    assert found <= max(largest, hidden.numel(), weight.numel())


def test_a_packed_policys_logits_come_in_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its hidden states to its log-probabilities, and back."""
    rows = shuffled_rows(8)
    policy = twins_of(transformers.LlamaConfig(**(SHAPE | {"vocab_size": 2000}))).ours
    assert packs(policy)
    expected = gradients(policy, weighted(token_logps(policy, rows)))
    monkeypatch.setattr(head, "LARGEST", 6000)
    with LargestTensor() as seen:
        found = gradients(policy, weighted(token_logps(policy, rows)))
    # Its largest parameters, the embedding and the head.
    assert seen.numel == 2000 * SHAPE["hidden_size"]
    for name, slope in expected.items():
        assert relative_error(found[name], slope) < 1e-6, name
