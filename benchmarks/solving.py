"""The evidence of docs/pruning-evidence.md on solving again and reconstruction. Run `make solving`.

Each step is one `entangle sweep`, which goes on when it is killed. The arms of a finished step are
appended to the table `EVIDENCE`, and a step whose arms are all there is not run again, also on
another machine. `python -m benchmarks.solving STEP ...` runs some of the steps. `python -m benchmarks.tables` writes
the tables of README.md and docs/pruning-evidence.md and draws the pictures, of all arms that are there.
"""

import fcntl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes

from entangle.model import divergence
from entangle.runs import store
from entangle.runs.dataset import short_names

MODEL, TEXTS = "data/smollm2-135m", ("data/python-docs", "data/fortunes")
RUN, RUNS = Path("runs/demo"), Path("runs/solving")
EVIDENCE = Path("figures/evidence/smollm2-135m/solving.csv")
PICTURE = Path("figures/solving.png")
ALL = f"sweep {MODEL} --text {TEXTS[0]} --evaluation {' '.join(TEXTS)} --evaluation-windows 41"
ALL += " --layers *.mlp.* --propagate sparse --batch-size 1"
BUDGET = f" --budget {RUN}:ranks --across entanglement"
MIXTURE, RANDOM, TUNED = " --experts 16", " --experts 16 --assign random", " --reconstruct mlp"
SPARSEGPT_AT, SOLVES = " --method sparsegpt --sparsity ", ("greedy", "exact", "admm")
AT_70 = SPARSEGPT_AT + "0.7"
WITH = {  # experts and budgets
    "one": "",
    "one-budget": BUDGET,
    "experts": MIXTURE,
    "experts-budget": MIXTURE + BUDGET,
    "experts-random": RANDOM,
}

STEPS = {
    name: AT_70 + WITH[name] + f" --solve {','.join(SOLVES)}" for name in ("one", "one-budget")
}
for name in ("experts", "experts-budget", "experts-random"):
    STEPS |= {f"{name}-{solve}": AT_70 + WITH[name] + f" --solve {solve}" for solve in SOLVES}
for name, end in WITH.items():
    for solve in ("greedy", "admm"):
        STEPS[f"{name}-{solve}-tuned"] = AT_70 + end + f" --solve {solve}" + TUNED
STEPS["magnitude-tuned"] = " --method magnitude --solve greedy --sparsity 0.7" + TUNED
for share in ("0.5", "0.6", "0.8"):
    for name in ("one", "experts-budget"):
        at = SPARSEGPT_AT + share + WITH[name]
        STEPS |= {f"{share}-{name}-{solve}": f"{at} --solve {solve}" for solve in SOLVES[:2]}
        STEPS[f"{share}-{name}-tuned"] = f"{at} --solve admm" + TUNED

WAYS = {  # solve, reconstruct
    "greedy": ("greedy", "none"),
    "exact": ("exact", "none"),
    "admm": ("admm", "none"),
    "greedy + reconstructed": ("greedy", "mlp"),
    "admm + reconstructed": ("admm", "mlp"),
}
SPARSEGPT = "method == 'sparsegpt' and across "
GROUPS = {  # as queries of the table
    "one expert": SPARSEGPT + "== 'uniform' and experts == '1'",
    "one expert, budget": SPARSEGPT + "== 'entanglement' and budget == 'ranks' and experts == '1'",
    "16 experts": SPARSEGPT + "== 'uniform' and experts == '16' and assign == 'kmeans'",
    "16 experts, budget": SPARSEGPT + "== 'entanglement' and experts == '16'",
    "16 random experts": SPARSEGPT + "== 'uniform' and assign == 'random'",
    "magnitude": "method == 'magnitude'",
}
NOT_RUN = "not run"
LADDER = {  # the rows of README's table: a group, and a way to solve
    "SparseGPT, mask by row": ("one expert", "greedy"),
    "with a budget: more weights where neurons are entangled (`--across entanglement`)": (
        "one expert, budget",
        "greedy",
    ),
    "with the budget, kept weights solved again (`--solve exact`)": ("one expert, budget", "exact"),
    "with the budget, solved again, 16 experts (`--experts 16`)": ("16 experts, budget", "exact"),
    "with the budget, each MLP reconstructed (`--solve admm --reconstruct mlp`)": (
        "one expert, budget",
        "admm + reconstructed",
    ),
    "with the budget, each MLP reconstructed, 16 experts": (
        "16 experts, budget",
        "admm + reconstructed",
    ),
}
CHOSEN = ["method", "solve", "reconstruct", "experts", "assign", "budget", "across", "sparsity"]
CHOSEN += ["inputs", "input_sparsity", "input_shares"]
COLUMNS = [
    *CHOSEN,
    *("evaluation", "realised", "density", "perplexity", "perplexity_error", "nats", "nats_error"),
    *("difference", "difference_error", "layer_error", "held_out_error", "mlp_error_before"),
    *("mlp_error", "windows", "tokens", "realised_inputs", "multiply_adds", "router_multiply_adds"),
    *("dense_multiply_adds", "stored", "disk_bytes", "memory_bytes", *divergence.COLUMNS),
]


