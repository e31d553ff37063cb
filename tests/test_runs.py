"""Whole runs, as a user starts them: the main job, repeatability, stopping and going on."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

import data
import eval as evaluation
import qcrd
from data import UserError
from tests.conftest import ROOT
from tests.helpers import a_student, make_options, small_models, tokenizer

SMALL = ["--train-size", "48", "--rounds", "3", "--lag", "1", "--batch-size", "8", "--judge-steps", "4", "--judge-every", "2", "--max-target", "24"]  # fmt: skip
KILLS = int(os.environ.get("QCRD_KILLS", "4"))  # 20 takes two minutes


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> str:
    """A folder with a small student of random weights, loaded as any other."""
    folder = tmp_path_factory.mktemp("student")
    small_models(make_options()).student.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small_toy(monkeypatch):
    """The toy and the one thread of the processes that `start` starts, in this process."""
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 60, "valid": 10, "test": 20})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(student: str, out: Path, *more: str) -> subprocess.Popen:
    """The command line in a process of its own, with the toy's test split cut short."""
    code = "import runpy, sys, data; data.TOY_SIZES = {'train': 60, 'valid': 10, 'test': 20}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        code,
        str(ROOT / "qcrd.py"),
        "--student",
        student,
        "--out",
        str(out),
        *SMALL,
        *more,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    tensors = {
        f"student.{k}": v for k, v in load_file(run / "student" / "model.safetensors").items()
    }
    return tensors | {
        f"judge.{k}": v for k, v in load_file(run / "discriminator.safetensors").items()
    }


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timings = ("examples/s", "drawing share")
    return [{k: v for k, v in row.items() if k not in timings} for row in rows]


def same_run(a: Path, b: Path) -> bool:
    wa, wb = weights(a), weights(b)
    equal = wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)
    return (
        equal
        and repr(metrics(a)) == repr(metrics(b))
        and (a / "result.json").read_text() == (b / "result.json").read_text()
    )


