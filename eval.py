"""Score runs, rerun the paper's tables, draw its pictures, and let a judge compare rationales.

python eval.py --runs runs/toy-tiny-qcrd-s0                   # score a run, or any Hugging Face folder
python eval.py --runs runs/toy-tiny-qcrd-s0 --show 3          # three questions' way through the method, with numbers
python eval.py --study ablation --seeds 5                     # a table of the paper: runs what is missing
python eval.py --runs runs/toy-tiny-qcrd-s0 --plot            # training curves and density of D's scores
python eval.py --runs runs/A runs/B --judge api:MODEL         # whose rationales are better?
"""

import csv
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model
from tqdm import tqdm

import data
import qcrd
from data import UserError


@dataclass
class Options:
    runs: list[str] = field(
        default_factory=list, metadata={"help": "run directories or Hugging Face folders"}
    )
    task: str = qcrd.option("toy", "as in qcrd.py; a run directory knows its own")
    data: str = qcrd.option(data.DSS_ZIP, "as in qcrd.py")
    student: str = qcrd.option("tiny", "of a study, as in qcrd.py")
    show: str = qcrd.option(
        "", "how many training questions to follow through the method, or the id of one"
    )
    study: list[str] = field(default_factory=list, metadata={"help": "one or several: methods, ablation, quality, noise, schemes, negatives, judge, labels, size"})  # fmt: skip
    seeds: int = qcrd.option(5, "seeds of a study: 0, 1, ...")
    jobs: int = qcrd.option(2, "runs of a study side by side")
    options: str = qcrd.option("", 'further options for each run of a study, such as "--rounds 10"')
    plot: bool = qcrd.option(
        False, "draw each run's training curves and D's scores, or the studies"
    )
    judge: str = qcrd.option(
        "", "a chat model or api:MODEL that compares the rationales of two --runs"
    )
    pairs: int = qcrd.option(50, "rationales to compare")
    api_base: str | None = qcrd.option(None, "as in qcrd.py")
    api_concurrency: int = qcrd.option(8, "as in qcrd.py")
    max_tokens: int = qcrd.option(512, "as in qcrd.py")
    temperature: float = qcrd.option(0.0, "at which the judge answers")


# --------------------------------------------------------------------------------------------------
# Studies: a table of the paper is a list of rows, and a row is a set of options; "" is the whole method as it is by
# default, so that studies share its runs

STUDIES: dict[str, dict[str, str]] = {
    "methods": {**{name: f"--method {name}" for name in ("finetune", "single", "dss", "mi")}, "qcrd": ""},
    "ablation": {
        "dss": "--method dss",
        "+ several denoised positives (ED)": "--negatives none --judge none",
        "+ negatives (NK)": "--judge none",
        "+ quality judge (QJ): qcrd": "",
    },
    "quality": {"qcrd, relative": "", "qcrd, eq. 6 as printed": "--quality printed"},
    "noise": {
        f"{m}, {e:.0%}": f"{o} --toy-errors {e}".strip() if e != 0.4 else o
        for e in (0, 0.4, 0.6) for m, o in (("dss", "--method dss"), ("ED", "--negatives none --judge none"), ("qcrd", ""))
    },
    "schemes": {"minmax": "", **{name: f"--scheme {name}" for name in ("maxmin", "sampling", "mean", "wmean")}},
    "negatives": {
        **{f"student, j = {j}": f"--lag {j}" if j != 5 else "" for j in (3, 5, 10)},
        "fixed dss student": "--negatives fixed --fixed-student DSS",
        "teacher's minority only (SC)": "--negatives teacher",
    },
    "judge": {
        f"{e}, {loss}": f"--judge {e} --judge-loss {loss}" if (e, loss) != ("own", "bce") else ""
        for e in ("own", "shared") for loss in ("paper", "bce")
    },
    "labels": {name: f"--method {name} --labels teacher" for name in ("dss", "mi", "qcrd")},
    "size": {
        f"{m}, {s:.0%}": f"{o} --train-size {s}".strip() if s < 1 else o
        for s in (0.25, 0.5, 0.75, 1.0) for m, o in (("dss", "--method dss"), ("qcrd", ""))
    },
}  # fmt: skip

