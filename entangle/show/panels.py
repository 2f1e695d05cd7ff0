"""Shared parts of the figures of a run: layout, labels, colours, and the values to draw."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import PurePath
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray

from entangle.model.patterns import INPUT
from entangle.numerics.gaussian import noise_floor
from entangle.numerics.kernels.bins import edges_of
from entangle.runs.dataset import (
    TRUSTED_ERROR,
    UNITS,
    about,
    dataset_of,
    disentangled,
    matching,
    short_names,
    trusted,
)

Run = xr.DataTree | xr.Dataset
Names = str | Sequence[str] | None
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Sheet = Figure | SubFigure | None

DISTANCES = {
    "wasserstein": "1-Wasserstein distance\nto a Gaussian (std)",
    "wasserstein_bulk": "1-Wasserstein distance\nof the bulk (its std)",
}
DISTANCE = DISTANCES["wasserstein"]
STYLE: dict[Any, Any] = {
    **sns.plotting_context("paper", font_scale=0.88),
    **dict.fromkeys(("axes.labelsize", "figure.labelsize", "figure.titlesize"), 8.5),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
}
INK, BAND, FIT, QUIET, DEAD = "#0b3c5d", "#3f8fc5", "#d55e00", "0.4", "0.75"
_EXPERT = r"\.(\d+)(?=\.)"  # in a role, the number of a trained expert
DASHES: dict[str, Any] = {"color": FIT, "linewidth": 1.2, "linestyle": "--"}


class Picture(Figure):
    """A figure that a notebook shows exactly once, with or without pyplot's inline mode."""

    def _repr_png_(self) -> tuple[bytes, dict[str, float]]:
        self.savefig(buffer := BytesIO(), format="png", dpi=200)
        width, height = self.get_size_inches() * 100
        return buffer.getvalue(), {"width": width, "height": height}


def label_of(run: Run, variable: str) -> str:
    """Return a variable's long name and unit, wrapped for a colour bar."""
    attributes = dataset_of(run)[variable].attrs
    default = attributes.get("long_name", variable), attributes.get("units", "1")
    name, unit = UNITS.get(variable, default)
    return fill(f"{name} ({unit})".removesuffix(" (1)"), 24)


def subject_of(data: xr.Dataset) -> str:
    """Return a run's model, text and number of tokens, as far as they are known."""
    attributes = about(data)
    tokens = f"{attributes['tokens']:,} tokens" if "tokens" in attributes else ""
    names = short_names([*map(str, attributes.get("texts", [attributes.get("text", "")]))])
    model = PurePath(str(attributes.get("model", ""))).name
    return " · ".join(filter(None, [model, " + ".join(names), tokens]))


def drawable(text: str) -> str:
    """Return a text that matplotlib draws as it is: $ begins no formula, and all of it is UTF-8."""
    return text.encode(errors="backslashreplace").decode().replace("$", r"\$")


def held_out_subject(data: xr.Dataset) -> str:
    """Return the model and the held-out tokens that `disentangle` measured on."""
    about = disentangled(data)
    texts = about.get("evaluation_texts", [about.get("evaluation", "")])
    names = [
        *short_names([str(about.get("model", ""))]),
        " + ".join(short_names([*map(str, texts)])),
    ]
    tokens = f"{about.get('held_out_tokens', 0):,} held-out tokens"
    return " · ".join(filter(None, [*names, tokens]))


def place_of(data: xr.Dataset, sparsity: str | None) -> int:
    """Return the index of a sparsity in a run of `disentangle`; None is the last one.

    Raises:
        LookupError: the run lacks the sparsity.
    """
    known = [str(one) for one in data["sparsity"].to_numpy()]
    if sparsity is not None and sparsity not in known:
        raise LookupError(f"the run has no sparsity {sparsity!r}: it has {', '.join(known)}")
    return len(known) - 1 if sparsity is None else known.index(sparsity)


def frame_of(run: Run, variable: str, layers: Names) -> tuple[pd.DataFrame, Counts]:
    """Return a table with a row per neuron of the layers, and the indices of their blocks.

    ``attrs`` has the figure's subject and its notes. Columns:

    * ``layer``, ``block``, ``role``: the neuron's layer; experts of a block have the same role here.
    * ``expert``: the number of the neuron's expert in its block, else -1.
    * ``count``: tokens.
    * ``floor``: noise floor for as many tokens, std.
    * ``value``: the variable in its unit; NaN for dead or not finite neurons and untrusted distances.

    Raises:
        LookupError: the run lacks the variable, or a pattern matches no layer.
        ValueError: no neuron has a value.
    """
    data = dataset_of(run)
    if variable not in data.data_vars:
        raise LookupError(
            f"the run has no variable {variable!r}: it has {', '.join(map(str, data))}"
        )
    data = data.isel(neuron=matching(data["layer"].to_numpy(), layers or "*"))
    frame = pd.DataFrame({key: data[key].to_numpy() for key in ("layer", "block", "role", "count")})
    frame = experts_together(frame)
    value = data[variable].to_numpy().astype(float)
    dead = ~np.isfinite(value)
    doubtful = ~dead & ~trusted(data, variable) & (variable in DISTANCES)
    floors = {count: noise_floor(count) for count in frame["count"].unique() if count}
    frame["floor"] = frame["count"].map(floors)
    frame["value"] = np.where(dead | doubtful, np.nan, value)
    parts = {"dead or not finite": dead, f"left out (error bound above {TRUSTED_ERROR})": doubtful}
    notes = ", ".join(f"{which.sum():,} {what}" for what, which in parts.items() if which.any())
    if frame["value"].isna().all():
        raise ValueError(f"no neuron of {len(frame):,} has a value of {variable} to draw: {notes}")
    frame.attrs = {"notes": notes, "subject": drawable(subject_of(data))}
    return frame, np.arange(frame["block"].min(), frame["block"].max() + 1)


