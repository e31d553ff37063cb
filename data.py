"""Everything that the method is fed: tasks, the toy stories, teacher samples, and the student called tiny.

A task's row becomes an `Example`; a teacher's raw text, kept in a JSON Lines cache, becomes a `Sample`: a rationale
and an answer. Which samples are positives and which negatives is decided in qcrd.py.
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
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from itertools import accumulate, islice, pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple
from urllib.error import HTTPError

import filelock
import jinja2
import numpy as np
import sentencepiece
import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

DSS_ZIP = "https://github.com/google-research/distilling-step-by-step/raw/main/datasets.zip"
TEACHER_BATCH = {"cpu": 16, "cuda": 64}  # a local teacher's questions at once
API_TIMEOUT, API_TRIES, API_BACKOFF = (
    120,
    8,
    1.0,
)  # seconds, tries of a request, seconds before the second
CACHE = Path(os.environ.get("QCRD_CACHE") or Path.home() / ".cache" / "qcrd")


class UserError(Exception):
    """Bad input: the message is one sentence that names the file, line or option and the mend."""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@dataclass(frozen=True)
class Example:
    """One question: what the student reads, the label it learns, and the choices where the task has them."""

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


# --------------------------------------------------------------------------------------------------
# Equations

OPERATORS: dict[type, Callable[[Any, Any], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def equation_value(text: str) -> float | None:
    """The value of an equation of numbers, + - * / and brackets, as DSS's metric computes it, from its syntax tree.

    Returns None for anything else: other symbols, more than 200 characters, a division by zero, an overflow.
    """

    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError

    text = text.strip()
    if len(text) > 200 or not re.fullmatch(r"[\d.+\-*/() ]+", text, re.ASCII):
        return None
    try:
        return value(ast.parse(text, mode="eval"))
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


# --------------------------------------------------------------------------------------------------
# Tasks: how a row reads, how answers compare, how a prompt asks

NLI = ("entailment", "neutral", "contradiction")


def lettered(choices: tuple[str, ...]) -> str:
    return "".join(f"\n({letter}) {choice}" for letter, choice in zip(ascii_lowercase, choices))


def read_cqa(row: dict) -> dict:
    choices = row["choices"]
    text = f"{row['question']}\nAnswer Choices:{lettered(choices)}"
    return {"input": text, "label": row["answer"], "choices": choices}


def read_nli(row: dict) -> dict:
    return {
        "input": f"{row['premise']}</s>{row['hypothesis']}",
        "label": NLI[row["label"]],
        "choices": NLI,
    }


def read_plain(row: dict) -> dict:
    known = {"choices": row.get("choices") or (), "rationale": row.get("rationale") or ""}
    label = row["label"]
    return {
        "input": row["input"],
        "label": str(label) if type(label) in (int, float) else label,
        **known,
    }


FREE = "the answer, in as few words as possible"


@dataclass(frozen=True)
class Task:
    """What distinguishes one task from another."""

    name: str
    read: Callable[[dict], dict] = read_plain
    folder: str = ""  # its name in the DSS release
    numeric: bool = False  # answers are equations, compared by value
    answer_format: str = FREE

    def key(self, answer: str | None) -> Hashable:
        """What makes two answers the same: the value of an equation, the text of anything else; None if unusable."""
        return (
            equation_value(bare_number(answer)) if self.numeric and answer is not None else answer
        )

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


def download(url: str) -> Path:
    """The zip behind `url`, kept in the cache folder; one that is not whole is not kept."""
    path = CACHE / hashlib.sha256(url.encode()).hexdigest()[:12] / url.rsplit("/", 1)[-1]
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            try:
                torch.hub.download_url_to_file(url, str(part))
            except (OSError, HTTPException) as error:
                raise UserError(
                    f"--data {url} could not be downloaded ({error}): try again, or name a local zip."
                )
            if not zipfile.is_zipfile(part):
                part.unlink()
                raise UserError(
                    f"--data {url} did not give a whole zip file: try again, or name a local one."
                )
            os.replace(part, path)
    return path


def parse_jsonl(raw: bytes, where: str, torn: bool = False) -> Iterator[tuple[str, dict]]:
    """Objects of JSON Lines, each with its place; `torn` drops broken lines, as a killed writer leaves them."""
    for number, line in enumerate(raw.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            problem = None if isinstance(row, dict) else "it is no object"
        except (ValueError, RecursionError) as error:
            problem = first_line(error)[:80]
        if problem is None:
            yield f"{where}, line {number}", row
        elif torn:
            print(f"warning: {where}, line {number} is torn and was dropped.")
        else:
            raise UserError(
                f"{where}, line {number} is not a JSON object in UTF-8 ({problem}): mend the line."
            )


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check the name and its permissions."
        )


def to_example(task: Task, where: str, row: dict, default_id: str) -> Example:
    """One row as an Example, checked: UserError names the place and the mend."""
    try:
        fields = task.read(row)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{where} has no usable {error}: a row of task {task.name} needs it.")
    for name in ("input", "label", "rationale"):
        value = fields.get(name, "")
        if not isinstance(value, str) or not (value.strip() or name == "rationale"):
            raise UserError(f'{where} needs a text in "{name}", not {str(value)[:40]!r}.')
    choices = fields.setdefault("choices", ())
    if not isinstance(choices, list | tuple) or not all(
        isinstance(c, str) and c.strip() for c in choices
    ):
        raise UserError(f'{where}: "choices" must be a list of texts.')
    fields["choices"] = tuple(choices)
    if choices and fields["label"] not in choices:
        raise UserError(f"{where}: the label {fields['label'][:40]!r} is not among its choices.")
    return Example(str(row.get("id", default_id)) if task.folder == "" else default_id, **fields)


def open_release(data: str) -> zipfile.ZipFile:
    path = download(data) if data.startswith(("http://", "https://")) else Path(data)
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--data {data} is not a readable zip file ({error}): name the DSS release, datasets.zip."
        )


def read_member(release: zipfile.ZipFile, name: str) -> bytes:
    """One member of the release, read into memory without unpacking the zip; bombs are refused."""
    try:
        if release.getinfo(name).file_size > 2**30:
            raise UserError(
                f"{release.filename}: {name} would unpack to over 1 GiB: this is not the DSS release."
            )
        return release.read(name)
    except KeyError:
        raise UserError(
            f"{release.filename} has no {name}: name the DSS release, datasets.zip, with --data."
        )
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{release.filename}: {name} cannot be read ({error}): download the file again."
        )


def hold_out(
    examples: list[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(kept, held out), as datasets.train_test_split, and so DSS, divides them."""
    order = np.random.default_rng(seed).permutation(len(examples))
    count = math.ceil(share * len(examples))
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


