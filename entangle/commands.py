"""The commands: each is one short function that calls the public functions."""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import entangle
from entangle import printed
from entangle.arguments import given_flags

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from entangle.model.text import TokenWindows
    from entangle.pruning.options import Pruning


def run_measure(args: argparse.Namespace) -> None:
    """Measure the distribution of every neuron over a text, or add second histograms to a run.

    Raises:
        ValueError: there is no text, no folder to write to, or too much of them.
    """
    from entangle.model import folders, ranks
    from entangle.runs import dataset

    if args.resolve:
        _resolve(args)
        return
    if not args.text or not args.out:
        raise ValueError(
            "measure needs --text TEXT and --out RUN, a text and a new folder, or --resolve RUN, the "
            "folder of a run that gets second histograms"
        )
    folders.check_target(args.out, args.overwrite)  # fail before the long computation
    tokenizer = _tokenizer(args)
    parts, model = _parts(args, tokenizer), _model(args)
    _check_before_writing(args, parts, model, input_layers=args.input_layers)
    windows = _mixed(args, parts, model, tokenizer, folders.partial_of(args.out))
    run = entangle.measure(
        model,
        windows,
        input_layers=args.input_layers,
        bins=args.bins,
        difficulty=args.difficulty,
        shard=args.shard,
        **_work(args),
    )
    if ranks.rank() > 0:  # only rank 0 writes and prints
        return
    if args.difficulty:
        from entangle.runs import store

        store.save_figure(entangle.plots.difficulty(run), args.out / "figures" / "difficulty.png")
    _print(
        args, dataset.summary(run) | {"run": str(args.out), "log": _log(args.out)}, printed.describe
    )


def _resolve(args: argparse.Namespace) -> None:
    """Add second histograms to a run, from the windows that it was measured on.

    Raises:
        ValueError: --out or another option of a new run is given too.
    """
    from entangle.measurement.resolving import unresolvable
    from entangle.runs import dataset

    sizes = ("windows", "length", "batch_size", "seed", "bos", "skip_first", "bins", "difficulty")
    of_new = given_flags(
        args, "out", "overwrite", *sizes, "layers", "exclude", "input_layers", "shard"
    )
    if of_new:
        raise ValueError(
            f"--resolve adds to {args.resolve} as it was measured, and writes no new run: leave "
            f"{' and '.join(of_new)} out"
        )
    run = entangle.open_run(args.resolve)
    about = dataset.about(run)
    drawn = _drawn(about) | ({"text": args.text} if args.text else {})
    args, tokenizer = argparse.Namespace(**vars(args) | drawn), _tokenizer(args)
    parts, model = _parts(args, tokenizer), _model(args)
    windows = _mixed(args, parts, model, tokenizer, args.resolve)
    found = entangle.resolve(model, windows, run=args.resolve, progress=_progress())
    count = found["resolved"].sizes["resolved"] if "resolved" in found.children else 0
    result = dataset.summary(found) | {"run": str(args.resolve), "resolved": count}
    result["unresolvable"] = unresolvable(found)
    _print(args, result, printed.resolved)


def run_merge(args: argparse.Namespace) -> None:
    """Merge the shards of a run into one run."""
    from entangle.runs import dataset

    run = entangle.merge(args.run, out=args.out, overwrite=args.overwrite)
    _print(
        args, dataset.summary(run) | {"run": str(args.out), "log": _log(args.out)}, printed.describe
    )


def run_plan(args: argparse.Namespace) -> None:
    """Print the expected costs of measuring and pruning a model."""
    plan = entangle.plan(
        args.model,
        args.text,
        revision=args.revision,
        dtype=args.dtype,
        device=args.device,
        offload=args.offload is not None,
        trust_remote_code=args.trust_remote_code,
        **_layers(args),
        input_layers=args.input_layers,
        windows=args.windows,
        length=args.length,
        batch_size=args.batch_size,
        bins=args.bins,
        sparsity=args.sparsity,
        experts=args.experts,
        solve=args.solve,
        reconstruct=args.reconstruct,
    )
    _print(args, dataclasses.asdict(plan), printed.planned)


