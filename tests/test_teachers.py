"""Teachers and their cache against real parts: a loopback server with faults, a local model, killed
processes."""

import functools
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import data
from data import TASKS, Cache, UserError
from tests.conftest import ROOT
from tests.helpers import Full, make_options, tokenizer

KEY = "sk-this-must-never-be-written"
KILLS = int(os.environ.get("QCRD_KILLS", "4"))  # 20 takes two minutes


def explain(question: str) -> str:
    return f"<Explanation>: {question[:40]}\n<Answer>: ( 1 + 1 )"


class Server(ThreadingHTTPServer):
    """Chat completions on loopback; `faults` are played one a request before it answers
    properly."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        faults: tuple[Any, ...] = (),
        delay: float = 0.0,
        answer: Callable[[str], str] = explain,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.faults, self.delay = list(faults), delay
        self.only = b""  # what a server says that takes max_completion_tokens only
        self.times: list[float] = []
        self.bodies: list[dict] = []
        self.agents: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: object) -> None:
        pass  # clients that hang up are part of the test


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.times.append(time.monotonic())
        server.bodies.append(request)
        server.agents.append(self.headers["User-Agent"])
        assert (
            self.path == "/v1/chat/completions" and self.headers["Authorization"] == f"Bearer {KEY}"
        )
        fault = server.faults.pop(0) if server.faults else None
        time.sleep(server.delay)
        if isinstance(fault, tuple):  # (status, body, headers)
            self.reply(fault[0], fault[1], **(fault[2] if len(fault) > 2 else {}))
        elif fault in ("drip", "header drip"):
            self.close_connection = True
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Drip: ")
            if fault == "drip":
                self.wfile.write(b"\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(40):
                self.wfile.write(b" ")
                time.sleep(0.1)
        elif fault == "429":
            self.reply(429, b"{}", Retry_After="0.5")
        elif fault in ("401", "404", "500", "503"):
            self.reply(int(fault), b"{}")
        elif server.only and "max_tokens" in request:
            self.reply(400, server.only)
        elif fault == "temperature":
            self.reply(
                400, b'{"error": {"message": "temperature: only the default (1) is supported"}}'
            )
        elif fault == "cut":
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif fault == "malformed":
            self.reply(200, b'{"choices": [{"mess', Content_Type="application/json")
        elif fault == "empty":
            self.reply(200, b'{"choices": []}', Content_Type="application/json")
        else:
            if fault == "slow":
                time.sleep(2.0)
            content = None if fault == "null" else server.answer(request["messages"][1]["content"])
            message = {"choices": [{"index": 0, "finish_reason": "length" if fault == "null" else "stop", "message": {"role": "assistant", "content": content}}],
                       "id": "x", "created": 0, "model": request["model"], "system_fingerprint": "", "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}  # fmt: skip
            self.reply(200, json.dumps(message).encode(), Content_Type="application/json")


@pytest.fixture
def api(monkeypatch, tmp_path):
    """A function that samples the first `n` toy questions from a server, and the place of the
    cache."""
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "API_BACKOFF", 0.01)
    monkeypatch.setattr(data, "API_TIMEOUT", 1.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def sample(server: Server, n: int = 3, **changes: object) -> dict:
        options = make_options(teacher=["api:model"], api_base=server.url, k=2, **changes)
        return data.collect(TASKS["toy"], data.toy_splits()["train"][:n], ["api:model"], options)

    return sample


@pytest.mark.parametrize(
    "fault",
    ["429", "500", "503", "cut", "malformed", "empty", "slow", "drip", "header drip"]
    + [(status, b"{}") for status in (408, 409, 425, 429, 502)],
)
def test_a_passing_fault_is_tried_again(api, fault):
    server = Server((fault, fault))
    samples = api(server, api_concurrency=1)
    assert len(samples) == 3 and all(len(own) == 2 for own in samples.values())
    assert len(server.times) == 6 + 2
    if fault == "429":
        assert server.times[1] - server.times[0] >= 0.5  # Retry-After


def test_a_refused_key_stops_at_once_and_is_not_shown(api, tmp_path, capfd):
    server = Server(("401",) * 20)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        api(server, api_concurrency=1)
    assert len(server.times) <= 2
    assert KEY not in str(error.value) + "".join(capfd.readouterr())


def test_a_fault_that_stays_ends_in_one_sentence_and_loses_nothing(api, monkeypatch):
    monkeypatch.setattr(data, "API_TRIES", 3)
    server = Server()
    api(server, n=2)
    server.faults = ["500"] * 1000
    with pytest.raises(UserError, match="status 500"):
        api(server, n=3)
    before = -1
    while before != len(server.times):  # until the requests that were under way are answered
        before = len(server.times)
        time.sleep(0.5)
    server.faults = []
    assert len(api(server, n=3)) == 3
    assert len(server.times) - before == 2  # only the third question's two samples


def test_a_reply_without_text_is_a_sample_without_an_answer_said_once_and_not_asked_again(
    api, capsys
):
    server = Server(("null", "null"))
    samples = api(server, api_concurrency=1)
    assert len(server.times) == 6
    assert [sample.answer for own in samples.values() for sample in own].count(None) == 2
    out = capsys.readouterr().out
    assert out.count("--max-tokens") == 1 and "2 replies had no text (finish_reason length)" in out
    api(server)
    assert len(server.times) == 6


def test_a_server_that_takes_max_completion_tokens_only_is_served(api):
    server = Server()
    server.only = b'{"error": {"message": "Unsupported parameter: max_tokens. Use max_completion_tokens instead."}}'
    assert len(api(server, max_tokens=99)) == 3
    assert (
        server.bodies[-1]["max_completion_tokens"] == 99 and "max_tokens" not in server.bodies[-1]
    )


def test_a_refusal_shows_the_servers_own_words(api):
    with pytest.raises(UserError, match="status 400.*only the default"):
        api(Server(("temperature",) * 20))


def test_a_server_on_this_machine_is_reached_with_the_hub_offline(api, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(api(Server())) == 3


def test_a_second_run_asks_nothing_and_another_temperature_asks_again(api, tmp_path):
    server = Server()
    api(server)
    api(server)
    assert len(server.times) == 6
    api(server, temperature=1.0)
    assert len(server.times) == 12 and server.bodies[-1]["temperature"] == 1.0
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()


def test_the_prompt_has_the_papers_form():
    example = data.Example(
        "c", "Where?\nAnswer Choices:\n(a) here\n(b) there", "here", ("here", "there")
    )
    system, user = data.ask(TASKS["cqa"], example)
    assert "question-answering robot" in system["content"] and "<Explanation>:" in system["content"]
    assert user["content"].endswith("(b) there")
    nli = data.ask(TASKS["anli"], data.Example("n", "A.</s>B.", "neutral", data.NLI))[1]["content"]
    assert "Hypothesis: B." in nli and "(c) contradiction" in nli


CHILD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import data, qcrd
data.CACHE = Path(sys.argv[1])
options = qcrd.Options(api_base=sys.argv[2], k=5)
data.collect(data.TASKS["toy"], data.toy_splits()["train"][:40], ["api:model"], options)
"""


