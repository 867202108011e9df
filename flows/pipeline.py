"""Run the graph of `dvc.yaml` as a Prefect flow: `python -m flows.pipeline`.

The same result as `dvc repro`, to the byte of dvc.lock, with independent stages at once, logs in
Prefect's UI, and failures that stop only what depends on them. With `--pools` the stages are run
by the workers of their pools, on many machines, and only dvc.lock comes back. With `--at` they are
run in a worktree of a commit, while this one may be edited; `dvc repro` then restores them from the
run cache. Where nothing is out of date, no flow is started. Exits with 1 if a stage failed.
"""

import argparse
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from flows.clones import git, worktree
from flows.graph import read_plan


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=__doc__)
    parser.add_argument("--concurrency", type=int, default=2, help="stages at once (default: 2)")
    parser.add_argument("--pools", action="store_true", help="by workers, not in this workspace")
    parser.add_argument("--only", metavar="POOL", help="with --pools: all stages go to this pool")
    parser.add_argument("--at", metavar="REVISION", help="in a worktree of this commit")
    asked = parser.parse_args()
    if asked.concurrency < 1:
        parser.error(f"--concurrency: must be at least 1, got {asked.concurrency}; 1 is serial")
    if asked.pools and asked.at:
        parser.error("--at: --pools runs what is checked out, got both; leave out one")
    # A plain SIGTERM would skip the ends of the `with` blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ExitStack() as stack:
        root = Path()
        if asked.at:
            commit = git(root, "rev-parse", "--verify", f"{asked.at}^{{commit}}")
            root = stack.enter_context(worktree(root, commit, f"at-{commit[:12]}"))
        # Before Prefect, which takes longer to import than this to answer.
        plan = read_plan(root, without_data=asked.pools or bool(asked.at))
        if not plan.outdated and not plan.has_leftovers:
            print(f"all {len(plan.order)} stages are current")
            return
        from flows.server import connected

        stack.enter_context(connected())
        # Here, because Prefect reads its settings when it is imported.
        if asked.pools:
            from flows.cluster import require_server
            from flows.pools import distribute

            require_server()
            state = distribute(str(root), asked.only, return_state=True)
        else:
            from flows.reproduce import reproduce

            state = reproduce(str(root), asked.concurrency, return_state=True)
    sys.exit(0 if state.is_completed() else 1)


if __name__ == "__main__":
    main()
