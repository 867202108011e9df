"""Laws of runs on the policy's own samples: what they draw, what they tell, what they refuse."""

import math
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import Curve, name_x, outputs_of_x, train_x, write_prompts

from prefopt.packing import Row
from prefopt.scoring import token_logps, token_logps_and_kls
from stages import moments, onpolicy, reference, tracking
from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    PAIRS,
    PAIRS_SCHEMA,
    PROMPTS,
    PROMPTS_SCHEMA,
    REVISIONS,
    REVISIONS_SCHEMA,
    SFT,
    WORK,
    digest,
    model_of,
    read_table,
    write_table,
)
from stages.models import load_policy, load_tokenizer
from stages.moments import measured
from stages.params import load_params
from stages.runs import bind, check_runs

NUM_PROMPTS, NUM_CANDIDATES = 6, 24
Train = Callable[..., Curve]
LENGTH = {"length": {"length": "characters"}}
FEATURES = {
    "short": {"pattern": "^.{0,4}$", "reads": "completion"},
    "letter": {"pattern": "[a-z]", "reads": "completion"},
}
RUNS: dict[str, dict[str, Any]] = {
    "f_dpg": {
        "loss": "f_dpg",
        "divergence": "0.5*log(t)**2",
        "target": {"reward": "length", "beta": 4.0},
        "refresh": 2,
    },
    "gdc": {
        "loss": "f_dpg",
        "divergence": "forward_kl",
        "target": {
            "moments": {"short": 0.35, "letter": 1.0},
            "features": FEATURES,
            "log_z": "global",
        },
        "baseline": "step",
    },
    "rloo": {"loss": "rloo", "beta": 4.0, "reward": "length"},
    "ppo": {"loss": "ppo", "beta": 4.0, "reward": "length", "refresh": 3},
}


