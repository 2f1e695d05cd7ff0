"""Expanding a model: against clusters, Grams and outputs made by hand with scikit-learn."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from transformers import PreTrainedModel

import entangle
from entangle.model.experts import ExpertLinear
from entangle.model.layers import LinearLayer, find_layers, weight_of
from entangle.model.text import TokenWindows
from entangle.numerics.masks import prune
from entangle.numerics.moments import InputMoments
from entangle.numerics.sparsity import Sparsity
from tests.pruning.test_sparsifying import inputs_of, placed, random_windows
from tests.tiny_models import (
    ARCHITECTURES,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
    tiny_vision_model,
)

WINDOWS = 24  # of 16 tokens: enough for three clusters of 16
OPTIONS: dict[str, Any] = {"experts": 3, "batch_size": 2}


def mixture_of(model: PreTrainedModel, name: str) -> ExpertLinear:
    module = model.get_submodule(name)
    assert isinstance(module, ExpertLinear)
    return module


def clusters_of(rows: torch.Tensor, experts: int) -> torch.Tensor:
    """Return scikit-learn's own clusters (tokens,), those of fewer than 16 tokens merged."""
    sample = (rows - rows.double().mean(dim=0).float()).numpy()
    if rows.shape[1] >= 32:
        sample = PCA(rows.shape[1] // 32, svd_solver="covariance_eigh").fit_transform(rows.numpy())
    with threadpool_limits(1):
        kmeans = KMeans(experts, n_init=1, random_state=0).fit(sample)
    sizes = np.bincount(kmeans.labels_, minlength=experts)
    centres = torch.from_numpy(kmeans.cluster_centers_[sizes >= 16])
    return torch.cdist(torch.from_numpy(sample).double(), centres.double()).argmin(dim=1)


def expanded_naively(
    layer: LinearLayer, rows: torch.Tensor, shrinkage: float
) -> list[torch.Tensor]:
    """Return the weight of each expert, for rows of all the tokens of the calibration."""
    labels = clusters_of(rows, 3)
    pooled = rows.double().T @ rows.double()
    weights = []
    for index in range(int(labels.max()) + 1):
        mine = rows[labels == index].double()
        gram = mine.T @ mine + shrinkage * layer.inputs / len(rows) * pooled
        moments = InputMoments(gram.float(), torch.tensor(len(mine)))
        weights.append(prune(weight_of(layer), moments, Sparsity(0.5)).weight)
    return weights


@pytest.mark.parametrize("propagate", ["dense", "sparse"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.5])
def test_experts_are_pruned_for_the_tokens_of_their_clusters(
    shrinkage: float, propagate: Any, device: torch.device
) -> None:
    windows, model = random_windows(WINDOWS), placed(tiny_model("llama"), device)
    dense = tiny_model("llama")
    layers = find_layers(dense)
    rows = inputs_of(dense, layers, windows, 0)
    options = OPTIONS | {"solve": "greedy"}  # the steps of exact depend on rounding
    found = entangle.sparsify(
        model, windows, sparsity=0.5, propagate=propagate, shrinkage=shrinkage, **options
    )
    table = found.layers.set_index("layer")
    for layer in layers if propagate == "dense" else layers[:7]:  # block 0 has the same inputs
        expected = expanded_naively(layer, rows[layer.name], shrinkage)
        labels = clusters_of(rows[layer.name], 3)
        assert mixture_of(model, layer.name).weight.device.type == device.type
        module = copy.deepcopy(mixture_of(model, layer.name)).cpu()
        assert torch.equal(module.router.assign(rows[layer.name]), labels), layer.name
        assert module.counts == labels.bincount().tolist()
        assert len(expected) == len(module.weight) == table.loc[layer.name, "clusters"]
        for weight, ours in zip(expected, module.weight, strict=True):
            different = (weight == 0) != (ours == 0)
            assert different.float().mean() < 0.01, layer.name  # Grams agree to rounding
            same = ~different.any(dim=1)
            assert torch.allclose(weight[same], ours[same], rtol=1e-2, atol=1e-3), layer.name
        outputs = rows[layer.name] @ weight_of(layer).T
        sparse = torch.stack(
            [
                module.weight[label] @ row
                for row, label in zip(rows[layer.name], labels, strict=True)
            ]
        )
        error = (outputs - sparse).double().square().sum() / outputs.double().square().sum()
        assert table.loc[layer.name, "error"] == pytest.approx(float(error), rel=1e-3)
        assert table.loc[layer.name, "smallest_cluster"] == min(module.counts)


def test_sparse_propagation_clusters_the_inputs_that_the_experts_before_give() -> None:
    windows, model = random_windows(WINDOWS), tiny_model("llama")
    entangle.sparsify(model, windows, sparsity=0.5, **OPTIONS)
    name = "model.layers.2.self_attn.q_proj"
    for propagate, same in (("sparse", True), ("dense", False)):
        other = tiny_model("llama")
        options = OPTIONS | {"layers": ["*.0.*", "*.1.*"], "propagate": propagate}
        entangle.sparsify(other, windows, sparsity=0.5, **options)
        (layer,) = find_layers(other, [name])
        rows = inputs_of(other, [layer], windows, 0)[name]
        chosen = mixture_of(model, name).router.assign(rows)
        assert (chosen.bincount().tolist() == mixture_of(model, name).counts) is same


def test_layers_with_the_same_input_share_one_router() -> None:
    model = tiny_model("llama")
    entangle.sparsify(model, random_windows(WINDOWS), sparsity=0.5, **OPTIONS)
    for block in range(3):
        at = f"model.layers.{block}"
        mixtures = {
            role: mixture_of(model, f"{at}.{role}")
            for role in (
                *(f"self_attn.{x}_proj" for x in "qkvo"),
                *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
            )
        }
        modules = {role: module.router for role, module in mixtures.items()}
        assert modules["self_attn.q_proj"] is modules["self_attn.k_proj"]
        assert modules["self_attn.q_proj"] is modules["self_attn.v_proj"]
        assert modules["mlp.gate_proj"] is modules["mlp.up_proj"]
        assert len({id(router) for router in modules.values()}) == 4
        owners = {role for role, module in mixtures.items() if module.owns_router}
        roles = ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")
        assert owners == {f"{role}_proj" for role in roles}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "vision"])
