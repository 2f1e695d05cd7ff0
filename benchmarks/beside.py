"""What commands cost beside other work. Run `python -m benchmarks.beside` on a machine that does nothing else.

Each command runs alone and beside busy loops, in turns. A scheduler gives each thread that wants to run an equal
part of the cores, so a command of t threads beside b loops on c cores would take (t + b) / c times as long as
alone with t threads. The table has how many times longer it takes, and how many times with that fair share.
`generate` chooses t itself; other commands have as many threads as cores.
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
LOOPS, ROUNDS = 4, 2
ON = ["--text", TEXT, "--windows", "8"]
COMMANDS = {
    "measure": ["measure", MODEL, *ON],
    "sparsify": ["sparsify", MODEL, *ON, "--sparsity", "0.5", "--layers", "*.mlp.*"],
    "generate, dense": ["generate", MODEL, "--prompt", "The list method append"],
    "generate, packed": ["generate", "{pruned}", "--prompt", "The list method append"],
}
SPEED = re.compile(r"([\d.]+) a second with (\d+) threads?$")


def main() -> None:
    """Run the benchmark and print its table."""
    print(machine(), end="\n\n")
    cores = torch.get_num_threads()
    print(f"| | alone, s | beside {LOOPS} busy loops, s | times | with the fair share |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pruned = f"{folder}/pruned"
        run(["sparsify", MODEL, *ON, "--sparsity", "0.7", "--layers", "*.mlp.*", "--out", pruned])
        for name, words in COMMANDS.items():
            command = [word.format(pruned=pruned) for word in words]
            times: dict[int, list[tuple[float, int]]] = {0: [], LOOPS: []}
            for turn in range(ROUNDS):
                for loops, found in times.items():
                    with busy(loops):
                        out = ["--out", f"{folder}/{loops}-{turn}"] * (name[0] != "g")
                        found.append(run([*command, *out]))
            alone, beside = (
                statistics.mean(seconds for seconds, _ in found) for found in times.values()
            )
            threads = statistics.mean(used or cores for _, used in times[LOOPS])
            fair = (threads + LOOPS) / cores
            print(f"| {name} | {alone:.3f} | {beside:.3f} | {beside / alone:.2f} | {fair:.2f} |")


def run(words: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds, or those of a token that it writes, and with how many threads."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "entangle", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    speed = SPEED.search(done.stdout.rstrip())
    return (1 / float(speed[1]), int(speed[2])) if speed else (seconds, 0)


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