def run_perplexity(args: argparse.Namespace) -> None:
    """Score a model on a text."""
    from entangle.model import ranks, repeating

    windows = _scored(args, _tokenizer(args), args.text, args.windows, args.stride)
    dense = None if args.against is None else _dense(args, windows)
    model = _model(args, packed=not args.unpacked)
    named = args.model if args.against != args.model else f"{args.model} ({args.revision})"
    models = {named: model} | ({args.against: dense} if dense is not None else {})
    for one in models.values() if args.generate else ():
        repeating.check_prompts(one, windows)  # before the score is computed
    work: dict[str, Any] = {"batch_size": args.batch_size, "progress": _progress()}
    if args.generate:
        _tell([printed.generating(len(models))])
    score = entangle.perplexity(model, windows, against=dense, skip_first=args.skip_first, **work)
    numbers = {
        name: getattr(score, name)
        for name in ("perplexity", "perplexity_error", "nats", "nats_error", "tokens")
    }
    about = {"model": args.model, "text": windows.text, "fingerprint": windows.fingerprint}
    about |= {"windows": len(windows), "length": windows.length}
    about |= {"stride": windows.stride} if windows.stride else {}
    about |= {"against": args.against} if dense is not None else {}
    numbers |= score.divergence.columns() if score.divergence is not None else {}
    if args.generate:
        found = {name: entangle.repetition(one, windows, **work) for name, one in models.items()}
        about["generation"] = {name: one.columns() for name, one in found.items()}
    if ranks.rank() == 0:
        _print(args, numbers | about, printed.scored)


def _dense(args: argparse.Namespace, windows: "TokenWindows") -> "PreTrainedModel":
    """Load the model of --against.

    Raises:
        ValueError: its tokenizer makes other tokens of the text.
    """
    settings = {"model": args.against, "revision": None}
    settings |= {"offload": args.offload and args.offload / "against"}
    dense = argparse.Namespace(**vars(args) | settings)
    others = _scored(dense, _tokenizer(dense), args.text, args.windows, args.stride, tell=False)
    if others.fingerprint != windows.fingerprint:
        raise ValueError(
            f"the tokenizers of {args.model} and of {args.against} make other tokens of {windows.text}, "
            "so their predictions cannot be compared: give models with the same tokenizer"
        )
    return _model(dense)


def run_generate(args: argparse.Namespace) -> None:
    """Generate text from a prompt; a terminal shows each token as it is generated."""
    from entangle.show.coloured import plain

    tokenizer = _tokenizer(args)
    model = _model(args, packed=not args.unpacked)
    live = sys.stdout.isatty() and not args.json

    def show(text: str) -> None:
        if live:
            print(plain(text), end="", flush=True)

    found = entangle.generate(model, tokenizer, args.prompt, tokens=args.tokens, on_text=show)
    result = dataclasses.asdict(found) | {"tokens_per_second": found.tokens_per_second}
    result |= {"model": args.model, "prompt": args.prompt, "device": str(model.device)}
    _print(args, result, printed.timed if live else printed.generated)


def run_sparsify(args: argparse.Namespace) -> None:
    """Prune a model and save it."""
    from entangle.model import folders

    folders.check_target(args.out, args.overwrite)  # before torch is imported, which takes seconds
    from entangle.model import ranks
    from entangle.pruning.options import SEARCH, STRENGTH, Pruning
    from entangle.pruning.searching import SEARCH_FILE
    from entangle.runs import store
    from entangle.runs.setup import hashed_once

    auto = args.strength == "auto"
    options, folder = _options(args)
    pruning = Pruning.of(**options | ({"strength": STRENGTH} if auto else {}))
    run = None if folder is None else entangle.open_run(folder)
    tokenizer = _tokenizer(args)
    parts, model, work = _parts(args, tokenizer), _model(args), _work(args)
    _check_before_writing(args, parts, model, [pruning])
    windows = _mixed(args, parts, model, tokenizer, folders.partial_of(args.out))
    chosen = None
    with hashed_once():
        if auto and run is not None:
            named = [] if Path(args.budget) == folder else ["budget"]
            search = {
                n: options[n] for n in ("sparsity", "method", "mask", "solve", "across", *named)
            }
            how = {
                name: work[name]
                for name in ("layers", "exclude", "batch_size", "skip_first", "progress")
            }
            chosen = entangle.choose_budget(model, windows, run=run, **search, **how)
            options |= {"budget": chosen.budget, "strength": chosen.strength}
        found = entangle.sparsify(model, windows, run=run, tokenizer=tokenizer, **options, **work)
    if ranks.rank() > 0:
        return
    result = found.attributes | {"folder": str(args.out), "log": _log(args.out)}
    result |= {"realised": found.sparsity, "error": found.error}
    whole = store.read_json(args.out / "sparsity.json")
    result |= {name: whole[name] for name in whole if name not in {"sparsity", "error"}}
    result |= {"layers": found.layers.to_dict(orient="records")}
    if pruning.across == SEARCH:
        result["search"] = store.read_json(args.out / SEARCH_FILE)["candidates"]
    if chosen is not None:
        store.save_table(chosen.table, args.out / "budget.csv")
        result["chosen"] = {
            "budget": chosen.budget,
            "strength": chosen.strength,
            "against_uniform": chosen.against_uniform,
            "against_uniform_error": chosen.against_uniform_error,
            "set_aside": int(chosen.table["windows"].max()),
            "candidates": len(chosen.table) - 1,
        }
    _print(args, result, printed.sparsified)


