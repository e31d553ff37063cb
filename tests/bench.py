"""Speed and memory of this project beside two plain peers, measured in one process, interleaved.

    python tests/bench.py                          # T5-small's shape, real SVAMP, batch 16: tables
    python tests/bench.py --shape base --batch 32
    python tests/bench.py --memory anli --batch 64 # peak memory on a task's longest batch
    python tests/bench.py --count --batch 64       # operations and reads of scalars in a step
    python tests/bench.py --grow                   # with the batch, the rationales, the questions

Peers: transformers' Seq2SeqTrainer doing DSS as its authors' code does, two forward passes and a
padding collator, and QCRD written the obvious way: one model call per rationale, the discriminator
on all of them at every step. The trainer needs `pip install accelerate`; all need SVAMP, or the
task, with its samples in ../shared/data (or --data). A GPU is used where there is one.

Weights are random. --delta is so large that every negative is active: no step is spared by luck.
The learning rate is 0, so that a contender does the same work on the same shapes in every repeat,
and the first one, which is not timed, has shown it all of them.
"""

import argparse
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Tokenizer,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import qcrd
from qcrd import Question

BEGAN = time.perf_counter()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# No repeat begins this many seconds after the start: a table takes two minutes of a GPU's time.
REPEATS_END = 70 if DEVICE.type == "cuda" else 3600
SHAPES = {
    "tiny": {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}
VOCABULARY = {"vocab_size": 32_128}  # T5's
# How many operations a step has depends on the depth alone. With this width a CPU's groups of
# rationales have as many tokens as a GPU's.
THIN = {"d_model": 64, "d_kv": 8, "d_ff": 64, "vocab_size": 4_128}


class Done(NamedTuple):
    """What a contender did in a run of its batches."""

    seconds: float
    questions: int


Batches = list[list[Question]]
Contender = Callable[[], Done]  # trains on its batches, the same ones in every run


def synchronized() -> float:
    """The time at which the GPU has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_student(shape: dict[str, int], texts: list[str], folder: Path) -> None:
    """A T5 of random weights, with a tokenizer trained on the texts."""
    pieces = data.sentence_pieces(texts, 4000)
    # Made-up words fill the vocabulary, so that what random weights write is read again as just
    # as many tokens.
    pieces += [(f"▁madeup{i}", -20.0) for i in range(len(pieces), shape["vocab_size"] - 128)]
    tokenizer = T5Tokenizer(vocab=pieces)  # adds a hundred sentinels
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**ids, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# The contenders


def load(folder: Path, method: str, precision: str) -> tuple[qcrd.Student, qcrd.Options]:
    """The student, and options with which every negative counts and no weight changes."""
    changes = {"precision": precision, "delta": 100.0, "lr": 0.0, "disc_lr": 0.0}
    options = qcrd.Options(**(qcrd.presets(method, str(folder)) | changes))
    return qcrd.load_student(options.student, options), options


def trainer_dss(folder: Path, batches: Batches, precision: str) -> Contender:
    """transformers' trainer on the questions of these batches, in an order of its own."""
    student, _ = load(folder, "dss", precision)
    model, tokenizer = student.model, student.tokenizer
    collate = DataCollatorForSeq2Seq(tokenizer, model)
    rows = []
    for q in chain.from_iterable(batches):
        row = {}
        for task, target in (("predict", q.label), ("explain", q.positives[0])):
            inputs = tokenizer(f"{task}: {q.example.input}").input_ids
            row[task] = {"input_ids": inputs, "labels": tokenizer(target).input_ids}
        rows.append(row)

    def collate_tasks(items: list[dict]) -> dict[str, Any]:
        return {task: collate([item[task] for item in items]) for task in items[0]}

    class TwoTasks(Seq2SeqTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = 0.5 * model(**inputs["predict"]).loss + 0.5 * model(**inputs["explain"]).loss
            return (loss, {}) if return_outputs else loss

    class Clock(TrainerCallback):
        begin = end = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = self.begin or synchronized()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.end = synchronized()

    def run() -> Done:
        torch.use_deterministic_algorithms(False)  # as it is by default
        arguments = Seq2SeqTrainingArguments(
            str(folder / "trainer"),
            max_steps=len(batches),
            per_device_train_batch_size=max(map(len, batches)),
            learning_rate=0.0,
            bf16=student.bf16,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=DEVICE.type == "cpu",
            dataloader_pin_memory=DEVICE.type == "cuda",
        )
        clock = Clock()
        trainer = TwoTasks(
            model, arguments, data_collator=collate_tasks, train_dataset=rows, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return Done(clock.end - clock.begin, len(rows))

    return run


def obvious_qcrd(folder: Path, batches: Batches, precision: str) -> Contender:
    """QCRD as a first version is written: loops over rationales, everything with gradients."""
    student, options = load(folder, "qcrd", precision)
    model, tokenizer = student.model, student.tokenizer
    encoder = T5EncoderModel(deepcopy(model.config)).to(DEVICE)
    encoder.load_state_dict(model.get_encoder().state_dict(), strict=False)
    disc = qcrd.Discriminator(encoder, model.config.d_model).to(DEVICE)
    optimizer = torch.optim.AdamW([*model.parameters(), *disc.parameters()], options.lr)

    def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
        how: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 256}
        return tokenizer(texts, return_tensors="pt", **how).to(DEVICE)

    def nll(inputs: list[str], targets: list[str]) -> torch.Tensor:
        labels = tokens(targets).input_ids
        labels = labels.masked_fill(labels == 0, -100)
        logits = model(**tokens(inputs), labels=labels).logits.float().transpose(1, 2)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses.sum(1) / (labels != -100).sum(1)

    def loss_of(batch: list[Question]) -> torch.Tensor:
        explain = [f"explain: {q.example.input}" for q in batch]
        hot = {"do_sample": True, "temperature": options.student_temperature, "max_new_tokens": 64}
        written = tokenizer.batch_decode(
            model.generate(**tokens(explain), **hot), skip_special_tokens=True
        )
        rationales = qcrd.rationales_of(
            [replace(q, negatives=[*q.negatives, own]) for q, own in zip(batch, written)], {}
        )
        # the first rationale of each question, then the second, and so on
        columns: dict[int, list[qcrd.Rationale]] = defaultdict(list)
        sides: dict[tuple[int, bool], list[qcrd.Rationale]] = defaultdict(list)
        seen: dict[int, int] = defaultdict(int)
        for r in rationales:
            sides[r.row, r.is_pos].append(r)
            columns[seen[r.row]].append(r)
            seen[r.row] += 1
        in_order, l, score = [], [], []
        for column in columns.values():
            in_order += column
            l.append(nll([explain[r.row] for r in column], [r.text for r in column]))
            score.append(disc(**tokens([f"{explain[r.row]} {r.text}" for r in column])))
        for r, value in zip(in_order, torch.cat(l).tolist(), strict=True):
            r.l = value
        for (_, is_pos), side in sides.items():
            picked = qcrd.shares([r.l for r in side], "min" if is_pos else "max")
            for r, share in zip(side, picked, strict=True):
                r.share = share
        share = torch.tensor([r.share for r in in_order], device=DEVICE)
        is_pos = torch.tensor([r.is_pos for r in in_order], device=DEVICE)
        row = torch.tensor([r.row for r in in_order], device=DEVICE)
        s = torch.cat(score)
        weight = qcrd.quality_weights(share, s, is_pos)
        L_cl, _, _ = qcrd.contrastive_loss(
            torch.cat(l), weight, is_pos, len(batch), delta=options.delta
        )
        with torch.autocast(DEVICE.type, enabled=False):  # cross-entropy of scores needs fp32
            L_D = qcrd.discriminator_loss(s, is_pos, row)
        L_pred = nll([f"predict: {q.example.input}" for q in batch], [q.label for q in batch])
        return 0.5 * L_pred.mean() + 0.5 * L_cl + 0.5 * L_D

    def run() -> Done:
        torch.use_deterministic_algorithms(False)
        torch.manual_seed(0)
        began = synchronized()
        for batch in batches:
            with student.autocast():
                loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            torch.nn.utils.clip_grad_norm_(disc.parameters(), 1.0)
            optimizer.step()
        return Done(synchronized() - began, sum(map(len, batches)))

    return run


def ours(
    folder: Path,
    batches: Batches,
    precision: str,
    method: str,
    self_negatives: qcrd.SelfNegatives | None = None,
    shares: list[float] | None = None,
) -> Contender:
    """This project's own steps.

    For qcrd it first writes the self-adversarial negatives that they use, unless they are given;
    the share of its time that this takes goes into `shares`.
    """
    student, options = load(folder, method, precision)
    options.batch_size = max(map(len, batches))
    disc = None
    if method == "dss":  # as qcrd.vote leaves the questions for dss
        batches = [
            [replace(q, positives=q.positives[:1], negatives=[]) for q in batch]
            for batch in batches
        ]
        self_negatives = {}
    else:
        disc = qcrd.make_discriminator(student, options)
    optimizers = qcrd.make_optimizers(student, disc, options)
    questions = list(chain.from_iterable(batches))
    limit = qcrd.target_length(student, [text for q in questions for text in q.positives], 0.9)

    def write() -> qcrd.SelfNegatives:
        torch.manual_seed(0)
        inputs = [f"explain: {q.example.input}" for q in questions]
        texts = student.write(inputs, "negatives", limit, options.student_temperature)
        return {q.example.id: text for q, text in zip(questions, texts, strict=True)}

    def run() -> Done:
        # as qcrd.load_student leaves it, whatever another contender has set since
        torch.use_deterministic_algorithms(DEVICE.type == "cuda")
        began = synchronized()
        negatives = write() if self_negatives is None else self_negatives
        written = synchronized()
        for step, batch in enumerate(batches):
            qcrd.train_step(student, disc, optimizers, batch, negatives, 0, step, options)
        seconds = synchronized() - began
        if shares is not None:
            shares.append((written - began) / seconds)
        return Done(seconds, len(questions))

    return run


TRAINER, OBVIOUS = "Seq2SeqTrainer, dss", "obvious qcrd"


def contenders(
    folder: Path, batches: Batches, precision: str, shares: list[float]
) -> dict[str, Callable[[], Contender]]:
    """By name, what makes each contender ready."""
    few = batches[-max(2, len(batches) // 4) :]  # it is slow, and its steps are all alike
    return {
        TRAINER: partial(trainer_dss, folder, batches, precision),
        "ours, dss": partial(ours, folder, batches, precision, "dss"),
        "ours, qcrd": partial(ours, folder, batches, precision, "qcrd", shares=shares),
        OBVIOUS: partial(obvious_qcrd, folder, few, precision),
    }


# --------------------------------------------------------------------------------------------------
# The questions


def load_questions(task: str, folder: Path) -> list[Question]:
    """A task's training questions with the real samples; those without a positive are left out."""
    release, samples = folder / "datasets.zip", folder / "samples" / f"{task}.jsonl"
    for path in (release, samples):
        if not path.exists():
            raise qcrd.UserError(f"{path} does not exist: name its folder with --data.")
    options = qcrd.Options(task=task, data=str(release), teacher=[str(samples)])
    *_, questions = qcrd.prepare(options)
    return [q for q in questions if q.positives]


def with_rationales(q: Question, k: int) -> Question:
    """The question with k rationales: its own, or where these are too few, repeated with a word
    more."""
    own = [*q.positives, *q.negatives]
    texts = own[:k] + [f"{own[i % len(own)]} {i}" for i in range(len(own), k)]
    negatives = [text for text in texts if text in q.negatives]
    return replace(q, positives=[t for t in texts if t not in negatives], negatives=negatives)


def full_batches(questions: list[Question], size: int, steps: int) -> Batches:
    """The first batches of a round, without a smaller one that ends a pass."""
    options = qcrd.Options(batch_size=size, round_steps=steps + 1)
    batches = qcrd.round_batches(questions, options, 0)
    return [batch for batch in batches if len(batch) == size][:steps]


def longest_batch(questions: list[Question], size: int) -> list[Question]:
    """The questions with the longest inputs and rationales, with four rationales each."""

    def characters(q: Question) -> int:
        return sum(map(len, [q.example.input, *q.positives, *q.negatives]))

    filled = [with_rationales(q, 4) for q in questions]
    return sorted(filled, key=characters, reverse=True)[:size]


# --------------------------------------------------------------------------------------------------
# What is measured


def peak_memory(name: str, questions: list[Question], options: argparse.Namespace) -> list[float]:
    """GB that this process has used at most after a step on the longest batch.

    On a GPU those of the tensors, and those that were reserved for them. Small steps come first,
    so that the optimizers' state is in memory, and so that this step updates the discriminator.
    """
    longest = longest_batch(questions, options.batch)
    batches = [longest[:2]] * 4 + [longest]
    contenders(options.student, batches, options.precision, [])[name]()()
    if DEVICE.type == "cuda":
        return [torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9]
    status = Path("/proc/self/status").read_text()  # ru_maxrss is inherited from the parent
    return [int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9]


def in_own_processes(
    names: list[str], task: str, folder: Path, options: argparse.Namespace
) -> dict[str, list[float]]:
    """The peak memory of each contender, in a process of its own."""
    # a large GPU has room for all at once, and they do not see one another's memory
    together = DEVICE.type == "cuda" and torch.cuda.get_device_properties(0).total_memory > 60e9
    processes = {}
    for name in names:
        command = [sys.executable, __file__, "--memory", task, "--memory-of", name]
        command += ["--student", str(folder), "--data", str(options.data)]
        command += ["--batch", str(options.batch), "--precision", options.precision]
        processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if not together:
            processes[name].wait()
    found = {}
    for name, process in processes.items():
        printed, _ = process.communicate()
        if process.returncode:
            raise qcrd.UserError(f"{name} ended with exit code {process.returncode}: see above.")
        found[name] = [float(word) for word in printed.splitlines()[-1].split()]
    return found


def memory(folder: Path, options: argparse.Namespace) -> None:
    """Print the peak memory of dss and qcrd on a task's longest batch."""
    for name in ("ours, dss", "ours, qcrd"):
        peaks = in_own_processes([name], options.memory, folder, options)[name]
        told = f"{name}, {options.memory}, batch {options.batch}, {options.precision}: peak "
        if DEVICE.type == "cuda":
            print(f"{told}{peaks[0]:.2f} GB of tensors, {peaks[1]:.2f} GB reserved", flush=True)
        else:
            print(f"{told}{peaks[0]:.2f} GB of the process", flush=True)


class CountOperations(TorchDispatchMode):
    """Counts the operations that are dispatched, views left out, and the scalars that are read."""

    operations = scalars = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += not func.is_view  # a view computes nothing
        self.scalars += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class CountLists(TorchFunctionMode):
    """Counts the tensors that are read as lists, which on a CPU is no dispatched operation."""

    lists = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.lists += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


def count(folder: Path, questions: list[Question], options: argparse.Namespace) -> None:
    """Print the operations and reads in a training step, the writing of negatives left out."""
    batches = full_batches(questions, options.batch, 4)  # one of the four updates D
    given = {q.example.id: f"{q.positives[0]} made up" for q in chain.from_iterable(batches)}
    contests = contenders(folder, batches, options.precision, [])
    contests["ours, qcrd"] = partial(ours, folder, batches, options.precision, "qcrd", given)
    del contests[OBVIOUS]
    print("| a step | operations | scalars read | tensors read as lists |\n|---|---|---|---|")
    for name, make in contests.items():
        run = make()
        run()
        with CountOperations() as counted, CountLists() as read:
            run()
        found = [counted.operations, counted.scalars, read.lists]
        cells = " | ".join(f"{value / len(batches):.1f}" for value in found)
        print(f"| {name} | {cells} |", flush=True)


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a matrix product of a size that these students have."""
    a, b = (torch.randn(1024, 1024, device=DEVICE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(20):
        began = synchronized()
        a @ b
        times.append(synchronized() - began)
    return 2 * 1024**3 / statistics.median(times) / 1e9


def count_products(
    folder: Path, questions: list[Question], speed: dict[str, float], precision: str
) -> None:
    """Print the matrix products a question, counted on small batches, against the machine's."""
    bf16 = precision == "bf16" or precision == "auto" and DEVICE.type == "cuda"
    rate = product_rate(torch.bfloat16 if bf16 else torch.float32)
    print(f"\n| | GFLOP a question | of {rate:.0f} GFLOP/s |\n|---|---|---|")
    batches = full_batches(questions, 4, 4)  # one of the four updates D
    for name, make in contenders(folder, batches, precision, []).items():
        run = make()
        with FlopCounterMode(display=False) as counter:
            done = run()
        flops = counter.get_total_flops() / done.questions / 1e9
        print(f"| {name} | {flops:.1f} | {speed[name] * flops / rate:.0%} |", flush=True)


def table(folder: Path, questions: list[Question], options: argparse.Namespace) -> None:
    """Print the peak memory, the speed and the matrix products of all contenders."""
    shares: list[float] = []
    batches = full_batches(questions, options.batch, options.steps)
    contests = contenders(folder, batches, options.precision, shares)
    peaks = in_own_processes(list(contests), "svamp", folder, options)
    kinds = "peak GB of tensors | peak GB reserved" if DEVICE.type == "cuda" else "peak GB"
    print(f"| on the longest batch | {kinds} | ratio to the trainer |")
    print("|---|---|---|" + "---|" * (DEVICE.type == "cuda"))
    for name, of_name in peaks.items():
        cells = " | ".join(f"{gigabytes:.2f}" for gigabytes in of_name)
        print(f"| {name} | {cells} | {of_name[-1] / peaks[TRAINER][-1]:.2f} |")
    print(flush=True)

    runs = {name: make() for name, make in contests.items()}
    for run in runs.values():
        run()  # sees every shape once
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats):
        if repeat and time.perf_counter() - BEGAN > REPEATS_END:
            break
        for name, run in runs.items():
            done = run()
            speeds[name].append(done.questions / done.seconds)
    speed = {name: statistics.median(found) for name, found in speeds.items()}
    times = len(speeds[TRAINER])
    print(f"| median of {times} | questions/s | ratio to the trainer |\n|---|---|---|")
    for name in runs:
        print(f"| {name} | {speed[name]:.2f} | {speed[name] / speed[TRAINER]:.2f} |")
    print(f"\nqcrd against obvious qcrd: {speed['ours, qcrd'] / speed[OBVIOUS]:.1f} times")
    share = statistics.median(shares[1:])
    print(f"share of qcrd's time that writes negatives: {share:.0%}", flush=True)
    runs.clear()
    count_products(folder, questions, speed, options.precision)


def grow(folder: Path, questions: list[Question], options: argparse.Namespace) -> None:
    """Print how time grows with the batch, with the rationales, and with the questions."""

    def fastest(questions: list[Question], batch: int, method: str) -> float:
        """Questions a second, at best."""
        batches = full_batches(questions, batch, options.steps)
        run = ours(folder, batches, options.precision, method)
        run()
        runs = [run() for _ in range(options.repeats)]
        return max(done.questions / done.seconds for done in runs)

    print("| batch | dss, questions/s | qcrd, questions/s |\n|---|---|---|")
    for batch in (8, 16, 32):
        speeds = [fastest(questions, batch, method) for method in ("dss", "qcrd")]
        print(f"| {batch} | {speeds[0]:.2f} | {speeds[1]:.2f} |", flush=True)
    print("\n| rationales a question | qcrd, seconds a step |\n|---|---|")
    for k in (1, 2, 5, 10):
        filled = [with_rationales(q, k) for q in questions]
        print(f"| {k} | {options.batch / fastest(filled, options.batch, 'qcrd'):.2f} |", flush=True)
    print("\n| questions | seconds for the batches of a round |\n|---|---|")
    for n in (1_000, 10_000, 100_000):
        many = [questions[i % len(questions)] for i in range(n)]
        setting = qcrd.Options(batch_size=options.batch, round_steps=n // options.batch)
        began = time.perf_counter()
        qcrd.round_batches(many, setting, 0)
        print(f"| {n} | {time.perf_counter() - began:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="of each contender in a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--memory", metavar="TASK", help="peak memory on its longest batch")
    parser.add_argument("--count", action="store_true", help="operations and reads in a step")
    parser.add_argument("--grow", action="store_true", help="growth instead of the comparison")
    parser.add_argument("--student", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    questions = load_questions(options.memory or "svamp", options.data)
    if options.memory_of:
        print(*peak_memory(options.memory_of, questions, options))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = SHAPES[options.shape] | (THIN if options.count else VOCABULARY)
        make_student(shape, [t for q in questions for t in (q.example.input, *q.positives)], folder)
        if options.memory:
            memory(folder, options)
        elif options.count:
            count(folder, questions, options)
        elif options.grow:
            grow(folder, questions, options)
        else:
            table(folder, questions, options)


if __name__ == "__main__":
    qcrd.run_command(main)