# The paper's own figures, row by row of a study, shown beside ours where task and student are the paper's.
PAPER_TASKS = ("svamp", "cqa", "anli", "esnli")
PAPER: dict[tuple[str, str], list[tuple[float | None, ...]]] = {
    ("methods", "t5-base"): [(63.0, 62.19, 43.58, 88.38), (59.0, 63.11, 47.90, 88.77), (65.5, 63.23, 52.80, 90.09),
                             (67.5, 63.50, 54.20, 90.15), (69.0, 63.64, 54.00, 90.26)],
    ("methods", "t5-small"): [(45.0, 43.16, 42.0, 82.90), (46.5, 44.98, 42.5, 83.67), (48.0, 45.21, 42.8, 84.23),
                              (47.0, 45.49, 42.1, 83.55), (50.5, 46.11, 44.1, 85.30)],
    ("labels", "t5-base"): [(None, 59.15, 44.10, 74.88), (None, 59.22, 45.90, 74.67), (None, 59.80, 46.70, 74.88)],
    ("ablation", "t5-base"): [(65.5,), (67.0,), (68.5,), (69.0,)],
    ("schemes", "t5-base"): [(69.0,), (67.0,), (66.5,), (65.0,), (66.0,)],
    ("negatives", "t5-base"): [(68.0,), (69.0,), (68.5,), (66.5,), (64.5,)],
    ("size", "t5-base"): [(34, 57.08, 45.6, 90.22), (35.5, 57.17, 47.1, 90.22), (47, 60.93, 47.8, 90.19),
                          (49, 60.85, 48.4, 90.22), (61, 62.16, 51.6, 90.11), (62, 62.34, 52.9, 90.21),
                          (65.5, 63.23, 52.8, 90.09), (69.0, 63.64, 54.0, 90.26)],
}  # fmt: skip
# Student's t at 97.5% for 1, 2, ... degrees of freedom; beyond the table the normal's 1.96.
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


def baseline_of(row: str) -> str:
    """The dss run that a row is compared with: on the same questions, samples and labels."""
    return " ".join(["--method dss", *re.findall(r"--(?:labels|toy-errors|train-size) \S+", row)])


def run_path(options: Options, row: str, seed: int) -> Path:
    """Where a run of a study lives: named by its options, so that studies share the runs they have in common."""
    words = re.sub(
        r"[^\w.]+", "-", f"{options.student} {options.options} {row}".replace("--", "")
    ).strip("-")
    return Path("runs") / "studies" / Path(options.task).stem / f"{words}-s{seed}"


def run_missing(options: Options, rows: list[str]) -> None:
    """Train every row and seed that has no result yet, `jobs` at a time, each on its share of the cores."""
    missing = [(row, seed) for row in rows for seed in range(options.seeds)]
    missing = [
        (row, seed)
        for row, seed in missing
        if not (run_path(options, row, seed) / "result.json").exists()
    ]
    missing.sort(key=lambda run: (run[1], run[0]))
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))

    def one(row: str, seed: int) -> None:
        out = run_path(options, row, seed)
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(Path(qcrd.__file__)), "--task", options.task, "--student", options.student,
                   "--data", options.data, "--seed", str(seed), "--out", str(out),
                   *shlex.split(options.options), *shlex.split(row)]  # fmt: skip
        command = [
            str(run_path(options, "--method dss", seed)) if word == "DSS" else word
            for word in command
        ]
        # with tokenizers' own threads in each, two runs side by side took a fifth longer
        environment = os.environ | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        with (out / "log.txt").open("w") as log:
            code = subprocess.run(
                command, check=False, stdout=log, stderr=log, env=environment
            ).returncode
        if code:
            raise UserError(
                f"{shlex.join(command)} ended with code {code}: {out / 'log.txt'} tells why."
            )

    pool = ThreadPoolExecutor(options.jobs)
    try:
        with tqdm(total=len(missing), desc="studies", unit="run") as bar:
            # what needs the dss run of its seed waits until all dss runs are there
            for wave in (
                [run for run in missing if "DSS" not in run[0]],
                [run for run in missing if "DSS" in run[0]],
            ):
                for future in as_completed([pool.submit(one, row, seed) for row, seed in wave]):
                    future.result()
                    bar.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def results_of(options: Options, row: str) -> list[dict[str, float]]:
    """The results of a row, a seed each."""
    return [
        json.loads((run_path(options, row, s) / "result.json").read_text())
        for s in range(options.seeds)
    ]


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean, in points."""
    points = 100 * np.array(values)
    return float(points.mean()), float(points.std(ddof=1) / math.sqrt(len(points))) if len(
        points
    ) > 1 else math.nan


def paired_difference(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str
) -> tuple[float, float]:
    """The mean over seeds of ours - theirs in points, and half of its 95% interval by Student's t."""
    gain, error = summary([a[key] - b[key] for a, b in zip(ours, theirs, strict=True)])
    n = len(ours)
    return gain, error * (T_975[n - 2] if 2 <= n <= len(T_975) + 1 else 1.96)


