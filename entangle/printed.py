"""The text that commands print of their results."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def _measured_on(summary: dict[str, Any]) -> str:
    part = f"shard {summary['shard']} of a run, " if "shard" in summary else ""
    return (
        f"{part}{summary['model']}: {summary['neurons_measured']:,} neurons in {summary['layers']} layers, "
        f"{summary['tokens']:,} tokens of {summary['text']} "
        f"({summary['windows']} windows of {summary['length']})\n"
        f"noise floor {summary['noise_floor']:.4f}: what a Gaussian neuron would show on as many "
        "independent tokens"
    )


def describe(summary: dict[str, Any]) -> str:
    """Return the text of a measured run, from `runs.dataset.summary`."""
    log = summary["log"]
    lines = [
        _measured_on(summary),
        f"wasserstein: median {summary['median']:.4f}, 95% below {summary['quantile_95']:.4f}, "
        f"largest {summary['largest']:.4f} ± {summary['largest_error']:.4f} "
        f"({summary['largest_neuron']})",
        *summary["warnings"],
        f"written to {summary['run']} in {log['seconds']:.0f} s, "
        f"peak memory {log['peak_memory_bytes'] / 1e9:.2f} GB",
    ]
    return "\n".join(lines)


def planned(result: dict[str, Any]) -> str:
    """Return the text of the expected costs of commands."""
    lines = [
        f"{result['model']}: {result['layers']} layers in {result['blocks']} blocks, "
        f"{result['neurons']:,} neurons, {result['weights'] / 1e9:.3g} billion weights in them, "
        f"{result['model_bytes'] / 1e9:.3g} GB in all",
        f"{result['tokens']:,} tokens of {result['text']} ({result['windows']} windows)",
        "expected of one process, from the same commands on one block and on two, with random weights:",
    ]
    if result["largest_block_bytes"] > 1.1 * result["block_bytes"]:
        lines.append(
            f"all blocks are taken to be like the first, of {result['block_bytes'] / 1e9:.2g} GB, but "
            f"the largest has {result['largest_block_bytes'] / 1e9:.2g} GB: expect more than this"
        )
    for stage in result["stages"]:
        gpu = (
            f" and {stage['device_bytes'] / 1e9:.2f} GB on the GPU" if stage["device_bytes"] else ""
        )
        lines.append(
            f"- {stage['command']}: about {_duration(stage['seconds'])}, "
            f"{stage['memory_bytes'] / 1e9:.2f} GB of memory{gpu}, "
            f"{stage['disk_bytes'] / 1e9:.2f} GB written"
        )
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def scored(result: dict[str, Any]) -> str:
    """Return the text of a score."""
    return (
        f"{result['model']} on {result['tokens']:,} tokens of {result['text']} "
        f"({result['windows']} windows of {result['length']} that do not overlap, each scored "
        "from its own start)\n"
        f"perplexity {result['perplexity']:.4f} ± {result['perplexity_error']:.4f}, "
        f"{result['nats']:.5f} ± {result['nats_error']:.5f} nats a token "
        "(± is the standard error over windows)"
    )


def generated(result: dict[str, Any]) -> str:
    """Return the generated text, and the text of its timing."""
    return f"{result['text']}\n{timed(result)}"


def timed(result: dict[str, Any]) -> str:
    """Return the text of the timing of a generation."""
    rest = result["tokens"] - 1
    speed = (
        f", then {rest} in {result['seconds']:.2f} s: {result['tokens_per_second']:.1f} a second"
    )
    return (
        f"\n{result['model']} on {result['device']}, {result['weight_bytes'] / 1e6:,.0f} MB of "
        f"weights: the first token after {result['first_seconds']:.2f} s "
        f"({result['prompt_tokens']} of the prompt){speed if rest else ''}"
    )


def sparsified(result: dict[str, Any]) -> str:
    """Return the text of the result of `sparsify`."""
    from entangle.pruning.options import EXPERT_DEFAULTS, OPTIONS, UNBUDGETED
    from entangle.runs.dataset import say_skipped

    every = [name for name, option in OPTIONS.items() if option.scope == "every"]
    settings = _settings(result, [n for n in every if n not in {"method", "experts", "sparsity"}])
    known = [layer for layer in result["layers"] if math.isfinite(layer["error"])]
    worst = max(known or result["layers"], key=lambda layer: layer["error"])
    lines = [
        f"{result['model']}: {len(result['layers'])} layers pruned to {result['sparsity']} by "
        f"{result['method']} ({settings}) from "
        f"{result['tokens']:,} tokens of {result['text']} ({result['windows']} windows of "
        f"{result['length']})",
        f"{result['realised']:.4%} of their weights are zero; relative squared error of a layer's "
        f"outputs on these tokens: mean {result['error']:.4g}, "
        f"largest {worst['error']:.4g} ({worst['layer']})",
    ]
    if "budget" in result:
        rows = result["layers"]
        lines.append(
            f"{_settings(result, UNBUDGETED)}: "
            f"{min(row['least'] for row in rows):.1%} to {max(row['most'] for row in rows):.1%} of a "
            f"row is zero, {min(row['realised'] for row in rows):.1%} to "
            f"{max(row['realised'] for row in rows):.1%} of a layer"
        )
    if "chosen" in result:
        chosen = result["chosen"]
        against = f"{chosen['against_uniform']:.3f} ± {chosen['against_uniform_error']:.3f} nats"
        against = f"{against} a token against uniform rows" if chosen["strength"] else "none better"
        lines.append(
            f"{chosen['budget']} rows were chosen of {chosen['candidates']} budgets on "
            f"{chosen['set_aside']} calibration windows set aside, {against}: "
            f"{result['folder']}/budget.csv has what each scored"
        )
    if result["experts"] > 1:
        clusters = [layer["clusters"] for layer in result["layers"]]
        lines.append(
            f"each layer has up to {result['experts']} experts, in the median "
            f"{statistics.median(clusters):g} and {min(clusters)} at least, where clusters with too "
            f"few tokens were merged ({_settings(result, EXPERT_DEFAULTS)})"
        )
    share = result["model_multiply_adds"] / result["model_dense_multiply_adds"]
    lines.append(
        f"a token needs {result['density']:.2%} of these layers' multiply-adds, routers included, "
        f"and {share:.2%} of those of all linear layers and the output embedding; "
        f"{result['stored'] / result['dense_multiply_adds']:.3g} times the dense layers' "
        f"weights are stored, in {result['disk_bytes'] / 1e6:,.1f} MB on disk and "
        f"{result['memory_bytes'] / 1e6:,.1f} MB in memory"
    )
    damped = [layer["layer"] for layer in result["layers"] if layer["damping"] > 0.01]
    if damped:
        lines.append(f"{len(damped)} layers needed damping beyond 0.01, first {damped[0]}")
    lines += say_skipped(result["skipped_parameters"], "pruned")
    log = result["log"]
    lines.append(
        f"written to {result['folder']} in {log['seconds']:.0f} s, "
        f"peak memory {log['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    return "\n".join(lines)


def _settings(result: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return the text of the options' values; options without a value are left out."""
    return ", ".join(f"{name} {result[name]}" for name in names if result.get(name, "") != "")


