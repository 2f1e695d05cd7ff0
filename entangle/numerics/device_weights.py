"""Experts' weights on a GPU, without zeros or with them, and their products with tokens.

Nothing is copied to the host. The kernels are in `numerics/kernels/sparse_triton`.
"""

import dataclasses

import torch
from torch.nn import functional

from entangle.numerics.processors import Kernels, kernels_of
from entangle.numerics.routing import Routes
from entangle.numerics.sparse import Sliced, as_array

# The least share of zeros with which a layer is packed, by the kernels of its device. On the CPU it
# was measured. On a GPU it is assumed from the prototype in `DeviceSliced.is_faster`, which gained
# little or nothing at 50%, and a third at 70%.
LEAST_ZEROS: dict[Kernels, float] = {"numba": 0.5, "triton": 0.6}
_SCRATCH = 1 << 28  # bytes of dense weights that are unpacked at a time

RouterTensors = tuple[
    torch.Tensor, torch.Tensor
]  # the matrix (inputs, experts), the bias (experts,)


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceSliced:
    """Matrices (experts, neurons, inputs) in the slices of `Sliced`, as tensors on a GPU."""

    values: torch.Tensor  # (entries,) in the weight's own dtype
    columns: torch.Tensor  # (entries,) uint16, or uint32
    starts: torch.Tensor  # (experts, slices + 1) int64
    order: torch.Tensor  # (experts, slices * 8) int64
    neurons: int
    inputs: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the tensors in their order."""
        return self.values, self.columns, self.starts, self.order

    @property
    def nbytes(self) -> int:
        """Return the bytes in memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Return the GPU."""
        return self.values.device

    def is_faster(self, tokens: int) -> bool:
        """Return whether `multiply_few` is faster than `many`. This is assumed: no card was at hand.

        The unit is the time of a dense product of one token, which reads all weights. On an H100 in
        bfloat16, with weights beyond the cache, a prototype of `multiply_few` took 0.88, 0.62, 0.51 and 0.32
        at 50, 70, 80 and 90% of zeros (4096 x 4096; larger matrices about as much). So each token
        takes 0.15 + 1.6 · density. `many` reads the packed weights, 2 · density, writes the dense
        ones and reads them. It does so for all experts: only the device knows which have tokens.
        """
        experts = len(self.starts)
        density = len(self.values) / (experts * self.neurons * self.inputs)
        return tokens * (0.15 + 1.6 * density) < experts * (2 + 2 * density)

    def many(
        self, rows: torch.Tensor, routes: Routes | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the products (tokens, neurons) of rows (tokens, inputs) by unpacked weights.

        As many experts are unpacked at a time as fit into 256 MiB, but at least one. Without routes
        there is one expert.
        """
        from entangle.numerics.kernels import sparse_triton

        if routes is None:
            with torch.autocast(rows.device.type, enabled=False):  # as the kernels
                return functional.linear(rows, self.dense(0, 1)[0].to(rows.dtype), bias)
        out = rows.new_empty(len(rows), self.neurons)
        step = max(_SCRATCH // (self.neurons * self.inputs * self.dtype.itemsize), 1)
        for first in range(0, len(self.starts), step):
            weight = self.dense(first, first + step).to(rows.dtype)
            sparse_triton.multiply_groups(
                rows, routes.order, routes.offsets, weight, bias, out, first
            )
        return out

    def dense(self, first: int, end: int) -> torch.Tensor:
        """Return the weights (some, neurons, inputs) of the experts ``first`` to ``end - 1``."""
        from entangle.numerics.kernels import sparse_triton

        starts, order = self.starts[first:end], self.order[first:end]
        weight = self.values.new_empty(len(starts), self.neurons, self.inputs)
        sparse_triton.unpack(self.values, self.columns, starts, order, weight)
        return weight


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceDense:
    """Weights (experts, neurons, inputs) with all their zeros, on a GPU."""

    weight: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor]:
        """Return the weight."""
        return (self.weight,)

    @property
    def neurons(self) -> int:
        """Return the number of outputs."""
        return self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Return the GPU."""
        return self.weight.device

    def is_faster(self, tokens: int) -> bool:
        """Return whether `multiply_few` reads no more weights than `many`, which first sorts the tokens."""
        return tokens <= len(self.weight)

    def many(
        self, rows: torch.Tensor, routes: Routes | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the products (tokens, neurons) of rows (tokens, inputs), those of all experts at once."""
        from entangle.numerics.kernels import sparse_triton

        assert routes is not None  # experts with zeros have a router
        out = rows.new_empty(len(rows), self.neurons)
        sparse_triton.multiply_groups(rows, routes.order, routes.offsets, self.weight, bias, out)
        return out


def multiply_few(
    weights: DeviceSliced | DeviceDense,
    rows: torch.Tensor,
    chosen: torch.Tensor | None,
    bias: torch.Tensor | None,
    router: RouterTensors | None = None,
) -> torch.Tensor:
    """Return the products of few rows, each by itself; see `sparse_triton.multiply`."""
    from entangle.numerics.kernels import sparse_triton

    return sparse_triton.multiply(rows, chosen, weights.tensors, weights.neurons, bias, router)


def moved(weights: Sliced | DeviceSliced, device: torch.device) -> Sliced | DeviceSliced:
    """Return packed weights as a device's kernels read them; other devices leave them as they are."""
    sizes = weights.neurons, weights.inputs
    if kernels_of(device) == "triton":
        tensors = weights.tensors if isinstance(weights, DeviceSliced) else _tensors(weights)
        values, columns, starts, order = (tensor.to(device) for tensor in tensors)
        return DeviceSliced(values, columns, starts, order, *sizes)
    if device.type == "cpu" and isinstance(weights, DeviceSliced):
        numbers, *others = (tensor.cpu() for tensor in weights.tensors)
        first, second, third = (tensor.numpy() for tensor in others)
        return Sliced(as_array(numbers), first, second, third, *sizes, weights.dtype)
    return weights


def _tensors(sliced: Sliced) -> tuple[torch.Tensor, ...]:
    """Return the arrays of the CPU as tensors, the values in the weight's own dtype."""
    arrays = sliced.values, sliced.columns, sliced.starts, sliced.order
    values, *others = map(torch.from_numpy, arrays)
    bits = sliced.dtype == torch.bfloat16
    return values.view(sliced.dtype) if bits else values.to(sliced.packed), *others
