"""The rivals of docs/pruning-evidence.md: perplexity against the weights that a token reads.

Run `make rivals`. Pruned weights, sparse inputs, both, and rounded weights, at the same number of
weights read. Steps and table are those of `benchmarks/solving.py`, and the arms of its steps are
rivals too. `python -m benchmarks.rivals STEP ...` runs some of the steps.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes

from benchmarks import solving
from benchmarks.solving import BUDGET, RUN, TUNED
from entangle.experiments.sweep_table import DENSE, ROUNDED
from entangle.runs.dataset import short_names

PICTURE = Path("figures/rivals.png")
READ = (0.5, 0.4, 0.3, 0.2)  # of the weights, for a token
GAINS = ("entanglement", "search")
NATS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # marks of the picture's axis
EXACT, ADMM = " --method sparsegpt --solve exact", " --method sparsegpt --solve admm"
DENSE_WEIGHTS = " --method sparsegpt --sparsity 0"
UNIFORM, GREEDY = " --input-shares uniform", " --input-shares greedy"
BLOCKS = f" --budget {RUN}:uniform"  # and rows alike
BOTH = {
    "0.3": " --sparsity 0.5 --input-sparsity 0.4",
    "0.2": " --sparsity 0.6 --input-sparsity 0.5",
}

STEPS = {}
for share in ("0.5", "0.7", "0.6", "0.8"):
    end = DENSE_WEIGHTS + UNIFORM + f" --inputs teal,wina --input-sparsity {share}"
    STEPS[f"inputs-{share}"] = end + (" --rounded 8,4" if share == "0.5" else "")
for read, shares in BOTH.items():
    STEPS[f"both-{read}"] = EXACT + shares + UNIFORM + " --inputs teal"
STEPS |= {
    "others-one-budget": EXACT + " --sparsity 0.5,0.6,0.8" + BUDGET,
    "blocks-0.7": EXACT + " --sparsity 0.7 --across entanglement,lsa" + BLOCKS,
    "search-0.7": EXACT + " --sparsity 0.7 --across search" + BLOCKS,
    "others-lsa": EXACT + " --sparsity 0.5,0.6,0.8 --across lsa",
}
for read, shares in BOTH.items():
    STEPS[f"both-{read}-tuned"] = ADMM + TUNED + shares + UNIFORM + " --inputs teal"
for share in ("0.5", "0.7", "0.6", "0.8"):
    end = DENSE_WEIGHTS + GREEDY + f" --inputs teal --input-sparsity {share}"
    STEPS[f"inputs-{share}-greedy"] = end
for share in ("0.5", "0.6", "0.8"):
    STEPS[f"search-{share}"] = EXACT + f" --sparsity {share} --across search" + BLOCKS

_ONE = "method == 'sparsegpt' and inputs in ('', 'dense') and experts == '1' and "
_ALIKE = _ONE + "budget == 'uniform' and across == 'uniform' and "
_BUDGET = (
    "inputs in ('', 'dense') and budget == 'ranks' and across == 'entanglement' and experts == "
)
_EXACT = "solve == 'exact' and reconstruct == 'none'"
_ADMM = "solve == 'admm' and reconstruct == 'mlp'"
_BLOCKS = _ONE + _EXACT + " and budget == 'uniform' and across == "
_INPUTS = "method == 'none' and inputs == "
_BOTH = "method == 'sparsegpt' and inputs == 'teal' and input_shares == 'uniform' and "
RIVALS = {  # as queries of the table, with the colour and the kind of their lines
    "SparseGPT, mask by row": (
        _ALIKE + "solve == 'greedy' and reconstruct == 'none'",
        "0.6",
        "o-",
    ),
    "SparseGPT, solved again": (_ALIKE + _EXACT, "#6aaed6", "o-"),
    "solved again, LSA's blocks": (_BLOCKS + "'lsa'", "#6aaed6", "^--"),
    "solved again, blocks by search": (_BLOCKS + "'search'", "#6aaed6", "s-."),
    "solved again, blocks by entanglement": (_BLOCKS + "'entanglement'", "#6aaed6", "D:"),
    "solved again, entanglement budget": (_BUDGET + "'1' and " + _EXACT, "#2171b5", "D-"),
    "solved again, budget, 16 experts": (_BUDGET + "'16' and " + _EXACT, "#2171b5", "D--"),
    "ADMM, reconstructed": (_ALIKE + _ADMM, "#0b3c5d", "o-"),
    "ADMM, reconstructed, budget": (_BUDGET + "'1' and " + _ADMM, "#0b3c5d", "D-"),
    "ADMM, reconstructed, budget, 16 experts": (_BUDGET + "'16' and " + _ADMM, "#0b3c5d", "D--"),
    "TEAL, uniform shares": (_INPUTS + "'teal' and input_shares == 'uniform'", "#b8306b", "o-"),
    "TEAL, greedy shares": (_INPUTS + "'teal' and input_shares == 'greedy'", "#b8306b", "^--"),
    "WINA, uniform shares": (_INPUTS + "'wina' and input_shares == 'uniform'", "#e08214", "o-"),
    "solved again, and TEAL": (_BOTH + _EXACT, "#2a9d6f", "o-"),
    "ADMM, reconstructed, and TEAL": (_BOTH + _ADMM, "#2a9d6f", "D--"),
}


def main(names: Sequence[str]) -> int:
    """Run steps, by default all that are not finished."""
    solving.run(STEPS, names)
    return 0


def draw(table: pd.DataFrame) -> None:
    """Draw the picture."""
    texts = [*dict.fromkeys(table["evaluation"])]
    figure = plt.figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(texts), sharex=True)
    for text, panel in zip(texts, panels, strict=True):
        _draw(panel, table[table["evaluation"] == text])
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small"
    )
    figure.supxlabel("weights read for a token, % of the MLPs' dense weights, routers included")
    figure.savefig(PICTURE, dpi=150)


def rivals() -> pd.DataFrame:
    """Return the evidence, with the share of the dense weights that a token reads as `read`."""
    table = solving.evidence()
    pruned = pd.to_numeric(table["sparsity"], errors="coerce").fillna(0)
    zeros = pd.to_numeric(table["input_sparsity"], errors="coerce").fillna(0)
    return table.assign(read=((1 - pruned) * (1 - zeros)).round(9))


def tables(table: pd.DataFrame) -> list[str]:
    """Return the lines of the tables of all texts."""
    texts = dict.fromkeys(table["evaluation"])
    return [line for text in texts for line in table_of(table[table["evaluation"] == text])]


def table_of(rows: pd.DataFrame) -> list[str]:
    """Return the lines of a text's table: rivals by the weights that a token reads."""
    dense = rows[rows["method"] == "dense"].iloc[0]
    facts = f"{short_names([dense['evaluation']])[0]}, dense {dense['perplexity']:.1f}"
    arms_of = {name: rows.query(query) for name, (query, *_) in RIVALS.items()}
    reads = [
        read for read in READ if any((arms["read"] == read).any() for arms in arms_of.values())
    ]
    found = ["", f"| {facts} | stored | {' | '.join(f'{read:.0%} read' for read in reads)} |"]
    found.append("|---" * (len(reads) + 2) + "|")
    for name, arms in arms_of.items():
        if len(arms):
            cells = [solving.cell(arms[arms["read"] == read]) for read in reads]
            found.append(f"| {name} | {stored(arms)} | {' | '.join(cells)} |")
    for method, arms in rows[rows["method"].isin(ROUNDED.values())].groupby("method", sort=False):
        size = float(arms.iloc[0]["disk_bytes"] / dense["disk_bytes"])
        found.append(
            f"| `{method}`: reads all | {size:.2f} of the bytes | {solving.cell(arms)}{' |' * len(reads)}"
        )
    found += ["", *filter(None, (share_of_gain(arms_of, read) for read in reads))]
    missing = [f"all at {read:.0%}" for read in READ if read not in reads]
    missing += [name for name, arms in arms_of.items() if arms.empty]
    return [*found, f"Not run yet: {'; '.join(missing)}."] if missing else found


