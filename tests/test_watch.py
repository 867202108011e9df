"""Laws of the looks at a run: what they say, what they choose, and that they change nothing."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trainings import Curve, name_x, outputs_of_x, train_x, write_prompts

from prefopt.packing import Row
from prefopt.scoring import token_logps
from stages import reference, watch
from stages.artefacts import (
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    GENERATIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    REVISIONS,
    REVISIONS_SCHEMA,
    SFT,
    digest,
    generations_of,
    model_of,
    read_table,
    write_table,
)
from stages.models import load_policy, load_tokenizer

BETA = 0.5
NUM_TRAIN, NUM_VALIDATION = 10, 4
Train = Callable[..., Curve]


@pytest.fixture
def trained(base: Path, write_params: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train run `x` for five steps of two pairs; returns its curve."""
    shutil.copytree(base, SFT)
    draw = random.Random(0)

    def tokens() -> list[int]:
        return [draw.randrange(3, 259) for _ in range(draw.randint(2, 7))]

    splits = ["train"] * NUM_TRAIN + ["validation"] * NUM_VALIDATION
    prompts = [[0, *tokens()] for _ in splits]
    write_prompts(splits, prompts)
    completions = {
        "prompt": [prompt for prompt in prompts for _ in range(2)],
        "completion": [tokens() for _ in range(2 * len(splits))],
    }
    write_table(COMPLETIONS, completions, COMPLETIONS_SCHEMA)
    write_pairs(splits)
    write_table(REVISIONS, {name: [] for name in REVISIONS_SCHEMA.names}, REVISIONS_SCHEMA)
    write_params()
    reference.main()
    name_x(monkeypatch)

    def run(**changes: Any) -> Curve:
        defaults = {
            "runs": {"x": {"loss": "dpo", "beta": BETA}},
            "train.batch_size": 2,
            "train.learning_rate": 0.003,
            "train.schedule": "constant",
            "compute.checkpoint_every": 1,
            "data.max_completion_tokens": 6,
            "watch.every": 2,
            "watch.num_generations": 3,
        }
        write_params(**defaults | changes)
        return train_x()

    return run


def write_pairs(splits: list[str]) -> None:
    columns = {
        "split": splits,
        "chosen": list(range(0, 2 * len(splits), 2)),
        "rejected": list(range(1, 2 * len(splits), 2)),
        "preference": [1.0] * len(splits),
    }
    write_table(PAIRS, columns, PAIRS_SCHEMA)


def looked(curve: Curve, column: str) -> dict[int, float]:
    return {int(row["step"]): float(row[column]) for row in curve if row[column]}


@torch.no_grad()
def loss_on_validation_pairs() -> float:
    """DPO's by its formula, of the model that was saved."""
    completions = read_table(COMPLETIONS, COMPLETIONS_SCHEMA)
    rows = list(map(Row, completions["prompt"], completions["completion"]))[2 * NUM_TRAIN :]

    def logps(model: Path) -> Tensor:
        policy = load_policy(str(model))
        return torch.stack([token_logps(policy, [row])[0].sum() for row in rows])

    u = logps(model_of("x")) - logps(SFT)
    return -F.logsigmoid(BETA * (u[::2] - u[1::2])).mean().item()


def test_looks_change_neither_the_model_nor_what_steps_say(trained: Train) -> None:
    torch.manual_seed(7)
    watched = trained()
    model = digest(model_of("x"))
    unwatched = trained(**{"watch.every": None})
    assert digest(model_of("x")) == model
    columns = list(unwatched[0])
    assert [{name: row[name] for name in columns} for row in watched] == unwatched
    assert set(looked(watched, "validation/loss")) == {1, 3, 4}
    assert read_table(generations_of("x"), GENERATIONS_SCHEMA)["step"] == []


