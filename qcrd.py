"""QCRD: Quality-guided Contrastive Rationale Distillation (arXiv 2405.13014) in plain PyTorch.

    python qcrd.py                                       # built-in task and student, no download
    python qcrd.py --task anli --student t5-small        # a real task, with DSS's teacher samples
    python qcrd.py --task my.jsonl --student t5-small --teacher api:MODEL    # a task of your own

A small seq2seq model, the student, learns to answer questions from a large model, the teacher:
1. The teacher answers each question K times, each time with a rationale: why it is the answer.
2. A vote splits these samples. Rationales that end in the winning answer are positives, the rest
   are negatives. More negatives are what the student itself wrote some rounds ago.
3. A discriminator D scores every rationale: s near 1 is a good one, s near 0 a bad one.
4. The student learns the label, and a contrastive loss that makes a positive likelier and a
   negative less likely, each weighted by its score.
5. Every few steps D learns from all rationales of some of the same questions.

Where this code departs from the paper, or settles what the paper leaves open:
- An iteration is a round: one pass over the training set, at most 500 steps. There are 20 rounds.
- In the rounds before round j the negatives are those of the oldest student there is, of round 0.
- No old student is kept: what the student writes now is stored, and used j rounds later.
- Eq. 2 is invariant to a shift of all scores, and D drifts: D learns by binary cross-entropy
  (--disc-loss paper: eq. 2).
- The score in eqs. 6 and 7 is the chosen rationale's own, detached: L_cl never trains D.
- Positives' scores are divided by their mean over the batch, so that they decide which positive
  counts more and not how much positives count (--quality printed: eq. 6 as it stands).
- D's encoder is a trained copy of the student's (--disc shared: the student's own encoder).
- With a copy, alpha_3 does little: AdamW is invariant to a constant factor on a loss whose
  parameters no other loss touches.
- Rationales are chosen without dropout; the margin counts there and, with dropout, in the loss.
- D learns from a random quarter of a batch, and never from every tenth question, on which its AUC
  is computed.
- The gradients of student and discriminator are clipped apart, each at norm 1.
- A question without positives or negatives has 0 in that term. A tie in the vote goes to the
  answer that came first.
- The student's negatives are cut at the 90th percentile of the positives' lengths in tokens.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while torch is loaded ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import math
import os
import platform
import random
import re
import shutil
import sys
import time
import zipfile
import zlib
from argparse import HelpFormatter
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, count, groupby, islice
from pathlib import Path
from statistics import fmean
from typing import IO, Any, Literal

import filelock
import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.modeling_outputs import BaseModelOutput

import data
from data import Example, Sample, Task, UserError, first_line

# --------------------------------------------------------------------------------------------------
# Options


def option(default: Any, help: str) -> Any:
    """A field of the command line with its default and its help, which shows the default."""
    shown = "" if str(default) in ("None", "False", "", "[]") else " (default: %(default)s)"
    metadata = {"help": help + shown}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TaskOptions:
    _argument_group_name = "the task and its teacher"
    task: str = option(
        "toy", "toy, svamp, cqa, anli, esnli, or a JSON Lines file with input and label."
    )
    data: str = option(data.DSS_ZIP, "The release of Distilling Step-by-Step: a zip file or a URL.")
    train_size: float = option(1.0, "The training questions: a count, or a fraction up to 1.")
    labels: Literal["gold", "teacher"] = option(
        "gold", "What the student learns as labels: gold labels, or the teacher's voted answers."
    )
    teacher: list[str] = option(  # noqa: RUF009
        [],
        "Who wrote the samples: palm, a Hugging Face model, api:MODEL, or a JSON Lines file of"
        " samples. Several are pooled. By default the one that comes with the task.",
    )
    k: int | None = option(
        None, "K, the samples a question of each teacher: by default 5, or all that a file has."
    )
    temperature: float = option(0.7, "The temperature at which the teacher is sampled.")
    api_base: str = option(
        "", "The URL of an OpenAI-compatible server, else OPENAI_BASE_URL; key in OPENAI_API_KEY."
    )
    api_concurrency: int = option(8, "How many requests are under way at once.")
    max_tokens: int = option(512, "The most tokens of a teacher's answer.")
    toy_errors: float = option(0.25, "The share of toy's samples that are wrong.")


@dataclass
class MethodOptions:
    _argument_group_name = "the method"
    method: Literal["finetune", "single", "dss", "mi", "qcrd"] = option(
        "qcrd", "The paper's method, or a baseline: a preset of the options below."
    )
    positives: Literal["all", "one", "none"] = option(
        "all", "The rationales to learn: all positives of the vote, one sample unvoted, or none."
    )
    negatives: Literal["student", "fixed", "teacher", "none"] = option(
        "student",
        "The vote's minority and what the student wrote j rounds ago, or what a fixed dss student"
        " writes; teacher: the minority alone.",
    )
    fixed_student: str = option("", "For --negatives fixed: the run directory of a dss run.")
    lag: int = option(5, "j: the student wrote its negatives this many rounds ago.")
    student_temperature: float = option(1.5, "The temperature of the student's negatives.")
    scheme: Literal["minmax", "maxmin", "sampling", "mean", "wmean"] = option(
        "minmax", "Which rationales stand for their question (eqs. 4, 5)."
    )
    quality: Literal["relative", "printed"] = option(
        "relative", "The positives' weights: divided by their mean over the batch, or as in eq. 6."
    )
    disc: Literal["own", "shared", "none"] = option(
        "own",
        "The discriminator, its encoder a copy of the student's or the student's own; or none.",
    )
    disc_loss: Literal["bce", "paper"] = option(
        "bce", "The discriminator's loss: binary cross-entropy, or eq. 2."
    )
    disc_lr: float = option(5e-5, "The discriminator's learning rate.")
    disc_steps: int = option(500, "The steps of the discriminator's pretraining.")
    disc_every: int = option(4, "The steps between two updates of the discriminator.")
    alpha1: float = option(0.5, "The weight of L_pred (eq. 8).")
    alpha2: float = option(0.5, "The weight of L_cl (eq. 8).")
    alpha3: float = option(0.5, "The weight of L_D (eq. 8), multiplied by 0.9 every round.")
    beta: float = option(0.2, "The weight of the negatives (eq. 3).")
    delta: float = option(3.0, "The margin of the negatives, in nats per token.")
    mi_weight: float = option(0.0, "The weight of mi's mutual-information loss.")


@dataclass
class TrainingOptions:
    _argument_group_name = "the student and its training"
    student: str = option("tiny", "tiny, or a seq2seq model: a Hugging Face name or a folder.")
    rounds: int = option(20, "The paper's iterations.")
    round_steps: int = option(0, "The steps in a round; 0: a pass over the data, at most 500.")
    batch_size: int = option(64, "The questions a step.")
    micro_batch: int = option(
        0, "The most questions in a backward pass; 0: as many as fit into memory."
    )
    lr: float = option(5e-5, "AdamW's learning rate, which falls linearly to 0.")
    max_input: int = option(1024, "The number of tokens at which inputs are cut.")
    max_target: int = option(256, "The number of tokens at which labels and rationales are cut.")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "auto: bf16 on a GPU that has it in hardware, else fp32."
    )
    device: str = option(
        "auto",
        "Where the student, and a teacher on this machine, compute: auto, cpu, cuda, cuda:1.",
    )
    seed: int = option(0, "The seed of everything random in training.")
    out: str = option("", "The run directory, by default runs/TASK-STUDENT-METHOD-sSEED.")
    overwrite: bool = option(False, "Delete the run in the run directory and start afresh.")


@dataclass
class Options(TrainingOptions, MethodOptions, TaskOptions):
    """All options. Their defaults are qcrd's, with DSS's batch and learning rate."""


# A method is a preset of options, and any of them can be set by hand. finetune learns labels alone;
# single one text, a rationale and then the label; dss (Distilling Step-by-Step, arXiv 2305.02301)
# label and rationale as two tasks; mi adds a loss on their mutual information (arXiv 2403.03348).
NO_RATIONALES = {"positives": "none", "negatives": "none", "disc": "none", "alpha1": 1.0}
ONE_RATIONALE = {"positives": "one", "negatives": "none", "disc": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "finetune": NO_RATIONALES,
    "single": NO_RATIONALES,
    "dss": ONE_RATIONALE,
    "mi": ONE_RATIONALE | {"mi_weight": 0.01},
    "qcrd": {},
}
# The student `tiny` has a preset too, chosen on its validation split.
TINY = {"rounds": 10, "batch_size": 16, "delta": 1.0}
TINY |= {"disc_lr": 1e-3, "disc_steps": 800, "disc_every": 8}
TINY_LR = {"finetune": 1e-3, "single": 5e-3, "dss": 3e-3, "mi": 3e-3, "qcrd": 3e-3}


def presets(method: str, student: str) -> dict[str, Any]:
    """The defaults that a method and a student change."""
    of_student = TINY | {"lr": TINY_LR[method]} if student == "tiny" else {}
    return {"method": method, "student": student} | METHODS[method] | of_student


ALPHA3_DECAY = 0.9  # every round
ROUND_STEPS = 500  # at most in a round by default, so that a set of any size has enough rounds
WARMUP = 50  # steps in which the learning rate rises
ANSWER_MARK = "So the answer is"  # between rationale and label in the single-task target

# --------------------------------------------------------------------------------------------------
# The vote: positives and negatives


def self_consistency(answers: list) -> tuple:
    """Vote over the answers of one question's samples.

    Returns (winner, indices of the positives, indices of the negatives). None is an answer that
    could not be read: it has no vote, and its sample is neither positive nor negative. A tie goes
    to the answer that came first. Without any answer the winner is None.
    """
    votes = [answer for answer in answers if answer is not None]
    if not votes:
        return None, [], []
    winner = max(votes, key=votes.count)  # the first of those with most votes
    positives = [i for i, answer in enumerate(answers) if answer == winner]
    negatives = [i for i, answer in enumerate(answers) if answer not in (winner, None)]
    return winner, positives, negatives


@dataclass
class Question:
    """A training question after the vote."""

    example: Example
    label: str  # what the student learns to predict
    positives: list[str]
    negatives: list[str]  # the teacher's minority; the student's own are stored by round
    held_out: bool = False  # D never trains on it, so that its AUC means something


@dataclass
class Rationale:
    """One rationale of a question in a batch, and what is settled about it."""

    row: int  # of its question in the batch
    text: str
    is_pos: bool
    by_student: bool = False
    l: float = math.nan  # under the student before the step, where it was read
    share: float = 0.0  # in its question's term (eqs. 4, 5)
    score: float = math.nan  # D's, where it was read
    weight: float = 0.0  # share times quality (eqs. 6, 7)


def vote(
    task: Task, examples: list[Example], samples: dict[str, list[Sample]], options: Options
) -> list[Question]:
    """Each question with its positives and negatives."""
    questions = []
    for number, example in enumerate(examples):
        of_question = samples.get(example.id, [])
        rationales = [sample.rationale for sample in of_question]
        _, positives, negatives = self_consistency([task.key(s.answer) for s in of_question])
        first = distinct(rationales)[:1]
        label: str | None = example.label
        if options.labels == "teacher":
            label = of_question[positives[0]].answer if positives else None
        if label is None:
            continue  # no answer of the teacher could be read
        if options.method == "single":  # one target: rationale, then label
            label = " ".join([*first, ANSWER_MARK, label])
        voted = distinct(rationales[i] for i in positives)
        minority = distinct(rationales[i] for i in negatives)
        learned = {"all": voted, "one": first, "none": []}[options.positives]
        avoided = minority if options.negatives != "none" else []
        questions.append(Question(example, label, learned, avoided, held_out=number % 10 == 9))
    if not questions:
        raise UserError("--labels teacher: no training question has a voted answer.")
    return questions


def distinct(texts: Iterable[str]) -> list[str]:
    """Each text once, in the order in which they come, without empty ones."""
    return list(dict.fromkeys(text for text in texts if text.strip()))


# --------------------------------------------------------------------------------------------------
# The losses: pure functions. T rationales of N questions stand in one row: l[t] is l(f(x), r_t),
# the token-mean cross-entropy of rationale t under the student f, in nats per token.

# How the positives and the negatives of a question are chosen, many-to-one.
SCHEMES = {
    "minmax": ("min", "max"),
    "maxmin": ("max", "min"),
    "sampling": ("sample", "sample"),
    "mean": ("mean", "mean"),
    "wmean": ("weighted", "weighted"),
}


def shares(l: list[float], pick: str, quality: list[float] | None = None) -> list[float]:
    """What share each of a question's positives, or negatives, has in its term.

    The paper's MinMax picks "min" of the positives (eq. 4) and "max" of the negatives (eq. 5). l
    are their n losses in nats per token, quality their n qualities, which "weighted" shares by. The
    n shares add up to 1.
    """
    match pick:
        case "mean":
            return [1 / len(l)] * len(l)
        case "weighted":
            quality = quality or [1.0] * len(l)
            return [q / max(sum(quality), 1e-9) for q in quality]
        case "min":
            chosen = l.index(min(l))
        case "max":
            chosen = l.index(max(l))
        case "sample":
            chosen = int(torch.randint(len(l), ()))
        case _:
            raise ValueError(f"pick {pick!r} is not one of min, max, sample, mean, weighted")
    return [float(i == chosen) for i in range(len(l))]


def quality_weights(
    share: torch.Tensor, score: torch.Tensor, is_pos: torch.Tensor, quality: str = "relative"
) -> torch.Tensor:
    """The weight of each rationale in L_cl, (T,): its share times its quality (eqs. 6, 7).

    share and D's scores are (T,), is_pos (T,) says which are positives. "printed" is the equations
    as they stand. "relative" divides the positives' scores by their mean over the batch, so that
    quality decides shares and not the size of the term.
    """
    positive, negative = share * score, share * (1 - score)  # eq. 6, eq. 7
    if quality == "relative":
        mean_score = positive[is_pos].sum() / share[is_pos].sum().clamp(min=1e-9)
        positive = positive / mean_score.clamp(min=1e-9)
    return torch.where(is_pos, positive, negative)


def contrastive_loss(
    l: torch.Tensor,
    weight: torch.Tensor,
    is_pos: torch.Tensor,
    n: int,
    beta: float = 0.2,
    delta: float = 3.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """L_cl of n questions (eq. 3) and its two terms: three scalars, (L_cl, L_pos, L_neg).

    l in nats per token, weight and is_pos are (T,). A rationale's weight is its share in its
    question's term (eqs. 4, 5) times its quality (eqs. 6, 7); it gets no gradient: L_cl never
    trains D.
    """
    weight = weight.detach()
    L_pos = torch.where(is_pos, weight * l, 0).sum() / n
    # min(l - delta, 0): a negative that is already unlikely pushes no more
    L_neg = torch.where(is_pos, 0, weight * (l - delta).clamp(max=0)).sum() / n
    return L_pos - beta * L_neg, L_pos, L_neg  # eq. 3


def discriminator_loss(
    score: torch.Tensor, is_pos: torch.Tensor, row: torch.Tensor, loss: str = "bce"
) -> torch.Tensor:
    """L_D, a scalar, from D's scores (T,). row (T,) says which question a rationale belongs to.

    "bce" is binary cross-entropy, the mean over rationales. "paper" is eq. 2, the mean over the
    questions that have both positives and negatives. It is 0 where there is nothing to compare.
    """
    if loss == "bce":
        good = is_pos.to(score.dtype)
        total = torch.nn.functional.binary_cross_entropy(score, good, reduction="sum")
        return total / max(1, len(score))
    terms = [score.sum() * 0]  # so that there is a gradient where there is nothing to compare
    for question in row.unique():
        of_question = row == question
        pos, neg = score[of_question & is_pos], score[of_question & ~is_pos]
        if len(pos) and len(neg):
            terms.append(neg.logsumexp(0) - pos.logsumexp(0))  # eq. 2
    return torch.stack(terms).sum() / max(1, len(terms) - 1)


def mutual_information_loss(p_predict: torch.Tensor, p_explain: torch.Tensor) -> torch.Tensor:
    """MI's loss (arXiv 2403.03348), (N,): cross-entropy of what the two tasks write, (N, V).

    Each is the max over its decoder positions of the softmax, which does not add up to 1; the
    prediction's side is detached.
    """
    return -(p_predict.detach() * p_explain.clamp(min=1e-9).log()).sum(1)


# --------------------------------------------------------------------------------------------------
# The discriminator and the student


class Discriminator(torch.nn.Module):
    """D(x, r) -> s in (0, 1), the quality of a rationale (eq. 1).

    The student's encoder, max pooling over tokens, two linear layers. `encoder` maps input_ids
    and attention_mask to an object with `last_hidden_state` (T, S, width), as the encoder of any
    seq2seq model of transformers does.
    """

    def __init__(self, encoder: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        hidden, out = torch.nn.Linear(width, width), torch.nn.Linear(width, 1)
        self.mlp = torch.nn.Sequential(hidden, torch.nn.ReLU(), out)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Scores s, (T,), float32, of question and rationale in one sequence, (T, S)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        states = output.last_hidden_state  # (T, S, width)
        states = states.masked_fill(attention_mask[..., None] == 0, -torch.inf)
        return torch.sigmoid(self.mlp(states.amax(1)).float().squeeze(-1))


# How much is computed at once, padding counted. It bounds the memory.
GROUP_TOKENS_GPU = 4096  # tokens of labels or rationales: as many as fill a GPU
GROUP_FLOATS_CPU = 2**18  # their tokens times the model's width: as many as stay in a CPU's caches
MICRO_BATCH_TOKENS = 6144  # tokens of the questions and rationales in a backward pass
# A CPU seldom tells that memory runs out: there a student larger than T5-small has fewer tokens.
T5_SMALL = 61_000_000  # parameters
# Tokens of the inputs that are answered at once; with what is written, up to three times as many.
WRITE_TOKENS = 32768
LEAST_ROOM = 1 / 512  # with it a piece is a single question, or a few short ones


class Student:
    """A seq2seq model with its tokenizer, on one device: text in, losses and text out."""

    def __init__(self, model: Any, tokenizer: Any, options: Options) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_input, self.max_target = options.max_input, options.max_target
        self.micro_batch = options.micro_batch
        self.device = model.device
        on_gpu = self.device.type == "cuda"
        self.bf16 = options.precision == "bf16"
        if options.precision == "auto" and on_gpu:
            with torch.cuda.device(self.device):
                self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, self.bf16)
        width = model.get_input_embeddings().weight.shape[1]
        self.group_tokens = GROUP_TOKENS_GPU if on_gpu else max(64, GROUP_FLOATS_CPU // width)
        larger = 1 if on_gpu else max(1, model.num_parameters() / T5_SMALL)
        self.micro_batch_tokens = MICRO_BATCH_TOKENS / larger
        self.write_tokens = WRITE_TOKENS / larger
        # the share of these three that fits into memory
        self.room = {"training": 1.0, "writing": 1.0}
        # each text is tokenized once: small students would spend a sixth of a step on it
        self.ids = lru_cache(200_000)(self.tokenize)

    def tokenize(self, text: str, limit: int, *pair: str) -> Tensor:
        """Token ids of a text, or of two in one sequence, cut at `limit` tokens."""
        # more characters than this cannot matter, and would cost time
        texts = [part[: 20 * limit] for part in (text, *pair)]
        return torch.tensor(self.tokenizer(*texts, truncation=True, max_length=limit).input_ids)

    def can_write(self, text: str) -> bool:
        """Whether the tokens of a text give it back, but for the kind of white space."""
        ids = self.tokenizer(text, verbose=False).input_ids
        written = self.tokenizer.decode(ids, skip_special_tokens=True)
        return written.split() == text.split() and "\n" not in text.strip()

    def tensor(self, values: Any) -> Tensor:
        """Values on the student's device, without waiting for what a GPU does."""
        return torch.as_tensor(values).to(self.device, non_blocking=True)

    def padded(self, ids: list[Tensor]) -> Tensor:
        """Rows of token ids, (N, L), on the device; -100 after the end of a row."""
        return self.tensor(pad_sequence(ids, True, -100))

    def inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """input_ids and attention_mask, (N, S), of such rows."""
        mask = labels != -100
        ids = labels.masked_fill(~mask, self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask.long()}

    def encode(self, inputs: list[str]) -> tuple[Tensor, Tensor]:
        """The encoder's states (N, S, width) and their mask (N, S)."""
        batch = self.inputs(self.padded([self.ids(text, self.max_input) for text in inputs]))
        with self.autocast():
            return self.model.get_encoder()(**batch).last_hidden_state, batch["attention_mask"]

    def logits(self, encoded: tuple[Tensor, Tensor], row: Tensor, labels: Tensor) -> Tensor:
        """Teacher-forced logits (T, L, V) of labels (T, L) for these rows (T,) of the inputs."""
        states, mask = encoded
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states[row]),
            attention_mask=mask[row],
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits.float()

    def nll(self, encoded: tuple[Tensor, Tensor], row: list[int], targets: list[str]) -> Tensor:
        """The mean cross-entropy of each target's tokens, (T,), in nats per token: of a rationale
        l(f(x), r). Target t belongs to row[t] of the encoded inputs."""
        l, rows = torch.zeros(len(targets), device=self.device), self.tensor(row)
        ids = [self.ids(text, self.max_target) for text in targets]
        with self.autocast():  # around all groups: inside it the weights turn to bf16 once
            for which, labels in self.groups(ids, self.room["training"] * self.group_tokens):
                logits = self.logits(encoded, rows[which], labels)  # (group, L, V)
                of_token = cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="none"
                ).view(labels.shape)
                l[which] = of_token.sum(1) / (labels != -100).sum(1)
        return l

    def groups(
        self, ids: list[Tensor], tokens: float, least: float = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of token ids in groups of like length, of so many tokens: which rows (group,), and
        the rows themselves (group, L). A row counts as `least` tokens or more."""
        if not ids:
            return
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        which, labels, first = self.tensor(order), self.padded([ids[i] for i in order]), 0
        while first < len(ids):
            longest = len(ids[order[first]])
            last = first + max(1, int(tokens / max(longest, least)))
            yield which[first:last], labels[first:last, :longest]
            first = last

    def vocabulary(
        self, encoded: tuple[Tensor, Tensor], row: list[int], targets: list[str]
    ) -> Tensor:
        """For MI: the max over a target's positions of the softmax, (T, V)."""
        labels = self.padded([self.ids(text, self.max_target) for text in targets])
        logits = self.logits(encoded, self.tensor(row), labels)
        return logits.softmax(2).masked_fill(labels[..., None] == -100, 0).amax(1)

    def micro_batches(
        self, questions: list[Question], rationales: list[Rationale], inputs: float
    ) -> Iterator[tuple[list[Question], list[Rationale]]]:
        """The questions of each backward pass with their rationales, whose rows count from the
        first of these questions. inputs: how many inputs a question makes."""
        longest = max(len(self.ids(q.example.input, self.max_input)) for q in questions)
        targets = sum(len(self.ids(r.text, self.max_target)) for r in rationales)
        most = self.micro_batch or len(questions)
        tokens = inputs * longest + targets / len(questions)  # of a question
        size = max(1, int(self.room["training"] * min(most, self.micro_batch_tokens / tokens)))
        for first in range(0, len(questions), size):
            those = [r for r in rationales if first <= r.row < first + size]
            yield questions[first : first + size], [replace(r, row=r.row - first) for r in those]

    def fit(self, work: Callable, *args: Any, part: str = "training") -> Any:
        """work(*args); where memory runs out, again in pieces of half the size, and so the rest of
        this part (training or writing) of the run."""
        while True:
            try:
                return work(*args)
            except (RuntimeError, MemoryError) as error:
                if not data.memory_is_full(error):
                    raise
                said = first_line(error)
            # outside of this block the error no longer holds the work's tensors
            torch.cuda.empty_cache()
            torch.manual_seed(torch.initial_seed())  # wherever it ran out, the same is drawn
            if self.room[part] <= LEAST_ROOM:
                raise UserError(
                    f"one question does not fit into memory ({said}): train a smaller --student,"
                    " or with a lower --max-input."
                )
            if self.room[part] == 1:
                tqdm.write(f"Memory is full: {part} goes on in smaller pieces.")
            self.room[part] /= 2

    def write(
        self, inputs: list[str], desc: str, limit: int = 0, temperature: float = 0
    ) -> list[str]:
        """What the student writes for each input: greedy, or sampled where temperature > 0.

        It ends at `limit` tokens, by default at the longest that it was trained on.
        """
        limit = limit or self.model.generation_config.max_new_tokens
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        how = sampling if temperature else {}
        ids = [self.ids(text, self.max_input) for text in inputs]

        def write_all() -> list[str]:
            texts = [""] * len(ids)
            bar = tqdm(total=len(ids), desc=desc, unit="question", leave=False)
            with without_dropout(self.model), self.autocast(), bar:
                tokens = self.room["writing"] * self.write_tokens
                for which, labels in self.groups(ids, tokens, limit / 2):
                    batch = self.inputs(labels)
                    output = self.model.generate(**batch, **how, max_new_tokens=limit)
                    some = self.tokenizer.batch_decode(output, skip_special_tokens=True)
                    for i, text in zip(which.tolist(), some, strict=True):
                        texts[i] = text.strip()
                    bar.update(len(some))
            return texts

        return self.fit(write_all, part="writing")


def make_discriminator(student: Student, options: Options) -> Discriminator | None:
    """D, started from the student's pretrained encoder: a copy of it, or the student's own. None
    for --disc none."""
    if options.disc == "none":
        return None
    encoder = student.model.get_encoder()
    if options.disc == "own":
        encoder = deepcopy(encoder)
    torch.manual_seed(step_seed(options.seed, 0, "mlp"))
    width = student.encode(["a"])[0].shape[-1]
    return Discriminator(encoder, width).to(student.device)


def make_optimizers(
    student: Student, disc: Discriminator | None, options: Options
) -> dict[str, torch.optim.Optimizer]:
    """AdamW of the student, and of what the discriminator does not share with it."""
    optimizers: dict[str, torch.optim.Optimizer] = {}
    optimizers["student"] = AdamW(student.model.parameters(), options.lr, fused=True)
    if disc:
        trained = disc if options.disc == "own" else disc.mlp
        optimizers["disc"] = AdamW(trained.parameters(), options.disc_lr, fused=True)
    return optimizers


@contextmanager
def without_dropout(*models: Any) -> Iterator[None]:
    """No dropout and no gradients inside; None is no model."""
    present = torch.nn.ModuleList(models)
    present.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        present.train()


# --------------------------------------------------------------------------------------------------
# One training step


SelfNegatives = dict[str, str]  # by question id: what the student wrote some rounds ago


def rationales_of(questions: list[Question], self_negatives: SelfNegatives) -> list[Rationale]:
    """A batch's rationales: voted positives, the teacher's minority, what the student wrote."""
    found = []
    for row, q in enumerate(questions):
        found += [Rationale(row, text, True) for text in q.positives]
        found += [Rationale(row, text, False) for text in q.negatives]
        if q.example.id in self_negatives:
            found.append(Rationale(row, self_negatives[q.example.id], False, by_student=True))
    return found


def explain_losses(
    student: Student, questions: list[Question], rationales: list[Rationale]
) -> list[float]:
    """l of each rationale; they stand in the order of their questions."""
    found = [torch.zeros(0, device=student.device)]
    for some, those in student.micro_batches(questions, rationales, inputs=1):
        if those:
            encoded = student.encode([f"explain: {q.example.input}" for q in some])
            found.append(student.nll(encoded, [r.row for r in those], [r.text for r in those]))
    return torch.cat(found).tolist()  # one read of all of them


def score(
    student: Student, disc: Discriminator, questions: list[Question], rationales: list[Rationale]
) -> Tensor:
    """D(x, r), (T,), of each rationale with its question."""
    limit = student.max_input
    ids = [student.ids(questions[r.row].example.input, limit, r.text) for r in rationales]
    scores = torch.zeros(len(ids), device=student.device)
    tokens = 4 * student.room["training"] * student.group_tokens  # an encoder has no logits
    with student.autocast():
        for which, labels in student.groups(ids, tokens):
            scores[which] = disc(**student.inputs(labels))
    return scores


def choose(
    student: Student,
    disc: Discriminator | None,
    questions: list[Question],
    self_negatives: SelfNegatives,
    options: Options,
) -> list[Rationale]:
    """The rationales that enter L_cl with their weights (eqs. 4 to 7), without gradients.

    Min, max and margin leave most rationales without a gradient: all are read here, and only the
    chosen ones again in `student_losses`.
    """
    rationales = rationales_of(questions, self_negatives)
    with without_dropout(student.model, disc):
        # an only positive is chosen at any l
        compared = [r for r in rationales if not r.is_pos or len(questions[r.row].positives) > 1]
        for r, l in zip(compared, explain_losses(student, questions, compared), strict=True):
            r.l = l
        if disc and options.scheme == "wmean":  # there quality decides the shares
            set_scores(student, disc, questions, rationales)
        pick_pos, pick_neg = SCHEMES[options.scheme]
        for (_, is_pos), group in groupby(rationales, lambda r: (r.row, r.is_pos)):  # eqs. 4, 5
            side = list(group)
            quality = [r.score if is_pos else 1 - r.score for r in side] if disc else None
            picked = shares([r.l for r in side], pick_pos if is_pos else pick_neg, quality)
            for r, share in zip(side, picked, strict=True):
                r.share = r.weight = share
        chosen = [r for r in rationales if r.share > 0 and (r.is_pos or r.l < options.delta)]
        if disc and options.scheme != "wmean":  # eqs. 6, 7
            set_scores(student, disc, questions, chosen)
            set_weights(chosen, options.quality)
    return chosen


def set_scores(
    student: Student, disc: Discriminator, questions: list[Question], rationales: list[Rationale]
) -> None:
    """Let each rationale know D's score of it."""
    scores = score(student, disc, questions, rationales).tolist()
    for r, s in zip(rationales, scores, strict=True):
        r.score = s


def set_weights(rationales: list[Rationale], quality: str) -> None:
    """Weight each rationale by its score (eqs. 6, 7)."""
    share = torch.tensor([r.share for r in rationales])
    score = torch.tensor([r.score for r in rationales])
    is_pos = torch.tensor([r.is_pos for r in rationales]).bool()
    weights = quality_weights(share, score, is_pos, quality).tolist()
    for r, weight in zip(rationales, weights, strict=True):
        r.weight = weight


def student_losses(
    student: Student, questions: list[Question], chosen: list[Rationale], options: Options
) -> dict[str, Tensor]:
    """L_pred, L_cl with its terms, and MI's loss: scalars with gradients.

    The rows of the chosen rationales are those of these questions.
    """
    n = len(questions)
    # one pass of the encoder for both tasks: rows 0 to n - 1 predict:, rows n to 2n - 1 explain:
    inputs = [f"predict: {q.example.input}" for q in questions]
    if chosen:
        inputs += [f"explain: {q.example.input}" for q in questions]
    row = [*range(n), *(n + r.row for r in chosen)]
    with student.autocast():
        encoded = student.encode(inputs)
        l = student.nll(encoded, row, [q.label for q in questions] + [r.text for r in chosen])
        weight = student.tensor([r.weight for r in chosen])
        is_pos = student.tensor([r.is_pos for r in chosen]).bool()
        L_cl, L_pos, L_neg = contrastive_loss(l[n:], weight, is_pos, n, options.beta, options.delta)
        losses = {"L_pred": l[:n].mean(), "L_cl": L_cl, "L_pos": L_pos, "L_neg": L_neg}
        explained = [i for i, q in enumerate(questions) if q.positives]
        if options.mi_weight and explained:
            labels = [questions[i].label for i in explained]
            rationales = [questions[i].positives[0] for i in explained]
            p_predict = student.vocabulary(encoded, explained, labels)
            p_explain = student.vocabulary(encoded, [n + i for i in explained], rationales)
            losses["L_mi"] = mutual_information_loss(p_predict, p_explain).sum() / n
    return losses


def disc_gradients(
    student: Student,
    disc: Discriminator,
    questions: list[Question],
    self_negatives: SelfNegatives,
    factor: float,
    options: Options,
) -> dict[str, float]:
    """Add the gradients of factor * L_D. Returns L_D, and D's mean score of each kind of
    rationale."""
    rationales = rationales_of(questions, self_negatives)
    total = disc_terms(rationales, options.disc_loss)
    if not total:
        return {}
    inputs = len(rationales) / len(questions)  # D reads the question with each rationale
    losses, scores = [], []
    for some, those in student.micro_batches(questions, rationales, inputs):
        if those:
            s = score(student, disc, some, those)
            is_pos = student.tensor([r.is_pos for r in those])
            row = student.tensor([r.row for r in those])
            fraction = disc_terms(those, options.disc_loss) / total
            L_D = fraction * discriminator_loss(s, is_pos, row, options.disc_loss)
            (factor * L_D).backward()
            losses.append(L_D.detach())
            scores.append(s.detach())
    of_kind: dict[str, list[float]] = defaultdict(list)
    for r, s in zip(rationales, torch.cat(scores).tolist(), strict=True):
        of_kind["s_pos" if r.is_pos else "s_self" if r.by_student else "s_neg"].append(s)
    metrics = {kind: fmean(scores_of_kind) for kind, scores_of_kind in of_kind.items()}
    return metrics | {"L_D": torch.stack(losses).sum().item()}


def disc_terms(rationales: list[Rationale], loss: str) -> int:
    """Over how many terms L_D is a mean: rationales ("bce"), or questions with both sides."""
    if loss == "bce":
        return len(rationales)
    positive = {r.row for r in rationales if r.is_pos}
    return len(positive & {r.row for r in rationales if not r.is_pos})


def train_step(
    student: Student,
    disc: Discriminator | None,
    optimizers: dict[str, torch.optim.Optimizer],
    questions: list[Question],
    self_negatives: SelfNegatives,
    round_: int,
    step: int,
    options: Options,
) -> dict[str, float]:
    """One training step on a batch. Returns its metrics; UserError if a loss is not finite."""
    metrics = student.fit(
        step_gradients, student, disc, questions, self_negatives, round_, step, options
    )
    if not all(map(math.isfinite, metrics.values())):
        ids = ", ".join(q.example.id for q in questions[:5])
        raise UserError(f"the loss is not finite at step {step} ({ids}): use a lower --lr.")
    for optimizer in optimizers.values():
        clip_and_step(optimizer)  # AdamW passes over what has no gradient, as D in most steps
    return metrics


def step_gradients(
    student: Student,
    disc: Discriminator | None,
    questions: list[Question],
    self_negatives: SelfNegatives,
    round_: int,
    step: int,
    options: Options,
) -> dict[str, float]:
    """The gradients of L_total = alpha_1 L_pred + alpha_2 L_cl + alpha_3 L_D (eq. 8).

    A sum, whose terms go backward one after the other, so that one graph is in memory at a time.
    mi adds its own loss. Returns the step's metrics.
    """
    torch.manual_seed(step_seed(options.seed, step, "step"))  # dropout, and scheme "sampling"
    student.model.zero_grad()
    if disc:
        disc.zero_grad()

    # 1. which rationales count, and how much
    chosen = choose(student, disc, questions, self_negatives, options)

    # 2. the student learns from them, a micro-batch at a time
    sums: dict[str, Any] = defaultdict(float)
    for some, those in student.micro_batches(questions, chosen, inputs=2):
        losses = student_losses(student, some, those, options)
        total = options.alpha1 * losses["L_pred"] + options.alpha2 * losses["L_cl"]
        if "L_mi" in losses:
            total += options.mi_weight * losses["L_mi"]
        fraction = len(some) / len(questions)
        (fraction * total).backward()
        for name, loss in losses.items():
            sums[name] += fraction * loss.detach()
    values = torch.stack([*sums.values()]).tolist()  # one read of all of them
    metrics = dict(zip(sums, values, strict=True))
    active = {r.row for r in chosen if not r.is_pos}  # with a negative below the margin
    metrics["active"] = len(active) / len(questions)

    # 3. every few steps the discriminator learns from all rationales of some of these questions
    if disc and step % options.disc_every == 0:
        learned = disc_questions(questions, options, step)
        alpha3 = options.alpha3 * ALPHA3_DECAY**round_
        metrics |= disc_gradients(student, disc, learned, self_negatives, alpha3, options)
    return metrics


def clip_and_step(optimizer: torch.optim.Optimizer) -> None:
    """One step of AdamW on the gradients that have gathered, clipped at norm 1."""
    clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()  # writing, between the rounds, needs their memory


def disc_questions(questions: list[Question], options: Options, step: int) -> list[Question]:
    """What D learns from in a step: a random part of the batch, never a held-out question."""
    rng = random.Random(step_seed(options.seed, step, "disc"))
    rows = [i for i, q in enumerate(questions) if not q.held_out]
    count = max(8, options.batch_size // 4)  # about as much work as the student's part of a step
    return [questions[i] for i in sorted(rng.sample(rows, min(count, len(rows))))]


def step_seed(seed: int, step: int, what: str) -> int:
    """The seed for one purpose in one step. Randomness depends on the position in training alone,
    so that a resumed run draws what an uninterrupted one does."""
    return zlib.crc32(f"{seed}/{step}/{what}".encode())


# --------------------------------------------------------------------------------------------------
# Self-adversarial negatives, D's pretraining, D's AUC


def source_round(round_: int, options: Options) -> int:
    """The round whose student wrote the negatives that `round_` trains on: j before, or the
    oldest there is. A fixed student writes once, in round 0. -1 where no student writes any."""
    sources = {"student": max(round_ - options.lag, 0), "fixed": 0}
    return sources.get(options.negatives, -1)


def readers_of(questions: list[Question], round_: int, options: Options) -> dict[str, Question]:
    """By id, the questions of the rounds that train on what the student writes in `round_`: in a
    large training set no round has them all."""
    rounds = [r for r in range(round_, options.rounds) if source_round(r, options) == round_]
    if not rounds:
        return {}
    batches = round_batches(questions, options, rounds[0], len(rounds))  # they are consecutive
    return {q.example.id: q for q in chain.from_iterable(batches)}


def write_negatives(
    student: Student, questions: list[Question], round_: int, options: Options
) -> dict[str, str]:
    """At the start of a round the student writes one rationale at --student-temperature for each
    question of the rounds j later. By question id, they wait for these rounds, so that no old
    student need be kept."""
    asked = readers_of(questions, round_, options)
    if not asked:
        return {}
    # at such a temperature few texts end by themselves, and a longer tail teaches nothing
    limit = target_length(student, [t for q in questions[:1000] for t in q.positives], 0.9)
    if options.negatives == "fixed":
        student = load_student(f"{options.fixed_student}/student", options)
    torch.manual_seed(step_seed(options.seed, round_, "write"))
    inputs = [f"explain: {q.example.input}" for q in asked.values()]
    desc = f"negatives of round {round_}"
    texts = student.write(inputs, desc, limit, options.student_temperature)
    return dict(zip(asked, texts, strict=True))


def read_negatives(
    written: dict[str, str], questions: list[Question], round_: int, options: Options, place: Path
) -> SelfNegatives:
    """The self-adversarial negatives that a round trains on, of what was written for it; UserError
    if that is not what `place` must hold. An empty text is none."""
    source = source_round(round_, options)
    asked = readers_of(questions, source, options) if source >= 0 else {}
    if written.keys() != asked.keys() or not all(isinstance(t, str) for t in written.values()):
        raise UserError(f"{place} has not what the student wrote: start afresh with --overwrite.")
    return {id: text for id, text in written.items() if text}


def target_length(student: Student, texts: Iterable[str], quantile: float) -> int:
    """A quantile of the texts' lengths in tokens; --max-target without a text."""
    lengths = [len(student.ids(text, student.max_target)) for text in texts]
    return int(np.quantile(lengths, quantile)) if lengths else student.max_target


def corrupt(rng: random.Random, text: str, words: Sequence[str]) -> str:
    """A negative made of a positive: three words in ten masked or replaced by others' words, one
    at least."""
    out = text.split()
    for i in rng.sample(range(len(out)), max(1, round(0.3 * len(out)))):
        out[i] = "<extra_id_0>" if rng.random() < 0.5 else rng.choice(words)
    return " ".join(out)


def pretrain_disc(
    student: Student,
    disc: Discriminator,
    questions: list[Question],
    optimizer: torch.optim.Optimizer,
    options: Options,
) -> None:
    """Train D on the teacher's positives and as many negatives, some of them corrupted
    positives."""
    rng = random.Random(step_seed(options.seed, 0, "disc"))
    known = [q for q in questions if q.positives and not q.held_out]
    words = " ".join(q.positives[0] for q in known[:1000]).split()

    def gradients(batch: list[Question], step: int) -> None:
        torch.manual_seed(step_seed(options.seed, step, "disc"))  # dropout
        disc.zero_grad()
        disc_gradients(student, disc, batch, {}, 1.0, options)

    for step in tqdm(range(options.disc_steps), desc="discriminator", unit="step", leave=False):
        batch = []
        for q in disc_questions(known, options, step):
            missing = range(len(q.positives) - len(q.negatives))
            made = [corrupt(rng, rng.choice(q.positives), words) for _ in missing]
            batch.append(replace(q, negatives=q.negatives + made))
        student.fit(gradients, batch, step)
        clip_and_step(optimizer)
    disc.zero_grad()  # with --disc shared the encoder's, which the optimizer does not have


def disc_auc(student: Student, disc: Discriminator, questions: list[Question]) -> dict[str, float]:
    """AUC: how often D scores a good rationale above a bad one of the same held-out question; ties
    count half. Empty without such a pair, as where the teacher gave one sample a question.

    Good is what the exact check says where there is one (toy), else what the vote said.
    """
    held_out = [q for q in questions if q.held_out][:200]
    rationales = rationales_of(held_out, {})
    with without_dropout(student.model, disc):
        student.fit(set_scores, student, disc, held_out, rationales)
    sides: dict[tuple[int, bool], list[float]] = defaultdict(list)
    for r in rationales:
        valid = data.is_valid(held_out[r.row].example, r.text)
        sides[r.row, r.is_pos if valid is None else valid].append(r.score)
    wins = []
    for row in range(len(held_out)):
        for a in sides[row, True]:
            wins += [(a > b) + (a == b) / 2 for b in sides[row, False]]
    return {"AUC": fmean(wins)} if wins else {}


# --------------------------------------------------------------------------------------------------
# Evaluation


def evaluate(
    student: Student, task: Task, splits: dict[str, list[Example]], split: str, options: Options
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Label accuracy on a split (greedy predict:), where rationales can be checked their validity
    (greedy explain:), and a row for each question."""
    examples = splits[split]
    single = options.method == "single"  # there the label follows a rationale
    limit = 0 if single else target_length(student, {e.label for e in splits["train"]}, 1.0)
    labels = student.write([f"predict: {e.input}" for e in examples], f"{split} labels", limit)
    if single:
        labels = [text.rpartition(ANSWER_MARK)[2].strip() for text in labels]
    rows: list[dict[str, Any]] = []
    for e, label in zip(examples, labels, strict=True):
        rows.append({"id": e.id, "label": label, "correct": task.correct(label, e)})
    metrics = {"accuracy": fmean(row["correct"] for row in rows)}
    if options.positives != "none":
        texts = student.write([f"explain: {e.input}" for e in examples], f"{split} rationales")
        for row, e, text in zip(rows, examples, texts, strict=True):
            row |= {"rationale": text, "valid": data.is_valid(e, text)}
        if rows[0]["valid"] is not None:
            metrics["validity"] = fmean(row["valid"] for row in rows)
    return metrics, rows


# --------------------------------------------------------------------------------------------------
# The training loop


def steps_in_round(questions: list[Question], options: Options) -> int:
    a_pass = math.ceil(len(questions) / options.batch_size)
    return options.round_steps or min(ROUND_STEPS, a_pass)


def batches_from(
    questions: list[Question], options: Options, first: int
) -> Iterator[list[Question]]:
    """The batches of one pass over the training set after the other, from pass `first` on.

    A pass is shuffled by seed and number; the questions of a batch are alike in length, so that
    little is padding.
    """
    size = options.batch_size
    for number in count(first):
        rng = random.Random(step_seed(options.seed, number, "order"))
        shuffled = rng.sample(questions, len(questions))
        order: list[Question] = []
        for i in range(0, len(shuffled), 20 * size):
            order += sorted(shuffled[i : i + 20 * size], key=lambda q: len(q.example.input))
        of_pass = [order[i : i + size] for i in range(0, len(order), size)]
        yield from rng.sample(of_pass, len(of_pass))


def round_batches(
    questions: list[Question], options: Options, round_: int, rounds: int = 1
) -> list[list[Question]]:
    """The batches of a round, or of so many from it on: their steps of the endless row of
    passes."""
    steps = steps_in_round(questions, options)
    first, done = divmod(round_ * steps, math.ceil(len(questions) / options.batch_size))
    return list(islice(batches_from(questions, options, first), done, done + rounds * steps))


def train(
    student: Student,
    disc: Discriminator | None,
    questions: list[Question],
    run: Path,
    options: Options,
) -> list[dict[str, Any]]:
    """All rounds, from the last checkpoint where there is one; the metrics of each round."""
    optimizers = make_optimizers(student, disc, options)
    # of the finished rounds the metrics, and what the student wrote in each
    rounds, written = load_checkpoint(run, student, disc, optimizers)
    if not (run / "checkpoint.pt").exists():
        if disc:
            pretrain_disc(student, disc, questions, optimizers["disc"], options)
            ranked = disc_auc(student, disc, questions)
            if ranked:
                print(f"discriminator pretrained: AUC {ranked['AUC']:.3f} on held-out questions")
        save_checkpoint(run, student, disc, optimizers, rounds, written)
    steps, first = steps_in_round(questions, options), len(rounds)
    total = options.rounds * steps
    print(table_row({name: name for name in COLUMNS}))
    bar = tqdm(total=total, initial=first * steps, desc="training", unit="step")
    for round_ in range(first, options.rounds):
        began = time.monotonic()
        written[round_] = write_negatives(student, questions, round_, options)
        due = written.get(source_round(round_, options), {})
        self_negatives = read_negatives(due, questions, round_, options, run / "checkpoint.pt")
        batches = round_batches(questions, options, round_)
        metrics: dict[str, list[float]] = defaultdict(list)
        for step, batch in enumerate(batches, round_ * steps):
            rise, fall = min(1, (step + 1) / WARMUP), 1 - step / total
            optimizers["student"].param_groups[0]["lr"] = options.lr * rise * fall
            of_step = train_step(
                student, disc, optimizers, batch, self_negatives, round_, step, options
            )
            for name, value in of_step.items():
                metrics[name].append(value)
            bar.update()
        row = {"round": round_} | {name: fmean(values) for name, values in metrics.items()}
        if disc:
            row |= disc_auc(student, disc, questions)
            if row.get("AUC", 1) < 0.55 or row.get("s_pos", 1) < 0.05:
                tqdm.write("warning: D is near chance, or its scores vanish: lower --disc-lr.")
        seconds = time.monotonic() - began
        rounds.append(row | {"q/s": sum(map(len, batches)) / seconds})
        tqdm.write(table_row(rounds[-1]))
        if round_ == first:
            left = seconds * (options.rounds - 1 - first) / 60
            tqdm.write(f"The other rounds take about {left:.0f} minutes.")
        write_jsonl(run / "metrics.jsonl", rounds)
        shown = [{"id": id, "output": text} for id, text in due.items()]
        write_jsonl(run / "negatives.jsonl", shown)  # for people, and eval.py
        save_checkpoint(run, student, disc, optimizers, rounds, written)
    bar.close()
    return rounds


COLUMNS = ["round", "L_pred", "L_pos", "L_neg", "L_D", "s_pos", "s_neg", "s_self", "AUC", "active"]
COLUMNS += ["q/s"]


def table_row(row: dict[str, Any]) -> str:
    """A round's metrics, or their names, as a line of a table."""
    cells = []
    for name in COLUMNS:
        value = row.get(name, "-")
        if isinstance(value, float):
            value = f"{value:.3f}" if value < 20 else f"{value:.0f}"
        cells.append(f"{value:>7}")
    return "".join(cells)


# --------------------------------------------------------------------------------------------------
# Loading the student


def device_of(options: Options) -> str:
    """The device to train on. On a GPU the same seed gives the same weights, too."""
    device = data.gpu_or_cpu(options.device)
    windows = os.name == "nt" or "microsoft" in platform.release()  # or Linux under Windows
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        if not windows:  # which has none, or drivers that fail at them
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        tried = torch.zeros(1, device=device)
        tried.item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {options.device} cannot be used ({first_line(error)}): try --device cpu."
        )
    if windows and tried.is_cuda:
        # there a driver goes on in the computer's memory, slowly, and never says that it is full
        free, total = torch.cuda.mem_get_info(tried.device)
        free += torch.cuda.memory_reserved(tried.device)
        torch.cuda.set_per_process_memory_fraction(0.8 * free / total, tried.device)
    return device


def load_student(name: str, options: Options) -> Student:
    """The student of that name or folder; UserError if it cannot be trained or cannot write."""
    device = device_of(options)
    path = data.tiny_student() if name == "tiny" else Path(name).expanduser()
    place = str(path) if path.exists() else name  # a folder, or a name on the Hub
    how: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": False}
    if name == "tiny":
        how["attn_implementation"] = "eager"  # 4% faster for matrices so small
        if "OMP_NUM_THREADS" not in os.environ:
            # two were 5 to 10% faster, and several times slower beside other work
            torch.set_num_threads(1)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        model: Any = AutoModelForSeq2SeqLM.from_pretrained(place, **how)
        student = Student(model.to(device).train(), tokenizer, options)
        try_student(student)
    except Exception as error:  # a model made elsewhere can fail in any way
        if data.memory_is_full(error):
            raise
        raise UserError(
            f"--student {name} cannot be trained as a seq2seq model: {first_line(error)}"
        )
    return student


def try_student(student: Student) -> None:
    """Settle how the student reads and writes, and try both, before anything is paid for.

    It writes greedily, or as --student-temperature says: not with the beams, penalties, least
    lengths and forced tokens of the generation config that it came with.
    """
    model, tokenizer = student.model, student.tokenizer
    if tokenizer("a").input_ids[-1:] != [tokenizer.eos_token_id]:
        tokenizer.add_eos_token = True  # T5Gemma's: without it a student never learns to stop
    ids = tokenizer("predict: explain:").input_ids
    known = tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if not known or tokenizer.pad_token_id is None or len(tokenizer) > rows:
        raise ValueError("its tokenizer does not fit it: add its tokenizer files.")
    longest = getattr(model.config, "max_position_embeddings", None) or student.max_input
    if longest < student.max_input:
        print(
            f"--student {model.name_or_path} reads {longest} tokens at most, which is now"
            " --max-input."
        )
        student.max_input, student.max_target = longest, min(longest, student.max_target)
    start = model.prepare_decoder_input_ids_from_labels(student.tensor([[0]]))[0, 0]
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=int(start),  # what it is trained to start with
        max_new_tokens=model.generation_config.max_new_tokens or student.max_target,
    )
    student.nll(student.encode(["a"]), [0], ["a"]).sum().backward()
    model.zero_grad()
    with without_dropout(model):  # an input as long as any
        student.nll(student.encode(["a " * student.max_input]), [0], ["a"])
    student.write(["explain: a"], "trying", limit=2)


def describe_device(student: Student) -> str:
    """The device with its memory, and the precision with its reason."""
    device, precision = str(student.device), "bf16" if student.bf16 else "fp32"
    if student.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(student.device)
        device = f"{gpu.name} with {gpu.total_memory / 1e9:.1f} GB"
    return (
        f"Device: {device}. Precision: {precision};"
        " --precision auto is bf16 where the GPU has it in hardware."
    )


def check_texts(student: Student, questions: list[Question], options: Options) -> None:
    """Say how many of the first thousand questions' texts are cut, what the student cannot read,
    and which labels it cannot write."""
    questions = questions[:1000]
    inputs = [q.example.input for q in questions]
    targets = [text for q in questions for text in (q.label, *q.positives)]
    for name, limit, texts in (
        ("--max-input", student.max_input, inputs),
        ("--max-target", student.max_target, targets),
    ):
        ids = [student.ids(text, limit + 1) for text in texts]
        cut = sum(len(row) > limit for row in ids)
        if cut:
            print(f"{cut} of {len(ids)} texts are longer than {name} and are cut.")
        tokens = torch.cat(ids).tolist()
        unknown = tokens.count(student.tokenizer.unk_token_id) / len(tokens)
        if unknown > 0.03:
            read = student.tokenizer.decode(ids[0])[:80]
            print(
                f"warning: --student {options.student} does not know {unknown:.0%} of this task's"
                f" tokens and reads {read!r}: name another, such as --student t5-small."
            )
    lost = [q.label for q in questions if not student.can_write(q.label)]
    if lost:
        print(
            f"{len(lost)} of {len(questions)} labels cannot be written by this student, such as"
            f" {lost[0]!r}."
        )


# --------------------------------------------------------------------------------------------------
# Checkpoints and the run directory


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, that is there whole or not at all, and on the disk before anything builds
    on it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):  # as torch.save reports Ctrl-C
            raise KeyboardInterrupt
        raise UserError(
            f"{path} could not be written ({first_line(error)}): make room and start the same"
            " command again."
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with whole_file(path) as file:
        file.write(text.encode())


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no such file or it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def parts_of(
    student: Student, disc: Discriminator | None, optimizers: dict[str, torch.optim.Optimizer]
) -> dict[str, Any]:
    """What a checkpoint holds the state of."""
    models: dict[str, Any] = {"student": student.model, "disc": disc}  # None is no model
    return {"models": torch.nn.ModuleDict(models), **optimizers}


def save_checkpoint(
    run: Path,
    student: Student,
    disc: Discriminator | None,
    optimizers: dict[str, torch.optim.Optimizer],
    rounds: list[dict],
    written: dict[int, dict[str, str]],
) -> None:
    """Write checkpoint.pt: all that the coming rounds need."""
    state: dict[str, Any] = {"rounds": rounds, "written": written, "room": student.room}
    for name, part in parts_of(student, disc, optimizers).items():
        state[name] = part.state_dict()
    with whole_file(run / "checkpoint.pt") as file:
        torch.save(state, file)


def load_checkpoint(
    run: Path,
    student: Student,
    disc: Discriminator | None,
    optimizers: dict[str, torch.optim.Optimizer],
) -> tuple[list[dict], dict[int, dict[str, str]]]:
    """Restore the last finished round; the metrics of all that are done, and what the student
    wrote in each. Both are empty where there is no checkpoint."""
    path = run / "checkpoint.pt"
    if not path.exists():
        return [], {}
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # checksums of all that it holds
                raise ValueError("its checksums are wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts_of(student, disc, optimizers).items():
            part.load_state_dict(state[name])
        student.room = dict(state["room"])
        rounds, written = list(state["rounds"]), dict(state["written"])
        print(f"Going on from round {len(rounds)}.")
    except Exception as error:  # a damaged file can fail in any way
        if data.memory_is_full(error):
            raise
        raise UserError(
            f"{path} is damaged or of another version ({first_line(error)}): start afresh with"
            " --overwrite."
        )
    return rounds, written


# What a run writes into its directory, but for config.json and the lock.
RUN_FILES = ["result.json", "predictions.jsonl", "metrics.jsonl", "checkpoint.pt"]
RUN_FILES += ["discriminator.safetensors", "negatives.jsonl", "student", "losses.png", "scores.png"]


def run_directory(options: Options) -> Path:
    student = re.sub(r"[^\w.-]+", "-", options.student).strip("-")
    name = f"runs/{Path(options.task).stem}-{student}-{options.method}-s{options.seed}"
    return Path(options.out or name).expanduser()


def held(run: Path) -> filelock.AcquireReturnProxy:
    """The lock of a run directory: one process at a time works in it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        waiting = f"{run} is in use by another process: waiting until that ends."
        return data.locked(run / "lock", waiting)
    except OSError as error:
        raise UserError(f"--out {run} cannot be used ({first_line(error)}): name another.")


def inputs_of(options: Options) -> dict[str, str]:
    """A digest of each local file and folder that a run reads, so that none is swapped unseen."""
    named = [options.task, options.student, options.data, options.fixed_student, *options.teacher]
    own = [name for name in named if name not in ("", "tiny", "palm", *data.TASKS)]
    paths = [Path(name).expanduser() for name in own]
    return {str(path.resolve()): data.digest(path) for path in paths if path.exists()}


def open_run(run: Path, options: Options) -> dict[str, Any]:
    """Make the run directory ready: new, or left by a run with the same options and inputs.

    Returns what config.json is to hold; it is written once the inputs were read.
    """
    config = {"options": asdict(options), "inputs": inputs_of(options)}
    for name in ("out", "overwrite", "device", "api_concurrency", "micro_batch"):
        del config["options"][name]  # these may differ in a run that goes on
    present = [name for name in ("config.json", *RUN_FILES) if (run / name).exists()]
    if not present:
        return config
    match read_object(run / "config.json"):
        case {"options": dict(options_before), "inputs": dict(inputs_before)}:
            before = options_before | inputs_before
        case _:
            raise UserError(f"{run} holds a {present[0]} of something else: use another --out.")
    if options.overwrite or not options_before:  # {}: a deletion that was cut short
        delete_run(run, config["inputs"])
        return config
    now = config["options"] | config["inputs"]
    other = []
    for name in before | now:
        if before.get(name) != now.get(name):
            other.append(f"{flag(name) if name in options_before else name} {before.get(name)}")
    if other:
        told = ", ".join(other)
        raise UserError(f"{run} was made with other inputs ({told}): use --out, or --overwrite.")
    return config


def check_samples(run: Path, samples: dict[str, list[Sample]]) -> int:
    """A checksum of the samples. UserError if the run was begun with others."""
    now = zlib.crc32(repr(samples).encode())
    before = read_object(run / "config.json").get("samples", now)
    if before != now:
        raise UserError(
            f"The teacher's samples are not those that {run} was begun with: set QCRD_CACHE as it"
            " was then, or start afresh with --overwrite."
        )
    return now


def delete_run(run: Path, inputs: Iterable[str]) -> None:
    """Delete what this program wrote in a run directory, and nothing else."""
    needed = [Path.cwd(), *map(Path, inputs)]
    if any(path.is_relative_to(run.resolve()) for path in needed):
        raise UserError(
            f"{run} holds the working directory or an input: use --out instead of --overwrite."
        )
    # from here on the run counts as half deleted, until config.json goes last
    write_atomically(run / "config.json", json.dumps({"options": {}, "inputs": {}}))
    for path in [run / name for name in RUN_FILES]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (run / "config.json").unlink()


# --------------------------------------------------------------------------------------------------
# The command line


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


MAY_BE_0 = ["temperature", "toy_errors", "lag", "alpha1", "alpha2", "alpha3", "beta", "delta"]
MAY_BE_0 += ["mi_weight", "seed", "round_steps", "micro_batch"]


def parse(
    kinds: Sequence[Any], description: str | None, argv: Sequence[str] | None, preset: bool = False
) -> dict[str, Any]:
    """The command line as a dict of the fields of these dataclasses; exit code 2 for anything that
    is not among them. With `preset` the method and the student decide the other defaults."""
    parser = HfArgumentParser(
        kinds,
        description=(description or "").split("\n")[0],
        usage="%(prog)s [options]",
        allow_abbrev=False,
        add_help=False,  # the help waits for the presets, so that it tells the defaults that hold
        formatter_class=partial(HelpFormatter, max_help_position=40, width=100),
    )
    if preset:
        first, _ = parser.parse_known_args(argv)
        parser.set_defaults(**presets(first.method, first.student))
    parser.add_argument("-h", "--help", action="help", help="Show this help and end.")
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].replace("_", "-")
        renamed = name.replace("--judge", "--disc").replace("--grad-accum", "--micro-batch")
        told = "not an option" if renamed == name else f"{renamed} now"
        parser.error(f"{unknown[0]} is {told}: see --help")
    return vars(found)


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """The command line as Options, checked; UserError for what makes no sense."""
    kinds = [TaskOptions, MethodOptions, TrainingOptions]
    options = Options(**parse(kinds, __doc__, argv, preset=True))
    for name, value in asdict(options).items():
        least = "at least" if name in MAY_BE_0 else "above"
        if type(value) in (int, float) and not (
            0 < value < math.inf or value == 0 and name in MAY_BE_0
        ):
            raise UserError(f"{flag(name)} is {value}: it must be a finite number, {least} 0.")
    fixed_run = Path(options.fixed_student).expanduser()
    match read_object(fixed_run / "config.json"):
        case {"options": {"method": "dss"}} if (fixed_run / "result.json").exists():
            pass
        case _ if options.negatives == "fixed":
            raise UserError(
                "--negatives fixed needs --fixed-student, a finished dss run's directory."
            )
    if options.student == "tiny" and options.task != "toy":  # before a teacher is paid
        raise UserError(
            f"--student tiny knows the words of --task toy alone: for --task {options.task} name"
            " another, such as --student t5-small."
        )
    if len(set(options.teacher)) < len(options.teacher):
        raise UserError("--teacher names one teacher twice: name each once.")
    if options.api_base:
        data.check_api_base(options.api_base)
    if options.toy_errors > 1:
        raise UserError(f"--toy-errors is {options.toy_errors}: it is a probability, from 0 to 1.")
    return options


def prepare(
    options: Options,
) -> tuple[Task, dict[str, list[Example]], dict[str, list[Sample]], list[Question]]:
    """The task, its splits, the teacher's samples by question id, and the voted questions."""
    task, splits = data.load_task(options.task, options.data, options.train_size)
    samples: dict[str, list[Sample]] = {}
    used = (options.positives, options.negatives) != ("none", "none")
    if used or options.method == "single" or options.labels == "teacher":
        samples = data.collect(task, splits["train"], options.teacher, options)
    return task, splits, samples, vote(task, splits["train"], samples, options)


def report(
    task: Task, examples: list[Example], samples: dict[str, list[Sample]], questions: list[Question]
) -> None:
    """Print what the vote did, and how often it and each teacher are right."""
    drawn = fmean(map(len, samples.values()))
    positives = fmean(len(q.positives) for q in questions)
    negatives = fmean(len(q.negatives) for q in questions)
    without = sum(not q.positives for q in questions)
    print(
        f"{len(questions)} questions with {drawn:.2f} samples, {positives:.2f} positives and"
        f" {negatives:.2f} negatives on average, {without} without positives"
    )
    marks: dict[str, list[bool | None]] = defaultdict(list)  # None: a sample without an answer
    for example in examples:
        answers = [(s.teacher, task.key(s.answer)) for s in samples.get(example.id, [])]
        winner, _, _ = self_consistency([answer for _, answer in answers])
        for name, answer in [("voted answer", winner), *answers]:
            marks[name].append(None if answer is None else answer == task.key(example.label))
    for name, of_name in marks.items():
        unread = of_name.count(None)
        share = of_name.count(True) / max(1, len(of_name) - unread)
        print(f"{name}: {share:.1%} of {len(of_name) - unread} right, {unread} without an answer")


def finish(
    student: Student,
    disc: Discriminator | None,
    task: Task,
    splits: dict[str, list[Example]],
    run: Path,
    options: Options,
) -> dict[str, float]:
    """Save the student and the discriminator, and evaluate the student on both held-out splits."""
    student.model.save_pretrained(run / "student")
    student.tokenizer.save_pretrained(run / "student")
    if disc:
        save_model(disc, str(run / "discriminator.safetensors"))
    valid, _ = evaluate(student, task, splits, "valid", options)
    test, rows = evaluate(student, task, splits, "test", options)
    write_jsonl(run / "predictions.jsonl", rows)
    show_predictions(splits["test"], rows)
    return test | {f"validation {name}": value for name, value in valid.items()}


def show_predictions(examples: list[Example], rows: list[dict[str, Any]]) -> None:
    """Print three test questions, and what the student explains and answers."""
    marks = {True: "right", False: "wrong", None: "not checked"}
    for example, row in list(zip(examples, rows, strict=True))[:3]:
        print(f"\nQuestion: {example.input}\nLabel: {example.label}")
        if "rationale" in row:
            print(f"The student explains: {row['rationale']} ({marks[row['valid']]})")
        print(f"The student answers: {row['label']} ({marks[row['correct']]})")
    print()


def execute(run: Path, options: Options) -> dict[str, float]:
    """A run from its inputs to its metrics, or the metrics of a finished one."""
    config = open_run(run, options)
    result = read_object(run / "result.json")
    if not result:
        student = load_student(options.student, options)
        print(describe_device(student))
        task, splits, samples, questions = prepare(options)
        if samples:
            report(task, splits["train"], samples, questions)
        config["samples"] = check_samples(run, samples)
        check_texts(student, questions, options)
        # a student that does not end by itself writes up to the longest text that it learned
        learned = [text for q in questions[:10_000] for text in (q.label, *q.positives)]
        student.model.generation_config.max_new_tokens = target_length(student, learned, 1.0)
        write_atomically(run / "config.json", json.dumps(config, indent=2))
        disc = make_discriminator(student, options)
        last = train(student, disc, questions, run, options)[-1]
        result = finish(student, disc, task, splits, run, options)
        if "AUC" in last:
            result["AUC"] = last["AUC"]
        write_atomically(run / "result.json", json.dumps(result))
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
    print(f"Everything is in {run}/")
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the command line; the test metrics."""
    options = parse_options(argv)
    run = run_directory(options)
    with held(run):
        return execute(run, options)


def run_command(command: Callable[[], Any]) -> None:
    """Run a command line; bad input and signals end it with one sentence and their exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # a console may be other than UTF-8
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    code, said = 2, ""
    try:
        command()
        sys.stdout.flush()
        return
    except UserError as error:
        said = f"error: {error}"
    except (RuntimeError, MemoryError) as error:
        if not data.memory_is_full(error):
            raise
        said = f"error: memory is full ({first_line(error)}): close other programs, or train a"
        said += " smaller --student."
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # what follows is short
            signal.signal(number, signal.SIG_IGN)
        code, said = 130, "Stopped. Finished rounds are saved; the same command goes on from there"
        said += ", without --overwrite." if "--overwrite" in sys.argv else "."
    except BrokenPipeError:  # the reader of a pipe, such as head, has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        said = f"error: {error.filename or 'a file'} cannot be used ({first_line(error)})."
    if said:
        print(said, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
