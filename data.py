"""Everything that the method is fed: tasks, the toy stories, teacher samples, and the student
called tiny.

A task's row becomes an `Example`; a teacher's raw text, kept in a JSON Lines cache, becomes a
`Sample`: a rationale and an answer. Which samples are positives and which negatives is decided in
qcrd.py.
"""

import ast
import codecs
import hashlib
import io
import json
import math
import operator
import os
import random
import re
import ssl
import tempfile
import threading
import time
import urllib.request
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from itertools import accumulate, islice, pairwise
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import filelock
import jinja2
import numpy as np
import sentencepiece
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

DSS_ZIP = "https://github.com/google-research/distilling-step-by-step/raw/main/datasets.zip"
TEACHER_BATCH = 64  # a local teacher's questions at once on a GPU; on a CPU a quarter
API_TIMEOUT = 120  # seconds for a whole reply
API_LARGEST = 2**24  # bytes of a reply; what is longer is cut
API_TRIES, API_BACKOFF = 8, 1.0  # tries of a request, seconds before the second
DOWNLOAD_LIMIT = 1800  # seconds
CACHE = Path(os.path.expanduser(os.environ.get("QCRD_CACHE") or "~/.cache/qcrd"))
if str(CACHE).startswith("~"):  # a user without a home directory
    CACHE = Path(tempfile.gettempdir(), "qcrd")


class UserError(Exception):
    """Bad input: the message is one sentence that names the file, line or option and the mend."""


def first_line(error: Exception) -> str:
    """What an exception says, short enough for a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def gpu_or_cpu(device: str) -> str:
    """The device that --device names: auto is a GPU where there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_is_full(error: Exception) -> bool:
    """Whether an error says so, of a GPU or of the computer: torch has several for it."""
    signs = "out of memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|allocate memory"
    signs += "|not enough memory|could not (create|execute) a primitive$"
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or re.search(signs, str(error)) is not None


def in_batches(items: list, size: int, work: Callable[[list], Any]) -> Iterator[Any]:
    """work(batch) for each batch of so many items; where memory runs out, of half as many from
    there on."""
    done = 0
    while done < len(items):
        size = min(size, len(items) - done)
        try:
            yield work(items[done : done + size])
            done += size
            continue
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not memory_is_full(error):
                raise
        # outside of this block the error no longer holds the work's tensors
        torch.cuda.empty_cache()
        size = (size + 1) // 2


@dataclass(frozen=True)
class Example:
    """One question: what the student reads, the label it learns, and the choices where the task has
    them."""

    id: str
    input: str
    label: str
    choices: tuple[str, ...] = ()
    rationale: str = ""  # a task of one's own may bring one a question
    story: "Story | None" = None  # toy only: what the exact check of a rationale needs


class Sample(NamedTuple):
    """One teacher output, parsed; `answer` is None where none was found."""

    teacher: str
    rationale: str
    answer: str | None


@contextmanager
def cache_folder(path: Path) -> Iterator[None]:
    """Make a folder for the block to write to; UserError where either fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, NotImplementedError, SafetensorError) as error:
        raise UserError(
            f"The cache folder {path} cannot be written ({first_line(error)}):"
            " make room in it, or set QCRD_CACHE to another folder."
        )


def locked(path: str | Path, waiting: str) -> filelock.AcquireReturnProxy:
    """The lock of this file, to hold in a with block; where it must wait it says so."""
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        print(waiting, flush=True)
        return lock.acquire()


# --------------------------------------------------------------------------------------------------
# Equations

OPERATORS: dict[type, Callable[[Any, Any], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def equation_value(text: str) -> float | None:
    """The value of an equation of numbers, + - * / and brackets, as DSS's metric computes it, from
    its syntax tree.

    Returns None for anything else: other symbols, more than 200 characters, a division by zero, an
    overflow.
    """

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError

    text = text.strip()
    if not re.fullmatch(r"[\d.+\-*/() ]{1,200}", text, re.ASCII):
        return None
    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


# --------------------------------------------------------------------------------------------------
# Tasks: how a row reads, how answers compare, how a prompt asks

NLI = ("entailment", "neutral", "contradiction")


def lettered(choices: tuple[str, ...]) -> str:
    """The choices as lines, each with a letter."""
    return "".join(f"\n({letter}) {choice}" for letter, choice in zip(ascii_lowercase, choices))


def read_cqa(row: dict) -> dict:
    """A row of CommonsenseQA; the student reads the choices too, which are others in each row."""
    text = f"{row['question']}\nAnswer Choices:{lettered(row['choices'])}"
    return {"input": text, "label": row["answer"], "choices": row["choices"]}


def read_nli(row: dict) -> dict:
    """A row of e-SNLI or ANLI, whose labels are 0, 1 and 2; any other is not among the choices."""
    label = row["label"]
    return {
        "input": f"{row['premise']}</s>{row['hypothesis']}",
        "label": NLI[label] if type(label) is int and label in (0, 1, 2) else repr(label),
        "choices": NLI,
    }


def read_plain(row: dict) -> dict:
    """A row of svamp or of a task of one's own."""
    label = row["label"]
    return {
        "input": row["input"],
        "label": str(label) if type(label) in (int, float) else label,
        "choices": row.get("choices") or (),
        "rationale": row.get("rationale") or "",
    }


FREE = "a word or a short phrase"


@dataclass(frozen=True)
class Task:
    """What distinguishes one task from another."""

    name: str
    read: Callable[[dict], dict] = read_plain
    folder: str = ""  # its name in the DSS release
    numeric: bool = False  # answers are equations, compared by value
    answer_format: str = FREE

    def key(self, answer: str | None) -> Hashable:
        """What makes two answers the same: an equation's value, or a text but for white space.

        None if the answer is unusable.
        """
        text = " ".join((answer or "").split())
        return equation_value(bare_number(text)) if self.numeric else text or None

    def correct(self, answer: str | None, example: Example) -> bool:
        """DSS's metric for one prediction."""
        return self.key(answer) is not None and self.key(answer) == self.key(example.label)


EQUATION = "an equation of the numbers in the question, such as ( 7 + 5 )"
NUMBER = "a number, or an equation of numbers"
CHOICE = "one of the answer choices, as its letter and text, such as (a) yes"
RELATION = "one of the answer choices, as its letter and text, such as (a) entailment"
TASKS = {
    "toy": Task("toy", numeric=True, answer_format=EQUATION),
    "svamp": Task("svamp", folder="svamp", numeric=True, answer_format=EQUATION),
    "cqa": Task("cqa", read_cqa, folder="cqa", answer_format=CHOICE),
    "anli": Task("anli", read_nli, folder="anli1", answer_format=RELATION),
    "esnli": Task("esnli", read_nli, folder="esnli", answer_format=RELATION),
}


# --------------------------------------------------------------------------------------------------
# Where examples come from: the DSS release, a file of one's own, the toy

MODEL_FILES = {".json", ".jinja", ".safetensors", ".bin", ".model", ".txt"}


def download(url: str) -> Path:
    """The zip behind `url`, kept in the cache folder if it came whole and in time."""
    path = CACHE / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}.zip"
    if path.exists():
        return path
    print(f"Downloading {url}")
    end = time.monotonic() + DOWNLOAD_LIMIT
    with cache_folder(CACHE), TemporaryDirectory(dir=CACHE) as folder:
        part = Path(folder, path.name)
        try:
            with urlopen(url, timeout=30) as reply, part.open("wb") as file:
                while chunk := reply.read1(2**20):  # what has come by now
                    file.write(chunk)
                    if time.monotonic() > end:
                        raise TimeoutError(f"it took over {DOWNLOAD_LIMIT} seconds")
            if not zipfile.is_zipfile(part):
                raise ValueError("what came is no whole zip file")
        except (OSError, HTTPException, ValueError) as error:
            raise UserError(
                f"--data {url} could not be downloaded ({first_line(error)}):"
                " try again, or name a local zip."
            )
        os.replace(part, path)
    return path


