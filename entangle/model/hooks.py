"""Forward hooks that record the outputs or inputs of a model's linear layers, or replace outputs."""

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from entangle.model.eager import heard, unheard_forward
from entangle.model.fused import FusedMatrix
from entangle.model.layers import LinearLayer, decoder_of
from entangle.model.placing import input_device, is_whole
from entangle.model.sides import Recordable, inputs_among, layer_of, listen

OnRows = Callable[[LinearLayer, torch.Tensor], None]
OnRecorded = Callable[[Recordable, torch.Tensor, torch.Tensor | None], None]
Change = Callable[[LinearLayer, torch.Tensor, torch.Tensor], torch.Tensor]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclasses.dataclass(frozen=True, eq=False)
class CountedTokens:
    """The tokens of a batch that count: all but padding and the skipped first ones."""

    size: int  # tokens of the batch
    counted: int
    padding: int
    index: torch.Tensor | None  # (counted,) int64: their places in the batch; None counts all
    # By device, so that each gets one copy of a batch's.
    _copies: dict[torch.device, torch.Tensor] = dataclasses.field(default_factory=dict)
    _orders: dict[torch.device, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def places(self) -> torch.Tensor:
        """The indices in the batch of the counted tokens, (tokens,) int64, on the CPU."""
        return torch.arange(self.size) if self.index is None else self.index.cpu()

    def rows(self, layer: Recordable, values: torch.Tensor) -> torch.Tensor:
        """Return the counted rows (tokens, channels) of a layer's inputs or outputs.

        Raises:
            RuntimeError: the layer does not have one row for each token of the batch.
        """
        rows, places = self.rows_and_places(layer, values)
        return rows if places is None else rows.index_select(0, places)

    def rows_and_places(
        self, layer: Recordable, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return all rows (size, channels) without a copy, and the places of those that count.

        The places are `index` on the device of the rows; each device gets one copy of a batch's.
        A trained expert has a row for each token that was sent to it.

        Raises:
            RuntimeError: the layer does not have one row for each token of the batch.
        """
        rows = values.detach().reshape(-1, values.shape[-1])
        tokens = tokens_of(layer, self.size)
        if tokens is not None:
            where = None if self.index is None else self._order(rows.device)[tokens] >= 0
            return rows, None if where is None else where.nonzero().flatten()
        if len(rows) != self.size:
            raise RuntimeError(
                f"{layer.name} has {len(rows)} rows for a batch of {self.size} tokens, so its rows "
                "are not tokens: leave the layer out with exclude"
            )
        if self.index is None:
            return rows, None
        if rows.device not in self._copies:
            self._copies[rows.device] = self.index.to(rows.device)
        return rows, self._copies[rows.device]

    def of_layer(self, layer: Recordable) -> torch.Tensor:
        """Return which of the counted tokens (rows,) int64 a layer's counted rows are, on the CPU."""
        tokens = tokens_of(layer, self.size)
        if tokens is None:
            return torch.arange(self.counted)
        which = self._order(tokens.device)[tokens].cpu()
        return which[which >= 0]

    def _order(self, device: torch.device) -> torch.Tensor:
        """Return the place of each token (size,) among those that count; -1 for the others."""
        if device not in self._orders:
            order = torch.full((self.size,), -1, device=device)
            places = slice(None) if self.index is None else self.index.to(device)
            order[places] = torch.arange(self.counted, device=device)
            self._orders[device] = order
        return self._orders[device]


def tokens_of(layer: Recordable, batch: int) -> torch.Tensor | None:
    """Return which tokens (rows,) of a batch the present rows of a trained expert's matrix are.

    It is None for other layers, and if the experts' router had another number of tokens than
    ``batch``: its rows are then no tokens of the batch.
    """
    module = layer_of(layer).module
    return module.tokens if isinstance(module, FusedMatrix) and module.batch == batch else None


def counted_tokens(
    module: nn.Module, args: Any, kwargs: Mapping[str, Any], skip_first: int
) -> CountedTokens:
    """Return which tokens count, from the arguments of a forward pass of ``module``.

    Raises:
        ValueError: the arguments have no tokens, or the attention mask does not fit them.
    """
    (windows, length), past, mask, device = _tokens_of(module, args, kwargs)
    size = windows * length
    if mask is None and past >= skip_first:
        return CountedTokens(size, size, 0, None)
    real, position = _real_tokens(mask, windows, length, past, device)
    keep = (real & (position >= skip_first)).flatten()
    # A hook waits for its device only here, once in a batch. nonzero() would wait again.
    counted, present = torch.stack([keep.sum(), real.sum()]).tolist()
    index = None if counted == size else (~keep).int().argsort(stable=True)[:counted]
    return CountedTokens(size, counted, size - present, index)


def first_tokens(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return which tokens (windows, length) are the first of their window, padding left out.

    The arguments are those of a forward pass of ``module``. The host does not wait for the device.

    Raises:
        ValueError: the arguments have no tokens, or the attention mask does not fit them.
    """
    (windows, length), past, mask, device = _tokens_of(module, args, kwargs)
    real, position = _real_tokens(mask, windows, length, past, device)
    return real & (position == 0)


def _tokens_of(
    module: nn.Module, args: Any, kwargs: Mapping[str, Any]
) -> tuple[torch.Size, int, Any, torch.device]:
    """Return a forward pass's windows and their length, the tokens in the cache, mask and device.

    Raises:
        ValueError: the arguments have no tokens.
    """
    arguments = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    arguments |= arguments.pop("kwargs", {})
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        raise ValueError("the model was called without input_ids and without inputs_embeds")
    cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
    past = 0 if cache is None else int(cache.get_seq_length())
    if _holds_state(arguments.get("cache_params")):
        # A state has no length, and Mamba's mask is of the new tokens: one token came before at least.
        given = mask.shape[1] if isinstance(mask, torch.Tensor) else 0
        past = max(given - inputs.shape[1], 1)
        if isinstance(mask, torch.Tensor):
            mask = functional.pad(mask, (past + inputs.shape[1] - given, 0), value=1)
    return inputs.shape[:2], past, mask, inputs.device


def _holds_state(cache: Any) -> bool:
    """Return whether a recurrent model's cache (Mamba, xLSTM) has the state of earlier tokens."""
    if cache is None:
        return False
    if hasattr(cache, "seqlen_offset"):  # of xLSTM
        return bool(cache.seqlen_offset > 0)
    return bool(cache.has_previous_state())


class BatchCounter:
    """The state of a recording: the numbers of batches, and of counted, padding and skipped tokens."""

    def __init__(self, layers: Sequence[Recordable], skip_first: int) -> None:
        self.layers = list(layers)
        self.skip_first = skip_first
        self.batches = 0
        self.tokens = 0
        self.padding = 0
        self.skipped = 0
        self.fired = dict.fromkeys((layer.name for layer in layers), 0)
        self.running: nn.Module | None = None  # the module in its forward pass
        self._batch: CountedTokens | None = None

    def check(self) -> None:
        """Check that each layer ran once in each batch, and that the last forward pass ended.

        Raises:
            RuntimeError: a layer did not, or the forward pass was interrupted.
        """
        if self.running is not None:
            raise RuntimeError(
                "a forward pass did not run to its end, so the layers counted different tokens: "
                "begin a new recording"
            )
        check_fired(self.fired, self.batches)

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Begin a batch, and count its tokens from the arguments of the module.

        A call inside a forward pass that already runs belongs to the same batch.

        Raises:
            RuntimeError: an earlier batch is incomplete (see `check`).
            ValueError: the arguments have no tokens, or the attention mask does not fit them.
        """
        if self.running is not None:
            if module is not self.running:
                return  # a submodule inside the forward pass: the same batch
            self.check()
        self._batch = counted_tokens(module, args, kwargs, self.skip_first)
        self.batches += 1
        self.tokens += self._batch.counted
        self.skipped += self._batch.size - self._batch.padding - self._batch.counted
        self.padding += self._batch.padding
        self.running = module

    def end(self, module: nn.Module) -> None:
        """End the batch if ``module`` is the one that began it."""
        if module is self.running:
            self.running = None

    def of_layer(self, layer: Recordable) -> torch.Tensor:
        """Return which of all tokens counted so far a layer's present rows are, on the CPU."""
        assert self._batch is not None
        return self.tokens - self._batch.counted + self._batch.of_layer(layer)

    def rows_and_places(
        self, layer: Recordable, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return a layer's rows in this batch, and which count (see `CountedTokens`).

        Raises:
            RuntimeError: no forward pass runs, or the layer does not have one row for each token
                of the batch.
        """
        if self.running is None or self._batch is None:
            raise RuntimeError(
                f"{layer.name} ran outside a forward pass of its model: call only the model"
            )
        rows = self._batch.rows_and_places(layer, values)
        self.fired[layer.name] += 1
        return rows


def check_fired(fired: Mapping[str, int], batches: int) -> None:
    """Check that each layer ran once in each batch; ``fired`` counts its runs by its name.

    Raises:
        RuntimeError: a layer did not.
    """
    wrong = [name for name, count in fired.items() if count != batches]
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(fired)} selected layers did not run exactly once in each of "
            f"{batches} batches, for example {wrong[0]} ({fired[wrong[0]]} times): leave these "
            "layers out with exclude"
        )


def _real_tokens(
    mask: Any, windows: int, length: int, past: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which tokens are not padding, and each token's position in its window without padding.

    Both are (windows, length). ``past`` is the number of tokens of each window in the cache.

    Raises:
        ValueError: the mask is not of shape (windows, past + length).
    """
    if mask is None:
        real = torch.ones(windows, length, dtype=torch.bool, device=device)
        return real, torch.arange(past, past + length, device=device).expand(windows, length)
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
    if shape != (windows, past + length):
        raise ValueError(
            f"expected an attention_mask of shape ({windows}, {past + length}), got {shape}: the "
            "mask marks which tokens are padding"
        )
    real = mask != 0
    position = real.cumsum(dim=1) - 1
    return real[:, past:], position[:, past:]


@contextmanager
def recording_rows(
    model: PreTrainedModel,
    layers: Sequence[Recordable],
    on_rows: OnRecorded,
    *,
    skip_first: int = 0,
) -> Iterator[BatchCounter]:
    """Call ``on_rows(layer, rows, places)`` with each layer's outputs while the model runs.

    For `LayerInputs` they are the layer's inputs.
    ``rows`` (tokens, neurons) are all of a batch, and ``places`` (counted,) int64 the indices of
    those that count, or None if all do: padding (by the model's ``attention_mask``) and the first
    ``skip_first`` tokens of each window do not. The hooks are removed on every exit.

    Raises:
        RuntimeError: at the end, a layer did not run once in each batch, or the last forward pass
            was interrupted.
        ValueError: the model is compiled or not loaded, or ``skip_first`` is negative.
    """
    check_hooks(model, skip_first)
    counter = BatchCounter(layers, skip_first)

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        counter.begin(module, args, kwargs)

    def end(module: nn.Module, *_: Any) -> None:
        counter.end(module)

    def hear_of(layer: Recordable) -> Callable[[torch.Tensor], None]:
        return lambda values: on_rows(layer, *counter.rows_and_places(layer, values))

    handles = []
    try:
        for module in entry_modules(model):
            handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            handles.append(module.register_forward_hook(end))
        for layer in layers:
            handles.append(listen(layer, hear_of(layer)))
        with heard(layer_of(layer).module for layer in layers):
            yield counter
    finally:
        for handle in handles:
            handle.remove()
    counter.check()


@contextmanager
def replacing_outputs(layers: Sequence[LinearLayer], change: Change) -> Iterator[dict[str, int]]:
    """Replace each layer's outputs by ``change(layer, inputs, outputs)`` while the model runs.

    Inputs are (..., inputs) and outputs (..., neurons), as in the model, with padding. Yield the
    number of runs of each layer by its name. The hooks are removed on every exit.
    """
    fired = dict.fromkeys((layer.name for layer in layers), 0)

    def hook_of(layer: LinearLayer) -> Callable[..., torch.Tensor]:
        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: torch.Tensor
        ) -> torch.Tensor:
            fired[layer.name] += 1
            return change(layer, inputs_among(args, kwargs), outputs)

        return hook

    handles = []
    try:
        for layer in layers:
            handles.append(layer.module.register_forward_hook(hook_of(layer), with_kwargs=True))
        with heard(layer.module for layer in layers):
            yield fired
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def on_trial(model: PreTrainedModel) -> Iterator[None]:
    """Let a model run without its hooks, so that no recording counts it.

    At the end the modules' attributes and buffers, and the random numbers, are as before.
    """
    kept = [(module, dict(vars(module)), _buffers(module)) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            for module, *_ in kept:
                vars(module).update({name: OrderedDict() for name in _HOOKS})
                if "forward" in vars(module):
                    vars(module)["forward"] = unheard_forward(module)
                # transformers installs hooks of its own at the first pass that needs them.
                vars(module).pop("_output_capturing_hooks_installed", None)
            yield
        finally:
            for module, attributes, buffers in kept:
                vars(module).clear()
                vars(module).update(attributes)
                for name, (buffer, before) in buffers.items():
                    buffer.copy_(before)
                    module._buffers[name] = buffer


def _buffers(module: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return a module's buffers, each with a copy; those of a linear layer are its weights."""
    if hasattr(module, "in_features"):
        return {}
    own = module.named_buffers(recurse=False)
    return {name: (buffer, buffer.clone()) for name, buffer in own if not buffer.is_meta}


def unheard_layers(
    model: PreTrainedModel, layers: Sequence[Recordable], tokens: torch.Tensor
) -> dict[str, str]:
    """Run the model once on tokens (windows, length); return why layers cannot be heard, by name.

    A layer is heard if its module runs once in a forward pass and returns one row for each token;
    its inputs are heard if it receives one row for each token.
    Some models read a layer's weight without running the layer, and a mixture of experts sends only
    some of the tokens to a layer.
    """
    shapes: dict[str, list[Any]] = {layer.name: [] for layer in layers}
    handles: list[RemovableHandle] = []

    def hear_of(layer: Recordable) -> Callable[[Any], None]:
        def hear(values: Any) -> None:
            tensor = isinstance(values, torch.Tensor)
            shapes[layer.name].append(values.shape if tensor else type(values).__name__)

        return hear

    modules = [layer_of(layer).module for layer in layers]
    try:
        with on_trial(model), heard(modules), torch.inference_mode():
            for layer in layers:
                handles.append(listen(layer, hear_of(layer)))
            backbone_of(model)(input_ids=tokens.to(input_device(model)), use_cache=False)
    finally:
        for handle in handles:  # on_trial removes those of the model's modules only
            handle.remove()
    found = {layer.name: _deafness(layer, shapes[layer.name], tokens.numel()) for layer in layers}
    return {name: reason for name, reason in found.items() if reason}


def _deafness(layer: Recordable, shapes: Sequence[Any], tokens: int) -> str:
    """Return why a layer with these shapes, or types, heard cannot be used; empty if it can."""
    if len(shapes) != 1:
        if not shapes and isinstance(layer_of(layer).module, FusedMatrix):
            return "in a trial no product with it told which tokens its inputs are"
        if not shapes:
            return "the model did not run it in a trial"
        return f"the model ran it {len(shapes)} times in a trial, but a layer has to run once"
    (shape,) = shapes
    if isinstance(shape, str):
        return f"its {layer.side} is a {shape}, not a tensor"
    own = tokens_of(layer, tokens)
    tokens = tokens if own is None else len(own)
    if not shape or shape[-1] != layer.neurons or shape.numel() != tokens * layer.neurons:
        sizes = " x ".join(map(str, shape))
        return f"its {layer.side} has shape {sizes}, not one row for each token"
    return ""


def check_hooks(model: PreTrainedModel, skip_first: int) -> None:
    """Check that forward hooks will run on a model.

    Raises:
        ValueError: the model is compiled or not loaded, or ``skip_first`` is negative.
    """
    if skip_first < 0:
        raise ValueError(f"skip_first must not be negative, got {skip_first}")
    if any(_is_compiled(module) for module in model.modules()):
        raise ValueError(
            "the model or a part of it is compiled, and compiled modules do not run hooks: pass "
            "the model without torch.compile"
        )
    if not is_whole(model):
        raise ValueError("some weights of the model are not loaded: load the whole model first")


def _is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled.

    There are three ways: `torch.compile(module)`, `module.compile()` and a compiled `forward`.
    """
    return (
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )


def entry_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Return the modules at which a forward pass may begin.

    They are several because OPT, for example, calls its decoder and not its backbone.
    """
    return {model, backbone_of(model), decoder_of(model)}


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """Return the model without its output embedding, which measuring does not need."""
    backbone: nn.Module = model.base_model
    return backbone