def run_sweep(args: argparse.Namespace) -> None:
    """Prune a model in several ways and score each."""
    from entangle.model import folders

    folders.check_target(args.out, args.overwrite)
    from entangle.pruning.options import arms_of

    options, folder = _options(args)
    prunings = arms_of(**options)
    run = None if folder is None else entangle.open_run(folder)
    tokenizer = _tokenizer(args)
    parts, evaluation = _parts(args, tokenizer), _evaluations(args, tokenizer)
    model = _model(args)
    _check_before_writing(args, parts, model, prunings, evaluation)
    windows = _mixed(args, parts, model, tokenizer, folders.partial_of(args.out))
    options |= {"run": run, "rounded": args.rounded, "speed": args.speed}
    table = entangle.sweep(model, windows, evaluation, **options, **_work(args))
    _print_table(args, table, "sweep")


def _options(args: argparse.Namespace) -> tuple[dict[str, Any], Path | None]:
    """Return the options of pruning, and the folder of the run that the budgets use.

    They are checked here, before a model is loaded.

    Raises:
        ValueError: the budgets name several runs, or no run where an option needs one.
    """
    from entangle.pruning.options import OPTIONS, SEARCH, TRIM, UNIFORM, needs_run, several

    options = {name: getattr(args, name) for name in OPTIONS if name in args}
    routed = [name for name in options if OPTIONS[name].scope == "experts"]
    if routed and max(several(args.experts), default=1) < 2:
        raise ValueError(
            f"--{routed[0]} has an effect only on several experts: give --experts above 1, or leave "
            f"--{routed[0]} out"
        )
    if "scores" in options and SEARCH not in several(args.across):
        raise ValueError(
            "--scores has an effect only on a search: give --across search, or leave --scores out"
        )
    if SEARCH in several(args.across) and args.strength == "auto":
        raise ValueError(
            "--strength auto chooses how rows differ, and --across search how blocks do: choose one of "
            "them, such as --strength 0.25"
        )
    sparse = [name.replace("_", "-") for name in options if OPTIONS[name].scope == "inputs"]
    if sparse and {*several(args.inputs)} <= {"dense"}:
        raise ValueError(
            f"--{sparse[0]} has an effect only on sparse inputs: give --inputs teal or wina, or leave "
            f"--{sparse[0]} out"
        )
    budgets, folder = _budgets(several(args.budget))
    options["budget"] = budgets if isinstance(args.budget, tuple) else budgets[0]
    blocks = [across for across in several(args.across) if needs_run(UNIFORM, across)]
    if blocks and folder is None:
        raise ValueError(
            f"--across {blocks[0]} needs a measured run: give it with --budget RUN, or with "
            "--budget RUN:uniform to keep the rows uniform"
        )
    if args.strength is None:
        options.pop("strength")
    elif {*budgets} <= {UNIFORM, TRIM}:
        strength = ",".join(map(str, several(args.strength)))
        raise ValueError(
            f"--strength {strength} has no effect without a variable of a measured run: give one "
            "with --budget RUN[:VARIABLE], or leave --strength out"
        )
    return options, folder


def _budgets(texts: Sequence[str]) -> tuple[tuple[str, ...], Path | None]:
    """Split the values of --budget; return the budgets of rows, and the folder of their run.

    Raises:
        ValueError: they name several runs.
    """
    from entangle.pruning.options import DISTANCE, OPTIONS, TRIM, UNIFORM

    budgets: list[str] = []
    folders: dict[str, None] = {}
    for text in texts:
        folder, _, variable = text.rpartition(":")
        if text in {UNIFORM, TRIM}:
            folder, variable = "", text
        elif not folder or (variable not in OPTIONS["budget"].choices and Path(text).exists()):
            folder, variable = text, DISTANCE
        budgets.append(variable)
        folders |= {folder: None} if folder else {}
    if len({os.path.realpath(folder) for folder in folders}) > 1:
        raise ValueError(
            f"expected one measured run in --budget, got {len(folders)}: {', '.join(folders)}"
        )
    return tuple(budgets), Path(next(iter(folders))) if folders else None


