"""Input from strangers: each bad input, and the sentence that it gets: exit code 2, one line, no
traceback."""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import data
import qcrd
from data import UserError
from tests.conftest import ROOT
from tests.helpers import a_student, make_options, save_student, tokenizer

OPTIONS = [
    ("--beta nan", "--beta is nan"),
    ("--delta inf", "--delta is inf"),
    ("--lr 0", "--lr is 0"),
    ("--lr -1", "--lr is -1"),
    ("--lr nan", "--lr is nan"),
    ("--batch-size 0", "--batch-size is 0"),
    ("--batch-size -4", "--batch-size is -4"),
    ("--batch-size 1.5", "--batch-size"),
    ("--rounds 0", "--rounds is 0"),
    ("--round-steps -1", "--round-steps is -1"),
    ("--micro-batch -1", "--micro-batch is -1"),
    ("--lag -1", "--lag is -1"),
    ("--k 0", "--k is 0"),
    ("--k 9 --teacher SAMPLES", "--k 9"),
    ("--alpha3 -0.5", "--alpha3 is -0.5"),
    ("--temperature -1", "--temperature is -1"),
    ("--student-temperature 0", "--student-temperature is 0"),
    ("--toy-errors 1.5", "--toy-errors is 1.5"),
    ("--disc-every 0", "--disc-every is 0"),
    ("--disc-lr nan", "--disc-lr is nan"),
    ("--max-target 0", "--max-target is 0"),
    ("--train-size 0", "--train-size is 0"),
    ("--train-size 1e9", "--train-size 1e+09"),
    ("--scheme median", "--scheme"),
    ("--method distill", "--method"),
    ("--negatives all", "--negatives"),
    ("--device quantum", "--device quantum"),
    ("--no-such-option 1", "--no-such-option"),
    ("--bet 0.3", "--bet "),
    ("--judge none", "--judge is --disc now"),
    ("--judge=none", "--judge=none is --disc now"),
    ("--judge-loss paper", "--judge-loss is --disc-loss now"),
    ("--judge_loss paper", "--judge_loss is --disc-loss now"),
    ("--judge-lr 1e-4", "--judge-lr is --disc-lr now"),
    ("--judge-steps 4", "--judge-steps is --disc-steps now"),
    ("--judge-every 4", "--judge-every is --disc-every now"),
    ("--grad-accum 4", "--grad-accum is --micro-batch"),
    ("--task nowhere", "--task nowhere"),
    ("--task svamp --data nowhere.zip", "--data nowhere.zip"),
    ("--teacher palm", "--teacher palm"),
    ("--teacher own own", "--teacher names one teacher twice"),
    ("--teacher nowhere/at-all", "--teacher nowhere/at-all"),
    ("--student nowhere/at-all", "--student nowhere/at-all"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 12, "valid": 4, "test": 4})
    save_student("student")
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # to start a GPU takes seconds that no refusal takes
    return tmp_path


def refusal(capfd, *argv: str) -> str:
    """The sentence with which a command line is refused."""
    if "--student" not in argv:
        argv = (*argv, "--student", "student")
    started = time.monotonic()
    with pytest.raises((UserError, SystemExit)) as error:
        qcrd.main([*argv, "--out", "run"])
    assert time.monotonic() - started < 10
    sentence = str(error.value)
    if error.type is SystemExit:  # argparse's own way: usage, then the sentence
        assert error.value.code == 2
        sentence = capfd.readouterr().err.strip().split("\n")[-1]
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