def share_of_gain(arms_of: Mapping[str, pd.DataFrame], read: float) -> str:
    """Return how much of a search's gain over uniform blocks those of the distance give without one.

    The gains are nats, paired by window. Empty if an arm is missing.
    """
    names = ("SparseGPT, solved again", *(f"solved again, blocks by {x}" for x in GAINS))
    arms = [arms_of[name][arms_of[name]["read"] == read] for name in names]
    if any(one.empty for one in arms):
        return ""
    uniform, ours, best = (solving.window_nats(one.iloc[-1]) for one in arms)
    share = (uniform - ours).mean() / (uniform - best).mean()
    rest = (uniform - ours) - share * (uniform - best)
    error = rest.std(ddof=1) / math.sqrt(len(rest)) / abs((uniform - best).mean())
    return f"Entanglement gives {share:.2f} ± {error:.2f} of the search's gain at {read:.0%}."


def stored(arms: pd.DataFrame) -> str:
    """Return the weights that arms store over the dense weights, as one number or a range."""
    shares = (arms["stored"] / arms["dense_multiply_adds"]).round(1)
    ends = dict.fromkeys((f"{shares.min():.1f}", f"{shares.max():.1f}"))
    return " to ".join(ends)


def _draw(panel: Axes, rows: pd.DataFrame) -> None:
    """Draw perplexity against the weights that a token reads, a line for each rival.

    The axis is logarithmic in the nats above the dense model. Bars are their standard errors, paired
    by window.
    """
    dense = rows[rows["method"] == DENSE].iloc[0]["perplexity"]
    for name, (query, colour, kind) in RIVALS.items():
        arms = rows.query(query).sort_values("density")
        if len(arms):
            style: dict[str, Any] = {"color": colour, "markersize": 4, "linewidth": 1.2}
            style |= {"capsize": 2, "fmt": kind, "label": name}
            panel.errorbar(arms["density"], arms["difference"], arms["difference_error"], **style)
    for nats in rows.loc[rows["method"] == "rtn4", "difference"]:
        panel.axhline(nats, color="0.3", linewidth=0.8, linestyle=":")
        place: Any = (0.01, nats)
        panel.annotate("rtn4", place, xycoords=("axes fraction", "data"), va="bottom")
    panel.set_yscale("log")
    panel.set_yticks(
        NATS, [f"{dense * math.exp(nats):,.{1 if nats < 1 else 0}f} (+{nats:g})" for nats in NATS]
    )
    panel.yaxis.set_minor_locator(ticker.NullLocator())
    panel.set_xticks(READ, [f"{read:.0%}" for read in READ])
    panel.set(
        title=short_names([rows["evaluation"].iloc[0]])[0],
        xlim=(0.17, 0.53),
        ylim=(NATS[0], NATS[-1]),
    )
    panel.set_ylabel(f"perplexity (nats above the dense model's {dense:.1f})")
    panel.grid(axis="y", alpha=0.25)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
