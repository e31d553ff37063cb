"""QCRD: Quality-guided Contrastive Rationale Distillation (arXiv 2405.13014) in plain PyTorch.

    python qcrd.py                                                # built-in task and student: no download, no GPU
    python qcrd.py --task anli --student t5-small                 # a real task, with the teacher samples DSS published
    python qcrd.py --task svamp --teacher samples.jsonl           # teacher samples of your own
    python qcrd.py --task my.jsonl --teacher api:MODEL            # a task and a teacher of your own

A large model, the teacher, answers each question several times. A vote splits its rationales into positives and
negatives; more negatives are what the student itself wrote some rounds ago. A discriminator D scores every rationale,
and its scores weigh a contrastive loss. Read down to the double line of #: that is the whole method.

Where this code departs from the paper, or settles what the paper leaves open:
- An iteration is a round: one pass over the training set, at most 500 steps. There are 20 rounds.
- In the rounds before round j the negatives are those of the oldest student there is, of round 0.
- No old student is kept: what the student writes now is queued, and used j rounds later.
- Eq. 2 is blind to a shift of all scores and drifts, so D learns by binary cross-entropy (--judge-loss paper: eq. 2).
- The chosen rationale's own score weighs it (eqs. 6, 7), detached: L_cl never trains D.
- Positives' weights are divided by their mean over the batch, so that only shares count (--quality printed: eq. 6).
- D's encoder is a trained copy of the student's (--judge shared: the student's own, so that L_D shapes the student).
- With a copy, alpha_3 does nothing: AdamW does not feel a factor on a loss whose parameters no other loss touches.
- Which rationale is chosen, and whether it is beyond the margin, is decided without dropout.
- Student and discriminator are clipped apart, each at norm 1.
- A question without positives or negatives has 0 in that term. A tie in the vote goes to the answer that came first.
- The student's negatives end at the length of nine in ten of the teacher's rationales.
"""

import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
import zipfile
import zlib
from argparse import HelpFormatter
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.modeling_outputs import BaseModelOutput

import data
from data import Example, Sample, Task, UserError, first_line

# --------------------------------------------------------------------------------------------------
# Options


def option(default: Any, help: str) -> Any:
    """A field of the command line; a default of None is filled in later, from METHODS, PUBLISHED or TINY."""
    told = "" if default is None or default is False or default == "" else f" (default {default})"
    return field(default=default, metadata={"help": help + told})


