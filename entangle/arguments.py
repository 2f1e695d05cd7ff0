"""The argument parser of the command line."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import entangle
from entangle.experiments.interventions import INTERVENTIONS, SETS
from entangle.pruning.options import METHODS, OPTIONS, SOLVE, SOLVERS, read_count, read_number

VARIABLES = (  # of a neuron in a run, in the order of `runs.dataset.UNITS`
    *("wasserstein", "wasserstein_error", "wasserstein_bulk", "wasserstein_bulk_error"),
    *("negentropy", "bimodality", "far_variance", "mean", "std", "skewness", "kurtosis", "modes"),
    *("min", "max", "count", "nonfinite", "weight_norm"),
)
DIFFICULTY_VARIABLES = ("difficulty", "difficulty_pairs", "difficulty_equal")
HELD_OUT_VARIABLES = ("held_out_wasserstein", "held_out_difficulty")

RESUME = "To resume a stopped command, run the same command again."
ABLATE = f"""Treat a share of each layer's neurons, leave the others as they are, and score the model.
--sets chooses the neurons: those with the largest Wasserstein distance (wasserstein) or the smallest
(bottom), random ones (random: one set for each of --seeds seeds), or those with the largest
kurtosis, weight_norm, std, wasserstein_bulk (the distance without the 1% of tokens farthest from the
median) or difficulty (only if RUN was measured with --difficulty).
--intervention chooses the treatment: sparsify prunes the neurons' weights by SparseGPT; zero sets
their outputs to zero, mean to their mean over RUN's tokens, and negative sets negative outputs to
zero. The tokens of --skip-first are treated too, but pruning and the score leave them out. {RESUME}"""
DISENTANGLE = f"""Measure each neuron within clusters of its layer's inputs, and with a pruned expert
for each cluster. Clusters and experts are computed from --text. The neurons are measured on at most
8,192 held-out tokens, from at most 64 windows of --evaluation. {RESUME}"""
WORDS = """Multiply the weights of neurons by the embeddings of all tokens of the vocabulary: the row of a
layer that reads the residual stream by the input embedding, through the norm before it, and the column
of a layer that writes to it by the output embedding, through the final norm. A hidden unit is shown as
a whole: the rows of its gate and up projection, and its column of the down projection. An input channel
is written LAYER:input:INDEX; it need not be measured."""
STEER = """Set a neuron to a value on all tokens while the model runs, and compare the model with itself:
zero, its mean or a quantile over RUN's tokens (mean, quantile:0.99), or its output times a number
(scale:2). An input LAYER:input:INDEX is set for this layer alone."""
CHECK = """Run the model once more over RUN's own text, and compute distances of some neurons from their raw
outputs in three ways: by our closed form, by SciPy's numerical integration and by the optimal transport of
the library POT. Compare RUN's distances and their certified bounds with them. The neurons are three (the
most entangled, the median and the least entangled one) of each of five layers that are spread over those
that --layers matches; or those that are named; or each layer's N most entangled ones (--top N). The exit
code is 1 if a distance is outside its bound."""
PLOTS = {  # kinds of pictures, and what each shows
    "heatmap": "distances of all neurons, a row per block, a panel per role",
    "layers": "distribution of the distances in each layer, by block",
    "ranks": "distances in each layer, from the largest to the smallest",
    "neuron": "histogram of the neuron LAYER:INDEX, or histograms of several neurons",
    "difficulty": "mapping difficulty against distance (RUN measured with --difficulty)",
    "sweep": "perplexity against multiply-adds (RUN of sweep)",
    "ablation": "difference to the dense model for each set of neurons (RUN of ablate)",
    "improvement": "relative improvement by experts against distance (RUN of disentangle)",
    "clusters": "outputs of one neuron, split by cluster (RUN of disentangle)",
    "sparse": "sparse and dense outputs of one neuron (RUN of disentangle)",
}
TEXT = "a file, a folder of *.txt, or hub:NAME[/CONFIG][:SPLIT][#COLUMN]"
TEXTS = f"""text: {TEXT}, or self: for what the model writes itself; several are mixed by equal
shares"""
UNPACKED = """keep the zeros of sparse layers in memory [layers with at least half of their weights zero,
on a GPU 60%%, are packed: they need less memory and generate faster]"""
SPREAD = """spread the model over all devices and main memory, by accelerate [the model is on one
device]"""
OFFLOAD = """leave the model's blocks in files and load one block at a time; FOLDER receives weights that
transformers has to convert [the whole model is in memory]"""
VERIFY = """check the SHA-256 sum of each file of a model that sparsify wrote, before it is loaded [sizes and
headers of the weights' files are always checked]"""
STRIDE = """slide the windows by N tokens and score only the last N of each, so that each token is scored
once with as much context as a window has [windows do not overlap, and all their tokens are scored]"""
AGAINST = """also compare with this model, the dense one: KL divergence, agreement of the most likely next
tokens, and tokens lost and gained [no comparison]"""
GENERATE = """also let the model go on after 20 prompts of 64 tokens from --text, by 128 tokens each, and
count distinct n-grams and repeated tokens [do not]"""
RESOLVE = """instead of a new run, add second histograms to RUN, of neurons whose bulk lies in too few
of its bins; MODEL and the text must be those that RUN was measured on [--text and --out: a new run]"""
SHARD = """count only this part of the batches, such as 3/8; entangle merge makes one run of all parts
[all batches]"""
AUTO_STRENGTH = """; auto chooses the strength, and the variable if --budget names none, on a fourth of
the calibration windows"""


def _kind(text: str) -> str:
    """Read a kind of plot; an argparse type.

    Raises:
        ArgumentTypeError: there is no such kind.
    """
    if text not in PLOTS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no kind of picture: write entangle plot RUN KIND, where KIND is one of "
            f"{', '.join(PLOTS)}"
        )
    return text