def load_task(
    name: str, data: str = DSS_ZIP, train_size: float | None = None
) -> tuple[Task, dict[str, list[Example]]]:
    """The task and its splits "train", "valid" and "test".

    `name` is one of TASKS or a path to a JSON Lines file with `input` and `label` in each row, and optionally `id`,
    `choices` and `rationale`. `train_size` is a count (> 1) or a fraction of the training set. UserError if unusable.
    """
    task = TASKS.get(name) or Task(Path(name).stem)
    if name == "toy":
        splits = toy_splits()
    elif task.folder:
        splits = release_splits(task, data)
    else:
        splits = own_splits(task, name)
        labels = [e.label for split in splits.values() for e in split if not e.choices]
        if len(labels) == sum(map(len, splits.values())) and all(map(is_number, labels)):
            task = replace(task, numeric=True, answer_format=NUMBER)
    if train_size is not None:
        train = splits["train"]
        count = round(train_size * len(train)) if train_size <= 1 else int(train_size)
        if not 1 <= count <= len(train):
            raise UserError(
                f"--train-size {train_size:g} asks for {count} examples: name 1 to {len(train)}."
            )
        order = np.random.default_rng(0).permutation(len(train))[:count]
        splits["train"] = [train[i] for i in sorted(order)]
    return task, splits


def is_number(label: str) -> bool:
    return equation_value(bare_number(label)) is not None


def release_splits(task: Task, data: str) -> dict[str, list[Example]]:
    """A task of the DSS release; where it has no validation split, a tenth of the training set is held out for it."""
    splits: dict[str, list[Example]] = {}
    with open_release(data) as release:
        for split in ("train", "valid", "test"):
            member = f"datasets/{task.folder}/{task.folder}_{split}.json"
            if split == "valid" and member not in release.namelist():
                continue  # svamp and cqa have none
            rows = enumerate(
                parse_jsonl(read_member(release, member), f"{release.filename}: {member}")
            )
            splits[split] = [
                to_example(task, where, row, f"{task.name}-{split}-{i}") for i, (where, row) in rows
            ]
    if not all(splits.values()):
        raise UserError(
            f"{data} has a split with no rows for {task.name}: download the file again."
        )
    if "valid" not in splits:
        splits["train"], splits["valid"] = hold_out(splits["train"], 0.1, seed=0)
    return splits


