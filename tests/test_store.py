"""Laws of the reference and its store: nothing is scored twice, and a history leaves no trace."""

import hashlib
import random
import shutil
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, llama
from torch import Tensor

from prefopt.packing import Row
from stages import reference
from stages.artefacts import (
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    REFERENCE,
    REFERENCE_SCHEMA,
    REVISIONS,
    REVISIONS_SCHEMA,
    SFT,
    digest,
    read_table,
    write_table,
)
from stages.evidence import Evidence, Models
from stages.models import load_policy
from stages.params import load_params
from stages.store import STORE, Group, Logps, Store, explain, grouped, key_of

Write = Callable[..., dict[str, Any]]


def rows_of(prompts: int, seed: int = 0) -> list[Row]:
    draw = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(3, 259) for _ in range(draw.randint(1, most))]

    return [Row(prompt, tokens(9)) for prompt in (tokens(6) for _ in range(prompts)) for _ in "ab"]


def lay(rows: list[Row]) -> None:
    COMPLETIONS.parent.mkdir(exist_ok=True)
    columns = {
        "prompt": [row.prompt for row in rows],
        "completion": [row.completion for row in rows],
    }
    write_table(COMPLETIONS, columns, COMPLETIONS_SCHEMA)


@pytest.fixture
def sft(write_params: Write) -> None:
    write_params()
    llama().save_pretrained(SFT)
    byte_tokenizer().save_pretrained(SFT)
    lay(rows_of(10))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each forward pass that a reference pass makes."""
    told: list[int] = []
    plain = reference.token_logps

    def counted(policy: Any, rows: list[Row], **options: Any) -> list[Tensor]:
        told.append(len(rows))
        return plain(policy, rows, **options)

    monkeypatch.setattr(reference, "token_logps", counted)
    return told


def test_what_was_scored_once_is_not_scored_again(sft: None, scored: list[int]) -> None:
    reference.main()
    first = digest(REFERENCE)
    assert scored == [2] * 10
    scored.clear()
    REFERENCE.unlink()
    reference.main()
    assert scored == []
    assert digest(REFERENCE) == first


def test_new_prompts_are_scored_and_no_others(sft: None, scored: list[int]) -> None:
    reference.main()
    scored.clear()
    lay([*rows_of(10)[:6], *rows_of(3, seed=1), *rows_of(10)[6:]])
    reference.main()
    assert scored == [2] * 3


def test_a_history_leaves_no_trace(sft: None) -> None:
    """The same bits, whether all was scored at once, piece by piece or in another order."""
    reference.main()
    at_once = digest(REFERENCE)
    shutil.rmtree(STORE)
    for rows in (rows_of(10)[8:12], rows_of(10)[::-1], rows_of(10)[:4], rows_of(10)):
        lay(rows)
        reference.main()
    assert digest(REFERENCE) == at_once


def test_a_pass_that_is_killed_keeps_its_blocks(
    sft: None, monkeypatch: pytest.MonkeyPatch, scored: list[int]
) -> None:
    monkeypatch.setattr(reference, "BLOCK", 4)
    plain = Store.add

    def killed(self: Store, groups: list[Group], records: list[Logps]) -> None:
        plain(self, groups, records)
        if len(self) >= 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "add", killed)
        reference.main()
    assert not REFERENCE.exists()
    assert sum(scored) == 16
    reference.main()
    assert sum(scored) == 20


def test_a_pass_that_is_killed_within_a_block_adds_none_of_it(sft: None) -> None:
    groups = list(grouped(rows_of(3)))
    records = [[[0.0] * len(row.completion) for row in group.rows] for group in groups]

    def interrupted() -> Iterator[Logps]:
        yield from records[:2]
        raise KeyboardInterrupt

    with Store(key_of(SFT, load_params().compute)) as store:
        store.add(groups[:1], records[:1])
        with pytest.raises(KeyboardInterrupt):
            store.add(groups[1:], interrupted())
        assert [store.find(group) is None for group in groups] == [False, True, True]


def overwrite(file: Path, start: int, content: bytes) -> None:
    """Replace bytes of a file by others."""
    whole = bytearray(file.read_bytes())
    assert whole[start : start + len(content)] != content
    whole[start : start + len(content)] = content
    file.write_bytes(whole)


@pytest.mark.parametrize("damage", ["cut", "header", "page"])
def test_a_damaged_file_is_begun_anew_with_a_warning(
    sft: None, scored: list[int], damage: str
) -> None:
    reference.main()
    whole = digest(REFERENCE)
    (file,) = STORE.iterdir()
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:-40])
        case "header":
            overwrite(file, 0, b"no database")
        case _:
            overwrite(file, len(file.read_bytes()) - 4096, b"\xff" * 64)
    scored.clear()
    with pytest.warns(UserWarning, match="its records are scored again"):
        reference.main()
    assert sum(scored) == 20
    assert digest(REFERENCE) == whole
    scored.clear()
    reference.main()
    assert scored == []


def test_a_damaged_record_is_scored_again_with_a_warning(sft: None, scored: list[int]) -> None:
    reference.main()
    whole = digest(REFERENCE)
    (file,) = STORE.iterdir()
    logps = read_table(REFERENCE, REFERENCE_SCHEMA)["logps"]
    stored = array("f", [*logps[6], *logps[7]]).tobytes()
    start = file.read_bytes().index(stored)
    overwrite(file, start + 2, bytes([stored[2] ^ 1]))
    scored.clear()
    with pytest.warns(UserWarning, match="record .* is damaged; it is scored again"):
        reference.main()
    assert scored == [2]
    assert digest(REFERENCE) == whole


def test_other_weights_or_another_dtype_miss_and_a_learning_rate_does_not(
    sft: None, write_params: Write, scored: list[int]
) -> None:
    reference.main()
    scored.clear()
    write_params(**{"train.learning_rate": 1.0, "compute.seed": 7, "compute.token_budget": 99})
    reference.main()
    assert scored == []
    write_params(**{"compute.dtype": "bfloat16"})
    reference.main()
    assert len(scored) == 10
    scored.clear()
    write_params()
    llama(seed=1).save_pretrained(SFT)
    reference.main()
    assert len(scored) == 10


def test_an_explanation_names_the_part_of_the_key_that_made_a_miss(
    sft: None, write_params: Write
) -> None:
    reference.main()
    compute = load_params().compute
    assert "10 of the 10 prompts in artefacts/completions.parquet are stored" in explain(compute)
    lay([*rows_of(10), *rows_of(2, seed=1)])
    assert "10 of the 12 prompts" in explain(compute)
    assert "2 would be scored" in explain(compute)
    write_params(**{"compute.dtype": "bfloat16"})
    told = explain(load_params().compute)
    assert "0 of the 12 prompts" in told
    assert "holds 10 prompts, for other dtype:\n  dtype: float32, now bfloat16" in told
    llama(seed=1).save_pretrained(SFT)
    assert "for other weights and dtype:" in explain(load_params().compute)


def test_the_key_is_of_weights_and_not_of_a_tokenizers_file(sft: None) -> None:
    compute = load_params().compute
    before = key_of(SFT, compute)
    (SFT / "tokenizer.json").write_text("{}")
    assert key_of(SFT, compute) == before
    (SFT / "config.json").write_text((SFT / "config.json").read_text() + " ")
    assert key_of(SFT, compute)["weights"] != before["weights"]


def test_a_group_is_the_rows_of_a_prompt_that_lie_together() -> None:
    rows = [Row([1], [5]), Row([1], [6, 7]), Row([2], [5]), Row([1], [5])]
    groups = list(grouped(rows))
    assert [group.rows for group in groups] == [rows[:2], rows[2:3], rows[3:]]
    assert len({group.digest for group in groups}) == 3


def test_the_name_of_a_record_is_of_its_token_ids_alone() -> None:
    (group,) = grouped([Row([1, 2], [5]), Row([1, 2], [6, 7])])
    expected = hashlib.sha256(b"[[1, 2], [[5], [6, 7]]]").digest()
    assert group.digest == expected


@pytest.fixture
def evidence(sft: None) -> tuple[Evidence, Models]:
    reference.main()
    pairs = {
        "split": ["train", "train"],
        "chosen": [0, 2],
        "rejected": [1, 3],
        "preference": [1.0, 1.0],
    }
    write_table(PAIRS, pairs, PAIRS_SCHEMA)
    write_table(REVISIONS, {name: [] for name in REVISIONS_SCHEMA.names}, REVISIONS_SCHEMA)
    return Evidence(), Models(load_policy(str(SFT)), None, torch.float32)


def test_an_audit_of_what_was_just_scored_finds_the_same_bits(
    evidence: tuple[Evidence, Models],
) -> None:
    found, models = evidence
    assert found.audit(models, 8, seed=0) == 0.0


def test_an_audit_finds_a_number_that_was_changed(evidence: tuple[Evidence, Models]) -> None:
    _, models = evidence
    logps = read_table(REFERENCE, REFERENCE_SCHEMA)["logps"]
    logps[7][0] += 0.01
    write_table(REFERENCE, {"logps": logps}, REFERENCE_SCHEMA)
    with pytest.raises(ValueError, match=r"differ, got up to 0\.01 nats a token"):
        Evidence().audit(models, 10, seed=0)


def test_an_audit_finds_a_log_probability_that_is_missing(
    evidence: tuple[Evidence, Models],
) -> None:
    _, models = evidence
    logps = read_table(REFERENCE, REFERENCE_SCHEMA)["logps"]
    logps[7].pop()
    write_table(REFERENCE, {"logps": logps}, REFERENCE_SCHEMA)
    with pytest.raises(ValueError, match=r"row 7 has .* got a completion of"):
        Evidence().audit(models, 1, seed=0)


def test_nothing_is_left_half_written(sft: None) -> None:
    reference.main()
    assert [path.suffix for path in STORE.iterdir()] == [".sqlite"]
