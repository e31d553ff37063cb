"""Whole runs, as a user starts them: the main job, repeatability, stopping and going on."""

import json
import os
import random
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
import qcrd
from data import UserError
from tests.conftest import ROOT
from tests.helpers import make_options, small_models, tokenizer

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
    tensors = {f"student.{k}": v for k, v in load_file(run / "student" / "model.safetensors").items()}
    return tensors | {f"judge.{k}": v for k, v in load_file(run / "discriminator.safetensors").items()}


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
    for name in ("L_pred", "L_positive", "L_negative", "L_judge", "D pos", "D teacher neg", "D student neg", "D auc"):
        assert all(name in row for row in rows), name
    assert len((whole / "predictions.jsonl").read_text().splitlines()) == 20


def test_round_t_trains_on_what_round_t_minus_j_wrote_and_the_oldest_before(whole):
    assert sorted(p.name for p in (whole / "negatives").iterdir()) == ["round-000.jsonl", "round-001.jsonl"]
    assert [qcrd.source_round(t, 5) for t in range(8)] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert [qcrd.source_round(t, 0) for t in range(3)] == [0, 1, 2]
    rows = [json.loads(line) for line in (whole / "negatives" / "round-000.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) == 48


def test_the_queue_hands_a_round_the_old_students_words(student, tmp_path, monkeypatch):
    (tmp_path / "negatives").mkdir()
    models = small_models(make_options(rounds=4, lag=2, round_steps=1, batch_size=4))
    example = data.Example("q", "How many?", "1")
    question = qcrd.Question(example, "1", ["one"], [])
    written = []
    monkeypatch.setattr(
        qcrd, "generate", lambda *a, **k: written.append(len(written)) or [f"from student {len(written) - 1}"]
    )
    got = [qcrd.negatives_for(models, [question], t, tmp_path)["q"] for t in range(4)]
    assert got == ["from student 0", "from student 0", "from student 0", "from student 1"]
    assert len(written) == 2  # rounds 2 and 3 write nothing, since no later round would read it


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(whole, student, tmp_path):
    again, other = start(student, tmp_path / "again"), start(student, tmp_path / "other", "--seed", "1")
    assert again.wait(300) == 0 and other.wait(300) == 0
    assert same_run(whole, tmp_path / "again")
    assert not same_run(whole, tmp_path / "other")


def test_killed_at_random_moments_and_resumed_it_ends_where_an_uninterrupted_run_does(whole, student, tmp_path):
    rng, run = random.Random(0), tmp_path / "killed"
    for _ in range(KILLS):
        process = start(student, run, "--save-minutes", "0")
        for line in process.stdout:  # until training has begun, or goes on
            if line.startswith(("discriminator pretrained", "Going on", "Everything")):
                break
        time.sleep(rng.uniform(0, 1.0 / KILLS))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (run / "result.json").exists()  # else the kill came too late to mean anything
    process = start(student, run, "--save-minutes", "0")
    assert process.wait(300) == 0, process.stderr.read()
    assert same_run(whole, run)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_says_how_to_go_on_and_exits(whole, student, tmp_path, number, code):
    run = tmp_path / "stopped"
    process = start(student, run)
    while not (run / "checkpoint.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "same command" in err and "Traceback" not in err
    process = start(student, run)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "Going on from step" in out
    assert same_run(whole, run)


def test_a_finished_run_shows_its_result_and_other_options_are_refused_by_name(whole, student):
    out, _ = start(student, whole).communicate(timeout=60)
    assert "accuracy" in out
    process = start(student, whole, "--beta", "0.3", "--lag", "2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "--beta 0.2" in err and "--overwrite" in err and "Traceback" not in err


def trained_state(tmp_path: Path) -> tuple:
    models = small_models(make_options())
    optimizers = {"student_optimizer": torch.optim.AdamW(models.student.parameters(), 1e-3)}
    qcrd.save_checkpoint(tmp_path, models, optimizers, {"step": 1})
    qcrd.save_checkpoint(tmp_path, models, optimizers, {"step": 2})
    return models, optimizers


@pytest.mark.parametrize("damage", ["torn", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, damage):
    models, optimizers = trained_state(tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    if damage == "torn":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    assert qcrd.load_checkpoint(tmp_path, models, optimizers)["step"] == 1
    assert ("going back" in capsys.readouterr().out) == (damage == "torn")


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    models, optimizers = trained_state(tmp_path)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(qcrd, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        qcrd.save_checkpoint(tmp_path, models, optimizers, {"step": 3})
    assert qcrd.load_checkpoint(tmp_path, models, optimizers)["step"] == 2
    assert not (tmp_path / "checkpoint.tmp").exists()


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_the_questions():
    models = small_models(make_options(judge="none"))
    with torch.no_grad():
        models.student.get_encoder().final_layer_norm.weight.fill_(float("nan"))
    story = data.random_story(random.Random(0), 2)
    question = qcrd.Question(data.Example("toy-7", story.input(), "1", story=story), "1", ["one"], [])
    optimizers = {"student_optimizer": torch.optim.AdamW(models.student.parameters(), 1e-3)}
    with pytest.raises(UserError, match=r"step 5 .*toy-7"):
        qcrd.train_step(models, optimizers, [question], {}, 0, {"step": 5, "sums": {}}, 10)


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
        ["--positives", "one", "--judge", "frozen"],
        ["--train-size", "0.5", "--round-steps", "5"],
    ],
)
def test_edges_and_variants_run_to_the_end(student, tmp_path, small_toy, capsys, more):
    result = qcrd.main(["--student", student, "--out", str(tmp_path / "run"), *SMALL, *more])
    assert 0 <= result["accuracy"] <= 1
    out = capsys.readouterr().out
    assert "accuracy" in out
    if "--max-target" in more:
        assert out.count("longer than --max-target and were cut") == 1


def test_a_full_gpu_is_one_sentence_that_names_the_options(monkeypatch, capsys):
    def full() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(SystemExit) as stop:
        qcrd.run_command(full)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--batch-size" in err and "--grad-accum" in err


def test_grad_accum_gives_the_step_of_the_whole_batch(student):
    grads = []
    for parts in (1, 3):
        models = small_models(make_options(grad_accum=parts, judge="none", batch_size=6))
        task, splits = data.load_task("toy")
        options = models.options
        questions = qcrd.vote(task, splits["train"][:6], data.collect(task, splits["train"][:6], [], options), options)
        optimizers = {"student_optimizer": torch.optim.SGD(models.student.parameters(), 0.0)}
        qcrd.train_step(models, optimizers, questions, {}, 0, {"step": 0, "sums": {}}, 10)
        grads.append([p.grad for p in models.student.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_real_svamp_with_real_teachers(real_data, student, tmp_path, capsys):
    samples = str(real_data / "samples" / "svamp.jsonl")
    qcrd.main(["--task", "svamp", "--data", str(real_data / "datasets.zip"), "--teacher", samples, "--student", student,
               "--out", str(tmp_path / "run"), *SMALL])  # fmt: skip
    out = capsys.readouterr().out
    assert "4.00 samples" in out and "palm-540b: 48 samples" in out and "llama-3-c" in out and "voted answer" in out


@pytest.mark.parametrize("round_", [0, 1, 2])
@pytest.mark.parametrize("moment", ["before the line", "after the line", "after the metrics"])
def test_a_run_that_dies_at_the_end_of_a_round_keeps_its_line(
    whole, student, tmp_path, small_toy, monkeypatch, moment, round_
):
    class Killed(BaseException):
        """What the process does not survive."""

    def dies(function, after, at):
        def call(*args, **kwargs):
            result = function(*args, **kwargs) if after else None
            if at(*args):
                raise Killed
            return result if after else function(*args, **kwargs)

        return call

    run = tmp_path / "killed"
    arguments = ["--student", student, "--out", str(run), "--save-minutes", "0", *SMALL]
    with monkeypatch.context() as patch:
        if moment == "after the metrics":
            of_this_round = lambda path, rows: path.name == "metrics.jsonl" and len(rows) == round_ + 1
            patch.setattr(qcrd, "write_jsonl", dies(qcrd.write_jsonl, True, of_this_round))
        else:
            of_this_round = lambda models, questions, number, progress: number == round_
            patch.setattr(qcrd, "round_line", dies(qcrd.round_line, moment == "after the line", of_this_round))
        with pytest.raises(Killed):
            qcrd.main(arguments)
    qcrd.main(arguments)
    assert same_run(whole, run)


def test_a_signal_at_the_last_step_of_a_round_stops_after_its_line(whole, student, tmp_path, small_toy, monkeypatch):
    run = tmp_path / "stopped"
    arguments = ["--student", student, "--out", str(run), *SMALL]
    with monkeypatch.context() as patch:
        step = qcrd.train_step

        def signalled(models, optimizers, batch, drawn, round_, progress, total):
            step(models, optimizers, batch, drawn, round_, progress, total)
            if progress["step"] == 6:
                patch.setattr(qcrd.guard, "came", signal.SIGTERM)

        patch.setattr(qcrd, "train_step", signalled)
        with pytest.raises(qcrd.Stopped):
            qcrd.main(arguments)
    assert [row["round"] for row in metrics(run)] == [0]
    qcrd.main(arguments)
    assert same_run(whole, run)


def test_the_sampling_scheme_draws_the_same_with_the_same_seed(student, tmp_path, small_toy):
    for name in ("one", "two"):
        qcrd.main(["--student", student, "--out", str(tmp_path / name), "--scheme", "sampling", *SMALL])
    assert same_run(tmp_path / "one", tmp_path / "two")