def child(tmp_path: Path, server: Server) -> subprocess.Popen:
    env = os.environ | {"OPENAI_API_KEY": KEY}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), server.url],
        env=env,
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )


def cached(tmp_path: Path) -> Counter:
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    rows = [
        json.loads(line) for line in path.read_bytes().splitlines() if line.strip().endswith(b"}")
    ]
    return Counter((row["id"], row["sample"]) for row in rows)


def test_killed_again_and_again_and_finished_every_sample_is_there_exactly_once(tmp_path):
    server, rng, kills = Server(delay=0.05), random.Random(0), 0
    while kills < KILLS:
        known = len(server.times)
        process = child(tmp_path, server)
        while len(server.times) == known and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    finisher = child(tmp_path, server)
    assert finisher.communicate(timeout=120)[1] is not None and finisher.returncode == 0
    seen = cached(tmp_path)
    assert len(seen) == 200 and set(seen.values()) == {1}
    assert len(server.times) <= 200 + KILLS * 8  # a kill loses the requests in flight and no more


def test_two_processes_on_one_cache_do_not_corrupt_it(tmp_path):
    server = Server(delay=0.01)
    both = [child(tmp_path, server) for _ in range(2)]
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert len(cached(tmp_path)) == 200 and len(server.times) == 200
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    assert all(json.loads(line) for line in path.read_bytes().strip().splitlines())
    assert len(Cache(path).load()) == 200


def test_a_line_of_other_types_is_no_sample(tmp_path):
    cache = Cache(tmp_path / "c.jsonl")
    rows: list[dict[str, Any]] = [
        {"asked": [], "sample": 0, "output": "x"},
        {"asked": "a", "sample": "0", "output": "x"},
        {"asked": "a", "sample": 0, "output": None},
        {"asked": "a", "sample": 0, "output": "x", "max_tokens": "512"},
        {"asked": "a", "sample": 0, "output": "cut", "max_tokens": 4},
        {"asked": "a", "sample": 1, "output": "whole", "max_tokens": None},
    ]
    cache.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cache.load(8) == {("a", 1): "whole"}
    assert cache.load(4) == {("a", 0): "cut", ("a", 1): "whole"}


def test_a_torn_last_line_is_dropped_with_a_warning_and_closed_before_the_next(tmp_path, capsys):
    cache = Cache(tmp_path / "c.jsonl")
    cache.append("a", "t", 0, "one")
    with cache.path.open("ab") as file:
        file.write(b'\n{"id": "b", "teacher": "t", "sam')
    assert cache.load() == {("a", 0): "one"}
    assert "torn" in capsys.readouterr().out
    cache.append("c", "t", 0, "two")
    cache.append("a", "t", 0, "again")
    assert cache.load() == {("a", 0): "one", ("c", 0): "two"}


