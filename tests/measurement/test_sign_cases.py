"""Sign cases, counted again token by token from outputs that the tests' own hooks heard."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entangle.measurement.context_search import contexts
from entangle.measurement.measuring import measure
from entangle.numerics.gaussian import from_samples
from entangle.runs.store import read_json
from tests.measurement.test_context_search import BATCH, TOKENIZER, drawn_windows
from tests.tiny_models import tiny_model

BLOCK, INDEX, SKIP = 1, 5, 3
MLP = f"model.layers.{BLOCK}.mlp"
NAMES = {
    "gate": f"{MLP}.gate_proj:{INDEX}",
    "up": f"{MLP}.up_proj:{INDEX}",
    "product": f"{MLP}.down_proj:input:{INDEX}",
}


@pytest.fixture(scope="module")
def heard() -> dict[str, Any]:
    """The values of the unit (windows, length), and what `contexts` says of its three parts."""
    model, windows = tiny_model("llama"), drawn_windows(12)
    run = measure(
        model, windows, batch_size=BATCH, skip_first=SKIP, input_layers=[f"{MLP}.down_proj"]
    )
    with torch.no_grad():
        held = model(windows.tokens, output_hidden_states=True).hidden_states[BLOCK]
        block: Any = model.get_submodule(f"model.layers.{BLOCK}")
        values: dict[str, Any] = {}
        hooks = [
            block.mlp.gate_proj.register_forward_hook(lambda *a: values.update(gate=a[2])),
            block.mlp.up_proj.register_forward_hook(lambda *a: values.update(up=a[2])),
            block.mlp.down_proj.register_forward_pre_hook(
                lambda *a: values.update(product=a[1][0])
            ),
        ]
        assert held.shape[:2] == windows.tokens.shape
        model(windows.tokens)
        for hook in hooks:
            hook.remove()
    others = [f"{MLP}.down_proj:3", "model.layers.0.self_attn.q_proj:1"]
    found = contexts(
        model, windows, run=run, neurons=[*NAMES.values(), *others], tokenizer=TOKENIZER
    )
    columns = {part: one[..., INDEX].numpy()[:, SKIP:] for part, one in values.items()}
    return {"values": columns, "found": found, "windows": windows}


def test_cases_are_those_of_a_count(heard: dict[str, Any]) -> None:
    gate, up, product = (heard["values"][part].ravel() for part in NAMES)
    assert product == pytest.approx(gate / (1 + np.exp(-gate)) * up, rel=1e-4, abs=1e-6)  # SiLU
    for one in heard["found"][:3]:
        unit = one.unit
        assert {"gate": unit.gate, "up": unit.up, "product": unit.product} == NAMES
        assert [case.gate + case.up for case in unit.cases] == ["++", "+-", "-+", "--"]
        for case in unit.cases:
            rows = [
                row
                for row in range(len(gate))
                if ("-" if gate[row] < 0 else "+") + ("-" if up[row] < 0 else "+")
                == case.gate + case.up
            ]
            assert case.tokens == len(rows) > 3
            assert case.share == pytest.approx(len(rows) / len(gate))
            assert case.mean == pytest.approx(np.mean([product[row] for row in rows]), rel=1e-4)
        assert sum(case.tokens for case in unit.cases) == len(gate)
        for part, distance in unit.wasserstein.items():
            column = heard["values"][part].reshape(-1, 1)
            assert distance == pytest.approx(from_samples(column)[0], rel=1e-5)
        assert one.wasserstein == pytest.approx(unit.wasserstein[_part_of(one.neuron)], rel=1e-6)


def _part_of(neuron: str) -> str:
    return next(part for part, name in NAMES.items() if name == neuron)


def test_examples_have_the_largest_products_of_their_case(heard: dict[str, Any]) -> None:
    tokens = heard["windows"].tokens
    for case in heard["found"][0].unit.cases:
        assert len(case.examples) == 4
        sizes = []
        for one in case.examples:
            place = one.window, one.position - SKIP
            for part in NAMES:
                own = heard["values"][part][place]
                assert getattr(one, part) == pytest.approx(own, rel=1e-4, abs=1e-6)
            assert one.token == TOKENIZER.decode(
                tokens[one.window, one.position : one.position + 1]
            )
            assert (one.gate < 0, one.up < 0) == (case.gate == "-", case.up == "-")
            sizes.append(abs(one.product))
        gate, up, product = (heard["values"][part] for part in NAMES)
        of_case = ((gate < 0) == (case.gate == "-")) & ((up < 0) == (case.up == "-"))
        assert sizes == pytest.approx(np.sort(np.abs(product[of_case]))[:-5:-1], rel=1e-4)


def test_neurons_outside_have_none(heard: dict[str, Any]) -> None:
    assert [one.unit for one in heard["found"][3:]] == [None, None]


def test_a_run_of_outputs_alone_has_them_too_and_the_file_keeps_them(tmp_path: Path) -> None:
    model, windows = tiny_model("llama"), drawn_windows(4)
    run = measure(model, windows, layers=[f"{MLP}.up_proj"])
    options: Any = {"run": run, "tokenizer": TOKENIZER, "out": tmp_path}
    (found,) = contexts(model, windows, neurons=[NAMES["up"]], **options)
    kept = read_json(tmp_path / "contexts.json")["neurons"][NAMES["up"]]["unit"]
    assert found.unit is not None
    assert (kept["gate"], kept["product"]) == (NAMES["gate"], NAMES["product"])
    assert [case["tokens"] for case in kept["cases"]] == [one.tokens for one in found.unit.cases]
    with pytest.raises(LookupError, match="no neuron"):  # the run measured no product
        contexts(model, windows, neurons=[NAMES["product"]], **options)
