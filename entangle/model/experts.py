"""Layers of sparse experts, and the packed form of sparse weights.

An expert is a pruned copy of a layer's weights; a router sends each token to one expert. A packed
expert is stored as one bit per weight and the values that are not zero: on disk the experts take
about density x experts times the space of the dense layer. Packing and unpacking keep every bit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from entangle.numerics.device_weights import DeviceDense, DeviceSliced, moved, multiply_few
from entangle.numerics.processors import kernels_of
from entangle.numerics.routing import CentroidRouter, Router, Routes
from entangle.numerics.sparse import PACKABLE, Sliced, slice_rows


class Mixture(nn.Module):
    """A linear layer whose router gives each token the weights of one expert.

    Layers that receive the same inputs share a router. The one that owns it routes the inputs, and
    the others use its routes. On a GPU with Triton nothing is copied to the host, so a CUDA graph
    can record the layers.
    """

    in_features: int
    out_features: int
    router: Router | None  # None: one expert gets all tokens
    owns_router: bool
    bias: nn.Parameter | None  # (neurons,), shared by all experts

    def one_token(self, inputs: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., neurons) of the inputs (..., inputs) of a single token.

        The router reads ``read``.
        """
        raise NotImplementedError

    def many_tokens(self, rows: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Return the outputs (tokens, neurons) of rows (tokens, inputs), for any number but one."""
        raise NotImplementedError

    def on_device(self, inputs: torch.Tensor) -> DeviceSliced | DeviceDense | None:
        """Return the weights of a GPU whose kernels take these inputs, or None."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the text that `print` shows for the module, as in `nn.Linear`."""
        return (
            f"experts={self.router.experts if self.router else 1}, "
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    def forward(self, inputs: torch.Tensor, routed_by: torch.Tensor | None = None) -> torch.Tensor:
        """Return the outputs (..., neurons) of inputs (..., inputs).

        The router reads ``routed_by`` of the same shape, if it is given, and else the inputs.

        Raises:
            ValueError: the inputs have another width than the weights.
        """
        width, router = inputs.shape[-1], self.router
        read = inputs if routed_by is None else routed_by
        if width != self.in_features:  # the kernels do not check it
            raise ValueError(f"expected {self.in_features} inputs, got {width}")
        weights = self.on_device(inputs)
        if weights is not None:
            return self._products(weights, inputs, read)
        if inputs.numel() == width:
            return self.one_token(inputs, read)
        rows = inputs.reshape(-1, width)
        shape = (*inputs.shape[:-1], self.out_features)
        if router is None:
            chosen = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
            return self.many_tokens(rows, Routes(chosen, 1)).view(shape)
        return self.many_tokens(rows, self._routes(read, router)).view(shape)

    def _products(
        self, weights: DeviceSliced | DeviceDense, inputs: torch.Tensor, read: torch.Tensor
    ) -> torch.Tensor:
        """Return the outputs (..., neurons) without a copy to the host; they have no gradient.

        Raises:
            ValueError: the inputs are on another device, or the kernels do not take their dtype.
        """
        if inputs.device != weights.device or inputs.dtype not in PACKABLE:
            raise ValueError(
                f"expected inputs on {weights.device} in float32, bfloat16 or float16, got "
                f"{inputs.dtype} on {inputs.device}"
            )
        rows = inputs.detach().reshape(-1, self.in_features).contiguous()
        router, bias = self.router, None if self.bias is None else self.bias.detach().contiguous()
        shape = (*inputs.shape[:-1], self.out_features)
        routes: Routes | None = self._kept(read, Routes)
        fused = read is inputs and isinstance(router, CentroidRouter)
        if routes is None and len(rows) == 1 and fused:
            assert isinstance(router, CentroidRouter)
            # The kernel of the product also routes, and writes the expert into the routes.
            routes = Routes(torch.empty(1, dtype=torch.int64, device=rows.device), router.experts)
            tensors = router.matrix.detach().contiguous(), router.bias.detach().contiguous()
            outputs = multiply_few(weights, rows, routes.chosen, bias, tensors)
            self._keep(read, routes)
            return outputs.view(shape)
        if router is not None:
            routes = self._routes(read, router)
        if weights.is_faster(len(rows)):
            chosen = None if routes is None else routes.chosen
            return multiply_few(weights, rows, chosen, bias).view(shape)
        return weights.many(rows, routes, bias).view(shape)

    def _routes(self, inputs: torch.Tensor, router: Router) -> Routes:
        """Return the routes that the owner of the router has kept for the same inputs, or new ones."""
        routes: Routes | None = self._kept(inputs, Routes)
        if routes is None:
            routes = router(inputs)
            self._keep(inputs, routes)
        return routes

    def _kept(self, inputs: torch.Tensor, kind: type) -> Any:
        """Return what the owner of the router has kept for the same inputs, or None.

        The kind is int for one token's expert on the host, else Routes.
        """
        if self.owns_router or self.router is None:
            return None
        found = self.router.kept(inputs)
        return found if isinstance(found, kind) else None

    def _keep(self, inputs: torch.Tensor, found: Routes | int) -> None:
        if self.owns_router and self.router is not None:
            self.router.keep(inputs, found)


class ExpertLinear(Mixture):
    """A mixture that stores all weights, including zeros.

    ``counts`` are the numbers of tokens of the calibration text that each expert got.
    ``owns_router`` is False for all but one of the layers that share a router.
    """

    router: Router

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        router: Router,
        counts: Sequence[int],
        *,
        owns_router: bool = True,
    ) -> None:
        """Make the layer from a weight (experts, neurons, inputs) and a shared bias (neurons,).

        Raises:
            ValueError: the numbers of experts of the weight, the router and ``counts`` differ, or
                the weight and the router have different numbers of inputs.
        """
        super().__init__()
        if not len(weight) == router.experts == len(counts):
            raise ValueError(
                f"expected a weight and a count for each of the router's {router.experts} experts, "
                f"got {len(weight)} weights and {len(counts)} counts"
            )
        if weight.shape[2] != router.inputs:
            raise ValueError(
                f"expected a router of {weight.shape[2]} inputs, got one of {router.inputs}"
            )
        self.out_features, self.in_features = weight.shape[1:]
        self.weight = _constant(weight)
        self.bias = None if bias is None else _constant(bias)
        self.router, self.owns_router = router, owns_router
        self.counts = [int(count) for count in counts]

    def on_device(self, inputs: torch.Tensor) -> DeviceDense | None:
        """Return the weights if Triton's kernels take these inputs; they have no gradient."""
        device, kind, weight = inputs.device, inputs.dtype, self.weight
        if kernels_of(device) != "triton" or kind != weight.dtype or kind not in PACKABLE:
            return None
        learns = inputs.requires_grad or any(
            x.requires_grad for x in self.parameters(recurse=False)
        )
        if (learns and torch.is_grad_enabled()) or torch.is_autocast_enabled(device.type):
            return None
        return DeviceDense(weight.detach().contiguous())

    def one_token(self, inputs: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., neurons) of the inputs (..., inputs) of a single token."""
        expert: int | None = self._kept(read, int)
        if expert is None:
            expert = self.router.one(read)
            self._keep(read, expert)
        return self._product(inputs, expert)

    def many_tokens(self, rows: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Return the outputs (tokens, neurons) of rows (tokens, inputs)."""
        spans = routes.spans
        if len(spans) < 2:
            return self._product(rows, spans[0][0] if spans else 0)
        weights = self.weight.unbind()  # at once: autograd makes one gradient of all experts
        outputs = torch.cat(
            [
                functional.linear(rows[routes.order[first:last]], weights[expert], self.bias)
                for expert, first, last in spans
            ]
        )
        return torch.empty_like(outputs).index_copy_(0, routes.order, outputs)

    def _product(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        return functional.linear(rows, self.weight[expert], self.bias)


class PackedLinear(Mixture):
    """A mixture, or one pruned layer, stored without zeros, to run only.

    A few tokens are multiplied by the packed weights. For more tokens, an expert is unpacked if that
    is faster.
    """

    sliced: Sliced | DeviceSliced

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        router: Router | None,
        *,
        owns_router: bool = True,
    ) -> None:
        """Pack a weight (experts, neurons, inputs).

        Raises:
            ValueError: the weight's dtype cannot be packed (see `slice_rows`).
        """
        super().__init__()
        _, self.out_features, self.in_features = weight.shape
        self.sliced = moved(slice_rows(weight), weight.device)
        self.bias = None if bias is None else _constant(bias)
        self.router, self.owns_router = router, owns_router

    @property
    def weight(self) -> torch.Tensor:
        """The weight with its zeros, unpacked at each access, for models that read it directly."""
        sliced, experts = self.sliced, 1 if self.router is None else self.router.experts
        if isinstance(sliced, DeviceSliced):
            weight = sliced.dense(0, experts)
        else:
            weight = torch.stack([sliced.dense(expert) for expert in range(experts)])
        return weight[0] if self.router is None else weight

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move the packed weights as modules move their parameters; their dtype stays."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.sliced = moved(self.sliced, fn(torch.empty(0)).device)
        return self

    def _save_to_state_dict(self, *_: object) -> None:
        raise ValueError(
            "the model's layers are packed, and a packed model can only run: load it with "
            "packed=False to save it or to read its state_dict"
        )

    def on_device(self, inputs: torch.Tensor) -> DeviceSliced | None:
        """Return the packed weights if they are on a GPU."""
        return self.sliced if isinstance(self.sliced, DeviceSliced) else None

    def one_token(self, inputs: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., neurons) of the inputs (..., inputs) of a single token."""
        assert isinstance(self.sliced, Sliced)
        router, expert = self.router, self._kept(read, int)
        fused = read is inputs and isinstance(router, CentroidRouter)
        if router is None:
            expert = 0
        elif expert is None and not fused:
            expert = router.one(read)
        # If the expert is None, the kernel also chooses it, with the router's arrays.
        arrays = router.arrays if isinstance(router, CentroidRouter) else ()
        outputs, expert = self.sliced.one(inputs, expert, *arrays)
        self._keep(read, expert)
        return self._finished(outputs, inputs.dtype)

    def many_tokens(self, rows: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Return the outputs (tokens, neurons) of rows (tokens, inputs)."""
        assert isinstance(self.sliced, Sliced)
        sliced, spans = self.sliced, routes.spans
        few = [(e, first, last) for e, first, last in spans if sliced.is_faster(last - first, e)]
        if len(spans) == 1 and not few:
            return self._unpacked(rows, sliced.dense(spans[0][0]))
        outputs = self._finished(sliced.products(rows, routes.order, few), rows.dtype)
        for expert, first, last in spans:
            if (expert, first, last) not in few:
                part = routes.order[first:last]
                outputs[part] = self._unpacked(rows[part], sliced.dense(expert))
        return outputs

    def _unpacked(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, weight.to(rows.dtype), self.bias)

    def _finished(self, outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.bias is not None:
            outputs += self.bias
        return outputs if outputs.dtype == dtype else outputs.to(dtype)


def _constant(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Packed weights: a mask, and the values of the weights that are not zero."""

    mask: torch.Tensor  # (bytes,) uint8: one bit per weight, 1 if its value is stored
    values: torch.Tensor  # (stored,) in the weights' dtype


def pack(weight: torch.Tensor) -> Packed:
    """Pack a weight of any shape."""
    weight = weight.detach().cpu().contiguous()
    stored = _bits(weight) != 0  # by bits, so that a negative zero is stored
    mask = np.packbits(stored.flatten().numpy())
    return Packed(torch.from_numpy(mask), weight[stored])


def unpack(packed: Packed, shape: Sequence[int]) -> torch.Tensor:
    """Return the weight (``shape``) that was packed.

    Raises:
        ValueError: the mask or the values do not fit the shape.
    """
    size = int(np.prod(shape))
    bits = np.unpackbits(packed.mask.numpy())
    stored = torch.from_numpy(bits[:size]).bool()
    if len(packed.mask) != -(-size // 8) or int(stored.sum()) != len(packed.values):
        raise ValueError(
            f"{len(packed.values)} values and a mask of {len(packed.mask)} bytes do not fit a "
            f"weight of {' x '.join(map(str, shape))}"
        )
    weight = torch.zeros(size, dtype=packed.values.dtype)
    weight[stored] = packed.values
    return weight.view(tuple(shape))


def packed_bytes(weight: torch.Tensor) -> int:
    """Return the size in bytes of a weight after `pack`."""
    return -(-weight.numel() // 8) + int((_bits(weight) != 0).sum()) * weight.element_size()


def _bits(weight: torch.Tensor) -> torch.Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return weight.detach().contiguous().view(kinds[weight.element_size()])
