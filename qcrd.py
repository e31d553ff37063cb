"""Quality-guided Contrastive Rationale Distillation (QCRD, arXiv 2405.13014) in plain PyTorch.

    python qcrd.py                                                # built-in task and student, no download, no GPU
    python qcrd.py --task anli --student t5-small                 # a real task, with the teacher samples DSS published
    python qcrd.py --task svamp --teacher samples.jsonl           # teacher samples of your own
    python qcrd.py --task my.jsonl --teacher api:MODEL            # a task and a teacher of your own

Read from top to bottom: the options, the discriminator, the losses, positives and negatives, batches, the loss of a
batch, what the student writes, checkpoints, the training loop, the command line. Equation numbers are the paper's; data.py
makes what is fed in.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import zlib
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, HfArgumentParser

import data
from data import Example, Sample, Task, UserError, first_line

# ----------------------------------------------------------------------------------------------------------------------
# Options. A default of None is settled later: by fill_in, for `tiny` or for any other student, and by prepare.


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class TaskOptions:
    _argument_group_name = "the task and its teacher"
    task: str = option("toy", "toy, svamp, cqa, anli, esnli, or a JSON Lines file with input and label in each row")
    data: str = option(data.DSS_ZIP, "the DSS release: a file or a URL")
    train_size: float | None = option(None, "how many training questions to use: a count, or a fraction up to 1")
    labels: Literal["gold", "teacher"] = option("gold", "what predict: learns: gold labels, or the voted answers")
    teacher: list[str] = field(default_factory=list, metadata={"help": "palm, a Hugging Face model, api:MODEL, or a JSON Lines file of samples; several are pooled"})  # fmt: skip
    k: int | None = option(None, "K, samples a question (default 5; of a file all)")
    temperature: float = option(0.7, "at which the teacher is sampled")
    api_base: str | None = option(None, "an OpenAI-compatible server (or OPENAI_BASE_URL; key in OPENAI_API_KEY)")
    api_concurrency: int = option(8, "requests under way at once")
    toy_errors: float = option(0.4, "how often the toy's teacher reasons wrongly")


@dataclass
class MethodOptions:
    _argument_group_name = "the method"
    method: Literal["finetune", "single", "dss", "mi", "qcrd"] = option("qcrd", "the paper's method or a baseline")
    positives: Literal["all", "one"] = option("all", "of qcrd: all voted rationales, or one unvoted as in dss")
    fixed_student: str | None = option(None, "of --negatives fixed: the run directory of a finished dss run")
    negatives: Literal["student", "fixed", "teacher", "none"] = option("student", "of qcrd: the teacher's minority and the lagged student's; a fixed dss student's; the minority alone; none")  # fmt: skip
    scheme: Literal["minmax", "maxmin", "sampling", "mean", "wmean"] = option("minmax", "many-to-one (eqs. 4, 5)")
    lag: int = option(5, "j: negatives come from the student as it was j rounds ago")
    student_temperature: float = option(1.5, "at which the student's negatives are sampled")
    alpha1: float = option(0.5, "weight of L_pred (eq. 8)")
    alpha2: float = option(0.5, "weight of L_cl (eq. 8)")
    alpha3: float = option(0.5, "weight of L_D (eq. 8); times 0.9 every round")
    beta: float = option(0.2, "weight of the negatives (eq. 3)")
    delta: float = option(3.0, "margin of the negatives, in nats per token")
    mi_weight: float = option(0.01, "weight of the mutual-information term of mi")
    judge: Literal["own", "frozen", "shared", "none"] = option("own", "the discriminator's encoder: a trained copy, a frozen one, the student's own; none: no quality weights")  # fmt: skip
    judge_loss: Literal["paper", "bce"] = option("bce", "eq. 2, or binary cross-entropy")
    judge_lr: float = option(None, "the discriminator's learning rate (default 5e-5; tiny 1e-3)")
    judge_steps: int = option(None, "of the discriminator's pretraining (default 500, the paper's most; tiny 300)")
    judge_every: int = option(None, "steps between two updates of the discriminator (default 4; tiny 8)")


@dataclass
class TrainOptions:
    _argument_group_name = "the training"
    student: str = option("tiny", "tiny, or a seq2seq model: a Hugging Face name or a folder")
    rounds: int = option(None, "the paper's iterations (default 20, or as many as make 10,000 steps; tiny 10)")
    round_steps: int = option(None, "steps in a round (default: one pass over the training set)")
    batch_size: int = option(None, "questions a step (default 64; tiny 16)")
    grad_accum: int = option(1, "parts in which a batch is computed, to save memory")
    lr: float = option(None, "AdamW's learning rate, falling linearly to 0 (default 5e-5; tiny 2e-3)")
    max_input: int = option(1024, "tokens at which inputs are cut")
    max_target: int = option(256, "tokens at which labels and rationales are cut")
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "auto: bf16 where the hardware gains from it")
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    seed: int = option(0, "of everything random in training")
    out: str | None = option(None, "run directory (default runs/TASK-STUDENT-METHOD-sSEED)")
    save_minutes: float = option(5, "minutes between checkpoints inside a round")
    overwrite: bool = option(False, "start afresh in a run directory that is in use")


@dataclass
class Options(TrainOptions, MethodOptions, TaskOptions):
    """All options; TINY fills the open ones for the built-in student, PUBLISHED for any other."""

    @property
    def alpha(self) -> tuple[float, float, float]:
        """The weights of eq. 8."""
        return self.alpha1, self.alpha2, self.alpha3


# Batch and learning rate of DSS (arXiv 2305.02301), and the paper's most for the discriminator's pretraining.
PUBLISHED = {"batch_size": 64, "lr": 5e-5, "judge_lr": 5e-5, "judge_steps": 500, "judge_every": 4}
TINY = {"batch_size": 16, "lr": 2e-3, "judge_lr": 1e-3, "judge_steps": 300, "judge_every": 8, "rounds": 10}
DEFAULT_ROUNDS, PUBLISHED_STEPS = 20, 10_000  # the paper gives no number of rounds; DSS trains for 10,000 steps at most
ALPHA3_DECAY = 0.9
WARMUP = 50  # steps in which the learning rate rises
FEATURES = 200_000  # of a frozen discriminator, at most kept: 0.4 GB at T5-small's width
WRITE_BATCH = 512  # questions answered at once
LOGITS_CPU, LOGITS_CUDA = 2**21, 2**27  # in a part of the output layer's loss
LABEL_TOKENS = 64
ANSWER_MARK = "So the answer is"  # between rationale and label in the single-task target

# ----------------------------------------------------------------------------------------------------------------------
# The discriminator: how good is rationale r for question x?


class Discriminator(nn.Module):
    """D(x, r) -> s in (0, 1), the quality of a rationale (eq. 1): encoder, max pooling over tokens, two linear layers.

    `encoder` maps (input_ids, attention_mask) to an object with `last_hidden_state` (N, S, d_model), as
    transformers' T5EncoderModel and the encoder of a T5 student do.
    """

    def __init__(self, encoder: nn.Module, d_model: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mlp = nn.Sequential(nn.Linear(d_model, d_model), nn.ReLU(), nn.Linear(d_model, 1))

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Max-pooled encoder states, (N, d_model), of question and rationale in one sequence, (N, S)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (N, S, d_model)
        return states.masked_fill(attention_mask[..., None] == 0, -torch.inf).amax(1)

    def quality(self, features: Tensor) -> Tensor:
        """Scores s, (N,), float32, of features (N, d_model)."""
        return torch.sigmoid(self.mlp(features).float().squeeze(-1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores s, (N,), float32."""
        return self.quality(self.features(input_ids, attention_mask))