def _print_table(args: argparse.Namespace, table: "pd.DataFrame", name: str) -> None:
    """Draw the figure of a sweep or an ablation, and print the table in Markdown."""
    from entangle.model import ranks
    from entangle.runs import store

    if ranks.rank() > 0:
        return
    file = None
    if (table["perplexity"].notna() & (table.iloc[:, 0] != "dense")).any():
        figure = getattr(entangle.plots, name)(table)
        file = str(store.save_figure(figure, args.out / "figures" / f"{name}.png"))
    result = {str(key): value for key, value in table.attrs.items()}
    result |= {"table": table.to_dict(orient="records"), "figure": file}
    text = (args.out / "tables" / f"{name}.md").read_text(encoding="utf-8")
    figures = f"with the figure {file}" if file else "without a figure: no arm has a score"
    following = printed.next_steps(args.out, "report {}")
    _print(args, result, lambda _: f"{text}\nwritten to {args.out}, {figures}\n{following}")


def run_ablate(args: argparse.Namespace) -> None:
    """Treat the most entangled neurons of a measured model, and other sets, and score each.

    Raises:
        ValueError: neurons are to be sparsified and there is no --text.
    """
    from entangle.model import folders

    folders.check_target(args.out, args.overwrite)
    from entangle.experiments.interventions import Ablation

    names = ("share", "sparsity", "experts", "intervention", "sets", "seeds", "solve")
    treatment = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    unused = [n for n in ("sparsity", "experts", "solve") if n in treatment]
    if unused and "sparsify" not in args.intervention:
        raise ValueError(
            f"--{unused[0]} has an effect only on --intervention sparsify: add sparsify, or leave "
            f"--{unused[0]} out"
        )
    Ablation.of(**treatment)  # check the options before a model is loaded
    if args.text is None and "sparsify" in args.intervention:
        raise ValueError("--intervention sparsify needs a calibration text: give it with --text")
    run, args = _measured(args)
    tokenizer = _tokenizer(args)
    parts = None if args.text is None else _parts(args, tokenizer)
    evaluation = _scored(args, tokenizer, args.evaluation, args.evaluation_windows)
    model, windows = _model(args), None
    if parts is not None and "sparsify" in args.intervention:
        measured: dict[str, Any] = {"run": run, "ranked": True, "pruned": True}
        _check_before_writing(args, parts, model, evaluation=evaluation, **measured)
        windows = _mixed(args, parts, model, tokenizer, folders.partial_of(args.out))
    table = entangle.ablate(
        model,
        windows,
        evaluation,
        run=run,
        per_block=args.per_block,
        **treatment,
        **_work(args),
    )
    _print_table(args, table, "ablation")


def run_disentangle(args: argparse.Namespace) -> None:
    """Measure the neurons of a measured model within clusters, and with sparse experts."""
    from entangle.model import folders

    folders.check_target(args.out, args.overwrite)
    from entangle.experiments import disentangling
    from entangle.runs import dataset, store

    settings = {name: getattr(args, name) for name in ("experts", "sparsity", "solve")}
    disentangling.check_settings(**settings)
    run, args = _measured(args)
    tokenizer = _tokenizer(args)
    parts, evaluation = _parts(args, tokenizer), _evaluations(args, tokenizer)
    model = _model(args)
    measured: dict[str, Any] = {"run": run, "ranked": True, "pruned": True, "scored": False}
    _check_before_writing(args, parts, model, evaluation=evaluation, **measured)
    windows = _mixed(args, parts, model, tokenizer, folders.partial_of(args.out))
    found = entangle.disentangle(
        model,
        windows,
        evaluation,
        run=run,
        neurons=args.neurons,
        **settings,
        **_work(args),
    )
    figures = {}
    for kind in ("improvement", "clusters", "sparse"):
        try:
            figure = getattr(entangle.plots, kind)(found)
        except ValueError as error:  # nothing to draw: the other figures are still drawn
            figures[kind] = f"no {kind}.png ({error})"
            continue
        figures[kind] = str(store.save_figure(figure, args.out / "figures" / f"{kind}.png"))
    result = dataset.disentangled(found) | {"figures": figures}
    text = (args.out / "tables" / "disentangle.md").read_text(encoding="utf-8")
    drawn, following = ", ".join(figures.values()), printed.next_steps(args.out, "report {}")
    _print(
        args, result, lambda _: f"{text}\nwritten to {args.out}, with figures: {drawn}\n{following}"
    )