def own_splits(task: Task, name: str) -> dict[str, list[Example]]:
    """A JSON Lines file, a tenth each held out for validation and test."""
    if not Path(name).is_file():
        raise UserError(
            f"--task {name} is neither one of {', '.join(TASKS)} nor a JSON Lines file."
        )
    examples: dict[str, Example] = {}
    for number, (where, row) in enumerate(parse_jsonl(read_file(Path(name)), name)):
        example = to_example(task, where, row, f"row-{number}")
        if example.id in examples:
            raise UserError(
                f"{where}: the id {example.id[:40]!r} stands in an earlier line too: ids must differ."
            )
        examples[example.id] = example
    if len(examples) < 3:
        raise UserError(
            f"{name} has {len(examples)} rows: training, validation and test need one each at least."
        )
    train, rest = hold_out(list(examples.values()), 0.2, seed=0)
    valid, test = hold_out(rest, 0.5, seed=0)
    return {"train": train, "valid": valid, "test": test}


# --------------------------------------------------------------------------------------------------
# From a teacher's raw text to a rationale and an answer

# What completion models run on into: the next question of the few-shot prompt, invented.
NEXT_QUESTION = re.compile(
    r"\n\s*(?:Q|Question|Premise|Hypothesis|Sentence|Input)\s*:|\bQ:|\bPremise:"
)
# Reasoning models think first; some templates open the block in the prompt, and one that is not closed leaves nothing.
THINKING = re.compile(r"^.*</think>|<think>.*", re.DOTALL)
# How signs, LaTeX, markdown and GSM8K's annotations read as plain text, in this order.
PLAIN = [
    (r"[−–](?=\s*\d)", "-"), (r"×|\\times|\\cdot", "*"), (r"÷|\\div", "/"), (r"<<[^<>\n]*>>", ""),
    (r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1"), (r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)"),
    (r"\\boxed\{([^{}]*)\}", r"<Answer>: \1"), (r"\\[\[\]()]|\$\$|\\(?=[$%])", ""), (r"^#{1,4} *(Explanation|Answer)\b:?", r"<\1>:"), (r"^\s*####", "<Answer>:"),
    (r"\$([^$\n]*[=+*/][^$\n]*)\$", r"\1"),
    (r"(?<![\d)])(?<![\d)] )\*\*|\*\*(?! ?[\d(])|__", ""), (r"</(?:Explanation|Answer)>", "\n"), (r"(?<=\d) ?[xX] ?(?=\d)", " * "),
]  # fmt: skip
# What introduces the answer: the paper's format, PaLM's, and the ways in which other models vary it.
MARKER = re.compile(
    r"<Answer>\s*:?|\bAnswer\s*(?::|-\s)|(?:,?\s*\b(?:so|hence|therefore|thus)[,]?\s+)?"
    r"\bthe (?:correct |final |right |best )?(?:answer|option|choice) is\b:?",
    re.IGNORECASE,
)
OPENING = re.compile(
    r"^\W*(?:<Explanation>|Explanation\s*:|Rationale\s*:)[\s:]*|^\s*A:\s*", re.IGNORECASE
)
# A number, or an equation of numbers; thousands commas and dollar signs are removed before.
NUMBERS = re.compile(r"[-(\s]*\d+(?:\.\d+)?(?:[\s()]*[-+*/][-\s()]*\d+(?:\.\d+)?)*[\s)]*")
# Before a choice that is named only to be denied.
DENIED = re.compile(
    r"(?:\bnot|n't|\bneither|\bnor|\brather than|\binstead of)\s+\(?(?:(?:an?|the|be|to|by|it|does|is|this|necessarily)\s+)*$"
)
STEMS = {
    "entailment": "entail",
    "contradiction": "contradict",
}  # as in: the premise entails the hypothesis


def find_number(text: str, last: bool) -> str | None:
    """The first (or last) number or equation in the text."""
    found = [m.group().strip() for m in NUMBERS.finditer(bare_number(text[:2000]))]
    found = [f for f in (found + [f.strip("() ") for f in found]) if equation_value(f) is not None]
    return (found[-1] if last else found[0]) if found else None


def bare_number(text: str) -> str:
    """Without thousands commas and dollar signs."""
    return re.sub(r"(?<=\d),(?=\d{3}\b)|\$", "", text)


