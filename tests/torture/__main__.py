"""Run the parts: ``inputs`` in one process, ``commands`` as real commands, ``kills``, ``ranks``."""

import argparse
import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from typing import Any

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "NUMBA_THREADING_LAYER": "workqueue"}

import numba
import torch

import entangle
from tests.torture.inputs import Judge
from tests.torture.kills import Kills
from tests.torture.record import Record, summary

COUNTS = {"inputs": 10_000, "commands": 300, "kills": 1000, "ranks": 50}
# Two processes, one for each core.
TOGETHER = (("inputs", "commands"), ("ranks", "kills"))


def main() -> int:
    """Run what is asked for, and return 1 if a case failed."""
    parser = argparse.ArgumentParser(prog="tests.torture", description=__doc__)
    parser.add_argument("parts", nargs="+", choices=[*COUNTS, "all", "last"], metavar="PART",
                        help=f"one or several of {', '.join(COUNTS)}; all; or last, the last result")  # fmt: skip
    parser.add_argument(
        "--cases", type=int, metavar="N", help="number of cases [each part has its own]"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the first case [0]")
    parser.add_argument("--only", type=int, metavar="SEED", help="repeat one case and show it")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="forget earlier results and begin anew [go on where it was stopped]",
    )
    args = parser.parse_args()
    stream = sys.stdout
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.parts == ["last"]:
        stream.write(summary() + "\n")
        return 0
    if args.parts == ["all"]:
        more = ["--fresh"] if args.fresh else []
        words = [[sys.executable, "-m", "tests.torture", *parts, *more] for parts in TOGETHER]
        codes = [one.wait() for one in [subprocess.Popen(line) for line in words]]
        stream.write(summary() + "\n")
        return int(any(codes))
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    for name in entangle.__all__:
        getattr(entangle, name)
    gc.freeze()
    failed = [_run(part, args) for part in args.parts]
    return int(any(failed))


def _run(part: str, args: Any) -> bool:
    """Run a part; return whether a case failed."""
    judge = Kills() if part in {"kills", "ranks"} else Judge()
    try:
        if args.only is not None:
            return _show(judge, part, args.only)
        count = args.cases or COUNTS[part]
        record = Record(part, sys.stdout, fresh=args.fresh)
        for seed in record.left(range(args.seed, args.seed + count)):
            begin = time.monotonic()
            try:
                about, wrong = _judged(judge, part, seed)
            except Exception:  # noqa: BLE001  # of the case itself: the others still run
                about, wrong = {}, [traceback.format_exc()]
            about["seconds"] = round(time.monotonic() - begin, 3)
            record.add(seed, about, wrong, count)
        if isinstance(judge, Judge):
            assert judge.untouched(), "a case has changed the good inputs"
        return record.failed > 0
    finally:
        judge.close()


def _judged(judge: Kills | Judge, part: str, seed: int) -> tuple[dict[str, Any], list[str]]:
    if isinstance(judge, Kills):
        done, wrong = judge.judge(seed, ranked=part == "ranks")
        return {"done": done}, wrong
    case, outcome, wrong = judge.judge(seed, real=part == "commands")
    about: dict[str, Any] = {"command": next(iter(case.words), ""), "code": outcome.code}
    if wrong:
        about |= {"words": case.words, "done": case.done, "said": outcome.err[-2000:]}
    return about, wrong


def _show(judge: Kills | Judge, part: str, seed: int) -> bool:
    """Repeat one case and print all of it."""
    if isinstance(judge, Kills):
        done, wrong = judge.judge(seed, ranked=part == "ranks")
        sys.stdout.write(f"{done}\n")
    else:
        case, outcome, wrong = judge.judge(seed, real=part == "commands")
        sys.stdout.write(f"entangle {case.words}\nfiles: {case.done}\nexit code {outcome.code}\n")
        sys.stdout.write(f"stdout: {outcome.out}\nstderr: {outcome.err}\n")
    sys.stdout.write("\n".join(["wrong:", *wrong] if wrong else ["nothing is wrong"]) + "\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
