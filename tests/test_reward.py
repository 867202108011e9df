"""Laws of reward models: how they read, what trains them, and what is measured."""

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, byte_tokenizer, llama, write_jsonl
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from prefopt.rewarding import bradley_terry, rewards
from prefopt.statistics.calibration import calibration
from stages import models, reward, tracking
from stages.artefacts import reliability_of, reward_curve_of, reward_metrics_of, reward_of
from stages.params import load_params
from stages.reward_models import check_base
from stages.rewards import Text, load_reward
from stages.sources import parse

Write = Callable[..., dict[str, Any]]
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def decoder(pad: int | None = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=259, num_labels=1, pad_token_id=pad, **SIZES)
    return LlamaForSequenceClassification(config).eval()


def encoder() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=259, num_labels=1, **SIZES)).eval()


def test_bradley_terry_is_the_cross_entropy_of_a_sigmoid() -> None:
    chosen, rejected = torch.tensor([1.5, -0.5]), torch.tensor([0.25, 1.0])
    preference, margin = torch.tensor([1.0, 0.75]), torch.tensor([0.5, 0.0])
    ahead = [1.5 - 0.25 - 0.5, -0.5 - 1.0]
    shares = [1 / (1 + math.exp(-z)) for z in ahead]
    expected = [-math.log(shares[0]), -0.75 * math.log(shares[1]) - 0.25 * math.log(1 - shares[1])]
    found = bradley_terry(chosen, rejected, preference, margin)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_soft_preference_is_met_where_the_rewards_give_its_log_odds_beyond_the_margin() -> None:
    ahead = torch.tensor([math.log(3) + 0.2], requires_grad=True)
    zero, quarter = torch.zeros(1), torch.tensor([0.75])
    bradley_terry(ahead, zero, quarter, torch.tensor([0.2])).sum().backward()
    assert ahead.grad is not None
    assert ahead.grad.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("model", [decoder(), decoder(None), decoder(1), encoder()])
def test_company_changes_no_reward(model: Any) -> None:
    # The second ends with what two of the models call padding, and the third is nothing else.
    texts = [[0, 5, 6], [0, 7, 8, 9, 10, 11, 1], [1], [0, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]
    together = rewards(model, texts).tolist()
    assert together == pytest.approx([rewards(model, [t]).item() for t in texts], abs=1e-6)
    alone = [model(input_ids=torch.tensor([text])).logits.item() for text in texts]
    assert together == pytest.approx(alone, abs=1e-6)


def test_calibration_is_of_the_side_that_is_preferred() -> None:
    predicted = np.array([0.86, 0.92, 0.08, 0.55])
    found = calibration(predicted, np.array([1.0, 1.0, 1.0, 0.75]))
    assert [each.num_pairs for each in found.bins] == [1, 1, 2]
    assert [each.confidence for each in found.bins] == pytest.approx([0.55, 0.86, 0.92])
    assert [each.correct for each in found.bins] == pytest.approx([0.75, 1.0, 0.5])
    assert found.error == pytest.approx((0.2 + 0.14 + 2 * 0.42) / 4)


DIALOGUE = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


def test_dialogues_part_at_the_last_assistants_turn_that_both_begin() -> None:
    row = {"chosen": DIALOGUE + " Because.", "rejected": DIALOGUE + " Be gone."}
    text = parse(json.dumps(row), "f:1")
    assert (text.prompt, text.completion, text.rejected) == (DIALOGUE, " Because.", " Be gone.")
    other = DIALOGUE.replace("Why", "How") + " So."
    text = parse(json.dumps(row | {"rejected": other}), "f:1")
    assert text.prompt == "\n\nHuman: Hi.\n\nAssistant:"
    assert text.rejected == " Hello.\n\nHuman: How?\n\nAssistant: So."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "f:1: dialogues share no beginning up to"),
        ({"chosen": DIALOGUE, "rejected": DIALOGUE}, "f:1: no pair, got the rejected turn ''"),
        ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE}, "f:1: no pair, got the rejected turn"),
        ({"chosen": 1, "rejected": DIALOGUE}, "f:1: no dialogues, got "),
    ],
)
def test_what_are_no_two_dialogues_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(json.dumps(row), "f:1")


GOOD, BAD = [" good", " great", " fine", " nice"], [" bad!", " dull", " poor", " awful"]