def parse_jsonl(raw: bytes, where: str, torn: bool = False) -> Iterator[tuple[str, dict]]:
    """Objects of JSON Lines, each with its place; `torn` drops broken lines, as a killed writer
    leaves them."""
    for number, line in enumerate(raw.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
            problem = None if isinstance(row, dict) else "it is no object"
        except (ValueError, RecursionError) as error:
            problem = first_line(error)
            if re.match(rb"[^[{]*[,;\t]", line):
                problem = "it looks like CSV"
        if problem is None:
            yield f"{where}, line {number}", row
        elif torn:
            print(f"warning: {where}, line {number} is torn and was dropped.")
        else:
            raise UserError(
                f"{where}, line {number} is not a JSON object in UTF-8 ({problem}):"
                " write JSON Lines, one object a line."
            )


def read_file(path: Path) -> bytes:
    """What a file holds; UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check the name and its permissions."
        )


def read_jsonl(path: str | Path, torn: bool = False) -> Iterator[tuple[str, dict]]:
    """The objects of a JSON Lines file, each with its place."""
    return parse_jsonl(read_file(Path(path)), str(path), torn)


def digest(path: str | Path) -> str:
    """16 hex digits that change when the file, or a model file in the folder, is changed."""
    place, total = Path(path).expanduser(), hashlib.sha256()
    parts = [f for f in sorted(place.glob("*")) if f.suffix in MODEL_FILES]
    for part in [place] if place.is_file() else parts:
        with part.open("rb") as file:
            total.update(part.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def to_example(task: Task, where: str, row: dict, default_id: str) -> Example:
    """One row as an Example, checked: UserError names the place and the mend."""
    try:
        fields = task.read(row)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{where} has no usable {error}, as each row of task {task.name} must have:"
            f" it has {list(row)!s:.200}."
        )
    for name in ("input", "label", "rationale"):
        value = fields.get(name, "")
        if not isinstance(value, str) or not (value.strip() or name == "rationale"):
            raise UserError(f'{where} needs a text in "{name}", not {value!r:.40}.')
    choices, label = fields["choices"], fields["label"]
    if (
        not isinstance(choices, list | tuple)
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
        or len(choices) > len(ascii_lowercase)
    ):
        raise UserError(
            f'{where}: "choices" must be a list of texts, 26 at most, a letter for each:'
            " mend it, or leave it out to have answers compared as text."
        )
    fields["choices"] = tuple(choices)
    if choices and task.key(label) not in map(task.key, choices):
        raise UserError(f"{where}: the label {label!r:.40} is not among its choices.")
    return Example(default_id if task.folder else str(row.get("id", default_id)), **fields)


def open_release(data: str) -> zipfile.ZipFile:
    """The DSS release, a file or a URL, to read from; UserError if it is no zip file."""
    path = download(data) if data.startswith(("http://", "https://")) else os.path.expanduser(data)
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--data {data} is not a readable zip file ({error}): name the DSS release,"
            " datasets.zip."
        )


def read_member(release: zipfile.ZipFile, name: str) -> bytes:
    """One member of the release, read into memory without unpacking the zip; bombs are refused."""
    try:
        if release.getinfo(name).file_size > 2**30:
            raise UserError(
                f"{release.filename}: {name} would unpack to over 1 GiB: this is not the DSS"
                " release."
            )
        return release.read(name)
    except KeyError:
        raise UserError(
            f"{release.filename} has no {name}: name the DSS release, datasets.zip, with --data."
        )
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise UserError(
            f"{release.filename}: {name} cannot be read ({error}): download the file again."
        )


def hold_out(examples: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    """(kept, held out), as datasets.train_test_split, and so DSS, divides them."""
    mixed = [examples[i] for i in np.random.default_rng(0).permutation(len(examples))]
    count = math.ceil(share * len(examples))
    return mixed[count:], mixed[:count]


def load_task(
    name: str, data: str = DSS_ZIP, train_size: float = 1.0
) -> tuple[Task, dict[str, list[Example]]]:
    """The task and its splits "train", "valid" and "test".

    `name` is one of TASKS or a path to a JSON Lines file with `input` and `label` in each row, and
    optionally `id`, `choices` and `rationale`. `train_size` is a count (> 1) or a fraction of the
    training set. UserError if unusable.
    """
    if name not in TASKS:
        task, splits = own_task(name)
    else:
        task = TASKS[name]
        splits = release_splits(task, data) if task.folder else toy_splits()
    train = splits["train"]
    count = round(train_size * len(train)) if train_size <= 1 else int(train_size)
    if not 1 <= count <= len(train):
        raise UserError(
            f"--train-size {train_size:g} asks for {count} examples: name 1 to {len(train)}."
        )
    order = np.random.default_rng(0).permutation(len(train))[:count]
    splits["train"] = [train[i] for i in sorted(order)]
    return task, splits


def release_splits(task: Task, data: str) -> dict[str, list[Example]]:
    """A task of the DSS release; where it has no validation split, a tenth of the training set is
    held out for it."""
    splits: dict[str, list[Example]] = {}
    with open_release(data) as release:
        for split in ("train", "valid", "test"):
            member = f"datasets/{task.folder}/{task.folder}_{split}.json"
            if split == "valid" and member not in release.namelist():
                continue  # svamp and cqa have none
            where = f"{release.filename}: {member}"
            rows = enumerate(parse_jsonl(read_member(release, member), where))
            splits[split] = [
                to_example(task, where, row, f"{task.name}-{split}-{i}") for i, (where, row) in rows
            ]
    if "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], 0.1)
    if not all(splits.values()):
        raise UserError(
            f"--data {data} has a split with no rows for {task.name}: download the file again."
        )
    return splits


def own_task(name: str) -> tuple[Task, dict[str, list[Example]]]:
    """The task of a JSON Lines file, a tenth each, or a row, held out for validation and test."""
    path = Path(os.path.expanduser(name))
    if not path.is_file():
        raise UserError(
            f"--task {name} is neither one of {', '.join(TASKS)} nor a JSON Lines file."
        )
    task = Task(path.stem)
    numeric = replace(task, numeric=True, answer_format=NUMBER)
    by_id: dict[str, Example] = {}
    texts = []  # where labels are not numbers
    for number, (where, row) in enumerate(read_jsonl(path)):
        example = to_example(task, where, row, f"row-{number}")
        if example.id in by_id:
            raise UserError(
                f"{where}: the id {example.id!r:.40} stands in an earlier line too: ids must"
                " differ."
            )
        by_id[example.id] = example
        if numeric.key(example.label) is None:
            texts.append(where)
    examples = list(by_id.values())
    if len(examples) < 3:
        raise UserError(
            f"--task {name} has {len(examples)} rows: training, validation and test need one each."
        )
    choices = {example.choices for example in examples}
    if choices == {()}:
        if not texts:
            task = numeric
        elif len(texts) < len(examples) / 2:
            print(
                f"The label of {texts[0]} is not a number, as most labels are:"
                " all answers are compared as text."
            )
    elif len(choices) > 1:  # as in cqa, the student must be told what to choose from
        examples = [replace(e, input=question_text(e)) for e in examples]
    train, rest = hold_out(examples, max(0.2, 2 / len(examples)))
    valid, test = hold_out(rest, 0.5)
    return task, {"train": train, "valid": valid, "test": test}


# --------------------------------------------------------------------------------------------------
# Reading an answer
#
# A teacher's raw text becomes a rationale and an answer in three steps:
# 1. REWRITE, row by row: what is no part of the reply goes, the rest becomes plainer text.
# 2. The rationale begins after EXPLANATION, or at the start, and ends before the first MARKER.
# 3. The answer is what follows the last MARKER that gives one. Without a marker it is the last
#    number or the last choice named before EXPLANATION, or else after it.

QUESTION = r"[ \t*_#>]*(?:Q|Question|Premise|Hypothesis|Sentence|Input)[*_]*[ ]?:"
# Reasoning models think first. What stands before the last closing tag is thought, and so is
# all that follows an opening tag which is never closed.
THINKING = r"""(?sx:
    \A.* [<◁[]\|?
    (?: /(?:seed:)?(?:think|thinking|thought|reason|reasoning|analysis|reflection|scratchpad)
      | end_of_thought | end_thinking | channel\|>final<\|message ) \|?[>▷\]]
    | [<◁[]\|?
    (?: (?:seed:)?(?:think|thinking|thought|reasoning) | begin_of_thought | start_thinking )
    \|?[>▷\]].* )"""
REWRITE = [
    (THINKING, ""),
    # GSM8K's annotations, closing tags, code fences, LaTeX, bold.
    (r"<<[^<>\n]*>>|</(?:Explanation|Answer)>|^[ \t]*```.*", ""),
    (r"\\left|\\right|\\[][()]|\$\$|\\(?=[$%])", ""),
    (r"\\times|\\cdot", "*"),
    (r"\\div", "/"),
    (r"\{,\}|\\,", ","),
    (r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1"),
    (r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)"),
    (r"\$([^$\n]{0,200}[=+*/][^$\n]{0,200})\$", r"\1"),
    (r"(?<!\w)(\*\*|__)(?=\S)([^*\n]*?\S)\1(?!\w)", r"\2"),
    # JSON: each field becomes a line with a label.
    (r"""(?:^|["']?[ \t]{0,9}[{,])\s{0,20}["'](\w+)["']\s{0,9}:\s{0,9}["']?""", r"\n\1: "),
    (r"""\\(["'])|["']\s{0,9}\}\s{0,9}\Z""", r"\1"),
    (r"\\n(?-i:(?![a-z]))", "\n"),
    (r"\s{10,}", "\n\n"),
    # The question restated: after a line of introduction and up to the explanation's label, or
    # its lines at the very start.
    (
        rf"""(?x:
        \A\s* (?:[^\n\d]{{0,99}}\n\s*)? {QUESTION} (?s:.*?) (?=^\W*Explanation\b)
        | \A\s* (?: {QUESTION}[^\n]*\n\s*
                (?:(?:Answer\ )?Choices:\s*)? (?:\([a-z]\)[^\n]*\n\s*)* )+ )""",
        "",
    ),
    # What completion models run on into: the next question of the few-shot prompt, invented.
    (rf"(?-i:\n{QUESTION}|\b(?:Q|Premise):)(?s:.*)", ""),
]
EXPLANATION = r"""(?imx)
    <Explanation>[\s:]* | \A\s*A:
    | (?: ^[ \t*_#>"-]* | (?<=[.)]\ ) ) (?:\w+\ ){0,2} (?:Explanation|Rationale|Reasoning)
      ["*_]* (?: \s?[:：][*_]* | [ \t]*$ )"""
MARKER = re.compile(r"""(?imx)
    (?: ,?\s*\b(?:so|hence|therefore|thus),?\s+ )?
    (?:
        # the paper's label, and others: "My final answer:"
        (?:\b(?:the|my|our|your)\s)? (?:\b(?:correct|final|right|best)[ _]){0,2}
        (?: <Answer>\s*:?
          | (?<![^\W_]) (?:answer|(?-i:A)nswer\s) ["*_]* (?:[:：]|\s-\s) [*_]*
          | 答案(?:是|\s?[:：]) )
      | \b(?:the\s)?(?:best|correct|right|final)\s(?:option|choice)\s?[:：]
      | ^[ \t#*_]*(?:final\ )?answer[ \t*_]*$ | ^[ \t]*\#{4} | \\boxed\{
        # sentences: "The answer is", but not "To see what the answer is"; "the answer must be C",
        # but not "the answer must be a place"
      | \bI(?:'d|\swould)?\s(?:choose|pick|select|go\swith)\b
      | (?: (?<!what\ )(?<!which\ )(?<!how\ )\b(?:the|my|our)\s
            (?:(?:correct|final|right|best|most\ likely)\s)? | ^ | (?<=[.!?]\ ) )
        (?:answer|option|choice|letter)\s
        (?: is\b:? (?!\s(?:not\s)?(?:clear|obvious|known|found|given|obtained|\w+\sby)\b)
          | (?:must|should|would|has\ to|can\ only)\sbe (?=\W*(?:\([a-z]\)|(?-i:[A-Z])\b)) )
    )""")
# Signs as people type them, and the plain ones.
SIGNS = str.maketrans(
    "−–×÷’‘“”\u00a0\u2009\u202f\u3000０１２３４５６７８９．，：（）＋－＊／＝％＄"
    "ＡＢＣＤＥＦＧＨＩＪＫＬＭＮＯＰＱＲＳＴＵＶＷＸＹＺａｂｃｄｅｆｇｈｉｊｋｌｍｎｏｐｑｒｓｔｕｖｗｘｙｚ",
    "--*/''\"\"    0123456789.,:()+-*/=%$ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
)
# A number, or an equation of numbers.
NUMBERS = (
    r"(?:[-(]\s{0,9}){0,20}\d*\.?\d+"
    r"(?:[\s()]{0,20}[-+*/][-\s()]{0,20}\d*\.?\d+)*(?:\s{0,9}\)){0,20}"
)
# Units inside an equation (2 apples + 3 apples), ranges, bullets, and numbers that are denied.
NO_NUMBER = r"""(?x)
    (?<=\d)\s*[a-zA-Z][^\d\n=+*.,;:()]{0,40}?(?=\s*[+*×)]|\s[-−–/÷]\s)
    | (?<!\d)\d+(?:[–~]|\ (?:to|or)\ )\d+ | \bbetween\ \d+\ and\ \d+ | \b\d+-\d+(?=\ [a-z])
    | (?<=\n)[-•*]\s | \bnot\s\S+(?=\sbut\b)"""
WORDS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty",
)
# A text that begins with a choice's letter.
LETTER = r"""(?x)
    \A\W{0,9}
    (?:(?:either|option|choice|letter|therefore|thus|hence|indeed|most|\w+ly)[\s,:]{1,9}){0,3}
    \W{0,9} ([a-z])
    (?: ["')] | \W{0,9}(?:$|\n) | [.:,](?!\w)
      | \s(?:is|because|since|as|for|-|–|—)\s | (?<![ai])\s )
    (?s:.*)"""