def test_a_look_tells_the_validation_loss_and_the_kl_of_what_the_policy_writes(
    trained: Train,
) -> None:
    curve = trained()
    assert looked(curve, "validation/loss")[4] == pytest.approx(
        loss_on_validation_pairs(), rel=1e-4
    )
    table = read_table(generations_of("x"), GENERATIONS_SCHEMA)
    assert table["step"] == [1] * 3 + [3] * 3 + [4] * 3
    assert table["prompt"] == [NUM_TRAIN, NUM_TRAIN + 1, NUM_TRAIN + 2] * 3
    assert table["seed"][:3] == table["seed"][3:6]
    policy, sft = load_policy(str(model_of("x"))), load_policy(str(SFT))
    prompts = read_table(PROMPTS, PROMPTS_SCHEMA)["tokens"]
    tokenizer = load_tokenizer(str(SFT))
    total = 0.0
    for i in range(6, 9):
        prompt, written = prompts[table["prompt"][i]], table["tokens"][i]
        row = torch.tensor([[*prompt, *written]])
        p, q = (
            model(row).logits[0, len(prompt) - 1 : -1].detach().log_softmax(-1)
            for model in (policy, sft)
        )
        kl = (p.exp() * (p - q)).sum().item()
        assert table["kl"][i] == pytest.approx(kl, rel=1e-3)
        chosen = torch.tensor(written)[:, None]
        for name, logps in (("logp", p), ("reference_logp", q)):
            assert table[name][i] == pytest.approx(logps.gather(1, chosen).sum().item(), rel=1e-4)
        assert table["text"][i] == tokenizer.decode(written, skip_special_tokens=True)
        total += kl
    assert total > 0.01
    assert looked(curve, "validation/kl")[4] == pytest.approx(total / 3, rel=1e-3)
    assert looked(curve, "validation/length")[4] == sum(map(len, table["tokens"][6:])) / 3


def test_the_model_saved_is_the_best_by_the_declared_metric(
    trained: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    curve = trained(
        **{
            "watch.every": 1,
            "watch.select": "validation/loss",
            "train.learning_rate": 0.02,
            "train.num_epochs": 2,
        }
    )
    losses = looked(curve, "validation/loss")
    best = min(losses, key=lambda step: losses[step])
    assert best < 9, "a training too tame for this test"
    assert loss_on_validation_pairs() == pytest.approx(losses[best], rel=1e-4)
    assert max(step for step, kept in looked(curve, "kept").items() if kept) == best
    assert f"x: the policy after step {best} is kept, by validation/loss" in capsys.readouterr().err


def test_a_run_ends_at_its_kl_budget_and_saves_the_last_look_within_it(
    trained: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trained(**{"watch.every": 1})
    kls, losses = looked(whole, "validation/kl"), looked(whole, "validation/loss")
    assert kls[0] < kls[1] < kls[2]
    budget = (kls[1] + kls[2]) / 2
    curve = trained(
        **{"watch.every": 1, "runs": {"x": {"loss": "dpo", "beta": BETA, "max_kl": budget}}}
    )
    assert [row["step"] for row in curve] == ["0", "1", "2"]
    assert loss_on_validation_pairs() == pytest.approx(losses[1], rel=1e-4)
    assert "x: ended after step 2, because its KL of" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"runs.x: the first look exceeds max_kl .*look more of"):
        trained(**{"watch.every": 1, "watch.max_kl": kls[0] / 2})


class Killed(Exception):
    """What stands in for a killed process."""


@pytest.mark.parametrize("killed_look", [0, 1, 2])
def test_a_run_killed_in_a_look_resumes_to_the_same_outputs(
    trained: Train, monkeypatch: pytest.MonkeyPatch, killed_look: int
) -> None:
    changes = {"watch.select": "validation/loss", "compute.checkpoint_every": 3}
    trained(**changes)
    straight = outputs_of_x()
    left = iter(range(3))
    sample = watch.sample

    def killing(*arguments: Any, **options: Any) -> list[list[int]]:
        if next(left) == killed_look:
            raise Killed
        return sample(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(watch, "sample", killing)
        with pytest.raises(Killed):
            trained(**changes)
    trained(**changes)
    assert outputs_of_x() == straight


def test_selecting_by_validation_pairs_that_are_not_there_is_refused(trained: Train) -> None:
    write_pairs(["train"] * NUM_TRAIN)
    with pytest.raises(ValueError, match=r"watch.select: 'validation/loss' reads validation pairs"):
        trained(**{"watch.select": "validation/loss"})


def test_a_look_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    look = watch.Look(lambda step: [(torch.tensor(torch.nan), {})], None, tmp_path)
    with pytest.raises(ValueError, match="look after step 3: validation/loss is not finite, got n"):
        look(3)
