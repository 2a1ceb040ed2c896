"""The page and its files: what it says, what it survives, what it never touches."""

import json
import re
import time
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from made_up import CLIENTS, grid, made_up, spec

from fedex_lora.cli import reports
from fedex_lora.errors import UserError
from fedex_lora.experiments.analysis.drawn import Drawn
from fedex_lora.experiments.analysis.plots import Series, lines
from fedex_lora.experiments.report.page import inline, saved
from fedex_lora.experiments.report.write import write_report

EVIL = '<script>alert("x")</script>'
EVIL_CLIENT = '"><img src=x onerror=alert(1)>$\\frac{$ _日本'


class Reader(HTMLParser):
    """Tags that are open, ids, and what a browser would load."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.loads, self.text = Counter(), Counter(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value] += 1
            if name in ("src", "href", "xlink:href", "data", "action") or name.startswith("on"):
                self.loads.append(value)

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def quick(monkeypatch):
    """No figures, where only the text is of interest."""
    monkeypatch.setattr("fedex_lora.experiments.report.page.of_task", lambda study, task: [])


def page(path):
    return Reader(path.read_text())


def said(path):
    return " ".join(" ".join(page(path).text).split())


def whole_grid(folder):
    """Eight methods and three seeds, in a task."""
    methods = ["fedit", "ffa", "fedex", "fedex-reinit", "fedex-keep", "flexlora", "local"]
    scores = {m: [0.7 + 0.01 * i, 0.75, 0.8] for i, m in enumerate([*methods, "centralized"])}
    return grid(folder, scores)


def test_a_comparison_says_its_verdict_first(quick, tmp_path):
    grid(
        tmp_path / "g",
        {"fedex": [0.9, 0.91, 0.92], "fedit": [0.8, 0.815, 0.82], "ffa": [0.95, 0.8, 0.99]},
    )
    write_report([tmp_path / "g"], tmp_path / "report.html")
    text = said(tmp_path / "report.html")
    assert "Test accuracy: fedex beats fedit; no difference seen between fedex and ffa." in text
    assert text.index("Verdict") < text.index("Scores") < text.index("Clients")
    assert "fedex-lora compare" in text and "--methods fedit,ffa,fedex --seeds 0,1,2" in text


def test_the_verdict_says_what_was_compared_and_at_what_cost(quick, tmp_path):
    grid(tmp_path / "g", {m: [0.8, 0.81] for m in ("fedex", "fedit", "local", "centralized")})
    write_report([tmp_path / "g"], tmp_path / "report.html")
    text = said(tmp_path / "report.html")
    first = text[: text.index("Scores")]
    assert "sst2: fedit, fedex, centralized, local on rows, train: 100 rows, validation:" in first
    assert "test: 20 rows; 3 clients, 3 rounds, 3 local epochs, 2 seeds." in first
    assert "no difference seen between fedex and each of" in first
    # 900 up and 150 or 100 bytes down to three clients in three rounds and at the end
    assert "bytes of a run fedex 2.7 kB fedit × 0.78 local × 0.78" in first
    assert "fedex 0.805 ± 0.007" in first


def test_rows_that_were_not_used_are_told(quick, tmp_path):
    run = made_up(tmp_path / "run", spec())
    counts = {"ann": {"rows": 60, "left_out": 0}, "bob": {"rows": 30, "left_out": 4}}
    tested = {"rows": 20, "left_out": 0, "not_asked": 3}
    told = {"training": counts, "evaluation": {"test": tested}}
    (run / "data.json").write_text(json.dumps(told))
    write_report([run], tmp_path / "report.html")
    text = said(tmp_path / "report.html")
    assert "sst2: 4 of 90 training rows were left out" in text
    assert "3 of 20 test rows count as wrong" in text and "validation rows" not in text


@pytest.mark.parametrize("text", ["[]", '{"training": 3, "evaluation": {"test": 4}}', "{"])
def test_counts_that_are_damaged_are_not_told(quick, tmp_path, text):
    run = made_up(tmp_path / "run", spec())
    (run / "data.json").write_text(text)
    write_report([run], tmp_path / "report.html")
    assert "left out" not in said(tmp_path / "report.html").replace("are left out", "")


def test_one_page_holds_everything_and_stays_small(tmp_path):
    whole_grid(tmp_path / "g")
    write_report([tmp_path / "g"], tmp_path / "report.html")
    found = page(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2e6
    assert all(v.startswith(("#", "data:")) for v in found.loads)
    assert "@import" not in "".join(found.text) and "url(" not in "".join(found.text)
    assert max(found.ids.values()) == 1 and found.tags["svg"] >= 8
    assert found.tags["script"] == 0
    referred = {v[1:] for v in found.loads if v.startswith("#")}
    assert referred and referred <= set(found.ids)
    plots = {f.name for f in (tmp_path / "report-plots").iterdir()}
    assert {"score-by-round.svg", "score-by-round.png", "differences.png"} <= plots
    assert len(plots) == 2 * found.tags["svg"]


def test_many_arms_are_drawn_by_condition_and_compared_at_equal_settings(tmp_path):
    for r in (1, 2, 4, 8):
        grid(
            tmp_path / "g" / str(r),
            {m: [0.5, 0.6] for m in ("fedit", "ffa", "fedex")},
            lora={"r": r},
        )
    write_report([tmp_path / "g"], tmp_path / "report.html")
    text, found = said(tmp_path / "report.html"), page(tmp_path / "report.html")
    assert "At equal settings, of which there are 4" in text
    assert "Curves: r 1" in text and "Curves: r 8" in text
    plots = {f.name for f in (tmp_path / "report-plots").glob("*.svg")}
    assert {"score-by-rank.svg", "score-by-round-1.svg", "score-by-round-4.svg"} <= plots
    assert max(found.ids.values()) == 1


def test_names_of_others_are_text_everywhere(tmp_path):
    one = spec(name=EVIL, model={"name": EVIL}, training={"optim": EVIL})
    path = made_up(tmp_path / "run", one, client_scores={EVIL_CLIENT: 0.5})
    lines = (path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line.replace('"ann"', json.dumps(EVIL_CLIENT))) for line in lines]
    records[1]["refused"] = {EVIL_CLIENT: EVIL}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_report([path], tmp_path / "report.html")
    found = page(tmp_path / "report.html")
    assert found.tags["script"] == found.tags["img"] == 0
    assert "onerror" in "".join(found.text) and EVIL in "".join(found.text)
    assert f"{EVIL_CLIENT} was refused: {EVIL}" in " ".join(found.text)


def test_refused_and_lost_clients_are_named(quick, tmp_path):
    path = made_up(tmp_path / "run", spec())
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    records[0]["refused"] = {"bob": "A of 'q' has entries that are NaN"}
    records[1]["lost"] = {"cleo": "vanished"}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_report([path], tmp_path / "report.html")
    text = said(tmp_path / "report.html")
    assert "fedex, seed 0, round 1: bob was refused: A of 'q' has entries that are NaN" in text
    assert "round 2: cleo was lost: vanished" in text


def test_clients_alone_stand_beside_the_federated_model(quick, tmp_path):
    grid(tmp_path / "g", {"fedex": [0.9, 0.8]})
    for seed in (0, 1):
        path = made_up(tmp_path / "g" / f"local-{seed}", spec("local", seed=seed), 0.6)
        results = json.loads((path / "results.json").read_text())
        alone = {c: {"test": {"accuracy": 0.6 + 0.01 * i}} for i, c in enumerate(CLIENTS)}
        results["best"]["scores_alone"] = alone
        (path / "results.json").write_text(json.dumps(results))
    write_report([tmp_path / "g"], tmp_path / "report.html")
    text = said(tmp_path / "report.html")
    assert "alone (local): test accuracy" in text and "0.620" in text
    assert "The model of fedex on the same rows: 0.850" in text


def broken(folder):
    made_up(folder / "done", spec(seed=0))
    made_up(folder / "begun", spec(seed=1), None, rounds=(1, 3), rows=100)
    made_up(folder / "empty", spec(seed=2), None, rounds=())
    damaged = made_up(folder / "damaged", spec("fedit", seed=0))
    lines = (damaged / "metrics.jsonl").read_text().splitlines()
    (damaged / "metrics.jsonl").write_text("\n".join([lines[0], '{"round":', lines[2]]))
    (made_up(folder / "unreadable", spec(seed=3)) / "recipe.yaml").write_text(": : :")
    (folder / "not-a-run").mkdir()
    return folder


def test_a_broken_collection_still_gives_a_page_that_says_so(quick, tmp_path):
    write_report([broken(tmp_path / "g"), tmp_path / "absent"], tmp_path / "report.html")
    text = said(tmp_path / "report.html")
    for note in (
        "begun: no record of round 2",
        "empty: no round is recorded yet",
        "damaged: metrics.jsonl: line 2 is damaged",
        "unreadable: left out",
        "absent: no run there",
    ):
        assert note in text
    assert "5 runs" not in text and "4 runs, 2 finished" in text


@pytest.mark.parametrize("rounds", [(), (1,)])
def test_a_run_that_has_just_begun(tmp_path, rounds):
    write_report([made_up(tmp_path / "run", spec(), None, rounds=rounds)], tmp_path / "r.html")
    assert f"Not finished: {len(rounds)} of 3 rounds" in said(tmp_path / "r.html")


def test_other_data_is_told_at_the_top(quick, tmp_path):
    made_up(tmp_path / "g" / "a", spec(seed=0))
    made_up(tmp_path / "g" / "b", spec("fedit", seed=0), rows=7)
    write_report([tmp_path / "g"], tmp_path / "report.html")
    text = said(tmp_path / "report.html")
    assert "2 different tasks, data sets or models" in text and "train: 7 rows" in text
    assert text.index("2 different") < text.index("Verdict")
    assert "beats" not in text.partition("Scores")[0]


def test_scores_that_are_not_numbers(tmp_path):
    """NaN is null in JSON."""
    path = made_up(tmp_path / "g" / "a", spec())
    for file in ("metrics.jsonl", "results.json"):
        text = (path / file).read_text()
        (path / file).write_text(re.sub(r'"(accuracy|score|loss)": [0-9.]+', r'"\1": null', text))
    made_up(tmp_path / "g" / "b", spec("fedit"))
    write_report([tmp_path / "g"], tmp_path / "report.html")
    assert "Scores" in said(tmp_path / "report.html")


def test_scores_of_zero_are_scores(quick, tmp_path):
    """What a small model gets: a column must not vanish as if nothing had been scored."""
    grid(tmp_path / "g", {"fedex": [0.0, 0.0], "fedit": [0.0, 0.0]})
    write_report([tmp_path / "g"], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "test accuracy" in page and page.count("<td>0.000 ± 0.000</td>") >= 4


def test_every_metric_of_the_judged_rows_is_there(quick, tmp_path):
    for seed, f1 in enumerate((0.25, 0.75)):
        run = made_up(tmp_path / f"run{seed}", spec(seed=seed))
        results = json.loads((run / "results.json").read_text())
        results["best"]["scores"]["test"]["f1"] = f1
        (run / "results.json").write_text(json.dumps(results))
    write_report([tmp_path], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "All metrics, test" in page and "<td>0.500 ± 0.354</td>" in page


def test_only_reports_are_replaced_and_runs_stay_as_they_are(tmp_path, monkeypatch):
    drawn = Drawn("score-by-round", lines("", "", "", [Series("a", [1], [2])]), "")
    monkeypatch.setattr("fedex_lora.experiments.report.page.of_task", lambda study, task: [drawn])
    run = made_up(tmp_path / "run", spec())
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    write_report([run], run / "report.html")
    write_report([run], run / "report.html")
    after = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    new = {f for f in after if f not in before}
    assert all(after[f] == content for f, content in before.items())
    assert all(f.name == "report.html" or f.parent.name == "report-plots" for f in new)
    for file in (run / "report.html", run / "report-plots" / "score-by-round.png"):
        ours = file.read_bytes()
        file.write_text("my own notes")
        with pytest.raises(UserError, match="no report of this program"):
            write_report([run], run / "report.html")
        assert file.read_text() == "my own notes"
        file.write_bytes(ours)


@pytest.mark.parametrize("where", ["a/file", "folder"])
def test_places_that_cannot_be_written(quick, tmp_path, where):
    run = made_up(tmp_path / "run", spec())
    (tmp_path / "a").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be"):
        write_report([run], tmp_path / where)


def test_the_command_line(command, quick, tmp_path):
    run = made_up(tmp_path / "run", spec())
    code, out, _ = command("report", run)
    assert code == 0 and "report.html" in out and (run / "report.html").exists()
    code, _, err = command("report", tmp_path / "absent")
    assert code == 2 and "no run there" in err and "Traceback" not in err
    code, _, err = command("report", run, run)
    assert code == 2 and "--out" in err
    code, _, err = command("report", run, "--out", run / "metrics.jsonl")
    assert code == 2 and "metrics.jsonl.html" in err
    code, out, _ = command("claims", run)
    assert code == 0 and "not tested by these runs" in out and "not seen: the deviation" in out
    code, out, _ = command("deviation", run, "--csv", tmp_path / "d.csv")
    assert code == 0 and "root mean square" in out
    assert (tmp_path / "d.csv").read_text().count("\n") == 1 + 8 * 3
    code, _, err = command("deviation", run, "--round", 9)
    assert code == 2 and "--round: 9" in err
    first, *lines = (run / "metrics.jsonl").read_text().splitlines()
    unmeasured = {k: v for k, v in json.loads(first).items() if k != "deviation_by_site"}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(unmeasured), *lines, ""]))
    code, out, _ = command("deviation", run)  # as a method whose first rounds have no factors
    assert code == 0 and "root mean square" in out
    code, _, err = command("deviation", made_up(tmp_path / "local", spec("local")))
    assert code == 2 and "no deviation" in err


def test_watching_ends_with_the_runs(command, quick, tmp_path, monkeypatch):
    run = made_up(tmp_path / "run", spec(), None, rounds=(1,))
    pages = []

    def sleep(seconds):
        pages.append((run / "report.html").read_text())
        assert seconds == 7
        made_up(tmp_path / "done", spec())
        (run / "results.json").write_text((tmp_path / "done" / "results.json").read_text())

    monkeypatch.setattr(time, "sleep", sleep)
    assert reports.time is time
    code, _, _ = command("report", run, "--watch", "--every", 7)
    assert code == 0 and len(pages) == 1
    assert 'http-equiv="refresh" content="7"' in pages[0]
    assert "http-equiv" not in (run / "report.html").read_text()


def test_control_characters_which_html_forbids_are_made_visible(quick, tmp_path):
    path = made_up(tmp_path / "run", spec())
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    records[0]["lost"] = {"bob\x1b[2J": "van\x00ished\u202e"}
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_report([path], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "bob\ufffd[2J was lost: van\ufffdished\ufffd" in text
    assert not {"\x00", "\x1b", "\u202e"} & set(text)


def test_figures_repeat_and_their_ids_do_not_collide():
    series = [Series(f"_{EVIL_CLIENT}\n{i}", [1, 2, 3], [1, i, 2], i) for i in range(10)]
    drawn = Drawn("x", lines(EVIL, "round", "score", series, log_y=True), "")
    svg = saved(drawn.figure, "x", "svg")
    assert svg == saved(drawn.figure, "x", "svg")
    one, two = (ElementTree.fromstring(inline(svg, name, EVIL)) for name in ("a", "b"))
    ids = [[e.get("id") for e in root.iter() if e.get("id")] for root in (one, two)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    text = inline(svg, "a", EVIL)
    assert "<script" not in text and "#ffffff" not in text and "mathdefault" not in text
    assert "var(--c0)" in text and "currentColor" in text
