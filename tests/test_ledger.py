"""Laws of the ledger: what it was told survives a kill, and a budget counts what may be owed."""

import json
import multiprocessing
from pathlib import Path

import pytest

from stages.ledger import Answer, Expense, opened, path_of

IDENTITY = {"model": "m", "template": "t"}

pytestmark = pytest.mark.usefixtures("workplace")


def write(count: int) -> Path:
    with opened(IDENTITY) as book:
        for number in range(count):
            call = book.begin(0.5)
            book.settle(call, Expense(cost=0.25), "AB"[number % 2], key=f"k{number}", reply="r")
    return path_of(IDENTITY)


def test_an_answer_is_there_when_the_ledger_is_opened_again() -> None:
    write(3)
    with opened(IDENTITY) as book:
        assert book.answers == {
            "k0": Answer("A", "r"),
            "k1": Answer("B", "r"),
            "k2": Answer("A", "r"),
        }
        assert (book.calls, book.cost) == (3, 0.75)


def test_what_could_not_be_read_is_an_expense_and_no_answer() -> None:
    with opened(IDENTITY) as book:
        for outcome in ("unparsed", "refused", "failed"):
            book.settle(book.begin(1.0), Expense(cost=0.1), outcome, key="k", reply="I prefer A")
    with opened(IDENTITY) as book:
        assert not book.answers
        assert book.calls == 3
        assert book.cost == pytest.approx(0.3)


def test_a_call_that_was_never_settled_counts_in_full() -> None:
    with opened(IDENTITY) as book:
        book.begin(0.5)
    with opened(IDENTITY) as book:
        assert (book.calls, book.cost) == (1, 0.5)


def test_a_ledger_cut_at_any_byte_holds_all_that_was_whole_before() -> None:
    path = write(3)
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        settled = [json.loads(line) for line in content[:cut].split(b"\n")[1:-1]]
        with opened(IDENTITY) as book:
            assert set(book.answers) == {line["key"] for line in settled if "settles" in line}
            assert book.calls == sum("call" in line for line in settled)
            call = book.begin(0.5)
            book.settle(call, Expense(), "A", key="new", reply="")
        with opened(IDENTITY) as book:
            assert "new" in book.answers


def test_a_line_damaged_in_the_middle_is_refused_with_its_number() -> None:
    path = write(2)
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:-9]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"jsonl:3: damaged"), opened(IDENTITY):
        pass


def test_another_identity_has_a_ledger_of_its_own() -> None:
    write(2)
    for changed in IDENTITY:
        with opened(IDENTITY | {changed: "other"}) as book:
            assert not book.answers


def _add(number: int) -> None:
    with opened(IDENTITY) as book:
        held = len(book.answers)
        book.settle(book.begin(0.0), Expense(), "A", key=f"{number}", reply="")
        assert len(book.answers) == held + 1


def test_processes_hold_it_one_after_the_other() -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.map(_add, range(12))
    with opened(IDENTITY) as book:
        assert set(book.answers) == {str(number) for number in range(12)}
        assert book.calls == 12
