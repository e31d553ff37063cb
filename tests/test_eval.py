"""Scoring and studies."""

import subprocess
import sys

import pytest

import data
import eval as evaluation
import qcrd
from tests.conftest import ROOT
from tests.test_runs import SMALL, student  # noqa: F401


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
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert first.returncode == 0, first.stderr
    results = sorted(tmp_path.rglob("result.json"))
    assert len(results) == 6
    table = next((tmp_path / "runs" / "studies").glob("labels-*.md")).read_text()
    assert "| dss |" in table and "±" in table and table in first.stdout
    results[0].unlink()  # as if the study had been killed
    times = [p.stat().st_mtime_ns for p in results[1:]]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert again.returncode == 0 and results[0].exists()
    assert [p.stat().st_mtime_ns for p in results[1:]] == times


def test_studies_share_the_runs_they_have_in_common():
    options = evaluation.Options(study="methods")
    assert evaluation.STUDIES["methods"]["dss"] == evaluation.STUDIES["ablation"]["dss"]
    assert evaluation.run_path(options, "--method dss", 3).name == "tiny-method-dss-s3"