def run_contexts(args: argparse.Namespace) -> None:
    """Find the contexts of neurons, and add them to the run; or print their values on a prompt."""
    _check_named(args)
    from entangle.runs import contexts_file, dataset

    run, args = _measured(args)
    about, names = dataset.about(run), _named(args, run)
    args, tokenizer = argparse.Namespace(**vars(args) | _drawn(about)), _tokenizer(args)
    if args.prompt is not None:
        on_text = entangle.values_on(
            _model(args), args.prompt, run=run, neurons=names, tokenizer=tokenizer
        )
        told = {"neurons": [one.told() for one in on_text]}
        _print(args, told, printed.on_text)
        return
    parts, model = _parts(args, tokenizer), _model(args)
    windows = _mixed(args, parts, model, tokenizer, args.run)
    found = entangle.contexts(
        model,
        windows,
        run=run,
        neurons=names,
        tokenizer=tokenizer,
        out=args.run,
        delphi=args.delphi,
        progress=_progress(),
    )
    result = {"neurons": [dataclasses.asdict(one) for one in found]}
    _print(args, result | {"file": str(args.run / contexts_file.FILE)}, printed.contexts)


def run_words(args: argparse.Namespace) -> None:
    """Find the tokens that neurons' weights read and write, and add them to the run."""
    _check_named(args)
    from entangle.runs import words_file

    run, args = _measured(args)
    names, tokenizer = _named(args, run), _tokenizer(args)
    found = entangle.words(_model(args), names, tokenizer=tokenizer, run=run, out=args.run)
    result = {"neurons": [dataclasses.asdict(one) for one in found]}
    _print(args, result | {"file": str(args.run / words_file.FILE)}, printed.words)


def run_steer(args: argparse.Namespace) -> None:
    """Set a neuron to a value, and compare the model's predictions with its own.

    Raises:
        ValueError: --windows or --tokens is too small, or there is no prompt for --tokens.
    """
    from entangle.model.steering import Setting
    from entangle.model.text import evenly_spaced
    from entangle.runs import dataset

    for name, number in (("windows", args.windows), ("tokens", args.tokens)):
        if number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")
    if args.prompt is None and given_flags(args, "tokens"):
        raise ValueError(
            f"--tokens {args.tokens} has an effect only with --prompt: give a prompt, or leave --tokens out"
        )
    for text in args.set:
        Setting.of(text)  # before a model is loaded
    run, args = _measured(args)
    about = dataset.about(run)
    given = {} if args.text is None else {"text": [args.text], "windows": args.windows}
    args = argparse.Namespace(**vars(args) | _drawn(about) | given | {"shown": args.windows})
    tokenizer = _tokenizer(args)
    parts, model = _parts(args, tokenizer), _model(args)
    windows = evenly_spaced(_mixed(args, parts, model, tokenizer, args.run), args.shown)
    found = entangle.steered(
        model,
        windows,
        run=run,
        neuron=args.neuron,
        settings=args.set,
        tokenizer=tokenizer,
        prompt=args.prompt,
        prompt_tokens=args.tokens,
        batch_size=about["batch_size"],
        skip_first=about["skip_first"],
        progress=_progress(),
    )
    result = {"neuron": found.neuron, "model": args.model, "tokens": found.tokens}
    result |= {"text": windows.text, "windows": len(windows), "length": windows.length}
    result |= {"settings": [one.told() for one in found.settings]}
    _print(
        args,
        result | {"prompt": args.prompt, "continuation": found.continuation},
        printed.steered,
    )


