"""Laws of rewards: every kind gives one finite number a text, or is refused by name."""

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, llama
from transformers import LlamaConfig, LlamaForSequenceClassification

from stages.judges import Comparison, load_judge
from stages.params import load_params
from stages.rewards import Reward, Text, check_reward, load_reward, written_reward

Write = Callable[..., dict[str, Any]]
FOLDER = Path("data/rewards")
TEXTS = [
    Text("The actor", " of the year, a C++ film"),
    Text("A film", " without Acting and acting"),
    Text("", "reacting"),
]


@pytest.fixture
def declare(write_params: Write) -> Callable[[dict[str, Any]], Reward]:
    """The reward that is written so in params.yaml."""
    FOLDER.mkdir(parents=True)

    def declared(written: dict[str, Any]) -> Reward:
        write_params(rewards={"mine": written})
        params = load_params()
        check_reward(params, "mine")
        return load_reward(params, "mine")

    return declared


Declare = Callable[[dict[str, Any]], Reward]


def refused(match: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(match))


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"words": ["acting", "actor"]}, [1, 1, 0]),
        ({"words": ["acting", "actor"], "count": True}, [1, 2, 0]),
        ({"words": ["actor"], "reads": "completion"}, [0, 0, 0]),
        ({"words": ["c++"]}, [1, 0, 0]),
        ({"pattern": "[Aa]cting"}, [0, 1, 1]),
        ({"pattern": "[Aa]cting", "count": True}, [0, 2, 1]),
        ({"length": "words"}, [6, 4, 1]),
        ({"length": "words", "reads": "text"}, [8, 6, 1]),
        ({"length": "characters"}, [24, 26, 8]),
    ],
)
def test_features_of_a_text_are_what_one_counts_by_hand(
    declare: Declare, written: dict[str, Any], expected: list[int]
) -> None:
    assert declare(written)(TEXTS) == expected


def test_tokens_are_those_of_the_base(declare: Declare, base: Path) -> None:
    assert declare({"length": "tokens"})(TEXTS) == [24, 26, 8]


def test_a_threshold_says_whether_another_reward_is_above_it(declare: Declare) -> None:
    texts = [Text("", "good"), Text("", "a film"), Text("", "bad")]
    declare({"length": "words"})
    good, *_ = load_reward(load_params(), "vader")(texts)
    assert declare({"above": 0.1, "of": "vader"})(texts) == [1, 0, 0]
    assert declare({"above": good, "of": "vader"})(texts) == [0, 0, 0]


def test_a_reward_may_be_written_where_it_is_used(write_params: Write) -> None:
    write_params()
    reward = written_reward(load_params(), {"words": ["actor"]}, "runs.x.features.acting")
    assert reward(TEXTS) == [1, 0, 0]
    assert reward.name == "runs.x.features.acting"


CLASSIFIER = {
    "token_pattern": r"(?u)\b\w\w+\b",
    "lowercase": True,
    "ngram_range": [1, 2],
    "sublinear_tf": True,
    "norm": "l2",
    "intercept": 0.25,
    "features": [["good", 2.0, 1.5], ["very good", 3.0, 2.0], ["bad", 2.5, -1.0]],
}


def write_classifier(**changes: Any) -> dict[str, str]:
    path = FOLDER / "critic.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump(CLASSIFIER | changes, file)
    return {"classifier": str(path)}