# ----------------------------------------------------------------------------------------------------------------------
# The losses: pure functions of tensors. Row i is a question, column j one of its rationales; masks say which exist.


def judge_loss(pos_score: Tensor, pos_mask: Tensor, neg_score: Tensor, neg_mask: Tensor, kind: str = "paper") -> Tensor:
    """L_D, a scalar, from the scores of positives (N, P) and negatives (N, M) and their boolean masks.

    "paper" is eq. 2, the mean of -log(sum_j exp(s_pos_j) / sum_j exp(s_neg_j)) over questions that have both.
    "bce" is the mean binary cross-entropy over all rationales. 0 where there is nothing to average.
    """
    if kind == "bce":
        scores = torch.cat([pos_score[pos_mask], neg_score[neg_mask]])
        truth = torch.cat([torch.ones_like(pos_score[pos_mask]), torch.zeros_like(neg_score[neg_mask])])
        return F.binary_cross_entropy(scores, truth) if len(scores) else pos_score.sum() * 0
    both = pos_mask.any(1) & neg_mask.any(1)
    if not both.any():
        return pos_score.sum() * 0
    pos = pos_score.masked_fill(~pos_mask, -torch.inf)[both].logsumexp(1)
    neg = neg_score.masked_fill(~neg_mask, -torch.inf)[both].logsumexp(1)
    return (neg - pos).mean()


def contrastive_loss(
    pos_nll: Tensor,
    pos_mask: Tensor,
    neg_nll: Tensor,
    neg_mask: Tensor,
    pos_score: Tensor | None = None,
    neg_score: Tensor | None = None,
    beta: float = 0.2,
    delta: float = 3.0,
    scheme: str = "minmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """L_cl of eqs. 3 to 7 and its two terms before beta: (loss, positive term, negative term), each a scalar.

    pos_nll (N, P) and neg_nll (N, M) are l(f(x), r), the token-mean cross-entropy of each rationale under the
    student, in nats per token; the boolean masks say which rationales exist. The scores are D's, of the same shapes;
    without them all quality weights are 1. A question without positives (negatives) has 0 in that term.
    """

    def combine(nll: Tensor, mask: Tensor, quality: Tensor, pick: str) -> Tensor:
        """One number a question, (N,), out of its rationales' l and quality weights."""
        if mask.shape[1] == 0:
            return nll.new_zeros(len(nll))
        weight = mask.float()
        if pick in ("min", "max"):
            order = -nll if pick == "min" else nll
            best = order.masked_fill(~mask, -math.inf).argmax(1)
            weight = F.one_hot(best, nll.shape[1]) * weight
        elif pick == "sampling":
            weight = F.one_hot(torch.rand_like(nll).masked_fill(~mask, -1).argmax(1), nll.shape[1]) * weight
        elif pick == "mean":
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        elif pick == "wmean":  # quality decides the shares within the mean instead of the size of the term
            weight, quality = weight * quality, torch.ones_like(quality)
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-9)
        else:
            raise ValueError(f"scheme {scheme!r} is not one of minmax, maxmin, sampling, mean, wmean")
        return (weight * quality * nll.masked_fill(~mask, 0)).sum(1)

    pos_pick, neg_pick = {"minmax": ("min", "max"), "maxmin": ("max", "min")}.get(scheme, (scheme, scheme))
    pos_quality = torch.ones_like(pos_nll) if pos_score is None else pos_score.detach()  # eq. 6
    neg_quality = torch.ones_like(neg_nll) if neg_score is None else 1 - neg_score.detach()  # eq. 7
    margin_nll = -F.relu(delta - neg_nll)  # min(l - delta, 0): a negative that is already unlikely pushes no more
    pos_term = combine(pos_nll, pos_mask, pos_quality, pos_pick).mean()  # eq. 4
    neg_term = combine(margin_nll, neg_mask, neg_quality, neg_pick).mean()  # eq. 5
    return pos_term - beta * neg_term, pos_term, neg_term  # eq. 3


def total_loss(l_pred: Tensor, l_cl: Tensor, l_d: Tensor, alpha: tuple[float, float, float], round: int) -> Tensor:
    """L_total of eq. 8, a scalar, in round 0, 1, ...: alpha_3 has been multiplied by 0.9 after every round."""
    return alpha[0] * l_pred + alpha[1] * l_cl + alpha[2] * ALPHA3_DECAY**round * l_d


def mutual_information_loss(pred_probs: Tensor, expl_probs: Tensor) -> Tensor:
    """MI's term (arXiv 2403.03348), a scalar: cross-entropy between the vocabulary distributions (N, V) of the tasks.

    Each is the max over its decoder positions of the softmax; the prediction's side is detached.
    """
    return -(pred_probs.detach() * expl_probs.clamp(min=1e-9).log()).sum(1).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Positives and negatives


def self_consistency(answers: Sequence[Hashable | None]) -> tuple[Hashable | None, list[int], list[int]]:
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
    winner = max(votes, key=lambda answer: votes[answer])  # dicts keep the order of first appearance, max the first
    positives = [i for i, answer in enumerate(answers) if answer == winner]
    return winner, positives, [i for i, answer in enumerate(answers) if answer is not None and answer != winner]


@dataclass
class Question:
    """A training question after the vote."""

    example: Example
    label: str  # what predict: learns
    positives: list[str]
    negatives: list[str]  # the teacher's minority; the student's own negatives join later, round by round
    held_out: bool = False  # the discriminator never trains on it, so that its AUC means something


def vote(task: Task, examples: list[Example], samples: dict[str, list[Sample]], options: Options) -> list[Question]:
    """Turn each question's samples into positives and negatives, and print what the vote did."""
    questions: list[Question] = []
    tally: Counter[Any] = Counter()
    for number, example in enumerate(examples):
        own = samples.get(example.id, [])
        winner, pos, neg = self_consistency([task.key(sample.answer) for sample in own])
        positives = list(dict.fromkeys(own[i].rationale for i in pos if own[i].rationale))
        negatives = list(dict.fromkeys(own[i].rationale for i in neg if own[i].rationale))
        tally += Counter(positives=len(positives), negatives=len(negatives), voted=len(pos) > 0)
        tally["right"] += 1 if winner is not None and winner == task.key(example.label) else 0
        for sample in own:
            parsed, right = task.key(sample.answer) is not None, task.correct(sample.answer, example)
            tally += Counter({"samples": 1, ("of", sample.teacher): 1})
            tally[("parsed", sample.teacher)] += parsed
            tally[("right", sample.teacher)] += right
        if options.method in ("single", "dss", "mi") or options.positives == "one":
            positives = [sample.rationale for sample in own if sample.rationale][:1]
        label = example.label if options.labels == "gold" else own[pos[0]].answer if pos else None
        if label is not None and options.method == "single":
            label = " ".join([*positives, ANSWER_MARK, label])
        if label is not None:  # without a gold label a question without a vote teaches nothing
            questions.append(Question(example, label, positives, negatives, held_out=number % 10 == 9))
    if not questions:
        raise UserError("no training question has a label: --labels teacher needs samples with answers that parse.")
    if samples:
        mean = {name: tally[name] / len(examples) for name in ("samples", "positives", "negatives")}
        print(f"{len(examples)} questions, on average with", ", ".join(f"{v:.2f} {k}" for k, v in mean.items()))
        print(f"voted answer: {tally['right'] / max(1, tally['voted']):.1%} of {tally['voted']} right")
    for teacher in sorted({sample.teacher for own in samples.values() for sample in own}):
        of, usable, good = (tally[(name, teacher)] for name in ("of", "parsed", "right"))
        print(f"  {teacher}: {of} samples, {of - usable} unparsable, {good / max(1, usable):.1%} of the parsed right")
    return questions