def differences(options: Options, row: str) -> dict[str, tuple[float, float]]:
    """By "accuracy" and "validity", as far as both have it: the paired difference of a row to its dss."""
    ours, theirs = results_of(options, row), results_of(options, baseline_of(row))
    both = [
        key
        for key in ("accuracy", "validity")
        if key in ours[0] and key in theirs[0] and row != baseline_of(row)
    ]
    return {key: paired_difference(ours, theirs, key) for key in both}


FIGURES = ("accuracy", "validity", "D auc", "accuracy - dss, 95%", "validity - dss, 95%", "paper")


def study(options: Options, name: str) -> list[dict[str, str]]:
    """Print the table of a study whose runs are there, and write it to runs/studies/ as Markdown and CSV."""
    rows, table = STUDIES[name], []
    for (label, row), published in zip(
        rows.items(), PAPER.get((name, options.student), [()] * len(rows)), strict=True
    ):
        line = {name: label} | dict.fromkeys(FIGURES, "")
        results = results_of(options, row)
        for figure in ("accuracy", "validity", "D auc"):
            if figure in results[0]:
                line[figure] = "{:.1f} ± {:.1f}".format(*summary([r[figure] for r in results]))
        for key, (gain, half) in differences(options, row).items():
            line[f"{key} - dss, 95%"] = f"{gain:+.1f} [{gain - half:+.1f}, {gain + half:+.1f}]"
        line["paper"] = str(dict(zip(PAPER_TASKS, published)).get(options.task) or "")
        table.append(line)
    write_table(table, study_path(options, name))
    return table


def measured(options: Options, rows: Iterable[str]) -> list[str]:
    """Which of "accuracy" and "validity" some row has."""
    results = [results_of(options, row)[0] for row in rows]
    return [key for key in ("accuracy", "validity") if any(key in result for result in results)]


def study_path(options: Options, name: str) -> Path:
    return (
        Path("runs") / "studies" / f"{name}-{Path(options.task).stem}-{Path(options.student).name}"
    )


def write_table(table: list[dict[str, str]], path: Path) -> None:
    columns = [column for column in table[0] if any(line[column] for line in table)]
    rows = [
        columns,
        ["---"] * len(columns),
        *([line[column] for column in columns] for line in table),
    ]
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)
    print(markdown + f"Written to {path}.md and .csv")


# --------------------------------------------------------------------------------------------------
# Scoring


def open_run(folder: str, options: Options) -> qcrd.Models:
    """The models of a run directory or Hugging Face folder, with the run's options."""
    path = Path(folder)
    config: dict[str, Any] = {
        "student": folder,
        "task": options.task,
        "data": options.data,
        "judge": "none",
    }
    if (path / "config.json").exists() and (path / "student").is_dir():
        config = json.loads((path / "config.json").read_text()) | {"student": str(path / "student")}
    models = qcrd.load_models(qcrd.fill_in(qcrd.Options(**config)))
    if models.judge is not None:
        load_model(models.judge, path / "discriminator.safetensors")
    return models


