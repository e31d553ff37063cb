"""Whole runs, as a user starts them: the main job, repeatability, stopping and going on, and what
a run directory may hold."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

import data
import qcrd
from data import UserError
from tests.conftest import ROOT
from tests.helpers import (
    a_student,
    make_options,
    save_student,
    small_models,
    small_student,
    tokenizer,
)

# A margin of 9 nats, so that negatives count for random weights, too.
SMALL_RUN = """
--train-size 24 --rounds 3 --lag 1 --batch-size 8 --disc-steps 2 --disc-every 2
--max-target 16 --delta 9
"""
SMALL = SMALL_RUN.split()
FEWER = ["--train-size", "12", "--rounds", "2"]
SIZES = {"train": 30, "valid": 5, "test": 10}
KILLS = int(os.environ.get("QCRD_KILLS", "4"))  # 20 takes two minutes


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> str:
    """A folder with a small student of random weights, loaded as any other."""
    return save_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def small_toy(monkeypatch):
    """The toy and the one thread of the processes that `start` starts, in this process."""
    monkeypatch.setattr(data, "TOY_SIZES", SIZES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(student: str, out: Path, *more: str) -> list[str]:
    return ["--student", student, "--out", str(out), *SMALL, *more]


def start(student: str, out: Path, *more: str) -> subprocess.Popen:
    """The command line in a process of its own, with the toy cut short."""
    code = (
        f"import runpy, sys, data; data.TOY_SIZES = {SIZES}; sys.argv = sys.argv[1:];"
        " runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "qcrd.py"), *arguments(student, out, *more)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)},
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in ("student/model.safetensors", "discriminator.safetensors"):
        found |= {f"{file} {name}": value for name, value in load_file(run / file).items()}
    return found


def metrics(run: Path) -> list[dict]:
    """The figures of each round, but for its speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "q/s"} for row in rows]


def same_run(a: Path, b: Path) -> bool:
    wa, wb = weights(a), weights(b)
    equal = wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)
    return (
        equal
        and metrics(a) == metrics(b)
        and (a / "result.json").read_text() == (b / "result.json").read_text()
        and (a / "predictions.jsonl").read_text() == (b / "predictions.jsonl").read_text()
    )


