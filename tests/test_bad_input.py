"""Input from strangers: each bad input, and the sentence that it gets. Exit code 2, one line, no traceback."""

import io
import json
import os
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

import data
import qcrd
from data import UserError
from tests.conftest import ROOT
from tests.helpers import a_student, make_options, small_models, tokenizer

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
    ("--grad-accum 0", "--grad-accum is 0"),
    ("--lag -1", "--lag is -1"),
    ("--k 0", "--k is 0"),
    ("--k 9 --teacher SAMPLES", "--k 9"),
    ("--alpha3 -0.5", "--alpha3 is -0.5"),
    ("--temperature -1", "--temperature is -1"),
    ("--student-temperature 0", "--student-temperature is 0"),
    ("--toy-errors 1.5", "--toy-errors is 1.5"),
    ("--judge-every 0", "--judge-every is 0"),
    ("--judge-lr nan", "--judge-lr is nan"),
    ("--max-target 0", "--max-target is 0"),
    ("--train-size 0", "--train-size is 0"),
    ("--train-size 1e9", "--train-size 1e+09"),
    ("--scheme median", "--scheme"),
    ("--method distill", "--method"),
    ("--negatives all", "--negatives"),
    ("--device quantum", "--device quantum"),
    ("--no-such-option 1", "--no-such-option"),
    ("--task nowhere", "--task nowhere"),
    ("--task svamp --data nowhere.zip", "--data nowhere.zip"),
    ("--teacher palm", "--teacher palm"),
    ("--teacher nowhere/at-all", "--teacher nowhere/at-all"),
    ("--student nowhere/at-all", "--student nowhere/at-all"),
    ("--negatives fixed", "--fixed-student"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(data, "TOY_SIZES", {"train": 12, "valid": 4, "test": 4})
    small_models(make_options()).student.save_pretrained("student")
    tokenizer().save_pretrained("student")
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
    (b'{"input": "q", "label": "a", "id": "x"}\n{"input": "r", "label": "a", "id": "x"}\n', "ids must differ"),
    (b'{"input": "q", "label": "a"}\n', "has 1 rows"),
    (b"[" * 100_000 + b"\n", "line 1 is not a JSON object"),
    (b'{"input": "' + b"x" * 10_000_000 + b"\n", "line 1 is not a JSON object"),
    (b'{"input": "q", "label": "a"}\n{"input": "torn', "line 2 is not a JSON object"),
]  # fmt: skip


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
    (a_zip(**{"/etc/datasets/svamp/svamp_train.json": ROW, "../../svamp_train.json": ROW}), "has no datasets/svamp"),
    (a_zip(**{"datasets/svamp/svamp_train.json": b"0" * (2**30 + 1)}), "over 1 GiB"),
    (a_zip(**{"datasets/svamp/svamp_train.json": b"\xff\n"}), "line 1 is not a JSON object"),
    (a_zip(**{"datasets/svamp/svamp_train.json": b'{"input": "q"}\n'}), "'label'"),
    (a_zip(**{"datasets/svamp/svamp_train.json": ROW}), "has no datasets/svamp/svamp_test.json"),
    (a_zip(**{"datasets/svamp/svamp_train.json": b"", "datasets/svamp/svamp_test.json": ROW}), "no rows"),
    (a_zip(**{"datasets/svamp/svamp_train.json": ROW * 50, "datasets/svamp/svamp_test.json": ROW, "datasets/svamp/llm/train_CoT_0.json": b"nope"}), "train_CoT_0.json"),
    (a_zip(**{"datasets/svamp/svamp_train.json": ROW * 50, "datasets/svamp/svamp_test.json": ROW, "datasets/svamp/llm/train_CoT_0.json": b"5"}), "train_CoT_0.json"),
]  # fmt: skip


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
    small_models(make_options()).student.save_pretrained("bad")


def wrong_tokenizer() -> None:
    no_tokenizer()
    config = json.loads(Path("bad/config.json").read_text())
    tokenizer().save_pretrained("bad")
    Path("bad/config.json").write_text(json.dumps(config | {"vocab_size": 100}))


def decoder_only() -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        "bad"
    )
    tokenizer().save_pretrained("bad")


def empty() -> None:
    Path("bad").mkdir()


def broken_weights() -> None:
    no_tokenizer()
    tokenizer().save_pretrained("bad")
    Path("bad/model.safetensors").write_bytes(b"not weights")


def own_code() -> None:
    Path("bad").mkdir()
    Path("bad/config.json").write_text(
        json.dumps(
            {
                "model_type": "mine",
                "auto_map": {"AutoModelForSeq2SeqLM": "mine.Model", "AutoConfig": "mine.Config"},
            }
        )
    )
    Path("bad/mine.py").write_text("raise SystemExit('this code must not run')")


def too_many_tokens() -> None:
    student = a_student()
    student.resize_token_embeddings(100)
    student.save_pretrained("bad")
    tokenizer().save_pretrained("bad")


@pytest.mark.parametrize(
    "make",
    [no_tokenizer, wrong_tokenizer, decoder_only, empty, broken_weights, own_code, too_many_tokens],
)
def test_bad_model_folders(place, capfd, make):
    make()
    assert "--student bad" in refusal(capfd, "--student", "bad")


def test_a_student_that_reads_less_than_max_input_names_the_option(place, capfd):
    a_student("bart").save_pretrained("bart")
    tokenizer().save_pretrained("bart")
    assert "--max-input 1024" in refusal(capfd, "--student", "bart", "--max-input", "2000")


def test_a_read_only_place_is_one_sentence(place, capfd):
    Path("file").write_text("")
    with pytest.raises(UserError, match="--out"):
        qcrd.main(["--student", "student", "--out", "file/run"])


def test_from_the_shell_a_bad_input_is_one_line_and_exit_code_2(tmp_path):
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


def test_both_parsers_survive_anything():
    """A seeded fuzz of both parsers: pieces that mean something to them, shuffled, and any characters at all."""
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
    for text in [
        "(" * 10_000,
        "-" * 10_000,
        "1+" * 10_000,
        "Answer:" * 5_000,
        "1 " * 10_000,
        "(a) " * 10_000,
    ]:
        started = time.process_time()
        for task, example in examples:
            data.parse_output(task, example, text)
        data.equation_value(text)
        assert time.process_time() - started < 2, text[:10]


def test_help_tells_each_option_and_its_default(capsys):
    with pytest.raises(SystemExit):
        qcrd.main(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.split("\n"))) <= 120
    for part in (
        "--seed",
        "(default 0)",
        "--delta",
        "(default 3; tiny 1)",
        "--lr",
        "(default 5e-5; tiny 3e-3)",
    ):
        assert part in text