def test_without_a_zero_an_expanded_model_is_the_dense_one(name: str, tmp_path: Path) -> None:
    model = tiny_vision_model() if name == "vision" else tiny_model(name)
    held = random_windows(4, seed=5)
    with torch.no_grad():
        dense = model(held.tokens).logits
        entangle.sparsify(
            model, random_windows(WINDOWS), sparsity=0.001, **OPTIONS, out=tmp_path / "out"
        )
        assert all(isinstance(layer.module, ExpertLinear) for layer in find_layers(model))
        assert torch.allclose(model(held.tokens).logits, dense, rtol=1e-3, atol=1e-4)
        loaded = entangle.load_model(tmp_path / "out")
        assert torch.equal(loaded(held.tokens).logits, model(held.tokens).logits)


def test_random_assignment_has_the_sizes_of_the_clusters_and_other_tokens() -> None:
    counts = {}
    for assign in ("kmeans", "random"):
        model = tiny_model("llama")
        entangle.sparsify(model, random_windows(60), sparsity=0.5, assign=assign, **OPTIONS)
        counts[assign] = mixture_of(model, "model.layers.0.mlp.down_proj").counts
    tokens = 60 * 16
    assert sum(counts["random"]) == sum(counts["kmeans"]) == tokens
    for a, b in zip(counts["kmeans"], counts["random"], strict=True):
        assert abs(a - b) < 4 * math.sqrt(a * (1 - a / tokens))
    assert counts["kmeans"] != counts["random"]


