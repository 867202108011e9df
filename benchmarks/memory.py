"""Peak memory of the stages at data sets of different sizes: `python -m benchmarks.memory`.

The stages' own programs run one after the other on pairs of short texts, with a random model that
is tiny, so that what grows with the data would show. A stage's memory is sampled from outside, as
`RssAnon`: pages that map a file are the system's to drop and are not counted.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.meters import machine
from stages.artefacts import (
    CANDIDATES,
    CANDIDATES_SCHEMA,
    CHECKED,
    COMPLETIONS,
    COMPLETIONS_SCHEMA,
    REFERENCE,
    REFERENCE_SCHEMA,
    SFT,
    TableWriter,
    blocks,
    map_table,
    write_table,
)

PROJECT = Path(__file__).parents[1]
RESULT = PROJECT / "benchmarks/results/memory-cpu.json"
SIZES = (10_000, 100_000, 1_000_000)
# The reference scores a prompt in a forward pass of its own, and a million of them takes too long:
# beyond so many pairs the stage is left out.
MOST_SCORED = 100_000
SECONDS_BETWEEN_SAMPLES = 0.005
# Large batches, so that a million pairs are not too many steps; memory of a step is the same at
# all sizes of the data.
OPTIMISER = {"batch_size": 512, "num_epochs": 1}
STAGES = ("prepare", "label", "sft", "reference", "train")
SPARE = 16  # pairs for validation and test


@dataclass(frozen=True)
class Peak:
    """A stage's most anonymous resident memory, and how long it took."""

    bytes: int
    seconds: float


def measure(num_pairs: int, stages: Sequence[str] = STAGES) -> Iterator[tuple[str, Peak]]:
    """Peaks of the stages' programs on so many training pairs, one after the other.

    Where no stage scores the reference, training reads one that is laid for it.
    """
    with workplace(num_pairs):
        for stage in stages:
            if stage == "train" and not REFERENCE.exists():
                lay_reference()
            run = ["dpo"] if stage == "train" else []
            yield stage, peak_of([sys.executable, "-m", f"stages.{stage}", *run])


@contextmanager
def workplace(num_pairs: int) -> Generator[None]:
    """A folder with data, parameters and a model; this process works in it while it lasts."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        os.chdir(name)
        try:
            CHECKED.parent.mkdir()
            CHECKED.touch()
            for directory in (Path("base"), SFT):
                model().save_pretrained(directory)
                tokenizer().save_pretrained(directory)
            with open("pairs.jsonl", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in texts(num_pairs + 2 * SPARE))
            Path("params.yaml").write_text(yaml.safe_dump(parameters()))
            # The data has pairs, so that none is made of candidates.
            write_table(CANDIDATES, {"prompt": [], "text": [], "tokens": []}, CANDIDATES_SCHEMA)
            yield
        finally:
            os.chdir(before)


def texts(count: int) -> Iterator[dict[str, str]]:
    """Pairs of some 40 bytes a side, no two of one prompt."""
    for number in range(count):
        yield {
            "prompt": f"question {number:08d}, and then?",
            "chosen": f" yes, {number % 977} of them",
            "rejected": f" no, {number % 991}",
        }


def parameters() -> dict[str, Any]:
    tree = yaml.safe_load((PROJECT / "params.yaml").read_text())
    tree["base"] = "base"
    tree["data"] |= {
        "source": "pairs.jsonl", "num_train": None, "num_validation": SPARE, "num_test": SPARE,
    }  # fmt: skip
    tree["label"] |= {"method": "given"}
    tree["revision"] |= {"template": str(PROJECT / "recipes/templates/revision.txt")}
    tree["sft"] |= OPTIMISER
    tree["train"] |= OPTIMISER
    tree["compute"] |= {"checkpoint_every": 1000}
    # What looks take does not depend on the data, but a short run takes fewer.
    tree["watch"] |= {"every": None}
    tree["runs"] = {"dpo": {"loss": "dpo", "beta": 0.1}}
    return tree


def model() -> LlamaForCausalLM:
    """One layer at random under a head of zeros: every token has log-probability -log(vocabulary).

    So a reference can be laid that no model has scored, and training starts where it must.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    policy = LlamaForCausalLM(config)
    torch.nn.init.zeros_(policy.lm_head.weight)
    return policy


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    by_byte = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[]))
    by_byte.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    by_byte.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=by_byte, bos_token="<s>", eos_token="</s>")


def lay_reference() -> None:
    """The reference of `model`, row for row with the completions."""
    completions = map_table(COMPLETIONS, COMPLETIONS_SCHEMA)["completion"]
    logp = torch.tensor(1 / len(tokenizer())).log().item()
    with TableWriter(REFERENCE, REFERENCE_SCHEMA) as table:
        for block in blocks(completions, 1024):
            table.extend({"logps": [[logp] * len(tokens) for tokens in block]})


def peak_of(command: Sequence[str]) -> Peak:
    """Run a program to its end and look at its anonymous memory meanwhile.

    Raises:
        RuntimeError: if it fails.
    """
    environment = os.environ | {
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{Path.cwd()}/mlflow.db",
    }
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as told:
        program = subprocess.Popen(command, env=environment, stdout=told, stderr=told)
        while program.poll() is None:
            peak = max(peak, anonymous(program.pid))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
        told.seek(0)
        if program.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with {program.returncode}: {told.read()}"
            )
    return Peak(peak, round(time.monotonic() - started, 1))


def anonymous(pid: int) -> int:
    """Resident memory of a process that maps no file, in bytes; 0 of one that has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    pairs: dict[str, Any] = json.loads(out.read_text())["pairs"] if out.exists() else {}
    for num_pairs in arguments.pairs:
        stages = [stage for stage in STAGES if stage != "reference" or num_pairs <= MOST_SCORED]
        pairs[str(num_pairs)] = {}
        for stage, peak in measure(num_pairs, stages):
            pairs[str(num_pairs)][stage] = asdict(peak)
            results = {"machine": machine(torch.device("cpu")), "pairs": pairs}
            out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
