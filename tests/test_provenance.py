"""Records of lineage: others read them, nobody changes them unseen; and scheduled audits."""

import hashlib
import json
import os
import shutil
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prov
import pytest
import test_audit
import yaml
from conftest import PROJECT
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf.json_format import ParseDict
from huggingface_hub import ModelCard
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage
from jsonschema import Draft4Validator
from prov.model import ProvDocument
from test_audit import METRICS, RANKED, Undo, flip, git, other_digest, replace
from test_flows import api, last_flow_run, run
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flows import signing
from flows.audit import Audit, audit
from flows.cli import app
from flows.provenance import BILL, CARD, PROV, export, provenance
from flows.statements import FOLDER, KNOWN, SUFFIX

# Fixtures of the other module: the pipeline is made once for both.
project = test_audit.project
undo = test_audit.undo

LABEL = FOLDER / f"label{SUFFIX}"


@pytest.fixture(autouse=True)
def without_keys_and_statements(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (signing.SIGNING_KEY, signing.PUBLIC_KEY):
        monkeypatch.delenv(name, raising=False)
    yield
    shutil.rmtree(project / FOLDER, ignore_errors=True)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def grave(found: Audit) -> list[tuple[str, str, str]]:
    """Findings that are no notes: severity, check, artefact."""
    return [
        (each.severity, each.check, each.artefact)
        for each in found.findings
        if each.severity != "note"
    ]


def test_statements_are_in_totos_and_name_what_lies_there(project: Path) -> None:
    found = provenance("", FOLDER, sign=False)
    assert {path.name for path in FOLDER.glob(f"*{SUFFIX}")} == {
        f"{n}{SUFFIX}" for n in found.stages
    }
    for path in FOLDER.glob(f"*{SUFFIX}"):
        tree = read(path)
        message = ParseDict(tree, StatementMessage())
        Statement.copy_from_pb(message).validate()
        assert tree["predicateType"] == "https://slsa.dev/provenance/v1"
        predicate = ParseDict(tree["predicate"], Provenance())
        assert predicate.build_definition.build_type == "urn:prefopt:stage:v1"
        assert predicate.run_details.builder.id == "urn:prefopt:dvc"
        commit, *dependencies = tree["predicate"]["buildDefinition"]["resolvedDependencies"]
        assert commit["digest"] == {"gitCommit": git(project, "rev-parse", "HEAD").strip()}
        for each in [*tree["subject"], *dependencies]:
            assert each["digest"]["sha256"] == sha256(each["name"])
    tree = read(FOLDER / f"train@ranked{SUFFIX}")
    subjects = [each["name"] for each in tree["subject"]]
    assert f"{RANKED}/model.safetensors" in subjects
    assert "artefacts/curves/ranked.csv" in subjects
    given = tree["predicate"]["buildDefinition"]["externalParameters"]
    assert given["params"]["params.yaml:runs.ranked"] == test_audit.finished.RUNS["ranked"]
    assert grave(audit()) == []


def test_the_graph_is_prov_and_keeps_what_made_what(project: Path) -> None:
    found = provenance("evaluate@dpo", FOLDER, sign=False)
    tree = read(FOLDER / PROV)
    schema = Path(prov.__file__).parent / "tests/schemas/prov-json.schema.json"
    assert list(Draft4Validator(read(schema)).iter_errors(tree)) == []
    graph = ProvDocument.deserialize(FOLDER / PROV)
    assert ProvDocument.deserialize(content=graph.get_provn(), format="provn") == graph
    assert len(tree["activity"]) == len(found.stages)
    stage = "stage:evaluate@dpo"
    read_by = {row["prov:entity"] for row in tree["used"].values() if row["prov:activity"] == stage}
    inputs = found.lineage.stages["evaluate@dpo"].inputs
    assert read_by == {f"path:{path}" for path in inputs}
    made_by = {row["prov:entity"]: row["prov:activity"] for row in tree["wasGeneratedBy"].values()}
    assert made_by[f"path:{METRICS}"] == stage
    members = {row["prov:entity"] for row in tree["hadMember"].values()}
    assert "path:artefacts/rewards/learned" in members  # The judge reads the folder of all rewards.


def test_the_bill_of_materials_is_cyclonedx_and_counts_every_file(project: Path) -> None:
    found = provenance("", FOLDER, sign=False)
    text = (FOLDER / BILL).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    tree = json.loads(text)
    components = {each["bom-ref"]: each for each in tree["components"]}
    kinds = {path: each["type"] for path, each in components.items()}
    models = {path for path, kind in kinds.items() if kind == "machine-learning-model"}
    runs = test_audit.finished.RUNS
    assert models == {
        "data/base",
        "artefacts/rewards/learned",
        *(f"artefacts/models/{name}" for name in ("sft", *runs)),
    }
    assert kinds["pkg:pypi/transformers@5.23.0"] == "library"
    for stage in found.lineage.stages.values():
        assert set(stage.outputs) <= set(components)
    (weights,) = (
        part for part in components[RANKED]["components"] if part["name"].endswith(".safetensors")
    )
    assert weights["hashes"][1] == {"alg": "SHA-256", "content": sha256(weights["name"])}
    rate = read(Path("artefacts/metrics/ranked.json"))["win_rate"]["sft"]["vader"]
    told = components[RANKED]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [each["value"] for each in told if each["slice"] == "over sft by vader"] == [
        str(rate["value"])
    ]
    needs = {each["ref"]: set(each["dependsOn"]) for each in tree["dependencies"]}
    assert {"artefacts/rankings.parquet", "artefacts/models/sft"} <= needs[RANKED]
    assert needs["artefacts/prompts.parquet"] >= {"data/reviews.json", "artefacts/checked.txt"}


def test_nothing_is_recorded_that_an_audit_does_not_hold(undo: Undo) -> None:
    flip(f"{RANKED}/model.safetensors")(undo)
    with pytest.raises(ValueError, match=r"got failed: artefacts/models/ranked/model.safetensors"):
        provenance("", FOLDER, sign=False)
    assert not FOLDER.exists()


def test_records_of_a_past_commit_are_refused(project: Path) -> None:
    with pytest.raises(ValueError, match="of the working tree alone, got 'HEAD'"):
        provenance("HEAD", FOLDER, sign=False)


def test_a_content_is_hashed_once_and_again_only_if_asked(undo: Undo) -> None:
    provenance("", FOLDER, sign=False)
    known = undo.keep(KNOWN)
    md5 = hashlib.md5(Path(METRICS).read_bytes()).hexdigest()
    known.write_text(json.dumps({**read(known), md5: "0" * 64}))
    says = ("failed", "statement: subject/1/digest/sha256", f"{FOLDER}/evaluate@dpo{SUFFIX}")
    assert says in grave(audit("evaluate@dpo"))
    assert grave(audit("evaluate@dpo", deep=True)) == []


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Files of a private and its public key."""
    private = Ed25519PrivateKey.generate()
    pems = (
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )
    paths = folder / f"{name}.pem", folder / f"{name}.pub"
    for path, pem in zip(paths, pems, strict=True):
        path.write_bytes(pem)
    return paths


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A key pair that signs and verifies."""
    private, public = key_pair(tmp_path, "ours")
    monkeypatch.setenv(signing.SIGNING_KEY, str(private))
    monkeypatch.setenv(signing.PUBLIC_KEY, public.read_text())
    return private, public


def test_signed_statements_verify_and_hold_no_private_key(keys: tuple[Path, Path]) -> None:
    provenance("label", FOLDER, sign=True)
    assert grave(audit("label")) == []
    envelope = read(LABEL)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    payload = b64decode(envelope["payload"])
    ParseDict(json.loads(payload), StatementMessage())
    # As DSSE's specification has it, without the library that signed.
    kind = envelope["payloadType"].encode()
    said = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    public = load_pem_public_key(keys[1].read_bytes())
    assert isinstance(public, Ed25519PublicKey)
    public.verify(b64decode(envelope["signatures"][0]["sig"]), said)
    secret = keys[0].read_text().splitlines()[1]
    assert not any(secret in path.read_text() for path in FOLDER.iterdir())
    again = LABEL.read_bytes()
    provenance("label", FOLDER, sign=True)
    assert LABEL.read_bytes() == again


def by_another_key(folder: Path) -> None:
    os.environ[signing.SIGNING_KEY] = str(key_pair(folder, "theirs")[0])
    provenance("label", FOLDER, sign=True)


def with_another_payload(_folder: Path) -> None:
    other = signing.opened(read(LABEL)).replace(".parquet", ".parquets", 1)
    LABEL.write_text(json.dumps(read(LABEL) | {"payload": b64encode(other.encode()).decode()}))


def without_its_envelope(_folder: Path) -> None:
    LABEL.write_text(signing.opened(read(LABEL)))


def with_another_signature(_folder: Path) -> None:
    envelope = read(LABEL)
    (signature,) = envelope["signatures"]
    signature["sig"] = "A" * 86 + "=="
    LABEL.write_text(json.dumps(envelope))


def cut_short(_folder: Path) -> None:
    LABEL.write_text(LABEL.read_text()[:-40])


def of_nobody(_folder: Path) -> None:
    LABEL.rename(LABEL.with_name(f"label@dpo{SUFFIX}"))


def of_another_stage(_folder: Path) -> None:
    shutil.copyfile(FOLDER / f"sft{SUFFIX}", LABEL)


def by_an_unknown_key(_folder: Path) -> None:
    del os.environ[signing.PUBLIC_KEY]


# What is done to a signed statement -> severity and check of the finding that names it.
FORGERIES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a signature of another key": (by_another_key, "failed", "signature"),
    "another payload": (with_another_payload, "failed", "signature"),
    "no signature": (without_its_envelope, "failed", "signature"),
    "a signature of zeros": (with_another_signature, "failed", "signature"),
    "cut short": (cut_short, "failed", "statement: all"),
    "a stage that is none": (of_nobody, "failed", "statement: all"),
    "another stage's": (of_another_stage, "failed", "statement: "),
    "no public key": (by_an_unknown_key, "unknown", "signature"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_statement_is_named(name: str, keys: tuple[Path, Path], tmp_path: Path) -> None:
    forge, severity, check = FORGERIES[name]
    provenance("label", FOLDER, sign=True)
    forge(tmp_path)
    found = audit("label")
    named = [said for said, of, where in grave(found) if of.startswith(check) and "label" in where]
    assert severity in named, "\n".join(map(str, found.findings))
    assert found.exit_code == (1 if severity == "failed" else 2)


# What is changed in an unsigned statement -> the finding that names it.
CHANGES = {
    "digest": (lambda text: text.replace('"sha256": "', '"sha256": "0', 1), "failed", "statement"),
    "parameter": (lambda text: text.replace('"vader"', '"textblob"', 1), "failed", "statement"),
    "lineage": (lambda text: text.replace('"lineage": "', '"lineage": "0'), "failed", "statement"),
    "commit": (
        lambda text: text.replace('"gitCommit": "', f'"gitCommit": "{other_digest}'),
        "unknown",
        "commit of the statement",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_statement_is_named(name: str, project: Path) -> None:
    change, severity, check = CHANGES[name]
    provenance("label", FOLDER, sign=False)
    LABEL.write_text(change(LABEL.read_text()))
    (named,) = grave(audit("label"))
    assert (named[0], named[2]) == (severity, str(LABEL))
    assert named[1].startswith(check)


def test_a_statement_of_an_older_run_is_stale(undo: Undo) -> None:
    provenance("label", FOLDER, sign=False)
    replace("stages/train.py", "NUM_AUDITED = 8", "NUM_AUDITED = 9", committed=True)(undo)
    assert grave(audit("label")) == []  # Another commit, the same code of these stages.
    assert grave(audit("train@dpo"))[0][:2] == ("failed", "source")


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        (signing.SIGNING_KEY, "", "a PEM text or the path"),
        (signing.SIGNING_KEY, "canary-canary", "a PEM text or the path"),
        (signing.SIGNING_KEY, "-----BEGIN PRIVATE KEY-----\ncanary\n", "an unencrypted private"),
        (signing.PUBLIC_KEY, "-----BEGIN PUBLIC KEY-----\ncanary\n", "a public key in PEM"),
    ],
)
def test_a_wrong_key_is_refused_and_not_shown(
    name: str, text: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name}: it is not {wanted}") as refused:
        signing.signer() if name == signing.SIGNING_KEY else signing.public_key()
    assert "canary" not in str(refused.value)
    assert refused.value.__suppress_context__


def test_an_exported_model_has_its_card_and_its_records(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "handed" / "ranked"
    found = export("ranked", out, sign=False)
    for file in Path(RANKED).iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    AutoModelForCausalLM.from_pretrained(out)
    card = ModelCard.load(out / CARD)
    assert card.data.tags == ["prefopt", "exo_rw"]
    metrics = read(Path("artefacts/metrics/ranked.json"))
    rates = [rate for by_judge in metrics["win_rate"].values() for rate in by_judge.values()]
    assert [each.metric_value for each in card.data.eval_results] == [r["value"] for r in rates]
    for rate in rates:
        row = f"| {rate['value']:.3f} | {rate['low']:.3f} to {rate['high']:.3f} | 16 |"
        assert row in card.text
    for said in (
        "| `temperature` | `0.1` |",
        "| `learning_rate` | `0.0006` |",
        f"`{sha256(f'{RANKED}/model.safetensors')}`",
        found.commit,
        found.lineage.digests["train@ranked"],
        "`data/reviews.json`",
        "`vader` agrees with 1.000",
        "It labelled the training pairs, so it is no independent witness.",
    ):
        assert said in card.text
    for sentence in [each["sentence"] for each in metrics["findings"] if each["level"] != "fine"]:
        assert sentence[1:] in card.text
    assert read(out / FOLDER / f"evaluate@ranked{SUFFIX}")["predicateType"]
    again = tmp_path / "again"
    export("ranked", again, sign=False)
    files = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    assert all((again / file).read_bytes() == (out / file).read_bytes() for file in files)
    with pytest.raises(ValueError, match="it is there already"):
        export("ranked", out, sign=False)
    assert list(tmp_path.rglob(".ranked-*")) == []


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ("dpo", "Adapters for the SFT policy trained with the objective `dpo`"),
        ("best_of_2", "of 2 completions that it draws, the one with the highest\n`vader` reward"),
        ("best_of_2", "KL to the reference at most 0.19 nats"),
        ("online", "trained with the objective `rloo`"),
    ],
)
def test_a_card_says_what_kind_of_run_it_is(
    run: str, says: str, project: Path, tmp_path: Path
) -> None:
    export(run, tmp_path / run, sign=False)
    assert says in ModelCard.load(tmp_path / run / CARD).text


def test_what_was_not_evaluated_is_not_exported(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sft: no run that was evaluated"):
        export("sft", tmp_path / "sft", sign=False)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["provenance", "label", "--out", "{out}"], 0, "5 statements of commit"),
        (["provenance", "label", "--out", "{out}", "--sign"], 1, "PREFOPT_SIGNING_KEY: it is not"),
        (["export", "dpo", "{out}/dpo"], 0, "dpo of commit"),
        (["audit", "label", "--picture", "{out}/a.png"], 1, "--picture: a page or an SVG is drawn"),
        (
            ["audit", "label", "--picture", "{out}/a.svg", "--picture", "{out}/a.html"],
            0,
            "5 stages",
        ),
    ],
)
def test_the_commands_say_what_they_did(
    arguments: list[str], code: int, says: str, project: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [each.format(out=out) for each in arguments])
    assert done.exit_code == code, done.output
    assert says in done.output
    if "--picture" in arguments and code == 0:
        assert {path.name for path in out.iterdir()} == {"a.svg", "a.html"}


