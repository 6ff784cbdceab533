"""Means and spreads over subjects, compared with numpy and scipy; no interval for too few subjects."""

import json
import math

import numpy as np
import pytest

from deformmamba.metrics.statistics import (
    FEWEST,
    Spread,
    paired_difference,
    spread,
    subject_means,
    summarise,
    t_quantile,
)


def rows(n_subjects, volumes=2, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"subject": f"s{i}", "psnr": 28 + i + v, "by_slice": {"psnr": list(28 + i + rng.normal(size=4))}}
        for i in range(n_subjects)
        for v in range(volumes)
    ]


def test_equal_to_numpy_and_to_scipys_t_interval():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(30, 2, size=12)
    result = spread(values)
    assert (result.mean, result.std) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert (result.n, result.over) == (12, "subjects")
    wanted = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert result.interval == pytest.approx(wanted, rel=1e-9)


def test_quantiles_are_those_of_the_tables():
    for freedom, wanted in (
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (4, 2.7764),
        (5, 2.5706),
        (30, 2.0423),
        (999, 1.9623),
    ):
        assert t_quantile(0.95, freedom) == pytest.approx(wanted, abs=5e-5)
    assert t_quantile(0.99, 4) == pytest.approx(4.6041, abs=5e-5)
    assert t_quantile(0.5, 7) == pytest.approx(0.7111, abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("n", [5, 6, 8, 12, 25])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_contains_the_mean_as_often_as_it_says(n, level):
    rng = np.random.default_rng(n)
    intervals = [spread(rng.normal(30, 2, size=n), level=level).interval for _ in range(2000)]
    # four standard errors of a share in 2,000 trials: 0.036 at 80 %, 0.019 at 95 %
    margin = 4 * math.sqrt(level * (1 - level) / 2000)
    assert np.mean([low <= 30 <= high for low, high in intervals]) == pytest.approx(level, abs=margin)


def test_an_interval_narrows_with_its_level_and_is_a_function_of_the_values():
    values = [27.1, 29.4, 30.2, 28.8, 26.9, 31.0]
    (low, high), (lower, higher) = spread(values, level=0.5).interval, spread(values).interval
    assert lower < low < high < higher
    by_name = dict(zip("abcdef", values, strict=True))
    assert spread(by_name) == spread(dict(reversed(by_name.items())))


@pytest.mark.parametrize("n", range(1, FEWEST + 2))
def test_no_interval_below_five_values_nor_over_slices(n):
    assert (spread(list(range(n))).interval is None) == (n < FEWEST)
    assert (spread(list(range(n)), over="seeds").interval is None) == (n < FEWEST)
    assert spread(list(range(n)), over="slices").interval is None


def test_volumes_are_averaged_within_a_subject_first():
    uneven = [{"subject": "a", "psnr": 10.0}] * 3 + [{"subject": "b", "psnr": 20.0}]
    assert subject_means(uneven, "psnr") == {"a": 10, "b": 20}
    assert summarise(uneven, "psnr").mean == 15


def test_few_subjects_give_the_spread_over_slices_labelled_so():
    few = rows(3)
    result = summarise(few, "psnr")
    slices = [value for row in few for value in row["by_slice"]["psnr"]]
    assert result.mean == pytest.approx(np.mean([28.5, 29.5, 30.5]))
    assert result.std == pytest.approx(np.std(slices, ddof=1))
    assert (result.over, result.n, result.interval) == ("slices", 24, None)
    assert str(result).endswith("(24 slices)")
    plain = summarise([{k: v for k, v in row.items() if k != "by_slice"} for row in few], "psnr")
    assert (plain.over, plain.n, plain.interval) == ("subjects", 3, None)
    many = summarise(rows(FEWEST), "psnr")
    assert many.over == "subjects"
    assert many.interval is not None


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    a = {f"s{i}": 30 + 5 * rng.normal() for i in range(8)}
    b = {name: value - 0.1 - 0.01 * rng.normal() for name, value in a.items()}
    result = paired_difference(a, dict(reversed(b.items())))
    assert result.mean == pytest.approx(np.mean([a[s] - b[s] for s in a]))
    low, high = result.interval
    assert 0.08 < low < result.mean < high < 0.12  # the score of each method alone has standard deviation 5
    with pytest.raises(ValueError, match="only in one: s9"):
        paired_difference(a, {**b, "s9": 1.0})
    assert paired_difference({"x": math.inf}, {"x": math.inf}).mean == 0


def test_perfect_scores_have_no_spread():
    result = spread([math.inf, 30.0])
    assert (result.mean, result.std, result.interval) == (math.inf, None, None)


@pytest.mark.parametrize(
    ("values", "options"), [([], {}), ([1, math.nan], {}), (["a"], {}), ([[1], [1, 2]], {}), ([1.0], {"level": 1.5})]
)
def test_nothing_is_made_of_nothing(values, options):
    with pytest.raises(ValueError, match=r"wanted a list of numbers|between 0 and 1"):
        spread(values, **options)


def test_shown_and_stored():
    result = Spread(28.854, 0.914, 6, interval=(28.1, 29.6))
    assert str(result) == "28.85 ± 0.91 [28.10, 29.60] (6 subjects)"
    assert str(Spread(0.9123, None, 1)) == "0.9123 (1 subject)"
    assert json.loads(json.dumps(result.to_dict()))["interval"] == [28.1, 29.6]
