"""The report, from small artefacts through the real stages, and read by a real browser."""

import base64
import contextlib
import csv
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from html.parser import HTMLParser
from inspect import signature
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from conftest import shipped_params

from prefopt.losses import LOSSES
from stages import compare, evaluate, judge, report, tracking, verdicts
from stages.artefacts import (
    COMPARISON,
    FRONTIER,
    GENERATIONS_SCHEMA,
    JUDGEMENTS_SCHEMA,
    LOGRATIOS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    REPORT,
    SAMPLES_SCHEMA,
    TEMPLATES,
    card_of,
    curve_of,
    digest,
    generations_of,
    judgements_of,
    logratios_of,
    looks_of,
    metrics_of,
    read_table,
    reliability_of,
    reward_metrics_of,
    samples_of,
    write_table,
)
from stages.figures import LEAST_WATCHED
from stages.params import Params, load_params
from stages.remedies import READS, YOURS, advice
from stages.results import Result, load_comparison, load_reference, load_results
from stages.rewards import Text, load_reward
from stages.tables import EN_DASH, certainty_rows, result_columns

EOS = 1
NUM_TEST, NUM_SHIFTED = 30, 20
PRAISE = ["great", "wonderful", "lovely", "brilliant"]
BLAME = ["awful", "dull", "terrible", "boring"]
HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "\"' onmouseover=\"document.title = 'owned'\" x='",
    "{{ 7 * 7 }} {% raw %} ]]> <!-- &lt;b&gt; \u202e \u2028",
    "</style></svg></details></article><h1>owned</h1>",
]
RUNS: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo", "beta": 0.1},
    "ipo": {"loss": "ipo", "tau": 0.1},
    "ipo_weak": {"loss": "ipo", "tau": 0.5},
    "squared": {"loss": "f_dpo", "beta": 0.1, "divergence": "squared_log"},
    "picked": {"best_of": 4},
}
# How often a policy praises, and how far its log-ratios moved.
QUALITY = {"sft": 0.5, "dpo": 0.85, "ipo": 0.6, "ipo_weak": 0.5, "squared": 0.4, "picked": 1.0}
MOVED = {"dpo": -4.0, "ipo": 0.5, "ipo_weak": 0.1, "squared": 0.2, "picked": 0.0}


def build(runs: dict[str, dict[str, Any]], *, rounds: int, rich: bool) -> None:
    """Artefacts of all stages before `judge`, written; then the real stages from there on."""
    params = shipped_params()
    params["runs"] = runs
    params["evaluation"]["num_resamples"] = 200
    if not rich:
        params["evaluation"]["judges"] = ["vader"]
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for folder in ("samples", "judgements", "curves", "logratios", "generations", "cards", "looks"):
        Path("artefacts", folder).mkdir(parents=True, exist_ok=True)
    write_prompts(NUM_SHIFTED if rich else 0)
    for name in ("sft", *runs):
        write_samples(name, rounds, NUM_SHIFTED if rich else 0)
    for name in runs:
        write_training(name, rich=rich)
        program(judge, name)
        if rich:
            write_words(name)
        program(evaluate, name)
    program(compare)
    if rich:
        write_card("textblob")
        write_reward_model("learned")
    program(report)


def program(module: Any, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *arguments])
        patch.setattr(tracking, "_start_courier", lambda: None)
        module.main()


def text_of(source: random.Random, quality: float) -> str:
    words = source.choices(["the", "film", "plot", "is", "so", "and"], k=source.randint(3, 12))
    mood = PRAISE if source.random() < quality else BLAME
    return " ".join([*words, source.choice(mood)])


def write_prompts(num_shifted: int) -> None:
    source = random.Random(0)
    splits = ["train"] * 2 + ["test"] * NUM_TEST + ["shifted"] * num_shifted
    gold = [text_of(source, 0.5) for _ in splits]
    columns = {
        "split": splits,
        "text": [f"prompt {number} {HOSTILE[number % 5]}" for number in range(len(splits))],
        "tokens": [[5, number + 3] for number in range(len(splits))],
        "gold": gold,
        "gold_tokens": [tokens_of(text) for text in gold],
        "rejected": [""] * len(splits),
        "rejected_tokens": [[]] * len(splits),
    }
    write_table(PROMPTS, columns, PROMPTS_SCHEMA)
    TEMPLATES.write_text(json.dumps({"prompt": ["prompt"], "revision": ["prompt"], "eos": EOS}))


