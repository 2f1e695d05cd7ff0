"""The text that commands print of their results."""

import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def _measured_on(summary: dict[str, Any]) -> str:
    part = f"shard {summary['shard']} of a run, " if "shard" in summary else ""
    inputs = summary.get("inputs", {})
    beside = (
        f" and {inputs['neurons_measured']:,} inputs of {inputs['layers']} layer{'s' if inputs['layers'] > 1 else ''}"
        if inputs
        else ""
    )
    return (
        f"{part}{summary['model']}: {summary['neurons_measured']:,} neurons in {summary['layers']} "
        f"layers{beside}, {summary['tokens']:,} tokens of {summary['text']} "
        f"({summary['windows']} windows of {summary['length']})\n"
        f"noise floor {summary['noise_floor']:.4f}: the distance of a Gaussian neuron on as many "
        "independent tokens"
    )


def _of_experts(experts: Mapping[str, Any]) -> str:
    without = experts["without_tokens"]
    return (
        f"{experts['matrices']:,} of the layers, matrices of trained experts, had not all tokens but "
        f"{experts['least_tokens']:,} to {experts['most_tokens']:,}; each neuron's noise "
        f"floor is that of its own count{f' ({without:,} had none)' if without else ''}"
    )


def next_steps(folder: object, *commands: str) -> str:
    """Return a line with the commands that go on with a folder, which stands for {}."""
    name = shlex.quote(str(folder))
    return "next: " + ", ".join(f"entangle {command.format(name)}" for command in commands)


def describe(summary: dict[str, Any]) -> str:
    """Return the text of a measured run, from `runs.dataset.summary`."""
    log = summary["log"]
    whole = "shard" not in summary
    following = ("rank {}", "report {}") if whole else ("merge SHARD... --out RUN",)
    lines = [
        _measured_on(summary),
        *([_of_experts(summary["experts"])] if "experts" in summary else []),
        f"wasserstein: {_distances(summary)}",
        *(
            [f"wasserstein of inputs: {_distances(summary['inputs'])}"]
            if "inputs" in summary
            else []
        ),
        *_bulk(summary.get("bulk", {})),
        *summary["warnings"],
        f"written to {summary['run']} in {log['seconds']:.0f} s, "
        f"peak memory {log['peak_memory_bytes'] / 1e9:.2f} GB",
        next_steps(summary["run"], *following),
    ]
    return "\n".join(lines)


def _distances(summary: Mapping[str, Any]) -> str:
    return (
        f"median {summary['median']:.4f}, 95% below {summary['quantile_95']:.4f}, largest "
        f"{summary['largest']:.4f} ± {summary['largest_error']:.4f} ({summary['largest_neuron']})"
    )


def _bulk(found: Mapping[str, Any]) -> list[str]:
    """Return lines on the distances without the 1% of tokens farthest from the median."""
    if not math.isfinite(found.get("largest", math.nan)):
        return []
    lines = [
        f"wasserstein_bulk (without the 1% of tokens farthest from the median): median "
        f"{found['median']:.4f}, largest {found['largest']:.4f} ± {found['largest_error']:.4f} "
        f"({found['largest_neuron']})"
    ]
    if found["unknown"]:
        lines.append(
            f"{found['unknown']:,} neurons whose bulk is in too few bins, with a bound of "
            "wasserstein_bulk above 0.1: entangle measure MODEL --resolve RUN gives them bins of "
            "their own"
        )
    return lines


def resolved(result: dict[str, Any]) -> str:
    """Return the text of what `resolve` added."""
    lines = [
        f"{result['resolved']:,} neurons have a second histogram in {result['run']}/resolved.npz",
        *_bulk(result["bulk"] | {"unknown": 0}),  # the advice that it gives was followed
    ]
    unknown, alike = result["bulk"]["unknown"], result["unresolvable"]
    if unknown:
        lines.append(f"{unknown:,} neurons still have a bound of wasserstein_bulk above 0.1")
    if alike:
        more = ", ..." if len(alike) > 3 else ""
        lines.append(
            f"{len(alike):,} neurons have a bulk of one value, or nearly so, which no bins resolve: "
            f"{', '.join(alike[:3])}{more}"
        )
    return "\n".join(lines)


