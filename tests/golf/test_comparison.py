"""Several runs side by side: means, deviations, differences at equal seeds, and p-values."""

import copy
import json
import math
import re
from functools import reduce
from operator import getitem

import numpy as np
import pytest

from fastweight.golf.comparison import compare_runs, write_comparison
from fastweight.golf.folder import RunFolder
from fastweight.golf.statistics import deviation, student_p, welch_p


def student_by_quadrature(t, freedom):
    """Two-sided tail of Student's density, by the trapezoid rule over a substitution that makes the tail finite."""
    u = np.linspace(0, 1, 2_000_001)[:-1]
    x = abs(t) + u / (1 - u)
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    density = np.exp(log - (freedom + 1) / 2 * np.log1p(x * x / freedom)) / (1 - u) ** 2
    return 2 * float(np.trapezoid(density, u))


@pytest.mark.parametrize("t", [0.0, 0.3, -1.0, 2.5, 12.7])
@pytest.mark.parametrize("freedom", [1.0, 2.0, 3.7, 30.0])
def test_the_tail_of_students_distribution_is_its_integral(t, freedom):
    assert student_p(t, freedom) == pytest.approx(student_by_quadrature(t, freedom), abs=2e-6)


def test_welchs_p_of_a_published_example():
    """Samples and result as tabulated for Welch's test with unequal variances: t = −2.46, 24.99 degrees, p = 0.021."""
    first = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    second = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    assert welch_p(first, second) == pytest.approx(0.021, abs=5e-4)
    assert welch_p(second, first) == welch_p(first, second)


def test_a_single_run_has_neither_deviation_nor_p():
    assert deviation([1.0]) is None
    assert welch_p([1.0], [1.0, 2.0]) is None
    assert welch_p([1.0, 1.0], [1.0, 1.0]) == 1.0
    assert welch_p([1.0, 1.0], [2.0, 2.0]) == 0.0


@pytest.fixture
def runs(finished, tmp_path):
    """Ledgers of two variants; bits per byte of stage "packed" are chosen, nats are twice of them."""
    chosen = {("a", 0): 1.00, ("a", 1): 1.02, ("a", 2): 1.04, ("b", 1): 0.99, ("b", 2): 1.00}
    for (variant, seed), value in chosen.items():
        ledger = copy.deepcopy(finished[1]) | {"variant": variant, "seed": seed, "run": f"{variant}{seed}"}
        for stage in ledger["stages"]:
            stage |= {"bits_per_byte": value, "nats_per_token": 2 * value}
        folder = RunFolder(tmp_path / f"{variant}{seed}")
        folder.path.mkdir()
        folder.ledger.write_text(json.dumps(ledger))
    return [tmp_path / f"{variant}{seed}" for variant, seed in chosen]


def test_the_table_has_means_deviations_and_differences_at_equal_seeds(runs):
    rows = {(row["variant"], row["stage"]): row for row in compare_runs(runs).rows}
    assert rows["a", "packed"]["bits_per_byte"]["mean"] == pytest.approx(1.02)
    assert rows["a", "packed"]["bits_per_byte"]["deviation"] == pytest.approx(0.02)
    assert "against" not in rows["a", "packed"]
    for metric, factor in (("bits_per_byte", 1), ("nats_per_token", 2)):
        against = rows["b", "packed"]["against"][metric]
        assert against["difference"] == pytest.approx(factor * (0.995 - 1.02))
        assert against["matched"]["seeds"] == [1, 2]
        assert against["matched"]["mean"] == pytest.approx(factor * -0.035)
        assert against["p"] == pytest.approx(welch_p([1.0, 1.02, 1.04], [0.99, 1.0]))


def test_the_report_is_written_and_says_what_may_not_be_reported(runs, tmp_path):
    comparison = compare_runs(runs)
    write_comparison(comparison, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "1.0200 ± 0.0200" in text
    assert "b2 is NOT REPORTABLE: a part of the split" in text
    assert json.loads((tmp_path / "report" / "report.json").read_text())["rows"] == comparison.rows
    assert (tmp_path / "report" / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["train.optimizer.lr", "calibration.tokens", "pack.spec.mlp.bits", "eval.stride"])
def test_runs_of_one_variant_may_differ_in_their_seed_alone(runs, name):
    ledger = json.loads(RunFolder(runs[1]).ledger.read_text())
    *path, last = name.split(".")
    settings = reduce(getitem, path, ledger["setup"])
    assert settings[last] != 7
    settings[last] = 7
    RunFolder(runs[1]).ledger.write_text(json.dumps(ledger))
    with pytest.raises(ValueError, match=rf"both called 'a', but differ in {re.escape(name)}\."):
        compare_runs(runs)


def test_one_run_is_not_counted_twice(runs):
    with pytest.raises(ValueError, match="are both seed 0 of 'a'"):
        compare_runs([runs[0], runs[0]])
