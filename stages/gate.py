"""Whether the challenger may become the champion: `python -m stages.gate`.

Both are runs of this pipeline, judged on the same prompts. Prints JSON: what was measured, its
bound in `retrain.gate`, and whether it holds; only if all of them hold is a challenger promoted.
With `--reads`: the files that this and `stages.registry` read, which may have to be fetched first.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from stages.artefacts import COMPARISON, card_of, logratios_of, metrics_of, program
from stages.bounds import Bound, answer
from stages.existing import CHAMPION
from stages.params import Gate, load_params

OPPONENT = "sft"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reads", action="store_true", help="say which files are read")
    asked = parser.parse_args()
    params = load_params()
    name, gate = params.retrain.run, params.retrain.gate
    paths = (metrics_of(name), metrics_of(CHAMPION), card_of(gate.judge), COMPARISON)
    if asked.reads:
        sys.stdout.write(json.dumps(list(map(str, (*paths, logratios_of(name))))) + "\n")
        return
    ours, theirs, card, comparison = (json.loads(path.read_text()) for path in paths)
    (pair,) = comparison["win_rate"][OPPONENT][gate.judge]
    if (pair["first"], pair["second"]) != (name, CHAMPION):
        raise ValueError(
            f"{COMPARISON}: is of other runs than challenger and champion, got {pair['first']} and "
            f"{pair['second']}; run `prefopt retrain`"
        )
    answer(bounds(pair, ours, theirs, card, gate))


def bounds(
    pair: Mapping[str, Any],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    card: Mapping[str, Any],
    gate: Gate,
) -> list[Bound]:
    """What is measured, beside its bound.

    Args:
        pair: the paired comparison, challenger less champion (`stages.compare`).
        ours: the challenger's metrics (`stages.evaluate`).
        theirs: the champion's.
        card: of the judge (`stages.exam`).
        gate: the bounds.
    """
    agreement = (card["agreement"] or {"low": 0.0})["low"]
    fell, before = (each["displacement"]["chosen_fell"] for each in (ours, theirs))
    length = ours["length"] / theirs["length"]
    return [
        Bound("win rate above the champion's, by", pair["value"], "above", 0.0),
        Bound("p of the paired test", pair["corrected"], "at most", gate.alpha),
        Bound("KL from SFT, nats a sequence", ours["kl"], "at most", gate.max_kl),
        Bound("tokens for each of the champion's", length, "at most", gate.max_length),
        Bound(
            "share of chosen texts that fell, more than under the champion",
            fell - before,
            "at most",
            gate.max_displacement,
        ),
        Bound(
            f"low end of the agreement of {gate.judge} with the labels",
            agreement,
            "at least",
            gate.min_agreement,
        ),
    ]


if __name__ == "__main__":
    program(main)
