"""What the benchmarks compare computes the same; their results are kept, replaced and shown."""

import json

import pytest
import torch

from benchmarks import flower_page, merging, residual
from benchmarks.page import page
from benchmarks.results import Figure, Row, goal, read, row_of, shown, store
from benchmarks.shapes import end, layers, start
from benchmarks.timing import Times, in_turn, ratio
from fedex_lora.merge.factors import merge_factors


def test_both_ways_to_the_residual_give_one():
    begin = start(layers({"x": (30, 20)}, 2, 4))
    ends = [end(begin, 1 + i, 1.0) for i in range(3)]
    for name, found in residual.ours(begin, ends).items():
        torch.testing.assert_close(found.dense(), residual.published(ends, name), rtol=0, atol=1e-4)


def test_merging_is_compared_with_what_peft_makes_of_the_same_adapters():
    peft = merging.adapted(2, 24, 3)
    first, _ = merging.terms(peft)
    merging.theirs(peft, "cat")
    exact = merge_factors(first, merging.WEIGHTS).dense().double()
    torch.testing.assert_close(merging.product(peft), exact, rtol=1e-5, atol=1e-5)
    merging.theirs(peft, "svd", svd_rank=3, svd_full_matrices=False)
    cut = merge_factors(first, merging.WEIGHTS, 3).dense().double()
    torch.testing.assert_close(merging.product(peft), cut, rtol=1e-4, atol=1e-4)


def test_a_rows_new_result_replaces_its_old_one_and_leaves_the_others(tmp_path):
    path = tmp_path / "results.json"
    for name, value in (("one", 1.0), ("two", 2.0), ("one", 3.0)):
        store(name, Row(name, [Figure("x", value, "s", 0.1, at_most=2)], ["a note"]), path)
    store("two", Row("two", skipped="no data"), path, ["two", "one"])
    store("zero", Row("zero"), path, ["zero", "two", "one"])
    assert list(read(path)) == ["zero", "two", "one"]
    rows = {name: row_of(entry) for name, entry in read(path).items()}
    assert rows["one"].figures == [Figure("x", 3.0, "s", 0.1, at_most=2)]
    assert rows["two"].figures[0].value == 2.0  # what was measured is not lost by skipping
    assert {"commit", "threads", "torch"} <= set(json.loads(path.read_text())["one"]["measured"])


def test_the_page_shows_every_figure_and_says_what_is_missed(tmp_path):
    path = tmp_path / "results.json"
    store("one", Row("One", [Figure("fast", 3.0, "×", 0.1, at_least=5)], ["How."]), path)
    store("gpu", Row("Two", skipped="there is none"), path)
    text = page(read(path))
    assert "| fast | 3 × | 10% | ≥ 5 ×: missed |" in text and "How." in text
    assert "Not measured: there is none." in text


@pytest.mark.parametrize(
    ("figure", "text", "reached"),
    [
        (Figure("", 1200.4, "×", at_least=1000), "1,200 ×", True),
        (Figure("", 0.0123, "s", at_most=0.01), "12.3 ms", False),
        (Figure("", 2e-7, ""), "2e-07", None),
    ],
)
def test_figures_for_people(figure, text, reached):
    assert shown(figure) == text and figure.reached is reached
    assert ("missed" in goal(figure)) is (reached is False)


def test_alternatives_run_in_turn_and_ratios_are_of_medians():
    order = []
    times = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, False)
    assert order == ["a", "b"] * 3 and len(times["a"].seconds) == 3
    order.clear()
    in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, False, True)
    assert order == ["a", "a", "b", "b"] * 2
    assert ratio(Times((2.0, 4.0, 6.0)), Times((1.0, 2.0, 2.0))) == (2.0, 0.5)
    assert Times((1.0,)).spread is None


def flowers(seconds, training, ours, theirs):
    ran = {"seconds": seconds, "training": training, "bytes_down": [1, 9, 9]}
    flower = [{"down": 2e8, "up": 1e8, "seconds": [10.0, 12.0]}]
    return {
        "ours": [{**ran, "bytes": ours, "bytes_by_flower": theirs}],
        "flower": flower,
        "cores": 2,
        "nodes": 3,
        "load": 1.0,
    }


def test_the_section_on_rounds_is_made_of_rounds_with_full_messages():
    results = {
        "floor": flowers([9.0, 5.0, 6.0], [1.0, 1.0, 1.0], 24_000, 48_000),
        "large": flowers([99.0, 20.0, 24.0], [1.0, 5.0, 5.0], 1_000, 1_010),
    }
    assert flower_page.besides(results["large"]["ours"]) == [15.0, 19.0]
    page = f"# A\n\n{flower_page.HEADING}\nold\n\n## B\n\nkept\n"
    made = flower_page.with_section(page, results)
    assert made.startswith("# A\n") and made.endswith("\n\n## B\n\nkept\n") and "old" not in made
    assert "| 200 MB to every client and 100 MB back | 17.0 (15.0 to 19.0) | 11.0 " in made
    assert "| 1.55 |" in made and "101.00%" in made
    assert "of 1 kB, it is 200.00%: its envelope is 1.0 kB a message" in made  # 3 × (2 × 3 + 2)
    assert flower_page.with_section(made, results) == made


def test_the_section_in_the_docs_is_that_of_the_results():
    text = flower_page.PAGE.read_text()
    assert flower_page.with_section(text, json.loads(flower_page.RESULTS.read_text())) == text
