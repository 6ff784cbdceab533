"""Statistics of scores: means over subjects, their spread, and paired differences between two methods.

The unit is the SUBJECT: slices and sessions of one person are similar, so n volumes of three people are three values,
not n. The mean over each subject's volumes is taken first. A confidence interval needs at least `FEWEST` subjects; with
fewer, the spread over slices is given and labelled as such.

A row is the result of `deformmamba.evaluation.evaluate` for one volume: a mapping with "subject", one value for each
metric, and, with `slices`, "by_slice": a mapping of metrics to lists.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deformmamba.errors import InvalidArgument, shown

# with fewer values, an interval is too wide to be useful
FEWEST = 5


@dataclass(frozen=True)
class Spread:
    """A mean and its spread.

    Attributes:
        mean: the mean of the values.
        std: their sample standard deviation (n - 1); None for a single value or if a value is infinite.
        n: the number of values.
        over: the unit of the values: "subjects", "slices", "seeds" ...
        interval: confidence interval of the mean, by Student's t; None for fewer than `FEWEST` values, and for slices,
            which are not independent.
        level: confidence level of the interval.
    """

    mean: float
    std: float | None
    n: int
    over: str = "subjects"
    interval: tuple[float, float] | None = None
    level: float = 0.95

    def __str__(self) -> str:
        """As `show`, with two digits; with four if the mean is below 1."""
        return self.show(2 if abs(self.mean) >= 1 else 4)

    def show(self, digits: int) -> str:
        """`mean ± std (n subjects)` or, with an interval, `mean ± std [low, high] (n subjects)`."""
        text = f"{self.mean:.{digits}f}"
        if self.std is not None:
            text += f" ± {self.std:.{digits}f}"
        if self.interval is not None:
            text += f" [{self.interval[0]:.{digits}f}, {self.interval[1]:.{digits}f}]"
        return f"{text} ({self.n} {self.over if self.n != 1 else self.over.removesuffix('s')})"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every field; `interval` as a list or null."""
        return {
            "mean": self.mean,
            "std": self.std,
            "n": self.n,
            "over": self.over,
            "interval": None if self.interval is None else list(self.interval),
            "level": self.level,
        }


def spread(values: Sequence[float] | Mapping[str, float], *, over: str = "subjects", level: float = 0.95) -> Spread:
    """Mean, standard deviation and, from `FEWEST` values on, a confidence interval of the mean.

    `values`: one per subject (or seed), as a list or by name. `over="slices"` never gives an interval.

    The interval is Student's: mean ± t * std / sqrt(n), with the quantile t of n - 1 degrees of freedom. It contains
    the true mean in a share `level` of all samples if the values are normally distributed, for any n. (A percentile
    bootstrap of 5 or 6 values contains it in 82 to 88 % of the samples instead of 95 %.)

    Source: Student, Biometrika 6 (1908).

    Raises:
        ValueError: no value, NaN or something else than a number among them, or a `level` outside (0, 1).
    """
    try:
        numbers = np.array([values[name] for name in sorted(values)] if isinstance(values, Mapping) else values, float)
    except (TypeError, ValueError):  # a text, or lists of different lengths
        numbers = np.array([])
    if not numbers.size or numbers.ndim != 1 or np.isnan(numbers).any():
        raise InvalidArgument(
            f"spread: wanted a list of numbers over {over}, at least one and none NaN, not {shown(values)}"
        )
    if not 0 < level < 1:
        raise InvalidArgument(f"spread: level must lie between 0 and 1, such as 0.95, not {shown(level)}")
    n = numbers.size
    if not np.isfinite(numbers).all():  # an infinite PSNR: equal volumes
        return Spread(float(numbers.sum()), None, n, over, None, level)
    interval = None
    if n >= FEWEST and over != "slices":
        reach = t_quantile(level, n - 1) * float(numbers.std(ddof=1)) / math.sqrt(n)
        mean = math.fsum(numbers) / n
        interval = (mean - reach, mean + reach)
    return Spread(math.fsum(numbers) / n, float(numbers.std(ddof=1)) if n > 1 else None, n, over, interval, level)


def t_quantile(level: float, freedom: int) -> float:
    """The t for which |T| < t with probability `level`, T of Student's distribution with `freedom` >= 1 degrees.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4: for an integer number
    of degrees of freedom the probability is a finite sum, and bisection solves the equation.
    """
    low, high = 0.0, 1.0
    while _t_probability(high, freedom) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, freedom) < level else (low, middle)
    return high


def _t_probability(t: float, freedom: int) -> float:
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    if freedom == 1:
        total = 0.0
    for k in range(2 + odd, freedom - 1, 2):  # each term is the previous one times (k - 1) / k cos^2
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def subject_means(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """The mean of a metric over the volumes of each subject, by the subject's name."""
    by_subject = defaultdict(list)
    for row in rows:
        by_subject[str(row["subject"])].append(float(row[metric]))
    return {name: math.fsum(values) / len(values) for name, values in sorted(by_subject.items())}


def summarise(rows: Sequence[Mapping[str, Any]], metric: str, *, level: float = 0.95) -> Spread:
    """The mean of a metric over subjects, with the most reliable spread that the data allow.

    With at least `FEWEST` subjects: standard deviation over subjects, and an interval. With fewer, if the rows have
    `by_slice` values of the metric: the same mean, but the standard deviation over all SLICES with a finite value,
    marked by over="slices". Otherwise: standard deviation over subjects, no interval.
    """
    means = subject_means(rows, metric)
    result = spread(means, level=level)
    slices = [value for row in rows for value in row.get("by_slice", {}).get(metric, ()) if math.isfinite(value)]
    if len(means) >= FEWEST or len(slices) < 2:
        return result
    return Spread(result.mean, float(np.std(slices, ddof=1)), len(slices), "slices", None, level)


def paired_difference(a: Mapping[str, float], b: Mapping[str, float], *, level: float = 0.95) -> Spread:
    """The `spread` of a - b over subjects. Subjects differ from each other far more than two methods do on one subject.

    `a` and `b`: values by subject, as from `subject_means`, for the same subjects.

    Raises:
        ValueError: a subject is in only one of them.
    """
    if set(a) != set(b):
        odd = sorted(set(a) ^ set(b))
        raise InvalidArgument(f"paired_difference: both must have the same subjects; only in one: {', '.join(odd[:5])}")
    # inf - inf is undefined: two methods that are both perfect on a subject count as equal
    return spread({name: 0.0 if a[name] == b[name] else a[name] - b[name] for name in a}, level=level)
