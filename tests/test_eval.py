"""Scoring and studies."""

import json
import re
import subprocess
import sys

import pytest
import torch

import data
import eval as evaluation
import qcrd
from data import UserError
from tests.conftest import ROOT
from tests.helpers import make_options
from tests.test_runs import SMALL, student  # noqa: F401
from tests.test_teachers import KEY, Server


def test_distinct_2_is_distinct_word_pairs_over_all():
    assert evaluation.distinct_2(["a b c", "a b d"]) == 3 / 4  # ab twice, bc, bd
    assert evaluation.distinct_2([""]) == 0


def test_summary_is_mean_and_standard_error_in_points():
    mean, error = evaluation.summary([0.5, 0.7])
    assert mean == pytest.approx(60) and error == pytest.approx(10)  # sd 14.14 over the root of 2


def test_a_run_is_scored_again_as_it_scored_itself(student, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 60, "valid": 10, "test": 20})
    run = tmp_path / "run"
    result = qcrd.main(["--student", student, "--out", str(run), *SMALL])
    scored = evaluation.score(str(run), evaluation.Options())
    assert scored["accuracy"] == result["accuracy"] and scored["validity"] == result["validity"]
    assert 0 < scored["mean D score"] < 1 and 0 <= scored["distinct-2"] <= 1
    folder = evaluation.score(str(run / "student"), evaluation.Options())
    assert folder["accuracy"] == result["accuracy"]


def test_a_study_runs_what_is_missing_and_goes_on(student, tmp_path):  # noqa: F811
    small = "--train-size 16 --rounds 1 --batch-size 8 --judge-steps 1 --max-target 8"
    command = [
        sys.executable,
        str(ROOT / "eval.py"),
        "--study",
        "labels",
        "--student",
        student,
        "--seeds",
        "2",
        "--options",
        small,
    ]
    first = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280
    )
    assert first.returncode == 0, first.stderr
    results = sorted(tmp_path.rglob("result.json"))
    assert len(results) == 6
    table = next((tmp_path / "runs" / "studies").glob("labels-*.md")).read_text()
    assert "| dss |" in table and "±" in table and table in first.stdout
    results[0].unlink()  # as if the study had been killed
    times = [p.stat().st_mtime_ns for p in results[1:]]
    again = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280
    )
    assert again.returncode == 0 and results[0].exists()
    assert [p.stat().st_mtime_ns for p in results[1:]] == times


def test_paired_difference_by_hand():
    ours, theirs = (
        [{"accuracy": x} for x in values] for values in ((0.8, 0.9, 0.7), (0.7, 0.7, 0.7))
    )
    # differences of 10, 20 and 0 points: mean 10, standard error 10 / sqrt(3); t = 4.30 at two degrees of freedom
    gain, half = evaluation.paired_difference(ours, theirs, "accuracy")
    assert gain == pytest.approx(10) and half == pytest.approx(4.30 * 10 / 3**0.5)


def test_a_row_is_compared_with_dss_on_the_same_data():
    assert evaluation.baseline_of("--judge none --lag 3") == "--method dss"
    assert evaluation.baseline_of("--method mi --labels teacher") == "--method dss --labels teacher"
    for name in ("noise", "size"):
        rows = evaluation.STUDIES[name].values()
        assert {evaluation.baseline_of(row) for row in rows} == {
            row for row in rows if "dss" in row
        }


def test_studies_share_the_runs_they_have_in_common():
    options = evaluation.Options()
    assert evaluation.STUDIES["methods"]["dss"] == evaluation.STUDIES["ablation"]["dss"]
    whole = {"methods": "qcrd", "ablation": "+ quality judge (QJ): qcrd", "schemes": "minmax",
             "negatives": "student, j = 5", "judge": "own, bce", "size": "qcrd, 100%"}  # fmt: skip
    assert [evaluation.STUDIES[study][row] for study, row in whole.items()] == [""] * 6
    defaults = qcrd.parse_options([])
    assert (defaults.method, defaults.scheme, defaults.lag, defaults.judge) == (
        "qcrd",
        "minmax",
        5,
        "own",
    )
    assert (defaults.judge_loss, defaults.negatives, defaults.positives) == (
        "bce",
        "student",
        "all",
    )
    assert evaluation.run_path(options, "--method dss", 3).name == "tiny-method-dss-s3"


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ("A", "B", "A"),
        ("b.", "**A**", "B"),
        ("A", "A", "tie"),
        ("tie", "B", "tie"),
        ("", "nonsense", "tie"),
    ],
)
def test_one_is_better_only_where_both_orders_agree(forward, backward, expected):
    assert evaluation.verdict(forward, backward) == expected