def find_choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The choice that the text gives: by its letter, by beginning with it, or as the first one named and not denied."""
    letter = re.match(r"\W*(?:either |option |choice |letter )?(?:\(([a-z])\)|([a-z])\b\W*$|([a-z])[).:](?!\w))", text, re.IGNORECASE)  # fmt: skip
    if letter:
        return dict(zip(ascii_lowercase, choices)).get(letter[letter.lastindex or 0].lower())
    text = text.lower()
    plain = re.sub(r"^\W*(?:an? |the |to )?", "", text)
    for choice in sorted(choices, key=len, reverse=True):
        if re.match(re.escape(choice.lower()) + r"(?!\w)", plain):
            return choice
    # elsewhere a story's "not" in front of a choice's word says nothing about the answer
    denials = choices == NLI or text.lstrip().startswith("not ")
    named = []
    for name, choice in zip(ascii_lowercase, choices):
        word = STEMS[choice] + r"\w*" if choice in STEMS else re.escape(choice.lower())
        place = re.search(rf"(?<!\w){word}(?!\w)|\({name}\)|\b(?:choice|option) {name}\b", text)
        if place and not (denials and DENIED.search(text[: place.start()])):
            named.append((place.start(), choice))
    return min(named)[1] if named else None


def parse_output(task: Task, example: Example, output: str) -> tuple[str, str | None]:
    """Split a teacher's raw output into a rationale and an answer.

    The answer is the text of a choice, or an equation or number, or the text after the marker, by task; None where
    the output gives none. The rationale holds neither a marker nor what follows it, and may be empty.
    """
    text = NEXT_QUESTION.split(THINKING.sub("", output[:20_000]).lstrip(), maxsplit=1)[0]
    for pattern, plain in PLAIN:
        text = re.sub(pattern, plain, text, flags=re.MULTILINE)
    text = OPENING.sub("", text, count=1).strip()
    markers = list(MARKER.finditer(text))
    rationale = (text[: markers[0].start()] if markers else text).strip()
    # the last marker that gives an answer wins
    tails = [text[m.end() :].strip() for m in reversed(markers[-20:])] or [text]
    for tail in tails:
        if task.numeric:
            answer = find_number(tail.split("\n")[0], last=not markers)
        elif example.choices:
            answer = find_choice(tail.split("\n")[0] if markers else tail, example.choices)
        else:
            answer = tail.split("\n")[0].strip(" .") or None if markers else None
        if answer is not None:
            break
    if not markers and (answer is None or len(rationale.split()) < 4):
        rationale = ""  # a bare answer explains nothing
    return rationale, answer


# --------------------------------------------------------------------------------------------------
# Teachers: several samples a question, kept in a cache

SYSTEM = (
    "You are a question-answering robot. You get a question, with answer choices where there are any. Give the"
    " explanation and the answer. Find the explanation by thinking step by step. The answer is {answer_format}."
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
    question = question_text(example)
    system = SYSTEM.format(answer_format=task.answer_format)
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": f"Question: {question}"},
    ]


def as_text(system: str, user: str) -> str:
    """A chat as text to continue, with worked examples where the paper's output format is asked for."""
    for answer_format, shots in SHOTS.items():
        if "<Explanation>" in system and answer_format in system:
            return f"{system}\n\n{shots}{user}\n<Explanation>:"
    return f"{system}\n\n{user}\nReply:"


def as_chat(tokenizer: Any, chat: Chat) -> str:
    """A chat in the model's own template, thinking switched off where it can be; where the template has no system
    role, as Gemma 2's and Mistral's, the system text goes in front of the user's."""
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    try:
        text = tokenizer.apply_chat_template(chat, **how)
        if chat[0]["content"] in text:  # some templates drop what they do not know
            return text
    except jinja2.TemplateError:
        pass
    content = "\n\n".join(message["content"] for message in chat)
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], **how)


Request = tuple[Example, int]  # a question, and the number of the sample
Answers = Iterator[tuple[Request, str]]


def ask_toy(
    requests: list[Request], chat: Callable[[Example], Chat], name: str, options: Any
) -> Answers:
    """Samples of the toy's own teacher."""
    for example, n in requests:
        assert example.story is not None
        yield (
            (example, n),
            think(random.Random(f"{example.id}/{n}"), example.story, options.toy_errors),
        )


