"""DVC that is imported once: its commands say, leave and outlive no more than those of `dvc`."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import FAMILY, family, is_alive, wait_until

from flows.supervise import Supervisor

PROJECT = Path(__file__).parents[1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    dvc(tmp_path, "init", "--quiet")
    return tmp_path


def dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "DVC_NO_ANALYTICS": "1", **more}


def declare(project: Path, **commands: str) -> None:
    lines = ["stages:"]
    for name, command in commands.items():
        lines += [f"  {name}:", f"    cmd: {command}", f"    outs: [{name}.txt]"]
    (project / "dvc.yaml").write_text("\n".join(lines) + "\n")


def followed(
    supervisor: Supervisor, project: Path, *arguments: str, **more: str
) -> tuple[int, list[str]]:
    lines: list[str] = []
    status = supervisor.run_dvc(arguments, environment(**more), lines.append, folder=project)
    return status, lines


def test_commands_do_and_say_what_dvc_does_and_says(project: Path) -> None:
    declare(project, good="echo $WHO > good.txt", bad="echo no >&2; exit 3")
    with Supervisor() as supervisor:
        good = followed(supervisor, project, "repro", "--single-item", "good", WHO="me")
        bad = followed(supervisor, project, "repro", "--single-item", "bad")
        wrong = followed(supervisor, project, "no-such-command")
        status = followed(supervisor, project, "status", "good")
    assert good[0] == 0
    assert "Running stage 'good':" in good[1]
    assert (project / "good.txt").read_text() == "me\n"
    expected = dvc(project, "repro", "--single-item", "bad")
    assert bad[0] == expected.returncode
    said = (expected.stdout + expected.stderr).splitlines()
    assert sorted(bad[1]) == sorted(filter(None, said))
    assert wrong[0] == dvc(project, "no-such-command").returncode
    assert status == (0, ["Data and pipelines are up to date."])


def test_it_is_imported_once_and_again_only_if_its_process_dies(project: Path) -> None:
    # A stage's grandparent is the keeper, whose parent has imported DVC.
    ancestors = "cut -d' ' -f4 /proc/$(cut -d' ' -f4 /proc/$PPID/stat)/stat"
    declare(project, **{name: f"{ancestors} > {name}.txt" for name in "abc"})
    with Supervisor() as supervisor:
        for name in "ab":
            assert followed(supervisor, project, "repro", "-s", name)[0] == 0
        first, second = (int((project / f"{name}.txt").read_text()) for name in "ab")
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: not is_alive(first))
        assert followed(supervisor, project, "repro", "-s", "c")[0] == 0
        third = int((project / "c.txt").read_text())
    assert first == second
    assert third not in {first, os.getpid()}
    assert not is_alive(third)


def test_the_end_of_a_supervisor_ends_a_stage_and_all_that_it_started(project: Path) -> None:
    declare(project, family=FAMILY)
    found: list[int] = []
    with Supervisor() as supervisor:

        def run() -> None:
            found.append(followed(supervisor, project, "repro", "family")[0])

        thread = threading.Thread(target=run)
        thread.start()
        members = family(project)
        assert all(is_alive(member) for member in members)
    thread.join()
    assert found == [128 + signal.SIGTERM]
    assert not any(is_alive(member) for member in members)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of the death")
def test_a_killed_supervisor_takes_stages_with_it(project: Path) -> None:
    declare(project, family=FAMILY)
    program = (
        "import os; from pathlib import Path; from flows.supervise import Supervisor; "
        "Supervisor().run_dvc(['repro', 'family'], os.environ, str)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=project, env=environment(PYTHONPATH=str(PROJECT))
    ) as flow:
        members = family(project)
        flow.kill()
    wait_until(lambda: not any(is_alive(member) for member in members))


def test_a_lock_is_held_until_the_command_has_ended(project: Path) -> None:
    def taken() -> bool:
        with open(project / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    declare(project, held="touch started; until [ -f go ]; do sleep 0.05; done; touch held.txt")
    found: list[int] = []
    with open(project / "lock", "w") as lock, Supervisor([lock.fileno()]) as supervisor:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def run() -> None:
            found.append(followed(supervisor, project, "repro", "held")[0])

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: (project / "started").exists())
        lock.close()  # Only the command has it now.
        assert taken()
        (project / "go").touch()
        thread.join()
    assert found == [0]
    wait_until(lambda: not taken())  # The keeper says its status just before it ends.