def _path(text: str) -> Path:
    """Read a path; an argparse type.

    Raises:
        ArgumentTypeError: the text is empty, which `Path` would take for the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text)


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
        return tuple(read(value.strip()) for value in text.split(",") if value.strip())

    return several


def _add_options(command: argparse.ArgumentParser, *, several: bool) -> None:
    """Add a flag for each option of pruning, which takes one value or, with ``several``, a list."""
    for option in OPTIONS.values():
        default = METHODS if several and option.name == "method" else option.default
        # The strength has no default here: `commands` refuses one that has no effect.
        unset = default is ... or option.name == "strength"
        # Nor have these: they need several experts, a search or sparse inputs.
        routed = option.scope in {"experts", "search", "inputs"}
        settings: dict[str, Any] = {"required": default is ..., "metavar": option.metavar}
        read, choices = _one(option.read), option.choices if option.metavar is None else None
        help, value = option.help, default
        if several:
            help += "; one or several" + (f" of {', '.join(choices)}" if choices else "")
            settings |= {"type": _several(read), "metavar": "A,B"}
            value = default if default is METHODS else (default,)
        else:
            help += AUTO_STRENGTH if option.name == "strength" else ""
            settings |= {"type": read, "choices": choices}
        shown = {METHODS: "all", None: "auto"}.get(default, default)
        help += "" if default is ... else f" [{shown}]"
        settings |= {"default": None if unset else value, "help": help.replace("%", "%%")}
        settings |= {"default": argparse.SUPPRESS} if routed else {}
        command.add_argument(f"--{option.name.replace('_', '-')}", **settings)


def _add_neurons(command: argparse.ArgumentParser, what: str) -> None:
    """Add the arguments that name neurons, whose contexts or words are found."""
    command.add_argument(
        "neurons", nargs="*", metavar="LAYER:INDEX", help=f"neurons to find the {what} of"
    )
    command.add_argument(
        "--top",
        type=int,
        metavar="N",
        help=f"find the {what} of each layer's N most entangled neurons, instead of named ones",
    )


def given_flags(args: argparse.Namespace, *names: str) -> list[str]:
    """Return those of these flags that are not at the default of the command, such as --skip-first."""
    own = parsers()[1][args.command]
    changed = [name for name in names if getattr(args, name) != own.get_default(name)]
    return ["--" + name.replace("_", "-") for name in changed]


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    return parsers()[0]


def parsers() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of all commands, and the parser of each command by its name."""
    top = argparse.ArgumentParser(
        prog="entangle",
        description=entangle.__doc__,
        epilog="entangle COMMAND --help lists the options of a command.",
    )
    top.add_argument("--version", action="version", version=entangle.__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print the result as JSON")
    output.add_argument("--debug", action="store_true", help="print the traceback of an error")

    layers = argparse.ArgumentParser(add_help=False)
    layers.add_argument(
        "--layers",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="patterns of the names of the layers to use, such as '*.mlp.*' [*]",
    )
    layers.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="patterns of the names of layers to leave out, such as '*.router' [none]",
    )

    inputs = argparse.ArgumentParser(add_help=False)
    inputs.add_argument(
        "--input-layers",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="patterns of the names of layers whose input channels are measured too, such as "
        "'*.down_proj'; their rows are named LAYER:input:INDEX [none]",
    )

    device = argparse.ArgumentParser(add_help=False)
    device.add_argument(
        "--device",
        default="auto",
        help="device to run the model on, such as cpu or cuda:1 [auto: cuda if available, else cpu]",
    )
    device.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model [such code is not run]",
    )

    model = argparse.ArgumentParser(add_help=False, parents=[device])
    model.add_argument("model", metavar="MODEL", help="model: a hub id, a folder or a .gguf file")
    verify = argparse.ArgumentParser(add_help=False)
    verify.add_argument("--verify", action="store_true", help=VERIFY)
    spread = argparse.ArgumentParser(add_help=False)
    spread.add_argument("--device-map", choices=["auto"], help=SPREAD)
    spread.add_argument("--offload", type=_path, metavar="FOLDER", help=OFFLOAD)

    model.add_argument(
        "--revision", help="branch, tag or commit of a model on the hub [the main branch]"
    )
    model.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="number type of the weights in memory [auto: as stored]",
    )

    measured = argparse.ArgumentParser(add_help=False, parents=[device, verify])
    measured.add_argument(
        "run", type=_path, metavar="RUN", help="folder of a measured run; its model is loaded"
    )

    evaluation = argparse.ArgumentParser(add_help=False)
    evaluation.add_argument(
        "--evaluation",
        required=True,
        nargs="+",
        metavar="TEXT",
        help=f"held-out text to score or measure on, several in sweep and disentangle: {TEXT}",
    )
    evaluation.add_argument(
        "--evaluation-windows",
        type=int,
        metavar="N",
        help="number of windows of each text of --evaluation, drawn with --seed [all]",
    )

    sizes = argparse.ArgumentParser(add_help=False)
    sizes.add_argument(
        "--windows",
        type=int,
        default=128,
        metavar="N",
        help="number of windows of --text to use, drawn at random [128]",
    )
    sizes.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens per window [512]"
    )
    sizes.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="windows per forward pass [4]"
    )
    windows = argparse.ArgumentParser(add_help=False, parents=[sizes])
    windows.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the draw of windows, of clusters and of shuffled controls [0]",
    )
    windows.add_argument(
        "--bos",
        default="auto",
        choices=["auto", "always", "never"],
        help="begin each window with the tokens that the tokenizer puts before a text (auto), with "
        "its beginning-of-sequence token if there are none (always), or with no such token (never); "
        "tokens that it puts after a text are left out [auto]",
    )
    windows.add_argument(
        "--skip-first",
        type=int,
        default=0,
        metavar="N",
        help="number of tokens at the start of each window that are not counted [0]",
    )

    text = argparse.ArgumentParser(add_help=False, parents=[windows])
    text.add_argument("--text", required=True, nargs="+", metavar="TEXT", help=TEXTS)

    overwrite = argparse.ArgumentParser(add_help=False)
    overwrite.add_argument(
        "--overwrite", action="store_true", help="replace --out if it exists, finished or not"
    )

    bins = "bins of each neuron's histogram [1024]"
    measure = commands.add_parser(
        "measure",
        parents=[model, verify, spread, windows, layers, inputs, overwrite, output],
        help="measure the distribution of every neuron over a text",
    )
    measure.add_argument("--text", nargs="+", metavar="TEXT", help=TEXTS)
    measure.add_argument("--out", type=_path, metavar="RUN", help="new folder for the run")
    measure.add_argument("--resolve", type=_path, metavar="RUN", help=RESOLVE)
    measure.add_argument("--bins", type=int, default=1024, metavar="N", help=bins)
    measure.add_argument(
        "--difficulty",
        type=int,
        default=0,
        metavar="PAIRS",
        help="also measure the mapping difficulty, over this number of pairs of tokens [0: do not]",
    )
    measure.add_argument("--shard", metavar="N/OF", help=SHARD)

    merge = commands.add_parser(
        "merge", parents=[overwrite, output], help="merge the shards of a run into one run"
    )
    merge.add_argument(
        "run", type=_path, nargs="+", metavar="RUN", help="folders of all shards of the run"
    )
    merge.add_argument(
        "--out", type=_path, required=True, metavar="RUN", help="new folder for the merged run"
    )

    plan = commands.add_parser(
        "plan",
        parents=[model, sizes, layers, inputs, output],
        help="estimate what measure and sparsify cost, without loading the model",
    )
    plan.add_argument(
        "--text",
        required=True,
        nargs="+",
        metavar="TEXT",
        help=f"text: {TEXT}; several are mixed by equal shares",
    )
    plan.add_argument("--bins", type=int, default=1024, metavar="N", help=bins)
    plan.add_argument(
        "--offload",
        type=_path,
        metavar="FOLDER",
        help="estimate for commands that are run with --offload [without]",
    )
    sparsity, experts = OPTIONS["sparsity"].help, OPTIONS["experts"].help
    plan.add_argument("--sparsity", default="0.5", metavar="S", help=f"{sparsity} [0.5]")
    plan.add_argument("--experts", type=int, default=1, metavar="N", help=f"{experts} [1]")
    for name in ("solve", "reconstruct"):
        option = OPTIONS[name]
        plan.add_argument(
            f"--{name}",
            default=option.default,
            choices=option.choices,
            help=f"{option.help} [{option.default}]",
        )

    unpacked = argparse.ArgumentParser(add_help=False)
    unpacked.add_argument("--unpacked", action="store_true", help=UNPACKED)

    perplexity = commands.add_parser(
        "perplexity",
        parents=[model, verify, spread, windows, unpacked, output],
        help="score a model on a text",
    )
    perplexity.add_argument(
        "--text", required=True, nargs="+", metavar="TEXT", help=f"text: {TEXT}"
    )
    perplexity.add_argument("--stride", type=int, metavar="N", help=STRIDE)
    perplexity.add_argument("--against", metavar="MODEL", help=AGAINST)
    perplexity.add_argument("--generate", action="store_true", help=GENERATE)

    generate = commands.add_parser(
        "generate",
        parents=[model, verify, spread, unpacked, output],
        help="generate text from a prompt, and time it",
    )
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    generate.add_argument(
        "--tokens", type=int, default=64, metavar="N", help="largest number of new tokens [64]"
    )

    sparsify = commands.add_parser(
        "sparsify",
        parents=[model, verify, spread, text, layers, overwrite, output],
        help="prune a model, or expand it to sparse experts, and save it",
    )
    sparsify.add_argument(
        "--out", type=_path, required=True, metavar="FOLDER", help="new folder for the pruned model"
    )
    _add_options(sparsify, several=False)

    tables = "new folder for the tables and figures"
    sweep = commands.add_parser(
        "sweep",
        parents=[model, verify, text, evaluation, layers, overwrite, output],
        help="prune a model in several ways and score each: one table and one figure",
    )
    sweep.add_argument("--out", type=_path, required=True, metavar="RUN", help=tables)
    sweep.add_argument(
        "--rounded",
        type=_several(read_count),
        default=(),
        metavar="A,B",
        help="also score the dense model with weights rounded to the nearest of 8 or 4 bits, by groups "
        "of 64; one or both of 8, 4 [not rounded]",
    )
    sweep.add_argument(
        "--speed",
        action="store_true",
        help="also measure how long each pruned model takes for a token that it writes; use a machine "
        "that does nothing else",
    )
    _add_options(sweep, several=True)

    ablate = commands.add_parser(
        "ablate",
        parents=[measured, windows, evaluation, layers, overwrite, output],
        help="treat the most entangled neurons, or others, and score: one table and one figure",
        description=ABLATE,
    )
    ablate.add_argument(
        "--text",
        nargs="+",
        metavar="TEXT",
        help=f"calibration {TEXTS}; needed for --intervention sparsify [none]",
    )
    ablate.add_argument("--out", type=_path, required=True, metavar="NEW", help=tables)
    names: dict[str, Any] = {"type": _several(), "metavar": "A,B"}
    numbers: dict[str, Any] = {"type": _several(_one(read_number)), "metavar": "X,X"}
    counts: dict[str, Any] = {"type": _several(_one(read_count)), "metavar": "N,N"}
    ablate.add_argument(
        "--share",
        default=(0.03,),
        help="share of each layer's neurons to treat; one or several [0.03]",
        **numbers,
    )
    ablate.add_argument("--sparsity", help=f"{sparsity}; one or several [0.9]", **names)
    ablate.add_argument("--experts", help=f"{experts}; one or several [1]", **counts)
    solve: dict[str, Any] = {"choices": SOLVERS}
    solve["help"] = (
        "how the kept weights are computed: greedy, by SparseGPT as published; exact, the weights "
        f"with the least error that its mask allows; admm, by a better mask too [{SOLVE}]"
    )
    ablate.add_argument("--solve", **solve)
    ablate.add_argument(
        "--intervention",
        default=("sparsify",),
        help=f"treatment; one or several of {', '.join(INTERVENTIONS)} [sparsify]",
        **names,
    )
    ablate.add_argument(
        "--sets",
        default=SETS,
        help=f"sets of neurons to treat; one or several of {', '.join(SETS)} [all]",
        **names,
    )
    ablate.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="number of random sets, drawn with the seeds 0, 1, ..., whatever --seed is [5]",
    )
    ablate.add_argument(
        "--per-block", action="store_true", help="treat one block at a time [all blocks together]"
    )

    disentangle = commands.add_parser(
        "disentangle",
        parents=[measured, text, evaluation, layers, overwrite, output],
        help="measure neurons within clusters, and with experts: tables and figures",
        description=DISENTANGLE,
    )
    disentangle.add_argument(
        "--out", type=_path, required=True, metavar="NEW", help="new folder for the run and tables"
    )
    disentangle.add_argument(
        "--experts", default=(4, 16), help=f"{experts}; one or several [4,16]", **counts
    )
    disentangle.add_argument(
        "--sparsity", default=("0.8",), help=f"{sparsity}; one or several [0.8]", **names
    )
    disentangle.add_argument("--solve", default=SOLVE, **solve)
    disentangle.add_argument(
        "--neurons",
        nargs="+",
        default=[],
        metavar="LAYER:INDEX",
        help="further neurons whose outputs are kept for plots [each layer's most entangled one]",
    )

    contexts = commands.add_parser(
        "contexts",
        parents=[measured, layers, output],
        help="find the tokens behind neurons' distributions, and add them to the run",
    )
    _add_neurons(contexts, "contexts")
    contexts.add_argument(
        "--prompt",
        metavar="TEXT",
        help="print the neurons' values at each token of TEXT instead, and their places in the "
        "distributions (nothing is added to the run)",
    )

    contexts.add_argument(
        "--delphi",
        type=_path,
        metavar="FOLDER",
        help="also write the tokens at both ends of the distributions into a new folder, in the form that "
        "the automated explainer delphi reads [not written]",
    )

    describe = commands.add_parser(
        "describe",
        parents=[output],
        help="add descriptions of neurons to a run; rank, report and notebooks show them",
    )
    describe.add_argument("run", type=_path, metavar="RUN", help="folder of a measured run")
    describe.add_argument(
        "source",
        type=_path,
        metavar="FILE",
        help="JSON file of texts by LAYER:INDEX, or the folder of explanations that delphi wrote",
    )

    words = commands.add_parser(
        "words",
        parents=[measured, layers, output],
        help="print the tokens that neurons' weights read and write, and add them to the run",
        description=WORDS,
    )
    _add_neurons(words, "words")

    steer = commands.add_parser(
        "steer",
        parents=[measured, output],
        help="set a neuron to a value, and compare with the untouched model",
        description=STEER,
    )
    steer.add_argument("neuron", metavar="LAYER:INDEX", help="neuron, or input LAYER:input:INDEX")
    steer.add_argument(
        "--set",
        required=True,
        type=_several(),
        metavar="A,B",
        help="what to set the neuron to; one or several of zero, mean, quantile:Q and scale:X",
    )
    steer.add_argument("--text", metavar="TEXT", help=f"text to compare on: {TEXT} [RUN's text]")
    steer.add_argument(
        "--windows", type=int, default=16, metavar="N", help="number of windows of the text [16]"
    )
    steer.add_argument(
        "--prompt",
        metavar="TEXT",
        help="also go on with this text, always with the most likely token",
    )
    steer.add_argument(
        "--tokens",
        type=int,
        default=40,
        metavar="N",
        help="largest number of new tokens after --prompt [40]",
    )

    check = commands.add_parser(
        "check",
        parents=[measured, layers, output],
        help="compare a run's distances with those of raw outputs, also by SciPy and POT",
        description=CHECK,
    )
    _add_neurons(check, "exact distances")

    rank = commands.add_parser(
        "rank",
        parents=[layers, output],
        help="print the neurons with the largest distance, or largest other variable",
    )
    rank.add_argument("run", type=_path, metavar="RUN", help="folder of a measured run")
    rank.add_argument(
        "--top", type=int, default=30, metavar="N", help="number of neurons to print [30]"
    )
    rank.add_argument(
        "--by",
        default="wasserstein",
        metavar="VARIABLE",
        help=f"variable to rank by, largest first: {', '.join(VARIABLES)}; for a RUN measured with "
        f"--difficulty also {', '.join(DIFFICULTY_VARIABLES)}; for a RUN of disentangle also "
        f"{', '.join(HELD_OUT_VARIABLES)} [wasserstein]",
    )
    rank.add_argument(
        "--csv", type=_path, metavar="FILE", help="also write the table to FILE, with all digits"
    )

    diff = commands.add_parser(
        "diff",
        parents=[layers, output],
        help="compare the neurons' distances in two runs",
    )
    diff.add_argument("run", type=_path, metavar="RUN", help="folder of the first run")
    diff.add_argument("other", type=_path, metavar="RUN", help="folder of the second run")
    diff.add_argument(
        "--top",
        type=int,
        default=20,
        metavar="N",
        help="number of neurons to print, those with the largest change beyond the error bounds [20]",
    )
    diff.add_argument(
        "--csv", type=_path, metavar="FILE", help="also write all neurons to FILE, with all digits"
    )
    diff.add_argument(
        "--out", type=_path, metavar="FILE", help="also draw both runs' distances into FILE"
    )

    plot = commands.add_parser(
        "plot",
        parents=[output],
        formatter_class=argparse.RawDescriptionHelpFormatter,  # a line for each kind
        help="draw a run of measure, sweep, ablate or disentangle",
        epilog="kinds:\n" + "\n".join(f"  {kind:<13}{shows}" for kind, shows in PLOTS.items()),
    )
    plot.add_argument(
        "run",
        type=_path,
        metavar="RUN",
        help="folder that measure, sweep, ablate or disentangle wrote",
    )
    plot.add_argument("kind", metavar="KIND", type=_kind, help="kind of picture, see below")
    plot.add_argument(
        "neurons",
        nargs="*",
        metavar="LAYER:INDEX",
        help="neurons to draw: one or several for neuron, at most one for clusters and sparse "
        "[for clusters and sparse: the most entangled neuron whose outputs were kept]",
    )
    plot.add_argument(
        "--by",
        metavar="VARIABLE",
        help="variable to draw: any for heatmap, wasserstein or wasserstein_bulk for layers and ranks "
        "[wasserstein]",
    )
    plot.add_argument(
        "--sparsity", metavar="S", help="sparsity to draw, for improvement and sparse [RUN's last]"
    )
    plot.add_argument(
        "--out",
        type=_path,
        metavar="FILE",
        help="file to write, in the format of its suffix, such as .png or .svg [a PNG in RUN/figures]",
    )

    report = commands.add_parser(
        "report",
        parents=[output],
        help="write runs of any kind into one HTML file that needs no network",
    )
    report.add_argument(
        "run", type=_path, nargs="+", metavar="RUN", help="folders of runs, in the report's order"
    )
    report.add_argument(
        "--out",
        type=_path,
        metavar="FILE",
        help="HTML file to write [report.html in the first RUN]",
    )
    return top, commands.choices
