"""The tokens behind a distribution are the model's own, and all that is said of them is so."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
import xarray as xr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from entangle.measurement import context_search, token_kinds
from entangle.measurement.context_search import NeuronContexts, contexts
from entangle.measurement.measuring import measure
from entangle.measurement.rerunning import neuron_outputs
from entangle.model.text import TokenWindows, token_windows
from entangle.numerics.contributions import bootstrap, distance_parts
from entangle.numerics.gaussian import from_samples
from entangle.numerics.histograms import Histograms
from entangle.runs.contexts_file import read_contexts
from entangle.runs.store import open_run
from tests.distributions import BIMODAL, DISTRIBUTIONS, TRIMODAL, Distribution
from tests.measurement.test_recording import captured, flat, neuron_names
from tests.tiny_models import tiny_model, tiny_tokenizer

Array = npt.NDArray[Any]
WORDS = "The quick brown fox jumps over the lazy dog; a wizard's job is to vex chumps quickly. "
LENGTH, SKIP, BATCH = 43, 3, 4
NEURONS = {
    "llama": ["model.layers.2.mlp.down_proj:7", "model.layers.0.self_attn.q_proj:0"],
    "gpt2": ["transformer.h.1.mlp.c_fc:40", "transformer.h.0.attn.c_attn:71"],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A measured model, and the outputs of all its neurons, heard with hooks of the tests' own."""

    model: PreTrainedModel
    windows: TokenWindows
    run: xr.DataTree
    skip_first: int
    outputs: Array  # (tokens, neurons)

    def find(self, neurons: Sequence[str], **options: Any) -> list[NeuronContexts]:
        return contexts(
            self.model, self.windows, run=self.run, neurons=neurons, tokenizer=TOKENIZER, **options
        )

    def column(self, neuron: str) -> Array:
        """Return the counted outputs of a neuron (windows, counted tokens)."""
        column = self.outputs[:, neuron_names(self.run).index(neuron)]
        return column.reshape(len(self.windows), -1)


TOKENIZER = tiny_tokenizer()


def drawn_windows(windows: int = 20, length: int = LENGTH, seed: int = 0) -> TokenWindows:
    return token_windows([WORDS * 60], TOKENIZER, windows=windows, length=length, seed=seed)


def measured(model: PreTrainedModel, windows: TokenWindows, skip_first: int) -> Case:
    run = measure(model, windows, batch_size=BATCH, skip_first=skip_first)
    with captured(model) as outputs:
        for batch in windows.tokens.split(BATCH):
            model(batch)
    return Case(model, windows, run, skip_first, flat(outputs, skip_first))


