"""Trained experts, run one after the other, so that each of their matrices is heard as a layer is.

While experts are heard the module around them runs as its own code has it, without a kernel for all
experts together (the experts implementation ``eager`` of transformers). A torch function mode
watches it. A product of rows with a view of a fused parameter says which expert's matrix it is, with
its inputs and outputs, whatever the layout: the view's address, shape and strides are those of the
matrix. A gather of rows of the hidden states says which tokens these rows are. Where all experts
multiply all tokens in one product, an expert's tokens are those with an input that is not zero.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from entangle.model.fused import FusedMatrix

_WITH_BIAS = ("addmm", "baddbmm")  # their first argument is added to the product of the others
_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm", *_WITH_BIAS)
_GATHERS = ("__getitem__", "index_select")
_SUMS = ("add", "add_", "__add__", "__iadd__")
_Stack = tuple[nn.Module, str]  # the owner and the parameter of all experts' matrices
_Place = tuple[nn.Module, str, int]  # of a matrix: the owner, the parameter and the expert
_View = tuple[int, torch.Size, tuple[int, ...]]  # address, shape and strides
_Rows = ReferenceType[torch.Tensor]
_UNWATCHED = "unwatched"  # attribute of a forward that hears experts: the forward before
_IMPLEMENTATION = "_experts_implementation_internal"  # of transformers' configurations


@contextmanager
def heard(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Call those of the modules that are experts' matrices, as layers are called, in the body.

    Their hooks run once for each forward pass of the experts, with the rows that the expert had: none
    for an expert that no token was sent to. A hook may replace the outputs. The model's own
    implementation is put back on every exit.
    """
    scopes: dict[nn.Module, list[FusedMatrix]] = {}
    for module in dict.fromkeys(modules):  # once, though both of its sides may be heard
        if isinstance(module, FusedMatrix):
            scopes.setdefault(module.scope, []).append(module)
    with ExitStack() as stack:
        for scope, matrices in scopes.items():
            for owner in {matrix.owner: None for matrix in matrices}:
                stack.enter_context(_run_eagerly(owner))
            stack.enter_context(_watched(scope, matrices))
        yield


def unheard_forward(module: nn.Module) -> Any:
    """Return a module's own forward (one set by accelerate, or None), without what hears experts."""
    forward = vars(module).get("forward")
    while hasattr(forward, _UNWATCHED):
        forward = getattr(forward, _UNWATCHED)
    return forward


@contextmanager
def _run_eagerly(owner: nn.Module) -> Iterator[None]:
    config = getattr(owner, "config", None)
    before = vars(config).get(_IMPLEMENTATION) if config is not None else None
    if before is None:
        yield
        return
    try:
        setattr(config, _IMPLEMENTATION, "eager")
        yield
    finally:
        setattr(config, _IMPLEMENTATION, before)


@contextmanager
def _watched(scope: nn.Module, matrices: Sequence[FusedMatrix]) -> Iterator[None]:
    """Watch the forward passes of a module for products with these matrices."""
    forward = scope.forward
    own = vars(scope).get("forward")  # accelerate may have set one

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Watch(matrices) as watch:
            output = forward(*args, **kwargs)
        watch.finish()
        return output

    vars(watched)[_UNWATCHED] = forward
    try:
        scope.forward = watched
        yield
    finally:
        del scope.forward
        if own is not None:
            scope.forward = own


