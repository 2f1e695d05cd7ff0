"""What the user has set in torch changes no bit of a result, and is as it was afterwards."""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import entangle
from entangle.model.layers import find_layers, weight_of
from entangle.numerics.routing import fit_router
from entangle.numerics.torch_settings import torch_defaults, with_torch_defaults
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


def products_set() -> list[Any]:
    """Return the settings of products; torch raises for those that the user's others replace."""
    found: list[Any] = []
    matmul = torch.backends.cuda.matmul
    readers: list[Callable[[], Any]] = [
        torch.get_float32_matmul_precision,
        *(functools.partial(getattr, matmul, name, None) for name in ON_GPUS),
        lambda: getattr(ON_CPUS, "fp32_precision", None),
        lambda: getattr(torch.backends, "fp32_precision", None),
    ]
    for read in readers:
        try:
            found.append(read())
        except RuntimeError as error:
            found.append(str(error))
    return found


ON_CPUS: Any = getattr(torch.backends.mkldnn, "matmul", None)
ON_GPUS = (
    "allow_tf32",
    "fp32_precision",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
# What the user sets for products: TF32 and sums of 16 bits change masks on a GPU.
OF_PRODUCTS: dict[str, tuple[Any, str, Any]] = {
    "the new precision": (torch.backends, "fp32_precision", "tf32"),
    "the new precision on GPUs": (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "the new precision on CPUs": (ON_CPUS, "fp32_precision", "bf16"),
    **{name: (torch.backends.cuda.matmul, name, True) for name in ON_GPUS[:1] + ON_GPUS[-1:]},
    **{name: (torch.backends.cuda.matmul, name, False) for name in ON_GPUS[2:4]},
}


@contextmanager
def product_setting(name: str) -> Iterator[None]:
    place, attribute, value = OF_PRODUCTS[name]
    if not hasattr(place, attribute):
        pytest.skip("this version of torch has no such setting")
    usual = getattr(place, attribute)
    setattr(place, attribute, value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        setattr(place, attribute, usual)
        for backend in (torch.backends.cuda.matmul, ON_CPUS):
            if hasattr(backend, "fp32_precision"):
                backend.fp32_precision = "none"


PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "linalg_cholesky_ex", "linalg_solve_triangular"}


class Products(TorchDispatchMode):
    """Keep what is set, and whether autocast is on, at each product and factor that torch computes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, list[Any]] = {}  # by the function of torch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            now = [*products_set(), torch.is_autocast_enabled("cpu"), torch.get_default_dtype()]
            assert self.seen.setdefault(name, now) == now
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OF_PRODUCTS)
def test_each_product_of_a_pruning_is_of_float32(name: str) -> None:
    """Also those in hooks, of the router, the Gram, the factor and the errors."""
    model, windows = tiny_model(), random_windows(24)
    with product_setting(name):
        before, products = products_set(), Products()
        with products:
            entangle.sparsify(model, windows, sparsity=0.5, experts=2, layers="*.1.*")
        assert products_set() == before
    assert products.seen.keys() >= PRODUCTS - {"addmm", "bmm"}
    for precision, tf32, fp32, *sums, on_cpu, _, autocast, dtype in products.seen.values():
        assert (precision, tf32) == ("highest", False)
        assert {fp32, on_cpu} <= {"ieee", None}  # None: torch before 2.9
        assert sums == [True, True, False]
        assert (autocast, dtype) == (False, torch.float32)


def test_a_router_that_is_called_by_itself_multiplies_in_float32() -> None:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    router = fit_router(rows, 3)
    expected = router.assign(rows)
    for set_ in (SETTINGS["precision"], lambda: product_setting("the new precision")):
        with set_(), Products() as products:
            assert torch.equal(router.assign(rows), expected)
        (precision, tf32, *_) = products.seen["addmm"]
        assert (precision, tf32) == ("highest", False)


@pytest.mark.parametrize("name", ON_GPUS[2:4])
def test_both_halves_of_a_setting_come_back(name: str) -> None:
    matmul, split_k = torch.backends.cuda.matmul, f"{name}_split_k"
    if not hasattr(matmul, split_k):
        pytest.skip("this version of torch has one half")
    setattr(matmul, name, (False, False))
    try:
        with torch_defaults():
            assert (getattr(matmul, name), getattr(matmul, split_k)) == (True, True)
        assert (getattr(matmul, name), getattr(matmul, split_k)) == (False, False)
    finally:
        setattr(matmul, name, True)


def test_the_settings_hold_in_threads_that_a_function_starts() -> None:
    @with_torch_defaults
    def in_a_thread() -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(
                lambda: (products_set()[:3], torch.empty(1).dtype, torch.is_autocast_enabled("cpu"))
            ).result()

    with SETTINGS["precision"](), SETTINGS["default dtype"](), SETTINGS["autocast"]():
        assert in_a_thread() == (["highest", False, "ieee"], torch.float32, False)


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
