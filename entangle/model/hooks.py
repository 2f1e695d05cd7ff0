"""Run a model while listening to its linear layers, or while changing what they say."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from entangle.model.layers import LinearLayer, decoder_of
from entangle.model.placing import is_whole

OnRows = Callable[[LinearLayer, torch.Tensor], None]
Change = Callable[[LinearLayer, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class CountedTokens:
    """Which tokens of a batch count: neither padding nor the first ones that are left out."""

    size: int  # tokens of the batch
    counted: int
    padding: int
    keep: torch.Tensor | None  # (size,) bool; None keeps all

    @property
    def places(self) -> torch.Tensor:
        """Which of the batch's tokens they are (tokens,) int64, on the CPU."""
        keep = torch.ones(self.size, dtype=torch.bool) if self.keep is None else self.keep.cpu()
        return keep.nonzero().flatten()

    def rows(self, layer: LinearLayer, values: torch.Tensor) -> torch.Tensor:
        """Return the counted rows (tokens, channels) of a layer's inputs or outputs.

        Raises:
            RuntimeError: the layer has not one row for each token of the batch.
        """
        rows = values.detach().reshape(-1, values.shape[-1])
        if len(rows) != self.size:
            raise RuntimeError(
                f"{layer.name} has {len(rows)} rows for a batch of {self.size} tokens: its rows "
                "are no tokens, leave it out with a narrower pattern"
            )
        return rows if self.keep is None else rows[self.keep.to(rows.device)]


def counted_tokens(
    module: nn.Module, args: Any, kwargs: Mapping[str, Any], skip_first: int
) -> CountedTokens:
    """Read from the arguments that a model is called with which of its tokens count.

    Raises:
        ValueError: the arguments do not say which tokens there are, or which are padding.
    """
    arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        raise ValueError("the model was called without input_ids and without inputs_embeds")
    windows, length = inputs.shape[:2]
    cache = arguments.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    mask = arguments.get("attention_mask")
    real, position = _real_tokens(mask, windows, length, past, inputs.device)
    keep = real & (position >= skip_first)
    size, counted = windows * length, int(keep.sum())
    padding = size - int(real.sum())
    return CountedTokens(size, counted, padding, None if counted == size else keep.flatten())


class Listener:
    """What has been heard so far: batches, and tokens counted and left out."""

    def __init__(self, layers: Sequence[LinearLayer], skip_first: int) -> None:
        self.layers = list(layers)
        self.skip_first = skip_first
        self.batches = 0
        self.tokens = 0
        self.padding = 0
        self.skipped = 0
        self.fired = dict.fromkeys((layer.name for layer in layers), 0)
        self.running: nn.Module | None = None  # whose forward pass has begun and not ended
        self._batch: CountedTokens | None = None

    def check(self) -> None:
        """See that every layer fired once a batch, and that the last one came to its end.

        Raises:
            RuntimeError: if not.
        """
        if self.running is not None:
            raise RuntimeError(
                "a forward pass did not come to its end, so its layers have counted different "
                "tokens: leave this recorder and record again"
            )
        check_fired(self.fired, self.batches)

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Take up a batch: read from the module's arguments which of its tokens count.

        Raises:
            ValueError: the arguments do not say which tokens there are, or which are padding.
        """
        if self.running is not None:
            if module is not self.running:
                return  # a part of the model within the whole: the same batch
            self.check()
        self._batch = counted_tokens(module, args, kwargs, self.skip_first)
        self.batches += 1
        self.tokens += self._batch.counted
        self.skipped += self._batch.size - self._batch.padding - self._batch.counted
        self.padding += self._batch.padding
        self.running = module

    def end(self, module: nn.Module) -> None:
        """Note that the batch has come to its end, unless ``module`` is but a part of the model."""
        if module is self.running:
            self.running = None

    def rows(self, layer: LinearLayer, values: torch.Tensor) -> torch.Tensor:
        """Return the counted rows (tokens, neurons) of a layer's values for this batch.

        Raises:
            RuntimeError: the layer has not one row for each token of the batch.
        """
        if self.running is None or self._batch is None:
            raise RuntimeError(f"{layer.name} ran outside a forward pass of its model")
        rows = self._batch.rows(layer, values)
        self.fired[layer.name] += 1
        return rows


def check_fired(fired: Mapping[str, int], batches: int) -> None:
    """See that each layer, by its name, ran once in each batch.

    Raises:
        RuntimeError: if not.
    """
    wrong = [name for name, count in fired.items() if count != batches]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(fired)} selected layers did not run once in each of {batches} "
            f"batches, first {wrong[0]} ({fired[wrong[0]]} times): leave them out with a narrower "
            "pattern"
        )


def _real_tokens(
    mask: Any, windows: int, length: int, past: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens are no padding, and their positions among those of their window.

    ``past`` is how many tokens of each window a cache holds.

    Raises:
        ValueError: a mask that is not one number a token.
    """
    if mask is None:
        real = torch.ones(windows, length, dtype=torch.bool, device=device)
        return real, torch.arange(past, past + length, device=device).expand(windows, length)
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    if shape != (windows, past + length):
        raise ValueError(
            f"expected an attention_mask of shape ({windows}, {past + length}), got {shape}: only "
            "with that can padding be told from tokens"
        )
    real = mask != 0
    position = real.cumsum(dim=1) - 1
    return real[:, past:], position[:, past:]