def test_a_classifier_gives_the_log_odds_of_its_weighted_terms(declare: Declare) -> None:
    reward = declare(write_classifier())
    good, very_good, bad = 2.0 * (1 + math.log(2)), 3.0, 2.5
    length = math.sqrt(good**2 + very_good**2 + bad**2)
    expected = 0.25 + (1.5 * good + 2.0 * very_good - 1.0 * bad) / length
    text = Text("Very GOOD", " or bad, x good")
    assert reward([text, Text("", "x")]) == pytest.approx([expected, 0.25], rel=1e-12)
    plain = declare(write_classifier(norm=None, sublinear_tf=False))
    assert plain([text]) == pytest.approx([0.25 + 1.5 * 4 + 2.0 * 3 - 2.5], rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "l1"}, "critic.json.gz.norm: must be 'l2', got 'l1'"),
        ({"token_pattern": "("}, "token_pattern: no regular expression, got '('"),
        ({"features": [["a", 1.0]]}, "critic.json.gz.features.0.2: is missing"),
        ({"features": [["a", 1.0, 1.0]] * 2}, "features: a term twice, got 'a'; keep one"),
        ({"ngram_range": [2, 1]}, "ngram_range (2, 1); give"),
        ({"idf": []}, "critic.json.gz.idf: no such key"),
    ],
)
def test_a_classifier_of_another_form_is_refused(
    declare: Declare, changes: dict[str, Any], message: str
) -> None:
    with refused(message):
        declare(write_classifier(**changes))


def test_a_damaged_classifier_is_refused(declare: Declare) -> None:
    path = FOLDER / "critic.json.gz"
    write_classifier()
    path.write_bytes(path.read_bytes()[:60])
    with refused("critic.json.gz: no JSON file, got "):
        declare({"classifier": str(path)})


def test_a_function_of_ones_own_gets_prompts_with_completions(declare: Declare) -> None:
    (FOLDER / "own.py").write_text(
        "def shorter(texts):\n    return [len(t.prompt) - len(t.completion) for t in texts]\n"
    )
    reward = declare({"python": "own:shorter"})
    assert reward(TEXTS) == [9 - 24, 6 - 26, -8]
    before = reward.identity
    (FOLDER / "own.py").write_text("def shorter(texts):\n    return [True for t in texts]\n")
    assert declare({"python": "own:shorter"})(TEXTS) == [1.0, 1.0, 1.0]
    assert declare({"python": "own:shorter"}).identity != before


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            "[1.0, float('nan'), 2.0]",
            "reward 'mine': no finite number for text 1 of 3, got nan for 'A film without",
        ),
        ("[1.0, 2.0, float('inf')]", "no finite number for text 2 of 3, got inf for 'reacting'"),
        ("['good', 1, 2]", "no finite number for text 0 of 3, got 'good' for 'The actor"),
        ("[None] * 3", "no finite number for text 0 of 3, got None"),
        ("[1.0, 2.0]", "reward 'mine': not one number a text, got 2 for 3 texts"),
        ("'abc'", "reward 'mine': no list of numbers, got 'abc' for 3 texts"),
        ("1.0", "reward 'mine': no list of numbers, got 1.0 for 3 texts"),
        ("(x for x in texts)", "reward 'mine': no list of numbers, got <generator"),
    ],
)
def test_an_answer_that_is_not_one_finite_number_a_text_is_refused(
    declare: Declare, returned: str, message: str
) -> None:
    (FOLDER / "own.py").write_text(f"def f(texts):\n    return {returned}\n")
    with refused(message):
        declare({"python": "own:f"})(TEXTS)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"wrods": ["a"]}, "rewards.mine: no reward of one kind, got {'wrods': ['a']}; give"),
        ({"words": ["a"], "length": "words"}, "rewards.mine: no reward of one kind"),
        ({"words": []}, "rewards.mine.words: "),
        ({"words": [" "]}, "rewards.mine.words.0: "),
        ({"words": ["a"], "cuont": True}, "rewards.mine.cuont: no such key, got True; known: "),
        ({"pattern": "("}, "rewards.mine.pattern: must be a regular expression of Python's re"),
        ({"length": "lines"}, "rewards.mine.length: must be 'characters', 'words' or 'tokens'"),
        ({"above": 1.0, "of": "vadr"}, "rewards.mine.of: no such reward, got 'vadr'; known: "),
        ({"above": 1.0, "of": "mine"}, "rewards.mine.of: is 0 or 1 itself, got 'mine'"),
        ({"above": float("nan"), "of": "vader"}, "rewards.mine.above: must be a finite number"),
        ({"python": "own"}, "rewards.mine.python: "),
        ({"python": "own:f"}, "rewards.mine.python: no such module, got 'own'; write data/rew"),
        ({"python": "json:f"}, "no such function in "),
        ({"classifier": "data/rewards/none.json"}, "rewards.mine.classifier: nothing within data"),
        ({"classifier": "/etc/passwd"}, "rewards.mine.classifier: nothing within data/rewards"),
        ({"model": "/tmp"}, "rewards.mine.model: nothing within data/rewards, got '/tmp'"),
    ],
)
def test_what_is_no_reward_is_refused_before_any_work(
    declare: Declare, written: dict[str, Any], message: str
) -> None:
    with refused(message):
        declare(written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": {"vader": {"words": ["a"]}}}, "rewards.vader: 'vader' is built in"),
        ({"label.reward": "vadr"}, "label.reward: no such reward, got 'vadr'; known: vader, "),
        ({"label.reward": "vadr"}, "Did you mean 'vader'?"),
        (
            {"rewards": {"a": {"words": ["a"]}}, "judges": {"a": {"kind": "human", "votes": "v"}}},
            "judges.a: 'a' is a reward's name, which judges by itself",
        ),
    ],
)
def test_a_name_is_one_rewards_or_none(
    write_params: Write, changes: dict[str, Any], message: str
) -> None:
    write_params(**changes)
    with refused(message):
        load_params()