@pytest.mark.parametrize(("options", "sentence"), OPTIONS)
def test_bad_options(place, capfd, options, sentence):
    rows = [
        {"id": f"toy-train-{i}", "teacher": "t", "sample": 0, "output": "The answer is 3."}
        for i in range(12)
    ]
    Path("samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sentence in refusal(capfd, *options.replace("SAMPLES", "samples.jsonl").split())


GOOD = [{"input": f"What is {i}?", "label": str(i)} for i in range(12)]
TASK_FILES = [
    (b"", "has 0 rows"),
    (b"\xff\xfe\x00bad", "line 1 is not a JSON object"),
    (b"not json\n", "line 1 is not a JSON object"),
    (b"[1, 2]\n", "line 1 is not a JSON object"),
    (b'{"input": "a"}\n', "'label'"),
    (b'{"label": "a"}\n', "'input'"),
    (b'{"input": 3, "label": "a"}\n', '"input"'),
    (b'{"input": "", "label": "a"}\n', '"input"'),
    (b'{"input": "q", "label": ["a"]}\n', '"label"'),
    (b'{"input": "q", "label": null}\n', '"label"'),
    (b'{"input": "q", "label": "a", "rationale": ["r"]}\n', '"rationale"'),
    (b'{"input": "q", "label": "  "}\n', '"label"'),
    (b'{"input": "q", "label": "c", "choices": ["a", "b"]}\n', "not among its choices"),
    (b'{"input": "q", "label": "a", "choices": "a"}\n', '"choices"'),
    (b'{"input": "q", "label": "a", "choices": [1]}\n', '"choices"'),
    (b'{"input": "q", "label": "a", "choices": 5}\n', '"choices"'),
    (
        b'{"input": "q", "label": "a", "id": "x"}\n{"input": "r", "label": "a", "id": "x"}\n',
        "ids must differ",
    ),
    (b'{"input": "q", "label": "a"}\n', "has 1 rows"),
    (b"[" * 100_000 + b"\n", "line 1 is not a JSON object"),
    (b'{"input": "' + b"x" * 10_000_000 + b"\n", "line 1 is not a JSON object"),
    (b'{"input": "q", "label": "a"}\n{"input": "torn', "line 2 is not a JSON object"),
    (b"input,label\nq,a\n", "looks like CSV"),
    (b'{"question": "q", "answer": "a"}\n', "['question', 'answer']"),
    (json.dumps({"input": "q", "label": "a", "choices": ["a"] * 27}).encode(), "26 at most"),
    (b'{"input": "half of a pair: \\ud83d", "label": "a"}\n', "line 1 is not a JSON object"),
]


@pytest.mark.parametrize("number", range(len(TASK_FILES)))
def test_bad_task_files(place, capfd, number):
    content, sentence = TASK_FILES[number]
    Path("task.jsonl").write_bytes(content)
    assert sentence in refusal(capfd, "--task", "task.jsonl")


def test_a_task_without_a_teacher_names_the_option(place, capfd):
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD))
    assert "--teacher" in refusal(capfd, "--task", "task.jsonl")


SAMPLES = [
    (b"", "no sample"),
    (b"\xff\n", "line 1 is not a JSON object"),
    (b'{"id": "toy-train-0"}\n', "'teacher'"),
    (b'{"id": "toy-train-0", "teacher": "t", "sample": "0", "output": "x"}\n', "whole number"),
    (b'{"id": "toy-train-0", "teacher": "t", "sample": 0, "output": null}\n', "whole number"),
    (b'{"id": "elsewhere", "teacher": "t", "sample": 0, "output": "x"}\n', "ids must match"),
    (b'{"id": "toy-train-0", "teacher": "t", "sample": 0, "output": "x"}\n{"id"\n', "line 2"),
]


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_bad_sample_files(place, capfd, number):
    content, sentence = SAMPLES[number]
    Path("samples.jsonl").write_bytes(content)
    assert sentence in refusal(capfd, "--teacher", "samples.jsonl")


def a_zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in members.items():
            z.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


