"""300 of the cases of bad inputs that `make torture` runs 10,000 of; see tests/torture."""

import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.torture.inputs import Case, Judge, Outcome, problems, seeds_of
from tests.torture.lines import WEIGHTS
from tests.torture.record import Record, read

COUNT = {"report": 4, "plot": 8, "diff": 6, "merge": 8, "plan": 10, "contexts": 10}  # slow
COUNT |= {"disentangle": 9, "words": 5, "steer": 7, "describe": 4}
OTHERS = (300 - sum(COUNT.values())) // (len(WEIGHTS) - len(COUNT))


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge()
    gc.freeze()  # what is there by now is of no case
    yield judge
    assert judge.untouched()
    judge.close()


@pytest.mark.parametrize("command", WEIGHTS)
def test_a_bad_input_gets_one_message_and_loses_nothing(command: str, judge: Judge) -> None:
    failed, codes = {}, set()
    for seed in itertools.islice(seeds_of(command), COUNT.get(command, OTHERS)):
        _, outcome, wrong = judge.judge(seed)
        codes.add(outcome.code)
        if wrong:
            failed[seed] = wrong
    assert failed == {}, "repeat one: python -m tests.torture inputs --only SEED"
    assert 2 in codes  # something was refused


@pytest.mark.parametrize(
    ("code", "said", "expected"),
    [
        (2, "entangle: there is no such model: give another one\n", None),
        (
            2,
            "usage: entangle rank\nentangle rank: error: unrecognized arguments: --x. Help\n",
            None,
        ),
        (1, "entangle: this is a problem of yours, or not\n", "exit code 1"),
        (None, "", "did not end"),
        (0, "Warning: some words\n", "exit 0"),
        (2, "", "the message is ''"),
        (2, "Traceback (most recent call last):\n  File\nentangle: a b c d e\n", "the message is"),
        (2, "entangle: model\n", "too short"),
        (2, "entangle: 'NoneType' object has no attribute 'x' here\n", "NoneType"),
        (2, "entangle: this is what is wrong\nentangle: and another thing\n", "several"),
        (2, "entangle: a message of too many words\n" + "line\n" * 9, "10 lines"),
        (2, "entangle: a message that is too long " + "x" * 2000 + "\n", "characters"),
    ],
)
def test_what_is_wrong_with_a_command_is_told(
    code: int | None, said: str, expected: str | None
) -> None:
    wrong = problems(Case(0, ["rank", "run"], []), Outcome(code, "", said, 0.0), {}, {})
    assert any(expected in one for one in wrong) if expected else wrong == []


def test_output_that_is_no_json_is_told() -> None:
    case = Case(0, ["rank", "run", "--json"], [])
    assert problems(case, Outcome(0, '{"a": 1}', "", 0.0), {}, {}) == []
    for out in ("NaN", '{"a": NaN}', ""):
        (wrong,) = problems(case, Outcome(0, out, "", 0.0), {}, {})
        assert "JSON" in wrong


@pytest.mark.parametrize(
    ("code", "before", "after", "wrong"),
    [
        (2, {"run": None, "run/a": b"1"}, {"run": None, "run/a": b"1"}, []),
        (2, {"run/a": b"1"}, {"run/a": b"2"}, ["run/a was changed"]),
        (2, {"run/a": b"1"}, {}, ["run/a was removed"]),
        (0, {"run/a": b"1"}, {"run/a": b"2"}, ["run/a was changed"]),
        (2, {}, {"new": None}, ["new was left behind"]),
        (2, {}, {"new.partial": None}, ["new.partial was left behind, unfinished"]),
        (0, {}, {"new": None}, []),
        (0, {}, {"new": None, "new/.partial": b""}, ["new/.partial is there at the end"]),
    ],
)
def test_a_lost_result_is_told(
    code: int, before: dict[str, bytes], after: dict[str, bytes], wrong: list[str]
) -> None:
    said = "entangle: this is a clear message\n" if code else ""
    case = Case(0, ["measure", "model", "--out", "new"], [])
    assert problems(case, Outcome(code, "", said, 0.0), {**before}, {**after}) == wrong


def test_overwrite_lets_only_the_target_change() -> None:
    case = Case(0, ["sweep", "model", "--overwrite", "--out", "new"], [])
    before: dict[str, Any] = {"model": None, "model/a": b"1", "new": None, "new/a": b"1"}
    done = Outcome(0, "", "", 0.0)
    assert problems(case, done, {**before}, before | {"new/a": b"2"}) == []
    assert problems(case, done, {**before}, before | {"model/a": b"2"}) == ["model/a was changed"]
    ranked = Case(0, ["rank", "run"], [])
    changed = problems(ranked, done, {"text.txt": b"1"}, {"text.txt": b"2"})
    assert changed == ["text.txt was changed"]


def test_a_stopped_torture_goes_on_and_repeats_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.torture.record.FOLDER", tmp_path)
    with (tmp_path / "said").open("w") as said:
        record = Record("inputs", said)
        for seed in range(4):
            record.add(seed, {"code": 2}, ["wrong"] if seed == 2 else [], 6)
        with record.file.open("a") as file:
            file.write(json.dumps({"seed": 5, "wrong": []})[:-3])  # cut by a kill
        again = Record("inputs", said)
        assert again.left(range(6)) == [2, 4, 5]
        assert again.failed == 1
        assert Record("inputs", said, fresh=True).left(range(2)) == [0, 1]
    assert read(record.file) == {}
    assert "inputs 2 FAILED" in (tmp_path / "said").read_text()