def main(names: Sequence[str]) -> int:
    """Run steps, by default all that are not finished."""
    run(STEPS, names)
    return 0


def run(steps: Mapping[str, str], names: Sequence[str]) -> None:
    """Run those of the named steps whose arms are not in the table; without names all of them."""
    done = set(pd.read_csv(EVIDENCE)["step"]) if EVIDENCE.is_file() else set()
    for step in names or steps:
        if step not in done:
            words = [*(ALL + steps[step]).split(), "--out", str(RUNS / step)]
            if not (RUNS / step / "run.json").is_file():
                subprocess.run([sys.executable, "-m", "entangle", *words], check=True)
            append(step)


def append(step: str) -> None:
    """Append the arms of a finished step to the table; those of the first step with the dense model."""
    table = arms(RUNS / step).assign(step=step)
    EVIDENCE.parent.mkdir(parents=True, exist_ok=True)
    with EVIDENCE.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # other steps may run beside this one
        first = not file.tell()
        rows = table if first else table[table["method"] != "dense"]
        rows.to_csv(file, index=False, header=first, lineterminator="\n")


def arms(folder: Path) -> pd.DataFrame:
    """Return a row for each arm and text of a sweep, with its seconds and its nats of each window."""
    table = pd.read_csv(folder / "tables" / "sweep.csv", dtype=dict.fromkeys(CHOSEN, str))
    texts = store.read_json(folder / "run.json")["evaluation_texts"]
    seconds = store.read_json(folder / "log.json")["arm_seconds"]
    found: list[dict[str, Any]] = []
    for name in seconds:
        nats = store.read_json(folder / "arms" / f"{name}.json")["window_nats"]
        # The texts take turns, as in `mixed_windows`.
        found += [
            {
                "seconds": seconds[name],
                "window_nats": " ".join(f"{n:.6f}" for n in nats[i :: len(texts)]),
            }
            for i in range(len(texts))
        ]
    return pd.concat([table[COLUMNS], pd.DataFrame(found)], axis=1)


def evidence() -> pd.DataFrame:
    """Return the table of all finished arms, with a row for each arm and text."""
    options = dict.fromkeys([*CHOSEN, "step"], "")
    table = pd.read_csv(EVIDENCE, dtype=dict.fromkeys(CHOSEN, str))
    return table.fillna(options)


def draw(table: pd.DataFrame) -> None:
    """Draw the picture."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for text, panel in zip(dict.fromkeys(table["evaluation"]), panels, strict=True):
        _draw(panel, table[(table["evaluation"] == text) & (table["sparsity"] == "0.7")], text)
    panels[0].legend(fontsize="small")
    figure.savefig(PICTURE, dpi=150)


def solved() -> pd.DataFrame:
    """Return the dense model's rows of the evidence, and those of the arms with dense inputs."""
    return evidence().query(
        "inputs in ('', 'dense') and method in ('dense', 'sparsegpt', 'magnitude')"
    )