# What stands before a choice that is named only to be denied.
DENIED = (
    r"(?:\b(?:not|cannot|no|non|never|neither|nor|fails?|without|rather than|instead of|"
    r"rules? out)|n't)\b[\s(-]+(?:(?!so\b|but\b|thus\b|hence\b|therefore\b)\w+[\s()]+){0,3}$"
)
STEMS = {"entailment": r"entail\w*", "contradiction": r"contradict\w*"}  # the premise entails it


def bare_number(text: str) -> str:
    """Numbers as Python writes them: 1,200 or 1 200 becomes 1200, $5 or 5% or 05 becomes 5."""
    thousands = r"((?<=\b\d)|(?<=\b\d\d)|(?<=\b\d\d\d))[ ,'_](?=\d{3}(?!\d))"
    text = re.sub(thousands, "", text.translate(SIGNS))
    return re.sub(r"[$€£¥]|(?<=\d) ?%|(?<![\d.])0+(?=\d)", "", text)


def find_number(text: str, last: bool) -> str | None:
    """The first (or last) number or equation in the text."""
    text = re.sub(r"(?<=[\s\d)])[xX](?=[\s(]*\d)", "*", text)
    numbers = re.findall(NUMBERS, bare_number(re.sub(NO_NUMBER, "", text)))
    for number in reversed(numbers) if last else numbers:
        for form in (number, number.strip("() ")):
            if equation_value(form) is not None:
                return form
    word = re.match(r"\W*([a-z]+)(?!\w|-|\s(?:of|or|to|and|hundred|thousand)\b)", text.lower())
    return str(WORDS.index(word[1])) if word and word[1] in WORDS else None


