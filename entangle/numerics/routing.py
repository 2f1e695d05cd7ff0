"""Routers from a layer's inputs to experts: PCA and k-means folded into one matrix, or random.

PCA is affine, z = C(x - m), and k-means compares squared distances. The nearest centroid c has the
largest z·c - ‖c‖²/2, which is affine in x. So a router is a matrix ``(inputs, experts)`` and a bias
``(experts,)``.
"""

import dataclasses
import functools
import itertools
import warnings
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import linalg
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import nn

from entangle.numerics.clustering import kmeans, krylov_size, principal_axes
from entangle.numerics.torch_settings import float32_is_exact, torch_defaults

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

LEAST = 16  # rows of the sample: a smaller cluster is merged with the nearest one
EXACT = 2048  # inputs up to which the CPU computes PCA by a whole eigendecomposition
_ROWS = 2048  # rows of the sample that are converted to float64 at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
    """The expert of each token, and the tokens of each expert.

    All but ``counts`` and ``spans`` is computed where the tokens are, without waiting for a GPU.
    """

    chosen: torch.Tensor  # (tokens,) int64
    experts: int

    @functools.cached_property
    def order(self) -> torch.Tensor:
        """Return the tokens (tokens,) int64 sorted by expert, ascending within an expert."""
        return self.chosen.argsort(stable=True)

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        """Return where the tokens of each expert begin in ``order``, and the end (experts + 1,)."""
        each = torch.arange(self.experts + 1, device=self.chosen.device)
        return torch.searchsorted(self.chosen[self.order], each)

    @functools.cached_property
    def counts(self) -> list[int]:
        """Return the number of tokens of each expert, on the host."""
        counts: list[int] = self.chosen.bincount(minlength=self.experts).tolist()
        return counts

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """Return (expert, first, last) of each expert with tokens, ``order[first:last]``."""
        lasts = itertools.accumulate(self.counts)
        return [
            (expert, last - count, last)
            for expert, (count, last) in enumerate(zip(self.counts, lasts, strict=True))
            if count
        ]


@dataclasses.dataclass(slots=True, eq=False)
class _Kept:
    """The routes of a tensor."""

    inputs: weakref.ref[torch.Tensor]
    version: int
    found: Any  # Routes, or for one row its expert