CALL = """
import sys
from flows.scheduled_audit import audit_workspace
audit_workspace(sys.argv[1], target="train@ranked", return_state=True)
"""


def audited_by_flow(folder: Path, server: str, home: Path) -> tuple[str, list[dict[str, str]]]:
    """State of the flow's run, and the rows of its artifact."""
    done = run(
        home,
        *(sys.executable, "-c", CALL, str(folder)),
        PYTHONPATH=str(PROJECT),
        PREFECT_API_URL=server,
        PREFECT_HOME=str(home),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    last = last_flow_run(server, "prefopt-audit")
    of_run = {"flow_run_id": {"any_": [last["id"]]}, "key": {"any_": ["audit"]}}
    (artifact,) = api(server, "artifacts", artifacts=of_run)
    return last["state_type"], json.loads(artifact["data"])


def test_a_flow_fails_with_what_fails_and_lists_it(undo: Undo, server: str, tmp_path: Path) -> None:
    state, rows = audited_by_flow(Path.cwd(), server, tmp_path)
    assert state == "COMPLETED"
    assert {row["severity"] for row in rows} <= {"note"}
    flip(f"{RANKED}/model.safetensors")(undo)
    state, rows = audited_by_flow(Path.cwd(), server, tmp_path)
    assert state == "FAILED"
    artefacts = {row["artefact"]: row["remedy"] for row in rows if row["severity"] == "failed"}
    assert "dvc checkout" in artefacts[f"{RANKED}/model.safetensors"]


def test_the_deployment_is_this_flow_on_a_schedule() -> None:
    deployments = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    (found,) = (each for each in deployments if each["name"] == "audit")
    module, _, name = found["entrypoint"].rpartition(".")
    assert (PROJECT / f"{module.replace('.', '/')}.py").is_file()
    assert name == "audit_workspace"
    assert found["schedules"]
    assert found["concurrency_limit"] == 1
