"""Command lines: good ones for each command, and what is wrong with them, drawn by seed."""

import argparse
import functools
import random
from collections.abc import Sequence
from typing import Any

from entangle.arguments import PLOTS, VARIABLES, parsers
from tests.torture.place import SCORED, SIZES, SOME, TEXT

UP = "model.layers.0.mlp.up_proj"
NEW = "--out new"
LINES: dict[str, Sequence[str]] = {
    "measure": (f"measure model {TEXT} {SOME} {NEW}", f"measure gpt2 {TEXT} {NEW}",
                f"measure model --text text.txt self: {SIZES} {SOME} {NEW}"),
    "merge": (f"merge shard-1 shard-2 {NEW}", f"merge shard-2 shard-1 {NEW}"),
    "plan": ("plan model --text text.txt --windows 4 --length 16 --batch-size 2",),
    "perplexity": (f"perplexity model {TEXT}", f"perplexity pruned {TEXT}",
                   f"perplexity expanded {TEXT}"),
    "generate": ("generate model --prompt some --tokens 2", "generate expanded --prompt a"),
    "sparsify": (f"sparsify model {TEXT} {SOME} --sparsity 0.5 {NEW}",
                 f"sparsify model {TEXT} {SOME} --sparsity 0.5 --experts 2 {NEW}",
                 f"sparsify model {TEXT} {SOME} --sparsity 0.5 --budget run {NEW}",
                 f"sparsify model --text self: {SIZES} {SOME} --sparsity 0.5 --reconstruct mlp {NEW}"),
    "sweep": (f"sweep model {SCORED} {SOME} --sparsity 0.5 --method wanda --mask row {NEW}",
              f"sweep model {SCORED} {SOME} --sparsity 2:4 --method sparsegpt --experts 1,2 {NEW}",
              f"sweep model {TEXT} --evaluation evaluation.txt texts {SOME} --sparsity 0.5 {NEW}"),
    "ablate": (f"ablate run {SCORED} {SOME} --seeds 1 --share 0.2 {NEW}",
               f"ablate run {SCORED} {SOME} --seeds 1 --share 0.2 --intervention zero {NEW}"),
    "disentangle": (f"disentangle run {SCORED} {SOME} --experts 2 {NEW}",),
    "contexts": (f"contexts run {UP}:3", "contexts run --top 1 --layers *.0.mlp.up_proj"),
    "check": (f"check run {UP}:3", "check run --layers *.0.mlp.*"),
    "words": (f"words run {UP}:3", "words run --top 1 --layers *.0.mlp.down_proj"),
    "steer": (f"steer run {UP}:3 --set zero,scale:2 --windows 2",
              f"steer run {UP}:3 --set mean --windows 1 --prompt some --tokens 2"),
    "describe": ("describe run told.json",),
    "rank": ("rank run", "rank run-2 --top 5 --by kurtosis", "rank untangled --csv new.csv"),
    "diff": ("diff run run-2", "diff run run-2 --csv new.csv", "diff run run-2 --out new.png"),
    "plot": ("plot run heatmap", f"plot run neuron {UP}:3", "plot swept sweep --out new.svg",
             "plot ablated ablation", "plot untangled clusters", "plot untangled improvement",
             "plot run difficulty", "plot run-2 layers", "plot run ranks"),
    "report": ("report run --out new.html", "report run swept ablated untangled", "report swept"),
}  # fmt: skip
# How often each is drawn: those with more arguments and inputs more often.
WEIGHTS = {"measure": 12, "sparsify": 12, "sweep": 10, "ablate": 10, "disentangle": 7, "merge": 7,
           "perplexity": 9, "generate": 7, "contexts": 7, "check": 4, "words": 5, "steer": 5, "describe": 2, "plan": 7, "rank": 6, "diff": 6, "plot": 9,
           "report": 3}  # fmt: skip
assert {*LINES} == {*WEIGHTS} == {*parsers()[1]}