def tokens_of(text: str) -> list[int]:
    return [3 + sum(map(ord, word)) % 500 for word in text.split()] + [EOS]


def write_samples(name: str, rounds: int, num_shifted: int) -> None:
    source = random.Random(name)
    columns: dict[str, list[Any]] = {field: [] for field in SAMPLES_SCHEMA.names}
    for revision in range(rounds + 1):
        for prompt in range(2, 2 + NUM_TEST + num_shifted):
            text = text_of(source, QUALITY[name])
            if prompt < 2 + len(HOSTILE):
                text = f"{HOSTILE[prompt - 2]} {text}"
            tokens = tokens_of(text)
            logp = -3.0 * len(tokens) + source.random()
            moved = source.random() if MOVED.get(name) else 0.0
            row = [prompt, revision, prompt, 1.0, text, tokens, logp, logp - moved]
            for field, value in zip(SAMPLES_SCHEMA.names, row, strict=True):
                columns[field].append(value)
    write_table(samples_of(name), columns, SAMPLES_SCHEMA)


def write_training(name: str, *, rich: bool) -> None:
    source = random.Random(name)
    pairs = range(40)
    columns = {
        "chosen": [MOVED[name] + source.random() for _ in pairs],
        "rejected": [MOVED[name] - 2 - source.random() for _ in pairs],
        "chosen_reference": [-20.0] * len(pairs),
        "rejected_reference": [-21.0] * len(pairs),
        "chosen_tokens": [5 + pair % 7 for pair in pairs],
        "rejected_tokens": [6 + pair % 5 for pair in pairs],
    }
    write_table(logratios_of(name), columns, LOGRATIOS_SCHEMA)
    names = ["loss", "rewards/margins", "rewards/accuracies"]
    sides = ["logratios/chosen", "logratios/rejected"]
    if rich and name == "squared":  # as if it had learned from its own samples and no pairs
        names, sides = ["loss"], []
    watched = [f"validation/{column}" for column in names] if rich else []
    # What a run that learns from its own samples measures, now and then.
    measured = ["target/js", "samples/self_bleu", "moments/acting"] if name == "squared" else []
    watched += measured if rich else []
    with open(curve_of(name), "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *names, *sides, *watched])
        writer.writeheader()
        for step in range(6):
            values: dict[str, Any] = {column: source.random() for column in [*names, *sides]}
            looked = {column: source.random() if step % 2 else "" for column in watched}
            writer.writerow({"step": step, **values, **looked})
    rows = [(step, prompt, 7, HOSTILE[0], [3, EOS], -3.0, -4.0, 0.5)
            for step in (0, 5) for prompt in (0, 1) for _ in range(LEAST_WATCHED // 2)
            if rich]  # fmt: skip
    table = {name: [row[i] for row in rows] for i, name in enumerate(GENERATIONS_SCHEMA.names)}
    write_table(generations_of(name), table, GENERATIONS_SCHEMA)


WORDS = ["policy_first", "opponent_first", "policy_first_reply", "opponent_first_reply"]
WITH_WORDS = pa.schema(
    [
        *JUDGEMENTS_SCHEMA,
        *(
            pa.field(name, pa.string(), nullable=False)
            for name in WORDS
            if name not in JUDGEMENTS_SCHEMA.names
        ),
    ]
)


def write_words(name: str) -> None:
    """Of TextBlob, both orders' verdicts and words as a model would give them, and three gaps."""
    table = read_table(judgements_of(name), JUDGEMENTS_SCHEMA)
    by_model = [judge == "textblob" for judge in table["judge"]]
    for place, column in enumerate(WORDS):
        said = HOSTILE[place]
        table[column] = [
            "" if not model else said if column.endswith("reply") else verdict
            for model, verdict in zip(by_model, table["verdict"], strict=True)
        ]
    gaps = [row for row, model in enumerate(by_model) if model][2:5]
    for row, verdict in zip(gaps, ("unparsed", "refused", "missing"), strict=True):
        table["verdict"][row] = verdict
    write_table(judgements_of(name), table, WITH_WORDS)


CONFUSION = {"first": {"first": 15, "second": 5}, "second": {"second": 15, "tie": 5}}


def write_card(judge: str, confusion: dict[str, dict[str, int]] = CONFUSION) -> None:
    proportion = {"value": 0.75, "low": 0.6, "high": 0.86}
    card = {
        "judge": judge,
        "exam": {"source": "pairs"},
        "num_items": 40,
        "confusion": confusion,
        "agreement": proportion,
        "flip_rate": proportion,
        "first_position": None,
        "length_slope": {"value": -0.2, "standard_error": 0.1},
        "unparsed_rate": 0.05,
        "refused_rate": 0.0,
        "missing_rate": 0.0,
        "groups": {},
    }
    card_of(judge).write_text(json.dumps(card))


def write_reward_model(name: str) -> None:
    metrics = {
        "accuracy": {"value": 0.71, "low": 0.64, "high": 0.77, "standard_error": 0.03},
        "loss": 0.6,
        "calibration_error": 0.042,
        "length": {
            "correlation": None, "model_prefers_longer": 0.5, "labels_prefer_longer": 0.44
        },
        "pairs": {"trained": 500, "held_out": 120, "held_out_openings": 120, "texts_cut": 0},
    }  # fmt: skip
    for path in (reward_metrics_of(name), reliability_of(name)):
        path.parent.mkdir(parents=True, exist_ok=True)
    reward_metrics_of(name).write_text(json.dumps(metrics))
    rows = ["0.55,0.6,0.5,0.7,70", "0.83,0.8,0.7,0.9,50"]
    text = "\n".join(["confidence,correct,low,high,num_pairs", *rows])
    reliability_of(name).write_text(text + "\n")


@contextlib.contextmanager
def inside(folder: Path) -> Generator[None, None, None]:
    """Work in a folder where judgements have the words of `write_words`."""
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdicts, "JUDGEMENTS_SCHEMA", WITH_WORDS)
        yield


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of everything: revisions, words, generations, cards."""
    folder = tmp_path_factory.mktemp("rich")
    with inside(folder):
        build(RUNS, rounds=1, rich=True)
    return folder


@pytest.fixture(scope="module")
def page(rich: Path) -> str:
    return (rich / REPORT / "index.html").read_text()


class Tags(HTMLParser):
    """Every start tag with its attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_report_is_the_same_bytes_when_it_is_made_again(rich: Path) -> None:
    with inside(rich):
        before = digest(REPORT)
        program(report)
        assert digest(REPORT) == before


def test_hostile_texts_stay_texts(page: str) -> None:
    tags = Tags(page).found
    names = [tag for tag, _ in tags]
    assert names.count("script") == 1
    assert names.count("h1") == 1
    assert "img" not in names
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert page.count("document.title") == page.count("document.title = &#39;owned&#39;") > 100
    assert "{{ 7 * 7 }}" in page


def test_no_script_but_the_pages_own_may_run_and_nothing_may_be_fetched(page: str) -> None:
    (script,) = re.findall("<script>(.*?)</script>", page, flags=re.DOTALL)
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for t, a in Tags(page).found if "http-equiv" in a and t == "meta")
    assert policy is not None
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{own}'" in policy
    assert not re.search(r"""(src|url)\s*[=(]\s*["']?https?:""", page)


