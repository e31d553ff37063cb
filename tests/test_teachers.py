"""Teachers and their cache against real parts: a loopback server with faults, a local model, killed processes."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
from tests.helpers import make_options, tokenizer

KEY = "sk-this-must-never-be-written"


def explain(question: str) -> str:
    return f"<Explanation>: {question[:40]}\n<Answer>: ( 1 + 1 )"


class Server(ThreadingHTTPServer):
    """Chat completions on loopback; `faults` are played one a request before it answers properly."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        faults: tuple[str, ...] = (),
        delay: float = 0.0,
        answer: Callable[[str], str] = explain,
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.faults, self.delay = list(faults), delay
        self.only = b""  # what a server says that takes max_completion_tokens only
        self.times: list[float] = []
        self.bodies: list[dict] = []
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
        assert (
            self.path == "/v1/chat/completions" and self.headers["Authorization"] == f"Bearer {KEY}"
        )
        fault = server.faults.pop(0) if server.faults else None
        time.sleep(server.delay)
        if fault == "429":
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
    """A function that samples the first `n` toy questions from a server, and the place of the cache."""
    monkeypatch.setattr(data, "CACHE", tmp_path)
    monkeypatch.setattr(data, "API_BACKOFF", 0.01)
    monkeypatch.setattr(data, "API_TIMEOUT", 1.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def sample(server: Server, n: int = 3, **changes: object) -> dict:
        options = make_options(teacher=["api:model"], api_base=server.url, k=2, **changes)
        return data.collect(TASKS["toy"], data.toy_splits()["train"][:n], ["api:model"], options)

    return sample


@pytest.mark.parametrize("fault", ["429", "500", "503", "cut", "malformed", "empty", "slow"])
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
    server.faults = []
    before = len(server.times)
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


def test_killed_twenty_times_and_finished_every_sample_is_there_exactly_once(tmp_path):
    server, rng, kills = Server(delay=0.05), random.Random(0), 0
    while kills < 20:
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
    assert len(server.times) <= 200 + 20 * 8  # a kill loses the requests in flight and no more


def test_two_processes_on_one_cache_do_not_corrupt_it(tmp_path):
    server = Server(delay=0.01)
    both = [child(tmp_path, server) for _ in range(2)]
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert len(cached(tmp_path)) == 200
    (path,) = (tmp_path / "samples").glob("*.jsonl")
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
    assert len(Cache(path).load()) == 200


def test_a_torn_last_line_is_dropped_with_a_warning_and_closed_before_the_next(tmp_path, capsys):
    cache = Cache(tmp_path / "c.jsonl")
    cache.append("a", "t", 0, "one")
    with cache.path.open("ab") as file:
        file.write(b'{"id": "b", "teacher": "t", "sam')
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