def planned(result: dict[str, Any]) -> str:
    """Return the text of the expected costs of commands."""
    inputs = f", {result['inputs']:,} inputs to be measured" if result["inputs"] else ""
    lines = [
        f"{result['model']}: {result['layers']} layers in {result['blocks']} blocks, "
        f"{result['neurons']:,} neurons{inputs}, {result['weights'] / 1e9:.3g} billion weights in these "
        f"layers, {result['model_bytes'] / 1e9:.3g} GB of weights in the whole model",
        f"{result['tokens']:,} tokens of {result['text']} ({result['windows']} windows)",
    ]
    if result["largest_block_bytes"] > 1.1 * result["block_bytes"]:
        lines.append(
            "the estimate assumes that all blocks are like the one that was run, of "
            f"{result['block_bytes'] / 1e9:.2g} GB, but the largest block has "
            f"{result['largest_block_bytes'] / 1e9:.2g} GB: the costs will be higher"
        )
    if result["without_gpu"]:
        lines.append(
            "this machine has no GPU: the memory on one is estimated from that of the commands on the "
            "CPU, and the times are those of the CPU"
        )
    lines.append(
        "expected costs of one process, estimated by running the commands on models of one and two "
        "blocks with random weights:"
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


def written(windows: Any, model: str) -> str:
    """Return the text of how long a model took to write its own text."""
    what = f"{len(windows)} windows of {windows.length} tokens ({windows.text})"
    if not windows.seconds:
        return f"{what} that {model} wrote before are used again"
    return f"{model} wrote {what} in {windows.seconds / 60:.1f} minutes"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def generating(models: int) -> str:
    """Return a sentence on what --generate is going to do."""
    from entangle.model.repeating import PROMPTS, TOKENS

    each = "the model writes" if models == 1 else "each model writes"
    return f"after the score {each} {TOKENS} tokens after each of {PROMPTS} prompts, which takes minutes"


def scored(result: dict[str, Any]) -> str:
    """Return the text of a score."""
    stride, length = result.get("stride"), result["length"]
    how = f"{result['windows']} windows of {length} that do not overlap, each scored from its own start"
    over = "windows"
    if stride:
        how = f"{result['windows']} windows of {length} that slide by {stride}, each token scored once"
        over = f"the windows' pieces of {stride} tokens, as if they did not depend on one another"
    lines = [
        f"{result['model']} on {result['tokens']:,} tokens of {result['text']} ({how})",
        f"perplexity {result['perplexity']:.4f} ± {result['perplexity_error']:.4f}, "
        f"{result['nats']:.5f} ± {result['nats_error']:.5f} nats a token "
        f"(± is the standard error over {over})",
    ]
    if "kl" in result:
        shares = [
            f"{100 * result[name]:.2f}% ± {100 * result[f'{name}_error']:.2f}%"
            for name in ("agreement", "lost", "gained")
        ]
        lines.append(
            f"compared with {result['against']}: KL divergence {result['kl']:.5f} ± "
            f"{result['kl_error']:.5f} nats a token, 99.9% of the tokens below "
            f"{result['kl_tail']:.4g} ± {result['kl_tail_error']:.2g} (bootstrap of windows); the most "
            f"likely next token is the same at {shares[0]} of the tokens; only the dense model's is the text's at "
            f"{shares[1]} (lost), and only this model's at {shares[2]} (gained)"
        )
    if "generation" in result:
        from entangle.model.repeating import PROMPT, PROMPTS, TOKENS
        from entangle.runs.markdown import with_error

        rows = [
            {"model": model}
            | {n: with_error(one[n], one[f"{n}_error"]) for n in one if f"{n}_error" in one}
            for model, one in result["generation"].items()
        ]
        lines += [
            f"{TOKENS} tokens after each of at most {PROMPTS} prompts of {PROMPT}, always the most likely "
            "one: shares of distinct n-grams, and of tokens that are among the 32 before them "
            "(± is the standard error over prompts)",
            *_columns(rows),
        ]
    return "\n".join(lines)


def generated(result: dict[str, Any]) -> str:
    """Return the generated text, and the text of its timing."""
    from entangle.show.coloured import plain

    return f"{plain(result['text'])}\n{timed(result)}"


def timed(result: dict[str, Any]) -> str:
    """Return the text of the timing of a generation."""
    rest = result["tokens"] - 1
    count = result["threads"]
    threads = f" with {count} thread{'s' * (count > 1)}" if result["device"] == "cpu" else ""
    speed = (
        f", then {rest} tokens in {result['seconds']:.2f} s, "
        f"{result['tokens_per_second']:.1f} a second{threads}"
    )
    return (
        f"\n{result['model']} on {result['device']}, {result['weight_bytes'] / 1e6:,.0f} MB of "
        f"weights: first token after {result['first_seconds']:.2f} s "
        f"({result['prompt_tokens']} tokens in the prompt){speed if rest else ''}"
    )


def sparsified(result: dict[str, Any]) -> str:
    """Return the text of the result of `sparsify`."""
    from entangle.pruning.options import EXPERT_DEFAULTS, OF_INPUTS, OPTIONS, UNBUDGETED
    from entangle.runs.dataset import dependence_notes, skipped_notes

    every = [name for name, option in OPTIONS.items() if option.scope in {"every", "weights"}]
    unlisted = {"method", "experts", "sparsity", "inputs"}
    settings = _settings(result, [name for name in every if name not in unlisted])
    known = [layer for layer in result["layers"] if math.isfinite(layer["error"])]
    worst = max(known or result["layers"], key=lambda layer: layer["error"])
    lines = [
        f"{result['model']}: {len(result['layers'])} layers {_how(result, settings)}, calibrated on "
        f"{result['tokens']:,} tokens of {result['text']} ({result['windows']} windows of "
        f"{result['length']})",
        f"{result['realised']:.4%} of their weights are zero; relative squared error of the layers' "
        f"outputs on these tokens: mean {result['error']:.4g}, "
        f"largest {worst['error']:.4g} ({worst['layer']})",
    ]
    errors = {
        layer["block"]: (layer["mlp_error_before"], layer["mlp_error"])
        for layer in result["layers"]
        if math.isfinite(layer.get("mlp_error", math.nan))
    }
    if errors:
        before, after = (sum(values) / len(errors) for values in zip(*errors.values(), strict=True))
        kept = sum(old == new for old, new in errors.values())
        lines.append(
            f"reconstruction: relative squared error of the hidden states behind a block {before:.4g} "
            f"before and {after:.4g} after, on calibration tokens held out, mean of {len(errors)} "
            f"blocks{f'; {kept} of them did not gain and kept their weights' if kept else ''}"
        )
    if "budget" in result:
        rows = result["layers"]
        lines.append(
            f"{_settings(result, UNBUDGETED)}: zeros are "
            f"{min(row['least'] for row in rows):.1%} to {max(row['most'] for row in rows):.1%} of a "
            f"row, and {min(row['realised'] for row in rows):.1%} to "
            f"{max(row['realised'] for row in rows):.1%} of a layer"
        )
    if "search" in result:
        names = [" from ".join(filter(None, (x["across"], x["start"]))) for x in result["search"]]
        values = ["not finite" if x["kl"] is None else f"{x['kl']:.4f}" for x in result["search"]]
        found = ", ".join(map(" ".join, zip(names, values, strict=True)))
        lines.append(
            f"KL divergence from the dense model, nats a token, on the "
            f"{max(x['windows'] for x in result['search'])} calibration windows that the search chose by: "
            f"{found}. Details are in {result['folder']}/search.json"
        )
    if result.get("inputs", "dense") != "dense":
        layers, sizes = (
            result["layers"],
            [row["neurons"] * row["inputs"] for row in result["layers"]],
        )
        realised = sum(row["realised_inputs"] * n for row, n in zip(layers, sizes, strict=True))
        lines.append(
            f"sparse inputs ({_settings(result, OF_INPUTS)}): {realised / sum(sizes):.2%} of the "
            f"inputs are zero on these tokens, {min(row['realised_inputs'] for row in layers):.1%} to "
            f"{max(row['realised_inputs'] for row in layers):.1%} of a layer; the first token of each "
            "window keeps its inputs. The errors above are of the weights alone"
        )
    if "chosen" in result:
        chosen = result["chosen"]
        difference = f"{chosen['against_uniform']:.3f} ± {chosen['against_uniform_error']:.3f} nats"
        difference += " a token compared with uniform rows"
        lines.append(
            f"{chosen['budget']} rows have the best score of {chosen['candidates']} budgets on "
            f"{chosen['set_aside']} calibration windows that were set aside"
            f"{f': {difference}' if chosen['strength'] else ''}. "
            f"All scores are in {result['folder']}/budget.csv"
        )
    if result["experts"] > 1:
        clusters = [layer["clusters"] for layer in result["layers"]]
        lines.append(
            f"each layer has {result['experts']} experts, or fewer if clusters with too few tokens "
            f"were merged: median {statistics.median(clusters):g}, minimum {min(clusters)} "
            f"({_settings(result, EXPERT_DEFAULTS)})"
        )
    share = result["model_multiply_adds"] / result["model_dense_multiply_adds"]
    weights = result.get("dense_weights", result["dense_multiply_adds"])  # older folders lack it
    lines.append(
        f"a token takes {result['density']:.2%} of these layers' dense multiply-adds, routers "
        f"included, and {share:.2%} of those of all linear layers and the output embedding; the "
        f"number of stored weights is {result['stored'] / weights:.3g} times "
        f"that of the dense layers, {result['disk_bytes'] / 1e6:,.1f} MB on disk and "
        f"{result['memory_bytes'] / 1e6:,.1f} MB in memory"
    )
    damped = [layer["layer"] for layer in result["layers"] if layer["damping"] > 0.01]
    if damped:
        lines.append(f"{len(damped)} layers needed a damping above 0.01, such as {damped[0]}")
    lines += dependence_notes(result.get("dependent_on", []))
    lines += skipped_notes(result, "pruned")
    log = result["log"]
    lines += [
        f"written to {result['folder']} in {log['seconds']:.0f} s, "
        f"peak memory {log['peak_memory_bytes'] / 1e9:.2f} GB",
        next_steps(result["folder"], "perplexity {} --text TEXT", "generate {} --prompt TEXT"),
    ]
    return "\n".join(lines)


def _how(result: Mapping[str, Any], settings: str) -> str:
    """Return how layers were pruned, or that they were not."""
    if result["method"] == "none":
        return "with dense weights"
    return f"pruned to {result['sparsity']} by {result['method']} ({settings})"


def _settings(result: Mapping[str, Any], names: Iterable[str]) -> str:
    """Return the text of the options' values; options without a value are left out."""
    return ", ".join(f"{name} {result[name]}" for name in names if result.get(name, "") != "")


def checked(result: dict[str, Any]) -> str:
    """Return the text of distances beside those of raw outputs."""
    names = {"wasserstein": "stored", "wasserstein_error": "bound", "exact": "exact"}
    names |= {"scipy": "SciPy", "pot": "POT"}
    of_bulk = {"wasserstein_bulk": "stored", "wasserstein_bulk_error": "bound"}
    of_bulk |= {"bulk_scipy": "SciPy", "bulk_pot": "POT"}
    lines = [f"raw outputs of {result['model']} on {result['text']}, computed once more", ""]
    headings = {
        "wasserstein, in std": names,
        "wasserstein_bulk, in std of the bulk (no way of ours from raw outputs)": of_bulk,
    }
    for heading, columns in headings.items():
        rows = [
            {"neuron": one["neuron"], "tokens": one["tokens"]}
            | {name: f"{one[column]:.6f}" for column, name in columns.items()}
            for one in result["neurons"]
        ]
        lines += [heading, *_columns(rows), ""]
    agree = sum(one["agrees"] for one in result["neurons"])
    return "\n".join(
        [
            *lines,
            f"exact and SciPy are off by rounding, less than {result['rounding']:g}; POT by at most "
            f"{result['pot_error']:.2g}, and {result['bulk_pot_error']:.2g} for bulks: a grid stands for "
            "the Gaussian",
            f"{agree} of {len(result['neurons'])} neurons have every distance within the certified "
            "bound of the stored one",
        ]
    )


def ranked(summary: dict[str, Any]) -> str:
    """Return the text of a ranking of neurons."""
    lines = [_measured_on(summary), *summary["warnings"], ""]
    if not summary["neurons"]:
        return "\n".join([*lines, "no neuron of these layers can be ranked"])
    rows = [{"rank": place} | row for place, row in enumerate(summary["neurons"], start=1)]
    if "kind" in rows[0]:
        lines.insert(-1, "kind is an estimate where a distance is near the noise floor")
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
        f"{neurons:,} neurons are ranked in both runs; the median over layers of the rank "
        f"correlation of their distances is {median:.3f}"
    )
    if result["neurons"]:
        lines += ["neurons with the largest change beyond the error bounds of both runs:", ""]
        lines += _columns(result["neurons"])
    lines += [f"figure written to {result['figure']}"] if result["figure"] else []
    return "\n".join(lines)


