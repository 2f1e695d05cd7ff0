"""What the user has set in torch changes no bit of a result, and is as it was afterwards."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import entangle
from entangle.model.layers import find_layers, weight_of
from entangle.numerics.torch_settings import with_torch_defaults
from tests.numerics.test_histograms import assert_same, by_torch, wild
from tests.pruning.test_sparsifying import random_windows
from tests.tiny_models import tiny_model


@contextmanager
def setting(set_: Callable[[Any], None], value: Any, usual: Any) -> Iterator[None]:
    set_(value)
    try:
        yield
    finally:
        set_(usual)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": lambda: torch.enable_grad(),
    "default dtype": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "wide default dtype": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device": lambda: torch.device("meta"),
    "precision": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "no gradients": lambda: torch.no_grad(),
    "inference": lambda: torch.inference_mode(),
}


def results() -> dict[str, Any]:
    """Return bits of what each public function gives on a tiny model."""
    windows, held_out = random_windows(24), random_windows(3, seed=5)
    run = entangle.measure(tiny_model(), windows, difficulty=20)
    found: dict[str, Any] = {str(k): v.to_numpy() for k, v in run.to_dataset().data_vars.items()}
    pruned = tiny_model()
    entangle.sparsify(pruned, windows, sparsity=0.5, experts=2, layers="*.1.*")
    for layer in find_layers(pruned):
        found[layer.name] = weight_of(layer).detach().float().numpy()
    found["nats"] = entangle.perplexity(pruned, held_out).window_nats
    table = entangle.sweep(
        tiny_model(), windows, held_out, sparsity=[0.5], method="wanda", propagate="dense"
    )
    found["sweep"] = table["nats"].to_numpy()
    table = entangle.ablate(
        tiny_model(), windows, held_out, run=run, share=0.1, sets=["wasserstein"], experts=[2]
    )
    found["ablate"] = table["perplexity"].to_numpy()
    tree = entangle.disentangle(tiny_model(), windows, held_out, run=run, experts=2, layers="*.0.*")
    found["disentangle"] = tree["wasserstein_within"].to_numpy()
    return found


@functools.cache
def usual() -> dict[str, Any]:
    """Return the results without a setting; not a fixture, which would have other threads."""
    return results()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the public functions run in the setting, not what makes the tiny models and texts."""

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            with SETTINGS[name]():
                before = state()
                result = function(*args, **options)
                assert state() == before
            return result

        return called

    expected = usual()
    for public in ("measure", "sparsify", "perplexity", "sweep", "ablate", "disentangle"):
        monkeypatch.setattr(entangle, public, within(getattr(entangle, public)), raising=False)
    found = results()
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_array_equal(found[key], values, err_msg=key)


def state() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def test_after_an_error_the_settings_are_back() -> None:
    @with_torch_defaults
    def fail() -> None:
        assert torch.zeros(1).dtype == torch.float32
        raise KeyError("no")

    with setting(torch.set_default_dtype, torch.float64, torch.float32):
        with pytest.raises(KeyError, match="no"):
            fail()
        assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("name", ["default dtype", "wide default dtype", "autocast", "precision"])
def test_torchs_histograms_count_as_ever_in_a_recorder(name: str) -> None:
    """The hooks of a recorder run among the user's own code."""
    pilot, rows = wild(64, 30), wild(200, 30, seed=1)
    expected = by_torch(pilot, rows)
    with SETTINGS[name]():
        found = by_torch(pilot, rows)
    assert_same(found, expected)