ROW = b'{"input": "q", "label": "1"}\n'
ZIPS = [
    (b"", "not a readable zip"),
    (b"PK\x03\x04 but no zip", "not a readable zip"),
    (a_zip(datasets__svamp__svamp_train=ROW)[:-30], "not a readable zip"),
    (a_zip(other=b"x"), "has no datasets/svamp/svamp_train.json"),
    (
        a_zip(**{"/etc/datasets/svamp/svamp_train.json": ROW, "../../svamp_train.json": ROW}),
        "has no datasets/svamp",
    ),
    (a_zip(**{"datasets/svamp/svamp_train.json": b"0" * (2**30 + 1)}), "over 1 GiB"),
    (a_zip(**{"datasets/svamp/svamp_train.json": b"\xff\n"}), "line 1 is not a JSON object"),
    (a_zip(**{"datasets/svamp/svamp_train.json": b'{"input": "q"}\n'}), "'label'"),
    (a_zip(**{"datasets/svamp/svamp_train.json": ROW}), "has no datasets/svamp/svamp_test.json"),
    (
        a_zip(**{"datasets/svamp/svamp_train.json": b"", "datasets/svamp/svamp_test.json": ROW}),
        "no rows",
    ),
    (
        a_zip(
            **{
                "datasets/svamp/svamp_train.json": ROW * 50,
                "datasets/svamp/svamp_test.json": ROW,
                "datasets/svamp/llm/train_CoT_0.json": b"nope",
            }
        ),
        "train_CoT_0.json",
    ),
    (
        a_zip(
            **{
                "datasets/svamp/svamp_train.json": ROW * 50,
                "datasets/svamp/svamp_test.json": ROW,
                "datasets/svamp/llm/train_CoT_0.json": b"5",
            }
        ),
        "train_CoT_0.json",
    ),
]


@pytest.mark.parametrize("number", range(len(ZIPS)))
def test_bad_zips(place, capfd, number):
    content, sentence = ZIPS[number]
    Path("release.zip").write_bytes(content)
    assert sentence in refusal(capfd, "--task", "svamp", "--data", "release.zip")
    assert not list(place.glob("etc*"))


def test_a_corrupt_member_is_one_sentence(place, capfd):
    content = bytearray(
        a_zip(**{"datasets/svamp/svamp_train.json": random.Random(0).randbytes(5000)})
    )
    content[200:2000] = bytes(1800)
    Path("release.zip").write_bytes(content)
    assert "cannot be read" in refusal(capfd, "--task", "svamp", "--data", "release.zip")


def no_tokenizer() -> None:
    a_student().save_pretrained("bad")


def wrong_tokenizer() -> None:
    save_student("bad", vocab_size=100)


def decoder_only() -> None:
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained("bad")
    tokenizer().save_pretrained("bad")


def encoder_only() -> None:
    BertForMaskedLM(bert()).save_pretrained("bad")
    tokenizer().save_pretrained("bad")


def empty() -> None:
    Path("bad").mkdir()


def no_config() -> None:
    save_student("bad")
    Path("bad/config.json").write_text("{}")


def broken_weights() -> None:
    save_student("bad")
    Path("bad/model.safetensors").write_bytes(b"not weights")