def scores_of(
    models: qcrd.Models, questions: Sequence[qcrd.Question], texts: Sequence[str]
) -> torch.Tensor:
    """D(x, r), (N, 1), of one rationale a question, without gradients and dropout."""
    with models.constant():
        return models.score(
            questions, [[text] for text in texts], torch.ones(len(texts), 1, dtype=torch.bool)
        )


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word pairs over all word pairs of the texts."""
    pairs = Counter(pair for text in texts for pair in zip(text.split(), text.split()[1:]))
    return len(pairs) / max(1, sum(pairs.values()))


def score(folder: str, options: Options) -> dict[str, float]:
    """Label accuracy on the test split, and of the rationales: validity, distinct-2 and mean D score; rows are saved."""
    models = open_run(folder, options)
    task, splits = data.load_task(models.options.task, models.options.data)
    result, rows = qcrd.evaluate(models, task, splits, "test")
    texts = [row["rationale"] for row in rows if "rationale" in row]
    if texts:
        result["distinct-2"] = distinct_2(texts)
    if texts and models.judge is not None:
        questions = [qcrd.Question(example, example.label, [], []) for example in splits["test"]]
        result["mean D score"] = scores_of(models, questions, texts).mean().item()
    qcrd.write_jsonl(Path(folder) / "predictions.jsonl", rows)
    print(f"{folder}: " + ", ".join(f"{key} {value:.3f}" for key, value in result.items()))
    return result


# --------------------------------------------------------------------------------------------------
# A question's way through the method, as a worked exercise


def say(text: str, indent: int = 2) -> None:
    """Print a text in lines of at most 100 columns."""
    space = " " * indent
    print(textwrap.fill(" ".join(text.split()), 100, initial_indent=space, subsequent_indent=space))


def show(folder: str, options: Options) -> None:
    """Follow training questions through a finished run: vote, rationales, eqs. 3 to 7 with numbers, what it writes now."""
    if not (Path(folder) / "result.json").exists():
        raise UserError(f"{folder} is not the directory of a finished run: --show needs one.")
    models = open_run(folder, options)
    own = models.options
    task, splits, samples, questions = qcrd.prepare(own)
    drawn = qcrd.negatives_of(models, questions, own.rounds - 1, Path(folder))
    shown = [q for q in questions if q.example.id == options.show]
    if (
        not shown and options.show.isdecimal()
    ):  # first those that have all kinds of rationales to show
        richest = sorted(
            questions, key=lambda q: not (q.positives and q.negatives and q.example.id in drawn)
        )
        shown = richest[: int(options.show)]
    if not shown:
        raise UserError(
            f"--show {options.show}: name a count or an id, such as {questions[0].example.id}."
        )
    batch = shown + [q for q in questions if q not in shown][: max(0, own.batch_size - len(shown))]
    torch.manual_seed(own.seed)
    # without a margin here, so that a negative that is chosen and beyond it is seen
    models.options = replace(own, delta=math.inf)
    weighed = qcrd.weigh(models, batch, drawn)
    models.options = own
    exists, score = weighed.kind > 0, None
    with models.constant():
        l = models.loss_of(
            models.encode([f"explain: {q.example.input}" for q in batch]), weighed.texts, exists
        )
        if models.judge is not None:
            score = models.score(batch, weighed.texts, exists)
    _, rows = qcrd.evaluate(models, task, splits | {"shown": [q.example for q in shown]}, "shown")
    for i, (q, row) in enumerate(zip(shown, rows, strict=True)):
        print(f"\n{f' {q.example.id} ':=^100}\nQuestion")
        say(q.example.input)
        if q.example.id in samples:
            show_vote(task, q, samples[q.example.id])
        if own.positives != "none":
            show_loss(own, weighed, i, l, score)
        print("The student now")
        say(
            f"predicts {row['label']!r}: {'right' if row['correct'] else 'wrong'}, the label is {q.example.label!r}"
        )
        if "rationale" in row:
            say(f"explains: {row['rationale']}")
            checked = {
                True: "every step is right",
                False: "not valid",
                None: "not checked: only toy's can be",
            }
            say(f"validity of that: {checked[row['valid']]}")


def show_vote(task: data.Task, q: qcrd.Question, samples: list[data.Sample]) -> None:
    _, positives, negatives = qcrd.self_consistency([task.key(sample.answer) for sample in samples])
    print(f"The vote of {len(samples)} samples")
    say("; ".join(f"{sample.teacher}: {sample.answer or 'no answer'}" for sample in samples))
    if positives:
        winner = samples[positives[0]].answer
        right = (
            "right" if task.correct(winner, q.example) else f"wrong, the label is {q.example.label}"
        )
        say(
            f"{len(positives)} positive, {len(negatives)} negative: {winner} wins, which is {right}"
        )


def show_loss(
    own: qcrd.Options, weighed: qcrd.Batch, i: int, l: torch.Tensor, score: torch.Tensor | None
) -> None:
    """The rationales of question i of a batch, and eqs. 3 to 7 with their numbers; l and score (N, R)."""
    print(
        f"Its rationales: l in nats per token under the student now (delta {own.delta:g}), D's score s, share in a term"
    )
    writer = (
        f"of round {qcrd.source_round(own.rounds - 1, own.lag)}"
        if own.negatives == "student"
        else "fixed"
    )
    names = {
        qcrd.POSITIVE: "positive",
        qcrd.TEACHERS: "teacher's negative",
        qcrd.STUDENTS: f"student's, {writer}",
    }
    terms: dict[int, list[str]] = {4: [], 5: []}  # by equation
    for j, text in enumerate(weighed.texts[i]):
        kind, weight = int(weighed.kind[i, j]), weighed.weight[i, j]
        share = weighed.pos_share[i, j] + weighed.neg_share[i, j]
        eq = 4 if kind == qcrd.POSITIVE else 5
        line = f"  {names[kind]:<22} l {l[i, j]:6.3f}"
        line += f"  s {score[i, j]:.3f}" if score is not None else ""
        line += f"  share {share:.2f}"
        if share > 0:
            line += f"  chosen by {qcrd.SCHEMES[own.scheme][eq - 4]}, eq. {eq}"
            value = f"{l[i, j]:.3f}" if eq == 4 else f"min({l[i, j]:.3f} - {own.delta:g}, 0)"
            terms[eq].append(f"{share:.2f} * {weight:.3f} * {value}")
        print(line + ("; beyond delta" if eq == 5 and l[i, j] >= own.delta else ""))
        say(text, 6)
    shares = weighed.pos_share, weighed.neg_share
    pos, neg = (
        term[i]
        for term in qcrd.contrastive_loss(l, *shares, weighed.weight, own.beta, own.delta)[1:]
    )
    print("L_cl, of share * weight * l")
    if score is not None and own.scheme != "wmean":
        mean = (shares[0] * score).sum() / shares[0].sum()
        by = (
            f" / {mean:.3f}, the mean of those chosen for {len(l)} questions"
            if own.quality == "relative"
            else ""
        )
        say(f"weight: s{by} (eq. 6); 1 - s of a negative (eq. 7)")
    say(f"eqs. 4, 6: L_pos = {' + '.join(terms[4]) or '0, no positive'} = {pos:.3f}")
    say(f"eqs. 5, 7: L_neg = {' + '.join(terms[5]) or '0, no negative'} = {neg:.3f}")
    say(
        f"eq. 3: L_cl = L_pos - beta * L_neg = {pos:.3f} - {own.beta:g} * {neg:.3f} = {pos - own.beta * neg:.3f}"
    )


# --------------------------------------------------------------------------------------------------
# Pictures. Okabe and Ito's colours, which colour-blind readers can tell apart, and a line style each.

STYLES = [
    ("#0072B2", "-"),
    ("#E69F00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#000000", "-"),
    ("#D55E00", "--"),
]


def panels(count: int, height: float, title: str) -> tuple[Any, Any]:
    """A matplotlib figure with that many axes side by side."""
    import matplotlib.figure  # the only thing that needs it

    figure = matplotlib.figure.Figure(figsize=(5 + 2 * count, height), layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(1, count, squeeze=False)[0]


def draw_lines(axes: Any, x_label: str, y_label: str, lines: dict[str, Any]) -> None:
    """A line for each name, of (x, y) or (x, y, error)."""
    for (name, line), (color, style) in zip(lines.items(), STYLES * 3):
        axes.errorbar(*line, label=name, color=color, linestyle=style, capsize=3)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.legend()


def save_picture(figure: Any, path: Path) -> None:
    import matplotlib

    # as text and without a date, so that an SVG is small and the same figures give the same file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"Drawn: {path}")


def draw(path: Path, title: str, x_label: str, y_label: str, lines: dict[str, Any]) -> None:
    """One panel of lines, written to `path`."""
    figure, (axes,) = panels(1, 4.5, title)
    draw_lines(axes, x_label, y_label, lines)
    save_picture(figure, path)


def plot_run(folder: str, options: Options) -> None:
    """Each loss against the round, and, where there is a discriminator, its scores as in the paper's Fig. 6."""
    rounds = [
        row
        for _, row in data.parse_jsonl(
            data.read_file(Path(folder) / "metrics.jsonl"), "metrics.jsonl"
        )
    ]
    losses = {
        key: ([r["round"] for r in rounds], [r[key] for r in rounds])
        for key in rounds[0]
        if key.startswith("L_")
    }
    title = f"Losses of {Path(folder).name}, mean over each round"
    draw(
        Path(folder) / "losses.png", title, "round", "loss (nats per token; L_judge: nats)", losses
    )
    models = open_run(folder, options)
    if models.judge is None:
        return
    *_, questions = qcrd.prepare(models.options)
    held_out = [q for q in questions if q.held_out][:500]
    groups = {
        "teacher, positives": [(q, text) for q in held_out for text in q.positives],
        "teacher, negatives": [(q, text) for q in held_out for text in q.negatives],
    }
    limit = qcrd.rationale_limit(models, questions)
    for t in (1.5, 2.0):
        texts = models.generate(
            [f"explain: {q.example.input}" for q in held_out], limit, t, f"student at {t}"
        )
        groups[f"student at temperature {t}"] = list(zip(held_out, texts, strict=True))
    edges = np.linspace(0, 1, 26)
    lines = {}
    for name, pairs in groups.items():
        if pairs:
            scores = scores_of(models, *zip(*pairs)).cpu().numpy()
            lines[f"{name} ({len(pairs)})"] = (
                edges[:-1] + 0.02,
                np.histogram(scores, edges, density=True)[0],
            )
    title = "Discriminator's scores on held-out training questions"
    draw(Path(folder) / "scores.png", title, "score D(x, r)", "density", lines)


