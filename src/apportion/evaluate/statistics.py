"""Numbers over seeds: interquartile mean, bootstrap intervals, smoothing, and the time to parity with a baseline.

Axes: S seeds, N recorded steps, R resamples. Everything is a pure function of arrays; the bootstrap draws from a
generator of its own, so that the same runs always give the same report.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
RESAMPLES = 2000
# Resampled curves are made for as many steps at a time as fit into about 100 MB.
BLOCK = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value: The number; infinite if what it counts was never reached, NaN if it is unknown.
        low: Lower end of the interval; None where there is no interval, as with a single seed.
        high: Upper end; infinite if some resamples never reached it.
    """

    value: float
    low: float | None = None
    high: float | None = None


def interquartile_mean(values: Float[np.ndarray, "S ..."]) -> Float[np.ndarray, " ..."]:
    """Return the mean over seeds without the lowest and the highest quarter.

    Of S seeds floor(S / 4) are left out at each end: with fewer than four it is the mean. A NaN in any seed gives NaN.

    Source:
        Agarwal et al., 2021 (https://arxiv.org/abs/2108.13264), section 4.3.
    """
    cut = len(values) // 4
    middle = np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)
    return np.where(np.isnan(values).any(axis=0), np.nan, middle)


def bootstrap_means(
    values: Float[np.ndarray, "S N"], *, resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "R N"]:
    """Return the interquartile mean of each of R sets of seeds drawn with replacement; whole curves are drawn.

    Args:
        values: (S, N) float. One curve a seed.
        resamples: Number of draws.
        seed: Of the generator.
    """
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    width = max(1, BLOCK // drawn.size)
    blocks = [values[:, start : start + width] for start in range(0, values.shape[1], width)]
    return np.concatenate([interquartile_mean(block[drawn].swapaxes(0, 1)) for block in blocks], axis=1)


def interval(draws: Float[np.ndarray, "R N"]) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """Return the percentile interval of resampled numbers, both ends among the numbers, which may be infinite."""
    tail = (1 - CONFIDENCE) / 2
    ordered = np.sort(draws, axis=0)
    last = len(draws) - 1
    return ordered[int(np.floor(tail * last))], ordered[int(np.ceil((1 - tail) * last))]


def estimate(values: Float[np.ndarray, " S"]) -> Estimate:
    """Return the interquartile mean of one number a seed, with a bootstrap interval from two seeds on."""
    value = float(interquartile_mean(values))
    if len(values) < 2 or np.isnan(value):
        return Estimate(value=value)
    low, high = interval(bootstrap_means(values[:, None]))
    return Estimate(value=value, low=float(low[0]), high=float(high[0]))


def smoothed(values: Float[np.ndarray, "S N"], window: int) -> Float[np.ndarray, "S N"]:
    """Return the centred moving average along the steps, of the part of the window that lies inside the curve.

    Centred, since a trailing average would delay every crossing by half its window.

    Args:
        values: (S, N) float. One curve a row.
        window: Steps averaged, odd.

    Raises:
        ValueError: If the window is even or less than 1.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window is {window}; a centred average needs an odd number of steps, such as {window + 1}")
    kernel = np.ones(window)
    counts = np.convolve(np.ones(values.shape[1]), kernel)[window // 2 : window // 2 + values.shape[1]]
    sums = [np.convolve(row, kernel)[window // 2 : window // 2 + values.shape[1]] for row in values]
    return np.stack(sums) / counts


def first_reach(curves: Float[np.ndarray, "R N"], levels: Float[np.ndarray, " R"]) -> Float[np.ndarray, " R"]:
    """Return where each curve first reaches its level, as a position on the step axis from 0 to N - 1.

    Between two steps the curve is a straight line, so the position is a fraction. Zero if the first step is there
    already, infinite if no step is.
    """
    reached = curves >= levels[:, None]
    index = np.where(reached.any(axis=1), reached.argmax(axis=1), 0)
    before = np.maximum(index - 1, 0)
    rows = np.arange(len(curves))
    low, high = curves[rows, before], curves[rows, index]
    rise = np.where(index > 0, high - low, 1.0)
    position = np.where(index > 0, before + (levels - low) / rise, 0.0)
    return np.where(reached.any(axis=1), position, np.inf)


def parity(
    curves: Float[np.ndarray, "S N"], baseline: Float[np.ndarray, "Q N"]
) -> tuple[float, Float[np.ndarray, " R"] | None]:
    """Return when a method first reaches the final level of a baseline, with the same for each resample.

    The level is the last value of the baseline's curve; both curves are interquartile means over seeds. The resamples
    draw the seeds of the method and those of the baseline apart (a stratified bootstrap), and together where the method
    is the baseline itself.

    Args:
        curves: (S, N) float. Smoothed curves of the method.
        baseline: (Q, N) float. Smoothed curves of the baseline, on the same steps.

    Returns:
        position: On the step axis, from 0 to N - 1; infinite if never reached, NaN if the curves hold NaN.
        draws: (R,) positions of the resamples; None if the method or the baseline has a single seed.
    """
    mean, level = interquartile_mean(curves), interquartile_mean(baseline)[-1]
    if np.isnan(mean).any() or np.isnan(level):
        return np.nan, None
    position = float(first_reach(mean[None], level[None])[0])
    if len(curves) < 2 or len(baseline) < 2:
        return position, None
    levels = bootstrap_means(baseline[:, -1:])[:, 0]
    own_seed = 0 if np.array_equal(curves, baseline) else 1
    return position, first_reach(bootstrap_means(curves, seed=own_seed), levels)


def at_position(positions: Float[np.ndarray, " R"], spent: Float[np.ndarray, " N"]) -> Float[np.ndarray, " R"]:
    """Return what was spent at positions on the step axis, on straight lines between the steps; infinite stays so."""
    finite = np.where(np.isfinite(positions), positions, 0.0)
    return np.where(np.isfinite(positions), np.interp(finite, np.arange(len(spent)), spent), positions)