@pytest.fixture(scope="session")
def whole(student, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    process = start(student, run)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "accuracy" in out and "validity" in out and str(run) in out
    return run


def test_the_run_directory_holds_what_was_promised(whole, student):
    assert AutoModelForSeq2SeqLM.from_pretrained(whole / "student").config.d_model == 32
    assert any(k.startswith("mlp") for k in load_file(whole / "discriminator.safetensors"))
    assert json.loads((whole / "config.json").read_text())["student"] == student
    rows = metrics(whole)
    assert [row["round"] for row in rows] == [0, 1, 2]
    for name in (
        "L_pred",
        "L_positive",
        "L_negative",
        "L_judge",
        "D pos",
        "D teacher neg",
        "D student neg",
        "D auc",
    ):
        assert all(name in row for row in rows), name
    assert len((whole / "predictions.jsonl").read_text().splitlines()) == 20


def test_round_t_trains_on_what_round_t_minus_j_wrote_and_the_oldest_before(whole):
    assert sorted(p.name for p in (whole / "negatives").iterdir()) == [
        "round-000.jsonl",
        "round-001.jsonl",
    ]
    assert [qcrd.source_round(t, 5) for t in range(8)] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert [qcrd.source_round(t, 0) for t in range(3)] == [0, 1, 2]
    rows = [
        json.loads(line)
        for line in (whole / "negatives" / "round-000.jsonl").read_text().splitlines()
    ]
    assert len({row["id"] for row in rows}) == len(rows) == 48


def test_the_queue_hands_a_round_the_old_students_words(tmp_path, monkeypatch):
    (tmp_path / "negatives").mkdir()
    models = small_models(make_options(rounds=4, lag=2, round_steps=1, batch_size=4))
    question = qcrd.Question(data.Example("q", "How many?", "1"), "1", ["one"], [])
    written: list[int] = []
    monkeypatch.setattr(
        models,
        "generate",
        lambda *a, **k: written.append(len(written)) or [f"from student {len(written) - 1}"],
    )
    got = [qcrd.negatives_of(models, [question], t, tmp_path)["q"] for t in range(4)]
    assert got == [["from student 0"], ["from student 0"], ["from student 0"], ["from student 1"]]
    assert len(written) == 2  # rounds 2 and 3 write nothing, since no later round would read it


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(whole, student, tmp_path):
    again, other = (
        start(student, tmp_path / "again"),
        start(student, tmp_path / "other", "--seed", "1"),
    )
    assert again.wait(300) == 0 and other.wait(300) == 0
    assert same_run(whole, tmp_path / "again")
    assert not same_run(whole, tmp_path / "other")


def test_killed_at_random_moments_and_resumed_it_ends_where_an_uninterrupted_run_does(
    whole, student, tmp_path
):
    rng, run, kills = random.Random(0), tmp_path / "killed", 0
    while kills < KILLS:
        done = len(list(run.glob("metrics.jsonl")))
        process = start(student, run)
        for line in process.stdout:  # until training has begun, or goes on
            if line.startswith(("discriminator pretrained", "Going on", "Everything")):
                break
        time.sleep(rng.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        if (
            (run / "result.json").exists() or done and kills % 5 == 0
        ):  # each five kills from the start
            if (run / "result.json").exists():
                assert same_run(whole, run)
            shutil.rmtree(run)
    process = start(student, run)
    assert process.wait(300) == 0, process.stderr.read()
    assert same_run(whole, run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_how_to_go_on_and_exits(whole, student, tmp_path, number):
    run = tmp_path / "stopped"
    process = start(student, run)
    while not (run / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "same command" in err and "Traceback" not in err
    process = start(student, run)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "Going on from round" in out
    assert same_run(whole, run)


def test_a_finished_run_shows_its_result_and_other_options_are_refused_by_name(whole, student):
    out, _ = start(student, whole).communicate(timeout=60)
    assert "accuracy" in out
    process = start(student, whole, "--beta", "0.3", "--lag", "2")
    _, err = process.communicate(timeout=60)
    assert (
        process.returncode == 2
        and "--beta 0.2" in err
        and "--overwrite" in err
        and "Traceback" not in err
    )


def test_a_damaged_checkpoint_is_one_sentence(whole, student, tmp_path):
    run = tmp_path / "damaged"
    shutil.copytree(whole, run)
    (run / "result.json").unlink()
    content = (run / "checkpoint.pt").read_bytes()
    for damaged in (
        content[: len(content) // 2],
        b"",
        content[:1000] + bytes(1000) + content[2000:],
    ):
        (run / "checkpoint.pt").write_bytes(damaged)
        process = start(student, run)
        _, err = process.communicate(timeout=60)
        assert (
            process.returncode == 2 and "checkpoint.pt is damaged" in err and "--overwrite" in err
        ), err
        assert "Traceback" not in err


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    models = small_models(make_options())
    optimizers = qcrd.make_optimizers(models)
    qcrd.save_checkpoint(tmp_path, models, optimizers, [{"round": 0}])

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        qcrd.save_checkpoint(tmp_path, models, optimizers, [{"round": 0}, {"round": 1}])
    assert qcrd.load_checkpoint(tmp_path, models, optimizers) == [{"round": 0}]
    assert not (tmp_path / "checkpoint.tmp").exists()


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_the_questions():
    models = small_models(make_options(judge="none"))
    with torch.no_grad():
        models.student.get_encoder().final_layer_norm.weight.fill_(float("nan"))
    story = data.random_story(random.Random(0), 2)
    question = qcrd.Question(
        data.Example("toy-7", story.input(), "1", story=story), "1", ["one"], []
    )
    with pytest.raises(UserError, match=r"step 5 .*toy-7"):
        qcrd.train_step(models, qcrd.make_optimizers(models), [question], {}, 0, 5)


@pytest.mark.parametrize(
    ("auc", "pos", "warns"), [(0.5, 0.7, True), (0.7, 0.01, True), (0.7, 0.7, False)]
)
def test_a_discriminator_of_no_use_is_told(monkeypatch, capsys, auc, pos, warns):
    monkeypatch.setattr(qcrd, "judge_auc", lambda *_: auc)
    means = {"D pos": pos, "D teacher neg": pos}
    assert qcrd.judge_check(small_models(make_options()), [], means) == {"D auc": auc}
    assert ("--judge-lr" in capsys.readouterr().out) == warns


def test_a_discriminators_loss_that_is_not_finite_stops_too(monkeypatch):
    models = small_models(make_options())
    story = data.random_story(random.Random(0), 2)
    question = qcrd.Question(
        data.Example("toy-7", story.input(), "1", story=story), "1", ["one"], ["two"]
    )
    monkeypatch.setattr(qcrd, "judge_loss", lambda score, *_: score.sum() * torch.nan)
    with pytest.raises(UserError, match=r"step 4 .*toy-7"):
        qcrd.train_step(models, qcrd.make_optimizers(models), [question], {}, 0, 4)


@pytest.mark.parametrize(
    "more",
    [
        ["--k", "1"],
        ["--lag", "0"],
        ["--lag", "50"],
        ["--train-size", "1"],
        ["--batch-size", "500"],
        ["--max-target", "4"],
        ["--grad-accum", "3"],
        ["--toy-errors", "1.0"],
        ["--method", "single"],
        ["--method", "mi"],
        ["--method", "finetune", "--labels", "teacher"],
        ["--scheme", "sampling"],
        ["--negatives", "teacher", "--judge", "shared", "--judge-loss", "paper"],
        ["--positives", "one", "--quality", "relative"],
        ["--train-size", "0.5", "--round-steps", "5"],
    ],
)
def test_edges_and_variants_run_to_the_end(student, tmp_path, small_toy, capsys, more):
    result = qcrd.main(["--student", student, "--out", str(tmp_path / "run"), *SMALL, *more])
    assert 0 <= result["accuracy"] <= 1
    out = capsys.readouterr().out
    assert "accuracy" in out
    if "--max-target" in more:
        assert out.count("longer than --max-target and are cut") == 1


def test_a_full_gpu_is_one_sentence_that_names_the_options(monkeypatch, capsys):
    def full() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(SystemExit) as stop:
        qcrd.run_command(full)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--batch-size" in err and "--grad-accum" in err


def test_real_svamp_with_real_teachers(real_data, student, tmp_path, capsys):
    samples = str(real_data / "samples" / "svamp.jsonl")
    qcrd.main(["--task", "svamp", "--data", str(real_data / "datasets.zip"), "--teacher", samples, "--student", student,
               "--out", str(tmp_path / "run"), *SMALL])  # fmt: skip
    out = capsys.readouterr().out
    assert (
        "4.00 samples" in out
        and "palm-540b: " in out
        and "llama-3-c" in out
        and "voted answer" in out
    )


class Killed(BaseException):
    """What the process does not survive."""


@pytest.mark.parametrize(
    "name", ["write_jsonl", "save_checkpoint", "negatives_of", "judge_auc", "finish"]
)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_run_that_dies_before_or_after_any_file_is_written_ends_where_it_should(
    whole, student, tmp_path, small_toy, monkeypatch, name, call
):
    run, calls, function = tmp_path / "killed", [], getattr(qcrd, name)

    def dies(*args):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        result = function(*args)
        if len(calls) == call - 1 and call == 3:  # after the second, before anything else
            raise Killed
        return result

    arguments = ["--student", student, "--out", str(run), *SMALL]
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(qcrd, name, dies)
        qcrd.main(arguments)
    qcrd.main(arguments)
    assert same_run(whole, run)


@pytest.mark.parametrize("kind", ["t5", "flan", "mt5", "bart", "t5gemma"])
def test_any_seq2seq_model_can_be_the_student(kind, tmp_path, small_toy, capsys):
    folder, run = tmp_path / kind, tmp_path / "run"
    a_student(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    qcrd.main(
        ["--student", str(folder), "--out", str(run), *SMALL, "--rounds", "2", "--delta", "9"]
    )
    row = metrics(run)[-1]
    assert all(
        name in row
        for name in ("L_pred", "L_positive", "L_negative", "D pos", "D student neg", "D auc")
    )
    student = AutoModelForSeq2SeqLM.from_pretrained(run / "student")
    assert type(student) is type(a_student(kind))
    before = dict(a_student(kind).named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in student.named_parameters())
    shown = capsys.readouterr().out
    scored = evaluation.score(str(run), evaluation.Options())
    assert f"accuracy {scored['accuracy']:.3f}, validity {scored['validity']:.3f}" in shown


def test_what_a_student_writes_is_not_steered_by_the_generation_config_it_came_with(tmp_path):
    a_student("bart").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generation_config.num_beams == 4
    models = qcrd.load_models(make_options(student=str(tmp_path), judge="none"))
    batch = models.tokens(["predict: Anna had 2 apples."], 64)
    written = torch.tensor([[models.student.config.decoder_start_token_id]])
    with torch.no_grad():
        models.student.eval()
        while written.shape[1] < 12 and written[0, 1:].eq(1).sum() == 0:
            logits = models.student(**batch, decoder_input_ids=written).logits[0, -1]
            written = torch.cat([written, logits.argmax()[None, None]], 1)
    expected = models.tokenizer.decode(written[0], skip_special_tokens=True).strip()
    assert models.generate(["predict: Anna had 2 apples."], 11) == [expected]


def test_a_round_is_a_pass_but_five_hundred_steps_at_most(monkeypatch):
    for size, steps in ((48, 12), (1999, 500), (2400, 500)):
        monkeypatch.setattr(data, "TOY_SIZES", {"train": size, "valid": 4, "test": 4})
        options = make_options(round_steps=None, batch_size=4, toy_errors=0.0)
        qcrd.prepare(options)
        assert options.round_steps == steps
    assert qcrd.parse_options(["--student", "t5-small"]).rounds == 20


def test_a_rounds_figures_are_a_row_of_a_table_under_the_papers_symbols():
    row = {
        "round": 9,
        "L_pred": 1.63,
        "L_negative": -0.00168,
        "D auc": 0.689,
        "no positive": 0.0,
        "examples/s": 1234.5,
    }
    head, line = qcrd.table_row(row, header=True).split("\n")
    assert (
        head.split()[:4] == ["round", "L_pred", "L_pos", "L_neg"] and len(head) == len(line) <= 100
    )
    assert line.split() == [
        "9",
        "1.630",
        "-",
        "-0.002",
        "-",
        "-",
        "-",
        "-",
        "0.689",
        "0.000",
        "-",
        "1234",
        "-",
    ]
    assert qcrd.table_row(row, header=False) == line


def test_labels_that_the_tokenizer_cannot_write_are_counted_and_said_once(capsys):
    models = small_models(make_options())
    labels = ["( ( 7 + 5 ) - 2 )", "{x}", "7 +\n5", "12"]
    qcrd.tell_cuts(models, [qcrd.Question(data.Example(t, "x", t), t, [], []) for t in labels])
    out = capsys.readouterr().out
    assert out == "2 of 4 labels cannot be written by this student, such as '{x}'.\n"


def test_a_label_may_be_as_long_as_the_longest_training_label():
    models = small_models(make_options())
    labels = ["1", "( " * 90 + "1"]
    examples = [data.Example(str(i), "x", label) for i, label in enumerate(labels)]
    assert qcrd.label_limit(models, examples) == len(tokenizer()(labels[1]).input_ids) > 64


def test_the_sampling_scheme_draws_the_same_with_the_same_seed(student, tmp_path, small_toy):
    for name in ("one", "two"):
        qcrd.main(
            ["--student", student, "--out", str(tmp_path / name), "--scheme", "sampling", *SMALL]
        )
    assert same_run(tmp_path / "one", tmp_path / "two")


def test_a_finished_run_says_what_to_compare_its_figures_with():
    toy = qcrd.how_to_read(qcrd.parse_options([]), [])
    assert "dss" in toy and "validity" in toy
    noisier = ["--toy-errors", "0.6"]  # where dss has other figures
    assert qcrd.how_to_read(qcrd.parse_options(noisier), noisier).endswith(
        "qcrd.py --toy-errors 0.6 --method dss"
    )
    given = ["--task", "svamp", "--student", "t5-small", "--out", "my run"]
    told = qcrd.how_to_read(qcrd.parse_options(given), given)
    assert told.endswith(
        "python qcrd.py --task svamp --student t5-small --out 'my run' --method dss --out 'my run-dss'"
    )
    again = qcrd.parse_options(
        told.split("qcrd.py ")[1].replace("'", "").replace("my run", "my_run").split()
    )
    assert (again.method, again.out) == ("dss", "my_run-dss")
    assert (
        qcrd.how_to_read(qcrd.parse_options([*given, "--method", "dss"]), given).count(
            "--method finetune"
        )
        == 1
    )
