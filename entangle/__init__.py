"""Find the entangled neurons of a language model, show them, and prove that they matter."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entangle.experiments.ablating import ablate
    from entangle.experiments.budget_search import choose_budget
    from entangle.experiments.disentangling import disentangle
    from entangle.experiments.planning import plan
    from entangle.experiments.steering import steer, steered
    from entangle.experiments.sweeping import sweep
    from entangle.measurement.checking import check
    from entangle.measurement.comparing import diff
    from entangle.measurement.context_search import contexts
    from entangle.measurement.measuring import measure
    from entangle.measurement.merging import merge
    from entangle.measurement.prompting import values_on
    from entangle.measurement.ranking import (
        matched_random,
        rank,
        rank_correlations,
        top_by_layer,
    )
    from entangle.measurement.recording import record
    from entangle.measurement.resolving import resolve
    from entangle.measurement.vocabulary import words
    from entangle.model.generating import generate
    from entangle.model.loading import load_model, load_tokenizer
    from entangle.model.mixing import mixed_windows
    from entangle.model.repeating import repetition
    from entangle.model.scoring import perplexity
    from entangle.model.sliding import sliding_windows
    from entangle.model.text import token_windows
    from entangle.pruning.sparsifying import sparsify
    from entangle.runs.descriptions import describe
    from entangle.runs.own_text import own_windows
    from entangle.runs.store import open_run
    from entangle.show import plots
    from entangle.show.reporting import report

__version__ = "0.2.0.dev0"

__all__ = [
    "ablate",
    "check",
    "choose_budget",
    "contexts",
    "describe",
    "diff",
    "disentangle",
    "generate",
    "load_model",
    "load_tokenizer",
    "matched_random",
    "measure",
    "merge",
    "mixed_windows",
    "open_run",
    "own_windows",
    "perplexity",
    "plan",
    "plots",
    "rank",
    "rank_correlations",
    "record",
    "repetition",
    "report",
    "resolve",
    "sliding_windows",
    "sparsify",
    "steer",
    "steered",
    "sweep",
    "token_windows",
    "top_by_layer",
    "values_on",
    "words",
]

# The module of each public name. It is imported at first use, so that `import entangle` and
# `--help` do not import torch.
_HOMES = {
    "ablate": "entangle.experiments.ablating",
    "check": "entangle.measurement.checking",
    "choose_budget": "entangle.experiments.budget_search",
    "describe": "entangle.runs.descriptions",
    "diff": "entangle.measurement.comparing",
    "disentangle": "entangle.experiments.disentangling",
    "contexts": "entangle.measurement.context_search",
    "generate": "entangle.model.generating",
    "load_model": "entangle.model.loading",
    "load_tokenizer": "entangle.model.loading",
    "matched_random": "entangle.measurement.ranking",
    "mixed_windows": "entangle.model.mixing",
    "own_windows": "entangle.runs.own_text",
    "measure": "entangle.measurement.measuring",
    "merge": "entangle.measurement.merging",
    "open_run": "entangle.runs.store",
    "plan": "entangle.experiments.planning",
    "rank_correlations": "entangle.measurement.ranking",
    "record": "entangle.measurement.recording",
    "resolve": "entangle.measurement.resolving",
    "perplexity": "entangle.model.scoring",
    "repetition": "entangle.model.repeating",
    "sliding_windows": "entangle.model.sliding",
    "sparsify": "entangle.pruning.sparsifying",
    "steer": "entangle.experiments.steering",
    "steered": "entangle.experiments.steering",
    "sweep": "entangle.experiments.sweeping",
    "token_windows": "entangle.model.text",
    "top_by_layer": "entangle.measurement.ranking",
    "values_on": "entangle.measurement.prompting",
    "rank": "entangle.measurement.ranking",
    "report": "entangle.show.reporting",
    "words": "entangle.measurement.vocabulary",
}


def __getattr__(name: str) -> Any:
    if name == "plots":
        return importlib.import_module("entangle.show.plots")
    if name in {
        "measure",
        "merge",
        "open_run",
        "record",
        "resolve",
    }:  # they return trees: register the accessor
        importlib.import_module("entangle.show.notebook")
    if name not in _HOMES:
        raise AttributeError(f"module 'entangle' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