def test_costs_are_those_of_the_weights(tmp_path: Path) -> None:
    model, dense = tiny_model("llama"), tiny_model("llama")
    windows = random_windows(WINDOWS)
    found = entangle.sparsify(
        model, windows, sparsity="0.6", layers="*.mlp.*", tokenizer=tiny_tokenizer(), out=tmp_path / "out",
        **OPTIONS,
    )  # fmt: skip
    table = found.layers.set_index("layer")
    for layer in find_layers(model, ["*.mlp.*"]):
        module, row = mixture_of(model, layer.name), table.loc[layer.name]
        nonzeros = [int(weight.count_nonzero()) for weight in module.weight]
        assert nonzeros == [layer.neurons * (layer.inputs - round(0.6 * layer.inputs))] * len(
            nonzeros
        )
        shares = np.array(module.counts) / (WINDOWS * 16)
        assert row["multiply_adds"] == pytest.approx(np.dot(shares, nonzeros))
        routing = layer.inputs * len(nonzeros) if layer.role != "mlp.up_proj" else 0
        assert row["router_multiply_adds"] == routing
        assert row["stored"] == sum(nonzeros)
        assert row["dense_multiply_adds"] == layer.neurons * layer.inputs
        router = 4 * (routing + len(nonzeros) * bool(routing))
        mask = math.ceil(len(nonzeros) * layer.neurons * layer.inputs / 8)
        assert row["disk_bytes"] == sum(nonzeros) * 4 + mask + router
        assert row["memory_bytes"] == len(nonzeros) * layer.neurons * layer.inputs * 4 + router
    whole = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    head = dense.get_output_embeddings().weight.numel()  # type: ignore[no-untyped-call]
    total = head + sum(weight_of(layer).numel() for layer in find_layers(dense))
    assert whole["model_dense_multiply_adds"] == total
    added = table["multiply_adds"].sum() + table["router_multiply_adds"].sum()
    left = total - table["dense_multiply_adds"].sum()
    assert whole["model_multiply_adds"] == pytest.approx(left + added)
    assert whole["density"] == pytest.approx(added / table["dense_multiply_adds"].sum())
    on_disk = sum(f.stat().st_size for f in (tmp_path / "out" / "experts").iterdir())
    biases = 4 * sum(layer.neurons for layer in find_layers(dense, ["*.mlp.*"]))
    header = 3 * 3000  # names and shapes
    assert 0 <= on_disk - whole["disk_bytes"] - biases < header


def test_groups_and_masks_by_block_in_each_expert() -> None:
    kinds: list[tuple[str, Any]] = [("2:4", "row"), ("0.5", "block")]
    for sparsity, mask in kinds:
        model = tiny_model("llama", hidden_size=32, intermediate_size=40, num_attention_heads=4)
        windows = random_windows(WINDOWS)
        entangle.sparsify(model, windows, sparsity=sparsity, mask=mask, **OPTIONS)
        for layer in find_layers(model):
            for weight in mixture_of(model, layer.name).weight:
                zeros = weight == 0
                if sparsity == "2:4":
                    assert (zeros.unflatten(1, (-1, 4)).sum(dim=-1) == 2).all()
                else:
                    assert int(zeros.sum()) == round(0.5 * weight.numel())


def test_one_expert_is_plain_pruning_and_an_ordinary_folder(tmp_path: Path) -> None:
    plain, one = tiny_model("llama"), tiny_model("llama")
    windows = random_windows(WINDOWS)
    entangle.sparsify(plain, windows, sparsity=0.5)
    entangle.sparsify(
        one, windows, sparsity=0.5, experts=1, assign="random", shrinkage=3, out=tmp_path / "out"
    )
    for mine, theirs in zip(one.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "expansion.json").exists()


def test_few_tokens_make_fewer_experts_and_that_is_reported() -> None:
    model = tiny_model("llama")
    found = entangle.sparsify(model, random_windows(4), sparsity=0.5, experts=16, batch_size=2)
    table = found.layers.set_index("layer")
    assert (table["clusters"] < 16).all()
    for layer in find_layers(model):
        module = mixture_of(model, layer.name)
        assert table.loc[layer.name, "clusters"] == len(module.weight) == len(module.counts)
        assert sum(module.counts) == 64
    assert (table["smallest_cluster"] >= 1).all()


def test_one_token_and_equal_tokens_can_be_expanded() -> None:
    for tokens in (torch.full((8, 16), 7), torch.tensor([[7, 7]])):
        model = tiny_model("llama")
        windows = TokenWindows(tokens, "equal tokens", len(tokens), 0, "never")
        found = entangle.sparsify(model, windows, sparsity=0.5, layers="*.q_proj", experts=4)
        assert found.layers["clusters"].tolist()[0] == 1  # in block 0 all inputs are equal
        with torch.no_grad():
            assert model(torch.tensor([[9]])).logits.isfinite().all()