def ask_model(
    requests: list[Request], chat: Callable[[Example], Chat], name: str, options: Any
) -> Answers:
    """Samples of a Hugging Face model, causal or seq2seq, on this machine."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, padding_side="left", trust_remote_code=False
        )
        seq2seq = transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=False
        ).is_encoder_decoder
        kind: Any = (
            transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
        )
        model = kind.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--teacher {name} cannot be loaded: {first_line(error)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    how: Any = {"do_sample": options.temperature > 0, "temperature": options.temperature or None}
    if (
        not tokenizer.chat_template and not seq2seq
    ):  # a base model goes on with a question of its own
        how |= {"stop_strings": ["\nQuestion:", "\n\n"], "tokenizer": tokenizer}
    for i in range(0, len(requests), TEACHER_BATCH[device]):
        batch = requests[i : i + TEACHER_BATCH[device]]
        chats = [chat(example) for example, _ in batch]
        if tokenizer.chat_template:
            texts = [as_chat(tokenizer, c) for c in chats]
        else:
            texts = [as_text(system["content"], user["content"]) for system, user in chats]
        special = seq2seq or not tokenizer.chat_template  # a chat template brings its own
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=special).to(
            device
        )
        torch.manual_seed(
            int(hashlib.sha256(f"{batch[0][0].id}/{batch[0][1]}".encode()).hexdigest()[:8], 16)
        )
        output = model.generate(**inputs, **how, max_new_tokens=options.max_tokens)
        output = output if seq2seq else output[:, inputs["input_ids"].shape[1] :]
        yield from zip(batch, tokenizer.batch_decode(output, skip_special_tokens=True))


def post_chat(base: str, body: dict[str, Any]) -> tuple[str, str]:
    """(text, finish_reason) of one chat completion; the text is empty where the server gives none.

    Not by huggingface_hub, whose client reaches nothing with HF_HUB_OFFLINE=1: a teacher's server is not the Hub.
    Raises HTTPError for a status, OSError, HTTPException, ValueError, LookupError or TypeError for a broken reply.
    """
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}",
    }
    request = urllib.request.Request(
        f"{base.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=API_TIMEOUT) as reply:
        choice = json.load(reply)["choices"][0]
    return choice["message"]["content"] or "", str(choice.get("finish_reason"))


def ask_api(
    requests: list[Request], chat: Callable[[Example], Chat], name: str, options: Any
) -> Answers:
    """Samples of any OpenAI-compatible server; 429, 5xx, cut and slow connections are tried again with backoff."""
    base = options.api_base or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    limits = ["max_tokens"]  # as the server calls it
    empty: list[str] = []  # finish reasons of replies without text

    def one(request: Request) -> str:
        for attempt in range(API_TRIES):
            pause, limit = min(60, 2**attempt * API_BACKOFF), limits[-1]
            body = {"model": name, "messages": chat(request[0]), "temperature": options.temperature}
            try:
                text, reason = post_chat(base, body | {limit: options.max_tokens})
                if (
                    not text
                ):  # reasoning used up the tokens, or a filter said no: a sample without an answer
                    empty.append(reason)
                return text
            except HTTPError as error:
                problem = f"status {error.code}"
                said = " ".join(error.read().decode(errors="replace").split())[:300]
                if error.code in (401, 403):
                    raise UserError(
                        f"--teacher api:{name} refused the key ({problem}): set OPENAI_API_KEY."
                    )
                if limit == "max_tokens" and "max_completion_tokens" in said:
                    limits.append("max_completion_tokens")
                    continue
                if error.code != 429 and error.code < 500:
                    raise UserError(
                        f"--teacher api:{name} refused ({problem}, {said}): check model and options."
                    )
                with suppress(ValueError):
                    pause = max(pause, float(error.headers.get("Retry-After", 0)))
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                problem = type(error).__name__
            if over.wait(pause):
                break
        raise UserError(
            f"--teacher api:{name} gave {problem} {API_TRIES} times: start again when it is back."
        )

    over, pool = threading.Event(), ThreadPoolExecutor(options.api_concurrency)
    left = iter(requests)
    try:
        under_way = {
            pool.submit(one, request): request for request in islice(left, options.api_concurrency)
        }
        while under_way:
            for answer in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(answer), answer.result()
                # only now, when the sample is in the cache: a kill loses the requests under way and no more
                under_way |= {pool.submit(one, request): request for request in islice(left, 1)}
    finally:
        over.set()
        pool.shutdown(wait=False, cancel_futures=True)
        if empty:
            reasons = ", ".join(sorted(set(empty)))
            print(
                f"{len(empty)} replies had no text (finish_reason {reasons}); if it is length, raise --max-tokens."
            )


class Cache:
    """Raw teacher outputs in a JSON Lines file, `{"id", "teacher", "sample", "output"}`, safe against kill -9.

    A sample is one appended line. The lock keeps writers from mixing lines, and a line that a killed writer left
    unfinished is closed before the next is appended; loading drops it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(f"{path}.lock")

    def load(self) -> dict[tuple[str, int], str]:
        """Output by (id, sample); the first of duplicates counts."""
        outputs: dict[tuple[str, int], str] = {}
        if self.path.exists():
            for _, row in parse_jsonl(read_file(self.path), str(self.path), torn=True):
                if {"id", "sample", "output"} <= row.keys():
                    outputs.setdefault((row["id"], row["sample"]), row["output"])
        return outputs

    def append(self, id: str, teacher: str, sample: int, output: str) -> None:
        line = (
            json.dumps({"id": id, "teacher": teacher, "sample": sample, "output": output}).encode()
            + b"\n"
        )
        with self.lock, self.path.open("a+b") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                line = b"\n" + line
            file.write(line)


