"""Scoring, comparing, showing and drawing runs; studies; the judge of rationales."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import qcrd
from data import UserError
from qcrd import Rationale
from tests.conftest import ROOT
from tests.helpers import a_student, make_options, tokenizer
from tests.test_teachers import KEY, Server

SMALL = ["--train-size", "48", "--rounds", "3", "--lag", "1", "--batch-size", "8"]
SMALL += ["--disc-steps", "4", "--disc-every", "2", "--max-target", "24"]
SMALL += ["--precision", "fp32"]  # on a GPU too, since figures are compared


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> str:
    """A folder with a small student of random weights, loaded as any other."""
    folder = tmp_path_factory.mktemp("student")
    a_student().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def small_toy(monkeypatch):
    """The toy cut short, one thread, and a working directory of its own."""
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 60, "valid": 10, "test": 20})
    torch.set_num_threads(1)


@pytest.fixture
def train(student, tmp_path, capsys):
    """Train a small run of that name; its directory."""

    def run(name: str, *more: str) -> str:
        qcrd.main(["--student", student, "--out", str(tmp_path / name), *SMALL, *more])
        capsys.readouterr()
        return str(tmp_path / name)

    return run


@pytest.fixture(scope="session")
def trained(student, tmp_path_factory) -> Path:
    """Small runs of qcrd and dss, made once: `copy` them where a test changes something."""
    folder = tmp_path_factory.mktemp("trained")
    sizes, data.TOY_SIZES = data.TOY_SIZES, {"train": 60, "valid": 10, "test": 20}
    for method in ("qcrd", "dss"):
        out = ["--out", str(folder / method), "--method", method]
        qcrd.main(["--student", student, *out, *SMALL])
    data.TOY_SIZES = sizes
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of the small qcrd run."""
    return Path(shutil.copytree(trained / "qcrd", tmp_path / "copy"))


