"""The one place that says what a comparison lets pass.

What is said of an engine against PyTorch is ``validation.tolerances``, by dtype and format; here is what is said of one program
against another. docs/comparison.md has what was measured when these were set.
"""

from __future__ import annotations

from moecompiler.comparison.result import Ulps

RATIO = 1.1
"""Of mean errors, up to which the first program is not further from the truth: the lower end of the ratio's interval is held
to it."""

ROUNDED = 0.5
"""Units in the last place: a mean error up to this one is rounding's, of which a quarter of a unit is the least there can be."""

WORST_TIMES = 8.0
"""The first program's largest error may be so many times the second's, which counts as at least one unit."""


def further(first: Ulps, second: Ulps, interval: tuple[float, float] | None) -> bool:
    """Whether a node's output is further from the truth in the first program than in the second."""
    if first.max == float("inf"):
        return second.max != float("inf")
    if second.max == float("inf") or interval is None:
        return False
    if interval[0] > RATIO and first.mean > ROUNDED:
        return True
    return first.max > WORST_TIMES * max(second.max, 1.0)
