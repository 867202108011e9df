"""Laws of what is refused and kept before any training: bad models, bad data, splits, tokens."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, byte_tokenizer, llama, write_jsonl

from stages import models, prepare
from stages.artefacts import CHECKED, LISTS, LISTS_SCHEMA, PROMPTS, PROMPTS_SCHEMA, read_table

Write = Callable[..., dict[str, Any]]
GOOD = [{"prompt": f"prompt {i}", "completion": f" and completion {i}"} for i in range(20)]


def refused(match: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(match))


@pytest.fixture
def prepared(base: Path, write_params: Write) -> Callable[..., dict[str, list[Any]]]:
    """Run prepare's main on rows (or on the text of a file), with a tiny model of 64 positions."""

    def run(rows: list[dict[str, Any]] | str, **changes: Any) -> dict[str, list[Any]]:
        CHECKED.parent.mkdir(exist_ok=True)
        CHECKED.touch()
        if isinstance(rows, str):
            Path("data.jsonl").write_text(rows)
        else:
            write_jsonl(Path("data.jsonl"), rows)
        defaults = {
            "data.source": "data.jsonl",
            "revision.template": str(PROJECT / "recipes/templates/revision.txt"),
            "data.num_train": None,
            "data.num_validation": 3,
            "data.num_test": 4,
            "data.max_completion_tokens": 24,
        }
        write_params(**defaults | changes)
        prepare.main()
        return read_table(PROMPTS, PROMPTS_SCHEMA)

    return run


# Models


def test_a_sound_model_is_accepted(base: Path) -> None:
    models.check(str(base))


def test_a_missing_model_is_refused(base: Path) -> None:
    with refused("base: 'data/nothing' is no model directory, got no config.json there; name a"):
        models.check("data/nothing")


def test_a_model_without_weights_is_refused(base: Path) -> None:
    (base / "model.safetensors").unlink()
    with refused("base: 'data/base' has no *.safetensors, got none; restore the file"):
        models.check(str(base))


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights_are_refused(base: Path, length: int) -> None:
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with refused("data/base/model.safetensors: damaged weights, got "):
        models.check(str(base))


def test_a_tokenizer_larger_than_the_embeddings_is_refused(base: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["one-too-many"])
    tokenizer.save_pretrained(base)
    with refused("got 260 tokens for 259 embeddings; take the "):
        models.check(str(base))


def test_a_tokenizer_without_an_end_of_sequence_is_refused(base: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(base)
    with refused("base: 'data/base' has no end-of-sequence token, got none; set eos_token"):
        models.check(str(base))


def test_a_saved_policy_is_loaded_as_it_was(base: Path) -> None:
    policy, original = models.load_policy(str(base)), llama()
    assert not policy.training
    for p, q in zip(policy.parameters(), original.parameters(), strict=True):
        assert (p.cpu() == q).all()


def test_only_the_top_layers_and_the_norm_are_trained_when_asked() -> None:
    policy = llama()
    models.train_only_top(policy, 1)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith(("model.layers.1.", "model.norm.")) for name in trained)
    with refused("top_layers: more than the model has, got 3; at most 2"):
        models.train_only_top(policy, 3)