@pytest.fixture(scope="module", params=[("llama", 0), ("llama", SKIP), ("gpt2", SKIP)], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    name, skip_first = request.param
    return measured(tiny_model(name), drawn_windows(), skip_first)


@pytest.fixture(scope="module")
def llama() -> Case:
    return measured(tiny_model("llama"), drawn_windows(), 0)


def neurons_of(case: Case) -> list[str]:
    return NEURONS[case.model.config.model_type]


def two_groups(model: PreTrainedModel) -> PreTrainedModel:
    """Make neuron 0 of the first layer tell even tokens (a quarter as many) from odd ones."""
    query: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    norm: Any = model.get_submodule("model.layers.0.input_layernorm")
    with torch.no_grad():
        embeddings: Any = model.get_input_embeddings().weight
        odd = torch.arange(len(embeddings)) % 2 == 1
        embeddings[:, 0] = torch.where(odd, 1.0, -1.0)
        norm.weight[0] = 1
        query.weight[0] = 0.02 * torch.randn(query.weight.shape[1], generator=torch.manual_seed(0))
        query.weight[0, 0] = 1
    return model


# --- the tokens and what the neuron says to them


def test_a_tokens_output_is_the_models_own_there(case: Case) -> None:
    for found in case.find(neurons_of(case)):
        layer, _, index = found.neuron.rpartition(":")
        for context in found.contexts:
            with captured(case.model) as outputs:
                case.model(case.windows.tokens[context.window][None])
            own = float(outputs[layer][0][0, context.position, int(index)])
            assert context.output == pytest.approx(own, rel=1e-4, abs=1e-5)
        assert len({(one.window, one.position) for one in found.contexts}) > 10


def test_a_tokens_deviation_and_share_are_those_of_all_outputs(case: Case) -> None:
    for found in case.find(neurons_of(case)):
        column = case.column(found.neuron)
        parts = distance_parts(column.reshape(-1, 1)).reshape(column.shape)
        for context in found.contexts:
            place = context.window, context.position - case.skip_first
            assert context.output == pytest.approx(column[place], rel=1e-6)
            deviation = (column[place] - column.mean()) / column.std()
            assert context.deviation == pytest.approx(deviation, rel=1e-4, abs=1e-5)
            assert context.share == pytest.approx(parts[place] / parts.sum(), rel=1e-4, abs=1e-8)
        assert max(one.share for one in found.contexts) > 1 / column.size


def test_the_distance_is_exact_and_its_interval_that_of_whole_windows(case: Case) -> None:
    for found in case.find(neurons_of(case)):
        column = case.column(found.neuron)
        assert found.tokens == column.size == 20 * (LENGTH - case.skip_first)
        (exact,) = from_samples(column.reshape(-1, 1))
        assert found.wasserstein == pytest.approx(exact, rel=1e-6)
        bound = case.run["wasserstein_error"].to_numpy().max()
        names = neuron_names(case.run)
        stored = case.run["wasserstein"].to_numpy()[names.index(found.neuron)]
        assert found.wasserstein == pytest.approx(stored, abs=bound)
        draws = bootstrap(column.reshape(-1, 1), column.shape[1], draws=200, seed=0)
        low, high = 2 * exact - np.quantile(draws, [0.975, 0.025])
        assert [found.low, found.high] == pytest.approx([max(low, 0), high], rel=1e-5, abs=1e-7)
        assert found.low < found.high


def test_the_intervals_seed_is_that_of_the_windows(llama: Case) -> None:
    names = neurons_of(llama)[:1]
    windows = dataclasses.replace(llama.windows, seed=5)  # the same tokens
    (found,) = contexts(llama.model, windows, run=llama.run, neurons=names, tokenizer=TOKENIZER)
    (other,) = llama.find(names)
    assert (found.low, found.high) != (other.low, other.high)
    assert dataclasses.replace(found, low=other.low, high=other.high) == other


def test_an_interval_has_no_negative_distance() -> None:
    case = measured(tiny_model("llama"), drawn_windows(3, 10), 0)  # few tokens: wide intervals
    lows = 2 * from_samples(case.outputs) - np.quantile(bootstrap(case.outputs, 10), 0.975, axis=0)
    nearest = int(lows.argmin())
    (found,) = case.find([neuron_names(case.run)[nearest]])
    assert lows[nearest] < -0.01
    assert found.low == 0 < found.high


def test_the_text_is_what_the_window_has_there(case: Case) -> None:
    edges = 0
    for found in case.find(neurons_of(case)):
        for one in found.contexts:
            line, at = case.windows.tokens[one.window], one.position
            assert one.token == TOKENIZER.decode(line[at : at + 1])
            assert one.before == TOKENIZER.decode(line[max(at - 24, 0) : at])
            assert one.after == TOKENIZER.decode(line[at + 1 : at + 9])
            assert one.before + one.token + one.after in WORDS * 2
            assert len(one.before) == min(at, 24)
            assert len(one.after) == min(LENGTH - 1 - at, 8)
            edges += at < 24 or at > LENGTH - 9
    assert edges  # of windows, beyond which nothing is shown


def test_characters_of_several_bytes_are_whole_in_the_text() -> None:
    windows = token_windows(["naïve café — 猫が好き. "] * 30, TOKENIZER, windows=9, length=40)
    model = tiny_model("gpt2")
    (found,) = contexts(
        model,
        windows,
        run=measure(model, windows),
        neurons=NEURONS["gpt2"][:1],
        tokenizer=TOKENIZER,
    )
    assert any("naïve café" in one.before for one in found.contexts)


def test_words_keep_the_spaces_between_them() -> None:
    words = {"<unk>": 0, "▁the": 1, "▁dog": 2, "▁fox": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()  # as sentencepiece's
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    windows = token_windows(["the dog the fox the fox the dog " * 30], tokenizer, length=12)
    model = tiny_model("gpt2")
    (found,) = contexts(
        model,
        windows,
        run=measure(model, windows),
        neurons=NEURONS["gpt2"][:1],
        tokenizer=tokenizer,
    )
    assert any("the dog the fox" in one.before for one in found.contexts)


# --- whole windows


def test_windows_have_the_models_own_value_at_each_token(case: Case, tmp_path: Path) -> None:
    found = case.find(neurons_of(case), out=tmp_path)
    kept = read_contexts(tmp_path)
    assert set(kept.windows) == {str(one.window) for neuron in found for one in neuron.windows}
    for window, texts in kept.windows.items():
        assert "".join(texts) == TOKENIZER.decode(case.windows.tokens[int(window)])
    for neuron in found:
        layer, _, index = neuron.neuron.rpartition(":")
        column, scale = case.column(neuron.neuron), neuron.scale
        far = np.abs(column - np.median(column))
        assert scale.median == pytest.approx(np.median(column), rel=1e-5, abs=1e-6)
        assert scale.reach == pytest.approx(np.quantile(far, 0.99), rel=1e-4)
        shown = kept.windows_of(neuron.neuron)
        assert len({one.window for one in shown}) == len(shown) == 8
        for one in shown:
            with captured(case.model) as outputs:
                case.model(case.windows.tokens[one.window][None])
            own = outputs[layer][0][0, :, int(index)].numpy()
            assert len(one.tokens) == len(one.values) == LENGTH
            assert np.isnan(one.values[: case.skip_first]).all()
            off = np.abs(one.values - own)[case.skip_first :]
            bound = 0.53 * scale.step * np.hypot(scale.reach, own - scale.median)
            assert (off <= bound[case.skip_first :] + 1e-4 * scale.reach).all()
            shades = ((own - scale.median) / scale.reach).clip(-1, 1)[case.skip_first :]
            assert one.shades[case.skip_first :] == pytest.approx(shades, abs=0.02)
            assert one.position >= case.skip_first
        assert [one.why for one in shown[:6]] == ["highest"] * 3 + ["lowest"] * 3
        for one, end in ((shown[0], column.max()), (shown[3], column.min())):
            place = one.window, one.position - case.skip_first
            assert column[place] == pytest.approx(end, rel=1e-6)


# --- which tokens


def chosen(found: NeuronContexts, why: str) -> list[float]:
    return [one.output for one in found.contexts if one.why == why]


def test_lowest_and_highest_are_the_ends(case: Case) -> None:
    for found in case.find(neurons_of(case)):
        ordered = np.sort(case.column(found.neuron).ravel())
        assert chosen(found, "lowest") == pytest.approx(ordered[:8], rel=1e-6)
        assert chosen(found, "highest") == pytest.approx(ordered[:-9:-1], rel=1e-6)
        for why in ("lowest", "highest"):
            places = [(one.window, one.position) for one in found.contexts if one.why == why]
            assert len(set(places)) == 8
        shown = [one.why for one in found.contexts]
        assert shown[:16] == ["lowest"] * 8 + ["highest"] * 8
        assert sum(why in {"lowest", "highest"} for why in shown) == 16


def test_quantiles_are_those_of_the_outputs(case: Case) -> None:
    shares = [0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99]
    for found in case.find(neurons_of(case)):
        column = np.sort(case.column(found.neuron).ravel())
        for share in shares:
            (output,) = chosen(found, f"quantile {share:g}")
            # At most one token off: between two tokens either may be shown.
            place = share * (len(column) - 1)
            assert column[int(place)] - 1e-6 <= output <= column[int(np.ceil(place))] + 1e-6
        shown = [one.why for one in found.contexts if one.why.startswith("quantile")]
        assert shown == [f"quantile {share:g}" for share in shares]


def test_a_text_of_few_tokens_shows_each_at_either_end() -> None:
    model, windows = tiny_model("llama"), drawn_windows(1, 5)
    run = measure(model, windows)
    (found,) = contexts(
        model, windows, run=run, neurons=["model.layers.1.mlp.up_proj:3"], tokenizer=TOKENIZER
    )
    lowest, highest = chosen(found, "lowest"), chosen(found, "highest")
    assert len(lowest) == 5
    assert lowest == sorted(lowest) == highest[::-1]
    assert found.tokens == len(found.positions) == 5
    assert sum(row["count"] for row in found.frequent) == 5


# --- modes


@pytest.mark.parametrize("law", DISTRIBUTIONS, ids=str)
def test_modes_are_as_many_as_the_histograms(law: Distribution) -> None:
    values = law.sample(20_000).astype(np.float32)
    histograms = Histograms.zeros(1, bins=1024)
    histograms.start(torch.from_numpy(values)[:, None])
    histograms.add(torch.from_numpy(values)[:, None])
    (counted,) = histograms.modes(histograms.moments())
    found = context_search._modes(values, float(values.mean()), float(values.std()))
    assert len(found) == counted == law.modes
    assert found == sorted(found)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 1.0), (-40.0, 5.0), (3.0, 1e-3)])