def plot_differences(options: Options, names: list[str]) -> None:
    """Every row's difference to dss with its 95% interval, accuracy and validity side by side."""
    rows = {
        row: label for name in reversed(names) for label, row in reversed(STUDIES[name].items())
    }
    rows = {row: label for row, label in rows.items() if row != baseline_of(row)}
    keys, found = measured(options, rows), [differences(options, row) for row in rows]
    title = f"Difference to dss in points, 95% intervals, {options.seeds} seeds"
    figure, both = panels(len(keys), 1.6 + 0.35 * len(rows), title)
    for axes, key, (color, _) in zip(both, keys, STYLES):
        for y, difference in enumerate(found):
            if key in difference:
                gain, half = difference[key]
                axes.errorbar(gain, y, xerr=half, fmt="o", color=color, capsize=4)
        axes.axvline(0, color="#000000", linewidth=1)
        axes.set(xlabel=f"{key} - dss", yticks=range(len(rows)), ylim=(-0.7, len(rows) - 0.3))
        axes.set_yticklabels(rows.values() if axes is both[0] else [])
        axes.grid(axis="x", alpha=0.3)
    save_picture(figure, study_path(options, "-".join(names)).with_suffix(".svg"))


def plot_shares(options: Options, name: str, x_label: str) -> None:
    """A study whose rows are "method, share": accuracy and validity against the share (size: the paper's Fig. 4)."""
    keys = measured(options, STUDIES[name].values())
    figure, both = panels(
        len(keys), 4, f"{Path(options.task).stem}, {options.seeds} seeds; bars: standard error"
    )
    for axes, key in zip(both, keys):
        lines: dict[str, tuple[list[float], ...]] = {}
        for label, row in STUDIES[name].items():
            method, share = label.split(", ")
            results = results_of(options, row)
            if key in results[0]:
                point = (float(share.strip("%")), *summary([r[key] for r in results]))
                for values, value in zip(
                    lines.setdefault(method, ([], [], [])), point, strict=True
                ):
                    values.append(value)
        draw_lines(axes, x_label, f"test {key}, %", lines)
    save_picture(figure, study_path(options, name).with_suffix(".svg"))