# Data


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", ', "data.jsonl:3: not JSON, got "),
        ("", "data.jsonl:3: not JSON, got "),
        ("5", "data.jsonl:3: not a JSON object, got '5"),
        ('["completion"]', "data.jsonl:3: not a JSON object"),
        ('{"prompt": "a"}', "data.jsonl:3: other fields than expected, got ['prompt']"),
        (
            '{"prompt": "a", "completion": "b", "extra": 1}',
            "data.jsonl:3: other fields than expected, got ['completion', 'extra', 'prompt']",
        ),
        ('{"prompt": "", "completion": "b"}', "data.jsonl:3: empty prompt, got ''"),
        ('{"prompt": " ", "completion": "b"}', "data.jsonl:3: empty prompt, got ' '"),
        ('{"prompt": "a", "completion": ""}', "data.jsonl:3: empty completion, got ''"),
        ('{"prompt": "a", "completion": null}', "data.jsonl:3: empty completion, got None"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}', "data.jsonl:3: empty rejected, got ''"),
        (
            '{"prompt": "a", "chosen": "b", "rejected": "b"}',
            "data.jsonl:3: chosen and rejected are identical, got 'b'; drop the line",
        ),
        (
            '{"prompt": "a", "completions": ["b", "c"], "rewards": [1]}',
            "data.jsonl:3: not as many rewards as completions, two at least, got ['b', 'c'] and",
        ),
        (
            '{"prompt": "a", "completions": ["b"], "rewards": [1]}',
            "data.jsonl:3: not as many rewards as completions, two at least, got ['b'] and [1]",
        ),
        (
            '{"prompt": "a", "completions": "bc", "rewards": [1, 2]}',
            "data.jsonl:3: not as many rewards as completions, two at least, got bc and [1, 2]",
        ),
        (
            '{"prompt": "a", "completions": ["b", " "], "rewards": [1, 2]}',
            "data.jsonl:3: empty completion, got ' '",
        ),
        (
            '{"prompt": "a", "completions": ["b", "b"], "rewards": [1, 2]}',
            "data.jsonl:3: a completion twice, got 'b'; keep one",
        ),
        (
            '{"prompt": "a", "completions": ["b", "c"], "rewards": [1, NaN]}',
            "data.jsonl:3: a reward is no number, got nan",
        ),
        (
            '{"prompt": "a", "completions": ["b", "c"], "rewards": [1, "2"]}',
            "data.jsonl:3: a reward is no number, got '2'",
        ),
        (
            '{"prompt": "a", "completions": ["b", "c"], "rewards": [1, true]}',
            "data.jsonl:3: a reward is no number, got True",
        ),
        (
            json.dumps({"prompt": "a" * 64, "completion": "b"}),
            "data.jsonl:3: prompt and completion exceed the model's context of 64 tokens, "
            "got 65 + 24; shorten the prompt or data.max_completion_tokens",
        ),
    ],
)
def test_a_bad_line_is_refused_with_its_number(
    prepared: Callable[..., Any], line: str, message: str
) -> None:
    lines = [json.dumps(row) for row in GOOD]
    lines.insert(2, line)
    with refused(message):
        prepared("\n".join(lines) + "\n")
    assert not PROMPTS.exists()


def test_a_list_is_kept_in_its_order_and_its_best_and_worst_are_its_pair(
    prepared: Callable[..., Any],
) -> None:
    texts = [" b", " best", " w"]
    listed = [{"prompt": f"List {i}", "completions": texts, "rewards": [0, 1.5, -2]} for i in "ab"]
    tied = {"prompt": "Tied", "completions": texts, "rewards": [1, 1, 1]}
    prompts = prepared([*GOOD, *listed, tied])
    lists = read_table(LISTS, LISTS_SCHEMA)
    assert len(lists["rewards"]) == len(prompts["text"]) == len(GOOD) + 3
    for row, prompt in enumerate(prompts["text"]):
        if prompt in ("List a", "List b", "Tied"):
            best, worst = (" b", "") if prompt == "Tied" else (" best", " w")
            assert (prompts["gold"][row], prompts["rejected"][row]) == (best, worst)
            rewards = [1.0, 1.0, 1.0] if prompt == "Tied" else [0.0, 1.5, -2.0]
            assert lists["rewards"][row] == rewards
            assert lists["completions"][row][texts.index(best)] == prompts["gold_tokens"][row]
            assert len(lists["completions"][row]) == 3
        else:
            assert lists["completions"][row] == lists["rewards"][row] == []


def test_a_missing_data_file_is_refused(prepared: Callable[..., Any]) -> None:
    with refused("nothing.jsonl: no such input of stage 'prepare'"):
        prepared(GOOD, **{"data.source": "nothing.jsonl"})


def test_too_few_prompts_for_the_splits_are_refused(prepared: Callable[..., Any]) -> None:
    with refused("data: too few prompts for the splits, got 7 different ones for "):
        prepared(GOOD[:7])