@pytest.fixture
def trained(base: Path, write_params: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train run `x` for four steps of three prompts; returns its curve."""
    shutil.copytree(base, SFT)
    draw = random.Random(0)
    tokenizer = load_tokenizer(str(SFT))
    splits = ["train"] * NUM_PROMPTS + ["validation"] * 2
    prompts = [[0, *(draw.randrange(70, 90) for _ in range(3))] for _ in splits]
    texts = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    write_prompts(splits, prompts, texts)
    rows = [row for row in range(NUM_PROMPTS) for _ in range(NUM_CANDIDATES)]
    completions = [[draw.randrange(40, 110) for _ in range(draw.randint(1, 8))] for _ in rows]
    columns = {
        "prompt": rows,
        "text": tokenizer.batch_decode(completions, skip_special_tokens=True),
        "tokens": completions,
    }
    write_table(CANDIDATES, columns, CANDIDATES_SCHEMA)
    columns = {"prompt": [prompts[row] for row in rows], "completion": completions}
    write_table(COMPLETIONS, columns, COMPLETIONS_SCHEMA)
    pairs = {"split": ["train"], "chosen": [0], "rejected": [1], "preference": [1.0]}
    write_table(PAIRS, pairs, PAIRS_SCHEMA)
    write_table(REVISIONS, {name: [] for name in REVISIONS_SCHEMA.names}, REVISIONS_SCHEMA)
    write_params()
    reference.main()
    name_x(monkeypatch)

    def run(row: dict[str, Any], **changes: Any) -> Curve:
        defaults = {
            "runs": {"x": row},
            "rewards": LENGTH,
            "train.batch_size": 3,
            "train.num_epochs": 2,
            "train.learning_rate": 0.003,
            "compute.checkpoint_every": 1,
            "data.max_completion_tokens": 6,
            "watch.every": 2,
            "watch.num_generations": 2,
        }
        write_params(**defaults | changes)
        return train_x()

    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_the_same_bits_wherever_it_was_killed(
    name: str, trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = trained(RUNS[name])
    whole = outputs_of_x()
    assert len(curve) == 4
    assert digest(model_of("x") / "model.safetensors") != digest(SFT / "model.safetensors")
    metrics = ["samples/kl", "samples/entropy", "samples/self_bleu", "samples/distinct_2"]
    metrics += ["samples/ess_share", "target/kl_p_pi", "target/kl_pi_p", "target/tv", "target/js"]
    metrics += ["moments/short", "moments/letter"] if name == "gdc" else ["samples/reward"]
    for metric in metrics:
        assert all(math.isfinite(float(row[metric])) for row in curve), metric
    # Before the first step the policy is the reference.
    assert float(curve[0]["samples/kl"]) == pytest.approx(0, abs=1e-4)
    assert float(curve[0]["validation/kl"] or 0) == 0
    assert float(curve[1]["validation/kl"]) > 0
    # The state of the second step is saved; the third one's samples are drawn, and no more.
    drawn = onpolicy.Rounds._draw
    scored = onpolicy.token_logps

    def killed(policy: Any, *arguments: Any, **options: Any) -> Any:
        if len(list((WORK / "stages").glob("train-x/*/checkpoints/00000002"))):
            raise KeyboardInterrupt
        return scored(policy, *arguments, **options)

    monkeypatch.setattr(onpolicy, "token_logps", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(RUNS[name])
    monkeypatch.setattr(onpolicy, "token_logps", scored)
    rounds: list[int] = []
    monkeypatch.setattr(
        onpolicy.Rounds,
        "_draw",
        lambda self, first, path: (rounds.append(first), drawn(self, first, path))[1],
    )
    trained(RUNS[name])
    assert outputs_of_x() == whole
    # That of the third step is drawn already.
    assert rounds == [first for first in range(0, 4, RUNS[name].get("refresh", 1)) if first > 2]


def test_sigterm_in_a_round_of_several_steps_resumes_to_the_same_bits(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(RUNS["ppo"])
    whole = outputs_of_x()
    objective = onpolicy.objective

    def terminated(pair: Any, run: Any, target: Any, rounds: Any, step: int, cuts: Any) -> Any:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return objective(pair, run, target, rounds, step, cuts)

    monkeypatch.setattr(onpolicy, "objective", terminated)
    with pytest.raises(SystemExit):
        trained(RUNS["ppo"])
    monkeypatch.setattr(onpolicy, "objective", objective)
    trained(RUNS["ppo"])
    assert outputs_of_x() == whole


def test_samples_are_the_policys_own_and_moments_fit_on_the_candidates(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables: list[dict[str, list[Any]]] = []
    table_of = onpolicy.Rounds.table

    def seen(self: onpolicy.Rounds, step: int) -> dict[str, list[Any]]:
        tables.append(table_of(self, step))
        return tables[-1]

    monkeypatch.setattr(onpolicy.Rounds, "table", seen)
    curve = trained(RUNS["gdc"], **{"watch.every": None})
    # The first step's are the reference's, of three prompts.
    first = tables[0]
    assert len(first["text"]) == 12
    assert len(set(map(tuple, first["tokens"]))) > 6
    assert first["proposal_logp"] == pytest.approx(first["reference_logp"], abs=1e-4)
    sft, prompts = load_policy(str(SFT)), read_table(PROMPTS, PROMPTS_SCHEMA)["tokens"]
    with torch.no_grad():
        logps = token_logps(sft, [Row(prompts[first["prompt"][0]], first["tokens"][0])])
    assert first["proposal_logp"][0] == pytest.approx(logps[0].sum().item(), abs=1e-4)
    short = sum(len(text) <= 4 and "\n" not in text for text in first["text"]) / 12
    assert float(curve[0]["moments/short"]) == pytest.approx(short, abs=1e-3)
    # Of candidates that have a letter, as the factor wants.
    assert float(curve[0]["fit/moment/short"]) == pytest.approx(0.35, abs=1e-5)
    assert float(curve[0]["fit/moment/letter"]) == pytest.approx(1, abs=1e-12)
    assert float(curve[0]["fit/kl"]) > 0


def test_fresh_samples_say_where_the_policy_is_and_where_it_should_be(trained: Train) -> None:
    trained(RUNS["gdc"], **{"train.learning_rate": 1e-9, "watch.every": None})
    found = measured(load_params(), "x", 500)
    assert found["samples"] == 504  # as many of each of the prompts
    # The policy is still the reference, of which a policy that was trained is not far.
    assert found["kl_to_reference"]["mean"] == pytest.approx(0, abs=1e-4)
    assert found["target"]["moment/short"] == pytest.approx(0.35, abs=1e-5)
    still = found["policy"]["letter"]
    assert 0 < still["standard_error"] < 0.1
    trained(RUNS["gdc"], **{"train.learning_rate": 0.02, "watch.every": None})
    moved = measured(load_params(), "x", 500)
    assert moved["kl_to_reference"]["mean"] > 5 * moved["kl_to_reference"]["standard_error"]
    assert moved["policy"]["letter"]["mean"] > still["mean"] + 3 * still["standard_error"]


def test_the_kl_of_fresh_samples_is_that_of_the_policy_to_the_reference(
    trained: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(RUNS["gdc"], **{"train.learning_rate": 0.1, "watch.every": None})
    rows: list[Row] = []
    sampler = moments.sampler

    def recorded(*arguments: Any) -> Callable[..., list[list[int]]]:
        complete = sampler(*arguments)

        def drawn(asked: list[list[int]], *rest: Any, **options: Any) -> list[list[int]]:
            tokens = complete(asked, *rest, **options)
            rows.extend(map(Row, asked, tokens))
            return tokens

        return drawn

    monkeypatch.setattr(moments, "sampler", recorded)
    found = measured(load_params(), "x", 1000)["kl_to_reference"]["mean"]
    policy, sft = load_policy(str(model_of("x"))), load_policy(str(SFT))
    with torch.no_grad():
        ours, theirs = token_logps(policy, rows), token_logps(sft, rows)
        _, reverse = token_logps_and_kls(policy, sft, rows)
    moved = torch.stack([our.sum() - their.sum() for our, their in zip(ours, theirs, strict=True)])
    error = moved.std().item() / len(moved) ** 0.5
    assert found == pytest.approx(moved.mean().item(), abs=3 * error)
    # The other direction is told apart.
    assert abs(torch.stack([kls.sum() for kls in reverse]).mean().item() - found) > 5 * error


def test_a_baseline_changes_what_is_learned_and_nothing_before(trained: Train) -> None:
    curves = {
        name: trained(RUNS["f_dpg"] | {"baseline": name}, **{"watch.every": None})
        for name in ("leave_one_out", "step", "none")
    }
    measures = [key for key in curves["none"][0] if key.startswith(("samples/", "target/", "fit/"))]
    first = [[curve[0][key] for key in measures] for curve in curves.values()]
    assert measures
    assert first[0] == first[1] == first[2]
    assert len({curve[-1]["samples/kl"] for curve in curves.values()}) == 3


def test_every_measure_of_a_curve_is_delivered_to_mlflow(
    trained: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    curve = trained(RUNS["gdc"])
    assert tracking.deliver_all() == 0
    client = tracking.connect()
    (run,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    for key in ("moments/short", "target/kl_p_pi", "target/js", "samples/self_bleu", "fit/kl"):
        kept = {m.step: m.value for m in client.get_metric_history(run.info.run_id, key)}
        assert kept == {int(row["step"]): float(row[key]) for row in curve if row[key]}, key


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"loss": "rloo", "beta": 0.1}, {}, "runs.x.reward: is missing"),
        ({"loss": "f_dpg", "divergence": "forward_kl"}, {}, "runs.x.target: is missing"),
        (RUNS["rloo"] | {"reward": "vadr"}, {}, "Did you mean 'vader'"),
        (RUNS["rloo"] | {"num_completions": 1}, {}, "runs.x.num_completions: "),
        (RUNS["rloo"] | {"baseline": "none"}, {}, "runs.x.baseline: no such parameter of 'rloo'"),
        (RUNS["rloo"] | {"sft_weight": 0.1}, {}, "runs.x.sft_weight: is of chosen completions"),
        (RUNS["rloo"], {"compute.num_processes": 2}, "got compute.num_processes 2; set it to 1"),
        (RUNS["rloo"], {"sample.temperature": 0.7}, "got sample.temperature 0.7; set it to 1"),
        (RUNS["rloo"] | {"select": "validation/loss"}, {}, "reads a loss on pairs"),
        (RUNS["f_dpg"] | {"target": {"beta": 1.0}}, {}, "neither a tilt nor constraints"),
        (RUNS["f_dpg"] | {"target": {"reward": "length"}}, {}, "runs.x.target.beta: is missing"),
        (
            RUNS["gdc"] | {"target": {"moments": {"a": 0.5}, "features": {"b": {"words": ["c"]}}}},
            {},
            r"moments and features are not of the same names, got \['a', 'b'\]",
        ),
        (
            RUNS["gdc"] | {"target": {"moments": {"a": 0.5}, "features": {"a": {"vadr_above": 0}}}},
            {},
            "runs.x.target.features.a: no such reward, got 'vadr'",
        ),
    ],
)
def test_a_run_that_says_too_little_or_too_much_is_refused_by_check(
    row: dict[str, Any], changes: dict[str, Any], message: str, write_params: Callable[..., Any]
) -> None:
    write_params(**{"runs": {"x": row}, "rewards": LENGTH, **changes})
    with pytest.raises(ValueError, match=message):
        check_runs(load_params())


def test_a_threshold_on_a_reward_may_be_written_in_one_word(
    write_params: Callable[..., Any],
) -> None:
    features = {"positive": {"vader_above": 0.3}}
    target = {"moments": {"positive": 0.8}, "features": features}
    write_params(runs={"x": RUNS["gdc"] | {"target": target}})
    draws = bind(load_params(), "x").draws
    assert draws is not None
    assert draws.target.features == features


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"moments": {"x": 0.5}, "features": {"x": {"words": ["zebra"]}}},
            r"runs\.x\.target\.moments\.x: never occurs in 144 samples",
        ),
        (
            {"moments": {"x": 1.0}, "features": {"x": {"words": ["zebra"]}}},
            r"runs\.x\.target\.moments\.x: never occurs in 144 samples",
        ),
        (
            {"moments": {"x": 99.0}, "features": {"x": {"length": "characters"}}},
            r"runs\.x\.target\.moments\.x: out of the reference's reach, got a moment of 99",
        ),
        ({"reward": "length", "beta": 0.01, "log_z": "global"}, r"runs\.x\.target: too far"),
    ],
)
def test_a_target_out_of_reach_is_refused_before_the_first_step(
    target: dict[str, Any], message: str, trained: Train
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(RUNS["gdc"] | {"target": target})
