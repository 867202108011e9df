"""Run the graph of `dvc.yaml` as a Prefect flow: `python -m flows.pipeline`.

The same result as `dvc repro`, to the byte of dvc.lock, with independent stages at once, logs in
Prefect's UI, and failures that stop only what depends on them. Exits with 1 if a stage failed.
"""

import argparse
import signal
import sys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=__doc__)
    parser.add_argument("--concurrency", type=int, default=2, help="stages at once (default: 2)")
    concurrency = parser.parse_args().concurrency
    if concurrency < 1:
        parser.error(f"--concurrency: must be at least 1, got {concurrency}; 1 is serial")
    # A plain SIGTERM would skip the ends of the `with` blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from flows.server import connected

    with connected():
        # Here, because Prefect reads its settings when it is imported.
        from flows.reproduce import reproduce

        state = reproduce(concurrency=concurrency, return_state=True)
    sys.exit(0 if state.is_completed() else 1)


if __name__ == "__main__":
    main()