def tables(table: pd.DataFrame) -> list[str]:
    """Return the lines of the page's tables: for each sparsity and text the ways to solve by group."""
    done = len({*table["step"]} & {*STEPS})
    found = ["", f"{done} of the {len(STEPS)} sweeps of `make solving` are finished."]
    for share, at in table[table["method"] != "dense"].groupby("sparsity"):
        for text in dict.fromkeys(at["evaluation"]):
            rows = at[at["evaluation"] == text]
            groups = {name: rows.query(query) for name, query in GROUPS.items()}
            groups = {name: one for name, one in groups.items() if len(one)}
            found += ["", f"At {float(str(share)):.0%}, on {_facts(table, text)}:", ""]
            found += [f"| kept weights | {' | '.join(groups)} |", "|---" * (len(groups) + 1) + "|"]
            for way, (solve, reconstruct) in WAYS.items():
                asked = f"solve == '{solve}' and reconstruct == '{reconstruct}'"
                cells = [cell(one.query(asked)) for one in groups.values()]
                if any(one != NOT_RUN for one in cells):
                    found.append(f"| {way} | {' | '.join(cells)} |")
    return found


def _facts(table: pd.DataFrame, text: str) -> str:
    rows = table[(table["evaluation"] == text) & (table["method"] == "dense")]
    dense = rows.iloc[0]
    return f"{short_names([text])[0]} (dense {dense['perplexity']:.1f} ± {dense['perplexity_error']:.1f})"


def ladder(table: pd.DataFrame) -> list[str]:
    """Return the lines of README's table: what each step gives at 70%, on both texts.

    Weights stored and read are those of the pruned layers and their routers, over the dense.
    """
    texts = [*dict.fromkeys(table["evaluation"])]
    found = ["", "| | stored | read | the same kind of text | another kind of text |"]
    found.append("|---|---|---|---|---|")
    dense = table[table["method"] == "dense"].set_index("evaluation")["perplexity"]
    cells = [f"{dense[text]:.1f}" for text in texts]
    found.append(f"| the dense model | 1 | 1 | {' | '.join(cells)} |")
    for name, (group, way) in LADDER.items():
        solve, reconstruct = WAYS[way]
        asked = f"sparsity == '0.7' and solve == '{solve}' and reconstruct == '{reconstruct}' and "
        rows = table.query(asked + GROUPS[group])
        if len(rows):
            shares = rows.iloc[0][["stored", "density"]] / [rows.iloc[0]["dense_multiply_adds"], 1]
            cells = [f"{share:.2g}" for share in shares]
            cells += [cell(rows[rows["evaluation"] == text]) for text in texts]
            found.append(f"| {name} | {' | '.join(cells)} |")
    return [*found, ""]


def cell(arms: pd.DataFrame) -> str:
    """Return an arm's perplexity, and its difference to the dense model in nats."""
    if arms.empty:
        return NOT_RUN
    row = arms.iloc[-1]
    change = f"{row['difference']:.3f} ± {row['difference_error']:.3f}"
    return f"{row['perplexity']:.1f} ({change})"


def _draw(panel: Axes, rows: pd.DataFrame, text: str) -> None:
    """Draw the nats above the dense model's by the way of solving, a line for each group."""
    ways = list(WAYS.values())
    for name, query in GROUPS.items():
        arms = rows.query(query)
        if arms.empty:
            continue
        places = [ways.index(way) for way in zip(arms["solve"], arms["reconstruct"], strict=True)]
        found = arms.assign(place=places).sort_values("place")
        error = found["difference_error"]
        panel.errorbar(found["place"], found["difference"], error, marker="o", label=name)
    panel.set(title=text, ylabel="nats per token above the dense model", ylim=(0, None))
    names = [way.replace(" + ", "\n+ ") for way in WAYS]
    panel.set_xticks(range(len(WAYS)), names, fontsize="small")
    panel.set_xlim(-0.4, len(WAYS) - 0.6)


def window_nats(row: "pd.Series[Any]") -> npt.NDArray[np.float64]:
    """Return the nats per token of each window of a row of the table."""
    return np.array(row["window_nats"].split(), dtype=np.float64)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