def test_modes_lie_where_the_density_is_highest(mean: float, scale: float) -> None:
    for law, expected in (
        (BIMODAL, [-2, 2] / np.sqrt(5)),
        (TRIMODAL, [-5, 0, 5] / np.sqrt(53 / 3)),
    ):
        values = (mean + scale * law.quantiles(20_000)).astype(np.float32)
        found = context_search._modes(values, float(values.mean()), float(values.std()))
        assert (np.array(found) - mean) / scale == pytest.approx(expected, abs=0.06)


def test_two_groups_of_tokens_are_two_modes_with_their_tokens() -> None:
    case = measured(two_groups(tiny_model("llama")), drawn_windows(), 0)
    name = "model.layers.0.self_attn.q_proj:0"
    (found,) = case.find([name])
    column = case.column(name)
    ids = case.windows.tokens.numpy()
    middles = [column[ids % 2 == parity].mean() for parity in (0, 1)]
    assert case.run["modes"].to_numpy()[neuron_names(case.run).index(name)] == 2
    assert found.modes == pytest.approx(middles, abs=0.1 * column.std())
    for parity, mode in enumerate(found.modes):
        why = f"mode at {mode:.3g}"
        shown = [one for one in found.contexts if one.why == why]
        assert len(shown) == 4
        assert all(ids[one.window, one.position] % 2 == parity for one in shown)
        nearest = np.sort(np.abs(column - mode).ravel())[:4]
        distances = [abs(one.output - mode) for one in shown]
        assert distances == pytest.approx(nearest, abs=1e-5)
    assert sum(one.why.startswith("mode") for one in found.contexts) == 8


