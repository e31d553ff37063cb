"""What comes from people: tasks of their own, downloads, folders; and how often the toy's teacher
errs."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data
from data import TASKS, Example, Task, UserError
from tests.conftest import ROOT


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(*labels: object) -> list[dict]:
    return [{"input": f"Question {i}?", "label": label} for i, label in enumerate(labels)]


def everything(splits: dict[str, list[Example]]) -> list[Example]:
    return splits["train"] + splits["valid"] + splits["test"]


# White space


@pytest.mark.parametrize(
    "answer",
    ["blue  whale", " blue whale\n", "blue\u00a0whale", "blue\twhale\u202f", "blue\nwhale"],
)
def test_white_space_never_decides_right_or_wrong(answer):
    for one, other in ((answer, "blue whale"), ("blue whale", answer)):
        assert Task("own").correct(one, Example("x", "?", other))
        assert TASKS["cqa"].correct(one, Example("x", "?", other, (other, "ant")))
    assert not Task("own").correct("bluewhale", Example("x", "?", answer))


def test_an_answer_of_white_space_is_none():
    assert Task("own").key(" \u00a0\n") is None and Task("own").key(None) is None


def test_a_label_is_kept_as_it_was_given(tmp_path):
    given = [" U.S. ", "first line\nsecond line", "a\u00a0b", "__init__", "yes", "Answer: no"]
    _, splits = data.load_task(write(tmp_path / "my.jsonl", labelled(*given)))
    assert sorted(e.label for e in everything(splits)) == sorted(given)


def test_a_label_is_among_its_choices_whatever_the_white_space(tmp_path):
    rows = [row | {"choices": ["blue whale", "ant"]} for row in labelled(*["blue  whale "] * 6)]
    task, splits = data.load_task(write(tmp_path / "my.jsonl", rows))
    assert task.correct("blue whale", splits["test"][0])


# Labels that are numbers

NUMBERS = [
    "5",
    5,
    5.0,
    "-5",
    "1,200",
    "$5",
    ".5",
    "( 7 + 5 )",
    "\u22125",
    "1 200",
    "1\u00a0200",
    "05",
    "5%",
]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_as_people_write_them_are_numbers(tmp_path, capsys, number):
    task, _ = data.load_task(write(tmp_path / "my.jsonl", labelled("1", "2", "3", number)))
    assert task.numeric and task.answer_format == data.NUMBER
    assert "text" not in capsys.readouterr().out


@pytest.mark.parametrize("odd", ["N/A", float("nan"), "nan", float("inf"), "five", "5 apples", "?"])
def test_one_label_that_is_no_number_is_named_and_what_follows_from_it(tmp_path, capsys, odd):
    path = write(tmp_path / "my.jsonl", labelled("1", "2", odd, "4", odd))
    task, _ = data.load_task(path)
    assert not task.numeric
    said = capsys.readouterr().out
    why = f"The label of {path}, line 3 is not a number, as most labels are:"
    assert said == f"{why} all answers are compared as text.\n"


@pytest.mark.parametrize("labels", [["a", "b", "c", "4"], ["yes", "no", "1", "2"]])
def test_a_task_whose_labels_are_mostly_texts_is_one_of_texts(tmp_path, capsys, labels):
    task, _ = data.load_task(write(tmp_path / "my.jsonl", labelled(*labels)))
    assert not task.numeric and capsys.readouterr().out == ""


# Choices


def test_choices_that_differ_by_row_are_read_by_the_student_as_in_cqa(tmp_path):
    rows = [
        {"input": f"Which is {i}?", "label": f"n{i}", "choices": [f"n{i}", "none"]}
        for i in range(6)
    ]
    rows.append({"input": "Anything?", "label": "n"})
    _, splits = data.load_task(write(tmp_path / "my.jsonl", rows))
    inputs = {e.input for e in everything(splits)}
    assert "Which is 3?\nAnswer Choices:\n(a) n3\n(b) none" in inputs and "Anything?" in inputs


def test_choices_that_the_input_lists_are_not_listed_twice(tmp_path):
    text = "Which?\nAnswer Choices:\n(a) x\n(b) "
    rows = [{"input": text + str(i), "label": "x", "choices": ["x", str(i)]} for i in range(4)]
    _, splits = data.load_task(write(tmp_path / "my.jsonl", rows))
    assert {e.input for e in everything(splits)} == {text + str(i) for i in range(4)}


def test_a_fixed_set_of_labels_leaves_the_input_as_it_is(tmp_path):
    rows = [row | {"choices": ["yes", "no"]} for row in labelled("yes", "no", "yes", "no")]
    _, splits = data.load_task(write(tmp_path / "my.jsonl", rows))
    assert {e.input for e in everything(splits)} == {f"Question {i}?" for i in range(4)}


@pytest.mark.parametrize(("count", "fits"), [(26, True), (27, False), (100, False)])
def test_there_are_as_many_choices_as_letters(tmp_path, count, fits):
    choices = [f"c{i}" for i in range(count)]
    path = write(
        tmp_path / "my.jsonl", [row | {"choices": choices} for row in labelled(*choices[:5])]
    )
    if fits:
        example = data.load_task(path)[1]["train"][0]
        assert "\n(z) c25" in data.question_text(example)
    else:
        with pytest.raises(UserError, match=r'line 1: "choices" must be .* 26 at most'):
            data.load_task(path)


# Rows of the release


def release(path: Path, folder: str, rows: list[dict]) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    with zipfile.ZipFile(path, "w") as z:
        for split in ("train", "valid", "test"):
            z.writestr(f"datasets/{folder}/{folder}_{split}.json", lines)
    return str(path)


def pair(label: object) -> dict:
    return {"premise": "A man sleeps.", "hypothesis": "He rests.", "label": label}


@pytest.mark.parametrize("task", ["anli", "esnli"])
def test_the_labels_0_1_and_2_are_those_of_nli(tmp_path, task):
    path = release(tmp_path / "z.zip", TASKS[task].folder, [pair(0), pair(1), pair(2)])
    _, splits = data.load_task(task, path)
    assert [e.label for e in splits["train"]] == ["entailment", "neutral", "contradiction"]


@pytest.mark.parametrize("label", [-1, 3, -3, True, False, 1.0, "1", "entailment", None, [0], {}])
@pytest.mark.parametrize("task", ["anli", "esnli"])
def test_any_other_label_of_nli_is_refused_by_line(tmp_path, task, label):
    path = release(tmp_path / "z.zip", TASKS[task].folder, [pair(0), pair(label)])
    with pytest.raises(UserError, match=r"_train.json, line 2: the label .* not among its choices"):
        data.load_task(task, path)


@pytest.mark.parametrize(
    "changes", [{"choices": None}, {"choices": 5}, {"answer": None}, {"answer": 2}]
)
def test_a_broken_row_of_cqa_is_refused_by_line(tmp_path, changes):
    row = {"question": "Where?", "choices": ["park", "sea"], "answer": "sea"}
    path = release(tmp_path / "z.zip", "cqa", [row, row | changes])
    with pytest.raises(UserError, match=r"cqa_train.json, line 2"):
        data.load_task("cqa", path)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_release_that_leaves_a_split_without_rows_is_refused(tmp_path, rows):
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w") as z:  # the training set must give a validation split too
        z.writestr("datasets/svamp/svamp_train.json", '{"input": "q", "label": "1"}\n' * rows)
        z.writestr("datasets/svamp/svamp_test.json", '{"input": "q", "label": "1"}\n')
    with pytest.raises(UserError, match="--data .* a split with no rows"):
        data.load_task("svamp", str(path))


# Files of one's own


@pytest.mark.parametrize("count", [3, 4, 5, 6, 9, 10, 11])
def test_every_split_has_a_row_from_three_rows_on(tmp_path, count):
    _, splits = data.load_task(write(tmp_path / "my.jsonl", labelled(*["a"] * count)))
    held_out = max(2, math.ceil(count / 5))
    assert len(splits["train"]) == count - held_out and len(everything(splits)) == count
    assert min(map(len, splits.values())) >= 1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_rows_are_refused(tmp_path, count):
    with pytest.raises(UserError, match=f"--task .* has {count} rows"):
        data.load_task(write(tmp_path / "my.jsonl", labelled(*["a"] * count)))


CSV = [
    ("my.csv", b"input,label\nWhat is it?,a\n"),
    ("my.jsonl", b"input,label\nWhat is it?,a\n"),
    ("my.csv", b'"input","label"\n"What is {it}?","a"\n'),
    ("my.csv", b"\xef\xbb\xbfinput;label\r\nWhat is it?;a\r\n"),
    ("my.tsv", b"input\tlabel\nWhat is it?\ta\n"),
    ("my.csv", b"1,2\n"),
    ("my.csv", "größe,label\n".encode("latin-1")),
]


@pytest.mark.parametrize(("name", "content"), CSV)
def test_a_csv_is_called_a_csv(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}, line 1 .* looks like CSV.*: write JSON Lines"):
        data.load_task(str(tmp_path / name))


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"question": "q", "answer": "a"}, "label"),
        ({"question": "q", "label": "a"}, "input"),
        ({"Input": "q", "Label": "a"}, "label"),
        ({"input": "q", "target": "a"}, "label"),
    ],
)
def test_other_columns_are_listed_as_what_was_found(tmp_path, row, missing):
    with pytest.raises(UserError, match=f"my.jsonl, line 1 has no usable '{missing}'") as error:
        data.load_task(write(tmp_path / "my.jsonl", [row]))
    assert str(list(row)) in str(error.value)


def test_a_thousand_columns_are_not_all_listed(tmp_path):
    with pytest.raises(UserError) as error:
        data.load_task(write(tmp_path / "my.jsonl", [{f"column {i}": 0 for i in range(1000)}]))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["input", "label", "rationale", "id"])
def test_half_a_surrogate_pair_is_refused_by_line(tmp_path, name):
    row = {"input": "q", "label": "a", "rationale": "r", "id": "i"} | {name: "so \ud83d"}
    with pytest.raises(UserError, match=r"my.jsonl, line 1 is not a JSON object in UTF-8"):
        data.load_task(write(tmp_path / "my.jsonl", [row]))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "my.jsonl", labelled(*["a"] * 10))
    task, _ = data.load_task("~/my.jsonl")
    assert task.name == "my"
    release(tmp_path / "z.zip", "anli1", [pair(0)])
    assert data.load_task("anli", "~/z.zip")[1]["test"][0].label == "entailment"
    assert data.digest("~/my.jsonl") == data.digest(tmp_path / "my.jsonl")
    with pytest.raises(UserError, match=r"--task ~/none.jsonl"):
        data.load_task("~/none.jsonl")


# Digests


def test_a_file_has_another_digest_once_it_was_changed(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_bytes(b"x" * 3_000_000)
    before = data.digest(str(path))
    assert len(before) == 16 and before == data.digest(path)
    path.write_bytes(b"x" * 2_999_999 + b"y")
    assert data.digest(path) != before


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "spiece.model", "tokenizer.json"]
)
def test_a_model_folder_has_another_digest_once_a_model_file_was_changed(tmp_path, name):
    for file in ("config.json", "model.safetensors", "spiece.model", "tokenizer.json"):
        (tmp_path / file).write_text(file)
    (tmp_path / "logs").mkdir()
    before = data.digest(tmp_path)
    (tmp_path / "README.md").write_text("Notes are no part of the model.")
    (tmp_path / "logs" / "config.json").write_text("Nor are folders.")
    assert data.digest(tmp_path) == before
    (tmp_path / name).write_text("changed")
    changed = data.digest(tmp_path)
    (tmp_path / name).unlink()
    assert len({before, changed, data.digest(tmp_path)}) == 3


# The cache folder and downloads


@pytest.mark.parametrize("folder", [".", "~nobody-of-this-name/qcrd"])
def test_the_cache_may_be_any_folder(tmp_path, folder):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; print(data.CACHE)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"QCRD_CACHE": folder},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == folder or (folder[0] == "~" and done.stdout.strip()[0] == "/")


def test_a_cache_folder_that_cannot_be_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data, "CACHE", tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"cache folder .*file/cache cannot be written.*QCRD_CACHE"):
        data.tiny_student()
    with pytest.raises(UserError, match="QCRD_CACHE"):
        data.download("http://127.0.0.1:9/datasets.zip")


def test_a_full_disk_is_one_sentence(tmp_path):
    with (
        pytest.raises(UserError, match=r"cannot be written \(.*No space left"),
        data.cache_folder(tmp_path),
    ):
        raise OSError(28, "No space left on device")


class Dripping(BaseHTTPRequestHandler):
    """Sends a byte every tenth of a second, without an end."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x")
                time.sleep(0.1)
        except OSError:
            pass