class _Watch(TorchFunctionMode):
    """One forward pass of the experts of a block."""

    def __init__(self, wanted: Sequence[FusedMatrix]) -> None:
        super().__init__()
        self._wanted: dict[_Place, list[FusedMatrix]] = {}
        for matrix in wanted:
            self._wanted.setdefault(_place(matrix), []).append(matrix)
        # All matrices of the scope, since another one may tell which tokens an expert has. Their
        # views are found when they are used: weights in files are read only then.
        self._unseen: dict[_Stack, list[FusedMatrix]] = {}
        for matrix in wanted[0].among:
            self._unseen.setdefault((matrix.owner, matrix.parameter), []).append(matrix)
        self._matrices: dict[_View, FusedMatrix] = {}
        self._stacks: dict[_View, list[FusedMatrix]] = {}
        # Which tokens rows are, by the id of the rows, and which an expert has; with the number of
        # the batch's tokens.
        self._gathered: dict[int, tuple[_Rows, torch.Tensor, int]] = {}
        self._tokens: dict[int, tuple[torch.Tensor, int]] = {}
        self._without_bias: dict[int, tuple[torch.Tensor, torch.Tensor, FusedMatrix]] = {}
        self._done: set[_Place] = set()  # were heard, or cannot be: their tokens are not told
        self._like: dict[_Stack, torch.Tensor] = {}  # an empty tensor like the outputs

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if len(args) < 2:  # a call by keywords alone tells nothing
            return result
        if name in _PRODUCTS:
            return self._product(name, args, kwargs or {}, result)
        if name in _GATHERS:
            self._gather(args, result)
        elif name == "split":
            self._split(args, result)
        elif name in _SUMS and self._without_bias:
            return self._sum(args[0], args[1], result)
        return result

    def _gather(self, args: tuple[Any, ...], result: Any) -> None:
        """Note which tokens rows are that are gathered from (tokens, width), or from such rows."""
        source, *dim, index = args
        if not isinstance(index, torch.Tensor) or index.dtype != torch.int64 or index.ndim != 1:
            return
        if source.ndim == 2 and source.is_floating_point() and dim in ([], [0]):
            tokens, batch = self._tokens_of(source) or (None, len(source))
            own = index if tokens is None else tokens[index]
            self._gathered[id(result)] = ref(result), own, batch

    def _split(self, args: tuple[Any, ...], parts: Any) -> None:
        """Note which tokens the parts are of rows that are split (not of columns)."""
        told = self._tokens_of(args[0])
        if told is not None and sum(map(len, parts)) == len(args[0]):
            tokens, batch = told
            for part, own in zip(parts, tokens.split([*map(len, parts)]), strict=True):
                self._gathered[id(part)] = ref(part), own, batch

    def _tokens_of(self, rows: torch.Tensor) -> tuple[torch.Tensor, int] | None:
        """Return which tokens gathered rows are, and the number of tokens; None for other rows."""
        held, tokens, batch = self._gathered.get(id(rows), (None, rows, 0))
        return None if held is None or held() is not rows else (tokens, batch)

    def _product(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> Any:
        factors = args[1:3] if name in _WITH_BIAS else args[:2]
        if len(factors) < 2 or not isinstance(factors[1], torch.Tensor) or factors[1].ndim < 2:
            return result
        inputs, weight = factors
        weight = weight if name == "linear" else weight.mT  # (neurons, inputs)
        self._see()
        view = _view(weight)
        if view in self._stacks:
            return self._all_at_once(self._stacks[view], inputs, result)
        matrix = self._matrices.get(view)
        if matrix is None:
            return result
        if inputs.ndim != 2:
            self._done.add(_place(matrix))
            return result
        told = self._tokens_of(inputs)
        if told is not None:
            self._tokens[matrix.expert] = told
        added = name in _WITH_BIAS or len(args) > 2 or kwargs.get("bias") is not None
        if matrix.bias is None or added:
            return self._hear(matrix, inputs, result)
        self._without_bias[id(result)] = result, inputs, matrix
        return result

    def _see(self) -> None:
        """Note where the matrices are whose parameters are in memory."""
        for place, matrices in list(self._unseen.items()):
            stack = matrices[0].stack
            if not stack.is_meta:
                del self._unseen[place]
                self._stacks[_view(stack)] = matrices
                self._matrices |= zip(map(_view, stack), matrices, strict=True)

    def _sum(self, one: Any, other: Any, result: Any) -> Any:
        """Hear a product when its bias is added."""
        for product, bias in ((one, other), (other, one)):
            waiting = self._without_bias.get(id(product))
            if waiting is None or not isinstance(bias, torch.Tensor):
                continue
            _, inputs, matrix = waiting
            if matrix.bias is not None and _view(bias) == _view(matrix.bias):
                del self._without_bias[id(product)]
                return self._hear(matrix, inputs, result)
        return result

    def _hear(self, matrix: FusedMatrix, inputs: torch.Tensor, outputs: torch.Tensor) -> Any:
        """Call a matrix with the rows of its expert, if it is told which tokens they are."""
        tokens, batch = self._tokens.get(matrix.expert, (None, 0))
        self._done.add(_place(matrix))
        if tokens is not None and len(tokens) == len(inputs):
            self._like[matrix.owner, matrix.parameter] = outputs.new_empty(0)
            for wanted in self._wanted.get(_place(matrix), ()):
                wanted.tokens, wanted.batch = tokens, batch
                outputs = wanted(inputs, outputs)
        return outputs

    def _all_at_once(
        self, matrices: Sequence[FusedMatrix], inputs: torch.Tensor, outputs: torch.Tensor
    ) -> torch.Tensor:
        """Hear a product of all tokens with all experts' matrices, if inputs are those of each expert.

        They are (experts, tokens, inputs). A product of other inputs does not tell an expert's tokens.
        """
        self._done |= {*map(_place, matrices)}
        if inputs.ndim != 3 or len(inputs) != len(matrices):
            return outputs
        for matrix, rows, products in zip(matrices, inputs, outputs, strict=True):
            if matrix.expert not in self._tokens:
                self._tokens[matrix.expert] = rows.any(dim=1).nonzero().flatten(), len(rows)
            if matrix.bias is not None or _place(matrix) not in self._wanted:
                continue  # a bias would come later: such a model is not known
            tokens, _ = self._tokens[matrix.expert]
            before = products[tokens]
            after = self._hear(matrix, rows[tokens], before)
            if after is not before:
                products[tokens] = after
        return outputs

    def finish(self) -> None:
        """Call the matrices of experts that no token was sent to, with no rows.

        These are the experts without a product, if another expert's matrix of the same parameter was
        heard: wanted or not. Without one, and after a product whose tokens are not told, the
        matrices are not heard.
        """
        batch = max((batch for _, batch in self._tokens.values()), default=0)
        self._done |= {_place(matrix) for *_, matrix in self._without_bias.values()}
        for place, wanted in self._wanted.items():
            outputs = self._like.get(place[:2])
            if place in self._done or outputs is None:
                continue
            for one in wanted:
                neurons, inputs = one.weight.shape
                one.tokens = torch.zeros(0, dtype=torch.int64, device=outputs.device)
                one.batch = batch
                one(outputs.new_empty(0, inputs), outputs.new_empty(0, neurons))


def _place(matrix: FusedMatrix) -> _Place:
    return matrix.owner, matrix.parameter, matrix.expert


def _view(view: torch.Tensor) -> _View:
    return view.data_ptr(), view.shape, view.stride()