def cut_weights() -> None:
    save_student("bad")
    content = Path("bad/model.safetensors").read_bytes()
    Path("bad/model.safetensors").write_bytes(content[: len(content) // 2])


def no_weights() -> None:
    save_student("bad")
    Path("bad/model.safetensors").unlink()


def own_code() -> None:
    Path("bad").mkdir()
    code = {"AutoModelForSeq2SeqLM": "mine.Model", "AutoConfig": "mine.Config"}
    Path("bad/config.json").write_text(json.dumps({"model_type": "mine", "auto_map": code}))
    Path("bad/mine.py").write_text("raise SystemExit('this code must not run')")


def too_many_tokens() -> None:
    student = a_student()
    student.resize_token_embeddings(100)
    student.save_pretrained("bad")
    tokenizer().save_pretrained("bad")


def no_decoder_start() -> None:
    save_student("bad", decoder_start_token_id=None)


def bert(**changes: Any) -> BertConfig:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "max_position_embeddings": 64}
    return BertConfig(vocab_size=len(tokenizer()), **(shape | changes))


def save_bert_to_bert(**ids: int) -> None:
    """Two BERTs of 64 positions, joined as published models of the kind are."""
    decoder = bert(is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(bert(), decoder)
    for name, value in ids.items():
        setattr(config, name, value)
    model = EncoderDecoderModel(config=config)
    model.save_pretrained("bad")
    tokenizer().save_pretrained("bad")


def bert_to_bert() -> None:
    save_bert_to_bert()


BAD_STUDENTS = [no_tokenizer, wrong_tokenizer, decoder_only, encoder_only, empty, no_config]
BAD_STUDENTS += [broken_weights, cut_weights, no_weights, own_code, too_many_tokens]
BAD_STUDENTS += [no_decoder_start, bert_to_bert]


@pytest.mark.parametrize("make", BAD_STUDENTS)
def test_a_student_that_cannot_be_trained_is_refused_before_a_teacher_is_paid(
    place, capfd, monkeypatch, make
):
    make()
    asked: list[Any] = []
    monkeypatch.setattr(data, "collect", lambda *how: asked.append(how))
    assert "--student bad" in refusal(capfd, "--student", "bad")
    assert asked == [] and not Path("run/config.json").exists()


def save_switch() -> None:
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2}
    shape |= {"num_decoder_layers": 2, "num_sparse_encoder_layers": 1}
    shape |= {"num_sparse_decoder_layers": 1, "num_experts": 2, "vocab_size": len(tokenizer())}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**shape, **ids)
    ).save_pretrained("bad")
    tokenizer().save_pretrained("bad")


def save_bert_to_bert_that_starts() -> None:
    save_bert_to_bert(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)


def save_without_pad_token() -> None:
    save_student("bad")
    path = Path("bad/tokenizer_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": None}))


def save_without_pad_token_in_the_model() -> None:
    save_student("bad", pad_token_id=None)


UNUSUAL = [save_switch, save_bert_to_bert_that_starts, save_without_pad_token]
UNUSUAL += [save_without_pad_token_in_the_model]
SHORT_RUN = "--rounds 1 --round-steps 1 --disc-steps 1 --batch-size 4 --max-target 8"
SHORT = SHORT_RUN.split()


@pytest.mark.parametrize("save", UNUSUAL)
@pytest.mark.parametrize("long", [False, True])
def test_an_unusual_student_works_or_is_one_sentence(place, save, long):
    """Never a traceback, also where a question is longer than the student's positions."""
    save()
    rows = [row | {"rationale": "It is so."} for row in GOOD]
    if long:
        rows = [row | {"input": row["input"] + " Anna had 2 apples." * 40} for row in rows]
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--student", "bad", "--task", "task.jsonl", "--out", "run", *SHORT]
    try:
        assert qcrd.main(command)["accuracy"] >= 0
    except UserError as error:
        assert "--student bad" in str(error) and "\n" not in str(error)


def test_a_student_of_few_positions_reads_so_many_tokens_and_says_so(place, capfd):
    config = a_student("bart").config
    config.max_position_embeddings = 64
    BartForConditionalGeneration(config).save_pretrained("bart")
    tokenizer().save_pretrained("bart")
    rows = [row | {"input": row["input"] + " Anna had 2 apples." * 40} for row in GOOD]
    rows = [row | {"rationale": "It is so. " * 40} for row in rows]
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--student", "bart", "--task", "task.jsonl", "--out", "run", *SHORT]
    qcrd.main([*command, "--max-target", "200"])
    lines = capfd.readouterr().out.splitlines()
    told = [line for line in lines if "64 tokens" in line]
    assert len(told) == 1 and "--student bart" in told[0] and "--max-input" in told[0]
    assert any("9 of 9 texts are longer than --max-input" in line for line in lines)


def test_a_student_that_reads_less_than_max_input_names_the_option(place, capfd):
    save_student("bart", "bart")
    options = make_options(student="bart", max_input=2000, max_target=256)
    student = qcrd.load_student("bart", options)
    assert (student.max_input, student.max_target) == (1024, 256)
    assert "--max-input" in capfd.readouterr().out