def _drawn(about: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that draw the windows of a run's text again."""
    drawn = {name: about[name] for name in ("windows", "length", "seed", "bos")}
    return drawn | {"text": [*about.get("texts", [about["text"]])]}


def _check_named(args: argparse.Namespace) -> None:
    """Check that neurons are named or --top is given, and that no flag would be ignored.

    Raises:
        ValueError: both are given, or neither; or a prompt, which writes no file, and --delphi; or
            patterns of layers beside names of neurons.
    """
    if getattr(args, "prompt", None) is not None and args.delphi is not None:
        raise ValueError("--prompt prints values and writes no files: leave out --delphi")
    if args.neurons and args.top:
        raise ValueError(
            f"expected neurons (LAYER:INDEX) or --top, not both: got {' '.join(args.neurons)} and "
            f"--top {args.top}"
        )
    if not args.neurons and not args.top:
        raise ValueError(
            "no neurons are given: name them as LAYER:INDEX, or take each layer's N most entangled "
            "ones with --top N"
        )
    patterns = [] if args.top else given_flags(args, "layers", "exclude")
    if patterns:
        raise ValueError(
            f"{patterns[0]} has an effect only with --top, and neurons are named: leave it out"
        )


def _named(args: argparse.Namespace, run: "xr.DataTree") -> list[str]:
    """Return the neurons that are named, or each layer's most entangled ones."""
    if not args.top:
        return list(args.neurons)
    ranked = entangle.top_by_layer(run, count=args.top, **_layers(args))
    return [f"{layer}:{index}" for layer, indices in ranked.items() for index in indices]


def run_check(args: argparse.Namespace) -> None:
    """Compare a run's distances with those of raw outputs, in three ways.

    Raises:
        RuntimeError: a distance of the run is outside its bound.
    """
    from entangle.measurement.checking import spread_neurons
    from entangle.runs import dataset

    if args.neurons or args.top:
        _check_named(args)
    run, args = _measured(args)
    named = bool(args.neurons or args.top)
    names = _named(args, run) if named else spread_neurons(run, **_layers(args))
    args = argparse.Namespace(**vars(args) | _drawn(dataset.about(run)))
    tokenizer = _tokenizer(args)
    parts, model = _parts(args, tokenizer), _model(args)
    windows = _mixed(args, parts, model, tokenizer, args.run)
    table = entangle.check(model, windows, run=run, neurons=names, progress=_progress())
    result = {"model": args.model, "text": windows.text}
    result |= {str(name): value for name, value in table.attrs.items()}
    _print(args, result | {"neurons": table.to_dict(orient="records")}, printed.checked)
    wrong = table["neuron"][~table["agrees"]].to_list()
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(table)} neurons have a distance outside its certified bound, or "
            f"ways that do not agree: {', '.join(wrong[:5])}{', ...' if wrong[5:] else ''}. Either "
            "the model's outputs are not what they were when RUN was measured (run.json has the "
            "versions), or this is a bug in entangle: please report it"
        )


def run_describe(args: argparse.Namespace) -> None:
    """Add descriptions of neurons to a run."""
    from entangle.runs import descriptions

    found = entangle.describe(args.run, args.source)
    result = {"descriptions": found, "file": str(args.run / descriptions.FILE)}
    _print(args, result, lambda _: f"{len(found):,} descriptions written to {result['file']}")


def run_rank(args: argparse.Namespace) -> None:
    """Print the neurons with the largest distance, or largest value of another variable."""
    from entangle.runs import dataset, store
    from entangle.runs.descriptions import read_descriptions

    run = store.open_run(args.run)
    table = entangle.rank(run, args.top, by=args.by, **_layers(args))
    known = read_descriptions(args.run)
    if known:
        table["description"] = [known.get(name, "") for name in table["neuron"]]
    if args.csv:
        store.save_table(table, args.csv)
    rows = table.to_dict(orient="records")
    _print(args, dataset.summary(run) | {"neurons": rows}, printed.ranked)


def run_diff(args: argparse.Namespace) -> None:
    """Compare the neurons' distances in two runs."""
    from entangle.runs import dataset, store

    pair = [store.open_run(folder) for folder in (args.run, args.other)]
    found = entangle.diff(*pair, **_layers(args))
    if args.csv:
        store.save_table(found.neurons, args.csv)
    figure = None
    if args.out:
        drawn = entangle.plots.comparison(*pair, **_layers(args))
        figure = str(store.save_figure(drawn, args.out))
    result = {
        "runs": [dataset.summary(run) for run in pair],
        "layers": found.layers.to_dict(orient="records"),
        "neurons": found.neurons.head(args.top).to_dict(orient="records"),
        "figure": figure,
    }
    _print(args, result, printed.compared)


