"""The curves of a comparison as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, MaxNLocator

from apportion.evaluate.curves import Method
from apportion.evaluate.statistics import bootstrap_means, interquartile_mean, interval, smoothed
from apportion.evaluate.summary import SPENT, Comparison, smoothing_window

# Okabe and Ito's colours, told apart by the colour-blind; the baseline is dark grey. Their yellow is too pale on white.
BASELINE_COLOUR = "#3d3d3d"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
# Beyond the colours the methods are told apart by their dashes.
DASHES = ("-", "--", ":")
COLUMNS = 3
# Two labels closer than this part of a panel's height would touch.
LABEL_HEIGHT = 0.066
# Part of the width of the data that a letter of a label takes.
LETTER_WIDTH = 0.026
MOST_MARKERS = 25


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method in one panel.

    Attributes:
        x: (N,) where its points lie.
        y: (N,) interquartile mean over seeds.
        band: Lower and upper edge, (N,) each; None with a single seed.
        faint: Further lines behind it, each x and y: single seeds, or the mean before it was smoothed.
        parity: Where on the x axis it reaches the baseline's final level; None if it does not, or that is not shown.
    """

    x: Float[np.ndarray, " N"]
    y: Float[np.ndarray, " N"]
    band: tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]] | None = None
    faint: tuple[tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]], ...] = ()
    parity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: its words and its lines by method; a method without the metric has none."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, Line]
    level: float | None = None


def draw_curves(comparison: Comparison, path: Path) -> None:
    """Draw every recorded step of every run of a comparison into one PNG file."""
    figure_of(comparison).savefig(path)


