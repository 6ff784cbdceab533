"""The share of each group of scans among the samples of a data set."""

from collections.abc import Mapping

import numpy as np

from deformmamba.data.augmentation import check_range
from deformmamba.errors import InvalidArgument


def check_weights(weights: Mapping[str, float] | None, *, of: str) -> None:
    """Refuses weights of groups that are negative or not finite, and weights that are all 0; `of` names the data set.

    Raises:
        ValueError: names the group and its weight.
    """
    for name, weight in (weights or {}).items():
        check_range(f"the weight of {name}", weight, 0, of=of)
    if weights and not sum(weights.values()):
        raise InvalidArgument(f"{of}: all weights are 0; wanted one above 0")


def cumulative_shares(counts: Mapping[str, int], weights: Mapping[str, float] | None, *, of: str) -> np.ndarray:
    """The sum of the shares of the groups up to each one, in the order of `counts`; the last is 1.

    Shares are in proportion to `weights`, or without weights to `counts`.

    Raises:
        ValueError: every group that has samples has the weight 0.
    """
    shares = [weights[name] if weights else count for name, count in counts.items()]
    if not sum(shares):
        raise InvalidArgument(f"{of}: the groups that have samples ({', '.join(counts)}) all have the weight 0")
    return np.asarray(np.cumsum(shares) / np.sum(shares))
