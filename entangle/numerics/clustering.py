"""PCA and k-means by torch, on the device of the rows.

Both are in float64: beside massive activations float32 rounds the smaller axes away. Neither needs
an atomic sum, so the same rows and seed give the same bits on the same device.
"""

import math

import numpy as np
import torch

STEPS = 20  # blocks of the Krylov space of `principal_axes`
_ITERATIONS, _TOLERANCE = 300, 1e-4  # of k-means, as in scikit-learn


def krylov_size(components: int) -> int:
    """Return the dimension of the Krylov space of `principal_axes`: 5 times the components."""
    return STEPS * math.ceil(components / 4)


def principal_axes(centred: torch.Tensor, components: int, *, seed: int = 0) -> torch.Tensor:
    """Return the axes of largest variance (components, inputs) of float64 rows (tokens, inputs).

    The mean of the rows is 0. The axes are orthonormal and in order of falling variance. They are
    the best ones in a Krylov space: a random block V, SV, S²V, ... of the scatter matrix S, each
    block made orthogonal to those before it. S itself, which has inputs², is never made. Their
    variance is that of the exact axes to 1e-6 for inputs of language models, and to 1e-3 with
    planted clusters. Only of pure noise, whose axes mean nothing, half a percent is missed. If the
    space would have half the inputs' dimensions, the axes are exact. Source: Musco and Musco,
    arXiv 1504.05477.
    """
    inputs, size = centred.shape[1], krylov_size(components)
    if 2 * size >= inputs:
        basis = torch.eye(inputs, dtype=torch.float64, device=centred.device)
        scatter = centred.T @ centred
    else:
        basis, scatter = _krylov_space(centred, size, seed)
    _, vectors = torch.linalg.eigh(scatter, UPLO="U")
    axes: torch.Tensor = (basis @ vectors[:, -components:]).T.flip(0)
    return axes


def _krylov_space(centred: torch.Tensor, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a basis (inputs, size), and the upper triangle of the scatter matrix in it."""
    inputs, width = centred.shape[1], size // STEPS
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
    start = torch.randn(inputs, width, generator=generator, dtype=torch.float64)
    start = start.to(centred.device)
    block, basis, scatter = start, start.new_empty(inputs, size), start.new_zeros(size, size)
    for first in range(0, size, width):
        before, until_now = basis[:, :first], basis[:, : first + width]
        # Rows of few dimensions leave nothing but rounding: a little noise gives new directions.
        noise = torch.roll(start, first, dims=0)
        block = block + (1e-14 * block.norm() + 1e-100) * noise
        for _ in range(2):  # the first time, rounding leaves a part of the earlier blocks
            block = torch.linalg.qr(block - before @ (before.T @ block))[0]
        basis[:, first : first + width] = block
        block = ((centred @ block).T @ centred).T  # on the CPU quicker than centred.T @ ...
        scatter[: first + width, first : first + width] = until_now.T @ block
    return basis, scatter


def kmeans(points: torch.Tensor, count: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the centroids (count, inputs) of float64 points (tokens, inputs), and their labels.

    The labels (tokens,) name the nearest centroid. Lloyd's algorithm begins at points that greedy
    k-means++ chooses, and ends after the same number of steps and at the same tolerance as that of
    scikit-learn. A centroid without points moves to the point that is the farthest from its own.
    """
    centroids = points[_far_apart(points, count, seed)]
    enough = _TOLERANCE * float(points.var(dim=0, correction=0).mean())
    numbers = torch.arange(count, device=points.device)
    for _ in range(_ITERATIONS):
        distances, labels = _nearest(points, centroids)
        # A product with ones and zeros: sums by index would add in an order that varies on a GPU.
        members = (labels[:, None] == numbers).double()
        counts = members.sum(dim=0)
        moved = (members.T @ points) / counts.clamp(min=1)[:, None]
        empty = counts == 0
        if bool(empty.any()):
            far = distances.argsort(descending=True, stable=True)
            moved[empty] = points[far[: int(empty.sum())]]
        shift = float((moved - centroids).square().sum())
        centroids = moved
        if shift <= enough:
            break
    return centroids, _nearest(points, centroids)[1]


def _nearest(points: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each point's squared distance to the nearest centroid, and the number of that."""
    lengths = centroids.square().sum(dim=1)
    found = torch.addmm(lengths, points, centroids.T, alpha=-2).min(dim=1)
    return found.values + points.square().sum(dim=1), found.indices


def _far_apart(points: torch.Tensor, count: int, seed: int) -> list[int]:
    """Choose points by greedy k-means++ and return their places.

    The next point is drawn with a probability that is proportional to its squared distance from
    those before it. Of a few that are drawn, the one that leaves the least sum of distances is kept.
    Source: Arthur and Vassilvitskii, k-means++: the advantages of careful seeding, 2007.
    """
    random = np.random.default_rng(seed)
    draws = 2 + int(math.log(count))
    chosen = [int(random.integers(len(points)))]
    closest = (points - points[chosen[0]]).square().sum(dim=1)
    while len(chosen) < count:
        # Summed on the host: a running sum on a GPU is not the same each time.
        sums = np.cumsum(closest.cpu().numpy())
        places = np.searchsorted(sums, random.random(draws) * sums[-1], side="right")
        places = places.clip(max=len(points) - 1)
        distances = torch.stack([(points - points[p]).square().sum(dim=1) for p in places.tolist()])
        distances = torch.minimum(closest, distances)
        best = int(distances.sum(dim=1).argmin())
        chosen.append(int(places[best]))
        closest = distances[best]
    return chosen
