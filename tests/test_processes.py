"""Whether a process that was named is there still."""

import subprocess
import sys

import psutil
import pytest
from processes import wait_until

from flows.processes import is_gone, name_of_process

NAMED = "from flows.processes import name_of_process; print(name_of_process(), flush=True); input()"


def test_a_process_is_there_until_it_ends_and_a_namesake_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not is_gone(name_of_process())
    with subprocess.Popen(
        [sys.executable, "-c", NAMED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert not is_gone(name)
        # Another process that got the number since then.
        assert is_gone(name + "1")
        # A clock that is set changes nothing.
        monkeypatch.setattr(psutil.Process, "create_time", lambda _: 0.0)
        assert not is_gone(name)
        process.kill()
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, 30)
        assert is_gone(name)  # Although nobody has taken notice of its end.
    assert is_gone(name)


def test_of_other_machines_and_other_tags_nothing_is_said() -> None:
    kind, _, number, born = name_of_process().split(":")
    assert not is_gone(f"{kind}:elsewhere:{number}1:{born}")
    assert not is_gone("nightly")