FEW = 5  # the contexts of more neurons are not printed


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table; only names of neurons and layers, and descriptions, are left-aligned."""
    from entangle.show.coloured import visible

    texts = [
        {k: f"{v:.4g}" if isinstance(v, float) else visible(str(v)) for k, v in row.items()}
        for row in rows
    ]
    header = {name: name for name in rows[0]}
    widths = {name: max(len(row[name]) for row in [header, *texts]) for name in header}
    return [
        "  ".join(
            row[name].ljust(width)
            if name in {"neuron", "layer", "description"}
            else row[name].rjust(width)
            for name, width in widths.items()
        ).rstrip()
        for row in [header, *texts]
    ]


def on_text(result: dict[str, Any]) -> str:
    """Return the values of neurons at each token of a text, with colours if stdout is a terminal."""
    from entangle.show.coloured import in_terminal, on_colour, visible

    colours, lines = sys.stdout.isatty(), []
    for one in result["neurons"]:
        lines += [f"{one['neuron']}: {one['side']}, quantile in the run's distribution, token"]
        if colours:
            lines += ["", in_terminal(one["tokens"], one["shades"]), ""]
        columns = ("tokens", "values", "quantiles", "quantile_errors", "shades")
        for token, value, place, error, shade in zip(*(one[name] for name in columns), strict=True):
            wide = f" ± {error:.2f}" if error >= 0.005 else ""
            text = on_colour(visible(token), shade) if colours else visible(token)
            lines.append(f"  {value:12.4g}  {place:.4f}{wide:7}  {text}")
        lines.append("")
    return "\n".join(lines).rstrip()


def _unit(unit: Mapping[str, Any]) -> list[str]:
    """Return lines on a hidden unit of a gated MLP."""
    known = {name: unit["wasserstein"][name] for name in ("gate", "up", "product")}
    parts = ", ".join(
        f"{name} W1 {one:.4f}" if math.isfinite(one) else f"{name} without a distance"
        for name, one in known.items()
    )
    lines = [f"  gate and up together ({parts}):"]
    for case in unit["cases"]:
        mean = f", mean product {case['mean']:.3g}" if case["tokens"] else ""
        signs = f"gate {case['gate']} up {case['up']}"
        lines.append(f"    {signs}  {case['share']:6.1%} of the tokens{mean}")
    return lines


def contexts(result: dict[str, Any]) -> str:
    """Return the text of the contexts of neurons."""
    from entangle.show.coloured import quoted

    lines = []
    brief = len(result["neurons"]) > FEW
    if not brief:
        lines += [
            "columns: output (or input), deviation from the mean, window:position, text with the [[token]]",
            "",
        ]
    for one in result["neurons"]:
        lines += [
            f"{one['neuron']}: W1 {one['wasserstein']:.4f}, 95% interval {one['low']:.4f} to "
            f"{one['high']:.4f} ({one['tokens']:,} tokens, bootstrap of windows)",
            *(
                f"  W1 {left_out['wasserstein']:.4f} without {left_out['what']} "
                f"({left_out['tokens']:,} tokens, {left_out['variance']:.1%} of the variance)"
                for left_out in one["without"]
            ),
            "  shares of frequent tokens in the distance: "
            + ", ".join(
                f"{token['token']!r} {token['share']:.1%}" for token in one["frequent"][:5]
            ),
            *(_unit(one["unit"]) if one["unit"] else []),
        ]
        why = ""
        for context in () if brief else one["contexts"]:
            lines += [f"  {context['why']}"] if context["why"] != why else []
            why = context["why"]
            text = f"{context['before'][-40:]}[[{context['token']}]]{context['after'][:20]}"
            place = f"{context['window']}:{context['position']}"
            lines.append(
                f"    {context['output']:9.3f} {context['deviation']:+6.1f} std {place:>8}  "
                + quoted(text)
            )
        lines.append("")
    if brief:
        lines.append(
            f"tokens are not printed for more than {FEW} neurons: entangle report shows them"
        )
    lines.append(f"contexts written to {result['file']}")
    return "\n".join([*lines, next_steps(Path(result["file"]).parent, "report {}")])


def words(result: dict[str, Any]) -> str:
    """Return the text of what neurons read and write."""
    from entangle.show.coloured import quoted

    lines = [
        "products of the weights with the tokens' embeddings; in brackets how many std from the mean "
        "over the vocabulary",
        "",
    ]
    for one in result["neurons"]:
        lines.append(one["neuron"])
        for found in one["words"]:
            through = f", through {' and '.join(found['through'])}" if found["through"] else ""
            lines.append(f"  {found['side']} ({found['what']} {found['neuron']}{through}):")
            for name, tokens in (("most", found["top"]), ("least", found["bottom"])):
                texts = [
                    f"{quoted(word['token'])} {word['value']:.3g} ({word['deviation']:+.1f})"
                    for word in tokens
                ]
                lines.append(f"    {name + ':':<6} {', '.join(texts)}")
        lines += [*(f"  {reason}" for reason in one["missing"]), ""]
    return "\n".join([*lines, f"words written to {result['file']}"])


def steered(result: dict[str, Any]) -> str:
    """Return the text of what the settings of a neuron do."""
    from entangle.show.coloured import quoted

    lines = [
        f"{result['neuron']} of {result['model']}, compared with the untouched model on "
        f"{result['tokens']:,} predictions of {result['text']} ({result['windows']} windows of "
        f"{result['length']}; ± is the standard error over windows)",
    ]
    for one in result["settings"]:
        error = f" ± {one['value_error']:.2g}" if one["value_error"] else ""
        held = "" if one["value"] is None else f" (held at {one['value']:.4g}{error})"
        lines += [
            "",
            f"{one['setting']}{held}: KL divergence {one['kl']:.3g} ± {one['kl_error']:.2g} nats a token, "
            f"99.9% of the tokens below {one['kl_tail']:.3g}; the same most likely token at "
            f"{one['agreement']:.2%} ± {one['agreement_error']:.2%}; loss {one['nats']:+.3g} ± "
            f"{one['nats_error']:.2g} nats a token",
        ]
        for name, moved in (("more", one["up"]), ("less", one["down"])):
            texts = [
                f"{quoted(x['token'])} {x['before']:.2%} {x['change']:+.3%} ± {x['error']:.3%}"
                for x in moved
            ]
            lines.append(f"  {name} likely: {', '.join(texts) or 'no token'}")
    if result["prompt"] is not None:
        lines += ["", f"after {quoted(result['prompt'])}:"]
        written = {"untouched": result["continuation"]}
        written |= {one["setting"]: one["continuation"] for one in result["settings"]}
        width = max(map(len, written))
        lines += [f"  {name:<{width}}  {quoted(text)}" for name, text in written.items()]
    return "\n".join(lines)