def ranked(summary: dict[str, Any]) -> str:
    """Return the text of a ranking of neurons."""
    lines = [_measured_on(summary), *summary["warnings"], ""]
    if not summary["neurons"]:
        return "\n".join([*lines, "no neuron to rank"])
    rows = [{"rank": place} | row for place, row in enumerate(summary["neurons"], start=1)]
    return "\n".join([*lines, *_columns(rows)])


def compared(result: dict[str, Any]) -> str:
    """Return the text of a comparison of two runs."""
    first, other = result["runs"]
    rows = [
        {name: row[name] for name in row if name not in {"block", "role"}}
        for row in result["layers"]
    ]
    known = [row["correlation"] for row in rows if math.isfinite(row["correlation"])]
    median = statistics.median(known) if known else math.nan
    neurons = sum(row["neurons"] for row in rows)
    lines = ["first: " + _measured_on(first), "other: " + _measured_on(other), ""]
    lines += [*_columns(rows), ""]
    lines.append(
        f"{neurons:,} neurons in both; rank correlation of the distances in a layer: median "
        f"{median:.3f}; moved most, and how far beyond the bounds of both runs' errors:"
    )
    lines += ["", *_columns(result["neurons"])] if result["neurons"] else []
    lines += [f"drawn into {result['figure']}"] if result["figure"] else []
    return "\n".join(lines)


FEW = 5  # the contexts of more neurons are not printed


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table; only names of neurons and layers are left-aligned."""
    texts = [
        {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows
    ]
    header = {name: name for name in rows[0]}
    widths = {name: max(len(row[name]) for row in [header, *texts]) for name in header}
    return [
        "  ".join(
            row[name].ljust(width) if name in {"neuron", "layer"} else row[name].rjust(width)
            for name, width in widths.items()
        ).rstrip()
        for row in [header, *texts]
    ]


def contexts(result: dict[str, Any]) -> str:
    """Return the text of the contexts of neurons."""
    lines = []
    brief = len(result["neurons"]) > FEW
    if not brief:
        lines += [
            "output, its distance from the mean, window:position, and the text, [[token]]",
            "",
        ]
    for one in result["neurons"]:
        lines += [
            f"{one['neuron']}: W1 {one['wasserstein']:.4f}, 95% interval {one['low']:.4f} to "
            f"{one['high']:.4f} ({one['tokens']:,} tokens, bootstrap of windows)",
            *(
                f"  W1 {rest['wasserstein']:.4f} without {rest['what']}: {rest['tokens']:,} tokens "
                f"with {rest['variance']:.1%} of the variance"
                for rest in one["without"]
            ),
            "  of the distance, frequent tokens make "
            + ", ".join(
                f"{token['token']!r} {token['share']:.1%}" for token in one["frequent"][:5]
            ),
        ]
        why = ""
        for context in () if brief else one["contexts"]:
            lines += [f"  {context['why']}"] if context["why"] != why else []
            why = context["why"]
            words = f"{context['before'][-40:]}[[{context['token']}]]{context['after'][:20]}"
            where = f"{context['window']}:{context['position']}"
            lines.append(
                f"    {context['output']:9.3f} {context['deviation']:+6.1f} std {where:>8}  "
                + json.dumps(words, ensure_ascii=False)
            )
        lines.append("")
    if brief:
        lines.append(f"the tokens of more than {FEW} neurons are not printed: a report shows them")
    return "\n".join([*lines, f"added to {result['file']}"])