def test_bfloat16_is_expanded_saved_and_generates(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", dtype=torch.bfloat16)
    model: Any = entangle.load_model(tmp_path / "dense")  # its buffers are float32, as they should
    entangle.sparsify(model, random_windows(WINDOWS), sparsity=0.5, out=tmp_path / "out", **OPTIONS)
    loaded: Any = entangle.load_model(tmp_path / "out")
    module = mixture_of(loaded, "model.layers.0.mlp.up_proj")
    assert module.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in module.router.parameters())
    prompt = torch.tensor([[5, 9, 30]])
    written, read = (
        one.generate(prompt, max_new_tokens=6, do_sample=False) for one in (model, loaded)
    )
    assert torch.equal(written, read)
    with torch.no_grad():
        first = model(prompt, use_cache=False).logits[:, -1].argmax()
    assert read[0, 3] == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"experts": 0}, r"\b1 expert.*\b0\b"),
        ({"experts": 4, "method": "wanda"}, r"experts.*sparsegpt.*\b4 experts.*wanda"),
        ({"experts": 4, "assign": "luck"}, "assign.*kmeans, random.*'luck'"),
        ({"experts": 4, "components": -1}, r"components.*negative.*-1\b"),
        ({"experts": 4, "shrinkage": -0.5}, r"shrinkage.*negative.*-0\.5"),
        ({"experts": 2.5}, r"\b1 expert.*\b2\.5"),
        ({"experts": 2, "components": "x"}, "components.*negative.*'x'"),
        ({"experts": 2, "shrinkage": "x"}, "shrinkage.*number.*'x'"),
        ({"experts": 4, "shrinkage": math.nan}, r"shrinkage.*number.*\bnan\b"),
    ],
)
def test_what_makes_no_mixture_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entangle.sparsify(tiny_model("llama"), random_windows(), sparsity=0.5, **words)


def test_an_expanded_layer_is_not_pruned_again() -> None:
    model = tiny_model("llama")
    entangle.sparsify(model, random_windows(WINDOWS), sparsity=0.5, layers="*.mlp.*", **OPTIONS)
    with pytest.raises(ValueError, match=r"gate_proj.*\b3 experts"):
        entangle.sparsify(model, random_windows(WINDOWS), sparsity=0.5)
    entangle.sparsify(model, random_windows(WINDOWS), sparsity=0.5, layers="*.self_attn.*")
    assert entangle.perplexity(model, random_windows(seed=9)).perplexity > 1


def test_inputs_that_are_not_finite_are_named() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj.*clusters.*\bNaN"):
        entangle.sparsify(model, random_windows(), sparsity=0.5, layers="*.mlp.*", experts=2)


SWEEP: dict[str, Any] = {"layers": "*.mlp.*", "batch_size": 2, "experts": (1, 3)}


def test_arms_with_experts_score_as_the_model_expanded_alone() -> None:
    model, held = tiny_model("llama"), random_windows(5, seed=7)
    modules = {layer.name: layer.module for layer in find_layers(model)}
    table = entangle.sweep(
        model, random_windows(WINDOWS), held, sparsity=[0.5], method=["sparsegpt"],
        propagate=("dense", "sparse"), assign=("kmeans", "random"), **SWEEP,
    )  # fmt: skip
    assert len(table) == 1 + 2 * 3
    assert {layer.name: layer.module for layer in find_layers(model)} == modules  # all are back
    for mine, dense in zip(model.parameters(), tiny_model("llama").parameters(), strict=True):
        assert torch.equal(mine, dense)
    assert table["density"][0] == 1
    for arm in table[1:].to_dict(orient="records"):
        alone = tiny_model("llama")
        words = {"propagate": arm["propagate"], "experts": arm["experts"]}
        words |= {"assign": arm["assign"]} if arm["assign"] else {}
        found = entangle.sparsify(
            alone, random_windows(WINDOWS), sparsity=0.5, layers="*.mlp.*", batch_size=2, **words
        )
        assert arm["nats"] == entangle.perplexity(alone, held, batch_size=2).nats, words
        assert arm["layer_error"] == found.error
        assert arm["realised"] == found.sparsity
        assert arm["stored"] == found.layers["stored"].sum()