# --- shares of positions and of tokens


def test_the_positions_shares_are_sums_over_windows_and_add_up_to_one(case: Case) -> None:
    for found in case.find(neurons_of(case)):
        column = case.column(found.neuron)
        parts = distance_parts(column.reshape(-1, 1)).reshape(column.shape)
        assert len(found.positions) == LENGTH - case.skip_first
        assert sum(found.positions) == pytest.approx(1, abs=1e-9)
        assert found.positions == pytest.approx(parts.sum(axis=0) / parts.sum(), rel=1e-4)
        assert np.ptp(found.positions) > 1e-3
        assert min(one.position for one in found.contexts) >= case.skip_first
        assert max(one.position for one in found.contexts) < LENGTH


@pytest.mark.parametrize(("usual", "most"), [(200, 20), (200, 3), (7, 20), (7, 3)])
def test_frequent_tokens_are_those_of_a_group_by(
    case: Case, monkeypatch: pytest.MonkeyPatch, usual: int, most: int
) -> None:
    monkeypatch.setattr(token_kinds, "FREQUENT", usual)
    monkeypatch.setattr(token_kinds, "SHOWN", most)
    for found in case.find(neurons_of(case)):
        column = case.column(found.neuron).ravel()
        parts = distance_parts(column[:, None])[:, 0]
        ids = case.windows.tokens[:, case.skip_first :].flatten().tolist()
        frame = pd.DataFrame(
            {"token": map(TOKENIZER.decode, ids), "share": parts / parts.sum(), "output": column}
        )
        table = frame.groupby("token").agg(
            count=("share", "size"), share=("share", "sum"), mean_output=("output", "mean")
        )
        least = table["count"].nlargest(usual).min()
        shares = [row["share"] for row in found.frequent]
        assert len(shares) == min(usual, most, len(table))
        assert shares == sorted(shares, reverse=True)
        for row in found.frequent:
            truth = table.loc[row["token"]]
            assert row["count"] == truth["count"] >= least
            assert row["share"] == pytest.approx(truth["share"], rel=1e-4)
            assert row["mean_output"] == pytest.approx(truth["mean_output"], rel=1e-4, abs=1e-6)
        certain = table[table["count"] > least] if usual < len(table) else table
        left_out = certain.drop([row["token"] for row in found.frequent], errors="ignore")
        if len(left_out) and len(shares) == most:
            assert left_out["share"].max() <= shares[-1] * (1 + 1e-6)
        elif usual >= len(table):
            assert sum(shares) == pytest.approx(1)
        else:
            assert left_out.empty