def cache_path(task: Task, teacher: str, options: Any) -> Path:
    """One cache for each model, prompt and temperature; the key of an API is no part of it."""
    example = Example(
        "", "{question}", "", ("{choice}",) if task.answer_format in (CHOICE, RELATION) else ()
    )
    identity = [task.name, teacher, ask(task, example), SHOTS, options.temperature]
    if teacher == "toy":
        identity.append([options.toy_errors, TOY_VERSION])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
    name = re.sub(r"[^\w.-]+", "-", f"{task.name}-{teacher}")[:80]
    return CACHE / "samples" / f"{name}-{digest}.jsonl"


def read_samples(path: Path) -> Iterator[tuple[str, str, int, str]]:
    """(id, teacher, sample, output) of a file of samples; UserError names the line that has not all four."""
    for where, row in parse_jsonl(read_file(path), str(path)):
        try:
            id, teacher, sample, output = row["id"], row["teacher"], row["sample"], row["output"]
        except KeyError as error:
            raise UserError(f"{where} has no {error}: a sample has id, teacher, sample and output.")
        if not (
            isinstance(id, str)
            and isinstance(teacher, str)
            and type(sample) is int
            and isinstance(output, str)
        ):
            raise UserError(
                f"{where}: id, teacher and output must be texts, sample a whole number."
            )
        yield id, teacher, sample, output


def palm_outputs(task: Task, data: str) -> Iterator[tuple[str, str, int, str]]:
    """The PaLM-540B completions of the DSS release, one for each training question, in the order of the rows."""
    with open_release(data) as release:
        members = [
            n for n in release.namelist() if n.startswith(f"datasets/{task.folder}/llm/train_CoT_")
        ]
        members.sort(key=lambda name: int(re.findall(r"\d+", name)[-1]))
        outputs: list[Any] = []
        for member in members:
            try:
                outputs += json.loads(read_member(release, member))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{release.filename}: {member} is no JSON array ({error}): download the file again."
                )
    for i, output in enumerate(outputs):
        yield f"{task.name}-train-{i}", "palm-540b", 0, str(output)


def outputs_of(
    teacher: str, task: Task, examples: list[Example], options: Any
) -> Iterable[tuple[str, str, int, str]]:  # fmt: skip
    """(id, teacher, sample, output) of one --teacher; what is missing of a model's is asked for."""
    if teacher == "own":
        own = [e for e in examples if e.rationale]
        return [(e.id, "own", 0, f"<Explanation>: {e.rationale}\n<Answer>: {e.label}") for e in own]
    if teacher == "palm":
        if not task.folder:
            raise UserError(
                f"--teacher palm has no samples for task {task.name}: name another teacher."
            )
        return palm_outputs(task, options.data)
    if Path(teacher).is_file():
        return read_samples(Path(teacher))
    cache = Cache(cache_path(task, teacher, options))
    outputs = sampled(cache, examples, options.k or 5, teacher, partial(ask, task), options)
    return [(id, teacher, n, output) for (id, n), output in outputs.items()]


def collect(
    task: Task, examples: list[Example], teachers: list[str], options: Any
) -> dict[str, list[Sample]]:
    """The parsed samples of each training question by id, from all teachers together."""
    by_id = {example.id: example for example in examples}
    samples: dict[str, list[Sample]] = {}
    for teacher in teachers or [default_teacher(task, examples, options)]:
        outputs: dict[tuple[str, str, int], str] = {}  # the first of duplicates counts
        for id, name, n, output in outputs_of(teacher, task, examples, options):
            if id in by_id:
                outputs.setdefault((id, name, n), output)
        if not outputs:
            raise UserError(
                f"--teacher {teacher} has no sample of {task.name}: ids must match, such as {examples[0].id!r}."
            )
        for (id, name, _), output in outputs.items():
            samples.setdefault(id, []).append(Sample(name, *parse_output(task, by_id[id], output)))
    most = max(map(len, samples.values()))
    if options.k and options.k > most:
        raise UserError(f"--k {options.k} asks for more samples than there are: name 1 to {most}.")
    return {id: own[: options.k] for id, own in samples.items()}


def default_teacher(task: Task, examples: list[Example], options: Any) -> str:
    if task.name == "toy":
        return "toy"
    if any(example.rationale for example in examples):
        return "own"
    if not task.folder:
        raise UserError(
            f"--task {options.task} needs a --teacher: a model, api:MODEL, or a file of samples."
        )
    print(
        "Teacher: palm, one sample a question, so there is nothing to vote on; --teacher MODEL with --k brings more."
    )
    return "palm"