@pytest.fixture(scope="session")
def whole(student, tmp_path_factory) -> Path:
    """A finished run, made in a process of its own."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    process = start(student, run)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "accuracy" in out and "validity" in out and str(run) in out
    return run


class Killed(BaseException):
    """What the process does not survive."""


def dies_at(patch: pytest.MonkeyPatch, place: Any, name: str, call: int) -> None:
    """Calling `name` for the `call`-th time kills the process."""
    function, calls = getattr(place, name), []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    patch.setattr(place, name, dies)


def killed(monkeypatch: pytest.MonkeyPatch, name: str, call: int, argv: list[str]) -> None:
    """A run with these arguments that dies at the `call`-th call of this function."""
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        dies_at(patch, qcrd, name, call)
        qcrd.main(argv)


@pytest.fixture(scope="session")
def unfinished(student, tmp_path_factory) -> Path:
    """A run that was killed at the start of its last round."""
    run = tmp_path_factory.mktemp("runs") / "unfinished"
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(data, "TOY_SIZES", SIZES)
        dies_at(patch, qcrd, "write_negatives", 3)
        qcrd.main(arguments(student, run))
    assert len(metrics(run)) == 2
    return run


# --------------------------------------------------------------------------------------------------
# The main job


def test_the_run_directory_holds_what_was_promised(whole, student):
    assert AutoModelForSeq2SeqLM.from_pretrained(whole / "student").config.d_model == 32
    assert any(k.startswith("mlp") for k in load_file(whole / "discriminator.safetensors"))
    config = json.loads((whole / "config.json").read_text())
    assert config["options"]["student"] == student and config["options"]["delta"] == 9
    assert config["inputs"] == {str(Path(student).resolve()): data.digest(student)}
    rows = metrics(whole)
    assert [row["round"] for row in rows] == [0, 1, 2]
    for name in [*qcrd.COLUMNS, "L_cl"]:
        assert name == "q/s" or all(name in row for row in rows), name
    predictions = (whole / "predictions.jsonl").read_text().splitlines()
    assert len(predictions) == 10
    assert json.loads(predictions[0]).keys() == {"id", "label", "correct", "rationale", "valid"}
    result = json.loads((whole / "result.json").read_text())
    assert {"accuracy", "validity", "validation accuracy", "AUC"} <= result.keys()


def test_round_t_trains_on_what_round_t_minus_j_wrote_and_the_oldest_before(whole):
    lag_5, lag_0 = make_options(lag=5), make_options(lag=0)
    assert [qcrd.source_round(t, lag_5) for t in range(8)] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert [qcrd.source_round(t, lag_0) for t in range(3)] == [0, 1, 2]
    fixed = make_options(negatives="fixed", fixed_student="x")
    assert [qcrd.source_round(t, fixed) for t in (0, 7)] == [0, 0]
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    # for 24 questions; no round trains on what the last one would write
    assert [len(texts) for texts in state["written"].values()] == [24, 24, 0]
    # the last of three rounds, with a lag of one
    text = (whole / "negatives.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["id"]: row["output"] for row in rows} == state["written"][1]


def test_the_queue_hands_a_round_the_old_students_words(monkeypatch):
    options = make_options(rounds=4, lag=2, round_steps=1, batch_size=4)
    student = small_student(options)
    question = qcrd.Question(data.Example("q", "How many?", "1"), "1", ["one"], [])
    written: list[int] = []

    def write(*args: Any) -> list[str]:
        written.append(len(written))
        return [f"from student {written[-1]}"]

    monkeypatch.setattr(student, "write", write)
    queue, got = {}, []
    for round_ in range(4):
        queue[round_] = qcrd.write_negatives(student, [question], round_, options)
        due = queue[qcrd.source_round(round_, options)]
        got.append(qcrd.read_negatives(due, [question], round_, options, Path("x"))["q"])
    assert got == ["from student 0", "from student 0", "from student 0", "from student 1"]
    assert len(written) == 2  # rounds 2 and 3 write nothing, since no later round would read it


def test_the_students_negatives_are_hot_and_end_at_the_length_of_nine_rationales_in_ten(
    monkeypatch,
):
    options = make_options(student_temperature=1.7)
    student = small_student(options)
    texts = ["1 " * length for length in range(1, 11)]
    questions = [qcrd.Question(data.Example("q", "How many?", "1"), "1", texts, [])]
    asked: list[Any] = []
    monkeypatch.setattr(student, "write", lambda *how: asked.append(how) or [""])
    written = qcrd.write_negatives(student, questions, 0, options)
    assert qcrd.read_negatives(written, questions, 0, options, Path("x")) == {}  # "" is none
    inputs, _, limit, temperature = asked[0]
    lengths = sorted(len(tokenizer()(text).input_ids) for text in texts)
    assert inputs == ["explain: How many?"] and temperature == 1.7
    assert lengths[8] <= limit < lengths[9]


def test_negatives_of_the_vote_alone_need_no_writing():
    options = make_options(negatives="teacher")
    question = qcrd.Question(data.Example("q", "How many?", "1"), "1", ["one"], [])
    assert qcrd.write_negatives(small_student(options), [question], 0, options) == {}
    assert qcrd.read_negatives({}, [question], 0, options, Path("x")) == {}


def test_a_student_that_does_not_stop_writes_as_long_as_what_it_learned(whole):
    path = whole / "student" / "generation_config.json"
    written = json.loads((whole / "predictions.jsonl").read_text().splitlines()[0])["label"]
    longest = json.loads(path.read_text())["max_new_tokens"]
    # the targets of the run are cut at 16 tokens, which some rationales reach
    assert longest == 16 and len(tokenizer()(written).input_ids) <= 17


def test_a_label_may_be_as_long_as_the_longest_training_label():
    student = small_student(make_options())
    label = "( " * 90 + "1"
    assert qcrd.target_length(student, ["1", label], 1.0) == len(tokenizer()(label).input_ids) > 64
    assert qcrd.target_length(student, [], 1.0) == 256


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    whole, student, tmp_path, small_toy
):
    qcrd.main(arguments(student, tmp_path / "again"))
    qcrd.main(arguments(student, tmp_path / "other", "--seed", "1"))
    assert same_run(whole, tmp_path / "again")
    assert not same_run(whole, tmp_path / "other")


def test_the_sampling_scheme_draws_the_same_with_the_same_seed(student, tmp_path, small_toy):
    for name in ("one", "two"):
        qcrd.main(arguments(student, tmp_path / name, *FEWER, "--scheme", "sampling"))
    assert same_run(tmp_path / "one", tmp_path / "two")


VARIANTS = [
    "--k 1",
    "--lag 0",
    "--lag 50",
    "--train-size 1",
    "--batch-size 500",
    "--max-target 4",
    "--micro-batch 3",
    "--toy-errors 1.0",
    "--method single",
    "--method mi",
    "--method finetune --labels teacher",
    "--negatives teacher --disc shared --disc-loss paper",
    "--positives one --quality printed --scheme wmean",
    "--train-size 0.5 --round-steps 5",
    "--precision bf16 --scheme mean",
]


@pytest.mark.parametrize("more", VARIANTS)
def test_edges_and_variants_run_to_the_end(student, tmp_path, small_toy, capsys, more):
    result = qcrd.main(arguments(student, tmp_path / "run", *FEWER, *more.split()))
    assert 0 <= result["accuracy"] <= 1
    out = capsys.readouterr().out
    assert "accuracy" in out
    if more == "--max-target 4":
        assert out.count("longer than --max-target and are cut") == 1


def test_the_teachers_negatives_are_there_also_without_positives(small_toy):
    options = make_options(task="toy", positives="none", negatives="teacher")
    *_, questions = qcrd.prepare(options)
    assert any(q.negatives for q in questions) and not any(q.positives for q in questions)


def test_a_fixed_student_writes_once_and_all_rounds_train_on_it(student, tmp_path, small_toy):
    dss = tmp_path / "dss"
    qcrd.main(arguments(student, dss, "--method", "dss", *FEWER, "--rounds", "1"))
    fixed = ["--negatives", "fixed", "--fixed-student", str(dss)]
    qcrd.main(arguments(student, tmp_path / "run", *fixed))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert [len(texts) for texts in state["written"].values()] == [24, 0, 0]
    rows = metrics(tmp_path / "run")
    assert len(rows) == 3 and all("s_self" in row for row in rows)


def test_real_svamp_with_real_teachers(real_data, student, tmp_path, small_toy, capsys):
    samples = str(real_data / "samples" / "svamp.jsonl")
    task = ["--task", "svamp", "--data", str(real_data / "datasets.zip"), "--teacher", samples]
    qcrd.main(arguments(student, tmp_path / "run", *task, "--rounds", "1", "--max-target", "4"))
    out = capsys.readouterr().out
    assert "4.00 samples" in out and "voted answer" in out
    assert "palm-540b: " in out and "llama-3-c" in out
    inputs = json.loads((tmp_path / "run" / "config.json").read_text())["inputs"]
    assert {Path(path).name for path in inputs} >= {"datasets.zip", "svamp.jsonl"}


def test_a_round_is_a_pass_but_five_hundred_steps_at_most():
    question = qcrd.Question(data.Example("q", "How many?", "1"), "1", ["one"], [])
    options = make_options(round_steps=0, batch_size=4)
    for size, steps in ((48, 12), (49, 13), (1999, 500), (2400, 500)):
        assert qcrd.steps_in_round([question] * size, options) == steps
        assert len(qcrd.round_batches([question] * size, options, 1)) == steps
    assert qcrd.steps_in_round([question] * 48, make_options(round_steps=700)) == 700


def test_the_rounds_batches_are_passes_over_the_training_set_in_an_order_of_the_seed():
    questions = []
    for i in range(50):
        example = data.Example(str(i), "How many?" * (i % 7), "1")
        questions.append(qcrd.Question(example, "1", ["one"], []))

    def ids(round_: int, **changes: Any) -> list[str]:
        options = make_options(batch_size=8, **changes)
        batches = qcrd.round_batches(questions, options, round_)
        return [q.example.id for batch in batches for q in batch]

    first, second = ids(0, round_steps=0), ids(1, round_steps=0)
    assert sorted(first) == sorted(second) == sorted(q.example.id for q in questions)
    assert first != second and first == ids(0, round_steps=0) != ids(0, round_steps=0, seed=1)
    # rounds of three steps go on where the one before ended
    three = [*ids(0, round_steps=3), *ids(1, round_steps=3), *ids(2, round_steps=3)]
    assert len(three) > 50 and three == (first + second)[: len(three)]


@pytest.mark.parametrize("negatives", ["student", "fixed", "teacher"])
def test_readers_are_the_questions_of_all_rounds_that_train_on_what_a_round_writes(negatives):
    examples = [data.Example(str(i), "How many?", "1") for i in range(50)]
    questions = [qcrd.Question(example, "1", ["one"], []) for example in examples]
    options = make_options(negatives=negatives, batch_size=8, round_steps=2, rounds=6, lag=2)
    for round_ in range(6):
        slow: list[str] = []
        for later in range(round_, 6):
            if qcrd.source_round(later, options) == round_:
                batches = qcrd.round_batches(questions, options, later)
                slow += [q.example.id for batch in batches for q in batch]
        found = qcrd.readers_of(questions, round_, options)
        assert list(found) == list(dict.fromkeys(slow))  # in the order in which it writes
        assert all(found[id] is questions[int(id)] for id in found)
        assert bool(found) == (
            round_ in {"student": range(4), "fixed": [0], "teacher": []}[negatives]
        )


def test_a_rounds_figures_are_a_row_of_a_table_under_the_papers_symbols():
    row = {"round": 9, "L_pred": 1.63, "L_neg": -0.00168, "AUC": 0.689, "q/s": 1234.5}
    head, line = qcrd.table_row({name: name for name in qcrd.COLUMNS}), qcrd.table_row(row)
    assert head.split()[:4] == ["round", "L_pred", "L_pos", "L_neg"]
    assert len(head) == len(line) <= 100
    cells = dict(zip(head.split(), line.split(), strict=True))
    assert cells["round"] == "9" and cells["L_pred"] == "1.630" and cells["L_neg"] == "-0.002"
    assert cells["AUC"] == "0.689" and cells["q/s"] == "1234" and cells["s_pos"] == "-"


@pytest.mark.parametrize(
    ("auc", "score", "warns"),
    [
        ({"AUC": 0.5}, 0.7, True),
        ({"AUC": 0.7}, 0.01, True),
        ({"AUC": 0.7}, 0.7, False),
        ({}, 0.7, False),
    ],
)
def test_a_discriminator_of_no_use_is_told(
    monkeypatch, tmp_path, capsys, small_toy, student, auc, score, warns
):
    monkeypatch.setattr(qcrd, "disc_auc", lambda *_: auc)
    figures = {"L_D": 0.7, "s_pos": score, "s_neg": score}
    monkeypatch.setattr(qcrd, "disc_gradients", lambda *_: figures)
    qcrd.main(arguments(student, tmp_path / "run", *FEWER, "--rounds", "1"))
    out = capsys.readouterr().out
    assert ("warning: " in out and "--disc-lr" in out) == warns


@pytest.mark.parametrize("of_disc", [False, True])
def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_the_questions(of_disc, monkeypatch):
    options = make_options()
    student, disc = small_models(options)
    if of_disc:
        monkeypatch.setattr(qcrd, "discriminator_loss", lambda score, *_: score.sum() * torch.nan)
    else:
        with torch.no_grad():
            student.model.get_encoder().final_layer_norm.weight.fill_(float("nan"))
    before = {name: p.clone() for name, p in student.model.named_parameters()}
    question = qcrd.Question(data.Example("toy-7", "How many?", "1"), "1", ["one"], ["two"])
    optimizers = qcrd.make_optimizers(student, disc, options)
    with pytest.raises(UserError, match=r"step 4 .*toy-7.*--lr"):
        qcrd.train_step(student, disc, optimizers, [question], {}, 0, 4, options)
    for name, parameter in student.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())


def test_labels_that_the_tokenizer_cannot_write_are_counted_and_said_once(capsys):
    student = small_student(make_options())
    labels = ["( ( 7 + 5 ) - 2 )", "{x}", "7 +\n5", "12"]
    questions = [qcrd.Question(data.Example(t, "Anna had 1.", t), t, [], []) for t in labels]
    qcrd.check_texts(student, questions, make_options())
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "cannot be written" in line]
    assert said == ["2 of 4 labels cannot be written by this student, such as '{x}'."]


def test_texts_that_are_cut_are_counted(capsys):
    options = make_options(max_input=8, max_target=6)
    student = small_student(options)
    story = "Anna had 2 apples. Ben had 3 books. Anna had 2 apples."
    short = qcrd.Question(data.Example("a", "Anna", "1"), "1", ["1 + 1"], [])
    long = qcrd.Question(data.Example("b", story, "1"), "1", ["1 + 1 + 1 + 1 + 1 + 1"], [])
    qcrd.check_texts(student, [short, long, long], options)
    out = capsys.readouterr().out
    assert "2 of 3 texts are longer than --max-input and are cut." in out
    assert "2 of 6 texts are longer than --max-target and are cut." in out


# --------------------------------------------------------------------------------------------------
# Which model can be the student


@pytest.mark.parametrize("kind", ["t5", "flan", "mt5", "bart", "t5gemma"])
def test_any_seq2seq_model_can_be_the_student(kind, tmp_path, small_toy, capsys):
    folder, run = save_student(tmp_path / kind, kind), tmp_path / "run"
    qcrd.main(arguments(folder, run, "--rounds", "2", "--train-size", "16"))
    row = metrics(run)[-1]
    for name in ("L_pred", "L_pos", "L_neg", "s_pos", "s_self", "AUC"):
        assert name in row
    trained = AutoModelForSeq2SeqLM.from_pretrained(run / "student")
    before = a_student(kind)
    assert type(trained) is type(before)
    parameters = dict(before.named_parameters())
    assert any(not torch.equal(p, parameters[name]) for name, p in trained.named_parameters())
    shown = capsys.readouterr().out
    # whoever loads what the run saved finds the figures that it showed
    options = qcrd.parse_options(arguments(folder, run))
    task, splits = data.load_task("toy")
    loaded = qcrd.load_student(str(run / "student"), options)
    found, _ = qcrd.evaluate(loaded, task, splits, "test", options)
    assert f"accuracy {found['accuracy']:.3f}, validity {found['validity']:.3f}" in shown


def greedy(student: qcrd.Student, text: str, start: int, limit: int) -> str:
    """What a student says token by token, each the likeliest one."""
    x = student.tokenizer(text, return_tensors="pt").to(student.device)
    written = torch.tensor([[start]], device=student.device)
    with qcrd.without_dropout(student.model):
        for _ in range(limit):
            output = student.model(
                input_ids=x.input_ids, attention_mask=x.attention_mask, decoder_input_ids=written
            )
            written = torch.cat([written, output.logits[0, -1].argmax()[None, None]], 1)
            if written[0, -1] == student.tokenizer.eos_token_id:
                break
    return student.tokenizer.decode(written[0], skip_special_tokens=True).strip()


def test_what_a_student_writes_is_not_steered_by_the_generation_config_it_came_with(tmp_path):
    folder = save_student(tmp_path, "bart")
    assert AutoModelForSeq2SeqLM.from_pretrained(folder).generation_config.num_beams == 4
    student = qcrd.load_student(folder, make_options())
    text = "predict: Anna had 2 apples."
    assert student.write([text], "x", 11) == [greedy(student, text, 1, 11)]


def test_a_student_writes_from_the_token_that_it_was_trained_to_start_with(tmp_path, small_toy):
    folder = save_student(tmp_path / "student")
    path = tmp_path / "student" / "generation_config.json"
    given = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(given | {"decoder_start_token_id": 7}))
    assert (
        AutoModelForSeq2SeqLM.from_pretrained(folder).generation_config.decoder_start_token_id == 7
    )
    student = qcrd.load_student(folder, make_options())
    text = "predict: Anna had 2 apples."
    assert greedy(student, text, 0, 11) != greedy(student, text, 7, 11)
    assert student.write([text], "x", 11) == [greedy(student, text, 0, 11)]
    student.model.save_pretrained(tmp_path / "saved")  # and so whoever loads what a run saves
    saved = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert saved.generation_config.decoder_start_token_id == 0


# --------------------------------------------------------------------------------------------------
# Stopping and going on


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
        # each five kills from the start
        if (run / "result.json").exists() or (done and kills % 5 == 0):
            if (run / "result.json").exists():
                assert same_run(whole, run)
            shutil.rmtree(run)
    process = start(student, run)
    assert process.wait(300) == 0, process.stderr.read()
    assert same_run(whole, run)


DEATHS = [("write_atomically", call) for call in (1, 2, 3)]  # config, metrics, negatives
DEATHS += [("save_checkpoint", 1), ("save_checkpoint", 3), ("disc_auc", 2), ("evaluate", 2)]


@pytest.mark.parametrize(("name", "call"), DEATHS)
def test_a_run_that_dies_at_any_place_ends_where_it_should(
    whole, student, tmp_path, small_toy, monkeypatch, name, call
):
    run = tmp_path / "killed"
    killed(monkeypatch, name, call, arguments(student, run))
    qcrd.main(arguments(student, run))
    assert same_run(whole, run)


def test_a_signal_says_how_to_go_on_and_exits(whole, student, tmp_path, small_toy, capsys):
    run = tmp_path / "stopped"
    process = start(student, run)
    while not (run / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "same command" in err and "Traceback" not in err
    qcrd.main(arguments(student, run))
    assert "Going on from round" in capsys.readouterr().out
    assert same_run(whole, run)


def test_ctrl_c_is_a_signal_too_and_after_overwrite_the_sentence_says_to_leave_it_out(
    monkeypatch, capsys
):
    def interrupted() -> None:
        raise KeyboardInterrupt

    for argv, says in ((["qcrd.py"], False), (["qcrd.py", "--overwrite"], True)):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            qcrd.run_command(interrupted)
        err = capsys.readouterr().err
        assert stop.value.code == 130 and "same command" in err
        assert ("--overwrite" in err) == says


def test_full_memory_is_one_sentence_and_another_error_of_torch_is_none(capsys):
    def fails(error: Exception) -> None:
        raise error

    errors = [torch.OutOfMemoryError(), MemoryError()]
    for full in [*errors, RuntimeError("CUDA error: out of memory\nand so on")]:
        with pytest.raises(SystemExit) as stop:
            qcrd.run_command(lambda error=full: fails(error))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and "--student" in err and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="device-side"):
        qcrd.run_command(lambda: fails(RuntimeError("CUDA error: device-side assert")))


def test_a_damaged_checkpoint_is_one_sentence(unfinished, student, tmp_path, small_toy):
    content = (unfinished / "checkpoint.pt").read_bytes()
    holes = content[:1000] + bytes(1000) + content[2000:]
    for damaged in (content[: len(content) // 2], b"", b"no zip", holes):
        run = tmp_path / str(len(damaged))
        shutil.copytree(unfinished, run)
        (run / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(UserError, match=r"checkpoint.pt is damaged .*--overwrite"):
            qcrd.main(arguments(student, run))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    options = make_options()
    student, disc = small_models(options)
    optimizers = qcrd.make_optimizers(student, disc, options)
    qcrd.save_checkpoint(tmp_path, student, disc, optimizers, [{"round": 0}], {0: {"q": "a"}})

    def full(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        rounds = [{"round": 0}, {"round": 1}]
        qcrd.save_checkpoint(tmp_path, student, disc, optimizers, rounds, {})
    kept = qcrd.load_checkpoint(tmp_path, student, disc, optimizers)
    assert kept == ([{"round": 0}], {0: {"q": "a"}})
    assert not (tmp_path / "checkpoint.tmp").exists()


# --------------------------------------------------------------------------------------------------
# The run directory


def refused(argv: list[str]) -> str:
    """The sentence with which a command is refused."""
    with pytest.raises(UserError) as error:
        qcrd.main(argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def tree(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, but for the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_finished_run_shows_its_result_and_changes_nothing(whole, student, small_toy, capsys):
    before = tree(whole)
    result = qcrd.main(arguments(student, whole))
    assert result == json.loads((whole / "result.json").read_text())
    assert f"accuracy {result['accuracy']:.3f}" in capsys.readouterr().out
    assert tree(whole) == before


def test_options_that_do_not_change_what_is_learned_may_differ(whole, student, small_toy):
    same = ["--micro-batch", "2", "--device", "cpu", "--api-concurrency", "3"]
    assert qcrd.main(arguments(student, whole, *same))["accuracy"] >= 0


@pytest.mark.parametrize("state", ["unfinished", "whole"])
def test_other_options_are_refused_by_name(state, request, student, tmp_path, small_toy):
    run = tmp_path / "run"
    shutil.copytree(request.getfixturevalue(state), run)
    before = tree(run)
    sentence = refused(arguments(student, run, "--beta", "0.3", "--lag", "2"))
    assert "--beta 0.2" in sentence and "--lag 1" in sentence and "--overwrite" in sentence
    assert tree(run) == before


def test_overwrite_deletes_only_what_a_run_wrote(whole, student, tmp_path, small_toy):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "losses.png").write_bytes(b"a picture of the old run")
    (run / "notes.txt").write_text("mine")
    (run / "sub").mkdir()
    (run / "sub" / "checkpoint.pt").write_text("mine, too")
    qcrd.main(arguments(student, run, "--rounds", "1", "--overwrite"))
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "sub" / "checkpoint.pt").read_text() == "mine, too"
    assert len(metrics(run)) == 1 and not (run / "losses.png").exists()


FOREIGN = [
    "",
    "no JSON",
    "[]",
    "null",
    '{"model_type": "t5"}',
    '{"options": 3}',
    '{"options": {"beta": 0.2}}',
    '{"options": {"beta": 0.2}, "inputs": [1]}',
]


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_folder_with_a_config_of_something_else_is_refused_and_left_as_it_is(
    content, more, student, tmp_path, small_toy
):
    run = tmp_path / "model"
    (run / "student").mkdir(parents=True)
    (run / "student" / "weights").write_text("mine")
    (run / "config.json").write_text(content)
    before = tree(run)
    assert "--out" in refused(arguments(student, run, *more))
    assert tree(run) == before


def test_what_a_run_wrote_without_a_config_is_not_taken_for_the_new_run(
    whole, student, tmp_path, small_toy
):
    """Whoever deletes config.json by hand has a run whose options nobody knows."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "config.json").unlink()
    try:
        qcrd.main(arguments(student, run, "--rounds", "1"))
    except UserError as error:
        assert str(run) in str(error) and "--out" in str(error)
    else:
        assert len(metrics(run)) == 1


