"""Find the entangled neurons of a language model, show them, and prove that they matter."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entangle.model.loading import load_model, load_tokenizer
    from entangle.model.text import token_windows
    from entangle.show import plots
    from entangle.show.report import write_report
    from entangle.study.ablation import ablate
    from entangle.study.choosing import choose_budget
    from entangle.study.comparing import compare_runs
    from entangle.study.contexts import find_contexts
    from entangle.study.disentangling import disentangle
    from entangle.study.expansion import sparsify
    from entangle.study.generation import generate
    from entangle.study.measuring import measure
    from entangle.study.merging import merge_runs
    from entangle.study.perplexity import score
    from entangle.study.plan import plan_run
    from entangle.study.ranking import (
        matched_random,
        rank_correlations,
        top_by_layer,
        top_neurons,
    )
    from entangle.study.recording import record
    from entangle.study.runs import open_run
    from entangle.study.sweeping import sweep

__version__ = "0.1.0"

__all__ = [
    "ablate",
    "choose_budget",
    "compare_runs",
    "disentangle",
    "find_contexts",
    "generate",
    "load_model",
    "load_tokenizer",
    "matched_random",
    "measure",
    "merge_runs",
    "open_run",
    "plan_run",
    "plots",
    "rank_correlations",
    "record",
    "score",
    "sparsify",
    "sweep",
    "token_windows",
    "top_by_layer",
    "top_neurons",
    "write_report",
]

# Looked up when first asked for, so that `import entangle` and `--help` do not import torch.
_HOMES = {
    "ablate": "entangle.study.ablation",
    "choose_budget": "entangle.study.choosing",
    "compare_runs": "entangle.study.comparing",
    "disentangle": "entangle.study.disentangling",
    "find_contexts": "entangle.study.contexts",
    "generate": "entangle.study.generation",
    "load_model": "entangle.model.loading",
    "load_tokenizer": "entangle.model.loading",
    "matched_random": "entangle.study.ranking",
    "measure": "entangle.study.measuring",
    "merge_runs": "entangle.study.merging",
    "open_run": "entangle.study.runs",
    "plan_run": "entangle.study.plan",
    "rank_correlations": "entangle.study.ranking",
    "record": "entangle.study.recording",
    "score": "entangle.study.perplexity",
    "sparsify": "entangle.study.expansion",
    "sweep": "entangle.study.sweeping",
    "token_windows": "entangle.model.text",
    "top_by_layer": "entangle.study.ranking",
    "top_neurons": "entangle.study.ranking",
    "write_report": "entangle.show.report",
}


def __getattr__(name: str) -> Any:
    if name == "plots":
        return importlib.import_module("entangle.show.plots")
    if name in {
        "measure",
        "merge_runs",
        "open_run",
        "record",
    }:  # they return trees, which get an accessor
        importlib.import_module("entangle.show.notebook")
    if name not in _HOMES:
        raise AttributeError(f"module 'entangle' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
