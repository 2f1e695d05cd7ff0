"""Route a layer's inputs to experts: by PCA and k-means folded into one matrix, or at random.

PCA is affine and k-means compares squared distances. With z = C(x - m) the nearest centroid c is the
one of largest z·c - ‖c‖²/2, which is affine in x: a matrix ``(inputs, experts)`` and a bias are all
of a router.
"""

import dataclasses
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

Array = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

LEAST = 16  # rows of the sample: a smaller cluster is merged with its nearest
_ROWS = 2048  # of the sample that are made float64 at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
    """Which tokens go to which expert: sorted by expert, in each the order is kept."""

    order: torch.Tensor  # (tokens,) int64
    counts: list[int]  # of each expert

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """The experts that have a token, and whose are ``order[first:last]``."""
        lasts = itertools.accumulate(self.counts)
        return [
            (expert, last - count, last)
            for expert, (count, last) in enumerate(zip(self.counts, lasts, strict=True))
            if count
        ]


@dataclasses.dataclass(slots=True, eq=False)
class _Last:
    """The routes found last, and which layers have taken them."""

    inputs: weakref.ref[torch.Tensor]
    version: int
    found: Any  # Routes, or of one row its expert
    takers: set[int]


class Router(nn.Module):
    """What chooses an expert for each row (tokens, inputs): a row's choice is its own."""

    inputs: int
    experts: int
    multiply_adds: int  # for a row

    def __init__(self) -> None:
        super().__init__()
        self.layers = 0  # that share it, since they have the same input
        self._last: _Last | None = None

    def assign(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the expert (tokens,) int64 of each row (tokens, inputs)."""
        raise NotImplementedError

    def forward(self, inputs: torch.Tensor, layer: object = None) -> Routes:
        """Return the routes of inputs (..., inputs), found once for the layers that share them.

        A layer that asks again for the same tensor may have changed it where it lies.
        """
        routes: Routes | None = self.recall(inputs, layer)
        if routes is None:
            routes = self._routes(inputs.reshape(-1, self.inputs))
            self.note(inputs, layer, routes)
        return routes

    def one(self, inputs: torch.Tensor, layer: object = None) -> int:
        """Return the expert of inputs that are one row, as `forward` does: decoding hurries."""
        expert: int | None = self.recall(inputs, layer)
        if expert is None:
            expert = int(self.assign(inputs.reshape(1, self.inputs)))
            self.note(inputs, layer, expert)
        return expert

    def recall(self, inputs: torch.Tensor, layer: object) -> Any:
        """Return what was noted of the same inputs, for a layer that has not yet taken it."""
        last, self._last = self._last, None
        if last is None or last.inputs() is not inputs or last.version != _version(inputs):
            return None
        return None if id(layer) in last.takers else self._take(last, layer)

    def note(self, inputs: torch.Tensor, layer: object, found: Any) -> None:
        """Keep what a layer found of its inputs for the others that share them."""
        self._take(_Last(weakref.ref(inputs), _version(inputs), found, set()), layer)

    def _take(self, last: _Last, layer: object) -> Any:
        last.takers.add(id(layer))
        if len(last.takers) < self.layers:
            self._last = last
        return last.found

    def _routes(self, rows: torch.Tensor) -> Routes:
        chosen = self.assign(rows)
        counts = chosen.bincount(minlength=self.experts).tolist()
        return Routes(chosen.argsort(stable=True), counts)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Go to another device as modules do, but stay exact when a model is made bfloat16."""
        kept = {name: parameter.data for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, parameter in self.named_parameters():
            parameter.data = kept[name].to(parameter.device)
        return self

    def __getstate__(self) -> dict[str, object]:  # a copy has seen nothing yet
        return self.__dict__ | {"_last": None}


def router_of(parameters: Mapping[str, torch.Tensor]) -> Router:
    """Return the router that has these parameters, by their names in it.

    Raises:
        ValueError: no router has parameters of these names.
    """
    for kind, names in ((CentroidRouter, {"matrix", "bias"}), (RandomRouter, {"key", "edges"})):
        if set(parameters) == names:
            router: Router = kind(**parameters)
            return router
    raise ValueError(f"no router has the parameters {', '.join(sorted(parameters)) or 'none'}")


def _version(inputs: torch.Tensor) -> int:
    return 0 if inputs.is_inference() else inputs._version


def _constant(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class CentroidRouter(Router):
    """Routes a row to its nearest centroid: ``argmax(x @ matrix + bias)``, of ties the first."""

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor) -> None:
        super().__init__()
        self.matrix = _constant(matrix)  # (inputs, experts) float32
        self.bias = _constant(bias)  # (experts,) float32
        self.inputs, self.experts = matrix.shape
        self.multiply_adds = matrix.numel()
        self._arrays: tuple[Floats, Floats] | None = None

    def assign(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the expert (tokens,) int64 of each row (tokens, inputs)."""
        kind = rows.device.type
        lower = torch.is_autocast_enabled(kind)  # bfloat16 would choose others
        with torch.autocast(kind, enabled=False) if lower else nullcontext():
            return torch.addmm(self.bias, rows.float(), self.matrix).argmax(dim=1)

    @property
    def arrays(self) -> tuple[Floats, Floats]:
        """The matrix and the bias, which are constants, as arrays: kept until the router is moved."""
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
    """Routes a row by a hash of its signs, to experts with given shares of all rows: the control.

    It is a function of the row, like any router, and knows nothing of what the row means; of its
    signs, since they survive rounding. Equal rows go together: where inputs depend on nothing but
    the token, as in a first block, sizes may be off.
    """

    def __init__(self, key: torch.Tensor, edges: torch.Tensor) -> None:
        super().__init__()
        self.key = _constant(key)  # (inputs,) int64, odd
        self.edges = _constant(edges)  # (experts - 1,) float64: where in [0, 1) one expert ends
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
    """Clusters of rows by k-means in the space of PCA: the parts that a router is folded from."""

    mean: Array  # (inputs,) of the rows
    axes: Array | None  # (components, inputs) of PCA, orthonormal; None: no PCA
    centroids: Array  # (experts, components), or without PCA (experts, inputs), of centred rows
    sizes: Array  # (experts,) rows of each


def fit_router(
    rows: torch.Tensor, experts: int, *, components: int | None = None, seed: int = 0
) -> CentroidRouter:
    """Fit PCA and k-means to a sample of a layer's inputs (tokens, inputs), and fold them.

    See `find_clusters` and `fold`. Source: arXiv 2405.15756, Sparse Expansion.

    Raises:
        ValueError: no rows, rows that are not finite, or a number out of range.
    """
    return fold(find_clusters(rows, experts, components=components, seed=seed))


def find_clusters(
    rows: torch.Tensor, experts: int, *, components: int | None = None, seed: int = 0
) -> Clusters:
    """Find clusters of rows (tokens, inputs) by PCA and k-means, both in float64.

    ``components`` of PCA are ``inputs // 32`` unless told otherwise, as published; 0 is none, as is
    more than there are tokens or inputs. A cluster of k-means with fewer than 16 rows is merged
    with its nearest, the smallest first. So there may be fewer clusters than asked for, at least
    one.

    Raises:
        ValueError: no rows, rows that are not finite, or a number out of range.
    """
    sample = rows.detach().float().cpu().numpy()
    if experts < 1 or (components is not None and components < 0):
        raise ValueError(f"expected experts >= 1, components >= 0, got {experts}, {components}")
    if not len(sample) or not np.isfinite(sample).all():
        raise ValueError(
            f"no clusters can be found in {len(sample)} inputs, "
            f"{int((~np.isfinite(sample)).any(axis=1).sum())} of them NaN or infinite"
        )
    tokens, inputs = sample.shape
    components = inputs // 32 if components is None else components
    mean, axes = sample.mean(axis=0, dtype=np.float64), None
    if 0 < components < min(tokens, inputs):
        axes = _principal_axes(sample, mean, components)
    # k-means adds its threads' sums in the order in which they end: one is deterministic.
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        kmeans = KMeans(min(experts, tokens), n_init=1, random_state=seed % 2**32, copy_x=False)
        kmeans.fit(_reduced(sample, mean, axes))
    sizes = np.bincount(kmeans.labels_, minlength=kmeans.n_clusters).astype(np.float64)
    return Clusters(mean, axes, *_merged(kmeans.cluster_centers_, sizes))


def _principal_axes(sample: Floats, mean: Array, components: int) -> Array:
    """Return the axes of largest variance (components, inputs), those of largest variance first.

    In float64: beside massive activations the smaller axes would be rounding in float32, so that
    another kernel of the processor would find other clusters.
    """
    inputs = sample.shape[1]
    scatter = np.zeros((inputs, inputs))
    for first in range(0, len(sample), _ROWS):
        centred = sample[first : first + _ROWS] - mean
        scatter += centred.T @ centred
    _, axes = linalg.eigh(scatter, subset_by_index=[inputs - components, inputs - 1])
    return np.ascontiguousarray(axes.T[::-1])


def _reduced(sample: Floats, mean: Array, axes: Array | None) -> Array:
    """Return centred rows (tokens, components) in the space of the axes, if there are some."""
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
    # What is the same for all experts changes no choice, but costs precision. Not the mean: of a
    # cluster of outliers that would be large, and rounding would mix up the others.
    usual = clusters.sizes.argmax()
    matrix, bias = matrix - matrix[:, [usual]], bias - bias[usual]
    return CentroidRouter(torch.from_numpy(matrix).float(), torch.from_numpy(bias).float())


def _merged(centroids: Array, sizes: Array) -> tuple[Array, Array]:
    """Return centroids (experts, components) and sizes of clusters that are large enough.

    The massive activations of first tokens fall into many tiny clusters far from all others: merged
    with their nearest they become one that is large enough, and not a part of an ordinary one.
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
    """Return a router that gives each expert a share of rows like ``sizes`` (experts,), at random.

    Raises:
        ValueError: no sizes, or none above zero.
    """
    shares = sizes.double().cpu()
    if not len(shares) or not bool((shares >= 0).all()) or float(shares.sum()) <= 0:
        raise ValueError(f"expected the sizes of clusters, got {shares.tolist()}")
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(-(2**62), 2**62, (inputs,), generator=generator) * 2 + 1
    edges = (shares.cumsum(0) / shares.sum())[:-1]
    return RandomRouter(key, edges)