def test_the_training_split_is_of_the_size_that_was_asked_for(prepared: Callable[..., Any]) -> None:
    assert prepared(GOOD, **{"data.num_train": 5})["split"].count("train") == 5
    with refused("data: too few prompts for the splits, got 20 different ones for 14 training, 3"):
        prepared(GOOD, **{"data.num_train": 14})


def test_splits_share_no_prompt_whatever_its_case(prepared: Callable[..., Any]) -> None:
    doubles = [{**row, "prompt": row["prompt"].upper()} for row in GOOD]
    again = [{**row, "completion": " another"} for row in GOOD]
    prompts = prepared([*GOOD, *doubles, *again])
    folded = [text.casefold() for text in prompts["text"]]
    assert len(set(folded)) == len(folded) == len(GOOD)
    assert {split: prompts["split"].count(split) for split in set(prompts["split"])} == {
        "train": 13,
        "validation": 3,
        "test": 4,
    }
    # The first row of a prompt is the one that is kept.
    assert set(prompts["gold"]) == {row["completion"] for row in GOOD}


def test_the_splits_are_a_function_of_the_seed(prepared: Callable[..., Any]) -> None:
    first = prepared(GOOD)
    assert prepared(GOOD) == first
    assert prepared(GOOD, **{"compute.seed": 1})["text"] != first["text"]


def test_prompts_begin_and_whole_completions_end(prepared: Callable[..., Any]) -> None:
    tokenizer = byte_tokenizer()
    prompts = prepared([*GOOD, {"prompt": "long", "completion": "x" * 30}])
    for row, text in enumerate(prompts["text"]):
        begin, *rest = prompts["tokens"][row]
        assert begin == tokenizer.bos_token_id
        assert tokenizer.decode(rest) == text
        gold, tokens = prompts["gold"][row], prompts["gold_tokens"][row]
        if text == "long":
            # Cut at 24 tokens, and not ended: the policy is not to learn to stop there.
            assert tokenizer.decode(tokens) == "x" * 24
        else:
            assert tokens[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(tokens[:-1]) == gold


def test_control_tokens_in_a_text_stay_text(prepared: Callable[..., Any]) -> None:
    rows = [{"prompt": "</s> a <s>", "completion": " b </s> <pad> c"}, *GOOD]
    prompts = prepared(rows)
    row = prompts["text"].index("</s> a <s>")
    tokenizer = byte_tokenizer()
    control = set(tokenizer.all_special_ids)
    assert control.isdisjoint(prompts["tokens"][row][1:])
    assert control.isdisjoint(prompts["gold_tokens"][row][:-1])
    assert tokenizer.decode(prompts["tokens"][row][1:]) == "</s> a <s>"
    assert tokenizer.decode(prompts["gold_tokens"][row][:-1]) == " b </s> <pad> c"


def test_pairs_keep_their_rejected_and_completions_have_none(prepared: Callable[..., Any]) -> None:
    tokenizer = byte_tokenizer()
    pairs = [{"prompt": f"p{i}", "chosen": " good", "rejected": " bad"} for i in range(10)]
    prompts = prepared([*pairs, *GOOD])
    for row, text in enumerate(prompts["text"]):
        if text.startswith("prompt"):
            assert (prompts["rejected"][row], prompts["rejected_tokens"][row]) == ("", [])
        else:
            assert (prompts["gold"][row], prompts["rejected"][row]) == (" good", " bad")
            tokens = prompts["rejected_tokens"][row]
            assert tokenizer.decode(tokens[:-1]) == " bad"
            assert tokens[-1] == tokenizer.eos_token_id


def test_a_gzipped_file_is_the_same_data(prepared: Callable[..., Any]) -> None:
    plain = prepared(GOOD)
    Path("data.jsonl.gz").write_bytes(gzip.compress(Path("data.jsonl").read_bytes()))
    assert prepared(GOOD, **{"data.source": "data.jsonl.gz"}) == plain


def test_text_beyond_ascii_is_kept(prepared: Callable[..., Any]) -> None:
    prompts = prepared([{"prompt": "naïve 日本", "completion": " é"}, *GOOD])
    assert "naïve 日本" in prompts["text"]