def test_every_table_is_named_and_its_headings_have_a_scope(page: str) -> None:
    tags = Tags(page).found
    names = [tag for tag, _ in tags]
    assert names.count("table") == names.count("caption") + 1  # digests have their summary
    assert all(attributes.get("scope") for tag, attributes in tags if tag == "th")


def test_what_is_there_only_at_times_is_shown_when_it_is_there(page: str) -> None:
    for shown in (
        'id="revisions"',
        "Reward within a budget of KL",
        "a line goes from look to look",
        "What the policies' own samples say",
        "What they wrote on the way",
        "textblob's words, against SFT",
        "this run shown first",
        "rings are validation pairs",
        "textblob: verdicts by label",
        "verdicts are missing: the bounds",
        "in its place, if it errs here as it erred there",
        "unparsed, against SFT",
        "learned: 70 pairs, confidence 0.55, came true 0.60, 95% interval 0.50 to 0.70",
        "labels prefer the longer",
    ):
        assert shown in page


def test_a_plain_comparison_has_no_trace_of_what_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    build({"dpo": RUNS["dpo"]}, rounds=0, rich=False)
    page = (REPORT / "index.html").read_text()
    assert "revisions" not in json.loads(metrics_of("dpo").read_text())
    drawn = {path.stem for path in (REPORT / "figures").iterdir()}
    assert drawn == {"win_rates", "reward_kl", "length", "displacement", "logratios", "curves"}
    for absent in (
        'id="revisions"',
        "budget of KL",
        "from look to look",
        "own samples say",
        "on the way",
        "Run against run",
        "validation pairs",
        "by label",
        "errs here",
        "cannot be called best",
        "reliability",
    ):
        assert absent not in page
    assert "No verdict is missing." in page
    assert "There is one judge and no report card of it" in page