# fmt: off
NUMBERS = (
    *("-1", "0", "1", "2", "3", "17", "64", "65", "1000000000", "99999999999999999999", "-0", "+2"),
    *("nan", "inf", "-inf", "0.5", "-0.5", "1.0", "1e-300", "1e400", "", " ", "two", "½", "٣", "1_0"),
    *("0x10", " 4 ", "4,5", "1,,2", ",", "4,4", "2:4", "4:2", "0:0", "-1:4", "2:-4", "a:b", "2:4:8"),
    *(":", "0:4", "4:4", "2:1000000000", "1:2:", "None", "True", "9" * 5000, "1/2", "2/2", "3/2"),
    *("0/2", "a/b", "1/2/3", "0.5,0.5", "0.5,2:4", "nan,0.5", "[1]", "--", "auto", "0.999999999"),
)
WORDS = (
    *("", " ", "a", "None", "auto", "all", "x" * 300, "é½神🙂", "a\nb", "a\tb", "\x1b[31m", "*", "[", "[!"),
    *("**", "?", "*.up_prj", "*.mlp.*", "model.layers.0", "a,b", ",", "{}", "%s", "{0}", "\\", "'", '"'),
    *("-x", "--", "--nothing", "=", "cpu", "cuda", "cuda:0", "cuda:99", "mps", "meta", "cpu:1", "0"),
    *("float64", "int8", "wasserstein", "sparsegpt,sparsegpt", "sparsegpt,none", "row,block", "random"),
    *("zero,mean", "kmeans", "entanglement", "depth", "uniform,trim", "run:std", "run:nothing", "\udcff"),
    *("run,run-2", "nowhere:std", ":std", "run:", "owl", "trim", "wasserstein,wasserstein", "main"),
)
PATHS = (
    *("nowhere", "", ".", "..", "/", "./nowhere", "text.txt", "empty", "loop", "dangling", "fifo"),
    *("x" * 300, "deep/" * 900 + "x", "a\nb", "a\0b", "text.txt/new", "/proc/entangle/x", "/dev/null"),
    *("\udcff", "~", "-", "--", "hub:", "hub:a", "hub:a/b:c#d", "hub:#", "hub:a/b/c/d", "file://x"),
    *("model", "gpt2", "texts", "short.txt", "run", "run-2", "run-gpt2", "shard-1", "pruned", "new"),
    *("expanded", "swept", "ablated", "untangled", "run/run.json", "model/config.json", "new.gguf"),
    *("model.gguf", "run/neurons.zarr", "new.png", "new.wrong", "new", "new.PNG", "new.csv", "new.jpg"),
    *("new.pdf", "new.html", "é½ 神.png", "empty/new", "run/new", "model/", "a/b", "nobody/nothing"),
    *("unwritable/new", "con", "new.partial", "run.partial", ".png", "http://127.0.0.1:1/x"),
)
NEURONS = (
    *(f"{UP}:0", f"{UP}:3", f"{UP}:36", f"{UP}:37", f"{UP}:-1", f"{UP}:", f"{UP}", f"{UP}:3:4"),
    *(f"{UP}:a", f"{UP}:٣", f"{UP}:1e9", f"{UP}:{10**30}", ":3", ":", "", "model.layers.0.mlp.up_prj:3"),
    *("*:3", "a\nb:3", "x" * 300 + ":1", "model.layers.9.mlp.up_proj:3", "lm_head:3", f" {UP}:3"),
    "model.layers.1.self_attn.q_proj:1",
)
# fmt: on
PROMPTS = ("", " ", "a" * 65, "a" * 64, "a" * 9999, "神🙂", "\0", "\n", "\udcff", "<s>", "</s>" * 3)
GOOD = {  # values that work, so that others are reached
    "layers": ["*.1.*", "*.0.*", "*", "*.q_proj"],
    "input_layers": ["*.down_proj", "*"],
    "windows": ["1", "3", "4"],
    "length": ["2", "8", "16", "64"],
    "batch_size": ["1", "3"],
    "seed": ["0", "7"],
    "bins": ["2", "64", "2048"],
    "skip_first": ["0", "1", "15"],
    "bos": ["always", "never"],
    "dtype": ["float32", "bfloat16", "float16"],
    "device": ["cpu"],
    "sparsity": ["0.5", "0", "2:4", "0.99"],
    "experts": ["1", "2"],
    "difficulty": ["0", "1", "16"],
    "evaluation_windows": ["1", "3"],
    "share": ["0.1", "0.2"],
    "seeds": ["1", "2"],
    "tokens": ["1", "3"],
    "top": ["1", "5", "100000"],
    "by": list(VARIABLES),
    "strength": ["0.5", "auto", "0"],
    "budget": ["uniform", "trim", "run", "run:std", "run:ranks"],
}
SLOW = {"seeds": NUMBERS[:5]}  # more would be right, and take long


def command_of(rng: random.Random) -> str:
    """Draw a command."""
    return rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]


def draw(name: str, rng: random.Random) -> tuple[list[str], int]:
    """Return the words of a command line, and how many things are wrong with it, or may be."""
    groups = grouped(rng.choice(LINES[name]).split(" "))
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        option = rng.choice(_options(name))
        _put(groups, [option.option_strings[-1], *_good(option, rng)])
    changes = rng.choices([0, 1, 2, 3], [25, 55, 15, 5])[0]
    for _ in range(changes):
        change = rng.choices(
            [_value, _positional, _drop, _foreign, _extra, _twice, _shuffle, _short, _equals],
            [60, 14, 8, 5, 4, 4, 3, 2, 2],
        )[0]
        change(groups, name, rng)
    return [word for group in groups for word in group], changes