def studies(options: Options) -> None:
    """Run what is missing of the studies; their tables, and with --plot their pictures."""
    for name in options.study:
        if name not in STUDIES:
            raise UserError(f"--study {name} is not one of {', '.join(STUDIES)}.")
        if name == "noise" and options.task != "toy":
            raise UserError(
                "--study noise needs --task toy, whose teacher errs as often as it is told to."
            )
    if options.seeds < 1 or options.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1.")
    rows = {row for name in options.study for row in STUDIES[name].values()}
    run_missing(options, sorted(rows | {baseline_of(row) for row in rows}))
    for name in options.study:
        study(options, name)
    if options.plot:
        shares = {"noise": "teacher's error rate, %", "size": "share of the training questions, %"}
        others = [name for name in options.study if name not in shares]
        if others:
            plot_differences(options, others)
        for name in options.study:
            if name in shares:
                plot_shares(options, name, shares[name])


# --------------------------------------------------------------------------------------------------
# Whose rationales are better? (the paper's Table 7)

VERDICT = (
    "You compare two explanations of how to answer a question. Judge whether the reasoning is right, complete and clear,"
    " not its length or style. Reply with one word: A if explanation A is better, B if explanation B is, tie if neither."
)


def sign_test(a: int, b: int) -> float:
    """Two-sided p-value of a wins against b, ties left out, if both were equally likely."""
    tail = sum(math.comb(a + b, i) for i in range(max(a, b), a + b + 1)) / 2 ** (a + b)
    return min(1.0, 2 * tail)