def test_settings_of_one_objective_are_one_frontier_and_others_are_points(rich: Path) -> None:
    found = json.loads((rich / COMPARISON).read_text())["frontier"]
    assert {objective: list(settings) for objective, settings in found["places"].items()} == {
        "dpo": ["beta 0.1"],
        "ipo": ["tau 0.1", "tau 0.5"],
        "f_dpo, divergence squared_log": ["beta 0.1"],
        "best_of": ["best_of 4"],
    }
    assert (list(found["curves"]), found["pairs"]) == (["ipo"], [])
    with contextlib.chdir(rich):
        metrics = json.loads(metrics_of("dpo").read_text())
        (place,) = found["places"]["dpo"].values()
        for key in ("kl", "reward"):
            assert place[key]["value"] == pytest.approx(metrics[key], abs=2e-6)
        rate = metrics["win_rate"]["sft"]["vader"]
        assert {key: place["win_rate"][key] for key in ("value", "low", "high")} == {
            key: rate[key] for key in ("value", "low", "high")
        }
        with open(FRONTIER, newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["objective"], row["strength"]) for row in rows] == [
            (objective, strength)
            for objective, settings in found["places"].items()
            for strength in settings
        ]
        with open(looks_of("ipo"), newline="") as file:
            looks = list(csv.DictReader(file))
        praise = load_reward(load_params(), "vader")
    said = praise([Text(f"prompt {prompt} {HOSTILE[prompt]}", HOSTILE[0]) for prompt in (0, 1)])
    assert [row["step"] for row in looks] == ["0", "5"]
    assert float(looks[0]["reward"]) == pytest.approx(sum(said) / 2, abs=2e-6)
    assert float(looks[0]["kl"]) == 0.5


def test_best_of_n_is_a_curve_over_n_at_the_most_kl_that_it_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    best = {f"best_of_{n}": {"best_of": n} for n in (4, 2)}
    for name in best:
        monkeypatch.setitem(QUALITY, name, QUALITY["picked"])
        monkeypatch.setitem(MOVED, name, MOVED["picked"])
    build({"dpo": RUNS["dpo"]} | best, rounds=0, rich=False)
    found = json.loads(COMPARISON.read_text())["frontier"]
    assert list(found["places"]["best_of"]) == ["best_of 2", "best_of 4"]
    assert list(found["curves"]) == ["best_of"]
    for words, place in found["places"]["best_of"].items():
        metrics = json.loads(metrics_of(words.replace(" ", "_")).read_text())
        assert place["kl_is_bound"] is metrics["kl_is_bound"] is True
        assert place["kl"]["value"] == metrics["kl"] > 0
    assert not found["places"]["dpo"]["beta 0.1"]["kl_is_bound"]
    drawn = (REPORT / "figures/reward_kl.svg").read_text()
    assert f"KL at most {metrics_of_best(4):.2f} nats" in drawn


def metrics_of_best(n: int) -> float:
    return json.loads(metrics_of(f"best_of_{n}").read_text())["kl"]


def test_measures_are_drawn_of_the_runs_that_have_them(rich: Path, page: str) -> None:
    figure = (rich / REPORT / "figures" / "measures.svg").read_text()
    told = re.findall("<title>(.*?)</title>", figure)
    assert [words.rsplit(":", 1)[0] for words in told] == [
        f"squared, {title} after step 5"
        for title in ("Jensen-Shannon to the target, nats", "Self-BLEU", "E[acting]")
    ]


def test_the_first_sentence_claims_what_the_paired_comparisons_show(rich: Path, page: str) -> None:
    pairs = json.loads((rich / COMPARISON).read_text())["win_rate"]["sft"]["vader"]
    assert {pair["num_prompts"] for pair in pairs} == {NUM_TEST}
    verdict = {(pair["first"], pair["second"]): pair["verdict"] for pair in pairs}
    assert verdict["dpo", "squared"] == "dpo beats squared"
    assert verdict["ipo", "squared"] == "no significant difference"
    text = words_of(page)
    assert "dpo has the best win rate of the trained runs over SFT by the gold reward" in text
    equal = [other for other in ("ipo", "squared") if verdict["dpo", other] != f"dpo beats {other}"]
    claims = "there is no significant difference" in text
    assert claims == bool(equal)


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", "", page))