def test_arms_with_and_without_pca_are_apart() -> None:
    options: dict[str, Any] = {
        "hidden_size": 96,
        "num_attention_heads": 3,
    }  # of 96 inputs 3 components
    held, windows = random_windows(5, seed=7), random_windows(WINDOWS)
    table = entangle.sweep(
        tiny_model("llama", **options), windows, held, sparsity=[0.5], method=["sparsegpt"],
        propagate=["dense"], experts=[3], components=[None, 0], layers="*.q_proj", batch_size=2,
    )  # fmt: skip
    for place, components in ((1, None), (2, 0)):
        alone = tiny_model("llama", **options)
        entangle.sparsify(
            alone, windows, sparsity=0.5, propagate="dense", experts=3, components=components,
            layers="*.q_proj", batch_size=2,
        )  # fmt: skip
        assert table["nats"][place] == entangle.perplexity(alone, held, batch_size=2).nats
    assert table["nats"][1] != table["nats"][2]


def lost_by_neuron(
    model: PreTrainedModel, rows: dict[str, torch.Tensor], layers: list[LinearLayer]
) -> dict[str, torch.Tensor]:
    """Return the squared error (neurons,) of the outputs of a model's layers for given inputs."""
    lost = {}
    for layer in layers:
        bias: Any = layer.module.bias
        with torch.no_grad():
            outputs = model.get_submodule(layer.name)(rows[layer.name]) - bias
        dense = rows[layer.name] @ weight_of(layer).T
        lost[layer.name] = (outputs - dense).double().square().sum(dim=0)
    return lost


def test_held_out_errors_and_improvements_are_those_of_the_outputs(tmp_path: Path) -> None:
    dense, held = tiny_model("llama"), random_windows(5, seed=7)
    layers = find_layers(dense, ["*.mlp.*"])
    for propagate in ("dense", "sparse"):
        model, out = tiny_model("llama"), tmp_path / propagate
        table = entangle.sweep(
            model, random_windows(WINDOWS), held, sparsity=[0.5], method=["sparsegpt"],
            propagate=[propagate], out=out, **SWEEP,
        )  # fmt: skip
        lost, errors = {}, {}
        for experts in (1, 3):
            alone = tiny_model("llama")
            entangle.sparsify(
                alone, random_windows(WINDOWS), sparsity=0.5, layers="*.mlp.*", batch_size=2,
                experts=experts, propagate=propagate,
            )  # fmt: skip
            # Up to the second of them, a layer's inputs are those of what is before it.
            over = dense if propagate == "dense" else alone
            seen = inputs_of(over, find_layers(over, ["*.mlp.*"]), held, 0)
            lost[experts] = lost_by_neuron(alone, seen, layers)
            errors[experts] = [
                float(lost[experts][layer.name].sum())
                / float((seen[layer.name] @ weight_of(layer).T).double().square().sum())
                for layer in layers
            ]
        per_layer = _layers_of(out)
        for experts in (1, 3):
            arm = per_layer[per_layer["experts"] == experts]
            roles = arm["role"].to_numpy()
            mine = arm["held_out_error"].to_numpy()
            # With sparse propagation down_proj sees gate and up as they were, not as they became.
            keep = roles != "mlp.down_proj" if propagate == "sparse" else roles != ""
            assert mine[keep] == pytest.approx(np.array(errors[experts])[keep], rel=1e-3)
            assert (arm["held_out_tokens"] == 80).all()
        if propagate == "dense":
            gains = {
                layer.name: torch.sqrt(lost[1][layer.name] / lost[3][layer.name])
                for layer in layers
            }
            assert table["held_out_improvement"].isna().tolist() == [True, True, False]
            everything = torch.cat(list(gains.values())).numpy()
            assert table["held_out_improvement"][2] == pytest.approx(
                np.median(everything), rel=1e-3
            )
            arm = per_layer[per_layer["experts"] == 3].set_index("layer")
            for layer in layers:
                expected = np.median(gains[layer.name].numpy())
                assert arm.loc[layer.name, "held_out_improvement"] == pytest.approx(
                    expected, rel=1e-3
                )


def _layers_of(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "tables" / "layers.csv")