# --- what the distribution is without some tokens


def test_left_out_are_the_position_and_the_token_with_too_much_of_the_variance(case: Case) -> None:
    for found in case.find(neurons_of(case)):
        column = case.column(found.neuron)
        ids = case.windows.tokens[:, case.skip_first :].numpy()
        frame = pd.DataFrame(
            {
                "position": np.tile(np.arange(case.skip_first, LENGTH), len(column)),
                "token": [TOKENIZER.decode([one]) for one in ids.ravel().tolist()],
                "output": column.ravel(),
            }
        )
        frame["square"] = (frame["output"] - frame["output"].mean()) ** 2
        far = found.without[0]
        frame = frame.sort_values("square", kind="stable", ascending=False)
        assert far.what == "the 1% farthest from the mean"
        assert far.tokens == round(len(frame) / 100)
        share = frame["square"].head(far.tokens).sum() / frame["square"].sum()
        assert far.variance == pytest.approx(share, rel=1e-4)
        near = frame["output"].tail(-far.tokens).to_numpy()
        assert far.wasserstein == pytest.approx(from_samples(near[:, None])[0], rel=1e-4)
        for left, kind in zip(found.without[1:], ("position", "token"), strict=True):
            groups = frame.groupby(kind)["square"].agg(["sum", "size"]) / [
                frame["square"].sum(),
                len(frame),
            ]
            worst = (groups["sum"] - groups["size"]).idxmax()
            assert left.what == f"{kind} {worst if kind == 'position' else repr(worst)}"
            assert left.variance == pytest.approx(groups["sum"].to_dict()[worst], rel=1e-4)
            others = frame.loc[frame[kind] != worst, "output"].to_numpy()
            assert left.tokens == len(frame) - len(others) > 0
            assert left.wasserstein == pytest.approx(from_samples(others[:, None])[0], rel=1e-4)


def test_a_massive_first_token_explains_the_distance() -> None:
    """All windows begin with a token of their own, to which alone the neuron says something else."""
    model = two_groups(tiny_model("llama"))
    windows = drawn_windows(32)
    tokens = windows.tokens.clone()
    tokens[:, 1:] |= 1  # odd
    tokens[:, 0] = 100
    query: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    norm: Any = model.get_submodule("model.layers.0.input_layernorm")
    with torch.no_grad():
        query.weight[0, 0] = 100
        norm.weight[0] = 3
    case = measured(model, dataclasses.replace(windows, tokens=tokens), 0)
    (found,) = case.find(["model.layers.0.self_attn.q_proj:0"])
    _, position, token = found.without
    assert (position.what, position.tokens) == ("position 0", 32)
    assert (token.what, token.tokens) == (f"token {str(TOKENIZER.decode([100])) + '<100>'!r}", 32)
    column = case.column(found.neuron)
    first = ((column[:, 0] - column.mean()) ** 2).sum() / ((column - column.mean()) ** 2).sum()
    assert position.variance == token.variance == pytest.approx(first, rel=1e-4)
    assert first > 0.5
    assert position.wasserstein < found.wasserstein / 2