def test_best_of_n_is_never_called_best_though_it_wins_most(rich: Path, page: str) -> None:
    with inside(rich):
        params = load_params()
        results, comparison = load_results(params), load_comparison()
        told = report.lead(params, results, comparison)
        (column, *_) = result_columns(params, results, load_reference(params, results[0]))
    rates = dict(zip(RUNS, column.cells[1:], strict=True))
    assert rates["picked"].value == max(cell.value or 0 for cell in rates.values())
    assert rates["picked"].value > (rates["dpo"].value or 0)
    assert [name for name, cell in rates.items() if cell.best] == ["dpo"]
    assert told
    assert told["best"].name == "dpo"
    others = [other for key in ("beaten", "equals", "better") for other in told[key]]
    assert sorted(others) == ["ipo", "ipo_weak", "squared"]
    assert "picked cannot be called best: best-of-N shows the completion" in words_of(page)
    picked = [result for result in results if result.name == "picked"]
    assert report.lead(params, picked, comparison) is None


def rows_of_dpo() -> dict[str, dict[str, Any]]:
    """Judge -> how sure its win rate of dpo over SFT is, vader having TextBlob's card too."""
    params = load_params()
    card = json.loads(card_of("textblob").read_text())
    rows = certainty_rows(params, load_results(params), {"vader": card, "textblob": card})
    return {
        row["judge"]: row for row in rows if (row["run"].name, row["opponent"]) == ("dpo", "SFT")
    }


def test_win_rates_stand_beside_what_their_judges_exam_leaves_of_them(
    rich: Path, page: str
) -> None:
    with inside(rich):
        found = rows_of_dpo()
    gold, row = found["vader"], found["textblob"]
    assert (gold["card"], gold["corrected"]) == (None, None)
    # Points when a text was better and when it was worse, each with a win and a loss more.
    better, worse = (15 + 1) / (20 + 2), (5 / 2 + 1) / (20 + 2)
    value = (row["rate"]["value"] - worse) / (better - worse)
    assert row["corrected"]["value"] == pytest.approx(min(value, 1.0))
    assert row["corrected"]["low"] < row["rate"]["low"]
    low, high = row["corrected"]["low"], row["corrected"]["high"]
    assert row["holds_gold"] == (low <= gold["rate"]["value"] <= high)
    assert f"{row['corrected']['value']:.3f}<small>{low:.3f}{EN_DASH}{high:.3f}</small>" in page
    assert '<th scope="col">corrected</th>' in page
    assert f"Of {2 * len(RUNS)} corrected intervals" in words_of(page)


def test_a_judge_that_guesses_corrects_nothing_and_the_page_says_why(
    rich: Path, tmp_path: Path
) -> None:
    shutil.copytree(rich, tmp_path, dirs_exist_ok=True)
    with inside(tmp_path):
        write_card("textblob", {"first": {"tie": 20}, "second": {"tie": 15, "unparsed": 5}})
        row = rows_of_dpo()["textblob"]
        program(report)
        text = words_of((REPORT / "index.html").read_text())
    assert (list(row["corrected"]), row["holds_gold"]) == (["refused"], None)
    reason = "textblob stands uncorrected; exam: does not show that the judge is better than chance"
    assert text.count(reason) == 1
    assert "corrected intervals" not in text


def test_the_headline_is_of_first_completions_and_revisions_have_estimates_of_their_own(
    rich: Path,
) -> None:
    with contextlib.chdir(rich):
        metrics = json.loads(metrics_of("dpo").read_text())
        table = read_table(judgements_of("dpo"), WITH_WORDS)
    found = metrics["revisions"]
    assert {split: list(found[split]) for split in found} == {
        "test": ["0", "1"],
        "shifted": ["0", "1"],
    }
    for opponent, by in (("sft", "vader"), ("gold", "textblob")):
        first = found["test"]["0"][opponent][by]
        headline = metrics["win_rate"][opponent][by]
        assert {key: first[key] for key in ("value", "low", "high")} == {
            key: headline[key] for key in ("value", "low", "high")
        }
        # The mean of 20 evaluations lies within a few of its own standard errors.
        error = first["bootstrap_deviation"]
        assert abs(first["bootstrap_mean"] - first["value"]) < error
        assert error == pytest.approx(first["standard_error"], rel=0.6)
    assert found["shifted"]["0"]["gold"]["vader"]["num_prompts"] == NUM_SHIFTED
    rewards = {
        revision: [
            reward
            for reward, *key in zip(
                *(table[c] for c in ("opponent_reward", "revision", "opponent", "judge")),
                strict=True,
            )
            if key == [revision, "sft", "vader"]
        ]
        for revision in (0, 1)
    }
    assert rewards[0] == rewards[1]  # SFT's first completions are the opponent of every revision