def test_a_run_does_not_write_over_the_student_that_it_starts_from(
    student, tmp_path, small_toy, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(student, "student")
    before = tree(Path("student"))
    assert "--out" in refused(arguments("student", Path(".")))
    assert tree(Path("student")) == before


def test_overwrite_does_not_delete_the_working_directory(whole, student, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = tree(run)
    for place, out in ((run, run), (run, Path(".")), (run / "student", run)):
        monkeypatch.chdir(place)
        assert "working directory" in refused(arguments(student, out, "--overwrite"))
    assert tree(run) == before


@pytest.mark.parametrize("option", ["--student", "--fixed-student"])
def test_overwrite_does_not_delete_what_the_new_run_is_to_read(option, whole, student, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    config = json.loads((run / "config.json").read_text())
    config["options"]["method"] = "dss"  # as a fixed student's run must be
    (run / "config.json").write_text(json.dumps(config))
    before = tree(run)
    more = {
        "--student": ["--student", str(run / "student")],
        "--fixed-student": ["--negatives", "fixed", "--fixed-student", str(run)],
    }
    sentence = refused(arguments(student, run, "--overwrite", *more[option]))
    assert "--out" in sentence and str(run) in sentence
    assert tree(run) == before


NEW_RUN = ["--rounds", "1", "--beta", "0.5"]


@pytest.fixture(scope="session")
def new_run(student, tmp_path_factory) -> Path:
    """A finished run with other options than `whole`."""
    run = tmp_path_factory.mktemp("runs") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TOY_SIZES", SIZES)
        qcrd.main(arguments(student, run, *NEW_RUN))
    return run


@pytest.mark.parametrize(
    ("place", "name", "call", "then"),
    [
        (shutil, "rmtree", 1, "the new command"),
        (Path, "unlink", 1, "the new command"),
        (Path, "unlink", 4, "the old command"),
        (qcrd, "load_student", 1, "the old command"),
        (qcrd, "load_student", 1, "the new command"),
    ],
)
def test_a_deletion_cut_in_the_middle_is_finished_by_the_next_start(
    whole, new_run, student, tmp_path, small_toy, monkeypatch, place, name, call, then
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_at(patch, place, name, call)
        qcrd.main(arguments(student, run, *NEW_RUN, "--overwrite"))
    if then == "the old command":
        qcrd.main(arguments(student, run))
        assert same_run(whole, run)
    else:
        qcrd.main(arguments(student, run, *NEW_RUN))
        assert same_run(new_run, run)


def write_rows(path: str | Path, rows: list[dict]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def own(student, tmp_path, monkeypatch, small_toy) -> tuple[list[str], Path]:
    """A command on a task, samples and a student of one's own, all below tmp_path."""
    monkeypatch.chdir(tmp_path)
    stories = data.toy_splits()["train"][:20]
    rows = [{"input": e.input, "label": e.label, "id": e.id} for e in stories]
    write_rows("task.jsonl", rows)
    samples = []
    for n, e in enumerate(stories):
        for sample, answer in enumerate([e.label, e.label, "( 1 + 1 )"]):
            output = f"<Explanation>: It is {n} and so it must be.\n<Answer>: {answer}"
            samples.append({"id": e.id, "teacher": "t", "sample": sample, "output": output})
    write_rows("samples.jsonl", samples)
    shutil.copytree(student, "student")
    command = arguments("student", Path("run"), "--train-size", "1.0", "--rounds", "2")
    return [*command, "--task", "task.jsonl", "--teacher", "samples.jsonl"], tmp_path / "run"


def change_a_line(name: str) -> Callable[[], None]:
    def change() -> None:
        path = Path(name)
        path.write_text(path.read_text().replace("Anna", "Anne").replace("it must", "it will"))

    return change


def change_the_weights() -> None:
    save_student("student", "flan")


def change_the_tokenizer() -> None:
    path = Path("student/tokenizer.json")
    path.write_text(path.read_text().replace("▁apples", "▁pears"))


SWAPS = {
    "task.jsonl": change_a_line("task.jsonl"),
    "samples.jsonl": change_a_line("samples.jsonl"),
    "student": change_the_weights,
    "student ": change_the_tokenizer,
}


def test_a_run_goes_on_with_the_samples_that_it_was_begun_with(own, monkeypatch):
    command, _ = own
    killed(monkeypatch, "write_negatives", 2, command)
    collect = data.collect

    def others(*how: Any) -> dict:  # as a teacher gives when it is asked anew
        samples = collect(*how)
        return {id: found[::-1] for id, found in samples.items()}

    with monkeypatch.context() as patch:
        patch.setattr(data, "collect", others)
        sentence = refused(command)
    assert "samples are not those" in sentence and "QCRD_CACHE" in sentence
    assert qcrd.main(command)["accuracy"] >= 0


@pytest.mark.parametrize("text", ["", " ", "\r\n\t"])
def test_white_space_is_no_rationale(text):
    assert qcrd.distinct([text, "a", text, "b", "a"]) == ["a", "b"]
    example = data.Example("q", "How many?", "7")
    parsed = data.parse_output(data.Task("my"), example, f"{text}The answer is 7.")
    assert parsed == ("", "7")


@pytest.mark.parametrize("finished", [False, True])
def test_an_input_that_was_swapped_under_a_run_is_refused_by_name(own, monkeypatch, finished):
    command, run = own
    if finished:
        qcrd.main(command)
    else:
        killed(monkeypatch, "write_negatives", 2, command)
        assert (run / "checkpoint.pt").exists()
    before = tree(run)
    for name, change in SWAPS.items():
        kept = (
            tree(Path("student")),
            Path("task.jsonl").read_bytes(),
            Path("samples.jsonl").read_bytes(),
        )
        change()
        sentence = refused(command)
        assert str(Path(name.strip()).resolve()) in sentence and "--overwrite" in sentence
        for file, content in kept[0].items():
            Path("student", file).write_bytes(content)
        Path("task.jsonl").write_bytes(kept[1])
        Path("samples.jsonl").write_bytes(kept[2])
    assert tree(run) == before
    assert qcrd.main(command)["accuracy"] >= 0  # with the inputs as they were it goes on


@pytest.mark.parametrize("name", ["task.jsonl", "samples.jsonl"])
def test_a_first_command_that_failed_on_its_input_does_not_block_the_mended_one(own, name):
    command, run = own
    good = Path(name).read_text()
    Path(name).write_text(good + "not JSON\n")
    assert name in refused(command)
    Path(name).write_text(good)
    assert qcrd.main(command)["accuracy"] >= 0
    assert len(metrics(run)) == 2


def test_a_first_command_with_a_bad_student_or_option_does_not_block_the_mended_one(own):
    command, run = own
    assert "--train-size" in refused([*command, "--train-size", "500"])
    good = Path("student/config.json").read_text()
    Path("student/config.json").write_text("{}")
    assert "--student" in refused(command)
    Path("student/config.json").write_text(good)
    assert qcrd.main(command)["accuracy"] >= 0
    assert len(metrics(run)) == 2


@pytest.mark.parametrize("name", ["toy", "tiny", "palm", "t"])
def test_a_folder_that_is_called_like_a_built_in_name_is_no_input(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    command = ["--task", "svamp", "--teacher", "palm", "--data", "no.zip", "--student", "no-folder"]
    assert qcrd.inputs_of(qcrd.parse_options(command)) == {}
    assert qcrd.inputs_of(qcrd.parse_options([])) == {}


WRITTEN: list[Callable[[dict], dict]] = [
    lambda texts: {},
    lambda texts: {"of another run": "a"},
    lambda texts: dict(list(texts.items())[1:]),
    lambda texts: texts | {next(iter(texts)): None},
    lambda texts: {f"{id}, another": text for id, text in texts.items()},
]


@pytest.mark.parametrize("change", WRITTEN)
def test_a_checkpoint_without_what_the_student_wrote_is_refused(
    unfinished, student, tmp_path, small_toy, change
):
    run = tmp_path / "run"
    shutil.copytree(unfinished, run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["written"][1] = change(state["written"][1])
    torch.save(state, run / "checkpoint.pt")
    sentence = refused(arguments(student, run))
    assert "checkpoint.pt has not what the student wrote" in sentence and "--overwrite" in sentence


def test_a_checkpoint_of_another_version_is_one_sentence(unfinished, student, tmp_path, small_toy):
    run = tmp_path / "run"
    shutil.copytree(unfinished, run)
    for change in ({"rounds": 3}, {"written": 3}, {"models": {}}):
        state = torch.load(unfinished / "checkpoint.pt", weights_only=True)
        torch.save(state | change, run / "checkpoint.pt")
        assert "checkpoint.pt is damaged or of another version" in refused(arguments(student, run))


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"accuracy": 0.'])
def test_a_result_that_is_none_is_computed_again(whole, student, tmp_path, small_toy, content):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "result.json").write_text(content)
    qcrd.main(arguments(student, run))
    assert same_run(whole, run)


def test_a_process_waits_for_another_one_in_its_run_directory_and_says_so(whole, student, tmp_path):
    run = tmp_path / "run"
    with qcrd.held(run):
        process = start(student, run)
        line = process.stdout.readline()
        assert f"{run} is in use by another process: waiting" in line
        assert not list(run.glob("config.json")) and process.poll() is None
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert len(re.findall(r"^accuracy.*$", out, re.MULTILINE)) == 1
    assert same_run(whole, run)


@pytest.mark.parametrize("script", ["qcrd.py", "eval.py"])
def test_ctrl_c_while_torch_is_loaded_ends_without_a_traceback(script, tmp_path):
    command = [sys.executable, str(ROOT / script), "--help"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    time.sleep(1.0)  # Python has started, torch takes longer
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and err == ""