def verdict(forward: str, backward: str) -> str:
    """A, B or tie out of the replies for (A, B) and (B, A): only where both orders agree is one better."""
    first, second = (
        re.match(r"\W*(a|b|tie)\b", reply.strip().lower()) for reply in (forward, backward)
    )
    agreed = first and second and {("a", "b"): "A", ("b", "a"): "B"}.get((first[1], second[1]))
    return agreed or "tie"


def compare(options: Options) -> dict[str, int]:
    """Let a teacher compare the rationales of two scored runs, each pair in both orders; counts of A, tie and B."""
    if len(options.runs) != 2:
        raise UserError("--judge compares two runs: name two with --runs.")
    config = json.loads(data.read_file(Path(options.runs[0]) / "config.json"))
    splits = data.load_task(config["task"], config["data"])[1]
    sides = []
    for run in options.runs:
        rows = data.parse_jsonl(
            data.read_file(Path(run) / "predictions.jsonl"), f"{run}/predictions.jsonl"
        )
        sides.append({row["id"]: row["rationale"] for _, row in rows if row.get("rationale")})
    both = [e for e in splits["test"] if e.id in sides[0] and e.id in sides[1]][: options.pairs]
    if not both:
        raise UserError(
            f"--judge: {' and '.join(options.runs)} have no rationales in common: score them first."
        )
    asked = []
    for e in both:
        for order in ((0, 1), (1, 0)):
            texts = "\n\n".join(
                f"Explanation {'AB'[n]}: {sides[side][e.id]}" for n, side in enumerate(order)
            )
            asked.append(
                data.Example(
                    f"{e.id}/{order[0]}", f"Question: {data.question_text(e)}\n\n{texts}", e.label
                )
            )

    def chat(e: data.Example) -> data.Chat:
        return [{"role": "system", "content": VERDICT}, {"role": "user", "content": e.input}]

    identity = hashlib.sha256(
        json.dumps([options.judge, options.temperature, [chat(e) for e in asked]]).encode()
    )
    cache = data.Cache(data.CACHE / "verdicts" / f"{identity.hexdigest()[:16]}.jsonl")
    replies = data.sampled(cache, asked, 1, options.judge, chat, options)
    counts = Counter(verdict(replies[f"{e.id}/0", 0], replies[f"{e.id}/1", 0]) for e in both)
    result = {"A": counts["A"], "tie": counts["tie"], "B": counts["B"]}
    print(f"A is {options.runs[0]}, B is {options.runs[1]}; {len(both)} questions, both orders")
    p = sign_test(counts["A"], counts["B"])
    print(", ".join(f"{k} {v}" for k, v in result.items()), f"(sign test p = {p:.3f})")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    options = qcrd.parse(Options, __doc__, argv)
    if options.study:
        studies(options)
    elif options.judge:
        compare(options)
        return
    elif not options.runs:
        raise UserError("nothing to do: name --runs to score, or a --study.")
    for run in options.runs:
        (show if options.show else plot_run if options.plot else score)(run, options)


if __name__ == "__main__":
    qcrd.run_command(main)
