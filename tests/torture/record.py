"""What was run: a line of JSON for each case, so that a stopped run goes on and failures are kept."""

import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import psutil

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "runs" / "torture"


class Record:
    """The cases of one part: ``runs/torture/PART.jsonl``."""

    def __init__(self, part: str, stream: TextIO, *, fresh: bool = False) -> None:
        """Read what is known; with ``fresh`` forget it."""
        self.part, self.stream = part, stream
        self.file = FOLDER / f"{part}.jsonl"
        FOLDER.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.file.unlink(missing_ok=True)
        self.cases = read(self.file)
        self.shown = time.monotonic()

    def left(self, seeds: Iterable[int]) -> list[int]:
        """Return the seeds that have not passed."""
        return [seed for seed in seeds if self.cases.get(seed, {}).get("wrong", ["not run"])]

    def add(self, seed: int, about: dict[str, Any], wrong: list[str], total: int) -> None:
        """Note a case, say what failed, and from time to time how far it is."""
        case = {"seed": seed, **about, "wrong": wrong}
        self.cases[seed] = case
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(case) + "\n")
        if wrong:
            self._say(f"{self.part} {seed} FAILED: {about}\n  " + "\n  ".join(wrong))
        if time.monotonic() > self.shown + 30:
            self.shown = time.monotonic()
            self._say(f"{self.part}: {len(self.cases):,} of {total:,}, {self.failed} failed")

    @property
    def failed(self) -> int:
        return sum(bool(case["wrong"]) for case in self.cases.values())

    def _say(self, line: str) -> None:
        self.stream.write(line + "\n")
        self.stream.flush()


def read(file: Path) -> dict[int, dict[str, Any]]:
    """Return the cases of a file by seed: the last line of each. A line that a kill cut is ignored."""
    cases: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            case = json.loads(line)
        except ValueError:
            continue
        cases[case["seed"]] = case
    return cases


def summary() -> str:
    """Return what the last run of each part found, and on which machine."""
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, {platform.system()}"
    lines = [f"on {machine}, Python {platform.python_version()}:"]
    for file in sorted(FOLDER.glob("*.jsonl")):
        cases = read(file).values()
        failed = [case["seed"] for case in cases if case["wrong"]]
        minutes = sum(case.get("seconds", 0.0) for case in cases) / 60
        codes: dict[str, int] = {}
        for case in cases:
            codes[str(case.get("code"))] = codes.get(str(case.get("code")), 0) + 1
        exits = ", ".join(f"{count:,} exit {code}" for code, count in sorted(codes.items()))
        said = f"{len(cases):,} cases in {minutes:.1f} minutes, {len(failed)} failed"
        killed = sum("SIG" in case.get("done", "") for case in cases)  # others ended before
        more = f"{killed:,} killed in time" if "None" in codes else exits
        lines.append(f"  {file.stem}: {said}; {more}")
        lines += [f"    failed seeds: {', '.join(map(str, failed))}"] if failed else []
    return "\n".join(lines)