# --- how it is run


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_the_batch_size_is_nothing_to_the_result(llama: Case, batch_size: int) -> None:
    names = neurons_of(llama)[:1]
    run = measure(llama.model, llama.windows, batch_size=batch_size)
    (found,) = contexts(llama.model, llama.windows, run=run, neurons=names, tokenizer=TOKENIZER)
    (other,) = llama.find(names)
    for name in ("tokens", "wasserstein", "low", "high", "modes", "positions"):
        assert getattr(found, name) == pytest.approx(getattr(other, name), rel=1e-4), name
    assert [one["token"] for one in found.frequent] == [one["token"] for one in other.frequent]
    for one, two in zip(found.contexts, other.contexts, strict=True):
        assert one.output == pytest.approx(two.output, rel=1e-4, abs=1e-5)
        assert one.why == two.why


def test_neurons_come_in_the_order_asked_for_and_once(llama: Case) -> None:
    names = ["model.layers.2.mlp.up_proj:36", "model.layers.0.mlp.up_proj:0"]
    names += ["model.layers.2.mlp.up_proj:1", "model.layers.1.self_attn.v_proj:7"]
    found = llama.find([*names, names[0], names[2]])
    assert [one.neuron for one in found] == names
    for one, name in zip(found, names, strict=True):
        assert one == llama.find([name])[0]
        assert one.contexts[0].output == pytest.approx(llama.column(name).min(), rel=1e-6)


def test_no_neurons_is_no_contexts(llama: Case) -> None:
    assert llama.find([]) == []


@pytest.mark.parametrize(("held", "sizes"), [(6, [2, 2, 1]), (15, [5]), (0, [1] * 5)])
def test_neurons_that_do_not_fit_at_once_take_several_passes(
    llama: Case, monkeypatch: pytest.MonkeyPatch, held: int, sizes: list[int]
) -> None:
    layers = ["0.mlp.up_proj", "2.mlp.up_proj", "0.mlp.up_proj", "1.mlp.gate_proj", "0.mlp.up_proj"]
    names = [f"model.layers.{layer}:{36 - i}" for i, layer in enumerate(layers)]
    expected = llama.find(names)
    passes: list[Array] = []
    run_once = neuron_outputs

    def counted(*arguments: Any) -> Array:
        passes.append(run_once(*arguments))
        return passes[-1]

    monkeypatch.setattr(context_search, "VALUES", held * 20 * LENGTH + 1)
    monkeypatch.setattr(context_search, "neuron_outputs", counted)
    assert llama.find(names) == expected
    shapes = [(20 * LENGTH, 3 * size) for size in sizes]  # the three parts of each hidden unit
    assert [outputs.shape for outputs in passes] == shapes


def test_a_run_is_a_tree_or_its_dataset(llama: Case) -> None:
    names = neurons_of(llama)[:1]
    dataset = llama.run.to_dataset()
    found = contexts(llama.model, llama.windows, run=dataset, neurons=names, tokenizer=TOKENIZER)
    assert found == llama.find(names)


def test_the_models_hooks_are_gone(llama: Case) -> None:
    llama.find(neurons_of(llama))
    for name, module in llama.model.named_modules():
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name


# --- refusals


