"""Power of the paired t test, and the number of seeds that a difference needs to be shown."""

from __future__ import annotations

import math

from analysis.statistics import ALPHA

POWER = 0.8


def power_of_paired_t(pairs: int, sd_of_differences: float, delta: float, alpha: float = ALPHA) -> float:
    """Probability that the two-sided paired t test of `pairs` pairs has p < alpha where the true difference is `delta`.

    `delta` and `sd_of_differences`, the true standard deviation of the paired differences, have one unit. The test's t
    then has a noncentral t distribution with n − 1 degrees of freedom and noncentrality √n Δ/σ (Cohen 1988, Statistical
    power analysis for the behavioral sciences, chapter 2). ValueError: fewer than 2 pairs, a deviation that is not above 0.
    """
    if pairs < 2 or not sd_of_differences > 0 or not math.isfinite(delta / sd_of_differences):
        raise ValueError(
            f"power needs at least 2 pairs and finite numbers: {pairs} pairs, {sd_of_differences}, {delta}"
        )
    from scipy import stats

    freedom = pairs - 1
    critical = stats.t.isf(alpha / 2, freedom)
    noncentrality = math.sqrt(pairs) * abs(delta) / sd_of_differences
    if noncentrality > 1000 * critical:
        # certain, and beyond SciPy's series
        return 1.0
    # below −critical by the mirrored distribution: SciPy's cdf is NaN where the tail is thin
    return float(stats.nct.sf(critical, freedom, noncentrality) + stats.nct.sf(critical, freedom, -noncentrality))


def seeds_needed(sd_of_differences: float, delta: float, power: float = POWER, alpha: float = ALPHA) -> int:
    """The smallest number of paired seeds, 2 or more, whose paired t test at `alpha` finds `delta` with this power.

    Units and errors as of `power_of_paired_t`; ValueError also for a `delta` of 0, which no number of seeds shows.
    """
    if delta == 0 or not alpha < power < 1:
        raise ValueError(f"no number of seeds shows a difference of {delta} with power {power} at {alpha}")

    def enough(pairs: int) -> bool:
        return power_of_paired_t(pairs, sd_of_differences, delta, alpha) >= power

    high = 2
    while not enough(high):
        high *= 2
    low = high // 2  # power grows with the number of pairs: too few here, unless high is 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def deviation_factors(pairs: int) -> tuple[float, float]:
    """95 % interval of a normal sample's true standard deviation, as factors of the estimate from `pairs` differences."""
    from scipy import stats

    freedom = pairs - 1
    high, low = (float(stats.chi2.isf(tail, freedom)) for tail in (0.025, 0.975))
    return math.sqrt(freedom / high), math.sqrt(freedom / low)