@contextmanager
def listening(
    model: PreTrainedModel,
    layers: Sequence[LinearLayer],
    on_outputs: OnRows,
    *,
    skip_first: int = 0,
) -> Iterator[Listener]:
    """Call ``on_outputs`` with each layer's counted output rows while the model runs.

    Rows of padding (by the model's ``attention_mask``) and of the first ``skip_first`` tokens of
    each window are left out. The hooks are gone after every exit.

    Raises:
        RuntimeError: at the end, a layer did not run once in each batch.
        ValueError: the model is compiled or not loaded, or ``skip_first`` is negative.
    """
    check_hooks(model, skip_first)
    listener = Listener(layers, skip_first)

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        listener.begin(module, args, kwargs)

    def end(module: nn.Module, *_: Any) -> None:
        listener.end(module)

    def hook_of(layer: LinearLayer) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            on_outputs(layer, listener.rows(layer, output))

        return hook

    handles = []
    try:
        for module in _entrances(model):
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(end))
        for layer in layers:
            handles.append(layer.module.register_forward_hook(hook_of(layer)))
        yield listener
    finally:
        for handle in handles:
            handle.remove()
    listener.check()


@contextmanager
def intervening(layers: Sequence[LinearLayer], change: Change) -> Iterator[dict[str, int]]:
    """Give each layer the outputs that ``change`` makes of its inputs and outputs.

    Both are as the model has them (..., inputs) and (..., neurons), with padding. Yields how often
    each layer, by its name, has run. The hooks are gone after every exit.
    """
    fired = dict.fromkeys((layer.name for layer in layers), 0)

    def hook_of(layer: LinearLayer) -> Callable[..., torch.Tensor]:
        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: torch.Tensor
        ) -> torch.Tensor:
            fired[layer.name] += 1
            return change(layer, args[0] if args else next(iter(kwargs.values())), outputs)

        return hook

    handles = []
    try:
        for layer in layers:
            handles.append(layer.module.register_forward_hook(hook_of(layer), with_kwargs=True))
        yield fired
    finally:
        for handle in handles:
            handle.remove()


def check_hooks(model: PreTrainedModel, skip_first: int) -> None:
    """See that hooks will run on a model.

    Raises:
        ValueError: the model is compiled or not loaded, or ``skip_first`` is negative.
    """
    if skip_first < 0:
        raise ValueError(f"skip_first must not be negative, got {skip_first}")
    if any(_is_compiled(module) for module in model.modules()):
        raise ValueError(
            "a model that torch.compile has changed, or a part of it, does not run hooks: "
            "pass the model as it was before"
        )
    if not is_whole(model):
        raise ValueError("some weights are not loaded: load the whole model first")


def _is_compiled(module: nn.Module) -> bool:
    """Tell the three ways: `torch.compile(module)`, `module.compile()`, a compiled `forward`."""
    return (
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def _entrances(model: PreTrainedModel) -> set[nn.Module]:
    """Return the modules at which a forward pass may begin: OPT, for one, skips its backbone."""
    return {model, backbone_of(model), decoder_of(model)}


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """Return the model without its output embedding: all that measuring needs to run."""
    backbone: nn.Module = model.base_model
    return backbone
