"""What commands cost beside other work. Run `python -m benchmarks.beside` on a machine that does nothing else.

Each command runs alone and beside busy loops, in turns. A scheduler gives each thread that wants to run an equal
part of the cores, so a command of t threads beside b loops on c cores has a fair share of
c · t / (t + b) cores, where alone it has t. The table has how many times longer the command takes,
and how many times longer it would take with its fair share.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.timing import machine

DATA = Path(__file__).parents[1] / "data"
MODEL, TEXT = str(DATA / "smollm2-135m"), str(DATA / "python-docs")
LOOPS, ROUNDS = 4, 3
ON = ["--text", TEXT, "--windows", "16"]
COMMANDS = {
    "measure": ["measure", MODEL, *ON],
    "sparsify, 50%": ["sparsify", MODEL, *ON, "--sparsity", "0.5"],
    "generate, dense": ["generate", MODEL, "--prompt", "The list method append"],
    "generate, packed": ["generate", "{pruned}", "--prompt", "The list method append"],
}
SPEED = re.compile(r"([\d.]+) a second")


def main() -> None:
    """Run the benchmark and print its table."""
    print(machine(), end="\n\n")
    threads = torch.get_num_threads()
    share = threads / (threads + LOOPS)
    print(f"| | alone, s | beside {LOOPS} busy loops, s | times | with the fair share |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pruned = f"{folder}/pruned"
        run(["sparsify", MODEL, *ON, "--sparsity", "0.7", "--layers", "*.mlp.*", "--out", pruned])
        for name, words in COMMANDS.items():
            command = [word.format(pruned=pruned) for word in words]
            times: dict[int, list[float]] = {0: [], LOOPS: []}
            for turn in range(ROUNDS):
                for loops, found in times.items():
                    with busy(loops):
                        out = ["--out", f"{folder}/{loops}-{turn}"] * (name[0] != "g")
                        found.append(run([*command, *out]))
            alone, beside = (statistics.median(found) for found in times.values())
            print(
                f"| {name} | {alone:.2f} | {beside:.2f} | {beside / alone:.2f} | {1 / share:.2f} |"
            )


def run(words: list[str]) -> float:
    """Run a command, and return its seconds; of text that is generated, the seconds of a token."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "entangle", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    speed = SPEED.search(done.stdout + done.stderr)
    return 1 / float(speed[1]) if speed else seconds


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Run so many endless loops meanwhile."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(loops)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


if __name__ == "__main__":
    main()