def test_the_sign_test_is_the_two_sided_binomial_one():
    assert evaluation.sign_test(3, 0) == pytest.approx(0.25)  # 2 / 2 ** 3
    assert evaluation.sign_test(1, 4) == pytest.approx(2 * (5 + 1) / 32)
    assert evaluation.sign_test(2, 2) == 1 and evaluation.sign_test(0, 0) == 1


def two_runs(tmp_path) -> list[str]:
    """Scored runs on the toy: the first's rationales are good, but for one question where the second's is."""
    for name, good in (("one", "wins"), ("two", "loses")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"task": "toy", "data": ""}))
        rows = [{"id": f"toy-test-{i}", "rationale": f"it {good} {i}"} for i in range(4)]
        rows[3]["rationale"] = f"it {'loses' if name == 'one' else 'wins'}"
        qcrd.write_jsonl(tmp_path / name / "predictions.jsonl", rows)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def test_a_judge_compares_two_runs_in_both_orders_and_asks_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server(answer=lambda text: re.findall("Explanation (A|B): it wins", text)[0])
    options = evaluation.Options(runs=two_runs(tmp_path), judge="api:m", api_base=server.url)
    assert evaluation.compare(options) == {"A": 3, "tie": 0, "B": 1}
    assert len(server.times) == 8
    assert evaluation.compare(options) == {"A": 3, "tie": 0, "B": 1} and len(server.times) == 8
    first_only = Server(
        answer=lambda text: "A"
    )  # a judge that always takes the first has no opinion
    options = evaluation.Options(
        runs=options.runs, judge="api:m", api_base=first_only.url, temperature=0.1
    )
    assert evaluation.compare(options) == {"A": 0, "tie": 4, "B": 0}
    with pytest.raises(UserError, match="two runs"):
        evaluation.compare(evaluation.Options(runs=["one"], judge="api:m"))


def test_pictures_of_a_run_are_drawn(student, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 60, "valid": 10, "test": 20})
    run = tmp_path / "run"
    qcrd.main(["--student", student, "--out", str(run), *SMALL])
    evaluation.main(["--runs", str(run), "--plot"])
    for name in ("losses.png", "scores.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_studies_print_differences_and_are_drawn_from_their_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = evaluation.Options(study=["methods", "noise", "size"], seeds=2, plot=True)
    for row in {row for name in options.study for row in evaluation.STUDIES[name].values()}:
        for seed in range(2):
            out = evaluation.run_path(options, row, seed)
            out.mkdir(parents=True)
            better = 0 if "dss" in row else (0.1, 0.2)[seed]
            result = {"accuracy": 0.5 + seed / 10 + better}
            if "finetune" not in row:
                result["validity"] = result["accuracy"]
            (out / "result.json").write_text(json.dumps(result))
    evaluation.studies(options)
    printed = capsys.readouterr().out
    # 10 and 20 points: mean 15, standard error 5, t = 12.71 at one degree of freedom
    assert (
        "| qcrd | 70.0 ± 10.0 | 70.0 ± 10.0 | +15.0 [-48.6, +78.6] | +15.0 [-48.6, +78.6] |"
        in printed
    )
    assert "| dss, 60% | 55.0 ± 5.0 | 55.0 ± 5.0 |  |  |" in printed
    for name in ("methods", "noise", "size"):
        assert "validity" in (tmp_path / "runs" / "studies" / f"{name}-toy-tiny.svg").read_text()
    for file in tmp_path.rglob("result.json"):  # as on a task whose rationales cannot be checked
        file.write_text(json.dumps({"accuracy": 0.5}))
    evaluation.studies(options)
    for name in ("methods", "noise", "size"):
        picture = (tmp_path / "runs" / "studies" / f"{name}-toy-tiny.svg").read_text()
        assert "accuracy" in picture and "validity" not in picture


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--study", "methods", "size2"], "--study size2 is not one of methods, ablation"),
        (["--study", "noise", "--task", "svamp"], "--study noise needs --task toy"),
        (["--study", "methods", "--seeds", "0"], "--seeds and --jobs must be at least 1"),
        ([], "nothing to do: name --runs"),
    ],
)
def test_what_cannot_be_studied_is_refused(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluation.main(argv)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("--scheme", "wmean"),
        ("--scheme", "sampling", "--quality", "printed"),
        ("--judge", "none", "--negatives", "none"),
        ("--method", "finetune"),
        ("--method", "single"),
    ],
)
def test_a_questions_way_is_shown_with_the_numbers_of_training(
    student,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
    changes,
):
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 60, "valid": 10, "test": 20})
    run = tmp_path / "run"
    qcrd.main(["--student", student, "--out", str(run), *SMALL, *changes])
    capsys.readouterr()
    evaluation.main(["--runs", str(run), "--show", "2"])
    shown = capsys.readouterr().out
    assert max(map(len, shown.split("\n"))) <= 100
    assert shown.count("Question\n") == shown.count("predicts ") == 2
    sums = re.findall(r"= (-?[\d.]+) - ([\d.]+) \* (-?[\d.]+) = (-?[\d.]+)\n", shown)
    for pos, beta, neg, total in sums:
        assert float(pos) - float(beta) * float(neg) == pytest.approx(float(total), abs=2e-3)
    assert len(sums) == (0 if "--method" in changes else 2)
    one = re.findall(r"= (toy-train-\d+) =", shown)[1]
    evaluation.main(["--runs", str(run), "--show", one])
    assert re.findall(r"= (toy-train-\d+) =", capsys.readouterr().out) == [one]
    with pytest.raises(
        UserError, match="--show nothing: name a count or an id, such as toy-train-"
    ):
        evaluation.main(["--runs", str(run), "--show", "nothing"])