Groups = list[list[str]]  # the command, then a positional argument or a flag and its values each


def grouped(words: Sequence[str]) -> Groups:
    groups: Groups = []
    for word in words:
        if word.startswith("--") or not groups or not groups[-1][0].startswith("--"):
            groups.append([word])
        else:
            groups[-1].append(word)
    return groups


@functools.cache
def _options(name: str) -> list[Any]:
    """Return argparse's actions of a command's flags."""
    actions = parsers()[1][name]._actions
    return [action for action in actions if action.option_strings and action.dest != "help"]


def _good(option: argparse.Action, rng: random.Random) -> list[str]:
    if option.nargs == 0:
        return []
    if option.choices:
        return [str(rng.choice([*option.choices]))]
    return [rng.choice(GOOD.get(option.dest, ["1"]))] if option.dest in GOOD else _bad(option, rng)


def _bad(option: argparse.Action, rng: random.Random) -> list[str]:
    """Return values for a flag that are wrong, or right by chance."""
    if option.nargs == 0:
        return rng.choice([["1"], [], []])
    if option.dest in SLOW:
        return [rng.choice(SLOW[option.dest])]
    numeric = option.type is int or option.dest in {"share", "sparsity", "experts", "shard"}
    pool: Sequence[str] = WORDS
    if option.dest in {"text", "evaluation", "out", "csv", "offload", "budget"}:
        pool = rng.choice([PATHS, PATHS, PATHS, WORDS])
    elif option.dest == "neurons":
        pool = NEURONS
    elif option.dest == "prompt":
        pool = PROMPTS
    elif numeric or option.metavar in {"X", "X,X", "N,N"}:
        pool = rng.choice([NUMBERS] * 5 + [WORDS])
    elif rng.random() < 0.4:
        pool = NUMBERS
    count = rng.choice([1, 1, 1, 2, 0]) if option.nargs == "+" else 1
    return [rng.choice(pool) for _ in range(count)]


def _put(groups: Groups, group: list[str]) -> None:
    """Give a flag other values, or add it."""
    for number, old in enumerate(groups):
        if old[0] == group[0]:
            groups[number] = group
            return
    groups.append(group)


def _value(groups: Groups, name: str, rng: random.Random) -> None:
    options = _options(name)
    present = {group[0] for group in groups}
    named = [option for option in options if present & {*option.option_strings}]
    option = rng.choice(named if named and rng.random() < 0.5 else options)
    _put(groups, [option.option_strings[-1], *_bad(option, rng)])


def _positional(groups: Groups, name: str, rng: random.Random) -> None:
    places = [n for n, group in enumerate(groups) if n and not group[0].startswith("--")]
    if not places:
        return
    place = rng.choice(places)
    pools: list[Sequence[str]] = [PATHS, PATHS, WORDS]
    if name == "plot" and place == 2:
        pools = [list(PLOTS), list(PLOTS), WORDS]
    if name in {"plot", "contexts", "words"} and place >= (3 if name == "plot" else 2):
        pools = [NEURONS]
    groups[place] = [rng.choice(rng.choice(pools))]


def _drop(groups: Groups, name: str, rng: random.Random) -> None:
    del groups[rng.randrange(1 if len(groups) > 1 else 0, len(groups))]


def _foreign(groups: Groups, name: str, rng: random.Random) -> None:
    other = rng.choice(list(LINES))
    option = rng.choice(_options(other))
    groups.append([rng.choice(option.option_strings), *_good(option, rng)])


def _extra(groups: Groups, name: str, rng: random.Random) -> None:
    word = rng.choice([*rng.choice([PATHS, WORDS, NEURONS]), "-h", "--help", "--version", "-v"])
    groups.insert(rng.randint(1, len(groups)), [word])


def _twice(groups: Groups, name: str, rng: random.Random) -> None:
    option = rng.choice(_options(name))
    groups.append([option.option_strings[-1], *_bad(option, rng)])


def _shuffle(groups: Groups, name: str, rng: random.Random) -> None:
    rest = groups[1:]
    rng.shuffle(rest)
    groups[1:] = rest


def _short(groups: Groups, name: str, rng: random.Random) -> None:
    """Write a flag shorter, as argparse allows where only one begins so."""
    places = [n for n, group in enumerate(groups) if group[0].startswith("--") and group[0] != "--"]
    if places:
        place = rng.choice(places)
        word = groups[place][0]
        groups[place] = [word[: rng.randint(2, len(word))], *groups[place][1:]]


def _equals(groups: Groups, name: str, rng: random.Random) -> None:
    places = [n for n, group in enumerate(groups) if group[0].startswith("--") and len(group) == 2]
    if places:
        place = rng.choice(places)
        groups[place] = ["=".join(groups[place])]