def find_choice(text: str, choices: tuple[str, ...], last: bool) -> str | None:
    """The choice of the letter that the text begins with, or the first (or last) one named."""
    text = re.sub(LETTER, r"(\1)", text.translate(SIGNS).lower())
    named = []
    for letter, choice in zip(ascii_lowercase, choices):
        word = STEMS.get(choice) or re.escape(choice.translate(SIGNS).lower().strip())
        for place in re.finditer(rf"\({letter}\)|(?<!\w){word}(?!\w)", text):
            start, end = place.span()
            # a story's "not" in front of a choice's word says nothing about the answer
            story = last and choices != NLI
            if story or not re.search(DENIED, text[:start][-60:]):
                named.append((-end if last else start, start - end, choice))
    return min(named)[2] if named else None


def parse_output(task: Task, example: Example, output: str) -> tuple[str, str | None]:
    """Split a teacher's raw output into a rationale and an answer.

    The answer is the text of a choice, a number or equation, or the line after the marker, by
    task; None where the output gives none. The rationale holds neither a marker nor what follows
    it, and may be empty.
    """
    for pattern, plain in REWRITE:
        output = re.sub("(?im)" + pattern, plain, output)[:20_000]
    parts = re.split(EXPLANATION, output, maxsplit=1)  # the answer may stand before the label
    rationale = MARKER.split(parts[-1])[0].strip("*_#> \t\r\n")
    _, *tails = MARKER.split(output)
    answer = None
    for tail in reversed(tails) if tails else parts:
        if task.numeric:
            answer = find_number(tail, not tails)
        elif example.choices:
            answer = find_choice(tail, example.choices, not tails)
        elif tails:  # the first line that introduces nothing, without its full stop
            line = re.search(r"(?m)^(?!.*:\s*$)[ \t]*(\S.*?)((?<!\.\w)\.)?[ \t]*$", tail)
            answer = line and line[1]
        if answer is not None:
            break
    if not tails and (answer is None or len(rationale.split()) < 4):
        rationale = ""  # a bare answer explains nothing
    return rationale, answer


# --------------------------------------------------------------------------------------------------
# Teachers and their cache

SYSTEM = (
    "You are a question-answering robot. You get a question, with answer choices where there are"
    " any. Give the"
    " explanation and the answer. Find the explanation by thinking step by step. The answer is"
    " {answer_format}."
    " Follow this output format:\n<Explanation>: the explanation\n<Answer>: the answer"
)
SUMS = """Question: Nina had 3 plums. She bought 4 more. How many plums does she have?
<Explanation>: Nina had 3 plums and bought 4, so she has 3 + 4 = 7 plums.
<Answer>: ( 3 + 4 )

Question: There are 24 chairs in rows of 6. How many rows are there?
<Explanation>: Each row takes 6 of the 24 chairs, so there are 24 / 6 = 4 rows.
<Answer>: ( 24 / 6 )

Question: Omar baked 5 trays of 8 rolls and ate 2 rolls. How many rolls are left?
<Explanation>: 5 trays of 8 rolls are 5 * 8 = 40 rolls. He ate 2 of them, so 40 - 2 = 38 are left.
<Answer>: ( ( 5 * 8 ) - 2 )

"""
# Three worked examples for models that only continue text, by the form of the answer.
SHOTS = {
    EQUATION: SUMS,
    NUMBER: SUMS,
    RELATION: f"""Question: A woman plays the violin on a stage.
Hypothesis: Somebody makes music.
Answer Choices:{lettered(NLI)}
<Explanation>: Who plays the violin makes music, so the hypothesis must be true.
<Answer>: (a) entailment

Question: Two boys run across a field.
Hypothesis: The boys are late for school.
Answer Choices:{lettered(NLI)}
<Explanation>: They may run for any reason, so the hypothesis can be true or false.
<Answer>: (b) neutral

Question: A cat sleeps on the sofa.
Hypothesis: The cat is chasing a bird.
Answer Choices:{lettered(NLI)}
<Explanation>: A cat that sleeps chases nothing, so the hypothesis must be false.
<Answer>: (c) contradiction

""",
    CHOICE: """Question: Where do fish live?
Answer Choices:
(a) water
(b) sky
<Explanation>: Fish breathe through gills, which work under water only.
<Answer>: (a) water

Question: What do you use to cut bread?
Answer Choices:
(a) spoon
(b) pillow
(c) knife
<Explanation>: Cutting bread takes a long, sharp edge, which of these things a knife has.
<Answer>: (c) knife

Question: Why would you open an umbrella?
Answer Choices:
(a) sun has set
(b) it rains
(c) you are hungry
<Explanation>: An umbrella keeps water off the one who holds it, and water falls when it rains.
<Answer>: (b) it rains

""",
    FREE: """Question: What is the capital of France?
<Explanation>: The government of France sits in Paris, which makes it the capital.
<Answer>: Paris

Question: Which is heavier, a truck or a bicycle?
<Explanation>: A truck weighs tons, a bicycle about ten kilograms.
<Answer>: a truck

Question: What colour do you get from blue and yellow paint?
<Explanation>: Paint of both colours keeps only the light between them, which is green.
<Answer>: green

""",
}


Chat = list[dict[str, str]]


def question_text(example: Example) -> str:
    """The question as a person would put it, with its answer choices."""
    question = example.input.replace("</s>", "\nHypothesis: ")
    if example.choices and "Answer Choices:" not in question:
        question += f"\nAnswer Choices:{lettered(example.choices)}"
    return question


def ask(task: Task, example: Example) -> Chat:
    """The paper's prompt (its Fig. 3) as chat messages."""
    return [
        {"role": "system", "content": SYSTEM.format(answer_format=task.answer_format)},
        {"role": "user", "content": f"Question: {question_text(example)}"},
    ]


def as_text(system: str, user: str) -> str:
    """A chat as text to continue, with worked examples where the paper's output format is asked
    for."""
    for answer_format, shots in SHOTS.items():
        if answer_format in system:
            return f"{system}\n\n{shots}{user}\n<Explanation>:"
    return f"{system}\n\n{user}\nReply:"


def as_chat(tokenizer: Any, chat: Chat) -> str:
    """A chat in the model's own template, thinking switched off where it can be, or as a text to
    continue.

    Where the template has no system role, as Gemma 2's and Mistral's, the system text goes in front
    of the user's; where it wants lists of parts, each text is one. ValueError if it takes none of
    these.
    """
    if not tokenizer.chat_template:
        return as_text(chat[0]["content"], chat[1]["content"])
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    joined = [{"role": "user", "content": "\n\n".join(m["content"] for m in chat)}]
    for messages in (chat, joined):
        parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
        for form in (messages, parts):
            with suppress(jinja2.TemplateError, TypeError):
                text = tokenizer.apply_chat_template(form, **how)
                if chat[0]["content"] in text:  # some templates drop what they do not know
                    return text
    raise ValueError("its chat template takes no system and no user message")