def run_plot(args: argparse.Namespace) -> None:
    """Draw a run, a sweep, an ablation or what disentangle wrote.

    Raises:
        ValueError: the plot needs a neuron and none is given, it takes fewer neurons than are
            given, or it takes no --sparsity or no --by.
    """
    from entangle.experiments import ablation_table, sweep_table
    from entangle.runs import store

    names, kind = args.neurons, args.kind
    if kind == "neuron" and not names:
        raise ValueError(
            "plot neuron needs at least one neuron: name it as LAYER:INDEX, as entangle rank prints it"
        )
    if names and kind not in {"neuron", "clusters", "sparse"}:
        raise ValueError(f"plot {kind} takes no neuron, got {names[0]!r}")
    if names[1:] and kind != "neuron":
        raise ValueError(f"plot {kind} takes one neuron, got {len(names)}: {' '.join(names)}")
    readers = {"sweep": sweep_table.read_table, "ablation": ablation_table.read_table}
    run: Any = readers.get(kind, store.open_run)(args.run)
    if args.sparsity is not None and kind not in {"improvement", "sparse"}:
        raise ValueError(f"plot {kind} takes no --sparsity, got {args.sparsity!r}")
    if args.by is not None and kind not in {"heatmap", "layers", "ranks"}:
        raise ValueError(f"plot {kind} takes no --by, got {args.by!r}")
    options = {} if args.sparsity is None else {"sparsity": args.sparsity}
    options |= {} if args.by is None else {"variable": args.by}
    if names[1:]:
        figure, name = entangle.plots.neurons(run, names), "neurons"
    else:
        figure = getattr(entangle.plots, kind)(run, *names, **options)
        name = "-".join([kind, *([args.by] if args.by else []), *names]).replace(":", "-")
    file = store.save_figure(figure, args.out or args.run / "figures" / f"{name}.png")
    _print(args, {"figure": str(file)}, lambda result: str(result["figure"]))


def run_report(args: argparse.Namespace) -> None:
    """Write runs into one HTML report."""
    file = entangle.report(args.run, args.out or args.run[0] / "report.html")
    result = {"report": str(file), "bytes": file.stat().st_size}
    _print(args, result, lambda result: f"{result['report']} ({result['bytes'] / 1e6:.1f} MB)")


