"""Speed and memory of this project beside two plain peers, measured in one process, interleaved.

    python tests/bench.py                             # T5-small's shape, real SVAMP, batch 16: the table
    python tests/bench.py --grow                      # how each figure grows with batch, rationales and questions
    python tests/bench.py --shape base --batch 32

Peers: transformers' Seq2SeqTrainer doing DSS as its authors' code does, two forward passes and a padding collator,
and QCRD written the obvious way: one model call per rationale, the discriminator on all of them at every step.
Weights are random and --delta is so large that every negative is active: no step is spared by luck. Needs
`pip install accelerate`, and SVAMP with its samples in ../shared/data (or --data). A GPU is used where there is one.
"""

import argparse
import io
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import torch.nn.functional as F
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data
import qcrd

SHAPES = {
    "tiny": {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4},
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = "auto"  # --precision sets it


def synchronized() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_student(shape: str, texts: list[str], folder: Path) -> None:
    """A T5 of a published shape and T5's vocabulary size, random weights, with a tokenizer trained on the texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=4000, character_coverage=1.0,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False)  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = T5Tokenizer(
        vocab=[(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    )
    config = T5Config(
        vocab_size=32128, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **SHAPES[shape]
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# The contenders: each gives a function that trains `steps` steps and returns the seconds that they took


def trainer_dss(
    student: Path, questions: list[qcrd.Question], batch: int
) -> Callable[[int], float]:
    models = qcrd.load_models(
        qcrd.fill_in(qcrd.Options(student=str(student), method="dss", precision=PRECISION))
    )
    model, tokenizer = models.student, models.tokenizer

    def features(prefix: str, q: qcrd.Question, target: str) -> dict[str, Any]:
        return {
            "input_ids": tokenizer(prefix + q.example.input).input_ids,
            "labels": tokenizer(target).input_ids,
        }

    rows = [
        {
            "pred": features("predict: ", q, q.label),
            "expl": features("explain: ", q, q.positives[0]),
        }
        for q in questions
        if q.positives
    ]
    collate = DataCollatorForSeq2Seq(tokenizer, model)

    class TwoTasks(Seq2SeqTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = 0.5 * model(**inputs["pred"]).loss + 0.5 * model(**inputs["expl"]).loss
            return (loss, {}) if return_outputs else loss

    class Clock(TrainerCallback):
        begin = end = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = self.begin or synchronized()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.end = synchronized()

    def run(steps: int) -> float:
        clock = Clock()
        arguments = Seq2SeqTrainingArguments(
            tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=batch, learning_rate=5e-5, bf16=models.bf16,
            remove_unused_columns=False, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
            use_cpu=DEVICE.type == "cpu", dataloader_pin_memory=DEVICE.type == "cuda")  # fmt: skip

        def pairs(items: list[dict]) -> dict[str, Any]:
            return {task: collate([item[task] for item in items]) for task in ("pred", "expl")}

        TwoTasks(
            model, arguments, data_collator=pairs, train_dataset=rows, callbacks=[clock]
        ).train()
        return clock.end - clock.begin

    return run


def obvious_qcrd(
    student: Path, questions: list[qcrd.Question], batch: int
) -> Callable[[int], float]:
    """As a first version is written: loops over rationales, everything with gradients."""
    models = qcrd.load_models(qcrd.fill_in(qcrd.Options(student=str(student), precision=PRECISION)))
    model, tokenizer = models.student, models.tokenizer
    encoder = T5EncoderModel(deepcopy(model.config)).to(DEVICE)
    encoder.load_state_dict(model.get_encoder().state_dict(), strict=False)
    judge = qcrd.Discriminator(encoder, model.config.d_model).to(DEVICE)
    optimizer = torch.optim.AdamW([*model.parameters(), *judge.parameters()], 5e-5)
    asked = 0

    def tokens(texts: list[str]) -> dict[str, torch.Tensor]:
        return tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=256
        ).to(DEVICE)

    def nll(inputs: list[str], targets: list[str]) -> torch.Tensor:
        labels = tokens(targets).input_ids
        labels = labels.masked_fill(labels == 0, -100)
        logits = model(**tokens(inputs), labels=labels).logits
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        return losses.sum(1) / (labels != -100).sum(1)

    def step(part: list[qcrd.Question]) -> None:
        explain = ["explain: " + q.example.input for q in part]
        with models.autocast():
            loss = (
                0.5
                * nll(["predict: " + q.example.input for q in part], [q.label for q in part]).mean()
            )
            own = model.generate(
                **tokens(explain), do_sample=True, temperature=1.5, max_new_tokens=64
            )
            negatives = [
                [*q.negatives, t]
                for q, t in zip(part, tokenizer.batch_decode(own, skip_special_tokens=True))
            ]
            sides = []
            for texts in ([q.positives for q in part], negatives):
                sides.append({"nll": [], "score": [], "mask": []})
                for j in range(max(map(len, texts))):
                    column = [own[j] if j < len(own) else "none" for own in texts]
                    sides[-1]["nll"].append(nll(explain, column))
                    sides[-1]["score"].append(
                        judge(**tokens([f"{e} {c}" for e, c in zip(explain, column)]))
                    )
                    sides[-1]["mask"].append(
                        torch.tensor([j < len(own) for own in texts], device=DEVICE)
                    )
            l, score, mask = (
                torch.stack(sides[0][key] + sides[1][key], 1) for key in ("nll", "score", "mask")
            )
            is_pos = torch.arange(mask.shape[1], device=DEVICE) < len(sides[0]["mask"])
            pos_share, neg_share = (
                qcrd.choose(l, mask & of, pick) for of, pick in ((is_pos, "min"), (~is_pos, "max"))
            )
            weight = qcrd.quality_weights(score, pos_share)
            loss_cl = qcrd.contrastive_loss(l, pos_share, neg_share, weight, delta=100.0)[0]
            loss_d = qcrd.judge_loss(score, torch.where(is_pos, 1, 2) * mask)
        optimizer.zero_grad()
        (loss + 0.5 * loss_cl + 0.5 * loss_d).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()

    def run(steps: int) -> float:
        nonlocal asked
        began = synchronized()
        for _ in range(steps):
            step([questions[(asked + i) % len(questions)] for i in range(batch)])
            asked += batch
        return synchronized() - began

    return run


def ours(
    student: Path,
    questions: list[qcrd.Question],
    batch: int,
    method: str,
    shares: list[float] | None = None,
) -> Callable[[int], float]:
    """The project's own steps; for qcrd with the writing of the negatives that they use, its share into `shares`."""
    options = qcrd.fill_in(
        qcrd.Options(
            student=str(student),
            method=method,
            batch_size=batch,
            delta=100.0,
            rounds=10**6,
            precision=PRECISION,
        )
    )
    options.round_steps = len(questions) // batch
    if method == "dss":  # as qcrd.vote leaves them for dss
        questions = [replace(q, positives=q.positives[:1], negatives=[]) for q in questions]
    models = qcrd.load_models(options)
    optimizers = qcrd.make_optimizers(models)
    batches = qcrd.round_batches(questions, options, 0)
    limit = qcrd.rationale_limit(models, questions)
    done = 0

    def run(steps: int) -> float:
        nonlocal done
        began = synchronized()
        part = [batches[i % len(batches)] for i in range(done, done + steps)]
        drawn: qcrd.Drawn = {}
        if method == "qcrd":
            asked = [q.example for own in part for q in own]
            texts = models.generate(
                [f"explain: {e.input}" for e in asked], limit, options.student_temperature
            )
            drawn = {e.id: [text] for e, text in zip(asked, texts)}
        drawing = synchronized() - began
        for own in part:
            qcrd.train_step(models, optimizers, own, drawn, 0, done)
            done += 1
        if shares is not None:
            shares.append(drawing / (synchronized() - began))
        return synchronized() - began

    return run


# ----------------------------------------------------------------------------------------------------------------------


def load_questions(folder: Path, k: int | None = None) -> list[qcrd.Question]:
    """SVAMP's training questions with the real samples, each filled up to K by repeating with a word changed."""
    options = qcrd.fill_in(
        qcrd.Options(
            task="svamp",
            data=str(folder / "datasets.zip"),
            teacher=[str(folder / "samples/svamp.jsonl")],
        )
    )
    task, splits = data.load_task("svamp", options.data)
    questions = qcrd.vote(
        task,
        splits["train"],
        data.collect(task, splits["train"], options.teacher, options),
        options,
    )
    questions = [q for q in questions if q.positives]
    for q in questions if k else []:
        texts = q.positives + q.negatives
        q.positives, q.negatives = [f"{texts[i % len(texts)]} {i}" for i in range(k or 0)], []
    return questions


def contenders(
    student: Path, questions: list[qcrd.Question], batch: int, shares: list[float]
) -> dict[str, Any]:
    return {
        "Seq2SeqTrainer, dss": lambda: trainer_dss(student, questions, batch),
        "ours, dss": lambda: ours(student, questions, batch, "dss"),
        "ours, qcrd": lambda: ours(student, questions, batch, "qcrd", shares),
        "obvious qcrd": lambda: obvious_qcrd(student, questions, batch),
    }


def product_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a matrix product of a size that these students have: what bounds a step that does nothing else."""
    a, b = (torch.randn(1024, 1024, device=DEVICE, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(20):
        began = synchronized()
        a @ b
        times.append(synchronized() - began)
    return 2 * 1024**3 / statistics.median(times) / 1e9


def peak_memory(name: str, student: Path, options: argparse.Namespace) -> float:
    """GB: of the GPU's tensors, or of a process of its own that trains a few steps."""
    command = [sys.executable, __file__, "--data", str(options.data), "--batch", str(options.batch), "--precision", PRECISION,
               "--memory-of", name, "--student", str(student), "--steps", "2"]  # fmt: skip
    return float(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def count_products(
    student: Path, questions: list, options: argparse.Namespace, speed: dict[str, float]
) -> None:
    """Matrix products a question, counted on four steps of four questions, against the machine's rate."""
    rate = product_rate(torch.bfloat16 if PRECISION == "bf16" else torch.float32)
    print(f"\n| | GFLOP a question | of {rate:.0f} GFLOP/s ({PRECISION}) |\n|---|---|---|")
    for name, make in contenders(student, questions, 4, []).items():
        run = make()
        with FlopCounterMode(display=False) as counter:
            run(4)  # one of the four updates the discriminator
        flops = counter.get_total_flops() / 16 / 1e9
        print(f"| {name} | {flops:.1f} | {speed[name] * flops / rate:.0%} |", flush=True)


def table(student: Path, options: argparse.Namespace) -> None:
    shares: list[float] = []
    questions = load_questions(options.data)
    contests = contenders(student, questions, options.batch, shares)
    # first, as this process itself will be large
    memory = {name: peak_memory(name, student, options) for name in contests}
    runs = {name: make() for name, make in contests.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(options.repeats + 1):
        for name, run in runs.items():
            steps = options.steps if name != "obvious qcrd" else max(1, options.steps // 4)
            seconds = run(steps) / steps
            if repeat:  # the first round warms up
                times[name].append(seconds)
    speed = {name: options.batch / statistics.median(seconds) for name, seconds in times.items()}
    peer = "Seq2SeqTrainer, dss"
    print("| | examples/s | ratio to the trainer |\n|---|---|---|")
    for name in runs:
        print(f"| {name} | {speed[name]:.2f} | {speed[name] / speed[peer]:.2f} |")
    print(f"\nqcrd against obvious qcrd: {speed['ours, qcrd'] / speed['obvious qcrd']:.1f} times")
    print(
        f"share of qcrd's time that writes negatives: {statistics.median(shares[1:]):.0%}",
        flush=True,
    )
    runs.clear()
    count_products(student, questions, options, speed)
    print("\n| | peak GB | ratio to the trainer |\n|---|---|---|")
    for name, gigabytes in memory.items():
        print(f"| {name} | {gigabytes:.2f} | {gigabytes / memory[peer]:.2f} |")


def grow(student: Path, options: argparse.Namespace) -> None:
    """Seconds a question against batch and rationales per question, and seconds to start against questions."""

    def fastest(run: Any) -> float:
        run(1)  # warms up
        return min(run(options.steps) for _ in range(options.repeats)) / options.steps

    print("| batch | dss, examples/s | qcrd, examples/s |\n|---|---|---|")
    questions = load_questions(options.data)
    for batch in (8, 16, 32):
        runs = [ours(student, questions, batch, method) for method in ("dss", "qcrd")]
        print(f"| {batch} | " + " | ".join(f"{batch / fastest(run):.2f}" for run in runs) + " |")
    print("\n| positives a question | qcrd, seconds a step |\n|---|---|")
    for k in (1, 2, 5, 10):
        run = ours(student, load_questions(options.data, k), options.batch, "qcrd")
        print(f"| {k} | {fastest(run):.2f} |")
    print("\n| questions | seconds for the batches of a round |\n|---|---|")
    for n in (1_000, 10_000, 100_000):
        many = [questions[i % len(questions)] for i in range(n)]
        setting = qcrd.fill_in(
            qcrd.Options(student="", batch_size=options.batch, round_steps=n // options.batch)
        )
        began = time.perf_counter()
        qcrd.round_batches(many, setting, 0)
        print(f"| {n} | {time.perf_counter() - began:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="of each contender in a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--grow", action="store_true", help="growth instead of the comparison")
    parser.add_argument("--student", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    global PRECISION
    PRECISION = options.precision
    logging.disable(logging.WARNING)
    if options.memory_of:
        contenders(options.student, load_questions(options.data), options.batch, [])[
            options.memory_of
        ]()(options.steps)
        if DEVICE.type == "cuda":
            print(torch.cuda.max_memory_allocated() / 1e9)
        else:  # not ru_maxrss, which a child inherits from its parent
            status = Path("/proc/self/status").read_text()
            print(int(status.split("VmHWM:")[1].split()[0]) / 1e6)
        return
    with tempfile.TemporaryDirectory() as folder:
        student = Path(folder)
        questions = load_questions(options.data)
        make_student(
            options.shape, [t for q in questions for t in (q.example.input, *q.positives)], student
        )
        (grow if options.grow else table)(student, options)


if __name__ == "__main__":
    main()