FAMILY = "again + best"


@pytest.mark.parametrize(
    ("first", "second", "verdict", "place"),
    [
        (FAMILY, "other", f"{FAMILY} beats other", "beaten"),
        ("other", FAMILY, f"{FAMILY} beats other", "beaten"),
        ("other", FAMILY, "no significant difference", "equals"),
        ("other", FAMILY, f"other beats {FAMILY}", "better"),
        ("other", "third", "other beats third", None),
    ],
)
def test_a_run_of_several_seeds_is_compared_as_its_family(
    first: str, second: str, verdict: str, place: str | None
) -> None:
    params = Params.model_validate(shipped_params())
    rates = {"again": 0.5, "best": 0.9, "other": 0.6, "third": 0.4}
    results = with_findings(dict.fromkeys(rates, "fine"), [])
    for result, value in zip(results, rates.values(), strict=True):
        result.metrics["win_rate"] = {"sft": {"vader": {"value": value}}}
    pair = {"first": first, "second": second, "verdict": verdict}
    told = report.lead(params, results, {"win_rate": {"sft": {"vader": [pair]}}})
    assert told
    assert told["best"].name == "best"
    found = {name: told[name] for name in ("beaten", "equals", "better") if told[name]}
    assert found == ({place: ["other"]} if place else {})


def with_findings(levels: dict[str, str], remedies: list[str]) -> list[Result]:
    return [
        Result(
            name=name, specification="", colour="", marker="", curve={}, judgements={}, texts={},
            generations={}, looks=[],
            metrics={
                "findings": [
                    {
                        "name": "both_fell",
                        "level": level,
                        "remedies": [] if level == "fine" else remedies,
                    }
                ]
            },
        )
        for name, level in levels.items()
    ]  # fmt: skip


def test_remedies_are_runs_of_this_comparison_or_lines_that_would_try_them(rich: Path) -> None:
    with contextlib.chdir(rich):
        params = load_params()
    remedies = ["divergence: squared_log", "loss: dpop", "learning_rate", "beta", "sft_weight"]
    levels = {"dpo": "alarm", "ipo": "fine", "squared": "watch"}
    (found,) = advice(params, with_findings(levels, remedies))
    assert [result.name for result in found.runs] == ["dpo", "squared"]
    assert [(tried.run.name, tried.level) for tried in found.tried] == [("squared", "watch")]
    assert [yaml.safe_load(line) for line in found.lines] == [
        {"dpop": {"loss": "dpop", "beta": 0.1, "penalty": YOURS}},
        {"dpo_slower": {"loss": "dpo", "beta": 0.1, "learning_rate": 0.0003}},
        {"dpo_closer": {"loss": "dpo", "beta": 0.2}},
        {"dpo_sft_weight": {"loss": "dpo", "beta": 0.1, "sft_weight": YOURS}},
    ]
    assert advice(params, with_findings(dict.fromkeys(levels, "fine"), remedies)) == []


def test_what_proposed_losses_read_is_what_their_functions_take() -> None:
    for name, reads in READS.items():
        assert tuple(signature(LOSSES[name].function).parameters)[1:] == reads


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
browser = pytest.mark.skipif(
    BROWSER is None,
    reason="NO BROWSER: no chromium or chrome on PATH, so nobody saw the report's page at work",
)