def save_causal(folder: Path, chat: bool) -> None:
    """A GPT-2 of random weights with a fast tokenizer of the toy's words."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend_tokenizer, eos_token="</s>", unk_token="<unk>"
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
        )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(fast),
        n_positions=1024,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["chat", "plain", "seq2seq"])
def test_a_local_model_is_sampled_in_batches(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    folder = tmp_path / "model"
    if kind == "seq2seq":
        config = T5Config(
            vocab_size=len(tokenizer()),
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
        T5ForConditionalGeneration(config).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    else:
        save_causal(folder, chat=kind == "chat")
    options = make_options(k=3, max_tokens=8)
    examples = data.toy_splits()["train"][:7]
    cache, chat = Cache(tmp_path / "samples.jsonl"), functools.partial(data.ask, TASKS["toy"])
    outputs = data.sampled(cache, examples, 3, str(folder), chat, options)
    assert Counter(id for id, _ in outputs) == {e.id: 3 for e in examples}
    assert len(set(outputs.values())) > 10  # sampled, not one greedy answer
    monkeypatch.setattr(data, "ask_model", None)  # the second time all comes from the cache
    assert data.sampled(cache, examples, 3, str(folder), chat, options) == outputs
    # a model that was trained again in the same folder is asked anew
    again = [((e, n), "other words", "") for e in examples for n in range(3)]
    monkeypatch.setattr(data, "ask_model", lambda *_: again)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    found = data.sampled(cache, examples, 3, str(folder), chat, options)
    assert set(found.values()) == {"other words"}


def test_fewer_at_once_are_fewer_than_there_are():
    sizes = []

    def work(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return batch

    assert list(data.in_batches([1, 2, 3, 4, 5], 64, work)) == [[1, 2], [3, 4], [5]]
    assert sizes == [5, 3, 2, 2, 1]
    assert list(data.in_batches([], 64, work)) == []


@pytest.mark.parametrize("most", [1, 3])
def test_a_local_model_whose_memory_runs_out_is_asked_less_at_once(tmp_path, monkeypatch, most):
    save_causal(tmp_path, chat=False)
    generate, sizes = GPT2LMHeadModel.generate, []

    def bounded(self: Any, **how: Any) -> Any:
        sizes.append(len(how["input_ids"]))
        if len(how["input_ids"]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, **how)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", bounded)
    requests = [(e, n) for e in data.toy_splits()["train"][:9] for n in range(2)]
    ask = functools.partial(data.ask, TASKS["toy"])
    options = make_options(max_tokens=4, device="cpu")  # where 16 are asked at once
    found = list(data.ask_model(requests, ask, str(tmp_path), options))
    assert [request for request, _, _ in found] == requests  # each once and in its place
    tried = [16, 8, 4, 2] if most == 3 else [16, 8, 4, 2, 1]
    assert sizes == tried[:-1] + [tried[-1]] * (18 // tried[-1])  # what fits is kept


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_local_model_of_which_one_question_is_too_much_cannot_be_used(
    tmp_path, monkeypatch, device
):
    save_causal(tmp_path, chat=False)
    monkeypatch.setattr(GPT2LMHeadModel, "generate", Full(None, None))
    requests = [(e, 0) for e in data.toy_splits()["train"][:3]]
    ask = functools.partial(data.ask, TASKS["toy"])
    if device == "cuda":  # also where there is none
        monkeypatch.setattr(GPT2LMHeadModel, "to", lambda self, _: self)
        monkeypatch.setattr(data.transformers.BatchEncoding, "to", lambda self, _: self)
    options = make_options(max_tokens=4, device=device)
    with pytest.raises(UserError, match="--teacher .* cannot be used .*out of memory") as error:
        list(data.ask_model(requests, ask, str(tmp_path), options))
    assert ("--device cpu" in str(error.value)) == (device == "cuda")


def test_a_local_model_samples_by_any_algorithm_on_the_device_of_the_student(tmp_path, monkeypatch):
    save_causal(tmp_path, chat=False)
    generate, seen = GPT2LMHeadModel.generate, []

    def spy(self: Any, **how: Any) -> Any:
        seen.append((str(self.device), torch.are_deterministic_algorithms_enabled()))
        return generate(self, **how)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", spy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and yet --device says cpu
    requests = [(e, 0) for e in data.toy_splits()["train"][:3]]
    ask = functools.partial(data.ask, TASKS["toy"])
    options = make_options(max_tokens=4, device="cpu")
    # sampling by top-p adds up floats, for which torch has no deterministic algorithm on a GPU
    torch.use_deterministic_algorithms(True)
    try:
        list(data.ask_model(requests, ask, str(tmp_path), options))
        assert seen == [("cpu", False)] and torch.are_deterministic_algorithms_enabled()
        with pytest.raises(UserError):
            list(data.ask_model(requests, ask, str(tmp_path / "nowhere"), options))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_several_teachers_are_pooled(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    examples = data.toy_splits()["train"][:4]
    file = tmp_path / "samples.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": e.id, "teacher": "me", "sample": 0, "output": "The answer is 3."})
            + "\n"
            for e in examples
        )
    )
    samples = data.collect(TASKS["toy"], examples, ["toy", str(file)], make_options())
    assert all([s.teacher for s in own] == ["toy"] * 5 + ["me"] for own in samples.values())
    # a file of two teachers in any order: the first K of each
    rows = [(name, n) for name in ("a", "b") for n in (2, 1, 0)]
    both = tmp_path / "both.jsonl"
    both.write_text(
        "".join(
            json.dumps({"id": e.id, "teacher": name, "sample": n, "output": f"The answer is {n}."})
            + "\n"
            for e in examples
            for name, n in rows
        )
    )
    samples = data.collect(TASKS["toy"], examples, [str(both)], make_options(k=2))
    for of_question in samples.values():
        found = [(s.teacher, s.answer) for s in of_question]
        assert found == [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1")]
    # K are of each teacher: none is asked for samples that are not used
    samples = data.collect(TASKS["toy"], examples, ["toy", str(file)], make_options(k=2))
    assert all([s.teacher for s in own] == ["toy"] * 2 + ["me"] for own in samples.values())


class Files(BaseHTTPRequestHandler):
    """A zip behind faults: cut short, a wrong length, a stall, 404; ranges work."""

    protocol_version = "HTTP/1.1"
    content, faults = b"", []

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        cls = type(self)
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        part = cls.content[start:]
        fault = cls.faults.pop(0) if cls.faults else None
        if fault == "404":
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(cls.content) - 1}/{len(cls.content)}"
            )
        self.send_header("Content-Length", str(len(part) + (1000 if fault == "length" else 0)))
        self.end_headers()
        if fault == "garbage":
            part = b"x" * len(part)
        self.wfile.write(part[: len(part) // 2] if fault in ("cut", "stall") else part)
        if fault == "stall":
            time.sleep(3)
        self.close_connection = fault is not None


@pytest.mark.parametrize("faults", [[], ["cut"], ["stall"], ["length"], ["cut", "cut"]])
def test_the_download_is_whole_or_not_there(tmp_path, monkeypatch, faults):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    release = tmp_path / "made.zip"
    with data.zipfile.ZipFile(release, "w") as z:
        z.writestr("datasets/svamp/svamp_train.json", random.Random(0).randbytes(200_000))
    Files.content, Files.faults = release.read_bytes(), list(faults)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/datasets.zip"
    for _ in range(5):  # as a user who starts the command again
        try:
            path = data.download(url)
            break
        except UserError as error:
            assert not list(tmp_path.glob("*/datasets.zip")) and "try again" in str(error)
    assert path.read_bytes() == Files.content


@pytest.mark.parametrize("fault", ["404", "garbage"])
def test_a_wrong_download_is_one_sentence(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(data, "CACHE", tmp_path)
    Files.content, Files.faults = b"y" * 1000, [fault] * 10
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(UserError, match="--data"):
        data.download(f"http://127.0.0.1:{server.server_port}/datasets.zip")
    assert not list(tmp_path.glob("*/datasets.zip*.zip"))


@pytest.mark.parametrize("name", ["svamp", "cqa", "anli", "esnli"])
def test_a_model_without_chat_template_gets_three_worked_examples_of_its_own_task(name):
    task = TASKS[name]
    choices = {"cqa": ("yes", "no"), "anli": data.NLI, "esnli": data.NLI}.get(name, ())
    system, user = (
        m["content"] for m in data.ask(task, data.Example("q", "Anna had 2 books.", "2", choices))
    )
    text = data.as_text(system, user)
    shots = text[len(system) : text.index("Anna had")]
    assert shots.count("<Answer>:") == 3 and text.endswith("\n<Explanation>:")
    assert ("Answer Choices" in shots) == bool(choices) and ("Hypothesis" in shots) == (
        choices == data.NLI
    )
    for shot in re.findall(r"Question:.*?<Answer>.*?\n", shots, re.DOTALL):
        example = data.Example(
            "s", "?", "", tuple(re.findall(r"^\([a-z]\) (\w.*)$", shot, re.MULTILINE))
        )
        rationale, answer = data.parse_output(task, example, shot[shot.index("<Explanation>") :])
        assert rationale and task.key(answer) is not None


def test_worked_examples_come_only_where_the_papers_format_is_asked_for():
    assert (
        data.as_text("Which is better, A or B?", "A: x. B: y.")
        == "Which is better, A or B?\n\nA: x. B: y.\nReply:"
    )


def test_a_base_model_stops_where_it_begins_the_next_question(tmp_path):
    save_causal(tmp_path, chat=False)
    seen = {}
    generate = GPT2LMHeadModel.generate

    def spy(self, **how):
        seen.update(how)
        return generate(self, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT2LMHeadModel, "generate", spy)
        requests = [(e, 0) for e in data.toy_splits()["train"][:2]]
        list(data.ask_model(requests, functools.partial(data.ask, TASKS["toy"]), str(tmp_path), make_options(max_tokens=4)))  # fmt: skip
    assert "\nQuestion:" in seen["stop_strings"]


def test_a_template_without_a_system_role_gets_the_system_text_in_front_of_the_users(tmp_path):
    save_causal(tmp_path, chat=True)
    words = data.transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert data.as_chat(words, chat) == "system: Be brief.\nuser: Why?\nassistant:"
    for template in (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
    ):
        words.chat_template = (
            template
            + "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
        )
        assert data.as_chat(words, chat) == "user: Be brief.\n\nWhy?\nassistant:"
    words.chat_template = "{{ 'off' if enable_thinking is defined and not enable_thinking else 'on' }} {{ messages[0].content }}"  # fmt: skip
    assert data.as_chat(words, chat) == "off Be brief."


# Samples and the question that they answer


def questions(texts: list[str]) -> list[data.Example]:
    return [data.Example(f"row-{n}", text, "( 1 + 1 )") for n, text in enumerate(texts)]


@pytest.fixture
def ask(api):
    """A function that samples questions of a task of one's own from a server: rationales by
    question."""

    def sample(server: Server, texts: list[str], **changes: object) -> dict[str, set[str]]:
        options = make_options(teacher=["api:m"], api_base=server.url, k=2, **changes)
        examples = questions(texts)
        task = data.Task("my", numeric=True)
        samples = data.collect(task, examples, ["api:m"], options)
        return {e.input: {s.rationale for s in samples[e.id]} for e in examples}

    return sample


def test_rows_of_one_id_in_two_files_of_one_name_get_their_own_questions_samples(ask):
    server = Server()
    assert ask(server, ["Why A?", "Why B?"])["Why A?"] == {"Question: Why A?"}
    assert ask(server, ["Why C?", "Why D?"])["Why C?"] == {"Question: Why C?"}
    assert len(server.times) == 8
    ask(server, ["Why A?", "Why B?"])
    assert len(server.times) == 8


def test_a_row_inserted_on_top_asks_for_itself_alone_and_the_others_keep_their_samples(ask):
    server = Server()
    ask(server, ["Why A?", "Why B?"])
    samples = ask(server, ["Why new?", "Why A?", "Why B?"])
    assert samples == {f"Why {x}?": {f"Question: Why {x}?"} for x in ("new", "A", "B")}
    assert len(server.times) == 6


def test_the_same_question_under_two_ids_is_asked_once_and_both_have_its_samples(ask):
    server = Server()
    assert ask(server, ["Why A?", "Why A?"]) == {"Why A?": {"Question: Why A?"}}
    assert len(server.times) == 2


def completion(content: object, reason: str = "stop", **more: object) -> bytes:
    choice = {"index": 0, "finish_reason": reason, "message": {"content": content, **more}}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    "reply", [completion("", "length"), completion("<Explanation>: it is <Answer>: ( 1", "length")]
)
def test_what_was_empty_or_cut_is_asked_again_with_more_tokens_and_only_then(ask, capsys, reply):
    server = Server(((200, reply),))
    ask(server, ["Why A?", "Why B?"], max_tokens=10, api_concurrency=1)
    assert "1 replies had no text (finish_reason length) or were cut" in capsys.readouterr().out
    ask(server, ["Why A?", "Why B?"], max_tokens=10)
    assert len(server.times) == 4
    whole = ask(server, ["Why A?", "Why B?"], max_tokens=20)
    assert len(server.times) == 5 and whole["Why A?"] == {"Question: Why A?"}
    assert ask(server, ["Why A?", "Why B?"], max_tokens=20) == whole and len(server.times) == 5


def test_a_second_sampler_says_that_it_waits_and_asks_for_nothing_that_the_first_brought(
    ask, tmp_path, capsys
):
    server = Server()
    ask(server, ["Why A?"])
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    content = path.read_bytes()
    path.write_bytes(b"")
    with filelock.FileLock(f"{path}.lock"):  # as held by another process, which then writes
        second = threading.Thread(target=ask, args=(server, ["Why A?"]))
        second.start()
        time.sleep(0.5)
        assert second.is_alive() and len(server.times) == 2
        path.write_bytes(content)
    second.join(10)
    assert not second.is_alive() and len(server.times) == 2
    out = capsys.readouterr().out
    assert out.count(f"Waiting for another process that samples into {path}") == 1


# PaLM's samples, which are known by their place alone


def palm(tmp_path: Path, rows: int, parts: dict[str, object]) -> dict:
    release = tmp_path / "release.zip"
    with data.zipfile.ZipFile(release, "w") as z:
        for split, count in (("train", rows), ("test", 2)):
            lines = [json.dumps({"input": f"q{i}?", "label": f"{i}"}) for i in range(count)]
            z.writestr(f"datasets/svamp/svamp_{split}.json", "\n".join(lines) + "\n")
        for name, content in parts.items():
            z.writestr(f"datasets/svamp/llm/{name}.json", json.dumps(content))
    options = make_options(task="svamp", data=str(release), train_size=0.5)
    task, splits = data.load_task("svamp", str(release), options.train_size)
    return data.collect(task, splits["train"], ["palm"], options)


def said(numbers: range) -> list[str]:
    return [f"It is {i}. The answer is {i}." for i in numbers]


def test_palms_samples_reach_the_row_of_their_place_also_beyond_ten_parts(tmp_path):
    parts = {f"train_CoT_{n}": said(range(2 * n, 2 * n + 2)) for n in reversed(range(15))}
    samples = palm(tmp_path, 30, parts)
    assert len(samples) == 14  # half of the 27 that training keeps
    for id, (sample,) in samples.items():
        assert sample.answer == id.removeprefix("svamp-train-")


@pytest.mark.parametrize(
    ("rows", "parts", "sentence"),
    [
        (20, {"train_CoT_0": said(range(10))}, "10 PaLM samples for 20 training questions"),
        (19, {"train_CoT_0": said(range(20))}, "20 PaLM samples for 19 training questions"),
        (20, {}, "0 PaLM samples for 20 training questions"),
        (20, {"train_CoT_0": said(range(10)), "train_CoT_2": said(range(10))}, "train_CoT_1.json"),
        (20, {"train_CoT_1": said(range(20))}, "train_CoT_0.json"),
        (20, {"train_CoT_0": [*said(range(19)), None]}, "no texts"),
        (20, {"train_CoT_0": [*said(range(19)), ["x"]]}, "no texts"),
        (20, {"train_CoT_0": {"0": "x"}}, "1 PaLM samples for 20"),
        (20, {"train_CoT_0": 5}, "train_CoT_0.json is no JSON array"),
    ],
)
def test_palms_samples_that_do_not_fit_the_rows_are_one_sentence(tmp_path, rows, parts, sentence):
    with pytest.raises(UserError, match=sentence):
        palm(tmp_path, rows, parts)


# Teachers that teach nothing


def samples_file(tmp_path: Path, outputs: list[tuple[int, str]]) -> dict:
    lines = []
    for id in ("row-0", "row-1"):
        for number, output in outputs:
            line = {"id": id, "teacher": "me", "sample": number, "output": output}
            lines.append(json.dumps(line) + "\n")
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(lines))
    examples = questions(["Why A?", "Why B?"])
    return data.collect(data.Task("my", numeric=True), examples, [str(path)], make_options(k=None))


def test_a_teacher_none_of_whose_answers_can_be_read_stops_with_one_of_its_replies(ask, tmp_path):
    with pytest.raises(UserError, match="no answer can be read in any of 4 replies.*'No.'"):
        samples_file(tmp_path, [(0, "I pass."), (1, "No.")])
    server = Server(answer=lambda question: "As you say.")
    with pytest.raises(UserError, match="api:m.*'As you say.'"):
        ask(server, ["Why A?", "Why B?"])


def test_one_number_given_to_several_samples_of_a_question_stops_with_one_of_them(tmp_path):
    one = "It is 3. The answer is 3."
    with pytest.raises(UserError, match="sample 0 of 'row-0' is there twice.*'The answer is 4.'"):
        samples_file(tmp_path, [(0, one), (0, "The answer is 4.")])
    assert len(samples_file(tmp_path, [(0, one), (0, one), (1, one)])["row-0"]) == 2


def test_own_rationales_and_labels_are_taken_as_they_are():
    own = [
        ("Premise: there are 18 eggs. Answer: none.", "U.S."),
        ("To know what the answer is, count.", "two\nlines"),
        ("__init__ with **kwargs, $5", "(b)"),
    ]
    examples = []
    for n, (rationale, label) in enumerate(own):
        examples.append(data.Example(f"{n}", f"Why {n}?", label, rationale=rationale))
    samples = data.collect(data.Task("my"), examples, [], make_options(k=None))
    for n, (rationale, label) in enumerate(own):
        assert samples[f"{n}"] == [data.Sample("own", rationale, label)]


# The key stays at home


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_by_name_and_nothing_is_sent_there(api, status):
    other = Server()
    server = Server(((status, b"", {"Location": f"{other.url}/chat/completions"}),) * 9)
    with pytest.raises(UserError, match=f"status {status}: {other.url}.*not followed"):
        api(server, api_concurrency=1)
    assert len(server.times) == 1 and not other.times


@pytest.mark.parametrize("status", [302, 400, 401, 403, 429, 500])
def test_a_server_that_repeats_the_key_is_shown_with_it_masked(api, monkeypatch, capfd, status):
    monkeypatch.setattr(data, "API_TRIES", 2)
    body = f'{"x" * 290} {{"error": "Bearer {KEY}"}}'.encode()
    server = Server(((status, f"no: {KEY}. ".encode() + body, {"Location": f"/{KEY}"}),) * 20)
    with pytest.raises(UserError, match=r"\*\*\*") as error:
        api(server)
    assert KEY[:20] not in str(error.value) + "".join(capfd.readouterr())


def test_a_sample_that_repeats_the_key_is_kept_with_it_masked(api, tmp_path):
    api(Server(answer=lambda text: f"<Explanation>: {KEY}\n<Answer>: ( 1 + 1 )"))
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()


@pytest.mark.parametrize(
    "base",
    [
        "localhost:8000/v1",
        "ftp://host/v1",
        "file:///etc/passwd",
        "http://",
        "http:// host/v1",
        "http://user:password@host/v1",
        "http://user:pass/word@host/v1",
        "user:password@host",
        "https://host/v1?key=password",
        "https://host/v1#password",
        "http://host\n/v1",
    ],
)
def test_an_address_that_is_no_plain_url_is_refused_and_no_password_is_shown(base):
    with pytest.raises(UserError, match="--api-base") as error:
        data.check_api_base(base)
    assert "pass" not in str(error.value).replace("passwd", "") and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "base",
    ["http://localhost:8000/v1", "https://api.openai.com/v1/", "http://[::1]:80", "http://h"],
)
def test_a_plain_url_is_taken(base):
    data.check_api_base(base)


@pytest.mark.parametrize("key", ["sk-1\n", "sk-1\r\nX: y", "“sk-1”", "sk 1", "sk-é"])
def test_a_key_that_no_header_can_hold_is_refused_in_one_sentence(api, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        api(Server())
    assert "sk" not in str(error.value)


# What servers reply

DEEP = b'{"choices": ' + b"[" * 200_000
GARBAGE = [
    b'{"error": {"message": "the model said no", "code": 502}}',
    completion("half an ans", "error"),
    completion({"text": "x"}),
    completion(5),
    completion([{"type": "text"}]),
    completion(["x"]),
    b'{"choices": [null]}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": {"0": 1}}',
    b"[]",
    b"null",
    b"5",
    b"",
    b"<html>the model said no</html>",
    b'data: {"choices": []}',
    b"\x1f\x8b\x08\x00garbage",
    b'{"choices": [{"message": {"content": "caf\xe9"}}]}',
    DEEP,
]


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_a_reply_that_is_no_completion_is_told_once_and_tried_again(api, capsys, number):
    server = Server(((200, GARBAGE[number]),) * 2)
    samples = api(server, api_concurrency=1)
    assert {s.answer for each in samples.values() for s in each} == {"( 1 + 1 )"}
    assert len(server.times) == 6 + 2
    out = capsys.readouterr().out
    assert out.count("it is tried again") == 1 and f"{server.url}/chat/completions gave " in out
    assert ("the model said no" in out) == (b"said no" in GARBAGE[number])


@pytest.mark.parametrize("number", range(len(GARBAGE)))
def test_a_server_that_never_completes_ends_in_one_sentence_and_leaves_no_sample(
    api, monkeypatch, tmp_path, number
):
    monkeypatch.setattr(data, "API_TRIES", 2)
    status = 502 if b'"code": 502' in GARBAGE[number] else 200  # as the reply itself has it
    with pytest.raises(UserError, match=f"status {status}") as error:
        api(Server(((200, GARBAGE[number]),) * 100))
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    assert path.read_bytes() == b""


def test_a_content_of_parts_is_its_texts(api):
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "<Explanation>: because"},
        {"type": "text", "text": "\n<Answer>: ( 2 + 3 )"},
    ]
    samples = api(Server(((200, completion(parts)),) * 2), n=1)
    for sample in samples["toy-train-0"]:
        assert (sample.rationale, sample.answer) == ("because", "( 2 + 3 )")


def test_a_reply_that_only_reasons_is_a_sample_without_an_answer(api, capsys):
    reply = completion(None, "length", reasoning_content="The answer is 3")
    samples = api(Server(((200, reply),)), api_concurrency=1)
    assert [s.answer for s in samples["toy-train-0"]] == [None, "( 1 + 1 )"]
    out = capsys.readouterr().out
    assert "1 replies had no text (finish_reason length)" in out
    assert out.count('"reasoning_content": "The answer is 3"') == 1


def test_lone_surrogates_of_a_reply_do_not_reach_the_cache(api, tmp_path):
    server = Server(answer=lambda text: "<Explanation>: \ud83d and \udc00\n<Answer>: ( 1 + 1 )")
    for _ in range(2):
        for sample in api(server)["toy-train-0"]:
            assert sample.rationale.encode() == b"? and ?"
    assert len(server.times) == 6


@pytest.mark.parametrize(
    "fault",
    [
        (400, b'{"error": {"message": "%s", "code": "content_filter"}}' % (b"long " * 200)),
        (403, b'{"error": {"message": "Your input was flagged", "metadata": {}}}'),
        (403, b'{"error": {"message": "The model requires moderation"}}'),
    ],
)
def test_a_filtered_question_is_a_sample_without_an_answer_and_counted(api, capsys, fault):
    server = Server((fault,))
    samples = api(server, api_concurrency=1)
    assert [s.answer for each in samples.values() for s in each].count(None) == 1
    assert len(server.times) == 6
    assert "1 replies had no text (finish_reason content_filter)" in capsys.readouterr().out


def test_a_403_shows_the_servers_words(api):
    with pytest.raises(UserError, match="403.*not in your country.*OPENAI_API_KEY"):
        api(Server(((403, b'{"error": "not in your country"}'),) * 20))


def test_requests_have_a_name_of_their_own_and_pass_no_proxy_on_this_machine(api, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server = Server()
    for base in (server.url, server.url.replace("127.0.0.1", "localhost")):
        server.url = base
        api(server)
    assert set(server.agents) == {"qcrd"}


# What stays stops at once, what may pass is waited for


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ((404, b"no such page"), "404: no such page.*/v1.*--api-base|--api-base.*/v1"),
        ((401, b"who?"), "401: who.*OPENAI_API_KEY"),
        ((402, b"pay"), "402: pay"),
        ((405, b"not so"), "405: not so.*--api-base"),
        ((200, b'{"error": {"message": "no such user", "code": 401}}'), "401.*no such user"),
        ((429, b'{"error": {"code": "insufficient_quota"}}'), "insufficient_quota"),
    ],
)
def test_what_cannot_mend_itself_stops_at_the_first_try(api, fault, sentence):
    server = Server((fault,) * 20)
    with pytest.raises(UserError, match=sentence) as error:
        api(server, api_concurrency=1)
    assert len(server.times) == 1 and f"{server.url}/chat/completions" in str(error.value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9/v1", "refused"),
        ("http://no-such-host.invalid/v1", "gaierror"),
        ("http://a..b/v1", "label"),
    ],
)
def test_a_server_that_cannot_be_reached_stops_at_the_first_try(api, url, reason):
    server = Server()
    server.url = url
    started = time.monotonic()
    with pytest.raises(UserError, match=f"{re.escape(url)}.*{reason}.*--api-base"):
        api(server)
    assert time.monotonic() - started < 5


def test_a_server_that_goes_away_after_its_first_answers_is_waited_for(api, monkeypatch):
    monkeypatch.setattr(data, "API_BACKOFF", 0.2)
    server = Server()

    def leave(question: str) -> str:
        if len(server.times) == 2:
            server.socket.close()  # whoever asks now is refused
            back = ThreadingHTTPServer.__new__(Server)
            threading.Timer(0.5, restart, (back,)).start()
        return explain(question)

    def restart(back: Server) -> None:
        back.__dict__ |= server.__dict__
        bound = False
        while not bound:  # the old server holds the port until its thread has seen the end
            with suppress(OSError):
                ThreadingHTTPServer.__init__(back, server.server_address, Handler)
                bound = True
            time.sleep(0.05)
        back.serve_forever()

    server.answer = leave
    assert len(api(server, api_concurrency=1)) == 3


@pytest.mark.parametrize("after", ["inf", "nan", "1e9", "-5", "Fri, 31 Dec 2099 23:59:59 GMT", "x"])
def test_a_wait_that_a_server_asks_for_is_finite_and_a_minute_at_most(api, monkeypatch, after):
    waits = []

    class Quick(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout is None:
                return super().wait()
            waits.append(timeout)
            return super().wait(min(timeout, 0.01))

    monkeypatch.setattr(threading, "Event", Quick)
    server = Server(((429, b"slow down", {"Retry-After": after}),))
    assert len(api(server, api_concurrency=1)) == 3
    assert waits and all(0 <= seconds <= 60 for seconds in waits)


def test_the_first_retry_is_told_with_the_servers_words(api, capsys):
    api(Server(((503, b"the model\nis loading"),) * 3))
    out = capsys.readouterr().out
    assert out.count("tried again") == 1 and "status 503: the model is loading" in out


@pytest.mark.parametrize("fault", ["drip", "hang"])
def test_ctrl_c_ends_at_once_while_a_server_hangs_or_drips(tmp_path, fault):
    server = Server(("drip",) * 100, delay=0.0 if fault == "drip" else 60.0)
    process = child(tmp_path, server)
    while not server.times and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1].decode()
    assert time.monotonic() - started < 3


# Teachers that run here


def sample_locally(folder: Path, tmp_path: Path, max_tokens: int = 8) -> dict:
    cache = Cache(tmp_path / "samples.jsonl")
    chat = functools.partial(data.ask, TASKS["toy"])
    options = make_options(max_tokens=max_tokens)
    return data.sampled(cache, data.toy_splits()["train"][:3], 2, str(folder), chat, options)


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_tokenizer_with_token_type_ids_and_no_pad_or_end_token_is_served(tmp_path):
    folder = tmp_path / "model"
    save_causal(folder, chat=False)
    edit_json(
        folder / "tokenizer_config.json",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        eos_token=None,
        pad_token=None,
    )
    words = data.transformers.AutoTokenizer.from_pretrained(folder)
    assert "token_type_ids" in words("Anna") and not words.pad_token and not words.eos_token
    assert len(sample_locally(folder, tmp_path)) == 6


def test_more_tokens_than_a_model_has_positions_is_one_sentence(tmp_path):
    folder = tmp_path / "model"
    save_causal(folder, chat=False)
    with pytest.raises(UserError, match=r"--max-tokens are above its 1024"):
        sample_locally(folder, tmp_path, max_tokens=1000)


def test_a_quantised_checkpoint_whose_package_is_missing_is_one_sentence(tmp_path):
    folder = tmp_path / "model"
    save_causal(folder, chat=False)
    for method in ("gptq", "awq", "bitsandbytes"):
        quantized = {"quant_method": method, "bits": 4, "load_in_4bit": True, "group_size": 128}
        edit_json(folder / "config.json", quantization_config=quantized)
        with pytest.raises(UserError, match="--teacher .*model cannot be used") as error:
            sample_locally(folder, tmp_path)
        assert "\n" not in str(error.value)


def test_a_template_that_wants_parts_gets_them(tmp_path):
    save_causal(tmp_path / "model", chat=True)
    words = data.transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for part in ("p.text", "p['text'] | trim"):
        words.chat_template = (
            "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ "
            + part
            + " }}{% endfor %}{{ '\n' }}{% endfor %}assistant:"
        )
        assert data.as_chat(words, chat) == "system: Be brief.\nuser: Why?\nassistant:"
    words.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content[0].text }}"  # fmt: skip
    assert data.as_chat(words, chat) == "Be brief.\n\nWhy?"


def test_a_template_that_refuses_everything_is_one_sentence(tmp_path):
    folder = tmp_path / "model"
    save_causal(folder, chat=True)
    for template in ("{{ raise_exception('never') }}", "{{ 1 + messages }}", "{% if %}", "hello"):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match="chat template takes no system"):
            sample_locally(folder, tmp_path)


def test_a_local_models_cut_outputs_are_asked_for_again_with_more_tokens(tmp_path, capsys):
    folder = tmp_path / "model"
    save_causal(folder, chat=True)
    short = sample_locally(folder, tmp_path, max_tokens=2)
    assert "finish_reason length" in capsys.readouterr().out
    assert sample_locally(folder, tmp_path, max_tokens=2) == short
    assert sample_locally(folder, tmp_path, max_tokens=8) != short


# The option as it was typed


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        ("toy", "--teacher toy has no samples for task my: name another"),
        ("palm", "--teacher palm has no samples for task my: name another"),
        ("nowhere/samples.jsonl", "--teacher nowhere/samples.jsonl: there is no such file"),
        ("samples.csv", "--teacher samples.csv: there is no such file"),
        ("./nowhere", "--teacher ./nowhere: there is no such file or folder"),
        ("~/nowhere", "--teacher ~/nowhere: there is no such file or folder"),
        ("gpt-4o", "--teacher gpt-4o .*api:gpt-4o"),
        ("own", "--teacher own has no sample"),
    ],
)
def test_a_teacher_that_is_none_is_named_as_it_was_typed(tmp_path, monkeypatch, teacher, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(data, "CACHE", tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        data.collect(data.Task("my"), questions(["Why A?"]), [teacher], make_options())
    assert "Repo id" not in str(error.value)


def test_a_home_directory_in_a_teachers_path_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    line = {"id": "row-0", "teacher": "me", "sample": 0, "output": "The answer is 3."}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    task = data.Task("my", numeric=True)
    options = make_options(k=None)
    samples = data.collect(task, questions(["Why A?"]), ["~/mine.jsonl"], options)
    assert samples["row-0"][0].answer == "3"


def test_a_task_file_named_toy_is_not_the_toy():
    with pytest.raises(UserError, match="needs a --teacher"):
        data.collect(data.Task("toy"), questions(["Why A?"]), [], make_options(task="toy.jsonl"))


def test_a_cache_that_cannot_be_written_is_one_sentence(api, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(data, "CACHE", tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written.*QCRD_CACHE"):
        api(Server())
    monkeypatch.setattr(data, "CACHE", tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        api(Server())


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("~/kept", "HOME/kept"),
        ("", "HOME/.cache/qcrd"),
        ("~nobody-of-this-name/x", "TEMPORARY/qcrd"),
    ],
)
def test_the_cache_is_where_the_variable_says_or_at_home_or_among_temporary_files(
    tmp_path, monkeypatch, variable, folder
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QCRD_CACHE", variable)
    monkeypatch.delitem(sys.modules, "data")
    again = importlib.import_module("data")
    expected = folder.replace("HOME", str(tmp_path)).replace("TEMPORARY", tempfile.gettempdir())
    assert str(again.CACHE) == expected


def test_lines_of_an_older_cache_do_not_count(api, tmp_path):
    server = Server()
    api(server)
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    old = {"id": "toy-train-0", "teacher": "api:model", "sample": 0, "output": "The answer is 9."}
    path.write_text(json.dumps(old) + "\n")
    assert {s.answer for s in api(server)["toy-train-0"]} == {"( 1 + 1 )"}
    assert len(server.times) == 12
