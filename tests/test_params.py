"""Laws of params.yaml: what a person writes wrong is refused with its place, value and remedy."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, shipped_params

from prefopt.losses import LOSSES
from prefopt.proofs import cases
from stages import check
from stages.params import checked, load_params, load_pretrain, read_yaml
from stages.runs import ON_POLICY, TRAINABLE, bind, check_runs, hyperparameter_schema
from stages.training import optimisation

Write = Callable[..., dict[str, Any]]


def refused(match: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(match))


def test_the_shipped_params_bind_every_run() -> None:
    params = load_params(PROJECT / "params.yaml")
    check_runs(params)
    assert list(params.runs) == list(shipped_params()["runs"])


def test_every_recipe_of_the_base_is_sound() -> None:
    assert load_pretrain(PROJECT / "recipes" / "base.yaml").num_steps > 0


def test_a_bound_run_is_its_loss_with_its_hyperparameters(write_params: Write) -> None:
    written = {"loss": "dpo", "beta": 0.3, "sft_weight": 0.2, "learning_rate": 0.5, "num_epochs": 7}
    write_params(**{"runs.x": written})
    params = load_params()
    run = bind(params, "x")
    assert run.loss is LOSSES["dpo"]
    assert run.hyperparameters == {"beta": 0.3, "label_smoothing": 0.0}
    assert run.sft_weight == 0.2
    assert (run.optimiser.learning_rate, run.optimiser.num_epochs) == (0.5, 7)
    assert run.optimiser.batch_size == params.train.batch_size
    assert run.written == written


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("squared_log", "squared_log"),
        ({"alpha": 0.5}, "alpha(0.5)"),
        ({"squared_log": 1}, "squared_log(1.0)"),
        ("0.5*log(t)**2", "0.5*log(t)**2"),
    ],
)
def test_a_divergence_is_written_by_name_with_its_parameter_or_as_a_formula(
    write_params: Write, written: Any, name: str
) -> None:
    write_params(**{"runs.x": {"loss": "f_dpo", "beta": 0.1, "divergence": written}})
    assert bind(load_params(), "x").hyperparameters["divergence"].name == name


def test_every_loss_that_can_train_binds_from_its_signature(write_params: Write) -> None:
    special = {"divergence": "squared_log", "psi": "identity"}
    samples = {
        "Samples": {"target": {"reward": "vader", "beta": 0.1}},
        "Rollouts": {"reward": "vader"},
    }
    for loss in LOSSES.values():
        values = cases(loss)[0].hyperparameters
        row = {name: special.get(name, value) for name, value in values.items()}
        row |= samples.get(loss.evidence, {})
        evidence = {"revision.train": True, "label.num_ranked": 4}
        write_params(**{"runs": {"x": {"loss": loss.name, **row}}, **evidence})
        if loss.evidence in (*TRAINABLE, *ON_POLICY):
            assert set(bind(load_params(), "x").hyperparameters) == set(values)
        else:
            with refused(f"runs.x.loss: reads {loss.evidence}, which no stage makes, got '"):
                check_runs(load_params())


def test_the_optimisation_is_the_section_of_that_name(write_params: Write) -> None:
    write_params(**{"train.max_grad_norm": 3.0, "train.schedule": "cosine"})
    optimiser = load_params().train
    found = optimisation(optimiser)
    for name in ("learning_rate", "schedule", "warmup", "weight_decay", "max_grad_norm"):
        assert getattr(found, name) == getattr(optimiser, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train.lerning_rate": 1},
            "train.lerning_rate: no such key, got 1; known: learning_rate, ",
        ),
        ({"train.lerning_rate": 1}, "Did you mean 'learning_rate'?"),
        ({"optimizer": {}}, "optimizer: no such key, got {}; known: recipe, base, "),
        ({"compute.seed": -1}, "compute.seed: must be greater than or equal to 0, got -1"),
        ({"compute.seed": 1.5}, "compute.seed: must be a valid integer, got 1.5"),
        (
            {"compute.dtype": "float8"},
            "compute.dtype: must be 'float32' or 'bfloat16', got 'float8'",
        ),
        ({"sft.learning_rate": 0}, "sft.learning_rate: must be greater than 0, got 0"),
        (
            {"sft.learning_rate": float("inf")},
            "sft.learning_rate: must be a finite number, got inf",
        ),
        ({"sft.warmup": 1}, "sft.warmup: must be less than 1, got 1"),
        (
            {"sample.num_completions": 1},
            "sample.num_completions: must be greater than or equal to 2",
        ),
        (
            {"label.method": "best"},
            "label.method: must be 'best_against_worst', 'bradley_terry' or",
        ),
        ({"evaluation.judges": []}, "evaluation.judges: "),
        (
            {"watch.select": "validation/lose"},
            "watch.select: must be 'last', 'validation/loss', 'validation/rewards/accuracies' or "
            "'validation/rewards/margins', got 'validation/lose'",
        ),
        ({"watch.every": 0}, "watch.every: must be greater than or equal to 1, got 0"),
        ({"watch.max_kl": 0}, "watch.max_kl: must be greater than 0, got 0"),
        (
            {"evaluation.split": "train"},
            "evaluation.split: must be 'validation' or 'test', got 'train'",
        ),
        (
            {"evaluation.judges": ["textblob"]},
            "evaluation.judges: lacks 'vader', which labels the pairs, got ['textblob']; add it",
        ),
        (
            {"evaluation.judges": ["vader", "vader"]},
            "evaluation.judges: names a judge twice, got ['vader', 'vader']; name each once",
        ),
        ({"runs": {}}, "runs: "),
        ({"runs": {"../x": {"loss": "dpo", "beta": 1.0}}}, "runs.../x"),
        (
            {"runs": {"sft": {"loss": "dpo", "beta": 1.0}}},
            "runs.sft: 'sft' is the reference's own name",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_section_with_a_mistake_is_refused(
    write_params: Write, changes: dict[str, Any], message: str
) -> None:
    write_params(**changes)
    with refused(message):
        load_params()


LORA = {"rank": 2, "alpha": 4, "targets": "all-linear"}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LORA | {"rnak": 2}, "train.lora.rnak: no such key, got 2; known: rank, alpha, targets"),
        (LORA | {"rank": 0}, "train.lora.rank: must be greater than or equal to 1, got 0"),
        (LORA | {"targets": "all"}, "train.lora.targets: must be all-linear or a list of "),
        (LORA | {"dropout": 0.1}, "train.lora.dropout: no such key, got 0.1"),
        ({"rank": 2, "alpha": 4}, "train.lora.targets: is missing"),
    ],
)
def test_adapters_with_a_mistake_are_refused(
    write_params: Write, lora: dict[str, Any], message: str
) -> None:
    write_params(**{"train.lora": lora})
    with refused(message):
        load_params()


def test_a_run_may_train_adapters_where_others_train_all(write_params: Write) -> None:
    dpo = {"loss": "dpo", "beta": 0.1}
    write_params(runs={"whole": dpo, "adapted": dpo | {"lora": LORA}})
    params = load_params()
    lora = bind(params, "adapted").optimiser.lora
    assert lora is not None
    assert lora.model_dump() == LORA
    assert bind(params, "whole").optimiser.lora is None
    write_params(**{"train.lora": LORA, "runs": {"whole": dpo | {"lora": None}}})
    assert bind(load_params(), "whole").optimiser.lora is None


def test_adapters_beside_top_layers_are_refused(write_params: Write) -> None:
    write_params(**{"train.lora": LORA, "train.top_layers": 2})
    with refused("train: top_layers: adapters train in the place of layers, got 2 with lora"):
        load_params()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft.top_layers": 9}, "top_layers: more than the model has, got 9; at most 2"),
        (
            {"runs": {"x": {"loss": "dpo", "beta": 0.1, "lora": LORA | {"targets": ["q_prj"]}}}},
            "lora.targets: not of this model, got ['q_prj']",
        ),
    ],
)
def test_what_the_base_cannot_train_is_refused_before_its_weights_are_read(
    base: Path, write_params: Write, changes: dict[str, Any], message: str
) -> None:
    write_params(**changes)
    with refused(message):
        check.main()


@pytest.mark.parametrize(
    ("name", "run", "message"),
    [
        ("squared", {"loss": "f_dpo", "beta": -0.1, "divergence": "squared_log"},
         "runs.squared.beta: must be greater than 0, got -0.1"),
        ("ipo", {"loss": "ipo", "bata": 0.1, "tau": 0.1},
         "runs.ipo.bata: no such parameter of 'ipo'"),
        ("ipo", {"loss": "ipo", "tua": 0.1}, "it reads: tau; any run may also set learning_rate, "),
        ("ipo", {"loss": "ipo", "tua": 0.1}, "Did you mean 'tau'?"),
        ("ipo", {"loss": "ipo", "tau": 0.1, "beta": 0.1},
         "runs.ipo.beta: no such parameter of 'ipo'"),
        ("x", {"loss": "dpoo", "beta": 0.1},
         "runs.x.loss: no such loss, got 'dpoo'; known: dpo, rdpo, ipo, "),
        ("x", {"loss": "dpoo", "beta": 0.1}, "Did you mean 'dpo'?"),
        ("x", {"beta": 0.1}, "runs.x.loss: no such loss, got None; known: dpo"),
        ("x", {"loss": ["dpo"], "beta": 0.1}, "runs.x.loss: no such loss, got ['dpo']; known: dpo"),
        ("x", {"loss": "f_dpo", "beta": 0.1, "divergence": "foo"},
         "runs.x.divergence: unknown divergence 'foo'; known: reverse_kl, forward_kl, "),
        ("x", {"loss": "f_dpo", "beta": 0.1, "divergence": {"alpha": 2.0}},
         "runs.x.divergence: alpha must lie in (0, 1), got 2.0"),
        ("x", {"loss": "f_dpo", "beta": 0.1, "divergence": "(t-1)**2"},
         "runs.x.divergence: '(t-1)**2' is not DPO-inducing: f'(0+) = -2 is finite, so some"),
        ("x", {"loss": "f_dpo", "beta": 0.1, "divergence": "total_variation"},
         "runs.x.divergence: 'total_variation' is not DPO-inducing: f'(0+) = -0.5 is finite"),
        ("x", {"loss": "f_dpo", "beta": 0.1, "divergence": "__import__('os').getcwd()"},
         "runs.x.divergence: "),
        ("x", {"loss": "psi_po", "tau": 0.1, "psi": "q**2"},
         "runs.x.psi: psi 'q**2' is not odd about 1/2: psi(q) + psi(1 - q) is not constant"),
        ("x", {"loss": "psi_po", "tau": 0.1, "psi": "logit"},
         "runs.x.psi: psi 'logit' is not finite on [0.0, 1]"),
        ("x", {"loss": "psi_po", "tau": 0.1, "psi": {"logit": 0.01}},
         "runs.x.psi: 'logit, clipped at 0.01' needs soft preferences, got labels that are"),
        ("x", {"loss": "dpo", "beta": 0.1, "sft_weight": -1},
         "runs.x.sft_weight: must be greater than or equal to 0, got -1"),
        ("x", {"loss": "f_dpo", "beta": 0.1}, "runs.x.divergence: is missing, got nothing; add it"),
        ("x", {"loss": "dpo"}, "runs.x.beta: is missing, got nothing; add it"),
        ("x", {"loss": "exo_pref", "beta": 0.1, "label_smoothing": 0.0},
         "runs.x.label_smoothing: must be greater than 0, got 0.0"),
        ("x", {"loss": "dpo", "beta": 0.1, "label_smoothing": 0.5},
         "runs.x.label_smoothing: must be less than 0.5, got 0.5"),
        ("x", {"loss": "dpo", "beta": "much"}, "runs.x.beta: must be a valid number"),
        ("x", {"loss": "dpo", "beta": 0.1, "num_epochs": 0},
         "runs.x.num_epochs: must be greater than or equal to 1, got 0"),
    ],
)  # fmt: skip
def test_a_run_with_a_mistake_is_refused(
    write_params: Write, name: str, run: dict[str, Any], message: str
) -> None:
    write_params(runs={name: run})
    with refused(message):
        check_runs(load_params())


def test_a_loss_that_compares_pairs_is_refused_batches_of_one(write_params: Write) -> None:
    write_params(**{"train.batch_size": 1, "runs": {"x": {"loss": "kto", "beta": 0.1}}})
    with refused("runs.x: 'kto' compares with another pair's completion, got a batch_size of 1"):
        check_runs(load_params())


def test_a_psi_of_soft_preferences_is_taken_where_labels_have_them(write_params: Write) -> None:
    run = {"loss": "psi_po", "tau": 0.1, "psi": {"logit": 0.01}}
    write_params(**{"label.method": "bradley_terry", "runs": {"x": run}})
    check_runs(load_params())


@pytest.mark.parametrize("loss", ["f_dpg", "f_po"])
def test_a_divergence_that_does_not_induce_dpo_is_taken_where_it_may_be(loss: str) -> None:
    schema = hyperparameter_schema(LOSSES[loss])
    plain = {"beta": 0.1, "temperature": 0.1} if loss == "f_po" else {}
    assert checked(schema, {"divergence": "(t-1)**2", **plain}, loss).divergence.argmin == 1


def test_all_mistakes_are_told_at_once(write_params: Write) -> None:
    write_params(**{"compute.seed": -1, "train.num_epochs": 0})
    with pytest.raises(ValueError, match=r"(?s)compute\.seed: .*\ntrain\.num_epochs: "):
        load_params()


def test_a_missing_section_is_refused(workplace: Path) -> None:
    text = (PROJECT / "params.yaml").read_text().replace("recipe: reviews\n", "")
    Path("params.yaml").write_text(text)
    with refused("recipe: is missing, got nothing; add it"):
        load_params()


def test_a_run_that_is_not_there_is_refused(write_params: Write) -> None:
    write_params()
    with refused("runs.dop: no such run, got 'dop'; known: "):
        bind(load_params(), "dop")


def test_a_yaml_alias_is_refused(workplace: Path) -> None:
    text = (PROJECT / "params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("seed: 0", "seed: &zero 0", 1) + "again: *zero\n")
    with refused("params.yaml: has a YAML alias, got '*'; write the value out"):
        load_params()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "params.yaml: not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "params.yaml: not valid YAML"),
        ("", "params.yaml: must be a valid dictionary"),
        ("#" * 1_000_001, "params.yaml: too large, got 1000001 bytes"),
    ],
)
def test_a_file_that_is_no_parameters_is_refused(workplace: Path, text: str, message: str) -> None:
    Path("params.yaml").write_text(text)
    with refused(message):
        load_params()


def test_a_missing_file_is_refused(workplace: Path) -> None:
    with refused("params.yaml: no such file"):
        read_yaml(Path("params.yaml"))


def test_a_number_in_scientific_notation_is_a_number(workplace: Path) -> None:
    """YAML 1.1 reads 1e-4 as a word."""
    text = (PROJECT / "params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("learning_rate: 0.0005", "learning_rate: 5e-4"))
    assert load_params().sft.learning_rate == 5e-4


def test_a_run_may_override_what_is_kept_of_it(write_params: Write) -> None:
    written = {"loss": "dpo", "beta": 0.1, "select": "validation/loss", "max_kl": 5}
    write_params(**{"runs.x": written})
    watch = bind(load_params(), "x").watch
    assert (watch.select, watch.max_kl) == ("validation/loss", 5.0)
    assert watch.every == load_params().watch.every


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"watch.max_kl": 1.0, "watch.num_generations": 0}, "max_kl is estimated from completions"),
        ({"watch.max_kl": 1.0, "watch.every": None}, "max_kl is estimated from completions"),
        ({"watch.select": "validation/loss", "watch.every": None}, "reads validation pairs"),
        (
            {"watch.select": "validation/loss", "sample.num_validation_prompts": 0},
            "reads validation pairs at looks, got watch.every 10 and sample.num_validation_prompts "
            "0; set both, or select to last",
        ),
        (
            {"watch.select": "validation/loss", "evaluation.split": "validation"},
            "chooses a model by the validation split, got evaluation.split validation",
        ),
    ],
)
def test_a_choice_among_looks_that_cannot_be_made_is_refused(
    write_params: Write, changes: dict[str, Any], message: str
) -> None:
    write_params(**changes)
    with refused(message):
        check_runs(load_params())


def test_a_runs_seed_is_its_own_or_the_experiments(write_params: Write) -> None:
    rows = {"a": {"loss": "dpo", "beta": 0.1}, "b": {"loss": "dpo", "beta": 0.1, "seed": 7}}
    write_params(**{"compute.seed": 3, "runs": rows})
    assert [bind(load_params(), name).seed for name in rows] == [3, 7]
    write_params(runs={"a": {"loss": "dpo", "beta": 0.1, "seed": -1}})
    with refused("runs.a.seed: must be greater than or equal to 0, got -1; change it there"):
        check_runs(load_params())