def sampled(
    cache: "Cache",
    examples: list[Example],
    k: int,
    teacher: str,
    chat: Callable[[Example], Chat],
    options: Any,
) -> dict[tuple[str, int], str]:
    """K outputs of each question by (id, sample): from the cache, and what is missing from the teacher, into the cache."""
    known = cache.load()
    missing = [(e, n) for e in examples for n in range(k) if (e.id, n) not in known]
    how = ask_toy if teacher == "toy" else ask_api if teacher.startswith("api:") else ask_model
    asked = how(missing, chat, teacher.removeprefix("api:"), options) if missing else iter(())
    try:
        for (example, n), output in tqdm(
            asked,
            total=len(missing),
            desc=f"samples of {teacher}",
            unit="sample",
            disable=not missing,
        ):
            cache.append(example.id, teacher, n, output)
            known[example.id, n] = output
    except KeyboardInterrupt:
        print(
            f"\nStopped: {len(known)} samples are safe in {cache.path}; the same command goes on from there."
        )
        raise
    return {(e.id, n): known[e.id, n] for e in examples for n in range(k)}


# --------------------------------------------------------------------------------------------------
# The built-in task, toy: arithmetic stories whose rationales can be checked exactly

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
# How many events a question has, each of these equally often; with more of three, chance decides which seeds learn them.
EVENTS = (1, 1, 1, 1, 2, 2, 2, 2, 2, 3)
TOY_VERSION = 4  # raised when the stories change, so that old samples are not taken for theirs
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
    """A question about how many `thing` somebody has in the end, after events of which only some matter."""

    person: str
    thing: str
    start: int
    events: tuple[Event, ...]

    def changes(self) -> list[int]:
        return [c for c in (e.change(self.person, self.thing) for e in self.events) if c]

    def input(self) -> str:
        told = [
            f"{self.person} had {self.start} {self.thing}.",
            *(f"{event}." for event in self.events),
        ]
        return " ".join(told) + f"\nHow many {self.thing} does {self.person} have now?"


def follow(start: int, changes: list[int]) -> list[Step] | None:
    """The steps that the changes make of `start`; None where a count leaves the range."""
    counts = list(accumulate(changes, initial=start))
    if not all(0 <= count <= LARGEST for count in counts):
        return None
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
        if story.changes() and follow(story.start, story.changes()):
            return story


def toy_splits() -> dict[str, list[Example]]:
    """The same stories every time, no story twice."""
    rng = random.Random("toy")
    stories: dict[str, Story] = {}
    while len(stories) < sum(TOY_SIZES.values()):
        story = random_story(rng, rng.choice(EVENTS))
        stories[story.input()] = story
    left = iter(stories.items())
    return {
        split: [
            Example(f"toy-{split}-{i}", text, equation(story.start, story.changes()), story=story)
            for i, (text, story) in enumerate(islice(left, size))
        ]
        for split, size in TOY_SIZES.items()
    }


def is_valid(example: Example, rationale: str) -> bool | None:
    """The exact check: every step right, all steps and no other in order, and the gold value as the last number.

    None for tasks whose rationales cannot be checked.
    """
    if example.story is None:
        return None
    gold = follow(example.story.start, example.story.changes())
    told = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", rationale[:2000])
    numbers = re.findall(r"\d+", rationale[:2000])
    return [Step(int(a), op, int(b), int(c)) for a, op, b, c in told] == gold and int(
        numbers[-1]
    ) == gold[-1].c


def wrong_events(
    rng: random.Random, right: list[tuple[Event, int]], others: list[Event]
) -> list[tuple[Event, int]]:
    """What somebody counts who gets one thing wrong: an operation, a number, a step left out or a step too many."""
    used, i = list(right), rng.randrange(len(right))
    event, change = used[i]
    error = rng.choice(["operation", "number", "left out", "too many"])
    if error == "operation":
        used[i] = (event, -change)
    elif error == "number":
        n = rng.choice([e.n for e in others] or [abs(change) - 1, abs(change) + 1])
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
    ("The story starts with {s.start} {s.thing}.", "After that {e}: {step}.", "That makes {end}."),
    (
        "At first there are {s.start}.",
        "{do} {step.b} because {e}: {step}.",
        "In the end {s.person} has {end}.",
    ),
]


def think(rng: random.Random, story: Story, error_rate: float) -> str:
    """One sample of the built-in teacher: an explanation and the answer that follows from it, in the paper's format.

    With probability `error_rate` the reasoning goes wrong as a person's would.
    """
    told = [(event, event.change(story.person, story.thing)) for event in story.events]
    right = [(event, change) for event, change in told if change]
    others = [event for event, change in told if not change]
    steps = None
    while not steps:
        used = right
        if rng.random() < error_rate:
            used = wrong_events(rng, right, others)
            if used == right:
                continue
        changes = [change for _, change in used]
        steps = follow(story.start, changes)
    opening, middle, closing = STYLES[rng.randrange(len(STYLES))]
    lines = [opening.format(s=story)]
    for (event, _), step in zip(used, steps, strict=True):
        do, short = "Add" if step.op == "+" else "Take away", f"{event.who} {event.verb} {event.n}"
        lines.append(middle.format(event=event, e=short, do=do, step=step))
    lines.append(closing.format(s=story, end=steps[-1].c))
    return f"<Explanation>: {' '.join(lines)}\n<Answer>: {equation(story.start, changes)}"