def classifier(num_labels: int = 1, **changes: Any) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_labels=num_labels, pad_token_id=2,
        **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def save_model(model: Any) -> dict[str, str]:
    model.save_pretrained(FOLDER / "model")
    byte_tokenizer().save_pretrained(FOLDER / "model")
    return {"model": str(FOLDER / "model")}


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_reward_model_gives_what_hugging_face_gives_of_each_text_alone(
    declare: Declare, num_labels: int
) -> None:
    model = classifier(num_labels)
    found = declare(save_model(model))(TEXTS)
    for text, reward in zip(TEXTS, found, strict=True):
        tokens = torch.tensor([byte_tokenizer().encode(text.prompt + text.completion)])
        logits = model(input_ids=tokens).logits[0]
        expected = (logits[-1] - (logits[0] if num_labels == 2 else 0)).item()
        assert reward == pytest.approx(expected, abs=1e-6)


def test_the_same_text_has_the_same_reward_to_the_last_bit(declare: Declare) -> None:
    first, second, again = declare(save_model(classifier()))([TEXTS[0], TEXTS[1], TEXTS[0]])
    assert first == again != second


def test_a_text_that_is_too_long_loses_its_beginning_and_this_is_said(
    declare: Declare, capsys: pytest.CaptureFixture[str]
) -> None:
    model = classifier(max_position_embeddings=16)
    (found,) = declare(save_model(model))([Text("x" * 40, "the end of it all")])
    tokens = torch.tensor([byte_tokenizer().encode("the end of it all")[-16:]])
    assert found == pytest.approx(model(input_ids=tokens).logits.item(), abs=1e-6)
    assert "1 of 1 texts are longer than the 16 tokens" in capsys.readouterr().err


def test_a_model_that_would_have_a_random_head_is_refused(declare: Declare) -> None:
    with refused("rewards.mine.model: 'data/rewards/model' is no sequence classifier, got ['Llama"):
        declare(save_model(llama()))
    with refused("rewards.mine.model: 'data/rewards/model' is no reward model, got 3 labels"):
        declare(save_model(classifier(3)))


def test_every_reward_judges(write_params: Write) -> None:
    write_params(rewards={"short": {"length": "words"}})
    judge = load_judge(load_params(), "short", "dpo")
    found = judge.judge(
        [Comparison(0, "p", "a b", "a", "sft"), Comparison(1, "p", "a", "b", "sft")]
    )
    assert [(j.verdict, j.policy_reward) for j in found] == [("policy", 2), ("tie", 1)]