def figure_of(comparison: Comparison) -> Figure:
    """Return the picture of a comparison: a panel a question, a line a method, a band over its seeds."""
    panels = _panels(comparison)
    rows = -(-len(panels) // COLUMNS)
    layout = ConstrainedLayoutEngine(w_pad=0.14, h_pad=0.12)
    figure = Figure(figsize=(15.5, 4.2 * rows + 0.8), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    styles = _styles([method.label for method in comparison.methods])
    for index, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(rows, COLUMNS, index), panel, styles)
    figure.suptitle(_caption(comparison), fontsize=11, color="#555555", x=0.01, ha="left")
    return figure


def _panels(comparison: Comparison) -> list[Panel]:
    score = "training score" if comparison.score == "score/mean" else "held-out score"
    panels = [
        Panel(
            title=f"{score.capitalize()} against {name}",
            x_label={"seconds": "seconds of training", "samples": "samples (responses)"}.get(name, name),
            y_label=score,
            lines={
                method.label: _spent_line(method, comparison.score, name, parity=row[f"{name} to parity"].value)
                for method, row in zip(comparison.methods, comparison.rows, strict=True)
            },
            level=comparison.level,
        )
        for name in SPENT
    ]
    if comparison.kl:
        lines = {method.label: _kl_line(method, comparison.score, comparison.kl) for method in comparison.methods}
        panels.append(
            Panel(
                title=f"{score.capitalize()} against the KL it cost",
                x_label="KL to the reference, nats a response",
                y_label=score,
                lines=lines,
            )
        )
    for name in filter(None, (_densest_length(comparison), *comparison.others)):
        words = "response length, tokens" if name.endswith("/length") else f"{name.removeprefix('eval/')} (held-out)"
        panels.append(
            Panel(
                title=f"{words.partition(',')[0].partition(' (')[0].capitalize()} against updates",
                x_label="updates",
                y_label=words,
                lines={m.label: _spent_line(m, name, "updates") for m in comparison.methods if m.has(name)},
            )
        )
    return panels


def _densest_length(comparison: Comparison) -> str | None:
    """Prefer the lengths of the rollouts, one an update, to those of the evaluations."""
    methods = comparison.methods
    everywhere = all(len(run.steps("rollout/length")) > 1 for method in methods for run in method.runs)
    same = everywhere and len({tuple(run.steps("rollout/length")) for method in methods for run in method.runs}) == 1
    return "rollout/length" if same else comparison.length


def _spent_line(method: Method, name: str, spent: str, parity: float | None = None) -> Line:
    steps = method.steps(name)
    x = steps.astype(np.float64) if spent == "updates" else method.spent(spent, steps)
    values = method.values(name)
    faint = ()
    if len(steps) > MOST_MARKERS:
        faint = ((x, interquartile_mean(values)),)
        values = smoothed(values, smoothing_window(len(steps)))
    band = interval(bootstrap_means(values)) if len(values) > 1 else None
    reached = parity if parity is not None and np.isfinite(parity) else None
    return Line(x=x, y=interquartile_mean(values), band=band, faint=faint, parity=reached)


def _kl_line(method: Method, score: str, kl: str) -> Line:
    steps = np.intersect1d(method.steps(score), method.steps(kl))
    scores, kls = (method.values(name)[:, np.isin(method.steps(name), steps)] for name in (score, kl))
    seeds = tuple(zip(kls, scores, strict=True)) if len(kls) > 1 else ()
    return Line(x=interquartile_mean(kls), y=interquartile_mean(scores), faint=seeds)


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {labels[0]: {"color": BASELINE_COLOUR, "linestyle": "-"}}
    for index, label in enumerate(labels[1:]):
        dashes = DASHES[index // len(COLOURS) % len(DASHES)]
        styles[label] = {"color": COLOURS[index % len(COLOURS)], "linestyle": dashes}
    return styles


def _caption(comparison: Comparison) -> str:
    counts = ", ".join(
        f"{method.label} ({len(method.runs)} seed{'s' if len(method.runs) > 1 else ''})"
        for method in comparison.methods
    )
    runs = sum(len(method.runs) for method in comparison.methods)
    several = any(len(method.runs) > 1 for method in comparison.methods)
    shown = "interquartile mean over seeds, band: 95 % bootstrap interval" if several else "single seeds, no intervals"
    averaged = f" (by the mean of {comparison.window} records)" if comparison.window > 1 else ""
    text = (
        f"{runs} run{'s' if runs > 1 else ''}: {counts}. Lines: {shown}. "
        f"Dotted: final level of {comparison.methods[0].label}, rings: first reached{averaged}."
    )
    return fill(text, width=200)


def _draw(axes: Axes, panel: Panel, styles: dict[str, dict[str, Any]]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=12, fontweight="bold", color="#222222")
    axes.set_xlabel(panel.x_label, color="#444444")
    axes.set_ylabel(panel.y_label, color="#444444")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for label, line in panel.lines.items():
        _draw_line(axes, line, styles[label])
    if panel.level is not None and np.isfinite(panel.level):
        _draw_level(axes, panel.lines, panel.level, styles)
    _make_room(axes, panel)
    _draw_labels(axes, panel.lines, styles)


def _draw_line(axes: Axes, line: Line, style: dict[str, Any]) -> None:
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=style["color"], alpha=0.16, linewidth=0)
    for x, y in line.faint:
        axes.plot(x, y, **style, linewidth=0.8, alpha=0.35)
    marker = "o" if len(line.x) <= MOST_MARKERS else None
    axes.plot(line.x, line.y, **style, linewidth=2.0, marker=marker, markersize=3.6)
    axes.plot(line.x[-1:], line.y[-1:], color=style["color"], marker="o", markersize=6.0)


def _draw_level(axes: Axes, lines: dict[str, Line], level: float, styles: dict[str, dict[str, Any]]) -> None:
    ends = [line.x[-1] for line in lines.values()]
    axes.plot([0.0, max(ends)], [level, level], color=BASELINE_COLOUR, linewidth=1.0, linestyle=(0, (1, 2)))
    for label, line in lines.items():
        if line.parity is not None:
            ring = {"markerfacecolor": "white", "markeredgecolor": styles[label]["color"], "markeredgewidth": 1.8}
            axes.plot([line.parity], [level], marker="o", markersize=7.5, linestyle="none", zorder=5, **ring)


def _make_room(axes: Axes, panel: Panel) -> None:
    """Leave room for the labels on the right, without ticks, which would speak of steps that no run took."""
    first, last = axes.get_xlim()
    ends = [float(np.nanmax(line.x)) for line in panel.lines.values() if np.isfinite(line.x).any()]
    ticks = MaxNLocator(6, integer=panel.x_label == "updates").tick_values(max(first, 0.0), max(ends, default=last))
    axes.set_xticks([tick for tick in ticks if first <= tick <= last])
    if last >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    longest = max((len(label) for label in panel.lines), default=0)
    axes.set_xlim(first, last + (0.03 + LETTER_WIDTH * longest) * (last - first))


def _draw_labels(axes: Axes, lines: dict[str, Line], styles: dict[str, dict[str, Any]]) -> None:
    """Write each name beside the end of its line, moved apart where two would touch."""
    low, high = axes.get_ylim()
    found = {label: _end(line) for label, line in lines.items()}
    ends = {label: end for label, end in found.items() if end is not None}
    heights = spread_labels([(y - low) / (high - low) for _, y in ends.values()], LABEL_HEIGHT)
    offset = 0.018 * (axes.get_xlim()[1] - axes.get_xlim()[0])
    for (label, end), height in zip(ends.items(), heights, strict=True):
        words = {"color": styles[label]["color"], "fontsize": 10, "fontweight": "bold", "va": "center", "zorder": 6}
        text = axes.text(end[0] + offset, low + height * (high - low), label, **words)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white", alpha=0.8)])


def _end(line: Line) -> tuple[float, float] | None:
    known = np.flatnonzero(np.isfinite(line.x) & np.isfinite(line.y))
    return (float(line.x[known[-1]]), float(line.y[known[-1]])) if len(known) else None


def spread_labels(heights: Sequence[float], gap: float) -> list[float]:
    """Return heights at least a gap apart, in the same order, moved as one block where they crowd.

    Args:
        heights: Where labels want to be, from 0 at the bottom to 1 at the top.
        gap: Least distance of two.

    Returns:
        Where they go; each crowd of labels keeps its mean height.
    """
    order = np.argsort(heights, kind="stable")
    blocks: list[list[float]] = []
    for wanted in np.asarray(heights, dtype=np.float64)[order]:
        blocks.append([float(wanted)])
        while len(blocks) > 1 and _placed(blocks[-1], gap)[0] - _placed(blocks[-2], gap)[-1] < gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = [height for block in blocks for height in _placed(block, gap)]
    result = np.empty(len(placed))
    result[order] = placed
    return result.tolist()


def _placed(block: Sequence[float], gap: float) -> list[float]:
    middle = sum(block) / len(block)
    return [middle + (index - (len(block) - 1) / 2) * gap for index in range(len(block))]