@pytest.fixture
def place(workplace: Path, base: Path, write_params: Write) -> Write:
    """A workplace where the model `mine` can be trained on 64 pairs of good before bad."""
    rows = [
        {"prompt": f"No. {n} is", "chosen": GOOD[n % 4], "rejected": BAD[n // 4 % 4]}
        for n in range(64)
    ]
    write_jsonl(Path("pairs.jsonl"), rows)

    def write(**changes: Any) -> dict[str, Any]:
        mine = {
            "base": "data/base", "pairs": "pairs.jsonl", "learning_rate": 0.01, "num_epochs": 4,
            "batch_size": 8, "held_out": 0.3,
        }  # fmt: skip
        return write_params(
            **{
                "reward_models": {"mine": mine | changes},
                "rewards": {"learned": {"trained": "mine"}},
                "compute.checkpoint_every": 3,
            }
        )

    return write


def train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reward", "mine"])
    monkeypatch.setattr(tracking, "_start_courier", lambda: None)
    reward.main()


def test_a_reward_model_learns_pairs_is_measured_and_is_a_reward(
    place: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    place()
    train(monkeypatch)
    with open(reward_curve_of("mine")) as file:
        curve = list(csv.DictReader(file))
    assert float(curve[0]["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(curve[0]["accuracy"]) == 0.5
    metrics = json.loads(reward_metrics_of("mine").read_text())
    assert metrics["accuracy"]["value"] > 0.9
    assert metrics["accuracy"]["low"] < metrics["accuracy"]["value"] <= 1
    assert metrics["pairs"]["trained"] + metrics["pairs"]["held_out"] == 64
    assert metrics["length"]["labels_prefer_longer"] < 0.6
    with open(reliability_of("mine")) as file:
        bins = list(csv.DictReader(file))
    assert sum(int(each["num_pairs"]) for each in bins) == metrics["pairs"]["held_out"]
    found = load_reward(load_params(), "learned")
    good, bad = found([Text("No. 99 is", " great"), Text("No. 99 is", " poor")])
    assert good > bad
    model = AutoModelForSequenceClassification.from_pretrained(reward_of("mine"))
    tokens = torch.tensor([byte_tokenizer().encode("No. 99 is great")])
    assert model(input_ids=tokens).logits.item() == pytest.approx(good, abs=1e-5)


def test_a_killed_training_resumes_to_the_same_bits(
    place: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(num_epochs=30)
    train(monkeypatch)
    outputs = [reward_of("mine") / "model.safetensors", reward_curve_of("mine")]
    outputs += [reward_metrics_of("mine"), reliability_of("mine")]
    whole = [path.read_bytes() for path in outputs]
    shutil.rmtree("artefacts")
    code = (
        "import sys; sys.argv = ['reward', 'mine']\n"
        "from stages import reward, tracking; tracking._start_courier = lambda: None\n"
        "reward.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-B", "-c", code], env={"PYTHONPATH": str(PROJECT), "TQDM_DISABLE": "1"}
    )
    while not list(Path(".prefopt/stages").glob("reward-mine/*/checkpoints/*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not reward_of("mine").exists()
    train(monkeypatch)
    assert [path.read_bytes() for path in outputs] == whole


def test_the_margin_is_the_gold_rewards_lead_of_the_chosen(
    place: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(PROJECT / "params.yaml")
    training = params.reward_model("learned").model_copy(update={"margin": 2.0})
    place()
    reader = reward.Reader("data/base")
    pair = reward.TextPair("train", "A", " good film", " bad film", 1.0)
    found = reward.read(params, training, reader, [pair])
    good, bad = load_reward(params, "vader")([Text("A", " good film"), Text("A", " bad film")])
    assert found.margins == [2.0 * (good - bad)]


def test_only_the_top_and_the_head_train_where_that_is_asked(base: Path) -> None:
    model = models.new_classifier(str(base), top_layers=1)
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert "score.weight" in trains
    assert not any(name.startswith(("model.embed", "model.layers.0")) for name in trains)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 0.0}, "reward_models.mine: too few pairs, got 64 to train on and 0 openings"),
        ({"lerning_rate": 1}, "reward_models.mine.lerning_rate: no such key, got 1; known: "),
        ({"margin": 1.0}, "reward_models.mine.margin: is of the gold reward that labelled"),
        ({"batch_size": 0}, "reward_models.mine.batch_size: must be greater than or equal to 1"),
    ],
)
def test_what_cannot_train_is_refused(
    place: Write, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    place(**changes)
    with pytest.raises(ValueError, match=message):
        train(monkeypatch)


def test_a_reward_that_is_not_trained_yet_or_labels_its_own_pairs_is_refused(
    place: Write, write_params: Write
) -> None:
    place()
    with pytest.raises(ValueError, match="not trained yet, got 'mine'; run `dvc repro reward@mine"):
        load_reward(load_params(), "learned")
    write_params(**{"rewards": {"learned": {"trained": "learned"}}, "label.reward": "learned"})
    with pytest.raises(ValueError, match=r"label\.reward: would label the pairs that trained it"):
        load_params()
    write_params(rewards={"learned": {"trained": "wrong"}})
    with pytest.raises(ValueError, match=r"learned.trained: no such reward model, got 'wrong'"):
        load_params()


def test_a_base_that_dvc_does_not_watch_is_refused(base: Path, tmp_path: Path) -> None:
    check_base("x", "sft")
    check_base("x", str(base))
    llama().save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="x: neither in data/base nor in data/rewards, got '/"):
        check_base("x", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="x: weights inside a package cannot be trained"):
        check_base("x", "package:module/file.gguf")