Request = tuple[Example, int]  # a question, and the number of the sample
# a request, its text, and why the text is empty or cut: "" if it is neither
Answers = Iterator[tuple[Request, str, str]]


def ask_model(
    requests: list[Request], chat: Callable[[Example], Chat], name: str, options: Any
) -> Answers:
    """Samples of a Hugging Face model, causal or seq2seq, on this machine; UserError if it cannot
    be used."""
    device = gpu_or_cpu(options.device)
    on_cpu = device.startswith("cpu")
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        seq2seq = transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=False
        ).is_encoder_decoder
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, padding_side="right" if seq2seq else "left", trust_remote_code=False
        )
        kind: Any = (
            transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
        )
        model = kind.from_pretrained(name, trust_remote_code=False).to(device).eval()
        if not tokenizer.pad_token:  # padding is masked, so that any token will do
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        how: Any = {
            "do_sample": options.temperature > 0,
            "temperature": options.temperature or None,
        }
        bare = not tokenizer.chat_template
        if bare and not seq2seq:  # a base model goes on with a question of its own
            how |= {"stop_strings": ["\nQuestion:", "\n\n"], "tokenizer": tokenizer}
        longest = getattr(model.config, "max_position_embeddings", None) or math.inf

        def answers(batch: list[Request]) -> list[tuple[Request, str, str]]:
            texts = [as_chat(tokenizer, chat(example)) for example, _ in batch]
            inputs = tokenizer(
                texts,
                return_tensors="pt",
                padding=True,
                return_token_type_ids=False,
                add_special_tokens=seq2seq or bare,  # a template brings its own
            ).to(device)
            length = inputs["input_ids"].shape[1]
            if length + options.max_tokens > longest:
                raise ValueError(f"{length} tokens and --max-tokens are above its {longest}")
            torch.manual_seed(zlib.crc32(f"{texts[0]}/{batch[0][1]}".encode()))
            # on a GPU the sampling of many models (top-p) has no deterministic algorithm
            torch.use_deterministic_algorithms(False)
            try:
                output = model.generate(**inputs, **how, max_new_tokens=options.max_tokens)
            finally:
                torch.use_deterministic_algorithms(deterministic)
            output = output[:, 0 if seq2seq else length :]  # (questions, tokens)
            texts = tokenizer.batch_decode(output, skip_special_tokens=True)
            found = []
            for request, text, ids in zip(batch, texts, output.tolist()):
                ended = len(ids) < options.max_tokens or ids[-1] in tokenizer.all_special_ids
                found.append((request, text, "" if ended else "length"))
            return found

        size = TEACHER_BATCH // 4 if on_cpu else TEACHER_BATCH
        for batch in in_batches(requests, size, answers):
            yield from batch
    except Exception as error:  # noqa: BLE001 - a model made elsewhere can fail in any way
        mend = f"an API's model is api:{name}"
        if memory_is_full(error):
            mend = "name a smaller one" + ("" if on_cpu else ", or --device cpu")
        raise UserError(f"--teacher {name} cannot be used ({first_line(error)}); {mend}.")