def change(path: Path, **changes: object) -> None:
    """Overwrite what the object in a file says."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --------------------------------------------------------------------------------------------------
# Scoring


def test_distinct_2_is_distinct_word_pairs_over_all():
    assert evaluation.distinct_2(["a b c", "a b d"]) == 3 / 4  # ab twice, bc, bd
    assert evaluation.distinct_2([""]) == 0


def test_a_run_is_scored_again_as_it_scored_itself(copy, capsys):
    result = json.loads((copy / "result.json").read_text())
    rows = (copy / "predictions.jsonl").read_text()
    (copy / "predictions.jsonl").unlink()
    scored = evaluation.score_run(str(copy), evaluation.Options())
    assert scored["accuracy"] == result["accuracy"] and scored["validity"] == result["validity"]
    assert 0 < scored["mean D score"] < 1 and 0 <= scored["distinct-2"] <= 1
    assert (copy / "predictions.jsonl").read_text() == rows
    folder = evaluation.score_run(str(copy / "student"), evaluation.Options())
    assert folder["accuracy"] == result["accuracy"] and "mean D score" not in folder


def test_a_tilde_in_runs_is_the_home_directory(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert evaluation.score_run("~/copy", evaluation.Options())["accuracy"] >= 0
    assert not Path("~").exists()


def own_task(folder: Path, answer: int) -> Path:
    """A task of ten sums in a file my.jsonl."""
    folder.mkdir()
    sums = [{"input": f"What is {i} + {answer}?", "label": str(i + answer)} for i in range(10)]
    rows = [row | {"rationale": f"{row['input']} {row['label']}"} for row in sums]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_is_not_scored_with_another_file_of_the_same_name(student, tmp_path, monkeypatch):
    monkeypatch.chdir(own_task(tmp_path / "a", 1))
    run = str(tmp_path / "run")
    short = ["--rounds", "1", "--disc", "none", "--negatives", "none", "--max-target", "8"]
    qcrd.main(["--task", "my.jsonl", "--student", student, "--out", run, *short])
    monkeypatch.chdir(own_task(tmp_path / "b", 2))
    for command in (["--runs", run], ["--runs", run, "--show", "1"], ["--compare", run, run]):
        with pytest.raises(UserError, match=f"{tmp_path}/b/my.jsonl is not the file that {run}"):
            evaluation.main(command)
    shutil.copy(tmp_path / "a" / "my.jsonl", tmp_path / "b" / "my.jsonl")  # the same file elsewhere
    evaluation.main(["--runs", run])
    (tmp_path / "b" / "my.jsonl").write_text('{"input": "changed", "label": "1"}\n')
    with pytest.raises(UserError, match="or was changed since"):
        evaluation.main(["--runs", run])


@pytest.mark.parametrize("result", ["", "null", "[]", "{}", "nonsense"])
def test_a_result_that_is_none_is_told(copy, result):
    (copy / "result.json").write_text(result)
    for command in (["--runs"], ["--show", "1", "--runs"], ["--plot", "--runs"]):
        with pytest.raises(UserError, match="copy is not the directory of a finished run"):
            evaluation.main([*command, str(copy)])


@pytest.mark.parametrize("config", ["", "null", '{"task": "toy", "judge": "own"}', "{}"])
def test_a_config_of_another_version_is_told(copy, config):
    (copy / "config.json").write_text(config)
    with pytest.raises(UserError, match="finished run of this version"):
        evaluation.main(["--runs", str(copy)])
    with pytest.raises(UserError, match="finished run of this version"):
        evaluation.main(["--compare", str(copy), str(copy)])


def test_a_config_with_an_option_that_is_no_more_is_told(copy):
    options = json.loads((copy / "config.json").read_text())["options"]
    change(copy / "config.json", options=options | {"judge_lr": 0.1})
    with pytest.raises(UserError, match="finished run of this version"):
        evaluation.main(["--runs", str(copy)])


@pytest.mark.parametrize("left", [b"", b"not weights at all"])
def test_a_damaged_discriminator_is_told(copy, left):
    (copy / "discriminator.safetensors").write_bytes(left)
    with pytest.raises(UserError, match="safetensors is damaged.*train the run again"):
        evaluation.main(["--runs", str(copy)])


def test_messages_name_the_option_that_was_typed(copy, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/nothing is not the directory"):
        evaluation.main(["--runs", str(tmp_path / "nothing")])
    (copy / "student" / "model.safetensors").write_text("no weights")
    with pytest.raises(UserError) as told:
        evaluation.main(["--runs", str(copy)])
    assert f"--runs {copy}/student" in str(told.value) and "--student" not in str(told.value)


def test_a_closed_pipe_is_no_traceback(copy):
    sizes = "import data; data.TOY_SIZES = {'train': 60, 'valid': 10, 'test': 20}"
    code = f"{sizes}; import qcrd, eval; qcrd.run_command(eval.main)"
    command = f'{sys.executable} -c "{code}" --runs {copy} --show 3 | head -c 1'
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    assert len(done.stdout) == 1 and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------
# A question's way through the method


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("--scheme", "wmean"),
        ("--scheme", "sampling", "--quality", "printed", "--delta", "30"),
        ("--disc", "none", "--negatives", "none"),
        ("--method", "finetune"),
        ("--method", "single"),
    ],
)
def test_a_questions_way_is_shown_with_the_numbers_of_training(train, capsys, changes):
    run = train("run", *changes)
    evaluation.main(["--runs", run, "--show", "2"])
    shown = capsys.readouterr().out
    assert shown.count("Question: ") == shown.count("The student answers: ") == 2
    sums = re.findall(r"= (-?[\d.]+) - ([\d.]+) \* (-?[\d.]+) = (-?[\d.]+) \(eq. 3\)\n", shown)
    for pos, beta, neg, total in sums:
        assert float(pos) - float(beta) * float(neg) == pytest.approx(float(total), abs=2e-3)
    assert len(sums) == (0 if "--method" in changes else 2)
    for weight, l, term in re.findall(r"weight ([\d.]+) \* +(-?[\d.]+) = +(-?[\d.]+)", shown):
        assert float(weight) * float(l) == pytest.approx(float(term), abs=0.02)
    one = re.findall(r"Training question (toy-train-\d+)", shown)[1]
    evaluation.main(["--runs", run, "--show", one])
    assert re.findall(r"Training question (\S+)", capsys.readouterr().out) == [one]
    for wrong in ("nothing", "0", "-1"):
        with pytest.raises(UserError, match=f"--show {wrong}: name a count or an id, such as toy-"):
            evaluation.main(["--runs", run, f"--show={wrong}"])


def test_shown_are_questions_with_a_right_vote_and_a_negative_that_pushes(train, capsys):
    run = train("run", "--delta", "6.5")  # above some losses of the small student, below others
    evaluation.main(["--runs", run, "--show", "1000"])
    good = []
    for question in capsys.readouterr().out.split("Training question ")[1:]:
        label = re.search("Label: (.+)", question)[1]
        votes = eval_free_dict(re.search("votes: ({.*})", question)[1])
        wins = max(votes, key=lambda answer: votes[answer])
        pushes = re.search(r"L_neg = [\d.]+ - 0\.2 \* -0\.\d*[1-9]", question) is not None
        alone = sorted(votes.values())[-2:] != [2, 2]  # else the first of two winners has won
        if alone:
            good.append((data.equation_value(wins) == data.equation_value(label), pushes))
    assert good == sorted(good, reverse=True) and len(set(good)) > 1


def eval_free_dict(text: str) -> dict[str, int]:
    """Answers and counts out of a printed dict."""
    return {answer: int(count) for answer, count in re.findall(r"'([^']+)': (\d+)", text)}


def test_a_shown_questions_terms_are_what_training_computes(copy, capsys):
    evaluation.main(["--runs", str(copy), "--show", "1"])
    shown = capsys.readouterr().out
    own = evaluation.options_of(copy)
    *_, questions = qcrd.prepare(own)
    name = re.search(r"Training question (\S+)", shown)[1]
    _, model, disc, _ = evaluation.load_run(str(copy), evaluation.Options())
    rows = evaluation.rows_of(copy / "negatives.jsonl", "id", "output")
    negatives = {row["id"]: row["output"] for row in rows if row["output"]}
    batch = [q for some in qcrd.round_batches(questions, own, 2) for q in some]
    row = [q.example.id for q in batch].index(name)
    chosen = qcrd.choose(model, disc, batch, negatives, own)
    of_question = [qcrd.replace(r, row=0) for r in chosen if r.row == row]
    with qcrd.without_dropout(model.model):
        losses = qcrd.student_losses(model, [batch[row]], of_question, own)
    numbers = re.search(r"L_neg = (-?[\d.]+) - 0.2 \* (-?[\d.]+) = (-?[\d.]+)", shown).groups()
    expected = [losses["L_pos"].item(), losses["L_neg"].item(), losses["L_cl"].item()]
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=1e-3)


def test_a_shown_questions_terms_by_hand(capsys):
    options = make_options(scheme="minmax", quality="relative", delta=3.0, beta=0.2)
    positive = Rationale(0, "a", True, share=1.0, score=0.5, weight=1.2)
    student_wrote = Rationale(0, "c", False, True, share=1.0, score=0.1, weight=0.9)
    rationales = [Rationale(0, "a", True), Rationale(0, "b", False), Rationale(0, "c", False, True)]
    known = {("a", True, False): positive, ("c", False, True): student_wrote}
    evaluation.show_losses(options, rationales, [0.5, 2.0, 2.5], known)
    printed = capsys.readouterr().out
    for line in (
        "positive   l  0.500  s 0.500  share 1.00  weight 1.200 *  0.500 =  0.600",
        "negative   l  2.000  s   nan  share 0.00  weight 0.000 * -1.000 = -0.000",
        "student's  l  2.500  s 0.100  share 1.00  weight 0.900 * -0.500 = -0.450",
        "L_cl = L_pos - beta * L_neg = 0.600 - 0.2 * -0.450 = 0.690 (eq. 3)",
    ):
        assert line in printed
    evaluation.show_losses(options, rationales, [0.5, 2.0, 4.0], known)  # beyond the margin
    assert "weight 0.900 *  0.000 =  0.000" in capsys.readouterr().out


def test_a_run_is_shown_without_its_teachers_server(train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server(answer=lambda text: "<Explanation>: one and two are three\n<Answer>: ( 1 + 2 )")
    run = train("run", "--teacher", "api:m", "--api-base", server.url, "--k", "2")
    asked = len(server.times)
    evaluation.main(["--runs", run, "--show", "1"])
    shown = capsys.readouterr().out
    assert "votes: {'( 1 + 2 )': 2}" in shown and "one and two are three" in shown
    # where they are no longer cached, nobody pays for others
    monkeypatch.setattr(data, "CACHE", tmp_path / "elsewhere")
    for how in (["--show", "1"], ["--plot"]):
        with pytest.raises(UserError, match="96 samples of api:m are no longer in .*QCRD_CACHE"):
            evaluation.main(["--runs", run, *how])
    assert len(server.times) == asked


def test_a_run_of_some_of_the_questions_is_scored_again_as_it_scored_itself(train):
    run = Path(train("run", "--train-size", "5", "--rounds", "1"))
    before = (run / "predictions.jsonl").read_text()
    evaluation.main(["--runs", str(run)])
    assert (run / "predictions.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("predictions.jsonl", ["--compare", "RUN", "RUN"]),
        ("metrics.jsonl", ["--runs", "RUN", "--plot"]),
        ("negatives.jsonl", ["--runs", "RUN", "--show", "1"]),
    ],
)
def test_a_row_that_is_damaged_is_told(copy, file, how):
    rows = evaluation.rows_of(copy / file)
    left = {"id": rows[0].get("id")}
    qcrd.write_jsonl(copy / file, [left, *rows[1:]])
    command = [str(copy) if word == "RUN" else word for word in how]
    with pytest.raises(UserError, match=f"{file} has a row without '(label|round|output)'"):
        evaluation.main(command)


def test_what_is_gone_from_a_run_is_told(copy):
    for how in ("--show", "--plot"):
        with pytest.raises(UserError, match="is a student alone|cannot be read"):
            evaluation.main(["--runs", str(copy / "student"), how, *["1"][: how == "--show"]])
    rows = evaluation.rows_of(copy / "negatives.jsonl")
    foreign = [[], rows[1:], [{"id": ["a"], "output": "x"}], [*rows[1:], rows[0] | {"output": 3}]]
    for other in foreign:
        qcrd.write_jsonl(copy / "negatives.jsonl", other)
        with pytest.raises(UserError, match="negatives.jsonl has not what the student wrote"):
            evaluation.main(["--runs", str(copy), "--show", "1"])
    (copy / "negatives.jsonl").unlink()
    with pytest.raises(UserError, match="negatives.jsonl"):
        evaluation.main(["--runs", str(copy), "--show", "1"])


# --------------------------------------------------------------------------------------------------
# Two runs


def test_an_interval_by_hand():
    # 10, 20 and 0 points: mean 10, standard error 10 / sqrt(3); t = 4.30 at two degrees of freedom
    mean, half = evaluation.interval(np.array([0.1, 0.2, 0.0]))
    assert mean == pytest.approx(10) and half == pytest.approx(4.30 * 10 / 3**0.5)
    mean, half = evaluation.interval(np.array([0.0, 1.0] * 50))
    assert mean == 50 and half == pytest.approx(1.984 * 100 * 0.5 / 99**0.5, rel=1e-3)
    _, half = evaluation.interval(np.arange(17) / 100)  # t is 2.120 at 16 degrees of freedom
    assert half == pytest.approx(2.12 * np.arange(17).std() / 4, rel=3e-3)
    mean, half = evaluation.interval(np.array([0.5, 0.7]))
    assert mean == pytest.approx(60) and math.isnan(half)  # two values tell nothing of it
    assert evaluation.spelled(mean, half) == "60.0" and evaluation.spelled(math.nan, half) == ""
    assert evaluation.spelled(-1.25, 3.14) == "-1.2 ± 3.1"


def test_two_runs_are_compared_question_by_question(trained, tmp_path, capsys):
    for name, right in (("qcrd", 8), ("dss", 3)):
        shutil.copytree(trained / name, tmp_path / name)
        file = tmp_path / name / "predictions.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for i, row in enumerate(rows):
            row |= {"correct": i < right, "valid": i % 2 == 0}
        qcrd.write_jsonl(file, rows)
    evaluation.main(["--compare", str(tmp_path / "qcrd"), str(tmp_path / "dss")])
    printed = capsys.readouterr().out
    # five of twenty differences are 1: mean 0.25, standard deviation sqrt(0.25 * 0.75), n - 1 = 19
    half = 100 * 2.093 * (0.25 * 0.75 / 19) ** 0.5  # t at 19 degrees of freedom
    assert f"accuracy: A 40.0%, B 15.0%, A - B 25.0 ± {half:.1f} points" in printed
    assert "validity: A 50.0%, B 50.0%, A - B 0.0 ± 0.0 points" in printed
    assert "95% interval, by Student's t, paired over these 20 questions" in printed
    assert "On 5 questions one is right and the other wrong." in printed
    assert re.findall(r"A, then B, on toy-test-(\d+)", printed) == ["3", "4", "5", "6", "7"]
    assert printed.count("The student answers: ") == 10


def test_runs_of_different_tasks_are_not_compared(trained, student, tmp_path, monkeypatch):
    monkeypatch.chdir(own_task(tmp_path / "a", 1))
    short = ["--rounds", "1", "--disc", "none", "--negatives", "none", "--max-target", "8"]
    qcrd.main(["--task", "my.jsonl", "--student", student, "--out", "run", *short])
    both = [str(trained / "qcrd"), "run"]
    for command in (["--compare", *both], ["--judge", "api:m", "--runs", *both]):
        with pytest.raises(UserError, match="are not two runs of one task"):
            evaluation.main(command)


def test_predictions_of_other_questions_are_not_compared(copy):
    rows = (copy / "predictions.jsonl").read_text().splitlines()
    (copy / "predictions.jsonl").write_text("\n".join(rows[1:]))
    with pytest.raises(UserError, match="answered other test questions: score it again"):
        evaluation.main(["--compare", str(copy), str(copy)])


# --------------------------------------------------------------------------------------------------
# Studies


def test_studies_are_rows_of_options_that_the_program_has():
    for name, rows in evaluation.STUDIES.items():
        for label, row in rows.items():
            against = rows[row.get("against", "dss" if "dss" in rows else label)]
            assert against.get("method") == "dss" or against is row
            # on the same questions, samples and labels
            for key in ("labels", "toy_errors", "train_size"):
                assert row.get(key) == against.get(key), f"{name}: {label}"
            for key, value in row.items():
                if key not in ("against", "fixed_student"):
                    known = getattr(qcrd.Options(), key)
                    assert type(value) is type(known)
                    assert value != known  # or the run would not be shared


def test_the_noise_study_has_three_error_rates():
    rows = evaluation.STUDIES["noise"].values()
    rates = [row.get("toy_errors", qcrd.Options().toy_errors) for row in rows]
    assert rates == [0.0] * 3 + [0.25] * 3 + [0.5] * 3


def test_studies_share_the_runs_they_have_in_common():
    options = evaluation.Options(seeds=4)
    plans = {name: evaluation.plan(options, name) for name in evaluation.STUDIES}
    whole = {
        "methods": "qcrd",
        "ablation": "+ quality by D (QJ): qcrd",
        "schemes": "minmax",
        "negatives": "student, j = 5",
        "disc": "own, bce",
        "size": "qcrd, 100%",
    }
    outs = {plans[study][row][3].out for study, row in whole.items()}
    assert outs == {Path("runs/studies/toy/tiny-s3")}
    assert len({plans[study]["dss"][0].out for study in ("methods", "ablation", "disc")}) == 1
    fixed = plans["negatives"]["fixed dss student"][2]
    assert f"--fixed-student={plans['negatives']['dss'][2].out}" in fixed.words


def test_a_row_is_the_run_that_it_says():
    options = evaluation.Options(options="--rounds 4 --lr 0.001")
    run = qcrd.parse_options(evaluation.plan(options, "size")["dss, 25%"][1].words)
    assert (run.method, run.train_size, run.rounds, run.lr, run.seed) == ("dss", 0.25, 4, 0.001, 1)
    assert run.task == "toy" and run.student == "tiny" and run.positives == "one"


@pytest.mark.parametrize(
    "typed", ["--seed 3", "--seed=3", "--out x", "--task svamp", "--data x", "--device cpu"]
)
def test_a_study_refuses_what_it_sets_itself(typed):
    for more in (typed, f"--rounds 2 {typed}"):
        with pytest.raises(UserError, match=f"--options {typed[:5]}.*the study methods sets that"):
            evaluation.plan(evaluation.Options(options=more), "methods")


def test_a_study_refuses_what_its_rows_set():
    for study, typed in (("methods", "--method dss"), ("size", "--train_size 0.1")):
        with pytest.raises(UserError, match=f"the study {study} sets that itself"):
            evaluation.plan(evaluation.Options(options=typed), study)
    evaluation.plan(evaluation.Options(options="--train-size 0.1"), "methods")


def test_files_of_one_name_have_folders_of_their_own(tmp_path):
    first, second = own_task(tmp_path / "a", 1), own_task(tmp_path / "b", 2)
    outs = []
    for folder in (first, second, first):
        options = evaluation.Options(task=str(folder / "my.jsonl"))
        outs.append(evaluation.plan(options, "methods")["dss"][0].out)
    assert outs[0] == outs[2] != outs[1]
    assert outs[0].parent.name.startswith("my-") and outs[0].name == outs[1].name


STUDY = "--train-size 16 --rounds 1 --batch-size 8 --disc-steps 1 --max-target 8"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory, where each process that starts in it has the toy cut short."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data\n"
        "data.TOY_SIZES = {'train': 60, 'valid': 10, 'test': 20}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_study_runs_what_is_missing_and_goes_on(student, place, capsys):
    command = ["--study", "labels", "--seeds", "1", "--student", student, "--options", STUDY]
    evaluation.main([*command, "--device", "cpu"])
    out = capsys.readouterr().out
    assert "3 runs, 3 of them to be made, 2 at a time" in out
    assert all("Device: cpu" in log.read_text() for log in place.rglob("log.txt"))
    results = sorted(place.rglob("result.json"))
    assert len(results) == 3
    files = {path.suffix: path for path in (place / "runs/studies/toy").glob("*-labels.*")}
    table, sheet = files[".md"].read_text(), files[".csv"].read_text()
    assert "| dss |" in table and table in out
    assert " ± " not in table.split("\n\n")[0]  # no interval for one seed
    for text in (table, sheet):
        assert "[0]" in text and "--rounds 1 --batch-size 8" in text and "--labels" in text
    results[0].write_text("null")  # as if the study had been killed
    times = [path.stat().st_mtime_ns for path in results[1:]]
    evaluation.main(command)
    assert "3 runs, 1 of them to be made" in capsys.readouterr().out
    assert "accuracy" in results[0].read_text()
    assert [path.stat().st_mtime_ns for path in results[1:]] == times
    # what was made with other options, or from another student, is not taken
    config = results[1].parent / "config.json"
    options = json.loads(config.read_text())["options"]
    change(config, options=options | {"toy_errors": 0.4})
    with pytest.raises(UserError) as error:
        evaluation.main(command)
    told = str(error.value)
    assert told.startswith(str(results[1].parent.relative_to(place))) and "--toy-errors 0.4" in told
    assert "move it away" in told and "--overwrite" not in told


@pytest.mark.parametrize(("student", "set_to"), [("tiny", None), ("t5", "1")])
def test_runs_of_a_study_share_the_cores_but_for_tiny_which_has_one_thread(
    monkeypatch, student, set_to
):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    evaluation.run_missing([], evaluation.Options(student=student, jobs=2))
    assert os.environ.get("OMP_NUM_THREADS") == set_to


def test_on_a_gpu_one_run_of_a_study_goes_on_at_a_time(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for options in ({}, {"device": "cpu"}, {"jobs": 3}):
        evaluation.run_missing([], evaluation.Options(**options))
    said = re.findall(r"(\d) at a time", capsys.readouterr().out)
    assert said == ["1", "2", "3"]


def test_a_study_whose_run_fails_tells_where_it_says_why(student, place):
    wrong = ["--options", "--rounds -1"]
    with pytest.raises(UserError) as error:
        evaluation.main(["--study", "labels", "--seeds", "1", "--student", student, *wrong])
    log = re.search(r"a run of the study failed: (\S+log.txt) tells why", str(error.value))[1]
    assert "--rounds is -1" in Path(log).read_text()


def test_a_studys_runs_end_with_it(student, place):
    long = "--train-size 48 --rounds 9 --round-steps 500 --batch-size 8 --max-target 8"
    command = ["--study", "methods", "--seeds", "1", "--student", student, "--options", long]
    command += ["--jobs", "2"]
    study = subprocess.Popen(
        [sys.executable, str(ROOT / "eval.py"), *command], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(place.rglob("checkpoint.pt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)  # the first two runs are training
    study.send_signal(signal.SIGINT)
    _, err = study.communicate(timeout=60)
    assert len(list(place.rglob("checkpoint.pt"))) == 2
    assert study.returncode == 130 and "Stopped." in err
    left = subprocess.run(["pgrep", "-f", student], capture_output=True, check=False)
    assert left.stdout == b""
    for log in place.rglob("log.txt"):
        assert "Traceback" not in log.read_text()


def fake_results(options: evaluation.Options, *studies: str) -> None:
    """Results for all runs of these studies, by method: qcrd better than dss, mi far worse."""
    for name in studies:
        for label, runs in evaluation.plan(options, name).items():
            for seed, run in enumerate(runs):
                gain = (0.1, 0.2, 0.0)[seed] if "qcrd" in label else -0.4 if label == "mi" else 0
                accuracy = 0.5 + seed / 10 + gain
                result = {"accuracy": accuracy}
                if label != "finetune":
                    result["validity"] = accuracy
                run.out.mkdir(parents=True, exist_ok=True)
                config = qcrd.open_run(run.out, qcrd.parse_options(run.words))
                (run.out / "config.json").write_text(json.dumps(config))
                (run.out / "result.json").write_text(json.dumps(result))


def test_studies_print_differences_and_are_drawn_from_their_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = evaluation.Options(study=["methods", "noise", "size"], seeds=3, plot=True)
    fake_results(options, *options.study)
    evaluation.studies(options)
    printed = capsys.readouterr().out
    # qcrd: 60, 80, 70 points; differences of 10, 20 and 0: mean 10, t = 4.30, standard error 5.77
    row = "| qcrd | 70.0 ± 24.8 | 70.0 ± 24.8 |  | 10.0 ± 24.8 | 10.0 ± 24.8 | [0, 1, 2] |"
    assert row in printed
    assert "| finetune | 60.0 ± 24.8 |  |  | 0.0 ± 0.0 |  | [0, 1, 2] |" in printed
    assert "| dss, 50% | 60.0 ± 24.8 | 60.0 ± 24.8 |  |  |  |" in printed
    folder = tmp_path / "runs" / "studies" / "toy"
    pictures = {path.stem: path.read_text() for path in folder.glob("*.svg")}
    assert len(pictures) == 6
    methods = next(text for name, text in pictures.items() if "methods-validity" in name)
    assert "validity - dss" in methods and "3 seeds" in methods and ">qcrd<" in methods
    assert ">mi<" not in methods and "beyond 15 points, not shown: mi" in methods
    assert not re.search(r">[−-](20|30|40)<", methods)  # mi does not stretch the axis
    noise = next(text for name, text in pictures.items() if "noise-accuracy" in name)
    assert "by --toy-errors" in noise and ">ED<" in noise and ">0.5<" in noise


def test_rationales_that_cannot_be_checked_have_no_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = evaluation.Options(study=["size"], seeds=3, plot=True)
    fake_results(options, "size")
    for file in tmp_path.rglob("result.json"):
        file.write_text(json.dumps({"accuracy": 0.5}))
    evaluation.studies(options)
    (picture,) = tmp_path.rglob("*.svg")
    assert "accuracy" in picture.name


def test_two_seeds_have_no_interval(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = evaluation.Options(study=["methods"], seeds=2)
    fake_results(options, "methods")
    evaluation.studies(options)
    assert "| qcrd | 70.0 | 70.0 |  | 15.0 | 15.0 | [0, 1] |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--study", "methods", "size2"], "--study size2 is not one of methods, ablation"),
        (["--study", "judge"], "--study judge is not one of methods, .*disc"),
        (["--study", "noise", "--task", "svamp"], "--study noise needs --task toy"),
        (["--study", "methods", "--seeds", "0"], "--seeds, .* must be at least 1"),
        (["--study", "methods", "--jobs", "0"], "--seeds, --jobs, .* must be at least 1"),
        (["--judge", "api:m", "--runs", "one"], "not the directory of a finished run"),
        ([], "nothing to do: name --runs"),
    ],
)
def test_what_cannot_be_done_is_refused(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluation.main(argv)


# --------------------------------------------------------------------------------------------------
# Pictures of a run


def test_pictures_of_a_run_are_drawn_also_where_d_did_not_learn_in_some_rounds(copy):
    file = copy / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    del rows[0]["L_D"], rows[2]["L_D"]
    qcrd.write_jsonl(file, rows)
    evaluation.main(["--runs", str(copy), "--plot"])
    for name in ("losses.png", "scores.png"):
        assert (copy / name).read_bytes().startswith(b"\x89PNG")


def test_a_density_stands_over_the_middle_of_its_bins_and_is_left_out_without_texts(
    train, monkeypatch
):
    run = train("one", "--k", "1", "--rounds", "1")  # no minority, and so no teacher's negatives
    drawn: dict[str, dict] = {}
    monkeypatch.setattr(evaluation, "draw", lambda path, _, lines: drawn.update({path.name: lines}))
    evaluation.main(["--runs", run, "--plot"])
    densities = drawn["scores.png"]
    assert "positives" in densities and "teacher's negatives" not in densities
    for points in densities.values():
        x, density = zip(*points, strict=True)
        assert x[0] == pytest.approx(0.02) and x[-1] == pytest.approx(0.98)
        assert sum(density) / 25 == pytest.approx(1)


def test_a_run_without_a_discriminator_has_a_picture_of_its_losses(trained, tmp_path):
    run = shutil.copytree(trained / "dss", tmp_path / "dss")
    evaluation.main(["--runs", str(run), "--plot"])
    assert (run / "losses.png").exists() and not (run / "scores.png").exists()


# --------------------------------------------------------------------------------------------------
# The judge


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("A", "A"),
        ("b.", "B"),
        ("**A**", "A"),
        ("(B)", "B"),
        ("[[A]]", "A"),
        ("tie", "tie"),
        ("Tie.", "tie"),
        ("Explanation A is better.", "A"),
        ("explanation a", "A"),
        ("Answer: A", "A"),
        ("**Answer:** B", "B"),
        ("<answer>B</answer>", "B"),
        ("Answer:\nB", "B"),
        ("\\boxed{A}", "A"),
        ("$\\boxed{\\text{B}}$", "B"),
        ("<think>B looks good, but</think>A", "A"),
        ("<think>\nhmm, B\n</think>\n\n**A**", "A"),
        ("<think>A is better, since", None),
        ("<Think>B is better</Think>A", "A"),
        ("The better explanation is B.", "B"),
        ("B is worse than A", "A"),
        ("A is better than B.", "A"),
        ("B > A", "B"),
        ("I prefer Explanation A because B skips a step.", "A"),
        ("I would choose B.", "B"),
        ("A\n\nExplanation B has an error in its second step.", "A"),
        ("A: the reasoning is right", "A"),
        ("Explanation A has an error. Explanation B has none, so B", "B"),
        ("A clear explanation is given in B.", "B"),
        ("Explanation B is clearly more complete.", "B"),
        ("Verdict: **tie**", "tie"),
        ("Both explanations are equally good.", "tie"),
        ("Neither A nor B is better.", "tie"),
        ("I cannot choose between A and B.", None),
        ("Sorry, I can't help with that.", None),
        ("nonsense", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_as_people_write_it(reply, read):
    assert evaluation.read_verdict(reply) == read


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ("A", "B", "A"),
        ("b.", "**A**", "B"),
        ("A", "A", "tie"),
        ("tie", "B", "tie"),
        ("", "B", "not read"),
        ("A", "nonsense", "not read"),
    ],
)
def test_one_is_better_only_where_both_orders_agree(forward, backward, expected):
    assert evaluation.verdict(forward, backward) == expected


def test_the_sign_test_is_the_two_sided_binomial_one():
    assert evaluation.sign_test(3, 0) == pytest.approx(0.25)  # 2 / 2 ** 3
    assert evaluation.sign_test(1, 4) == pytest.approx(2 * (5 + 1) / 32)
    assert evaluation.sign_test(2, 2) == 1 and evaluation.sign_test(0, 0) == 1


@pytest.fixture
def two_runs(trained, tmp_path, monkeypatch) -> list[str]:
    """Two runs, of which the first's rationales are good, but for one where the second's is."""
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name, good in (("one", "wins"), ("two", "loses")):
        shutil.copytree(trained / "qcrd", tmp_path / name)
        file = tmp_path / name / "predictions.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for i, row in enumerate(rows):
            row["rationale"] = f"it {good} {i}"
        rows[3]["rationale"] = "it wins" if name == "two" else "it loses"
        qcrd.write_jsonl(file, rows)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def judge(runs: list[str], url: str, *more: str) -> None:
    command = ["--judge", "api:m", "--api-base", url, "--pairs", "4", "--runs", *runs]
    evaluation.main([*command, *more])


def test_a_judge_compares_two_runs_in_both_orders_and_asks_nothing_twice(two_runs, capsys):
    server = Server(answer=lambda text: re.findall("Explanation (A|B): it wins", text)[0])
    judge(two_runs, server.url)
    printed = capsys.readouterr().out
    assert "{'A': 3, 'B': 1} sign test p = 0.625" in printed and "warning" not in printed
    assert len(server.times) == 8  # four questions in both orders
    judge(two_runs, server.url)
    assert "{'A': 3, 'B': 1}" in capsys.readouterr().out and len(server.times) == 8
    first_only = Server(answer=lambda text: "A")  # who always takes the first has no opinion
    judge(two_runs, first_only.url, "--temperature", "0.1")
    assert "{'tie': 4}" in capsys.readouterr().out and len(first_only.times) == 8


def test_a_judge_on_this_machine_is_asked_on_the_device_that_is_named(two_runs, monkeypatch):
    asked = []

    def ask_model(requests: list, chat: Any, name: str, options: Any) -> Any:
        asked.append((len(requests), name, options.device))
        return ((request, "A", "") for request in requests)

    monkeypatch.setattr(data, "ask_model", ask_model)
    command = ["--judge", "a-model", "--pairs", "4", "--runs", *two_runs]
    evaluation.main([*command, "--device", "cpu"])
    evaluation.main([*command, "--temperature", "0.1"])
    assert asked == [(8, "a-model", "cpu"), (8, "a-model", "auto")]


def test_replies_that_cannot_be_read_are_no_ties_and_are_told(two_runs, capsys):
    server = Server(answer=lambda text: "Sorry, no." if "it wins 2" in text else "tie")
    judge(two_runs, server.url)
    printed = capsys.readouterr().out
    assert "'tie': 3" in printed and "'not read': 1" in printed
    assert "warning: too many replies could not be read: try another --judge" in printed


def test_a_run_without_rationales_is_not_judged(train, two_runs):
    run = train("finetune", "--method", "finetune")
    with pytest.raises(UserError, match="--judge: one of the runs writes no rationales"):
        judge([two_runs[0], run], "http://127.0.0.1:1/v1")


def test_a_judge_that_cannot_be_asked_is_named_as_typed(two_runs):
    server = Server(faults=("401",) * 8)
    with pytest.raises(UserError) as told:
        judge(two_runs, server.url)
    assert "--judge api:m" in str(told.value) and "--teacher" not in str(told.value)
