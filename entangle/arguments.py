"""The argument parser of the command line."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import entangle
from entangle.experiments.interventions import INTERVENTIONS, SETS
from entangle.pruning.options import METHODS, OPTIONS, read_count, read_number

RUN_PLOTS = ("heatmap", "layers", "ranks", "neuron", "difficulty")
DISENTANGLED_PLOTS = ("improvement", "clusters", "sparse")
PLOTS = (*RUN_PLOTS, "sweep", "ablation", *DISENTANGLED_PLOTS)
ABLATE = """Treat a share of each layer's neurons, keep the rest dense, and score the model. Sets:
wasserstein (the neurons with the largest), bottom (with the smallest), random (with --seeds draws 0,
1, ...), and those with the largest kurtosis, weight_norm, std and difficulty (if RUN was measured with
--difficulty). Interventions: sparsify (the weights, by SparseGPT), and of outputs zero, mean (over
RUN's tokens) and negative (those below zero become zero). --skip-first leaves tokens out of pruning
and scoring; they are treated like all. A command that was stopped goes on when it is given again."""
DISENTANGLE = """Measure each neuron within clusters of its layer's inputs, and pruned for them, on at
most 8,192 held-out tokens from 64 windows of --evaluation; clusters and experts come from --text. A
command that was stopped goes on when it is given again."""
TEXT = "a file, a folder of *.txt, or hub:NAME[/CONFIG][:SPLIT][#COLUMN]"
UNPACKED = """on the CPU, keep the zeros of layers that are zero by half or more [packed: less memory, and
faster token by token]"""
SHARE = "one or several: of each layer's neurons to treat [0.03]"
KEPT = "whose outputs to keep, beside each layer's most entangled neuron"
SPREAD = "spread the model over the devices here and the host, as accelerate does [one device]"
OFFLOAD = """leave the model's blocks in files and have one at a time on the device; the folder takes what
transformers must write anew [all of it in memory]"""
SHARD = "count only a part of the text, such as 3/8, for merge to put together [all of it]"
PAIRS = "of tokens over which to measure the mapping difficulty too [none]"


def _one(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return an argparse type that reads one value and reports the message of its ValueError."""

    def one(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return one


def _several(read: Callable[[str], Any] = str) -> Callable[[str], tuple[Any, ...]]:
    """Return an argparse type that reads comma-separated values."""

    def several(text: str) -> tuple[Any, ...]:
        return tuple(read(word.strip()) for word in text.split(",") if word.strip())

    return several


def _add_options(command: argparse.ArgumentParser, *, several: bool) -> None:
    """Add a flag for each option of pruning, which takes one value or, with ``several``, a list."""
    for option in OPTIONS.values():
        usual = METHODS if several and option.name == "method" else option.default
        unsaid = usual is ... or option.name == "strength"  # None: a strength needs graded rows
        words: dict[str, Any] = {"required": usual is ..., "metavar": option.metavar}
        read, choices = _one(option.read), option.choices if option.metavar is None else None
        if several:
            listed = f"{', '.join(choices)}: " if choices else ""
            help = f"{listed}{option.help}; one or several"
            words |= {"type": _several(read), "metavar": "A,B"}
            default = usual if usual is METHODS else (usual,)
        else:
            help, default = option.help, usual
            words |= {"type": read, "choices": choices}
        shown = {METHODS: "all", None: "auto"}.get(usual, usual)
        help += "" if usual is ... else f" [{shown}]"
        words |= {"default": None if unsaid else default, "help": help.replace("%", "%%")}
        command.add_argument(f"--{option.name}", **words)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(prog="entangle", description=entangle.__doc__)
    top.add_argument("--version", action="version", version=entangle.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    always = argparse.ArgumentParser(add_help=False)
    always.add_argument("--json", action="store_true", help="print the result as JSON")
    always.add_argument("--debug", action="store_true", help="show the traceback of an error")

    layers = argparse.ArgumentParser(add_help=False)
    layers.add_argument(
        "--layers", nargs="+", default=["*"], metavar="PATTERN", help="of their names [*]"
    )

    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument("--device", default="auto", help="[auto: cuda if there is one, else cpu]")
    runs.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )

    model = argparse.ArgumentParser(add_help=False, parents=[runs])
    model.add_argument("model", metavar="MODEL", help="a hub id, a folder or a .gguf file")
    spread = argparse.ArgumentParser(add_help=False)
    spread.add_argument("--device-map", choices=["auto"], help=SPREAD)
    spread.add_argument("--offload", type=Path, metavar="FOLDER", help=OFFLOAD)

    model.add_argument("--revision", help="of a model of the hub")
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights [auto: as stored]",
    )

    measured = argparse.ArgumentParser(add_help=False, parents=[runs])
    measured.add_argument(
        "run", type=Path, metavar="RUN", help="what measure wrote; the model is the one it measured"
    )

    evaluation = argparse.ArgumentParser(add_help=False)
    evaluation.add_argument("--evaluation", required=True, metavar="TEXT", help="to score on")
    evaluation.add_argument(
        "--evaluation-windows", type=int, metavar="N", help="of it, drawn by seed [all]"
    )

    windows = argparse.ArgumentParser(add_help=False)
    windows.add_argument(
        "--windows", type=int, default=128, help="of the text, drawn by seed [128]"
    )
    windows.add_argument("--length", type=int, default=512, help="tokens in a window [512]")
    windows.add_argument("--batch-size", type=int, default=4, help="windows at a time [4]")
    windows.add_argument("--seed", type=int, default=0, help="of the draw, and of clusters [0]")
    windows.add_argument(
        "--bos",
        default="auto",
        choices=["auto", "always", "never"],
        help="the token that begins a sequence before each window [auto: as the tokenizer does]",
    )
    windows.add_argument(
        "--skip-first", type=int, default=0, help="tokens of each window not counted [0]"
    )

    text = argparse.ArgumentParser(add_help=False, parents=[windows])
    text.add_argument("--text", required=True, help=TEXT)

    writes = argparse.ArgumentParser(add_help=False)
    writes.add_argument("--overwrite", action="store_true", help="replace what is there")

    measure = commands.add_parser(
        "measure",
        parents=[model, spread, text, layers, writes, always],
        help="measure the distribution of every neuron over a text",
    )
    measure.add_argument("--out", type=Path, required=True, metavar="RUN", help="a new folder")
    measure.add_argument("--bins", type=int, default=1024, help="of a histogram [1024]")
    measure.add_argument("--difficulty", type=int, default=0, metavar="PAIRS", help=PAIRS)
    measure.add_argument("--shard", metavar="N/OF", help=SHARD)

    merge = commands.add_parser(
        "merge", parents=[writes, always], help="make one run of the shards of it"
    )
    merge.add_argument("run", type=Path, nargs="+", metavar="RUN", help="all its shards")
    merge.add_argument("--out", type=Path, required=True, metavar="RUN", help="a new folder")

    plan = commands.add_parser(
        "plan",
        parents=[model, text, layers, always],
        help="say what measuring and pruning a model would cost, without loading it",
    )
    plan.add_argument("--bins", type=int, default=1024, help="of a histogram [1024]")
    plan.add_argument("--offload", type=Path, metavar="FOLDER", help="as measure has it")
    sparsity, copies = OPTIONS["sparsity"].help, OPTIONS["experts"].help
    plan.add_argument("--sparsity", default="0.5", help=f"{sparsity} [0.5]")
    plan.add_argument("--experts", type=int, default=1, metavar="N", help=f"{copies} [1]")

    runs_only = argparse.ArgumentParser(add_help=False)
    runs_only.add_argument("--unpacked", action="store_true", help=UNPACKED)

    commands.add_parser(
        "perplexity",
        parents=[model, spread, text, runs_only, always],
        help="score a model on a text",
    )

    generate = commands.add_parser(
        "generate",
        parents=[model, spread, runs_only, always],
        help="let a model write, and time it",
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="what it goes on with")
    generate.add_argument("--tokens", type=int, default=64, help="to write at most [64]")

    sparsify = commands.add_parser(
        "sparsify",
        parents=[model, spread, text, layers, writes, always],
        help="prune a model, or expand it to sparse experts, and save it",
    )
    sparsify.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    _add_options(sparsify, several=False)

    sweep = commands.add_parser(
        "sweep",
        parents=[model, text, evaluation, layers, writes, always],
        help="prune a model in several ways and score each: one table and one figure",
    )
    sweep.add_argument("--out", type=Path, required=True, metavar="RUN", help="a new folder")
    _add_options(sweep, several=True)

    ablate = commands.add_parser(
        "ablate",
        parents=[measured, windows, evaluation, layers, writes, always],
        help="treat the most entangled neurons, and others, and score: one table and one figure",
        description=ABLATE,
    )
    ablate.add_argument("--text", help=f"to sparsify by, and needed for that alone: {TEXT}")
    ablate.add_argument("--out", type=Path, required=True, metavar="NEW", help="a new folder")
    words: dict[str, Any] = {"type": _several(), "metavar": "A,B"}
    numbers: dict[str, Any] = {"type": _several(_one(read_number)), "metavar": "X,X"}
    counts: dict[str, Any] = {"type": _several(_one(read_count)), "metavar": "N,N"}
    ablate.add_argument("--share", default=(0.03,), help=SHARE, **numbers)
    ablate.add_argument(
        "--sparsity", default=("0.9",), help=f"one or several: {sparsity} [0.9]", **words
    )
    ablate.add_argument("--experts", default=(1,), help=f"one or several: {copies} [1]", **counts)
    ablate.add_argument(
        "--intervention",
        default=("sparsify",),
        help=f"one or several of {', '.join(INTERVENTIONS)} [sparsify]",
        **words,
    )
    ablate.add_argument(
        "--sets", default=SETS, help=f"one or several of {', '.join(SETS)} [all]", **words
    )
    ablate.add_argument("--seeds", type=int, default=5, metavar="N", help="of random sets [5]")
    ablate.add_argument("--per-block", action="store_true", help="treat one block at a time")

    disentangle = commands.add_parser(
        "disentangle",
        parents=[measured, text, evaluation, layers, writes, always],
        help="say what clusters and their experts make of each neuron: tables and figures",
        description=DISENTANGLE,
    )
    disentangle.add_argument("--out", type=Path, required=True, metavar="NEW", help="a new folder")
    disentangle.add_argument(
        "--experts", default=(4, 16), help=f"one or several: {copies} [4,16]", **counts
    )
    disentangle.add_argument(
        "--sparsity", default=("0.8",), help=f"one or several: {sparsity} [0.8]", **words
    )
    disentangle.add_argument("--neurons", nargs="+", default=[], metavar="LAYER:INDEX", help=KEPT)

    contexts = commands.add_parser(
        "contexts",
        parents=[measured, layers, always],
        help="find the tokens behind neurons' distributions, and add them to the run",
    )
    contexts.add_argument("neurons", nargs="*", metavar="LAYER:INDEX", help="which neurons")
    contexts.add_argument(
        "--top", type=int, metavar="N", help="or each layer's N most entangled ones"
    )

    rank = commands.add_parser(
        "rank",
        parents=[layers, always],
        help="print the neurons with the largest distance, or of another variable",
    )
    rank.add_argument("run", type=Path, metavar="RUN")
    rank.add_argument("--top", type=int, default=30, help="how many neurons [30]")
    rank.add_argument("--by", default="wasserstein", help="which variable [wasserstein]")
    rank.add_argument("--csv", type=Path, metavar="FILE", help="write the table, numbers in full")

    diff = commands.add_parser(
        "diff",
        parents=[layers, always],
        help="compare two runs: how the neurons' distances moved",
    )
    diff.add_argument("run", type=Path, metavar="RUN", help="the first")
    diff.add_argument("other", type=Path, metavar="RUN", help="another")
    diff.add_argument("--top", type=int, default=20, help="how many neurons that moved [20]")
    diff.add_argument("--csv", type=Path, metavar="FILE", help="write all neurons, numbers in full")
    diff.add_argument("--out", type=Path, metavar="FILE", help="draw them into a picture")

    plot = commands.add_parser(
        "plot",
        parents=[always],
        help="draw a run, a sweep, an ablation, or what disentangle wrote",
    )
    plot.add_argument("run", type=Path, metavar="RUN")
    plot.add_argument("kind", choices=PLOTS)
    plot.add_argument(
        "neurons",
        nargs="*",
        metavar="LAYER:INDEX",
        help="one for clusters and sparse, one or several for neuron",
    )
    plot.add_argument("--sparsity", metavar="S", help="for improvement and sparse [the last]")
    plot.add_argument(
        "--out", type=Path, metavar="FILE", help="[a PNG in RUN/figures]; its ending is the format"
    )

    report = commands.add_parser(
        "report",
        parents=[always],
        help="write runs of any kind into one HTML file that needs no network",
    )
    report.add_argument("run", type=Path, nargs="+", metavar="RUN", help="in this order")
    report.add_argument("--out", type=Path, metavar="FILE", help="[report.html in the first RUN]")
    return top