def check_api_base(base: str) -> None:
    """UserError unless it is the plain address of a server: what else it holds would be kept with
    the run's options."""
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[^@?#\s]*)?", base):
        raise UserError(
            f"--api-base {re.sub('.*@|[?#].*', '***', base)} (or OPENAI_BASE_URL) must read as"
            " http://localhost:8000/v1"
            " does; a key goes into OPENAI_API_KEY."
        )


def cleaned(text: str) -> str:
    """A text from outside without what UTF-8 cannot hold, and without the API's key where a server
    repeats it."""
    key = os.environ.get("OPENAI_API_KEY", "")
    if len(key) >= 8:  # a shorter one, as local servers have, may be a word of any text
        text = text.replace(key, "***")
    return text.encode(errors="replace").decode()


def in_thread(function: Callable[..., Any], *arguments: Any) -> Future:
    """Call `function` in a thread that neither a time limit nor Ctrl-C has to wait for."""
    future: Future = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001, who asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


class AsItComes(urllib.request.HTTPErrorProcessor):
    """Replies of any status are read alike, and no redirect is followed: the key goes nowhere
    else."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def post(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request
) -> tuple[int, Any, bytes]:
    """(status, headers, body) of what a server replies.

    Not by huggingface_hub, whose client reaches nothing with HF_HUB_OFFLINE=1: a teacher's server
    is not the Hub.
    """
    with opener.open(request, timeout=API_TIMEOUT) as reply:
        return reply.status, reply.headers, reply.read(API_LARGEST)


def read_reply(raw: bytes) -> tuple[str, str]:
    """(text, why it is empty or cut) of a chat completion; one of UNREADABLE if it is something
    else."""
    choice = json.loads(raw)["choices"][0]
    reason, content = str(choice.get("finish_reason")), choice["message"].get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if reason == "error":
        raise ValueError(reason)
    whole = content.strip() and reason not in ("length", "content_filter")
    return cleaned(content), "" if whole else cleaned(reason)


# Faults of a connection that may be gone at the next try, and what a reply raises that is no chat
# completion.
BROKEN = (TimeoutError, ConnectionResetError, BrokenPipeError, HTTPException, ssl.SSLEOFError)
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def ask_api(
    requests: list[Request], chat: Callable[[Example], Chat], name: str, options: Any
) -> Answers:
    """Samples of any OpenAI-compatible server; what may pass is tried again, what stays ends in one
    UserError."""
    base = options.api_base or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    key = os.environ.get("OPENAI_API_KEY") or "none"
    check_api_base(base)
    if not re.fullmatch("[!-~]+", key):
        raise UserError("OPENAI_API_KEY has a space, a line break or a sign that no key has.")
    url, limits = f"{base.rstrip('/')}/chat/completions", ["max_tokens"]  # as the server calls it
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "qcrd",
        "Authorization": f"Bearer {key}",
    }
    here = re.match(r"https?://(localhost|127\.|0\.0\.0\.0|\[::1\])", url)  # through no proxy
    proxies = urllib.request.ProxyHandler({} if here else None)
    opener = urllib.request.build_opener(AsItComes, proxies)
    good: list[tuple[str, str]] = []  # the replies so far
    told: list[str] = []  # what happened before
    over = threading.Event()

    def tell(what: str, problem: str) -> None:
        """Say it with the server's words, the first time."""
        if what not in told:
            told.append(what)
            tqdm.write(f"{url} gave {problem}; {what}.")

    def one(request: Request) -> tuple[str, str]:
        for attempt in range(API_TRIES):
            body = {"model": name, "messages": chat(request[0]), "temperature": options.temperature}
            body[limits[-1]] = options.max_tokens
            pause = API_BACKOFF * 2**attempt
            try:
                asked = urllib.request.Request(url, json.dumps(body).encode(), headers)
                status, about, raw = in_thread(post, opener, asked).result(API_TIMEOUT)
                said = cleaned(f"{about.get('Location', '')} {raw.decode(errors='replace')}")
                inside = re.search(r'"error": ?\{[^{}]*"code": ?(\d{3})\b', said)
                if inside and status == 200:  # as some servers tell an error
                    status = int(inside[1])
                problem = f"status {status}: {' '.join(said.split())[:300]}"
                with suppress(*UNREADABLE):
                    if status < 300:
                        answer = read_reply(raw)
                        good.append(answer)
                        if answer[1]:
                            tell("a sample without a whole text", problem)
                        return answer
                if status in (400, 403) and re.search("content_filter|moderation|flagged", said):
                    return "", "content_filter"
                if "max_completion_tokens" in said and "max_tokens" in body:
                    limits.append("max_completion_tokens")
                    continue
                stays = 300 <= status < 500 and status not in (408, 409, 425, 429)
                stays |= "insufficient_quota" in said
                with suppress(ValueError):
                    pause = max(pause, float(about.get("Retry-After", "")))
            except (OSError, HTTPException, ValueError, OverflowError) as error:
                reason = error.reason if isinstance(error, URLError) else error
                problem = f"{type(reason).__name__} {reason}".strip()
                stays = not good and not isinstance(reason, BROKEN)
            if stays or attempt == API_TRIES - 1:
                raise UserError(
                    f"--teacher api:{name}: {url} gave {problem}: check --api-base (most end in"
                    " /v1, and redirects are"
                    " not followed), OPENAI_API_KEY, the model and the options, or start again"
                    " when it is back."
                )
            tell("it is tried again", problem)
            if over.wait(min(60, pause)):
                break
        return "", "stopped"

    left = iter(requests)
    under_way = {in_thread(one, r): r for r in islice(left, options.api_concurrency)}
    try:
        while under_way:
            for answer in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(answer), *answer.result()
                # only now, when the sample is in the cache: a kill loses the requests under way and
                # no more
                under_way |= {in_thread(one, r): r for r in islice(left, 1)}
    finally:
        over.set()


@dataclass
class Cache:
    """Raw teacher outputs in a JSON Lines file, `{"asked", "id", "teacher", "sample", "output"}`,
    safe against kill -9.

    A sample is one appended line; "asked" is a digest of what was asked, and "max_tokens" stands
    beside an output that was empty or cut. The lock keeps writers from mixing lines, and a line
    that a killed writer left unfinished is closed before the next is appended; loading drops it.
    """

    path: Path

    @contextmanager
    def held(self) -> Iterator[None]:
        """By one process at a time; says what it waits for. UserError if the file cannot be
        written."""
        lock = f"{self.path}.lock"
        waiting = f"Waiting for another process that samples into {self.path}."
        with cache_folder(self.path.parent), locked(lock, waiting), self.path.open("ab") as file:
            try:
                yield
            finally:
                os.fsync(file.fileno())

    def load(self, max_tokens: int = 0) -> dict[tuple[str, int], str]:
        """Output by (asked, sample), unless it was cut at fewer than `max_tokens`; the first of
        duplicates counts."""
        outputs: dict[Any, Any] = {}
        for _, row in read_jsonl(self.path, torn=True):
            limit = row.get("max_tokens")
            match row:
                case {"asked": str(asked), "sample": int(n), "output": str(output)}:
                    if limit is None or type(limit) is int and limit >= max_tokens:
                        outputs.setdefault((asked, n), output)
        return outputs

    def append(self, asked: str, teacher: str, sample: int, output: str, **more: Any) -> None:
        row = {"asked": asked, "teacher": teacher, "sample": sample, "output": output} | more
        # the line break comes first, so that it closes a line that a killed writer left unfinished
        with self.path.open("ab") as file:
            file.write(b"\n" + json.dumps(row).encode())


def sampled(
    cache: Cache,
    examples: list[Example],
    k: int,
    teacher: str,
    chat: Callable[[Example], Chat],
    options: Any,
) -> dict[tuple[str, int], str]:
    """K outputs of each question by (id, sample): from the cache, and what is missing from the
    teacher, into the cache."""
    # a folder whose model was trained again is another teacher
    version = digest(teacher) if os.path.isdir(teacher) else teacher
    keys: dict[tuple[str, int], tuple[str, int]] = {}  # in the cache, by (id, sample)
    wanted: dict[tuple[str, int], Request] = {}  # by key, so that the same question is asked once
    for example in examples:
        asked = json.dumps([version, options.temperature, SHOTS, chat(example)])
        for n in range(k):
            key = (hashlib.sha256(asked.encode()).hexdigest()[:16], n)
            keys[example.id, n], wanted[key] = key, (example, n)
    lacks: list[str] = []
    with cache.held():
        known = cache.load(options.max_tokens)
        missing = [request for key, request in wanted.items() if key not in known]
        if missing and not options.api_concurrency:
            raise UserError(
                f"{len(missing)} samples of {teacher} are no longer in {cache.path}: set"
                " QCRD_CACHE as it was when the run was trained."
            )
        how = ask_api if teacher.startswith("api:") else ask_model
        answers = how(missing, chat, teacher.removeprefix("api:"), options) if missing else ()
        bar = tqdm(
            answers, f"samples of {teacher}", len(missing), unit="sample", disable=not missing
        )
        for (example, n), output, lack in bar:
            key = keys[example.id, n]
            limit = options.max_tokens if lack else None
            cache.append(key[0], teacher, n, output, id=example.id, max_tokens=limit)
            known[key] = output
            if lack:
                lacks.append(lack)
    if lacks:
        reasons = ", ".join(sorted(set(lacks)))
        print(
            f"{len(lacks)} replies had no text (finish_reason {reasons}) or were cut; if it is"
            " length, raise --max-tokens."
        )
    return {place: known[key] for place, key in keys.items()}


SAMPLE = {"id": str, "teacher": str, "sample": int, "output": str}


def read_samples(path: str) -> Iterator[tuple[str, str, int, str]]:
    """(id, teacher, sample, output) of a file of samples; UserError names the line that has not all
    four."""
    for where, row in read_jsonl(path):
        for name, kind in SAMPLE.items():
            if type(row.get(name)) is not kind:
                raise UserError(
                    f"{where} has no usable {name!r}: id, teacher and output are texts, sample is"
                    " a whole number."
                )
        yield row["id"], row["teacher"], row["sample"], row["output"]


def palm_outputs(task: Task, data: str) -> Iterator[tuple[str, str, int, str]]:
    """The PaLM-540B completions of the DSS release, one for each training question, in the order of
    the rows."""
    folder, outputs = f"datasets/{task.folder}", []
    with open_release(data) as release:
        name = f"{folder}/{task.folder}_train.json"
        rows = len(read_member(release, name).strip().splitlines())
        parts = [n for n in release.namelist() if n.startswith(f"{folder}/llm/train_CoT_")]
        for number in range(len(parts)):  # 0, 1 and on: one that is missing is told by its name
            name = f"{folder}/llm/train_CoT_{number}.json"
            try:
                outputs += json.loads(read_member(release, name))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{data}: {name} is no JSON array ({error}): download it again.")
    if [type(output) for output in outputs] != [str] * rows:
        raise UserError(
            f"{data} has {len(outputs)} PaLM samples for {rows} training questions of {task.name},"
            " or some that are no texts; only their order tells whose they are: download the file"
            " again."
        )
    for i, output in enumerate(outputs):
        yield f"{task.name}-train-{i}", "palm-540b", 0, output


def outputs_of(
    teacher: str, task: Task, examples: list[Example], options: Any
) -> Iterable[tuple[str, str, int, str]]:
    """(id, teacher, sample, output) of one --teacher; what is missing of a model's is asked for."""
    k, path = options.k or 5, os.path.expanduser(teacher)
    if teacher == "own":
        return [(e.id, teacher, 0, e.rationale) for e in examples if e.rationale]
    if teacher == "toy" and examples[0].story is not None:
        return toy_outputs(examples, k, options.toy_errors)
    if teacher == "palm" and task.folder:
        return palm_outputs(task, options.data)
    if teacher in ("toy", "palm"):
        raise UserError(f"--teacher {teacher} has no samples for task {task.name}: name another.")
    if os.path.isfile(path):
        return read_samples(path)
    if re.search(r"^[./~]|\.(jsonl?|csv|txt)$", teacher) and not os.path.isdir(path):
        raise UserError(f"--teacher {teacher}: there is no such file or folder.")
    name = re.sub(r"[^\w.-]+", "-", f"{task.name}-{teacher}")[:80]
    cache = Cache(CACHE / "samples" / f"{name}.jsonl")
    outputs = sampled(cache, examples, k, path, partial(ask, task), options)
    return [(id, teacher, n, output) for (id, n), output in outputs.items()]


def toy_outputs(
    examples: list[Example], k: int, error_rate: float
) -> Iterator[tuple[str, str, int, str]]:
    """Samples of the toy's own teacher, made again each time."""
    for e in examples:
        for n in range(k):
            assert e.story is not None
            yield e.id, "toy", n, think(random.Random(f"{e.id}/{n}"), e.story, error_rate)


def collect(
    task: Task, examples: list[Example], teachers: list[str], options: Any
) -> dict[str, list[Sample]]:
    """The parsed samples of each training question by id, in order, K from each teacher."""
    by_id = {example.id: example for example in examples}
    samples: dict[str, list[Sample]] = {}
    most = 0
    for teacher in teachers or [default_teacher(task, examples, options)]:
        outputs: dict[tuple[str, str, int], str] = {}
        for id, name, n, output in outputs_of(teacher, task, examples, options):
            if id in by_id and outputs.setdefault((id, name, n), output) != output:
                raise UserError(
                    f"--teacher {teacher}: sample {n} of {id!r} is there twice, also as"
                    f" {output[:99]!r}: number them."
                )
        if not outputs:
            raise UserError(
                f"--teacher {teacher} has no sample of a training question of {task.name}: ids"
                f" must match, such as {examples[0].id!r}."
            )
        readable = False
        of_teacher: dict[tuple[str, str], list[Sample]] = defaultdict(list)
        for (id, name, _), output in sorted(outputs.items(), key=lambda item: item[0][2]):
            sample = Sample(name, output, by_id[id].label)
            if teacher != "own":  # a person's words are taken as they are
                sample = Sample(name, *parse_output(task, by_id[id], cleaned(output)))
            of_teacher[id, name].append(sample)
            readable |= task.key(sample.answer) is not None
        if not readable:
            raise UserError(
                f"--teacher {teacher}: no answer can be read in any of {len(outputs)} replies,"
                f" such as {output[:200]!r}."
            )
        for (id, _), found in of_teacher.items():
            samples.setdefault(id, []).extend(found[: options.k])
            most = max(most, len(found))
    if options.k and options.k > most:
        raise UserError(f"--k {options.k} asks for more samples than there are: name 1 to {most}.")
    return samples


def default_teacher(task: Task, examples: list[Example], options: Any) -> str:
    if examples[0].story is not None:
        return "toy"
    if any(example.rationale for example in examples):
        return "own"
    if not task.folder:
        raise UserError(
            f"--task {options.task} needs a --teacher: a model, api:MODEL, or a file of samples."
        )
    print(
        "Teacher: palm, one sample a question, so there is nothing to vote on; --teacher MODEL"
        " with --k brings more."
    )
    return "palm"


# --------------------------------------------------------------------------------------------------
# The built-in task: toy, stories with sums that can be checked exactly, and tiny, their student

NAMES = ["Anna", "Ben", "Carla", "David", "Emma"]
THINGS = ["apples", "books", "cards", "coins", "eggs"]
VERBS = {
    "bought": 1,
    "found": 1,
    "got": 1,
    "lost": -1,
    "sold": -1,
    "gave": -1,
}  # what each does to the actor's count
LINKS = {"got": "from", "gave": "to"}  # before the other person of a gift
MATTERS = 0.75  # how often an event is about the thing asked for
LARGEST = 20  # no count goes beyond: small enough for a tiny student to learn the sums by heart
# How many events a question has, each of these equally often; with more of three, chance decides
# which seeds learn them.
EVENTS = (1, 1, 1, 1, 2, 2, 2, 2, 2, 3)
TOY_VERSION = 5  # raised when the stories change, so that old samples are not taken for theirs
TOY_SIZES = {"train": 2000, "valid": 500, "test": 1000}


class Step(NamedTuple):
    """One step of a sum: a + b = c or a - b = c."""

    a: int
    op: str
    b: int
    c: int

    def __str__(self) -> str:
        return f"{self.a} {self.op} {self.b} = {self.c}"


@dataclass(frozen=True)
class Event:
    """Something that happens to `n` things of `who`; a gift has an `other` side."""

    who: str
    verb: str
    n: int
    thing: str
    other: str = ""

    def __str__(self) -> str:
        link = f" {LINKS[self.verb]} {self.other}" if self.other else ""
        return f"{self.who} {self.verb} {self.n} {self.thing}{link}"

    def change(self, person: str, thing: str) -> int:
        """By how much the event changes the number of `thing` that `person` has."""
        sign = {self.who: 1, self.other: -1}.get(person, 0) if thing == self.thing else 0
        return sign * VERBS[self.verb] * self.n


@dataclass(frozen=True)
class Story:
    """A question about how many `thing` somebody has in the end, after events of which only some
    matter."""

    person: str
    thing: str
    start: int
    events: tuple[Event, ...]

    def told(self) -> list[tuple[Event, int]]:
        """Each event with what it adds to the count or takes from it; 0 if it does not matter."""
        return [(event, event.change(self.person, self.thing)) for event in self.events]

    def changes(self) -> list[int]:
        """What the events that matter add to the count, or take from it."""
        return [change for _, change in self.told() if change]

    def input(self) -> str:
        """The story as the student reads it."""
        told = [f"{self.person} had {self.start} {self.thing}"] + [str(e) for e in self.events]
        return ". ".join(told) + f".\nHow many {self.thing} does {self.person} have now?"


def follow(start: int, changes: list[int]) -> list[Step]:
    """The steps that the changes make of `start`; none where a count leaves the range, or where
    nothing changes."""
    counts = list(accumulate(changes, initial=start))
    if min(counts) < 0 or max(counts) > LARGEST:
        return []
    return [Step(a, "+" if c > a else "-", abs(c - a), c) for a, c in pairwise(counts)]


def equation(start: int, changes: list[int]) -> str:
    """The steps as one SVAMP-style equation: `( ( 7 + 5 ) - 2 )`."""
    text = str(start)
    for change in changes:
        text = f"( {text} {'+' if change > 0 else '-'} {abs(change)} )"
    return text


def random_story(rng: random.Random, count: int) -> Story:
    """`count` events, at least one that matters; the others are about another thing and anybody."""
    while True:
        people, things, events = rng.sample(NAMES, 2), rng.sample(THINGS, 2), []
        for _ in range(count):
            matters = rng.random() < MATTERS
            who, other = people if matters else rng.sample(people, 2)
            verb, n = rng.choice(list(VERBS)), rng.randint(2, 9)
            events.append(
                Event(who, verb, n, things[0 if matters else 1], other if verb in LINKS else "")
            )
        story = Story(people[0], things[0], rng.randint(2, 12), tuple(events))
        if follow(story.start, story.changes()):
            return story


def toy_splits() -> dict[str, list[Example]]:
    """The same stories every time, no story twice."""
    rng = random.Random("toy")
    splits, told = {}, set()
    for split, size in TOY_SIZES.items():
        examples: list[Example] = []
        while len(examples) < size:
            story = random_story(rng, rng.choice(EVENTS))
            text, label = story.input(), equation(story.start, story.changes())
            if text not in told:
                told.add(text)
                examples.append(Example(f"toy-{split}-{len(examples)}", text, label, story=story))
        splits[split] = examples
    return splits


def is_valid(example: Example, rationale: str) -> bool | None:
    """The exact check: every step right, all steps and no other in order, and the gold value as the
    last number.

    None for tasks whose rationales cannot be checked.
    """
    if example.story is None:
        return None
    gold = follow(example.story.start, example.story.changes())
    rationale = rationale[:2000]
    told = re.findall(r"\d+ [+-] \d+ = \d+", rationale)
    numbers = re.findall(r"\d+", rationale)
    return told == [str(step) for step in gold] and numbers[-1] == str(gold[-1].c)


def wrong_events(
    rng: random.Random, right: list[tuple[Event, int]], others: list[Event]
) -> list[tuple[Event, int]]:
    """What somebody counts who gets one thing wrong: an operation, a number, a step left out or a
    step too many."""
    used, i = list(right), rng.randrange(len(right))
    event, change = used[i]
    error = rng.choice(["operation", "number", "left out", "too many"])
    if error == "operation":
        used[i] = (event, -change)
    elif error == "number":
        n = rng.choice([e.n for e in others] or [event.n - 1, event.n + 1])
        used[i] = (replace(event, n=n), n if change > 0 else -n)
    elif error == "left out" and len(used) > 1:
        del used[i]
    elif others:
        extra = rng.choice(others)
        used.insert(rng.randint(0, len(used)), (extra, rng.choice((1, -1)) * extra.n))
    return used


STYLES = [  # how an explanation opens, tells a step, and closes
    (
        "{s.person} had {s.start} {s.thing}.",
        "{event}, so {step}.",
        "Now {s.person} has {end} {s.thing}.",
    ),
    (
        "The story starts with {s.start} {s.thing}.",
        "After that {event.who} {event.verb} {event.n}: {step}.",
        "That makes {end}.",
    ),
    (
        "At first there are {s.start}.",
        "{do} {step.b} because {event.who} {event.verb} {event.n}: {step}.",
        "In the end {s.person} has {end}.",
    ),
]


def think(rng: random.Random, story: Story, error_rate: float) -> str:
    """One sample of the built-in teacher: an explanation and the answer that follows from it, in
    the paper's format.

    With probability `error_rate` the reasoning goes wrong as a person's would, and so does the
    answer.
    """
    right = [(event, change) for event, change in story.told() if change]
    others = [event for event, change in story.told() if not change]
    wrong = rng.random() < error_rate
    used: list[tuple[Event, int]] = []
    steps: list[Step] = []
    # An error may change nothing, or leave the range of counts: then another one is tried. Every
    # story has one that does neither, at its end: the last number one off, or, where there are
    # events that do not matter, one of them added or subtracted.
    while not steps or (wrong and used == right):
        used = wrong_events(rng, right, others) if wrong else right
        changes = [change for _, change in used]
        steps = follow(story.start, changes)
    opening, middle, closing = rng.choice(STYLES)
    lines = [opening.format(s=story)]
    for (event, _), step in zip(used, steps):
        do = "Add" if step.op == "+" else "Take away"
        lines.append(middle.format(event=event, do=do, step=step))
    lines.append(closing.format(s=story, end=steps[-1].c))
    return f"<Explanation>: {' '.join(lines)}\n<Answer>: {equation(story.start, changes)}"


# tiny: a student small enough to pretrain on a laptop while you wait
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_LR = 1000, 32, 2e-3
TINY_SHAPE: Any = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # with T5's own pad_token_id 0 and eos_token_id 1


def told_story(rng: random.Random) -> str:
    """A pretraining text: a story told with running totals, half of them without distractors;
    nothing is asked."""
    story, plain = random_story(rng, rng.randint(1, 3)), rng.random() < 0.5
    count, told = story.start, [f"{story.person} had {story.start} {story.thing}."]
    for event, change in story.told():
        count += change
        if change:
            told.append(f"{event}. Now {story.person} has {count} {story.thing}.")
        elif not plain:
            told.append(f"{event}.")
    return " ".join(told)


def sentence_pieces(texts: Iterable[str], size: int, **how: Any) -> list[tuple[str, float]]:
    """The pieces, with their scores, of a SentencePiece vocabulary of about this size, in which the
    first three are T5's padding, end and unknown token."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text.replace("\n", " ") for text in texts),
        model_writer=model,
        vocab_size=size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        **how,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(trained.id_to_piece(i), trained.get_score(i)) for i in range(len(trained))]


def tiny_tokenizer(rng: random.Random) -> transformers.T5Tokenizer:
    """A T5 tokenizer of the pieces that SentencePiece's BPE finds in the stories and the teacher's
    samples."""
    texts = []
    for _ in range(2000):
        story = random_story(rng, rng.randint(1, 3))
        prompts = f"predict: explain: So the answer is {story.input()}"
        texts += [told_story(rng), prompts, think(rng, story, 0.4)]
    # signs are pieces of their own, so that a number is one token anywhere
    pieces = sentence_pieces(texts, 300, model_type="bpe", user_defined_symbols=list(".,:?"))
    # T5Tokenizer looks for the split of the highest total score: with -1 a piece that is the one of
    # fewest pieces
    return transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece, _ in pieces], extra_ids=20)


def corrupt_spans(rng: random.Random, ids: list[int], sentinels: list[int]) -> dict[str, list[int]]:
    """T5's span corruption (arXiv 1910.10683, 3.1.4) in spans of three tokens on average. It masks
    a third of the tokens, where T5 masks 15%: few words of stories so plain can be guessed."""
    source, target, i, used = [], [], 0, 0
    while i < len(ids):
        if rng.random() < 1 / 7 and used < len(sentinels):
            span = rng.randint(1, 5)
            source.append(sentinels[used])
            target += [sentinels[used], *ids[i : i + span]]
            used, i = used + 1, i + span
        else:
            source.append(ids[i])
            i += 1
    return {"input_ids": [*source, 1], "labels": [*target, 1]}


def tiny_student() -> Path:
    """The folder of the built-in student, made on first use: T5 of 2 + 2 layers, pretrained by span
    corruption."""
    path = CACHE / f"tiny-{TOY_VERSION}"
    if path.exists():
        return path
    with cache_folder(CACHE), filelock.FileLock(f"{path}.lock"):
        if not path.exists():  # another process may have made it
            rng = random.Random("tiny")
            tokenizer = tiny_tokenizer(rng)
            torch.manual_seed(0)
            config = transformers.T5Config(vocab_size=len(tokenizer), **TINY_SHAPE)
            model = transformers.T5ForConditionalGeneration(config)
            pretrain_tiny(model, tokenizer, rng)
            temporary = Path(f"{path}.tmp")
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            os.replace(temporary, path)
    return path


def pretrain_tiny(
    model: transformers.T5ForConditionalGeneration,
    tokenizer: transformers.T5Tokenizer,
    rng: random.Random,
) -> None:
    """Span corruption on told stories, on one thread: rounding, and so the student, does not depend
    on the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sentinels: Any = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(20)])
    optimizer = torch.optim.AdamW(model.parameters(), PRETRAIN_LR)
    padded = transformers.DataCollatorForSeq2Seq(tokenizer)
    for step in tqdm(range(PRETRAIN_STEPS), "pretraining the student tiny, once", unit="step"):
        rise, fall = min(1, (step + 1) / 100), 1 - step / PRETRAIN_STEPS
        optimizer.param_groups[0]["lr"] = PRETRAIN_LR * rise * fall
        texts = tokenizer([told_story(rng) for _ in range(PRETRAIN_BATCH)]).input_ids
        batch = padded([corrupt_spans(rng, ids[:-1], sentinels) for ids in texts])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.set_num_threads(threads)