# --------------------------------------------------------------------------------------------------
# tiny: a student small enough to pretrain on a laptop while you wait

TINY_STEPS, TINY_BATCH, TINY_LR = 1000, 32, 2e-3


def told_story(rng: random.Random) -> str:
    """A pretraining text: a story told with running totals, half of them without distractors; nothing is asked."""
    story, plain = random_story(rng, rng.randint(1, 3)), rng.random() < 0.5
    count, told = story.start, [f"{story.person} had {story.start} {story.thing}."]
    for event in story.events:
        change = event.change(story.person, story.thing)
        count += change
        if change:
            told.append(f"{event}. Now {story.person} has {count} {story.thing}.")
        elif not plain:
            told.append(f"{event}.")
    return " ".join(told)


def tiny_tokenizer(rng: random.Random) -> transformers.T5Tokenizer:
    """A T5 tokenizer of the pieces that SentencePiece's BPE finds in the stories and the teacher's samples."""
    stories = [random_story(rng, rng.randint(1, 3)) for _ in range(2000)]
    texts = [told_story(rng) for _ in stories]
    texts += [f"predict: explain: So the answer is {s.input()}".replace("\n", " ") for s in stories]
    texts += [think(rng, s, 0.4).replace("\n", " ") for s in stories]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=300, model_type="bpe", hard_vocab_limit=False,
        user_defined_symbols=list(".,:?"),  # pieces of their own, so that a number is one token wherever it stands
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    # T5Tokenizer looks for the split of the highest total score: with -1 a piece that is the one of fewest pieces
    return transformers.T5Tokenizer(
        vocab=[(pieces.id_to_piece(i), -1.0) for i in range(len(pieces))], extra_ids=20
    )


def corrupt_spans(
    rng: random.Random, ids: list[int], sentinels: list[int]
) -> tuple[list[int], list[int]]:
    """T5's span corruption (arXiv 1910.10683, 3.1.4) in spans of three on average, at twice T5's rate of 15%: most
    words of so plain stories cannot be guessed, so that more of them must be asked for."""
    source, target, i, used = [], [], 0, 0
    while i < len(ids):
        if rng.random() < 0.3 / 3 / 0.7 and used < len(sentinels):
            span = min(rng.randint(1, 5), len(ids) - i)
            source.append(sentinels[used])
            target += [sentinels[used], *ids[i : i + span]]
            used, i = used + 1, i + span
        else:
            source.append(ids[i])
            i += 1
    return source, target


def tiny_student() -> Path:
    """The folder of the built-in student, made on first use: T5 of 2 + 2 layers, pretrained by span corruption."""
    path = CACHE / f"tiny-{TOY_VERSION}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            rng = random.Random("tiny")
            tokenizer = tiny_tokenizer(rng)
            torch.manual_seed(0)
            shape: Any = {
                "d_model": 64,
                "d_kv": 16,
                "d_ff": 128,
                "num_layers": 2,
                "num_heads": 4,
                "dropout_rate": 0.0,
            }
            shape |= {
                "vocab_size": len(tokenizer),
                "decoder_start_token_id": 0,
                "pad_token_id": 0,
                "eos_token_id": 1,
            }
            config = transformers.T5Config(**shape)
            model = transformers.T5ForConditionalGeneration(config)
            pretrain_tiny(model, tokenizer, rng)
            temporary = path.with_name(f"{path.name}.tmp")
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            os.replace(temporary, path)
    return path


def pretrain_tiny(
    model: transformers.T5ForConditionalGeneration,
    tokenizer: transformers.T5Tokenizer,
    rng: random.Random,
) -> None:
    """Span corruption on told stories, on one thread: rounding, and so the student, does not depend on the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sentinels: Any = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(20)])
    optimizer = torch.optim.AdamW(model.parameters(), TINY_LR)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)

    for step in tqdm(range(TINY_STEPS), desc="pretraining the student tiny, once", unit="step"):
        optimizer.param_groups[0]["lr"] = (
            TINY_LR * min(1, (step + 1) / 100) * (1 - step / TINY_STEPS)
        )
        texts = tokenizer([told_story(rng) for _ in range(TINY_BATCH)]).input_ids
        pairs = [corrupt_spans(rng, ids[:-1], sentinels) for ids in texts]
        source = padded([s + [1] for s, _ in pairs], 0)
        target = padded([t + [1] for _, t in pairs], -100)
        loss = model(input_ids=source, attention_mask=(source != 0).long(), labels=target).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.set_num_threads(threads)