class Router(nn.Module):
    """A module that chooses an expert for each row (tokens, inputs), whatever the other rows.

    Several layers that receive the same tensor can share a router. One of them, which owns the
    router, keeps its routes (`keep`), and the others look them up (`kept`).
    """

    inputs: int
    experts: int
    multiply_adds: int  # for each row

    def __init__(self) -> None:
        super().__init__()
        self._kept: _Kept | None = None

    def assign(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the expert (tokens,) int64 of each row (tokens, inputs)."""
        raise NotImplementedError

    def forward(self, inputs: torch.Tensor) -> Routes:
        """Return the routes of inputs (..., inputs)."""
        return Routes(self.assign(inputs.reshape(-1, self.inputs)), self.experts)

    def one(self, inputs: torch.Tensor) -> int:
        """Return the expert of inputs of one row."""
        return int(self.assign(inputs.reshape(1, self.inputs)))

    def keep(self, inputs: torch.Tensor, found: Routes | int) -> None:
        """Keep the routes of a tensor, or the expert of one row, until the tensor is freed."""
        self._kept = _Kept(weakref.ref(inputs, self._forget), _version(inputs), found)

    def kept(self, inputs: torch.Tensor) -> Any:
        """Return what was kept for this tensor last; None if it is another tensor or was changed.

        torch does not count the changes in place of a tensor of inference mode, so there a change
        between `keep` and `kept` is not noticed.
        """
        kept = self._kept
        if kept is None or kept.inputs() is not inputs or kept.version != _version(inputs):
            return None
        return kept.found

    def _forget(self, _: object) -> None:
        self._kept = None

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move to another device as modules do, but keep dtypes when a model becomes bfloat16."""
        kept = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self.named_parameters():
            parameter.data = kept[name].to(parameter.device)
        return self

    def __getstate__(self) -> dict[str, object]:  # a copy has kept nothing
        return self.__dict__ | {"_kept": None}


def router_of(parameters: Mapping[str, torch.Tensor]) -> Router:
    """Return the router that has the parameters of these names.

    Raises:
        ValueError: no router has parameters with these names.
    """
    for kind, names in ((CentroidRouter, {"matrix", "bias"}), (RandomRouter, {"key", "edges"})):
        if set(parameters) == names:
            router: Router = kind(**parameters)
            return router
    raise ValueError(
        "expected a router's parameters (matrix and bias, or key and edges), got the parameters "
        f"{', '.join(sorted(parameters)) or 'none'}"
    )


def _version(inputs: torch.Tensor) -> int:
    return 0 if inputs.is_inference() else inputs._version


def _constant(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class CentroidRouter(Router):
    """A router to the nearest centroid: ``argmax(x @ matrix + bias)``; ties choose the first."""

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.matrix = _constant(matrix)  # (inputs, experts) float32
        self.bias = _constant(bias)  # (experts,) float32
        self.inputs, self.experts = matrix.shape
        self.multiply_adds = matrix.numel()
        self._arrays: tuple[Floats, Floats] | None = None

    def assign(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the expert (tokens,) int64 of each row (tokens, inputs)."""
        # A shorter format of numbers would choose other experts.
        lower = torch.is_autocast_enabled(rows.device.type) or not float32_is_exact()
        with torch_defaults() if lower else nullcontext():
            return torch.addmm(self.bias, rows.float(), self.matrix).argmax(dim=1)

    @property
    def arrays(self) -> tuple[Floats, Floats]:
        """Return the constant matrix and bias as arrays, cached until the router is moved."""
        if self._arrays is None:
            matrix = np.ascontiguousarray(self.matrix.detach().numpy())
            self._arrays = matrix, self.bias.detach().numpy()
        return self._arrays

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._arrays = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"_arrays": None}


class RandomRouter(Router):
    """The control: a router by a hash of a row's signs, to experts with given shares of all rows.

    The choice is a function of the row, as for any router, but unrelated to the row's meaning. It
    uses only signs, since they survive rounding. Equal rows have the same expert, so sizes may
    differ from the given shares where inputs depend only on the token, as in a first block.
    """

    def __init__(self, key: torch.Tensor, edges: torch.Tensor) -> None:
        super().__init__()
        self.key = _constant(key)  # (inputs,) int64, odd
        self.edges = _constant(edges)  # (experts - 1,) float64: where in [0, 1) each expert ends
        self.inputs, self.experts = len(key), len(edges) + 1
        self.multiply_adds = len(key)

    def assign(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the expert (tokens,) int64 of each row (tokens, inputs)."""
        mixed = ((rows > 0) * self.key).sum(dim=1)  # modulo 2^64
        mixed = (mixed ^ ((mixed >> 33) & 0x7FFFFFFF)) * 0x62A9D9ED799705F5
        uniform = ((mixed >> 11) & (2**53 - 1)).double() / 2**53
        return torch.bucketize(uniform, self.edges, right=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of rows by k-means in the space of PCA, which `fold` turns into a router."""

    mean: Array  # (inputs,) mean of the rows
    axes: Array | None  # (components, inputs) axes of PCA, orthonormal; None: no PCA
    centroids: Array  # of centred rows (experts, components), or (experts, inputs) without PCA
    sizes: Array  # (experts,) rows of each expert


def fit_router(
    rows: torch.Tensor, experts: int, *, components: int | None = None, seed: int = 0
) -> CentroidRouter:
    """Fit a router to a sample of a layer's inputs (tokens, inputs), by PCA and k-means.

    See `find_clusters` and `fold`. Source: arXiv 2405.15756, Sparse Expansion.

    Raises:
        ValueError: there are no rows, rows are not finite, or a number is out of range.
    """
    return fold(find_clusters(rows, experts, components=components, seed=seed))


def find_clusters(
    rows: torch.Tensor, experts: int, *, components: int | None = None, seed: int = 0
) -> Clusters:
    """Find clusters of rows (tokens, inputs) by PCA and k-means, both in float64.

    PCA has ``inputs // 32`` components by default, as published. 0 components mean no PCA; so do as
    many as there are tokens or inputs, or more. A cluster of fewer than 16 rows is merged with the
    nearest one, the smallest cluster first. So there may be fewer clusters than ``experts``, but at
    least one. The work is done on the rows' device; on the CPU, k-means is that of scikit-learn.

    Raises:
        ValueError: there are no rows, rows are not finite, or a number is out of range.
    """
    sample = rows.detach().float()
    if experts < 1:
        raise ValueError(f"experts must be at least 1, got {experts}")
    if components is not None and components < 0:
        raise ValueError(f"components must be at least 0, got {components}")
    finite = sample.isfinite().all(dim=1)
    if not len(sample) or not bool(finite.all()):
        raise ValueError(
            f"clusters need finite inputs of at least 1 token, got {len(sample)} tokens, "
            f"{int((~finite).sum())} of them with NaN or infinite inputs"
        )
    tokens, inputs = sample.shape
    components = inputs // 32 if components is None else components
    components = components if components < min(tokens, inputs) else 0
    find = _on_cpu if sample.device.type == "cpu" else _on_device
    return find(sample, min(experts, tokens), components, seed % 2**32)


def _on_device(sample: torch.Tensor, experts: int, components: int, seed: int) -> Clusters:
    mean, axes = sample.mean(dim=0, dtype=torch.float64), None
    points = sample.double() - mean
    if components:
        axes = principal_axes(points, components, seed=seed)
        points = points @ axes.T
    centroids, labels = kmeans(points, experts, seed=seed)
    return _clusters(
        mean.cpu().numpy(),
        None if axes is None else axes.cpu().numpy(),
        centroids.cpu().numpy(),
        labels.cpu().numpy(),
    )


def _on_cpu(sample: torch.Tensor, experts: int, components: int, seed: int) -> Clusters:
    array = sample.numpy()
    mean, axes = array.mean(axis=0, dtype=np.float64), None
    if components:
        axes = _principal_axes(sample, mean, components, seed)
    # k-means adds its threads' sums in the order in which they finish: one thread is deterministic.
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        found = KMeans(experts, n_init=1, random_state=seed, copy_x=False)
        found.fit(_reduced(array, mean, axes))
    return _clusters(mean, axes, found.cluster_centers_, found.labels_)


def _clusters(
    mean: Array, axes: Array | None, centroids: Array, labels: npt.NDArray[np.integer]
) -> Clusters:
    sizes = np.bincount(labels, minlength=len(centroids)).astype(np.float64)
    return Clusters(mean, axes, *_merged(centroids, sizes))


def _principal_axes(sample: torch.Tensor, mean: Array, components: int, seed: int) -> Array:
    """Return the axes of largest variance (components, inputs), in order of falling variance.

    They are computed in float64: beside massive activations float32 rounds the smaller axes away,
    and the clusters would depend on the processor's kernel. Those of few inputs are exact, which
    takes seconds: time and memory grow with the square and the cube of the inputs.
    """
    inputs = sample.shape[1]
    if inputs > EXACT and 2 * krylov_size(components) < inputs:
        axes = principal_axes(sample.double() - torch.from_numpy(mean), components, seed=seed)
        return np.ascontiguousarray(axes.numpy())
    scatter = np.zeros((inputs, inputs))
    for first in range(0, len(sample), _ROWS):
        centred = sample[first : first + _ROWS].numpy() - mean
        scatter += centred.T @ centred
    _, exact = linalg.eigh(scatter, subset_by_index=[inputs - components, inputs - 1])
    return np.ascontiguousarray(exact.T[::-1])


def _reduced(sample: Floats, mean: Array, axes: Array | None) -> Array:
    """Return centred rows, projected on the axes (tokens, components) if there are axes."""
    found = np.empty((len(sample), len(mean) if axes is None else len(axes)))
    for first in range(0, len(sample), _ROWS):
        centred = sample[first : first + _ROWS] - mean
        found[first : first + _ROWS] = centred if axes is None else centred @ axes.T
    return found


def fold(clusters: Clusters) -> CentroidRouter:
    """Fold PCA and centroids into the router that sends a row to its nearest centroid."""
    centroids, axes = clusters.centroids, clusters.axes
    bias = -0.5 * (centroids**2).sum(axis=1)
    matrix = centroids.T if axes is None else axes.T @ centroids.T  # (inputs, experts)
    bias = bias - clusters.mean @ matrix
    # Subtract the largest cluster's column: a term common to all experts changes no choice, but
    # costs precision. A cluster of outliers would make the mean of the columns large, and rounding
    # would then confuse the other clusters.
    largest = clusters.sizes.argmax()
    matrix, bias = matrix - matrix[:, [largest]], bias - bias[largest]
    return CentroidRouter(torch.from_numpy(matrix).float(), torch.from_numpy(bias).float())


def _merged(centroids: Array, sizes: Array) -> tuple[Array, Array]:
    """Return centroids (experts, components) and sizes after merging clusters that are too small.

    The massive activations of first tokens fall into many tiny clusters far from all others. Merged
    with the nearest, they form one cluster that is large enough, apart from the ordinary ones.
    """
    while len(sizes) > 1 and sizes.min() < LEAST:
        small = int(sizes.argmin())
        distances = ((centroids - centroids[small]) ** 2).sum(axis=1)
        distances[small] = np.inf
        near = int(distances.argmin())
        if sizes[small]:
            both = sizes[small] * centroids[small] + sizes[near] * centroids[near]
            centroids[near] = both / (sizes[small] + sizes[near])
        sizes[near] += sizes[small]
        centroids, sizes = np.delete(centroids, small, axis=0), np.delete(sizes, small)
    return centroids, sizes


def random_router(inputs: int, sizes: torch.Tensor, *, seed: int = 0) -> RandomRouter:
    """Return a random router: experts get shares of rows proportional to ``sizes`` (experts,).

    Raises:
        ValueError: there are no sizes, one is negative, or all are zero.
    """
    shares = sizes.double().cpu()
    if not len(shares) or not bool((shares >= 0).all()) or float(shares.sum()) <= 0:
        raise ValueError(
            f"expected sizes of clusters, none negative and one positive, got {shares.tolist()}"
        )
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(-(2**62), 2**62, (inputs,), generator=generator) * 2 + 1
    edges = (shares.cumsum(0) / shares.sum())[:-1]
    return RandomRouter(key, edges)
