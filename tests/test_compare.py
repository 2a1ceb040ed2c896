"""The tables of a comparison."""

import pytest

from fedex_lora.experiments.compare import difference_table, markdown


def results(**scores):
    """By method, or by a label of fedex, the test scores of seeds 0, 1, ..."""
    return {
        method.replace("_", "-"): [
            {
                "method": "fedex" if "labelled" in method else method,
                "seed": seed,
                "metric": "accuracy",
                "best": {"scores": {"validation": {"accuracy": 0.1}, "test": {"accuracy": score}}},
                "deviation": None,
                "bytes_up": 1,
                "bytes_down": 2,
                "seconds": 3.0,
            }
            for seed, score in enumerate(values)
        ]
        for method, values in scores.items()
    }


def test_methods_are_paired_with_the_exact_one_by_seed():
    found = results(fedit=[0.5, 0.6, 0.7], fedex=[0.8, 0.9, 1.01, 0.3], local=[0.1])
    header, rows = difference_table(found)  # type: ignore[misc]
    assert header[0] == "test accuracy against fedex"
    assert rows == [["fedit", "3", "−0.303", "−0.318 to −0.289", "lower"]]
    assert "| fedit | 3 | −0.303 |" in markdown(found)


def test_labels_of_a_grid_are_no_methods():
    header, rows = difference_table(results(fedit=[0.5, 0.6], labelled=[0.8, 0.9]))  # type: ignore[misc]
    assert header[0] == "test accuracy against labelled" and rows[0][0] == "fedit"


@pytest.mark.parametrize("scores", [{"fedex": [0.5, 0.6]}, {"fedex": [0.5], "fedit": [0.4]}])
def test_nothing_to_compare(scores):
    assert difference_table(results(**scores)) is None


def test_no_difference_is_claimed_where_the_interval_holds_0():
    _, rows = difference_table(results(ffa=[0.5, 0.9], fedit=[0.6, 0.5]))  # type: ignore[misc]
    assert rows[0][0] == "fedit" and rows[0][-1] == "none seen"