STRANGE = "Wherefore zebras? Quickly, xylophones jump! %% {} ~ #"


def test_a_task_that_the_student_cannot_read_is_told(place, capfd):
    rows = [row | {"input": f"{STRANGE} {row['input']}", "rationale": "So."} for row in GOOD]
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--student", "student", "--task", "task.jsonl", "--out", "run", *SHORT]
    assert qcrd.main(command)["accuracy"] >= 0
    lines = capfd.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith("warning: ") and "does not know" in line]
    assert told and "--student student" in told[0]


def test_tiny_is_refused_for_another_task_before_anything_is_read_or_paid_for(
    place, capfd, monkeypatch
):
    for name in ("tiny_student", "load_task", "collect"):
        monkeypatch.setattr(data, name, None)  # a call would end in a traceback
    for task in ("svamp", "task.jsonl"):
        sentence = refusal(capfd, "--student", "tiny", "--task", task, "--teacher", "api:m")
        assert "--student tiny" in sentence and "--student t5-small" in sentence


def test_tiny_knows_its_own_task(place, capfd, monkeypatch):
    monkeypatch.setattr(data, "tiny_student", lambda: Path("student"))
    qcrd.main(["--out", "run", *SHORT])
    assert "does not know" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "asked", "threads"), [("tiny", None, 1), ("tiny", "2", 2), ("student", None, 2)]
)
def test_tiny_is_trained_on_one_thread_unless_more_are_asked_for(
    place, monkeypatch, name, asked, threads
):
    monkeypatch.setattr(data, "tiny_student", lambda: Path("student"))
    monkeypatch.delenv("OMP_NUM_THREADS")
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        qcrd.load_student(name, make_options())
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_read_only_place_is_one_sentence(place, capfd):
    Path("file").write_text("")
    with pytest.raises(UserError, match="--out"):
        qcrd.main(["--student", "student", "--out", "file/run"])