# Does what a reader would do and writes down what it saw.
VISITOR = """
const all = (selector) => [...document.querySelectorAll(selector)];
const column = (place) => all("table.results tbody:last-of-type tr")
  .map((row) => Number(row.cells[place].dataset.value));
const head = all("table.results thead tr:last-child th")[1];
const seen = { title: document.title, sorts: [], filters: [] };
for (let click = 0; click < 4; click += 1) {
  seen.sorts.push([head.getAttribute("aria-sort"), column(1)]);
  head.querySelector("button").click();
}
const form = document.querySelector("form.filters");
const shown = (selector) => all(selector).filter((one) => !one.closest("[hidden]")).length;
const count = (fields) => {
  for (const [name, value] of Object.entries(fields)) form.elements[name].value = value;
  form.dispatchEvent(new Event("input", { bubbles: true }));
  return [shown("article.sample"), shown(".entry")];
};
seen.filters.push(count({}));
seen.filters.push(count({ run: "" }));
seen.filters.push(count({ verdict: "unparsed", question: "sft/textblob" }));
seen.filters.push(count({ verdict: "", text: "no such words" }));
seen.form = !form.hidden;
const point = document.querySelector("figure .point");
point.dispatchEvent(new PointerEvent("pointerenter"));
const tip = document.querySelector(".tip");
seen.tip = [tip.hidden, tip.textContent];
point.dispatchEvent(new PointerEvent("pointerleave"));
seen.left = tip.hidden;
const style = getComputedStyle(document.documentElement);
seen.colours = Object.fromEntries(["page", "card", "ink", "muted", "accent", "good", "warn", "bad"]
  .map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
const told = document.createElement("pre");
told.id = "seen";
told.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
document.body.append(told);
"""


def visited(path: Path, *flags: str) -> tuple[str, list[str]]:
    """The page after its scripts, as the browser has it, and what its console said."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={path.parent / 'profile'}", *flags, "--dump-dom", path.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def with_script(page: str, script: str) -> str:
    """The page with one more script, which its policy is made to allow."""
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("script-src ", f"script-src 'sha256-{own}' ")
    return page.replace("</body>", f"<script>{script}</script></body>")


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours, #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_visitor_sorts_filters_and_is_told_what_points_are(
    page: str, tmp_path: Path, scheme: str
) -> None:
    path = tmp_path / "page.html"
    path.write_text(with_script(page, VISITOR))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    dom, console = visited(path, *dark)
    assert console == []
    (told,) = re.findall('<pre id="seen">([^<]*)</pre>', dom)
    seen = json.loads(base64.b64decode(told))
    assert seen["title"] == "reviews \N{EN DASH} prefopt"
    (_, as_written), (down, falling), (up, rising), (_, again) = seen["sorts"]
    assert (down, up) == ("descending", "ascending")
    assert falling == sorted(as_written, reverse=True) != rising == sorted(as_written)
    assert again == as_written
    of_best, of_all, unparsed, nothing = seen["filters"]
    assert of_best == [NUM_TEST, NUM_TEST]
    assert of_all == [NUM_TEST, NUM_TEST * len(RUNS)]
    assert unparsed == [1, len(RUNS)]
    assert nothing == [0, 0]
    assert seen["form"]
    hidden, words = seen["tip"]
    assert not hidden
    assert re.match(r"dpo over SFT by vader: 0\.\d+, 95% interval", words)
    assert seen["left"]
    colours = seen["colours"]
    assert (contrast(colours["page"], "#000000") < contrast(colours["page"], "#ffffff")) == (
        scheme == "dark"
    )
    for ground in ("page", "card"):
        for ink in ("ink", "muted", "accent"):
            assert contrast(colours[ink], colours[ground]) >= 4.5
    for ground in ("good", "warn", "bad"):
        assert contrast(colours["ink"], colours[ground]) >= 4.5
        assert contrast(colours["muted"], colours[ground]) >= 4.5


@browser
def test_the_console_would_tell_of_a_fault(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(with_script(page, "nobody.knows()") + "<script>alert(1)</script>")
    _, console = visited(path)
    assert any("nobody is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


@browser
def test_without_scripts_everything_is_there_to_read(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    # A browser without any scripts can not dump what it has, so the page's own is forbidden.
    path.write_text(re.sub("script-src 'sha256-[^']*'", "script-src 'none'", page))
    dom, console = visited(path)
    assert len(console) == 1
    assert "script-src 'none'" in console[0]
    tags = Tags(dom).found
    hidden = [attributes.get("class") for _, attributes in tags if "hidden" in attributes]
    assert hidden == ["filters card"]
    entries = [attributes for _, attributes in tags if attributes.get("class") == "entry"]
    assert len(entries) == NUM_TEST * len(RUNS)
    assert [tag for tag, _ in tags].count("button") == 0
    assert len(re.findall('class="point"><title>', dom)) > 3 * len(RUNS)