@dataclass
class Options:
    # the task and its teacher
    task: str = option(
        "toy", "toy, svamp, cqa, anli, esnli, or a JSON Lines file with input and label in each row"
    )
    data: str = option(data.DSS_ZIP, "the DSS release: a file or a URL")
    train_size: float | None = option(
        None, "how many training questions to use: a count, or a fraction up to 1"
    )
    labels: Literal["gold", "teacher"] = option(
        "gold", "what predict: learns: gold labels, or the voted answers"
    )
    teacher: list[str] = field(default_factory=list, metadata={"help": "palm, a Hugging Face model, api:MODEL, or a JSON Lines file of samples; several are pooled"})  # fmt: skip
    k: int | None = option(None, "K, samples a question (default 5; of a file all)")
    temperature: float = option(0.7, "at which the teacher is sampled")
    api_base: str | None = option(
        None, "an OpenAI-compatible server (or OPENAI_BASE_URL; key in OPENAI_API_KEY)"
    )
    api_concurrency: int = option(8, "requests under way at once")
    max_tokens: int = option(512, "of a teacher's answer")
    toy_errors: float = option(0.4, "how often the toy's teacher reasons wrongly")
    # the method; a baseline is a set of values of these, see METHODS
    method: Literal["finetune", "single", "dss", "mi", "qcrd"] = option(
        "qcrd", "the paper's method or a baseline"
    )
    positives: Literal["all", "one", "none"] = option(None, "rationales to learn: all voted ones, one unvoted, none (default by method)")  # fmt: skip
    negatives: Literal["student", "fixed", "teacher", "none"] = option(None, "the teacher's minority and the lagged student's; a fixed dss student's; the minority alone; none (default by method)")  # fmt: skip
    fixed_student: str | None = option(
        None, "of --negatives fixed: the run directory of a finished dss run"
    )
    judge: Literal["own", "shared", "none"] = option(None, "the discriminator's encoder: a trained copy of the student's, or the student's own; none: no quality weights (default by method)")  # fmt: skip
    judge_loss: Literal["paper", "bce"] = option("bce", "eq. 2, or binary cross-entropy")
    quality: Literal["relative", "printed"] = option("relative", "the positives' quality weights: divided by their mean over the batch, or as eq. 6 prints them")  # fmt: skip
    scheme: Literal["minmax", "maxmin", "sampling", "mean", "wmean"] = option(
        "minmax", "many-to-one (eqs. 4, 5)"
    )
    lag: int = option(5, "j: negatives come from the student as it was j rounds ago")
    student_temperature: float = option(1.5, "at which the student's negatives are sampled")
    alpha1: float = option(None, "weight of L_pred (eq. 8; default 0.5, without rationales 1)")
    alpha2: float = option(0.5, "weight of L_cl (eq. 8)")
    alpha3: float = option(0.5, "weight of L_D (eq. 8); times 0.9 every round")
    beta: float = option(None, "weight of the negatives (eq. 3; default 0.2)")
    delta: float = option(None, "margin of the negatives, in nats per token (default 3; tiny 1)")
    mi_weight: float = option(None, "weight of the mutual-information term (default 0; mi 0.01)")
    judge_lr: float = option(None, "the discriminator's learning rate (default 5e-5; tiny 1e-3)")
    judge_steps: int = option(
        None, "of the discriminator's pretraining (default 500, the paper's most; tiny 300)"
    )
    judge_every: int = option(
        None, "steps between two updates of the discriminator (default 4; tiny 8)"
    )
    # the training
    student: str = option("tiny", "tiny, or a seq2seq model: a Hugging Face name or a folder")
    rounds: int = option(None, "the paper's iterations (default 20; tiny 10)")
    round_steps: int = option(
        None, "steps in a round (default: one pass over the training set, at most 500)"
    )
    batch_size: int = option(None, "questions a step (default 64; tiny 16)")
    grad_accum: int = option(1, "parts in which a batch is computed, to save memory")
    lr: float = option(
        None, "AdamW's learning rate, falling linearly to 0 (default 5e-5; tiny 3e-3)"
    )
    max_input: int = option(1024, "tokens at which inputs are cut")
    max_target: int = option(256, "tokens at which labels and rationales are cut")
    precision: Literal["auto", "fp32", "bf16"] = option(
        "auto", "auto: bf16 on a GPU that has it in hardware"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    seed: int = option(0, "of everything random in training")
    out: str | None = option(None, "run directory (default runs/TASK-STUDENT-METHOD-sSEED)")
    overwrite: bool = option(False, "start afresh in a run directory that is in use")


# A method is a set of option values; any of them can be set by hand. Only `single` needs a line of its own, in vote.
WITHOUT_RATIONALES = {"positives": "none", "negatives": "none", "judge": "none", "alpha1": 1.0}
METHODS: dict[str, dict[str, Any]] = {
    "finetune": WITHOUT_RATIONALES,
    "single": WITHOUT_RATIONALES,
    "dss": {"positives": "one", "negatives": "none", "judge": "none"},
    "mi": {"positives": "one", "negatives": "none", "judge": "none", "mi_weight": 0.01},
    "qcrd": {"positives": "all", "negatives": "student", "judge": "own"},
}
# Batch and learning rate of DSS (arXiv 2305.02301), and the paper's most for the discriminator's pretraining.
PUBLISHED = {"rounds": 20, "batch_size": 64, "lr": 5e-5, "beta": 0.2, "delta": 3.0}
PUBLISHED |= {"judge_lr": 5e-5, "judge_steps": 500, "judge_every": 4}
# For tiny, chosen on its validation split: the README has the figures.
TINY = {"rounds": 10, "batch_size": 16, "lr": 3e-3, "beta": 0.2, "delta": 1.0}
TINY |= {"judge_lr": 1e-3, "judge_steps": 300, "judge_every": 8}
TINY_LR = {"finetune": 1e-3, "single": 5e-3}  # where another rate than TINY's is best
ALPHA3_DECAY = 0.9
ROUND_STEPS = (
    500  # at most in a round by default: a set of any size has rounds enough for the lag to act
)
WARMUP = 50  # steps in which the learning rate rises
ANSWER_MARK = "So the answer is"  # between rationale and label in the single-task target

# --------------------------------------------------------------------------------------------------
# The discriminator: how good is rationale r for question x?


class Discriminator(nn.Module):
    """D(x, r) -> s in (0, 1), the quality of a rationale (eq. 1): encoder, max pooling over tokens, two linear layers.

    `encoder` maps (input_ids, attention_mask) to an object with `last_hidden_state` (N, S, width), as the encoder
    of any seq2seq model of transformers does.
    """

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores s, (N,), float32, of question and rationale in one sequence, (N, S)."""
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state  # (N, S, width)
        pooled = states.masked_fill(attention_mask[..., None] == 0, -torch.inf).amax(
            1
        )  # (N, width)
        return torch.sigmoid(self.mlp(pooled).float().squeeze(-1))


# --------------------------------------------------------------------------------------------------
# The losses: pure functions of tensors. Row i is a question, column j one of its rationales, positives and negatives
# side by side; masks and shares say which are which. l is l(f(x), r): the token-mean cross-entropy of rationale r under
# the student f, in nats per token.

SCHEMES = {"minmax": ("min", "max"), "maxmin": ("max", "min")} | {
    s: (s, s) for s in ("sampling", "mean", "wmean")
}


def choose(l: Tensor, mask: Tensor, pick: str, quality: Tensor | None = None) -> Tensor:
    """The share, (N, R), that each rationale has in its question's term: many-to-one by pick (eqs. 4, 5).

    l (N, R) in nats per token, mask (N, R) which rationales exist; "wmean" shares by quality (N, R). A row of shares
    adds up to 1, or to 0 where there is no rationale. ValueError for an unknown pick.
    """
    if not mask.any():
        return mask.float()
    if pick in ("min", "max"):
        best = (l if pick == "max" else -l).masked_fill(~mask, -torch.inf).argmax(1)
        return F.one_hot(best, l.shape[1]) * mask.float()
    if pick == "sampling":
        drawn = torch.rand_like(l).masked_fill(~mask, -1).argmax(1)
        return F.one_hot(drawn, l.shape[1]) * mask.float()
    if pick not in ("mean", "wmean"):
        raise ValueError(f"pick {pick!r} is not one of min, max, sampling, mean, wmean")
    share = mask.float() if pick == "mean" or quality is None else mask * quality
    return share / share.sum(1, keepdim=True).clamp(min=1e-9)


def quality_weights(score: Tensor, pos_share: Tensor, quality: str = "printed") -> Tensor:
    """How much each rationale weighs, (N, R), by D's scores (N, R): s if positive (eq. 6), 1 - s if negative (eq. 7).

    The positives are those with a share in pos_share (N, R). "printed" is the equations. "relative" divides the
    positives' weights by their mean over the batch, so that quality decides their shares in the term and not its size.
    """
    pos = score
    if quality == "relative":
        pos = score / ((pos_share * score).sum() / pos_share.sum().clamp(min=1e-9)).clamp(min=1e-9)
    return torch.where(pos_share > 0, pos, 1 - score)


def contrastive_loss(
    l: Tensor,
    pos_share: Tensor,
    neg_share: Tensor,
    weight: Tensor | None = None,
    beta: float = 0.2,
    delta: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_cl of eqs. 3 to 7, a scalar, and its two terms before beta for each question: (loss, positive, negative (N,)).

    l (N, R) in nats per token; shares (N, R) say what the positive and the negative term consist of; weight (N, R) is
    the quality weight, 1 without it, and gets no gradient: L_cl never trains D.
    """
    weight = torch.ones_like(l) if weight is None else weight.detach()
    pos = (pos_share * weight * l).sum(1)  # eqs. 4, 6
    below = -F.relu(
        delta - l
    )  # min(l - delta, 0): a negative that is already unlikely pushes no more
    neg = (neg_share * weight * below).sum(1)  # eqs. 5, 7
    return (pos - beta * neg).mean(), pos, neg  # eq. 3


POSITIVE, TEACHERS, STUDENTS = (
    1,
    2,
    3,
)  # what a place of (N, R) holds: a positive, or whose negative; 0 is nothing


def judge_terms(kind: Tensor, loss: str) -> int:
    """Over how many terms L_D is a mean: questions that have both sides ("paper"), or all rationales ("bce")."""
    if loss == "bce":
        return int((kind > 0).sum())
    return int(((kind == POSITIVE).any(1) & (kind > POSITIVE).any(1)).sum())


def judge_loss(
    score: Tensor, kind: Tensor, loss: str = "paper", terms: float | None = None
) -> Tensor:
    """L_D, a scalar, from D's scores (N, R) and the kind (N, R) of each rationale: 1 is a positive, more a negative.

    "paper" is eq. 2, the mean of -log(sum_j exp(s_pos_j) / sum_j exp(s_neg_j)); "bce" is binary cross-entropy. Both are
    means over `terms`, by default judge_terms; a part of a batch names the whole batch's. 0 where there is none.
    """
    if loss == "bce":
        chance = torch.where(kind == POSITIVE, score, 1 - score)[kind > 0]  # that D says what is so
        total = -chance.clamp(min=1e-6).log().sum()
    else:
        both = (kind == POSITIVE).any(1) & (kind > POSITIVE).any(1)
        score, kind = score[both], kind[both]
        pos = score.masked_fill(kind != POSITIVE, -torch.inf).logsumexp(1)
        total = (score.masked_fill(kind <= POSITIVE, -torch.inf).logsumexp(1) - pos).sum()
    return total / max(1e-9, judge_terms(kind, loss) if terms is None else terms)


def mutual_information_loss(pred_probs: Tensor, expl_probs: Tensor) -> Tensor:
    """MI's term (arXiv 2403.03348), (N,): cross-entropy between the vocabulary distributions (N, V) of the two tasks.

    Each is the max over its decoder positions of the softmax; the prediction's side is detached.
    """
    return -(pred_probs.detach() * expl_probs.clamp(min=1e-9).log()).sum(1)


# --------------------------------------------------------------------------------------------------
# The vote: positives and negatives


def self_consistency(
    answers: Sequence[Hashable | None],
) -> tuple[Hashable | None, list[int], list[int]]:
    """Vote over the answers of one question's samples: (winner, indices of positives, indices of negatives).

    None is an answer that could not be parsed; it has no vote and its sample is neither positive nor negative.
    A tie goes to the answer whose first sample came first. Without any answer the winner is None.
    """
    votes: dict[Hashable, int] = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    if not votes:
        return None, [], []
    winner = max(
        votes, key=lambda answer: votes[answer]
    )  # dicts keep the order of first appearance, max the first
    positives = [i for i, answer in enumerate(answers) if answer == winner]
    return (
        winner,
        positives,
        [i for i, answer in enumerate(answers) if answer is not None and answer != winner],
    )


@dataclass
class Question:
    """A training question after the vote."""

    example: Example
    label: str  # what predict: learns
    positives: list[str]
    negatives: list[str]  # the teacher's minority; the student's own join later, round by round
    held_out: bool = False  # D never trains on it, so that its AUC means something


def vote(
    task: Task, examples: list[Example], samples: dict[str, list[Sample]], options: Options
) -> list[Question]:
    """Turn each question's samples into positives and negatives. UserError if no question has a label."""
    questions = []
    for number, example in enumerate(examples):
        own = samples.get(example.id, [])
        _, pos, neg = self_consistency([task.key(sample.answer) for sample in own])
        first = unique(sample.rationale for sample in own)[:1]
        label: str | None = example.label
        if options.labels == "teacher":
            label = own[pos[0]].answer if pos else None
        if label is None:
            continue  # without a gold label a question without a vote teaches nothing
        if options.method == "single":  # one target: rationale, then label
            label = " ".join([*first, ANSWER_MARK, label])
        sides = {"all": unique(own[i].rationale for i in pos), "one": first, "none": []}
        negatives = unique(own[i].rationale for i in neg) if options.negatives != "none" else []
        questions.append(
            Question(example, label, sides[options.positives], negatives, held_out=number % 10 == 9)
        )
    if not questions:
        raise UserError(
            "no training question has a label: --labels teacher needs samples with answers that parse."
        )
    return questions


def unique(texts: Iterable[str]) -> list[str]:
    """Each text once, in the order in which they come, without empty ones."""
    return list(dict.fromkeys(text for text in texts if text))


# --------------------------------------------------------------------------------------------------
# One training step. `models` holds the student, D and their tokenizer. It gives encode(texts), the student's encoder
# states; loss_of(...), l(f(x), r) of the rationales that a mask names; and score(...), D(x, r) of them.

Figures = dict[str, float]  # means over a batch, by name
Drawn = dict[
    str, list[str]
]  # further negatives by question id, most of them what the student wrote


class Batch(NamedTuple):
    """The N questions of a step and what is settled about their R rationales; all of it can be cut into rows."""

    questions: list[Question]
    texts: list[list[str]]
    kind: Tensor  # (N, R)
    pos_share: Tensor  # (N, R), from choose
    neg_share: Tensor  # (N, R), likewise, and 0 beyond the margin
    weight: Tensor  # (N, R), quality weights


def lay_out(questions: list[Question], drawn: Drawn) -> tuple[list[list[str]], Tensor]:
    """Each question's rationales, positives, teacher's negatives and drawn ones, and the kind (N, R) of each."""
    texts = [q.positives + q.negatives + drawn.get(q.example.id, []) for q in questions]
    kind = torch.zeros(len(texts), max(map(len, texts), default=0), dtype=torch.long)
    for row, q, own in zip(kind, questions, texts, strict=True):
        row[: len(own)] = STUDENTS
        row[: len(q.positives) + len(q.negatives)] = TEACHERS
        row[: len(q.positives)] = POSITIVE
    return texts, kind


@torch.no_grad()
def weigh(models: "Models", questions: list[Question], drawn: Drawn) -> Batch:
    """Which rationales of a batch count in L_cl, and how much, without gradients: eqs. 4 to 7 but for l itself.

    Min, max and margin leave most rationales without a gradient, so that all are read here, and only the chosen ones
    again in `student_losses`.
    """
    options = models.options
    texts, kind = lay_out(questions, drawn)
    kind = kind.to(models.device)
    is_pos, is_neg = kind == POSITIVE, kind > POSITIVE
    l = torch.zeros(kind.shape, device=models.device)
    score, weight = torch.full_like(l, 0.5), torch.ones_like(l)
    compared = is_neg | (
        is_pos & (is_pos.sum(1, keepdim=True) > 1)
    )  # an only positive is chosen at any l
    with models.constant():
        if compared.any():
            l = models.loss_of(
                models.encode([f"explain: {q.example.input}" for q in questions]), texts, compared
            )
        if models.judge is not None and options.scheme == "wmean":
            score = models.score(questions, texts, kind > 0)
        pos_pick, neg_pick = SCHEMES[options.scheme]
        pos_share = choose(l, is_pos, pos_pick, score)
        neg_share = choose(l, is_neg, neg_pick, 1 - score) * (l < options.delta)
        if (
            models.judge is not None and options.scheme != "wmean"
        ):  # there quality decides the shares instead
            score = models.score(questions, texts, pos_share + neg_share > 0)
            weight = quality_weights(score, pos_share, options.quality)
    return Batch(questions, texts, kind, pos_share, neg_share, weight)


def student_losses(models: "Models", batch: Batch) -> tuple[Tensor, Tensor, Tensor, Figures]:
    """L_pred, L_cl and MI's term of a batch, scalars with gradients, and its figures."""
    options, questions = models.options, batch.questions
    chosen = batch.pos_share + batch.neg_share > 0
    n, r = chosen.shape
    # one pass for both tasks: a row a question for predict:, then one for explain:, whose states serve all its rationales
    tasks = ["predict", "explain"] if chosen.any() else ["predict"]
    encoded = models.encode([f"{task}: {q.example.input}" for task in tasks for q in questions])
    where = torch.zeros(2 * n, max(1, r), dtype=torch.bool)
    where[:n, 0], where[n:, :r] = True, chosen
    l = models.loss_of(encoded, [[q.label] for q in questions] + batch.texts, where)
    L_pred = l[:n, 0].mean()
    shares = batch.pos_share, batch.neg_share
    L_cl, pos, neg = contrastive_loss(l[n:, :r], *shares, batch.weight, options.beta, options.delta)
    figures = {"L_pred": L_pred.item()}
    if options.positives != "none":
        figures |= {"L_positive": pos.mean().item(), "L_negative": neg.mean().item()}
        figures["no positive"] = (batch.kind != POSITIVE).all(1).float().mean().item()
        figures["no negative"] = (batch.kind <= POSITIVE).all(1).float().mean().item()
    L_mi = torch.zeros_like(L_pred)
    rows = [i for i, q in enumerate(questions) if q.positives and options.mi_weight]
    if rows:
        pred = models.likeliest(encoded, rows, [questions[i].label for i in rows])
        expl = models.likeliest(
            encoded, [n + i for i in rows], [questions[i].positives[0] for i in rows]
        )
        L_mi = mutual_information_loss(pred, expl).sum() / n
    return L_pred, L_cl, L_mi, figures


def discriminator_loss(
    models: "Models", questions: list[Question], drawn: Drawn, terms: int | None = None
) -> tuple[Tensor, Figures]:
    """L_D of questions, a scalar with gradients, over `terms` as in `judge_loss`; and its figures."""
    texts, kind = lay_out(questions, drawn)
    score = models.score(questions, texts, kind > 0)
    kind = kind.to(score.device)
    figures = {"L_judge": judge_loss(score, kind, models.options.judge_loss).item()}
    for number, name in enumerate(("D pos", "D teacher neg", "D student neg"), POSITIVE):
        if (kind == number).any():
            figures[name] = score[kind == number].mean().item()
    return judge_loss(score, kind, models.options.judge_loss, terms), figures


def train_step(
    models: "Models", optimizers: list[torch.optim.Optimizer], questions: list[Question], drawn: Drawn,
    round_: int, step: int,
) -> list[Figures]:  # fmt: skip
    """One step of both optimizers on a batch of questions; its parts' figures. UserError if a loss is not finite.

    L_total = alpha_1 L_pred + alpha_2 L_cl + alpha_3 L_D, eq. 8, plus MI's term where that is asked for: a sum, whose
    terms go backward one after the other, so that one graph is in memory at a time.
    """
    options = models.options
    torch.manual_seed(step_seed(options.seed, step, "step"))  # dropout, and scheme "sampling"
    models.parts.zero_grad()
    batch = weigh(models, questions, drawn)
    seen: list[Figures] = []
    for rows in parts(len(questions), options.grad_accum):
        part = Batch._make(value[rows] for value in batch)
        L_pred, L_cl, L_mi, figures = student_losses(models, part)
        total = (
            options.alpha1 * L_pred + options.alpha2 * L_cl + options.mi_weight * L_mi
        )  # eq. 8, but for L_D
        (len(part.questions) / len(questions) * total).backward()
        seen.append(figures)
    judged = judged_questions(questions, options, step) if models.judge is not None else []
    terms = judge_terms(lay_out(judged, drawn)[1], options.judge_loss)
    for rows in parts(len(judged), options.grad_accum) if terms else []:
        L_D, figures = discriminator_loss(models, judged[rows], drawn, terms)
        (options.alpha3 * ALPHA3_DECAY**round_ * L_D).backward()  # eq. 8's last term
        seen.append(figures)
    if not all(math.isfinite(value) for figures in seen for value in figures.values()):
        ids = ", ".join(q.example.id for q in questions[:5])
        raise UserError(
            f"the loss is not finite at step {step} ({ids}): lower --lr or use --precision fp32."
        )
    if terms:
        update(optimizers[1])
    optimizers[0].param_groups[0]["lr"] = learning_rate(options, step)
    update(optimizers[0])
    return seen


def update(optimizer: torch.optim.Optimizer) -> None:
    """One step on the gradients that have gathered, clipped at norm 1: student and D apart, so that neither steers
    the other's step."""
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def judged_questions(questions: list[Question], options: Options, step: int) -> list[Question]:
    """What D learns from: every `judge_every` steps a random part of the batch."""
    if step % options.judge_every:
        return []
    rows = [i for i, q in enumerate(questions) if not q.held_out]
    rng = random.Random(step_seed(options.seed, step, "judge"))
    return [questions[i] for i in sorted(rng.sample(rows, min(judge_batch(options), len(rows))))]


def judge_batch(options: Options) -> int:
    """Questions whose rationales D reads in a step: about as much work as a batch of the student's."""
    return max(8, options.batch_size // 4)


def learning_rate(options: Options, step: int) -> float:
    """Rises for WARMUP steps, falls to 0 linearly."""
    return (
        options.lr
        * min(1, (step + 1) / WARMUP)
        * (1 - step / (options.rounds * options.round_steps))
    )


# --------------------------------------------------------------------------------------------------
# Negatives from the student j rounds ago, and D's pretraining


def source_round(round_: int, lag: int) -> int:
    """The round whose student wrote the negatives that `round_` trains on: j before, or the oldest there is."""
    return max(round_ - lag, 0)


def negatives_of(models: "Models", questions: list[Question], round_: int, run: Path) -> Drawn:
    """The student's negatives of a round, by question id.

    At the start of a round the student writes one rationale, hot, for each question of the rounds that will train on
    this round's student. They wait as files in the run directory, so that no old student need be kept. With
    --negatives fixed a finished dss student writes instead, in round 0 and for all rounds.
    """
    options = models.options
    if options.negatives not in ("student", "fixed"):
        return {}
    lag = options.rounds if options.negatives == "fixed" else options.lag
    fed = [later for later in range(round_, options.rounds) if source_round(later, lag) == round_]
    batches = [batch for later in fed for batch in round_batches(questions, options, later)]
    asked = {q.example.id: f"explain: {q.example.input}" for batch in batches for q in batch}
    path = run / "negatives" / f"round-{round_:03d}.jsonl"
    if asked and not path.exists():
        limit = rationale_limit(models, questions)
        if options.negatives == "fixed":
            models = load_models(
                replace(options, student=f"{options.fixed_student}/student", judge="none")
            )
        torch.manual_seed(step_seed(options.seed, round_, "draw"))
        writing = f"negatives of round {round_}"
        texts = models.generate(list(asked.values()), limit, options.student_temperature, writing)
        write_jsonl(
            path, ({"id": id, "output": text} for id, text in zip(asked, texts, strict=True))
        )
    source = run / "negatives" / f"round-{source_round(round_, lag):03d}.jsonl"
    rows = data.parse_jsonl(data.read_file(source), str(source))
    return {row["id"]: [row["output"]] for _, row in rows if row["output"]}


def corrupt(rng: random.Random, text: str, words: Sequence[str]) -> str:
    """A negative made of a positive: three words in ten masked or replaced by others' words, at least one."""
    out = text.split()
    for i in rng.sample(range(len(out)), max(1, round(0.3 * len(out)))):
        out[i] = "<extra_id_0>" if rng.random() < 0.5 else rng.choice(words)
    return " ".join(out)


def pretrain_judge(
    models: "Models", questions: list[Question], optimizer: torch.optim.Optimizer
) -> None:
    """Train D on the teacher's positives and negatives; corrupted positives make the classes even."""
    options = models.options
    rng = random.Random(step_seed(options.seed, 0, "judge"))
    torch.manual_seed(step_seed(options.seed, 0, "judge"))
    known = [q for q in questions if q.positives and not q.held_out]
    words = [word for q in known[:1000] for word in q.positives[0].split()]
    for _ in tqdm(
        range(options.judge_steps if known else 0), desc="discriminator", unit="step", leave=False
    ):
        batch = rng.sample(known, min(judge_batch(options), len(known)))
        made: Drawn = {}
        for q in batch:
            made[q.example.id] = [
                corrupt(rng, rng.choice(q.positives), words)
                for _ in q.positives[len(q.negatives) :]
            ]
        models.parts.zero_grad()
        discriminator_loss(models, batch, made)[0].backward()
        update(optimizer)


# --------------------------------------------------------------------------------------------------
# The training loop


def round_batches(questions: list[Question], options: Options, round_: int) -> list[list[Question]]:
    """The batches of a round: its steps of an endless row of passes over the training set.

    A pass is shuffled by seed and number; the questions of a batch are alike in length, so that little is padding.
    """
    size = options.batch_size
    a_pass = math.ceil(len(questions) / size)
    first = round_ * options.round_steps
    batches: list[list[Question]] = []
    for number in range(first // a_pass, (first + options.round_steps - 1) // a_pass + 1):
        rng = random.Random(step_seed(options.seed, number, "order"))
        order = rng.sample(questions, len(questions))
        pools = [order[i : i + 20 * size] for i in range(0, len(order), 20 * size)]
        for pool in pools:
            pool.sort(key=lambda q: len(q.example.input))
        own = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
        batches += rng.sample(own, len(own))
    return batches[first % a_pass :][: options.round_steps]


def train(models: "Models", questions: list[Question], run: Path) -> list[dict[str, Any]]:
    """All rounds, from the last checkpoint where there is one; the metrics of each round."""
    options = models.options
    optimizers = make_optimizers(models)
    rounds = load_checkpoint(run, models, optimizers)  # the metrics of the rounds that are done
    if rounds is None:
        rounds = []
        if models.judge is not None:
            pretrain_judge(models, questions, optimizers[1])
            print(
                f"discriminator pretrained: AUC {judge_auc(models, questions):.3f} on held-out questions"
            )
        save_checkpoint(run, models, optimizers, rounds)
    done, total = len(rounds) * options.round_steps, options.rounds * options.round_steps
    with tqdm(total=total, initial=done, desc="training", unit="step", mininterval=0.5) as bar:
        for round_ in range(len(rounds), options.rounds):
            began = time.monotonic()
            drawn = negatives_of(models, questions, round_, run)
            drawing = time.monotonic() - began
            seen: list[Figures] = []
            batches = round_batches(questions, options, round_)
            for step, batch in enumerate(batches, round_ * options.round_steps):
                seen += train_step(models, optimizers, batch, drawn, round_, step)
                bar.update()
            seconds = time.monotonic() - began
            speed = {
                "examples/s": sum(map(len, batches)) / seconds,
                "drawing share": drawing / seconds,
            }
            means = means_of(seen)
            rounds.append({"round": round_} | means | judge_check(models, questions, means) | speed)
            tqdm.write(table_row(rounds[-1], header=bar.n == done + options.round_steps))
            write_jsonl(run / "metrics.jsonl", rounds)
            save_checkpoint(run, models, optimizers, rounds)
    return rounds


# ##################################################################################################
# From here on machinery. Nothing below changes the method.
# ##################################################################################################

# --------------------------------------------------------------------------------------------------
# Models: from text through the student and D


class Models:
    """The student, its discriminator (None where the method has none) and their tokenizer, on one device."""

    def __init__(
        self, student: Any, tokenizer: Any, judge: Discriminator | None, options: Options
    ) -> None:
        self.student, self.tokenizer, self.options = student, tokenizer, options
        self.judge: Any = judge
        self.parts = nn.ModuleList([student] if judge is None else [student, judge])
        self.device = next(student.parameters()).device
        self.bf16 = options.precision == "bf16"
        if options.precision == "auto":
            self.bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(
                including_emulation=False
            )
        width = student.get_input_embeddings().weight.shape[1]
        # rationales that are read at once: a GPU wants many, a CPU little padding and what its caches hold (T5-small: 8, 1.2
        # times as fast as 16; tiny: 128, with D's AUC in 0.6 of the time that 512 take)
        self.group_size = 64 if self.device.type == "cuda" else max(1, min(128, 2**21 // width**2))

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def constant(self) -> Iterator[None]:
        """No dropout and no gradients inside."""
        self.parts.eval()
        with torch.no_grad():
            yield
        self.parts.train()

    def tokens(
        self, texts: list[str], limit: int, pairs: list[str] | None = None
    ) -> dict[str, Tensor]:
        """input_ids and attention_mask, (N, S), of texts, or of pairs of texts, cut at `limit` tokens."""
        batch = self.tokenizer(
            texts, pairs, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )  # fmt: skip
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def lengths(self, texts: Iterable[str]) -> list[int]:
        """How many tokens each text has."""
        return [len(ids) for ids in self.tokenizer([*texts, ""], verbose=False).input_ids[:-1]]

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The student's encoder states (N, S, width) and their mask (N, S)."""
        batch = self.tokens(texts, self.options.max_input)
        with self.autocast():
            return self.student.get_encoder()(**batch).last_hidden_state, batch["attention_mask"]

    def logits(
        self, encoded: tuple[Tensor, Tensor], rows: Any, targets: list[str]
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced logits (n, L, V) of targets for these rows of encoder states, and labels (n, L), -100 is none."""
        batch = self.tokens(targets, self.options.max_target)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        states, mask = (tensor[rows] for tensor in encoded)
        output = self.student(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=self.student.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        )
        return output.logits.float(), labels

    def loss_of(
        self, encoded: tuple[Tensor, Tensor], texts: list[list[str]], where: Tensor
    ) -> Tensor:
        """l(f(x), r), (N, R), in nats per token, of the texts that `where` (N, R) names; 0 elsewhere."""
        grid = torch.zeros(where.shape, device=self.device)
        with self.autocast():  # around all groups: inside it the weights turn to bf16 once
            for at, targets in self.groups(texts, where):
                logits, labels = self.logits(encoded, at[0], targets)
                token = F.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="none"
                ).view(labels.shape)
                grid = grid.index_put(at, token.sum(1) / (labels != -100).sum(1))
        return grid

    def likeliest(
        self, encoded: tuple[Tensor, Tensor], rows: list[int], targets: list[str]
    ) -> Tensor:
        """For MI: the max over a target's positions of the softmax, (n, V)."""
        with self.autocast():
            logits, labels = self.logits(encoded, rows, targets)
        return logits.softmax(2).masked_fill(labels[..., None] == -100, 0).amax(1)

    def score(self, questions: Sequence[Question], texts: list[list[str]], where: Tensor) -> Tensor:
        """D(x, r), (N, R), of the rationales that `where` (N, R) names; 0 elsewhere."""
        grid = torch.zeros(where.shape, device=self.device)
        with self.autocast():
            for at, rationales in self.groups(texts, where):
                inputs = [questions[i].example.input for i in at[0].tolist()]
                grid = grid.index_put(
                    at, self.judge(**self.tokens(inputs, self.options.max_input, rationales))
                )
        return grid

    def groups(
        self, texts: list[list[str]], where: Tensor
    ) -> Iterator[tuple[tuple[Tensor, Tensor], list[str]]]:
        """The texts that `where` (N, R) names, with their (rows, columns), in groups of like length.

        On a CPU 1.4 times as fast as all at once with T5-small's shape, and the groups bound the memory.
        """
        places = sorted(where.nonzero().tolist(), key=lambda at: -len(texts[at[0]][at[1]]))
        for first in range(0, len(places), self.group_size):
            group = places[first : first + self.group_size]
            rows, columns = torch.tensor(group, device=self.device).T
            yield (rows, columns), [texts[i][j] for i, j in group]

    def generate(
        self, inputs: list[str], limit: int, temperature: float = 0, desc: str = "writing"
    ) -> list[str]:
        """What the student writes for each input: greedy, or sampled where temperature > 0. Longest inputs first."""
        order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
        how: Any = {"do_sample": temperature > 0, "max_new_tokens": limit}
        if temperature:
            how |= {"temperature": temperature, "top_k": 0}
        texts = [""] * len(inputs)
        with (
            tqdm(total=len(inputs), desc=desc, unit="question", leave=False) as bar,
            self.constant(),
            self.autocast(),
        ):
            for i in range(0, len(order), WRITE_BATCH):
                at = order[i : i + WRITE_BATCH]
                batch = self.tokens([inputs[j] for j in at], self.options.max_input)
                output = self.student.generate(**batch, **how)
                for j, text in zip(
                    at, self.tokenizer.batch_decode(output, skip_special_tokens=True), strict=True
                ):
                    texts[j] = text.strip()
                bar.update(len(at))
        return texts


WRITE_BATCH = 512  # questions answered at once


def load_models(options: Options) -> Models:
    """The student named by --student and a discriminator started from its encoder; UserError if unusable."""
    path = str(data.tiny_student()) if options.student == "tiny" else options.student
    attention = "eager" if options.student == "tiny" else None  # 4% faster for matrices so small
    said, how = (
        f"--student {options.student}",
        {"trust_remote_code": False, "attn_implementation": attention},
    )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        student: Any = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32, **how)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{said} is not a seq2seq model with its tokenizer: {first_line(error)}")
    device = (
        options.device
        if options.device != "auto"
        else "cuda"
        if torch.cuda.is_available()
        else "cpu"
    )
    try:
        student.to(device).train()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device} cannot be used: {first_line(error)}")
    if tokenizer("a").input_ids[-1:] != [tokenizer.eos_token_id]:
        tokenizer.add_eos_token = (
            True  # T5Gemma's: without an end in its labels a student never learns to stop
        )
    ids = tokenizer("predict: explain:").input_ids
    longest = getattr(student.config, "max_position_embeddings", None) or options.max_input
    rows = student.get_input_embeddings().weight.shape[0]
    if tokenizer.unk_token_id in ids or ids[-1] != tokenizer.eos_token_id or len(tokenizer) > rows:
        raise UserError(
            f"{said} came without a tokenizer that fits it: add its own tokenizer files."
        )
    if longest < options.max_input:
        raise UserError(f"{said} reads {longest} tokens at most: add --max-input {longest}.")
    # a student writes greedily or as --student-temperature says, not with the beams, penalties, least lengths and
    # forced tokens of the generation config that it came with
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    student.generation_config = GenerationConfig(
        **{key: getattr(student.generation_config, key) for key in kept}
    )
    judge = None
    if options.judge != "none":
        torch.manual_seed(step_seed(options.seed, 0, "mlp"))
        encoder = (
            student.get_encoder() if options.judge == "shared" else deepcopy(student.get_encoder())
        )
        with torch.no_grad():
            states = encoder(input_ids=torch.tensor([ids], device=device)).last_hidden_state
        judge = Discriminator(encoder, states.shape[-1]).to(device)
    return Models(student, tokenizer, judge, options)


def parts(n: int, count: int) -> list[slice]:
    """n rows in at most `count` parts of like size."""
    size = math.ceil(n / count)
    return [slice(first, first + size) for first in range(0, n, size or 1)]


# --------------------------------------------------------------------------------------------------
# Scoring: a round's figures, D's AUC, label accuracy


def means_of(seen: list[Figures]) -> Figures:
    """Each figure's mean over the steps that have it."""
    names = dict.fromkeys(name for figures in seen for name in figures)
    return {name: fmean(figures[name] for figures in seen if name in figures) for name in names}


def judge_check(
    models: Models, questions: list[Question], means: dict[str, float]
) -> dict[str, float]:
    """D's AUC on held-out questions, and a warning where D is of no use; nothing without D or without a pair."""
    if models.judge is None:
        return {}
    auc = judge_auc(models, questions)
    if auc < 0.55 or max(means.get("D pos", 1), means.get("D teacher neg", 1)) < 0.05:
        tqdm.write(
            "warning: the discriminator is near chance, or its scores have collapsed: lower --judge-lr."
        )
    return {} if math.isnan(auc) else {"D auc": auc}


COLUMNS = {
    "round": "round", "L_pred": "L_pred", "L_positive": "L_pos", "L_negative": "L_neg", "L_judge": "L_D",
    "D pos": "s_pos", "D teacher neg": "s_neg", "D student neg": "s_own", "D auc": "AUC",
    "no positive": "no pos", "no negative": "no neg", "examples/s": "q/s", "drawing share": "drawn",
}  # fmt: skip


def table_row(row: dict[str, Any], header: bool) -> str:
    """A round's figures as a line of a table, under the paper's symbols where the header is asked for."""
    cells = []
    for name in COLUMNS:
        value = row.get(name, "-")
        cells.append(
            f"{value:7.{0 if value >= 20 else 3}f}" if isinstance(value, float) else f"{value:>7}"
        )
    names = "".join(f"{name:>7}" for name in COLUMNS.values())
    return (names + "\n" if header else "") + "".join(cells)


def judge_auc(models: Models, questions: list[Question]) -> float:
    """How often D scores a good rationale above a bad one of the same held-out question (ties count half).

    Good is what the exact check says where there is one (toy), else what the vote said. NaN without a pair.
    """
    held_out = [q for q in questions if q.held_out][:200]
    texts, kind = lay_out(held_out, {})
    with models.constant():
        scores = models.score(held_out, texts, kind > 0).tolist()
    wins = []
    for q, own, row in zip(held_out, texts, scores, strict=True):
        sides: dict[bool | None, list[float]] = {True: [], False: []}
        for text, score in zip(own, row):
            sides[
                data.is_valid(q.example, text) if q.example.story else text in q.positives
            ].append(score)
        wins += [(a > b) + (a == b) / 2 for a in sides[True] for b in sides[False]]
    return sum(wins) / len(wins) if wins else math.nan


def rationale_limit(models: "Models", questions: list[Question]) -> int:
    """Tokens after which a sampled rationale is cut: hot samples rarely end by themselves, and a tail that is longer
    than nine in ten of the teacher's rationales costs time and teaches nothing."""
    texts = [text for q in questions[:1000] for text in q.positives]
    longest = models.options.max_target
    return min(longest, int(np.quantile(models.lengths(texts), 0.9))) if texts else longest


def label_limit(models: Models, train: list[Example]) -> int:
    """Tokens of the longest training label, --max-target at most: room for every label."""
    if models.options.method == "single":  # the label follows a rationale
        return models.options.max_target
    return min(models.options.max_target, max(models.lengths({e.label for e in train})))


def evaluate(
    models: Models, task: Task, splits: dict[str, list[Example]], split: str
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Label accuracy on a split (greedy predict:), where rationales can be checked their validity (greedy explain:); and
    a row for each question."""
    options, examples = models.options, splits[split]
    limit = label_limit(models, splits["train"])
    labels = models.generate(
        [f"predict: {e.input}" for e in examples], limit, desc=f"{split} labels"
    )
    if options.method == "single":
        labels = [text.rpartition(ANSWER_MARK)[2].strip() for text in labels]
    rows: list[dict[str, Any]] = []
    for e, label in zip(examples, labels, strict=True):
        rows.append({"id": e.id, "label": label, "correct": task.correct(label, e)})
    if options.positives != "none":
        inputs = [f"explain: {e.input}" for e in examples]
        rationales = models.generate(inputs, options.max_target, desc=f"{split} rationales")
        for row, e, text in zip(rows, examples, rationales, strict=True):
            row |= {"rationale": text, "valid": data.is_valid(e, text)}
    checked = {
        "accuracy": [row["correct"] for row in rows],
        "validity": [row.get("valid") for row in rows],
    }
    return {
        name: sum(right) / len(right) for name, right in checked.items() if None not in right
    }, rows


# --------------------------------------------------------------------------------------------------
# Checkpoints and the run directory


def step_seed(seed: int, step: int, what: str) -> int:
    """Randomness depends on the position in training alone, so a resumed run draws what an uninterrupted one does."""
    return zlib.crc32(f"{seed}/{step}/{what}".encode())


def make_optimizers(models: Models) -> list[torch.optim.Optimizer]:
    """AdamW of the student, and of what the discriminator trains of its own."""
    options, judge = models.options, models.judge
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(models.student.parameters(), options.lr, fused=True)
    ]
    if judge is not None:
        trained = judge.parameters() if options.judge == "own" else judge.mlp.parameters()
        optimizers.append(torch.optim.AdamW(trained, options.judge_lr, fused=True))
    return optimizers


def save_checkpoint(
    run: Path, models: Models, optimizers: list[torch.optim.Optimizer], rounds: list[dict]
) -> None:
    """Write checkpoint.pt whole or not at all."""
    state = {"rounds": rounds, "models": models.parts.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    temporary = run / "checkpoint.tmp"
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        os.replace(temporary, run / "checkpoint.pt")
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"no checkpoint could be written to {run} ({first_line(error)}): make room and start again."
        )


def load_checkpoint(
    run: Path, models: Models, optimizers: list[torch.optim.Optimizer]
) -> list[dict] | None:
    """Restore the last finished round; the metrics of all that are done, or None where there is no checkpoint."""
    path = run / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        if zipfile.ZipFile(path).testzip():  # checksums of all that it holds
            raise ValueError("its checksums are wrong")
        state = torch.load(path, map_location=models.device, weights_only=True)
        models.parts.load_state_dict(state["models"])
        for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
    except (OSError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): start afresh with --overwrite.")
    print(f"Going on from round {len(state['rounds'])} of {models.options.rounds}.")
    return state["rounds"]


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def open_run(options: Options) -> Path:
    """The run directory, ready for this run: new, or left unfinished by one with the same options."""
    student = re.sub(r"[^\w.-]+", "-", options.student).strip("-")
    run = Path(
        options.out or f"runs/{Path(options.task).stem}-{student}-{options.method}-s{options.seed}"
    )
    config = run / "config.json"
    wanted = asdict(options)
    for name in (
        "out",
        "overwrite",
        "device",
        "api_concurrency",
    ):  # these may differ in a run that goes on
        del wanted[name]
    try:
        if options.overwrite and config.exists():
            shutil.rmtree(run)
        if config.exists():
            there = json.loads(config.read_text(encoding="utf-8"))
            other = ", ".join(
                f"{flag(k)} {there.get(k)}" for k in wanted if wanted[k] != there.get(k)
            )
            if other:
                raise UserError(
                    f"{run} holds a run with other options ({other}): use --out, or --overwrite."
                )
        (run / "negatives").mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(wanted, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run} cannot be used as a run directory ({first_line(error)}): name another with --out."
        )
    return run


# --------------------------------------------------------------------------------------------------
# The command line

MAY_BE_0 = (
    "temperature",
    "toy_errors",
    "lag",
    "alpha1",
    "alpha2",
    "alpha3",
    "beta",
    "delta",
    "mi_weight",
    "seed",
)


def check_options(options: Options) -> None:
    """UserError for a number that makes no sense."""
    for name, value in asdict(options).items():
        if type(value) in (int, float) and not (
            0 < value < math.inf or value == 0 and name in MAY_BE_0
        ):
            least = "at least" if name in MAY_BE_0 else "above"
            raise UserError(f"{flag(name)} is {value}: it must be a finite number, {least} 0.")
    if options.negatives == "fixed" and not Path(options.fixed_student or "?", "student").is_dir():
        raise UserError(
            "--negatives fixed needs --fixed-student: the run directory of a finished --method dss run."
        )
    if options.toy_errors > 1:
        raise UserError(f"--toy-errors is {options.toy_errors}: it is a probability, from 0 to 1.")


def fill_in(options: Options) -> Options:
    """Settle the options that depend on the method and the student."""
    open_ones = {"alpha1": 0.5, "mi_weight": 0.0} | PUBLISHED
    if options.student == "tiny":
        open_ones |= TINY | {"lr": TINY_LR.get(options.method, TINY["lr"])}
    for key, value in (open_ones | METHODS[options.method]).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return options


def parse(kind: type, description: str | None, argv: Sequence[str] | None) -> Any:
    """The command line as an object of the dataclass `kind`; what is not among its fields ends with exit code 2."""
    kinds: Any = [kind]
    parser = HfArgumentParser(
        kinds, description=(description or "").split("\n")[0], usage="%(prog)s [options]", allow_abbrev=False,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=40, width=120),
    )  # fmt: skip
    options, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"{unknown[0]} is not an option: see --help")
    return options


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """The command line as Options, checked, with the open defaults filled in."""
    options = fill_in(parse(Options, __doc__, argv))
    check_options(options)
    return options


def report(
    task: Task, examples: list[Example], samples: dict[str, list[Sample]], questions: list[Question]
) -> None:
    """Print what the vote did, and how often it and each teacher are right."""
    n, sampled = len(questions), sum(map(len, samples.values()))
    print(f"{n} questions, on average with {sampled / len(examples):.2f} samples, "
          f"{sum(len(q.positives) for q in questions) / n:.2f} positives, "
          f"{sum(len(q.negatives) for q in questions) / n:.2f} negatives")  # fmt: skip
    right: dict[str, list[bool | None]] = defaultdict(
        list
    )  # by teacher, a sample each; None where there is no answer
    for example in examples:
        answers = [
            (sample.teacher, task.key(sample.answer)) for sample in samples.get(example.id, [])
        ]
        voted = self_consistency([answer for _, answer in answers])[0]
        for name, answer in [("voted answer", voted), *answers]:
            right[name].append(None if answer is None else answer == task.key(example.label))
    for name, own in right.items():
        parsed = len(own) - own.count(None)
        share = own.count(True) / max(1, parsed)
        print(f"{name}: {share:.1%} of {parsed} right, {own.count(None)} without an answer")


def prepare(
    options: Options,
) -> tuple[Task, dict[str, list[Example]], dict[str, list[Sample]], list[Question]]:
    """The task, its splits, the teacher's samples by question id, the voted questions; settles how long a round is."""
    task, splits = data.load_task(options.task, options.data, options.train_size)
    samples: dict[str, list[Sample]] = {}
    if options.positives != "none" or options.method == "single" or options.labels == "teacher":
        samples = data.collect(task, splits["train"], options.teacher, options)
    questions = vote(task, splits["train"], samples, options)
    options.round_steps = options.round_steps or min(
        ROUND_STEPS, math.ceil(len(questions) / options.batch_size)
    )
    return task, splits, samples, questions


def tell_cuts(models: Models, questions: list[Question]) -> None:
    """Say how many of the first thousand questions' texts are too long, or labels that the student cannot write."""
    first = questions[:1000]
    inputs = [q.example.input for q in first]
    targets = [text for q in first for text in (q.label, *q.positives)]
    for name, texts in (("max_input", inputs), ("max_target", targets)):
        cut = sum(length > getattr(models.options, name) for length in models.lengths(texts))
        if cut:
            print(f"{cut} of {len(texts)} texts are longer than {flag(name)} and are cut.")
    ids = models.tokenizer([q.label for q in first]).input_ids
    written = models.tokenizer.batch_decode(ids, skip_special_tokens=True)
    lost = [
        q.label
        for q, text in zip(first, written)
        if q.label.split() != text.split() or "\n" in q.label.strip()
    ]
    if lost:
        print(
            f"{len(lost)} of {len(first)} labels cannot be written by this student, such as {lost[0]!r}."
        )


def finish(
    models: Models, task: Task, splits: dict[str, list[Example]], run: Path
) -> dict[str, float]:
    """Save the student and the discriminator, and score the student on the validation and test splits."""
    models.student.save_pretrained(run / "student")
    models.tokenizer.save_pretrained(run / "student")
    if models.judge is not None:
        save_model(models.judge, str(run / "discriminator.safetensors"))
    valid, _ = evaluate(models, task, splits, "valid")
    test, rows = evaluate(models, task, splits, "test")
    write_jsonl(run / "predictions.jsonl", rows)
    return test | {f"validation {name}": value for name, value in valid.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the command line; the test figures."""
    options = parse_options(argv)
    run = open_run(options)
    if not (run / "result.json").exists():
        task, splits, samples, questions = prepare(options)
        if samples:
            report(task, splits["train"], samples, questions)
        models = load_models(options)
        tell_cuts(models, questions)
        last = train(models, questions, run)[-1]
        result = finish(models, task, splits, run) | {
            name: last[name] for name in ("D auc",) if name in last
        }
        write_atomically(run / "result.json", json.dumps(result) + "\n")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    print(", ".join(f"{key} {value:.3f}" for key, value in result.items()))
    print(how_to_read(options, list(sys.argv[1:] if argv is None else argv)))
    print(f"Everything is in {run}/")
    return result


# Test means of dss over seeds 0 to 4 and two processors: python eval.py --study methods
DSS_ON_TOY = "dss has accuracy 0.734 and validity 0.366 here, means of ten runs on two machines"


def how_to_read(options: Options, argv: list[str]) -> str:
    """What the figures of a finished run are to be compared with."""
    same = (
        "task",
        "student",
        "train_size",
        "labels",
        "teacher",
        "k",
        "toy_errors",
        "rounds",
        "batch_size",
    )
    usual = fill_in(Options())
    if all(getattr(options, name) == getattr(usual, name) for name in same):
        return f"accuracy: right labels; validity: rationales with every step right. To compare: {DSS_ON_TOY}."
    other = "finetune" if options.method == "dss" else "dss"
    command = ["python", "qcrd.py", *argv, "--method", other]
    if options.out:
        command += ["--out", f"{options.out}-{other}"]
    return f"accuracy: right labels. To compare: {shlex.join(command)}"


def run_command(command: Callable[[], Any]) -> None:
    """Run a command line; bad input and signals end it with one sentence and their exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print(
            "error: the GPU's memory is full: lower --batch-size or raise --grad-accum.",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "Stopped. Finished rounds are saved; the same command goes on from there.",
            file=sys.stderr,
        )
        sys.exit(130)


if __name__ == "__main__":
    run_command(main)