def _work(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments that all commands which write a run take; set `COMMAND`."""
    from entangle.runs.setup import COMMAND

    COMMAND.set(args.command_line)  # for run.json
    names = ("batch_size", "skip_first", "out", "overwrite")
    work = {name: getattr(args, name) for name in names} | {"progress": _progress()}
    return work | _layers(args)


def _layers(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments that choose layers."""
    return {"layers": args.layers, "exclude": args.exclude}


def _log(folder: Path) -> dict[str, Any]:
    """Return a run's log.json."""
    from entangle.runs import store

    return store.read_json(folder / "log.json")


def _source(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision, "trust_remote_code": args.trust_remote_code}


def _tokenizer(args: argparse.Namespace) -> "PreTrainedTokenizerBase":
    return entangle.load_tokenizer(args.model, **_source(args))


def _parts(
    args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase"
) -> "list[TokenWindows | None]":
    """Read the windows of --text before a large model is loaded, to fail early.

    None stands for those that the model writes itself.
    """
    from entangle.model.mixing import share_windows

    sizes = {name: getattr(args, name) for name in ("windows", "length", "seed", "bos")}
    parts = share_windows(args.text, tokenizer, **sizes)
    _tell(note for part in parts if part is not None for note in part.notes)
    return parts


def _check_before_writing(
    args: argparse.Namespace,
    parts: "Sequence[TokenWindows | None]",
    model: "PreTrainedModel",
    prunings: "Sequence[Pruning]" = (),
    evaluation: "TokenWindows | None" = None,
    **run: Any,
) -> None:
    """Raise what the command would raise about any windows, since writing them takes minutes."""
    if None not in parts:
        return
    import torch

    from entangle.model.text import OWN, TokenWindows
    from entangle.pruning.sparsifying import check_prunings
    from entangle.runs.setup import Setup

    tokens = torch.ones(args.windows, args.length, dtype=torch.int64)
    windows = TokenWindows(tokens, OWN, None, args.seed, args.bos)
    work = _layers(args) | {"batch_size": args.batch_size, "skip_first": args.skip_first}
    setup = Setup.of(model, windows, evaluation, **work | {"pruned": bool(prunings)} | run)
    if prunings:
        check_prunings(setup, prunings)


def _mixed(
    args: argparse.Namespace,
    parts: "Sequence[TokenWindows | None]",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
) -> "TokenWindows":
    """Mix the windows of --text; those that the model writes itself may be kept in ``folder``."""
    from entangle.model.mixing import equal_shares

    sizes = {name: getattr(args, name) for name in ("length", "seed", "bos")}
    shares = zip(parts, equal_shares(args.text, args.windows), strict=True)
    whole: list[TokenWindows] = []
    for part, count in shares:
        if part is None:
            options: dict[str, Any] = sizes | {"folder": folder, "progress": _progress()}
            part = entangle.own_windows(model, tokenizer, windows=count, **options)
            _tell([printed.written(part, str(args.model))])
        whole.append(part)
    return entangle.mixed_windows(whole)


def _evaluations(args: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase") -> "TokenWindows":
    """Read the windows of each text of --evaluation."""
    texts, windows = args.evaluation, args.evaluation_windows
    return entangle.mixed_windows([_scored(args, tokenizer, [one], windows) for one in texts])


def _scored(
    args: argparse.Namespace,
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    windows: int | None,
    stride: int | None = None,
    tell: bool = True,
) -> "TokenWindows":
    """Read the windows of a text to score; with a stride they slide.

    Raises:
        ValueError: there are several texts.
    """
    if texts[1:]:
        raise ValueError(
            f"a score is of one text, got {len(texts)}: {', '.join(texts)}. Give one of them, "
            "and score the others by themselves"
        )
    sizes = {name: getattr(args, name) for name in ("length", "seed", "bos")}
    found = (
        entangle.token_windows(texts[0], tokenizer, windows=windows, purpose="evaluation", **sizes)
        if stride is None
        else entangle.sliding_windows(texts[0], tokenizer, windows=windows, stride=stride, **sizes)
    )
    _tell(found.notes if tell else ())
    return found


def _tell(sentences: Iterable[str]) -> None:
    """Write sentences to stderr, which the result is not written to."""
    from entangle.model import ranks

    for sentence in sentences if ranks.rank() == 0 else ():
        sys.stderr.write(f"entangle: {sentence}\n")


def _measured(args: argparse.Namespace) -> "tuple[xr.DataTree, argparse.Namespace]":
    """Return the run, and a copy of the arguments with the model that it was measured on."""
    run = entangle.open_run(args.run)
    model = {name: run.attrs.get(name) for name in ("model", "dtype", "revision")}
    return run, argparse.Namespace(**vars(args) | model)


def _model(args: argparse.Namespace, packed: bool = False) -> "PreTrainedModel":
    options = {"dtype": args.dtype, "device": args.device, "packed": packed, "verify": args.verify}
    options |= {name: getattr(args, name, None) for name in ("device_map", "offload")}
    return entangle.load_model(args.model, **options, **_source(args))


def _progress() -> bool:
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


def _print(args: argparse.Namespace, result: dict[str, Any], text_of: Any) -> None:
    if args.json:
        from entangle.runs.store import without_nan

        print(json.dumps(without_nan(result), indent=2, ensure_ascii=False))
    else:
        print(text_of(result))
    sys.stdout.flush()


def command_line(args: argparse.Namespace) -> str:
    """Return the command line with only the arguments that determine its result."""
    ignored = {"command", "model", "run", "out", "overwrite", "json", "debug", "shard", "offload"}
    ignored |= {"verify"}
    line = ["entangle", args.command, str(args.run if "run" in args else args.model)]
    for name, value in sorted(vars(args).items()):
        unset = value is None or value is False or value == []
        if name in ignored or unset or (name, value) == ("difficulty", 0):
            continue
        line.append("--" + name.replace("_", "-"))
        if isinstance(value, tuple):
            line.append(",".join("auto" if item is None else str(item) for item in value))
        elif value is not True:
            line += map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join(line)


def check_words(words: Sequence[str]) -> None:
    """Check that all words of a command line are text, which run.json and messages can hold.

    Raises:
        ValueError: a word has bytes that are not UTF-8, or a NUL character.
    """
    for word in words:
        if "\0" in word or word.encode(errors="ignore").decode() != word:
            raise ValueError(
                f"{word!r} is not UTF-8 text, or has a NUL character: if it is the name of a file, "
                "rename the file"
            )


def check_numbers(args: argparse.Namespace) -> None:
    """Check --top and --seed before a command runs; nothing else checks them by these names.

    Raises:
        ValueError: a number is too small.
    """
    for name, least in (("top", 1), ("seed", 0)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")


COMMANDS = {
    "measure": run_measure,
    "merge": run_merge,
    "plan": run_plan,
    "perplexity": run_perplexity,
    "generate": run_generate,
    "sparsify": run_sparsify,
    "sweep": run_sweep,
    "ablate": run_ablate,
    "disentangle": run_disentangle,
    "contexts": run_contexts,
    "words": run_words,
    "steer": run_steer,
    "check": run_check,
    "describe": run_describe,
    "rank": run_rank,
    "diff": run_diff,
    "plot": run_plot,
    "report": run_report,
}