def test_a_run_is_shown_without_its_teachers_server(student, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 60, "valid": 10, "test": 20})
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server(answer=lambda text: "<Explanation>: one and two are three\n<Answer>: ( 1 + 2 )")
    run = str(tmp_path / "run")
    qcrd.main(
        [
            "--student",
            student,
            "--out",
            run,
            *SMALL,
            "--teacher",
            "api:m",
            "--api-base",
            server.url,
            "--k",
            "2",
        ]
    )
    asked = len(server.times)
    capsys.readouterr()
    evaluation.main(["--runs", run, "--show", "1"])
    shown = capsys.readouterr().out
    assert (
        "m: ( 1 + 2 ); " in shown
        and "one and two are three" in shown
        and len(server.times) == asked
    )
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(
        UserError, match="run is not the directory of a finished run: --show needs one"
    ):
        evaluation.main(["--runs", run, "--show", "1"])


def test_a_shown_questions_terms_by_hand(capsys):
    options = make_options(scheme="minmax", quality="relative", delta=3.0)
    rows = torch.tensor
    l, score = rows([[0.5, 0.9, 2.0, 4.0]]), rows([[0.5, 0.9, 0.25, 0.1]])
    weighed = qcrd.Batch(
        [], [["a", "b", "c", "d"]], rows([[1, 1, 2, 3]]), rows([[1.0, 0, 0, 0]]), rows([[0, 0, 0.0, 1.0]]),
        rows([[1.2, 1.0, 0.75, 0.9]]),
    )  # fmt: skip
    evaluation.show_loss(options, weighed, 0, l, score)
    printed = capsys.readouterr().out
    assert "positive               l  0.500  s 0.500  share 1.00  chosen by min, eq. 4" in printed
    assert (
        "student's, of round 0  l  4.000  s 0.100  share 1.00  chosen by max, eq. 5; beyond delta"
        in printed
    )
    assert (
        "s / 0.500, the mean of those chosen for 1 questions (eq. 6); 1 - s of a negative"
        in printed
    )
    assert "L_pos = 1.00 * 1.200 * 0.500 = 0.600" in printed
    assert "L_neg = 1.00 * 0.900 * min(4.000 - 3, 0) = 0.000" in printed
    assert "= 0.600 - 0.2 * 0.000 = 0.600" in printed


def test_the_readme_names_the_line_of_every_function_on_its_map():
    code = (ROOT / "qcrd.py").read_text().split("\n")
    rows = re.findall(r"\| `(\w+)` \| (\d+)", (ROOT / "README.md").read_text())
    assert len(rows) >= 10
    for name, line in rows:
        assert re.match(rf"(def|class) {name}\b", code[int(line) - 1]), (
            f"{name} is not at line {line} of qcrd.py"
        )