# ----------------------------------------------------------------------------------------------------------------------
# From text to padded batches, and through the models


class Tokens:
    """Token ids of texts, each text tokenized once and cut at a limit; `cut` counts the texts that were too long."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self.tokenizer, self.limit, self.cut = tokenizer, limit, 0
        self.known: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            for text, ids in zip(new, self.tokenizer(new, verbose=False).input_ids, strict=True):
                self.cut += len(ids) > self.limit
                ids = ids if len(ids) <= self.limit else [*ids[: self.limit - 1], ids[-1]]  # the end token stays
                self.known[text] = np.array(ids, np.int32)
        return [self.known[text] for text in texts]


class Models:
    """The student and its discriminator on one device, with everything that turns text into their batches."""

    def __init__(self, student: Any, tokenizer: Any, judge: Discriminator | None, options: Options) -> None:
        self.student, self.tokenizer, self.options = student, tokenizer, options
        self.judge: Any = judge  # None where the method has no discriminator
        self.device = next(student.parameters()).device
        self.inputs, self.targets = Tokens(tokenizer, options.max_input - 4), Tokens(tokenizer, options.max_target)
        self.predict, self.explain = (np.array(tokenizer(p).input_ids[:-1], np.int32) for p in ("predict:", "explain:"))
        self.bf16 = use_bf16(options.precision, self.device, student.config.d_model)
        for module in {*student.modules(), *(judge.modules() if judge else ())}:  # a shared encoder once
            if self.bf16 and "LayerNorm" in type(module).__name__:
                # cast once what the layers after it (q, k and v) would cast each for itself, and keep three times
                module.register_forward_hook(lambda _, __, states: states.bfloat16())
        self.frozen: dict[bytes, Tensor] = {}  # a frozen discriminator's features by token ids
        # padded tokens that one pass over rationales reads: a GPU wants many, a CPU wants little padding
        self.group_tokens = 2**14 if self.device.type == "cuda" else 2**18 // student.config.d_model

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def pad(self, rows: Sequence[np.ndarray], value: int) -> Tensor:
        """Rows of token ids as one (N, S) tensor."""
        out = np.full((len(rows), max(map(len, rows))), value, np.int64)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        batch = torch.from_numpy(out)
        return batch.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else batch

    def pad_inputs(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Input ids (N, S) and their attention mask (N, S)."""
        ids = self.pad(rows, self.tokenizer.pad_token_id)
        return ids, (ids != self.tokenizer.pad_token_id).long()

    def encode(self, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The student's encoder states (N, S, d_model) and their mask (N, S)."""
        ids, mask = self.pad_inputs(rows)
        with self.autocast():
            return self.student.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def decode(self, states: Tensor, mask: Tensor, rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forced decoder states (T, d_model) of the T real target tokens, their ids (T,) and rows (T,).

        The output layer is most of a small student's decoder, so it is applied to real tokens only.
        """
        targets = self.pad(rows, -100)  # (N, L)
        with self.autocast():
            hidden = self.student.get_decoder()(
                input_ids=self.student.prepare_decoder_input_ids_from_labels(targets),
                encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False,
            ).last_hidden_state  # fmt: skip
            real = targets != -100
            hidden = hidden[real]  # (T, d_model)
            if self.student.config.scale_decoder_outputs:
                hidden = hidden * self.student.config.d_model**-0.5
            return hidden, targets[real], real.nonzero()[:, 0]

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of T tokens, (T,), from their decoder states (T, d_model) and ids (T,)."""
        hidden = hidden.to(torch.bfloat16 if self.bf16 else torch.float32)
        with self.autocast():
            return OutputLayerLoss.apply(hidden, self.student.lm_head.weight, targets, torch.is_grad_enabled())

    def nll(self, states: Tensor, mask: Tensor, rows: Sequence[np.ndarray], at: Sequence[int]) -> Tensor:
        """l(f(x), r): the token-mean cross-entropy of each target row, (N,), in nats per token.

        Target i belongs to the encoder states of row at[i].
        """

        def losses(group: list[int]) -> Tensor:
            own = torch.tensor([at[i] for i in group], device=states.device)
            hidden, targets, row = self.decode(states[own], mask[own], [rows[i] for i in group])
            return token_mean(self.token_losses(hidden, targets), row, len(group))

        return in_groups(losses, rows, self.group_tokens)

    def score(self, questions: Sequence[Question], rationales: Sequence[str]) -> Tensor:
        """D(x, r), (N,), of pairs of a question and a rationale."""
        inputs, targets = self.inputs([q.example.input for q in questions]), self.targets(rationales)
        rows = [np.concatenate(pair) for pair in zip(inputs, targets, strict=True)]
        with self.autocast():
            features = self.frozen_features(rows) if self.options.judge == "frozen" else self.features(rows)
            return self.judge.quality(features)

    def features(self, rows: Sequence[np.ndarray]) -> Tensor:
        """D's pooled features, (N, d_model)."""
        return in_groups(
            lambda at: self.judge.features(*self.pad_inputs([rows[i] for i in at])), rows, self.group_tokens
        )

    def frozen_features(self, rows: Sequence[np.ndarray]) -> Tensor:
        """The same of an encoder that never changes: computed once for each row, without dropout."""
        if len(self.frozen) > FEATURES:
            self.frozen.clear()
        keys = [row.tobytes() for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self.frozen}
        if new:
            self.judge.encoder.eval()
            with torch.no_grad():
                self.frozen.update(zip(new, self.features(list(new.values())), strict=True))
        return torch.stack([self.frozen[key] for key in keys])

    def score_constant(self, questions: Sequence[Question], rationales: Sequence[str]) -> Tensor:
        """The same without gradients and dropout: what weighs L_cl and what is reported."""
        self.judge.eval()
        with torch.no_grad():
            scores = self.score(questions, rationales)
        self.judge.train()
        return scores


def in_groups(function: Callable[[list[int]], Tensor], rows: Sequence[np.ndarray], tokens: int) -> Tensor:
    """function(indices) -> a number or vector each, called on groups of rows of like length: little padding and memory."""
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if groups and (len(groups[-1]) + 1) * len(rows[groups[-1][0]]) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    order = torch.tensor([i for group in groups for i in group])
    values = torch.cat([function(group) for group in groups])
    return values[order.argsort().to(values.device)]


class Dropout(nn.Dropout):
    """nn.Dropout for CPUs, where drawing is slow: one 64-bit random number decides about four elements."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        dropped = draws.view(torch.int16)[: x.numel()].view(x.shape) < round(self.p * 2**16) - 2**15
        return x.masked_fill(dropped, 0) / (1 - self.p)


def token_mean(losses: Tensor, row: Tensor, n: int) -> Tensor:
    """Mean over the tokens of each row, (n,), of token losses (T,) of rows (T,)."""
    return losses.new_zeros(n).index_add(0, row, losses) / torch.bincount(row, minlength=n)


class OutputLayerLoss(torch.autograd.Function):
    """Cross-entropy of T tokens, (T,) in fp32, from decoder states (T, d_model), output weights (V, d_model) and targets.

    Over T5's vocabulary the logits, their logarithms and the gradients of both are a step's largest tensors. Here
    they exist for a few tokens at a time; kept is only the gradient by the logits (softmax - one-hot), in bf16 if
    the states are.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
        weight = weight.to(states.dtype)
        losses, gradient = [], states.new_empty(len(states) if needs_gradient else 0, len(weight))  # (T, V)
        at_once = (LOGITS_CUDA if states.is_cuda else LOGITS_CPU) // len(weight)
        for i in range(0, len(states), at_once):
            logits = (states[i : i + at_once] @ weight.T).float()
            own = torch.arange(len(logits), device=states.device), targets[i : i + at_once]
            log_sum = logits.logsumexp(1)
            losses.append(log_sum - logits[own])
            if needs_gradient:
                softmax = logits.sub_(log_sum[:, None]).exp_()
                softmax[own] -= 1
                gradient[i : i + at_once] = softmax
        ctx.save_for_backward(states, weight, gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, pull: Tensor) -> tuple[Tensor, Tensor, None, None]:
        states, weight, gradient = ctx.saved_tensors
        pull = pull[:, None].to(states.dtype)
        return (gradient @ weight) * pull, (gradient.T @ (states * pull)).float(), None, None


# ----------------------------------------------------------------------------------------------------------------------
# One training step: the loss of a batch


def rationales_of(
    batch: list[Question], drawn: dict[str, str], options: Options
) -> tuple[list[list[str]], list[list[str]]]:
    """Positives and negatives of each question of a batch: the teacher's and, of qcrd, what the student has drawn."""
    if options.method != "qcrd" or options.negatives == "none":
        return [q.positives for q in batch], [[] for _ in batch]
    return [q.positives for q in batch], [q.negatives + list(filter(None, [drawn.get(q.example.id)])) for q in batch]


def flat(pos: list[list[str]], neg: list[list[str]]) -> tuple[list[int], list[int], list[str]]:
    """All rationales of N questions in one list: how many are in each of 2 N rows (positives of all questions, then
    negatives), the row of each rationale (its question is row % N), and the rationales."""
    counts = [len(own) for own in pos + neg]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    return counts, rows, [text for own in pos + neg for text in own]


def grid(values: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Values (R,) of which counts[i] belong to row i, as (N, most of a row), and the mask of the real ones."""
    rows = nn.utils.rnn.pad_sequence(values.split(list(counts)), batch_first=True)
    return rows, torch.arange(rows.shape[1]).to(rows.device) < torch.tensor(counts).to(rows.device)[:, None]


def rationale_loss(
    models: Models, batch: list[Question], pos: list[list[str]], neg: list[list[str]], states: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """L_cl of a batch, with the gradient of eqs. 3 to 7, and its two terms before beta (detached).

    pos and neg are each question's rationales, states (N, S, d_model) and mask (N, S) the encoder's of explain:.
    Min, max and margin leave most rationales without a gradient. So all are scored without gradients first, but for
    a question's only positive, which is its min at any l; the derivative of L_cl by each l(f(x), r) then tells which
    rationales have one, and only these run again, weighted by that derivative: the chain rule, hence the same
    gradient as running all of them at once.
    """
    options, n = models.options, len(batch)
    if options.scheme == "sampling":
        pos, neg = ([random.sample(own, min(1, len(own))) for own in side] for side in (pos, neg))
    counts, rows, texts = flat(pos, neg)
    owner, ids = [row % n for row in rows], models.targets(texts)

    def loss_at(nll: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (values, real), quality = grid(nll, counts), grid(score, counts)[0]
        pos_score, neg_score = (None, None) if models.judge is None else (quality[:n], quality[n:])
        return contrastive_loss(
            values[:n], real[:n], values[n:], real[n:], pos_score, neg_score,
            options.beta, options.delta, options.scheme,
        )  # fmt: skip

    def derivative(nll: Tensor, score: Tensor) -> Tensor:
        leaf = nll.detach().requires_grad_()
        return torch.autograd.grad(loss_at(leaf, score)[0], leaf)[0]

    def run(which: list[int]) -> Tensor:
        return models.nll(states, mask, [ids[i] for i in which], [owner[i] for i in which])

    nll = torch.zeros(len(texts), device=states.device)
    compared = [i for i, row in enumerate(rows) if row >= n or counts[row] > 1]
    if compared:
        with torch.no_grad():
            nll[compared] = run(compared)
    score = torch.full_like(nll, 0.5)
    if models.judge is not None and texts:  # only the chosen rationales' scores are ever used, but by the weighted mean
        rated = torch.ones_like(nll) if options.scheme == "wmean" else derivative(nll, score)
        chosen = rated.nonzero()[:, 0].tolist()
        if chosen:
            score[chosen] = models.score_constant([batch[owner[i]] for i in chosen], [texts[i] for i in chosen])
    weight = derivative(nll, score) if texts else nll  # (R,)
    kept = weight.nonzero()[:, 0].tolist()
    pull = states.sum() * 0
    if kept:
        kept_nll = run(kept)
        nll[kept] = kept_nll.detach()
        pull = (weight[kept] * kept_nll).sum()
    value, pos_term, neg_term = loss_at(nll, score)
    return pull + (value - pull).detach(), pos_term.detach(), neg_term.detach()


def judge_batch(options: Options) -> int:
    """Questions in a batch of the discriminator, which reads all their rationales: about a batch of the student's."""
    return max(8, options.batch_size // 4)


def judge_step_loss(
    models: Models, batch: list[Question], pos: list[list[str]], neg: list[list[str]]
) -> tuple[Tensor, Tensor, Tensor]:
    """L_D of the positives and negatives of each question, all scores (2 N, most of a row) and the real ones' mask."""
    n = len(batch)
    counts, rows, texts = flat(pos, neg)
    score, real = grid(models.score([batch[row % n] for row in rows], texts), counts)
    return judge_loss(score[:n], real[:n], score[n:], real[n:], models.options.judge_loss), score.detach(), real


def mi_term(models: Models, states: Tensor, mask: Tensor, batch: list[Question], pred: Tensor, row: Tensor) -> Tensor:
    """MI's term of the questions that have a rationale, from the decoder states of predict: and a run of explain:."""
    kept = [i for i, q in enumerate(batch) if q.positives]
    if not kept:
        return pred.sum() * 0
    expl, _, expl_row = models.decode(states[kept], mask[kept], models.targets([batch[i].positives[0] for i in kept]))
    pred_probs = max_over_positions(models.student.lm_head(pred), row, len(batch))[kept]
    return mutual_information_loss(pred_probs, max_over_positions(models.student.lm_head(expl), expl_row, len(kept)))


def max_over_positions(logits: Tensor, row: Tensor, n: int) -> Tensor:
    """The max over the positions of each row of the softmax, (n, V), from logits (T, V)."""
    probs = logits.float().softmax(1)
    return probs.new_zeros(n, probs.shape[1]).scatter_reduce(0, row[:, None].expand_as(probs), probs, "amax")


def student_loss(
    models: Models, batch: list[Question], drawn: dict[str, str], round_: int
) -> tuple[Tensor, dict[str, float]]:
    """The terms of L_total (eq. 8) that train the student, for backward(), and sums over questions for the round's line."""
    options, n = models.options, len(batch)
    inputs = models.inputs([q.example.input for q in batch])
    rows = [np.concatenate((models.predict, x)) for x in inputs]
    labels = models.targets([q.label for q in batch])
    if options.method not in ("finetune", "single"):
        rows += [np.concatenate((models.explain, x)) for x in inputs]
    states, mask = models.encode(rows)  # one pass for both tasks, and its states serve all rationales of a question
    hidden, targets, row = models.decode(states[:n], mask[:n], labels)
    l_pred = token_mean(models.token_losses(hidden, targets), row, n).mean()
    sums = {"n": n, "pred": l_pred.item() * n}
    if options.method in ("finetune", "single"):
        return l_pred, sums
    pos, neg = rationales_of(batch, drawn, options)
    l_cl, pos_term, neg_term = rationale_loss(models, batch, pos, neg, states[n:], mask[n:])
    sums |= {"positive": pos_term.item() * n, "negative": neg_term.item() * n}
    sums |= {"no positive": n - sum(map(bool, pos)), "no negative": n - sum(map(bool, neg))}
    loss = total_loss(l_pred, l_cl, l_pred.new_zeros(()), options.alpha, round_)
    if options.method == "mi":
        loss = loss + options.mi_weight * mi_term(models, states[n:], mask[n:], batch, hidden, row)
    return loss, sums


def discriminator_loss(
    models: Models, batch: list[Question], drawn: dict[str, str], round_: int
) -> tuple[Tensor, dict[str, float]]:
    """The term of L_total (eq. 8) that trains D, for backward(), and sums for the round's line."""
    options, zero = models.options, torch.zeros((), device=models.device)
    asked = [q for q in batch[: judge_batch(options)] if not q.held_out]
    pos, neg = rationales_of(asked, drawn, options)
    if not any(pos + neg):
        return zero, {}
    l_d, score, real = judge_step_loss(models, asked, pos, neg)
    n, few = len(asked), torch.tensor([len(q.negatives) for q in asked]).to(score.device)
    taught = torch.arange(score.shape[1]).to(score.device) < few[:, None]  # before the student's own
    groups = {"D pos": score[:n][real[:n]], "D teacher neg": score[n:][real[n:] & taught]}
    groups["D student neg"] = score[n:][real[n:] & ~taught]
    sums = {name: group.sum().item() for name, group in groups.items()}
    sums |= {f"#{name}": len(group) for name, group in groups.items()}
    sums |= {"judge": l_d.item() * len(batch), "#judge": len(batch)}
    return total_loss(zero, zero, l_d, options.alpha, round_), sums


# ----------------------------------------------------------------------------------------------------------------------
# The student writes: its negatives, and in the end its answers


def generate(
    models: Models, inputs: Sequence[str], prefix: str, limit: int, temperature: float = 0, desc: str = "writing"
) -> list[str]:
    """What the student writes for each input: greedy, or sampled where temperature > 0. Longest inputs first."""
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    start = models.predict if prefix == "predict" else models.explain
    texts = [""] * len(inputs)
    models.student.eval()
    with tqdm(total=len(inputs), desc=desc, unit="question", leave=False) as bar, torch.no_grad(), models.autocast():
        for i in range(0, len(order), WRITE_BATCH):
            at = order[i : i + WRITE_BATCH]
            ids, mask = models.pad_inputs([np.concatenate((start, x)) for x in models.inputs([inputs[j] for j in at])])
            how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
            output = models.student.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, **how)
            for j, text in zip(at, models.tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
                texts[j] = text.strip()
            bar.update(len(at))
            guard.stop_if_asked()
    models.student.train()
    return texts


def source_round(round_: int, lag: int) -> int:
    """The round whose student wrote the negatives that `round_` trains on: j before, or the oldest there is."""
    return max(round_ - lag, 0)


def draw_negatives(models: Models, questions: list[Question], round_: int, path: Path) -> None:
    """Let the student, as it is at the start of `round_`, write one rationale for each question, into `path`.

    With --negatives fixed a finished dss student writes instead, in round 0 and for all rounds.
    """
    options = models.options
    unique = list({q.example.id: q.example for q in questions}.values())
    limit = rationale_limit(models, questions)
    if options.negatives == "fixed":
        models = load_models(replace(options, student=f"{options.fixed_student}/student", judge="none"))
    torch.manual_seed(step_seed(options.seed, round_, "draw"))
    desc = f"negatives of round {round_}"
    texts = generate(models, [e.input for e in unique], "explain", limit, options.student_temperature, desc)
    write_jsonl(path, ({"id": e.id, "output": text} for e, text in zip(unique, texts, strict=True)))


def rationale_limit(models: Models, questions: list[Question]) -> int:
    """Tokens after which a sampled rationale is cut: hot samples rarely end by themselves, and a tail that is longer
    than nine in ten of the teacher's rationales costs time and teaches nothing."""
    lengths = [len(ids) for q in questions[:1000] for ids in models.targets(q.positives)]
    return int(np.quantile(lengths, 0.9)) if lengths else models.options.max_target


def evaluate(
    models: Models, task: Task, examples: list[Example], desc: str
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Label accuracy (greedy predict:) and, where rationales can be checked exactly, their validity (greedy explain:)."""
    options = models.options
    limit = options.max_target if options.method == "single" else LABEL_TOKENS
    inputs = [example.input for example in examples]
    labels = generate(models, inputs, "predict", limit, desc=f"{desc} labels")
    if options.method == "single":  # the label follows the rationale
        labels = [text.rpartition(ANSWER_MARK)[2].strip() for text in labels]
    rows: list[dict[str, Any]] = [
        {"id": e.id, "label": label, "correct": task.correct(label, e)}
        for e, label in zip(examples, labels, strict=True)
    ]
    result = {"accuracy": sum(row["correct"] for row in rows) / len(rows)}
    if options.method not in ("finetune", "single"):
        rationales = generate(models, inputs, "explain", options.max_target, desc=f"{desc} rationales")
        for row, example, text in zip(rows, examples, rationales, strict=True):
            row |= {"rationale": text, "valid": data.is_valid(example, text)}
        if task.name == "toy":
            result["validity"] = sum(row["valid"] for row in rows) / len(rows)
    return result, rows


# ----------------------------------------------------------------------------------------------------------------------
# The discriminator's pretraining and its check


def corrupt(rng: random.Random, text: str, words: Sequence[str]) -> str:
    """A negative made of a positive: three words in ten masked or replaced by others' words, at least one."""
    out = text.split()
    for i in rng.sample(range(len(out)), max(1, round(0.3 * len(out)))):
        out[i] = "<extra_id_0>" if rng.random() < 0.5 else rng.choice(words)
    return " ".join(out)


def pretrain_judge(models: Models, questions: list[Question], optimizer: torch.optim.Optimizer) -> None:
    """Train D on the teacher's positives and negatives; corrupted positives make the classes even."""
    options, rng = models.options, random.Random(step_seed(models.options.seed, 0, "judge"))
    known = [q for q in questions if q.positives and not q.held_out]
    words = [word for q in known[:1000] for word in q.positives[0].split()]
    torch.manual_seed(step_seed(options.seed, 0, "judge"))
    for _ in tqdm(range(options.judge_steps if known else 0), desc="discriminator", unit="step", leave=False):
        batch = rng.sample(known, min(judge_batch(options), len(known)))
        neg = []
        for q in batch:
            more = max(0, len(q.positives) - len(q.negatives))
            neg.append(q.negatives + [corrupt(rng, rng.choice(q.positives), words) for _ in range(more)])
        optimizer.zero_grad()
        judge_step_loss(models, batch, [q.positives for q in batch], neg)[0].backward()
        clip_and_step(optimizer)
        guard.stop_if_asked()


def judge_auc(models: Models, questions: list[Question]) -> float:
    """How often D scores a good rationale above a bad one of the same held-out question (ties count half).

    Good is what the exact check says where there is one (toy), else what the vote said. NaN without a pair.
    """
    owners: list[Question] = []
    rationales: list[str] = []
    goods: list[Tensor] = []
    for q in [q for q in questions if q.held_out][:200]:
        texts = q.positives + q.negatives
        good = [data.is_valid(q.example, t) if q.example.story else i < len(q.positives) for i, t in enumerate(texts)]
        if any(good) and not all(good):
            owners += [q] * len(texts)
            rationales += texts
            goods.append(torch.tensor(good))
    if not goods:
        return math.nan
    wins = []
    scores = models.score_constant(owners, rationales).cpu()
    for score, is_good in zip(scores.split([len(good) for good in goods]), goods, strict=True):
        margin = score[is_good][:, None] - score[~is_good]  # (good, bad)
        wins.append((margin > 0).float() + (margin == 0).float() / 2)
    return torch.cat([pairs.flatten() for pairs in wins]).mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, seeds and signals


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; everything up to the last checkpoint is safe."""


class Signals:
    """Ends the program at once, or, inside `with guard:`, where `stop_if_asked` finds nothing half done."""

    came: int | None = None
    guarded = False

    def __call__(self, number: int, _: Any) -> None:
        again, self.came = self.came, number
        if not self.guarded or again:
            raise Stopped

    def __enter__(self) -> None:
        self.guarded = True

    def __exit__(self, *_: object) -> None:
        self.guarded = False

    def stop_if_asked(self) -> None:
        if self.came:
            raise Stopped


guard = Signals()


def step_seed(seed: int, step: int, what: str) -> int:
    """Randomness depends on the position in training alone, so a resumed run draws what an uninterrupted one does."""
    return zlib.crc32(f"{seed}/{step}/{what}".encode())


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def clip_and_step(optimizer: torch.optim.Optimizer) -> None:
    """Student and discriminator are clipped apart, so that neither steers the other's step."""
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def tensors_of(models: Models, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that training changes, by name; tied weights appear once."""
    tensors = {f"student.{name}": p.data for name, p in models.student.named_parameters()}
    if models.judge is not None:
        parts = models.judge.mlp if models.options.judge == "shared" else models.judge
        tensors |= {f"judge.{name}": p.data for name, p in parts.named_parameters()}
    for kind, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}.{i}.{name}": value for name, value in state.items()}
    return tensors


def save_checkpoint(
    run: Path, models: Models, optimizers: dict[str, torch.optim.Optimizer], progress: dict[str, Any]
) -> None:
    """Write checkpoint.safetensors whole or not at all; the one before becomes previous.safetensors."""
    path, temporary = run / "checkpoint.safetensors", run / "checkpoint.tmp"
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(models, optimizers).items()}
    try:
        save_file(tensors, temporary, {"progress": json.dumps(progress)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, run / "previous.safetensors")
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"no checkpoint could be written to {run} ({first_line(error)}): make room and start again.")


def load_checkpoint(run: Path, models: Models, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Any] | None:
    """Restore the newest readable checkpoint; its progress, or None where there is none."""
    for name in ("checkpoint.safetensors", "previous.safetensors"):
        if not (run / name).exists():
            continue
        try:
            with safe_open(run / name, "pt") as file:
                progress = json.loads(file.metadata()["progress"])
                saved = {key: file.get_tensor(key) for key in list(file.keys())}
        except (SafetensorError, OSError, ValueError) as error:
            print(f"{run / name} is damaged ({first_line(error)}); going back to the one before.")
            continue
        for key, value in tensors_of(models, {}).items():
            value.copy_(saved[key])
        for kind, optimizer in optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in saved.items():
                if key.startswith(f"{kind}."):
                    _, i, part = key.split(".")
                    state.setdefault(int(i), {})[part] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return progress
    return None


# ----------------------------------------------------------------------------------------------------------------------
# The training loop


def pass_batches(questions: list[Question], options: Options, number: int) -> list[list[Question]]:
    """The batches of one pass over the training set: shuffled by seed and pass, alike in length within a batch."""
    rng, size = random.Random(step_seed(options.seed, number, "order")), options.batch_size
    order = rng.sample(questions, len(questions))
    pools = [order[i : i + 20 * size] for i in range(0, len(order), 20 * size)]
    pools = [sorted(pool, key=lambda q: len(q.example.input)) for pool in pools]
    batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
    return rng.sample(batches, len(batches))


def round_batches(questions: list[Question], options: Options, round_: int) -> list[list[Question]]:
    """The batches of a round: `round_steps` steps of the stream of passes."""
    a_pass = math.ceil(len(questions) / options.batch_size)
    steps = range(round_ * options.round_steps, (round_ + 1) * options.round_steps)
    passes = {n: pass_batches(questions, options, n) for n in range(steps[0] // a_pass, steps[-1] // a_pass + 1)}
    return [passes[step // a_pass][step % a_pass] for step in steps]


def negatives_for(models: Models, questions: list[Question], round_: int, run: Path) -> dict[str, str]:
    """The student's negatives of a round, by question id, from the queue of rounds kept in the run directory.

    The queue is what makes old students unnecessary: what round t will need is written by the student of round
    t - j at the start of that round (by the oldest student, of round 0, for the rounds before j).
    """
    options = models.options
    if options.negatives not in ("student", "fixed") or options.method != "qcrd":
        return {}
    lag = options.rounds if options.negatives == "fixed" else options.lag  # a fixed student wrote everything in round 0
    users = [t for t in range(round_, options.rounds) if source_round(t, lag) == round_]
    path = run / "negatives" / f"round-{round_:03d}.jsonl"
    if users and not path.exists():
        asked = [q for t in users for batch in round_batches(questions, options, t) for q in batch]
        draw_negatives(models, asked, round_, path)
    source = run / "negatives" / f"round-{source_round(round_, lag):03d}.jsonl"
    return {row["id"]: row["output"] for _, row in data.parse_jsonl(data.read_file(source), str(source))}


def make_optimizers(models: Models) -> dict[str, torch.optim.Optimizer]:
    """AdamW of the student, and of what the discriminator trains of its own."""
    options, judge = models.options, models.judge
    optimizers: dict[str, torch.optim.Optimizer] = {
        "student_optimizer": torch.optim.AdamW(models.student.parameters(), options.lr, fused=True)
    }
    if judge is not None:
        trained = judge.parameters() if options.judge == "own" else judge.mlp.parameters()
        optimizers["judge_optimizer"] = torch.optim.AdamW(trained, options.judge_lr, fused=True)
    return optimizers


def train(models: Models, questions: list[Question], run: Path) -> list[dict[str, Any]]:
    """All rounds, from the last checkpoint where there is one; the metrics of each round."""
    options, optimizers = models.options, make_optimizers(models)
    progress = load_checkpoint(run, models, optimizers)
    if progress is not None:
        print(f"Going on from step {progress['step']} of {options.rounds * options.round_steps}.")
    else:
        progress = {"step": 0, "sums": {}, "rounds": [], "seconds": 0.0, "drawing": 0.0}
        if models.judge is not None:
            pretrain_judge(models, questions, optimizers["judge_optimizer"])
            print(f"discriminator pretrained: AUC {judge_auc(models, questions):.3f} on held-out questions")
        save_checkpoint(run, models, optimizers, progress)
    total = options.rounds * options.round_steps
    saved = time.monotonic()
    with tqdm(total=total, initial=progress["step"], desc="training", unit="step", mininterval=0.5) as bar:
        for round_ in range(progress["step"] // options.round_steps, options.rounds):
            started = time.monotonic()
            drawn = negatives_for(models, questions, round_, run)
            batches = round_batches(questions, options, round_)
            progress["drawing"] += time.monotonic() - started
            for batch in batches[progress["step"] % options.round_steps :]:
                began = time.monotonic()
                train_step(models, optimizers, batch, drawn, round_, progress, total)
                bar.update()
                progress["seconds"] += time.monotonic() - began
                if progress["step"] % options.round_steps == 0:
                    break  # the checkpoint after this round's line is the next: one before it would lose the line
                if guard.came or time.monotonic() - saved > 60 * options.save_minutes:
                    save_checkpoint(run, models, optimizers, progress)
                    saved = time.monotonic()
                    guard.stop_if_asked()
            line = round_line(models, questions, round_, progress)
            tqdm.write(" ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
            if not progress["rounds"]:
                for tokens, flag in ((models.inputs, "--max-input"), (models.targets, "--max-target")):
                    if tokens.cut:
                        tqdm.write(f"{tokens.cut} of {len(tokens.known)} texts are longer than {flag} and were cut.")
            progress["rounds"].append(line)
            progress |= {"sums": {}, "seconds": 0.0, "drawing": 0.0}
            # the metrics before the checkpoint: after the last checkpoint no round runs again to write them
            write_jsonl(run / "metrics.jsonl", progress["rounds"])
            save_checkpoint(run, models, optimizers, progress)
            saved = time.monotonic()
            guard.stop_if_asked()
    return progress["rounds"]


def train_step(
    models: Models,
    optimizers: dict[str, torch.optim.Optimizer],
    batch: list[Question],
    drawn: dict[str, str],
    round_: int,
    progress: dict[str, Any],
    total: int,
) -> None:
    """One of `total` steps of both optimizers; adds its sums to `progress`. UserError if a loss is not finite."""
    options, step = models.options, progress["step"]
    torch.manual_seed(step_seed(options.seed, step, "step"))
    random.seed(step_seed(options.seed, step, "step"))  # scheme "sampling" draws from it
    judge_now = models.judge is not None and step % options.judge_every == 0
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    rate = options.lr * min(1, (step + 1) / WARMUP) * (1 - step / total)
    optimizers["student_optimizer"].param_groups[0]["lr"] = rate
    losses = [student_loss, discriminator_loss] if judge_now else [student_loss]
    size = math.ceil(len(batch) / options.grad_accum)
    for part in [batch[i : i + size] for i in range(0, len(batch), size)]:
        # eq. 8 is a sum, so its terms can go backward one after the other: one graph in memory at a time
        for loss_of in losses:
            with models.autocast():  # around all of a loss, so that each weight is cast once
                loss, sums = loss_of(models, part, drawn, round_)
            if not torch.isfinite(loss):
                at = f"step {step} (questions {', '.join(q.example.id for q in part[:5])}, ...)"
                raise UserError(f"the loss is {loss.item()} at {at}: lower --lr or use --precision fp32.")
            if loss.requires_grad:
                (loss * len(part) / len(batch)).backward()
            for key, value in sums.items():
                progress["sums"][key] = progress["sums"].get(key, 0) + value
    for name, optimizer in optimizers.items():
        if name == "student_optimizer" or judge_now:
            clip_and_step(optimizer)
    progress["step"] = step + 1


def round_line(models: Models, questions: list[Question], round_: int, progress: dict[str, Any]) -> dict[str, Any]:
    """The figures of a finished round: means over its questions, D's mean scores, and examples per second."""
    sums = progress["sums"]
    line: dict[str, Any] = {"round": round_}
    for name in ("pred", "positive", "negative", "judge"):
        if name in sums:
            line[f"L_{name}"] = sums[name] / max(1, sums.get(f"#{name}", sums["n"]))
    for name in ("D pos", "D teacher neg", "D student neg"):
        if sums.get(f"#{name}"):
            line[name] = sums[name] / sums[f"#{name}"]
    if models.judge is not None:
        line["D auc"] = judge_auc(models, questions)
        if line["D auc"] < 0.55 or max(line.get("D pos", 1), line.get("D teacher neg", 1)) < 0.05:
            tqdm.write("warning: the discriminator is near chance, or its scores have collapsed: lower --judge-lr.")
    line |= {name: sums[name] for name in ("no positive", "no negative") if name in sums}
    line["examples/s"] = sums["n"] / (progress["seconds"] + progress["drawing"])
    line["drawing share"] = progress["drawing"] / (progress["seconds"] + progress["drawing"])
    return line


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def use_bf16(precision: str, device: torch.device, d_model: int) -> bool:
    """bf16 autocast gains on recent GPUs, and on CPUs with bf16 instructions once the matrices are large."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return d_model >= 256 and torch.cpu._is_avx512_bf16_supported()


def load_models(options: Options) -> Models:
    """The student named by --student and a discriminator started from its encoder; UserError if unusable."""
    path = str(data.tiny_student()) if options.student == "tiny" else options.student
    name = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    attention = "eager" if name == "cpu" and options.student == "tiny" else None  # a tenth faster for matrices so small
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        student = AutoModelForSeq2SeqLM.from_pretrained(path, trust_remote_code=False, attn_implementation=attention)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--student {options.student} is not a seq2seq model with its tokenizer: {first_line(error)}")
    if tokenizer.unk_token_id in tokenizer("predict: explain:").input_ids:
        raise UserError(f"--student {options.student} has a tokenizer that knows no English: add its tokenizer files.")
    if len(tokenizer) > student.config.vocab_size:
        raise UserError(f"--student {options.student} has fewer tokens than its tokenizer: they are not of one model.")
    try:
        student.to(torch.device(name)).train()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {options.device} cannot be used: {first_line(error)}")
    if name == "cpu":
        for parent in list(student.modules()):
            for child_name, child in parent.named_children():
                if type(child) is nn.Dropout:
                    setattr(parent, child_name, Dropout(child.p))
    judge = None
    if options.method == "qcrd" and options.judge != "none":
        torch.manual_seed(step_seed(options.seed, 0, "mlp"))
        encoder = student.get_encoder()
        judge = Discriminator(encoder if options.judge == "shared" else deepcopy(encoder), student.config.d_model)
        judge.to(torch.device(name)).train()
        if options.judge == "frozen":
            judge.encoder.requires_grad_(False)
    return Models(student, tokenizer, judge, options)


# Options that must be above 0, and those that may be 0; lists of names keep the checks in one place.
POSITIVE = ("k", "train_size", "api_concurrency", "student_temperature", "judge_lr", "judge_steps", "judge_every", "rounds", "round_steps", "batch_size", "grad_accum", "lr", "max_input", "max_target")  # fmt: skip
NOT_NEGATIVE = ("temperature", "toy_errors", "lag", "alpha1", "alpha2", "alpha3", "beta", "delta", "mi_weight", "seed", "save_minutes")  # fmt: skip


class Help(ArgumentDefaultsHelpFormatter):
    """One line an option, as far as it fits; a default of None is told in words."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action: Action) -> str:
        return action.option_strings[-1] + f" {self._format_args(action, 'X') if action.nargs != '?' else ''}".rstrip()

    def _get_help_string(self, action: Action) -> str:
        known = action.default not in (None, "", [], SUPPRESS) and action.default is not False
        return f"{action.help} (default {action.default})" if known else action.help or ""


class Parser(HfArgumentParser):
    """Bad options end in one sentence instead of the usage."""

    def __init__(self, parts: Any, description: str) -> None:
        super().__init__(
            parts, description=description, allow_abbrev=False, formatter_class=Help, usage="%(prog)s [options]"
        )

    def error(self, message: str) -> Any:
        raise UserError(f"{message}: see --help.")

    def parse(self, argv: Sequence[str] | None) -> list[Any]:
        """The dataclasses of the command line."""
        *parts, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True)
        if unknown:
            raise UserError(f"{unknown[0]} is not an option: see --help.")
        return parts


def check_options(options: Options) -> None:
    for name in POSITIVE + NOT_NEGATIVE:
        value = getattr(options, name)
        flag = f"--{name.replace('_', '-')}"
        if value is not None and not math.isfinite(value):
            raise UserError(f"{flag} is {value}: it must be a finite number.")
        if value is not None and (value < 0 or value == 0 and name in POSITIVE):
            raise UserError(f"{flag} is {value}: it must be {'above' if name in POSITIVE else 'at least'} 0.")
    if options.negatives == "fixed" and not (options.fixed_student and Path(options.fixed_student, "student").is_dir()):
        raise UserError("--negatives fixed needs --fixed-student: the run directory of a finished --method dss run.")
    if options.toy_errors > 1:
        raise UserError(f"--toy-errors is {options.toy_errors}: it is a probability, from 0 to 1.")
    if options.max_input < 16:
        raise UserError(f"--max-input is {options.max_input}: a question needs at least 16 tokens.")


def fill_in(options: Options) -> Options:
    """Settle the options that depend on the student."""
    defaults = TINY if options.student == "tiny" else PUBLISHED
    for key, value in defaults.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return options


def parse_options(argv: Sequence[str] | None = None) -> Options:
    """The command line as Options, checked, with the open defaults filled in."""
    parts: Any = [TaskOptions, MethodOptions, TrainOptions]
    parser = Parser(parts, (__doc__ or "").split("\n")[0])
    options = Options(**{key: value for part in parser.parse(argv) for key, value in asdict(part).items()})
    fill_in(options)
    check_options(options)
    return options


def open_run(options: Options) -> Path:
    """The run directory, ready for this run: new, or left unfinished by one with the same options."""
    student = re.sub(r"[^\w.-]+", "-", options.student).strip("-")
    run = Path(options.out or f"runs/{Path(options.task).stem}-{student}-{options.method}-s{options.seed}")
    config = run / "config.json"
    free = ("out", "overwrite", "save_minutes", "device", "api_concurrency")  # these may differ in a run that goes on
    wanted = {k: v for k, v in asdict(options).items() if k not in free}
    try:
        if options.overwrite and config.exists():
            shutil.rmtree(run)
        if config.exists():
            there = json.loads(config.read_text(encoding="utf-8"))
            other = [k for k in wanted if wanted[k] != there.get(k)]
            if other:
                names = ", ".join(f"--{k.replace('_', '-')} {there.get(k)}" for k in other)
                raise UserError(f"{run} holds a run with other options ({names}): use --out, or --overwrite.")
        (run / "negatives").mkdir(parents=True, exist_ok=True)
        write_atomically(config, json.dumps(wanted, indent=2) + "\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{run} cannot be used as a run directory ({first_line(error)}): name another with --out.")
    return run


def prepare(options: Options) -> tuple[Task, dict[str, list[Example]], list[Question]]:
    """The task's splits and its voted questions; settles how long a round and the run are."""
    task, splits = data.load_task(options.task, options.data, options.train_size)
    samples = {}
    if options.method != "finetune" or options.labels == "teacher":
        samples = data.collect(task, splits["train"], options.teacher, options)
    questions = vote(task, splits["train"], samples, options)
    options.round_steps = options.round_steps or math.ceil(len(questions) / options.batch_size)
    options.rounds = options.rounds or min(DEFAULT_ROUNDS, math.ceil(PUBLISHED_STEPS / options.round_steps))
    return task, splits, questions


def finish(models: Models, task: Task, splits: dict[str, list[Example]], run: Path) -> dict[str, float]:
    """Save the student and the discriminator, and score the student on the validation and test splits."""
    models.student.save_pretrained(run / "student")
    models.tokenizer.save_pretrained(run / "student")
    if models.judge is not None:
        state = {k: v.contiguous().clone() for k, v in models.judge.state_dict().items()}
        save_file(state, run / "discriminator.safetensors")
    valid, _ = evaluate(models, task, splits["valid"], "validation")
    result, rows = evaluate(models, task, splits["test"], "test")
    result |= {f"validation {key}": value for key, value in valid.items()}
    write_jsonl(run / "predictions.jsonl", rows)
    return result


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the command line; the test figures."""
    options = parse_options(argv)
    run = open_run(options)
    if not (run / "result.json").exists():
        task, splits, questions = prepare(options)
        models = load_models(options)
        with guard:
            auc = train(models, questions, run)[-1].get("D auc")
        result = finish(models, task, splits, run) | ({} if auc is None else {"D auc": auc})
        write_atomically(run / "result.json", json.dumps(result) + "\n")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    print(", ".join(f"{key} {value:.3f}" for key, value in result.items()))
    print(f"Everything is in {run}/")
    return result


def run_command(command: Callable[[], Any]) -> None:
    """Run a command line; bad input and signals end it with one sentence and their exit code."""
    signal.signal(signal.SIGINT, guard)
    signal.signal(signal.SIGTERM, guard)
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full: lower --batch-size or raise --grad-accum.", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped. What was done is saved; the same command goes on from there.", file=sys.stderr)
        sys.exit(128 + (guard.came or signal.SIGINT))


if __name__ == "__main__":
    run_command(main)