def experts_together(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with one role for all experts of a block; ``expert`` is a row's expert, else -1."""
    expert = frame["role"].str.extract(_EXPERT, expand=False).fillna("-1").astype(int)
    return frame.assign(role=frame["role"].str.replace(_EXPERT, "", regex=True), expert=expert)


def colours_of(cells: Floats) -> tuple[colors.Normalize, colors.Colormap]:
    """Return a colour scale and map that resolve both the bulk of the values and outliers."""
    cells = cells[np.isfinite(cells)]
    top = np.quantile(abs(cells), 0.998) or abs(cells).max() or 1.0
    signed = cells.min() < 0
    scale = colors.AsinhNorm(top / 300, -top, top) if signed else colors.PowerNorm(0.5, 0, top)
    colour = sns.color_palette("vlag" if signed else "inferno", as_cmap=True).copy()
    reach = top * (1 + 1e-9)
    beyond = int((cells > reach).any()) + 2 * int((cells < -reach).any())
    colour.colorbar_extend = ("neither", "max", "min", "both")[beyond]
    return scale, colour


def panels_of(
    frame: pd.DataFrame, figure: Sheet, *, most: int, height: float, labels: tuple[str, str]
) -> tuple[dict[str, Axes], Figure | SubFigure]:
    """Return titled axes by role, in the model's order, and the figure that holds them."""
    roles = [str(role) for role in frame["role"].unique()]
    rows = -(-len(roles) // most)
    columns = -(-len(roles) // rows)
    size = 8.5, 1 + max(rows * (height + 0.35), 2.1)
    sheet = figure or Picture(figsize=size, layout="constrained")
    if isinstance(sheet, Figure) and sheet.get_layout_engine() is None:
        sheet.set_layout_engine("constrained")
    grid = sheet.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    panels = dict(zip(roles, grid, strict=False))
    for spare in grid[len(roles) :]:
        spare.remove()
    for depth in range(1, 2 + max(role.count(".") for role in roles)):
        names = [".".join(role.split(".")[-depth:]) for role in roles]
        if len({*names}) == len(roles) and not any(name[0].isdigit() for name in names):
            break
    for place, (role, ax) in enumerate(panels.items()):
        part = frame[frame["role"] == role]
        ends = part.groupby("layer").size().agg(["min", "max"]).unique()
        sizes = " to ".join(f"{end:,}" for end in ends)
        sizes += " inputs" if role.endswith(INPUT) else " neurons"
        count = part["expert"].max() + 1
        ax.set_title(f"{names[place]}\n{f'{count} experts of {ends[-1]:,}' if count else sizes}")
        ax.tick_params(labelbottom=place + columns >= len(roles))
        if labels[1] in DISTANCES.values():
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=9))
            ax.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            ax.yaxis.set_minor_locator(ticker.NullLocator())
            ax.grid(axis="y", alpha=0.25)
    subject = frame.attrs["subject"]  # starts lower if it is long, to leave room for a legend
    sheet.suptitle("\n" * (len(subject) > 50) + subject, x=0.01, ha="left", linespacing=2)
    sheet.supxlabel(f"{labels[0]}\n{frame.attrs['notes']}".strip())
    sheet.supylabel(labels[1])
    return panels, sheet


def histogram_of(held: xr.Dataset) -> tuple[Floats, Counts]:
    """Return the edges of a neuron's fine bins, and the tokens below each edge and in total."""
    counts, tails = held["counts"].to_numpy().astype(np.int64), held["tail_count"].to_numpy()
    edges = edges_of(float(held["center"]), float(held["scale"]), len(counts))
    return edges, np.cumsum([tails[0], *counts, tails[1]])


def quantiles_of(edges: Floats, below: Counts, shares: list[float]) -> Floats:
    """Return quantiles in output units, clipped to the filled bins of the histogram."""
    filled = np.diff(below[:-1]) > 0
    rims = np.append(filled, False) | np.append(False, filled) | ~filled.any()
    quantiles: Floats = np.interp(np.multiply(shares, below[-1]), below[:-1][rims], edges[rims])
    return quantiles