@pytest.fixture
def dripping(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dripping)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/datasets.zip"
    server.shutdown()
    server.server_close()


def test_a_download_ends_at_its_limit_and_leaves_nothing(dripping, monkeypatch):
    monkeypatch.setattr(data, "DOWNLOAD_LIMIT", 1)
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"--data http.* could not be downloaded \(it took over 1 s"
    ):
        data.load_task("svamp", dripping)
    assert time.monotonic() - started < 5 and not list(data.CACHE.iterdir())


def test_a_download_that_is_interrupted_ends_at_once_and_leaves_nothing(dripping):
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        data.download(dripping)
    assert time.monotonic() - started < 5 and not list(data.CACHE.iterdir())


@pytest.mark.parametrize("url", ["http://", "http://:9/x.zip", "http://127.0.0.1:port/x.zip"])
def test_a_url_that_is_none_is_one_sentence(tmp_path, monkeypatch, url):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    with pytest.raises(UserError, match="could not be downloaded"):
        data.load_task("svamp", url)


# The toy's teacher


@pytest.mark.parametrize("rate", [0, 0.25, 0.5, 1])
def test_the_share_of_wrong_samples_is_what_the_option_says(rate):
    task, rng, wrong, total = TASKS["toy"], random.Random(0), 0, 0
    for example in data.toy_splits()["train"]:
        for _ in range(5):
            output = data.think(rng, example.story, rate)
            rationale, answer = data.parse_output(task, example, output)
            right = task.correct(answer, example)
            assert data.is_valid(example, rationale) == right
            wrong, total = wrong + (not right), total + 1
    error = math.sqrt(rate * (1 - rate) / total)
    assert abs(wrong / total - rate) <= 3 * error


def test_every_story_has_an_error_in_reach():
    """Also where all changes but one lead out of the range of counts."""
    narrow = [
        data.Story("Anna", "eggs", 2, (data.Event("Anna", "lost", 2, "eggs"),)),
        data.Story("Anna", "eggs", 12, (data.Event("Anna", "got", 8, "eggs", "Ben"),)),
        data.Story(
            "Anna",
            "eggs",
            11,
            (data.Event("Anna", "found", 9, "eggs"), data.Event("Ben", "lost", 9, "cards")),
        ),
    ]
    rng = random.Random(0)
    for story in narrow:
        example = Example("x", story.input(), data.equation(story.start, story.changes()))
        for _ in range(100):
            output = data.think(rng, story, 1.0)
            _, answer = data.parse_output(TASKS["toy"], example, output)
            assert answer and not TASKS["toy"].correct(answer, example)