def test_other_weights_and_other_windows_are_refused(llama: Case, tmp_path: Path) -> None:
    names, windows = neurons_of(llama), llama.windows
    with pytest.raises(ValueError, match=rf"weights.*{llama.run.attrs['weights'][:17]}"):
        contexts(
            tiny_model(seed=1),
            windows,
            run=llama.run,
            neurons=names,
            tokenizer=TOKENIZER,
            out=tmp_path,
        )
    for other in (drawn_windows(seed=1), drawn_windows(19), drawn_windows(length=LENGTH - 1)):
        with pytest.raises(ValueError, match=r"other windows.*\b20 windows of 43\b.*seed 0\b"):
            contexts(
                llama.model, other, run=llama.run, neurons=names, tokenizer=TOKENIZER, out=tmp_path
            )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.up_proj:37", r"up_proj:37'.*\b37 neurons.*\b36\b"),
        ("model.layers.0.mlp.up_proj:-1", r"up_proj:-1'.*\b37 neurons.*\b36\b"),
        ("model.layers.0.mlp.up_prj:1", r"up_prj:1'.*layers\.0\.mlp\.up_proj:0\b"),
        ("model.layers.0.mlp.up_proj", "up_proj'.*LAYER:INDEX"),
        ("", "''.*LAYER:INDEX"),
    ],
)
def test_a_neuron_that_is_not_there_is_refused(
    llama: Case, tmp_path: Path, name: str, message: str
) -> None:
    with pytest.raises(LookupError, match=message):
        llama.find([*neurons_of(llama), name], out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_neuron_without_a_distribution_is_refused(tmp_path: Path) -> None:
    model, last = tiny_model("llama"), "model.layers.2.mlp.down_proj"
    layer: Any = model.get_submodule(last)
    with torch.no_grad():
        layer.weight[3], layer.bias[3] = 0, 7  # dead
        layer.weight[4, 0] = torch.nan  # broken
    windows = drawn_windows(5)
    run = measure(model, windows)
    for index in (3, 4):
        with pytest.raises(ValueError, match=rf"{last}:{index}\b.*dead"):
            contexts(
                model,
                windows,
                run=run,
                neurons=[f"{last}:5", f"{last}:{index}"],
                tokenizer=TOKENIZER,
                out=tmp_path,
            )
    assert not list(tmp_path.iterdir())
    (found,) = contexts(model, windows, run=run, neurons=[f"{last}:5"], tokenizer=TOKENIZER)
    assert 0 < found.wasserstein < 1


def test_a_model_in_training_mode_is_refused() -> None:
    model, windows = tiny_model("gpt2"), drawn_windows(5)
    run = measure(model, windows)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        contexts(model, windows, run=run, neurons=NEURONS["gpt2"], tokenizer=TOKENIZER)


# --- contexts.json


def read_strictly(file: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    content: dict[str, Any] = json.loads(file.read_text("utf-8"), parse_constant=refuse)
    return content


def test_contexts_are_added_to_the_run(tmp_path: Path) -> None:
    model, windows, out = tiny_model("llama"), drawn_windows(6), tmp_path / "run"
    run = measure(model, windows, out=out)
    names = [f"model.layers.{block}.mlp.up_proj:{block + 30}" for block in range(3)]

    def written(*some: str) -> dict[str, Any]:
        found = contexts(
            model, windows, run=open_run(out), neurons=some, tokenizer=TOKENIZER, out=out
        )
        content: dict[str, Any] = read_strictly(out / "contexts.json")["neurons"]
        assert found == contexts(
            model, windows, run=run, neurons=some, tokenizer=TOKENIZER
        )  # as without a folder
        for one in found:
            assert content[one.neuron] == dataclasses.asdict(one)
        return content

    files = set(out.rglob("*"))
    assert list(written(names[0], names[2])) == [names[0], names[2]]
    both = written(names[0], names[2])
    whole = written(names[1])
    assert set(whole) == set(names)
    assert {name: whole[name] for name in both} == both  # what was there is still there
    another = {"another": whole[names[0]] | {"neuron": "é"}}
    changed = whole | another | {names[1]: whole[names[2]]}
    windows_there = read_strictly(out / "contexts.json")["windows"]
    file = {"neurons": changed, "windows": windows_there}
    (out / "contexts.json").write_text(json.dumps(file), encoding="utf-8")
    assert written(names[1]) == whole | another
    assert set(out.rglob("*")) - files == {out / "contexts.json"}
    (out / "contexts.json").write_text('{"model.layers')
    with pytest.raises(OSError, match=r"contexts\.json.*damaged"):
        contexts(model, windows, run=run, neurons=names, tokenizer=TOKENIZER, out=out)


def test_parts_of_characters_are_told_apart_by_their_numbers() -> None:
    text = ["你好世界" * 200]
    windows = token_windows(text, TOKENIZER, windows=4, length=LENGTH)
    case = measured(tiny_model("llama"), windows, 0)
    (found,) = case.find(NEURONS["llama"][:1])
    names = [row["token"] for row in found.frequent]
    assert len({*names}) == len(names) > 5
    ids = {int(token) for token in windows.tokens.unique()}
    assert {*names} <= {f"\ufffd<{token}>" for token in ids}
