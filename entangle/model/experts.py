"""A mixture of sparse experts as a module: copies of a layer's weights, and who gets which token.

Packed, an expert is one bit for each weight and the values of those that are not zero: disk holds
about density x experts of the dense layer. Packing and unpacking keep every bit.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from entangle.numerics.routing import CentroidRouter, Router, Routes
from entangle.numerics.sparse import slice_rows


class Mixture(nn.Module):
    """A linear layer whose router gives each token the weights of one expert."""

    in_features: int
    out_features: int
    router: Router | None  # None: one expert, which has all tokens
    bias: nn.Parameter | None  # (neurons,): all experts share it

    def one(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., neurons) of inputs (..., inputs) that are one token."""
        raise NotImplementedError

    def many(self, rows: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Return the outputs (tokens, neurons) of rows (tokens, inputs) that are no single token."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return what `print` says of it, as `nn.Linear` does."""
        return (
            f"experts={self.router.experts if self.router else 1}, "
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., neurons) of inputs (..., inputs).

        Raises:
            ValueError: inputs of another width.
        """
        width, router = inputs.shape[-1], self.router
        if width != self.in_features:  # which the kernels would not notice
            raise ValueError(f"expected {self.in_features} inputs, got {width}")
        if inputs.numel() == width:
            return self.one(inputs)
        rows = inputs.reshape(-1, width)
        shape = (*inputs.shape[:-1], self.out_features)
        if router is None:
            everyone = torch.arange(len(rows), device=rows.device)
            return self.many(rows, Routes(everyone, [len(rows)])).view(shape)
        return self.many(rows, router(inputs, self)).view(shape)


class ExpertLinear(Mixture):
    """A mixture that holds all weights, zeros too.

    ``counts`` are the tokens of the calibration text that each expert got.
    """

    router: Router

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        router: Router,
        counts: Sequence[int],
    ) -> None:
        """Take a weight (experts, neurons, inputs), and a bias (neurons,) that all experts share.

        Raises:
            ValueError: another number of experts, or of inputs, in the weight than in the router.
        """
        super().__init__()
        if not len(weight) == router.experts == len(counts):
            raise ValueError(
                f"expected a weight and a count for each of the router's {router.experts} experts, "
                f"got {len(weight)} and {len(counts)}"
            )
        if weight.shape[2] != router.inputs:
            raise ValueError(
                f"expected a router of {weight.shape[2]} inputs, got one of {router.inputs}"
            )
        self.out_features, self.in_features = weight.shape[1:]
        self.weight = _constant(weight)
        self.bias = None if bias is None else _constant(bias)
        self.router = router
        self.counts = [int(count) for count in counts]
        router.layers += 1

    def one(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., neurons) of inputs (..., inputs) that are one token."""
        return self._product(inputs, self.router.one(inputs, self))

    def many(self, rows: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Return the outputs (tokens, neurons) of rows (tokens, inputs)."""
        spans = routes.spans
        if len(spans) < 2:
            return self._product(rows, spans[0][0] if spans else 0)
        outputs = torch.cat(
            [self._product(rows[routes.order[a:b]], expert) for expert, a, b in spans]
        )
        return torch.empty_like(outputs).index_copy_(0, routes.order, outputs)

    def _product(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        return functional.linear(rows, self.weight[expert], self.bias)


class PackedLinear(Mixture):
    """A mixture, or one pruned layer, that holds no zeros: to run it, on the CPU.

    Few tokens are multiplied as it is; for many, where that is faster, an expert is unpacked.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, router: Router | None
    ) -> None:
        """Pack a weight (experts, neurons, inputs).

        Raises:
            ValueError: a weight of a dtype that cannot be packed (see `slice_rows`).
        """
        super().__init__()
        _, self.out_features, self.in_features = weight.shape
        self.sliced = slice_rows(weight)
        self.bias = None if bias is None else _constant(bias)
        self.router = router
        if router is not None:
            router.layers += 1

    @property
    def weight(self) -> torch.Tensor:
        """The weight with its zeros, unpacked each time: for models that read it themselves."""
        if self.router is None:
            return self.sliced.dense(0)
        return torch.stack([self.sliced.dense(expert) for expert in range(self.router.experts)])

    def _save_to_state_dict(self, *_: object) -> None:
        raise ValueError(
            "the model's layers are packed, which is for running it only: load it with "
            "packed=False to save it or to take its state"
        )

    def one(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs (..., neurons) of inputs (..., inputs) that are one token."""
        router = self.router
        if isinstance(router, CentroidRouter):
            known = router.recall(inputs, self)
            outputs, expert = self.sliced.one(inputs, known, *router.arrays)
            if known is None:
                router.note(inputs, self, expert)
        else:
            expert = 0 if router is None else router.one(inputs, self)
            outputs, _ = self.sliced.one(inputs, expert)
        return self._finished(outputs, inputs.dtype)

    def many(self, rows: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Return the outputs (tokens, neurons) of rows (tokens, inputs)."""
        spans = routes.spans
        few = [
            (e, first, last) for e, first, last in spans if self.sliced.is_faster(last - first, e)
        ]
        if len(spans) == 1 and not few:
            return self._unpacked(rows, spans[0][0])
        outputs = self._finished(self.sliced.products(rows, routes.order, few), rows.dtype)
        for expert, first, last in spans:
            if (expert, first, last) not in few:
                part = routes.order[first:last]
                outputs[part] = self._unpacked(rows[part], expert)
        return outputs

    def _unpacked(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        return functional.linear(rows, self.sliced.dense(expert).to(rows.dtype), self.bias)

    def _finished(self, outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.bias is not None:
            outputs += self.bias
        return outputs if outputs.dtype == dtype else outputs.to(dtype)


def _constant(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """Weights with many zeros, in little space."""

    mask: torch.Tensor  # (bytes,) uint8: a bit for each weight, whether it is stored
    values: torch.Tensor  # (stored,) of the weights' dtype


def pack(weight: torch.Tensor) -> Packed:
    """Pack a weight of any shape."""
    weight = weight.detach().cpu().contiguous()
    stored = _bits(weight) != 0  # a negative zero is no zero here, so that no bit is lost
    mask = np.packbits(stored.flatten().numpy())
    return Packed(torch.from_numpy(mask), weight[stored])


def unpack(packed: Packed, shape: Sequence[int]) -> torch.Tensor:
    """Return the weight of a shape that was packed.

    Raises:
        ValueError: what was packed was no weight of this shape.
    """
    size = int(np.prod(shape))
    bits = np.unpackbits(packed.mask.numpy())
    stored = torch.from_numpy(bits[:size]).bool()
    if len(packed.mask) != -(-size // 8) or int(stored.sum()) != len(packed.values):
        raise ValueError(
            f"{len(packed.values)} values and a mask of {len(packed.mask)} bytes are no weight of "
            f"{' x '.join(map(str, shape))}"
        )
    weight = torch.zeros(size, dtype=packed.values.dtype)
    weight[stored] = packed.values
    return weight.view(tuple(shape))


def packed_bytes(weight: torch.Tensor) -> int:
    """Return how many bytes `pack` would make of a weight."""
    return -(-weight.numel() // 8) + int((_bits(weight) != 0).sum()) * weight.element_size()


def _bits(weight: torch.Tensor) -> torch.Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return weight.detach().contiguous().view(kinds[weight.element_size()])