def test_from_the_shell_a_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch):
    # set where a test before has used a GPU; torch 2.9 tells that the variable has a new name
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    process = subprocess.run(
        [sys.executable, str(ROOT / "qcrd.py"), "--beta", "nan"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (
        process.returncode == 2
        and process.stderr == "error: --beta is nan: it must be a finite number, at least 0.\n"
    )


def test_negatives_of_a_fixed_student_need_its_run_also_beside_a_folder_called_student(
    place, capfd
):
    assert Path("student").is_dir()
    qcrd.main(["--out", "no-dss", "--positives", "none", "--student", "student", *SHORT])
    capfd.readouterr()
    shutil.copytree("no-dss", "damaged")
    Path("damaged/config.json").write_text('{"options": ["dss"]}')
    fixed_students = ["", "nowhere", "no-dss", "damaged"]
    for more in ([], *(["--fixed-student", name] for name in fixed_students)):
        assert "--fixed-student" in refusal(capfd, "--negatives", "fixed", *more, *SHORT)


def test_both_parsers_survive_anything():
    """A seeded fuzz of both parsers: pieces that mean something to them, shuffled, and any
    characters at all."""
    rng, count = random.Random(0), int(os.environ.get("QCRD_FUZZ", "5000"))
    pieces = ["(", ")", "1", "23", ".", "5", "+", "-", "*", "/", "**", " ", "\n", "Q:", "Premise:", "<Answer>:", "Answer:", "So the answer is", "(a)", "(z)", "yes", "$", ",", "é", "\x00", "\ud800", "Rationale:", "x" * 50, "9" * 60]  # fmt: skip
    examples = [(data.TASKS["svamp"], data.Example("s", "q", "1")), (data.TASKS["cqa"], data.Example("c", "q", "yes", ("yes", "no (a)", "+"))), (data.Task("own"), data.Example("o", "q", "l"))]  # fmt: skip
    for _ in range(count):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 60)))
        if rng.random() < 0.3:
            text = "".join(chr(rng.randint(0, 0x10FFFF)) for _ in range(rng.randint(0, 80)))
        value = data.equation_value(text)
        assert value is None or isinstance(value, int | float)
        for task, example in examples:
            rationale, answer = data.parse_output(task, example, text)
            assert isinstance(rationale, str) and (answer is None or isinstance(answer, str))
            assert answer is None or not example.choices or answer in example.choices
    pieces = [
        "(",
        "-",
        "1+",
        "Answer:",
        "1_",
        "(a)_",
        "\n",
        "_",
        "```\n",
        "0",
        "<",
        "[",
        "{",
        "$=",
        "**",
        "correct_",
        "so_",
        "not_a_",
        "\\n",
        "1_a_",
    ]
    for piece in pieces:
        text = piece.replace("_", " ") * (20_000 // len(piece))
        started = time.process_time()
        for task, example in examples:
            data.parse_output(task, example, text)
        data.equation_value(text)
        assert time.process_time() - started < 2, text[:10]


def the_help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        qcrd.main([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def of_option(text: str, name: str) -> str:
    """What the help says of one option."""
    entry = rf"^  (?:--\S+ .*, )?{name}[ ,](.*?)(?=^  -|^\S|\Z)"
    found = re.search(entry, text, re.MULTILINE | re.DOTALL)
    assert found, name
    return " ".join(found[1].split())


def test_help_tells_the_defaults_that_hold_for_this_student_and_method(capsys):
    tiny = the_help(capsys)
    assert "(default: 0.003)" in of_option(tiny, "--lr")
    assert "(default: 1.0)" in of_option(tiny, "--delta")
    assert "(default: own)" in of_option(tiny, "--disc")
    assert "(default: 0)" in of_option(tiny, "--seed")
    t5 = the_help(capsys, "--student", "t5-small")
    assert "(default: 5e-05)" in of_option(t5, "--lr")
    assert "(default: 3.0)" in of_option(t5, "--delta")
    dss = the_help(capsys, "--method=dss")
    assert "(default: none)" in of_option(dss, "--disc")
    assert "(default: one)" in of_option(dss, "--positives")


def test_help_has_a_line_for_every_option_in_groups_at_most_100_wide(capsys):
    text = the_help(capsys)
    assert max(map(len, text.splitlines())) <= 100
    places = [text.index(title) for title in ("the task and its teacher:", "the method:")]
    places.append(text.index("the student and its training:"))
    assert places == sorted(places)
    for option in fields(qcrd.Options):
        assert len(of_option(text, qcrd.flag(option.name))) > 20, option.name
    assert len(text.splitlines()[0]) < 100 and "usage: " in text.splitlines()[0]


def test_an_option_set_by_hand_wins_over_the_preset_of_method_and_student():
    preset = qcrd.parse_options(["--method", "dss"])
    assert (preset.disc, preset.lr, preset.alpha1, preset.rounds) == ("none", 3e-3, 0.5, 10)
    by_hand = ["--method", "dss", "--disc", "own", "--lr", "0.01", "--rounds", "2"]
    options = qcrd.parse_options(by_hand)
    assert (options.disc, options.lr, options.rounds) == ("own", 0.01, 2)
    plain = qcrd.parse_options(["--student", "t5-small"])
    assert plain == qcrd.Options(student="t5-small")
    assert (plain.lr, plain.rounds, plain.batch_size, plain.delta) == (5e-5, 20, 64, 3.0)


@pytest.mark.parametrize("judge", ["--judge", "--grad-accum"])
def test_a_renamed_option_ends_with_exit_code_2_and_its_new_name(judge, capsys):
    with pytest.raises(SystemExit) as stop:
        qcrd.main([judge, "1"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert {"--judge": "--disc now", "--grad-accum": "--micro-batch"}[judge] in last
