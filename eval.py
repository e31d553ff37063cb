"""Score runs, rerun the paper's tables, draw its pictures, and let a judge compare rationales.

python eval.py --runs runs/toy-tiny-qcrd-s0                   # score a run, or any Hugging Face folder
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
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
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
    runs: list[str] = field(default_factory=list, metadata={"help": "run directories or Hugging Face folders"})
    task: str = qcrd.option("toy", "as in qcrd.py; a run directory knows its own")
    data: str = qcrd.option(data.DSS_ZIP, "as in qcrd.py")
    student: str = qcrd.option("tiny", "of a study, as in qcrd.py")
    study: str = qcrd.option("", "methods, ablation, schemes, negatives, judge, labels or size")
    seeds: int = qcrd.option(5, "seeds of a study: 0, 1, ...")
    jobs: int = qcrd.option(2, "runs of a study side by side")
    options: str = qcrd.option("", 'further options for each run of a study, such as "--rounds 10"')
    plot: bool = qcrd.option(False, "draw each run's training curves and D's scores, or a study's sizes")
    judge: str = qcrd.option("", "a chat model or api:MODEL that compares the rationales of two --runs")
    pairs: int = qcrd.option(50, "rationales to compare")
    api_base: str | None = qcrd.option(None, "as in qcrd.py")
    api_concurrency: int = qcrd.option(8, "as in qcrd.py")
    max_tokens: int = qcrd.option(512, "as in qcrd.py")
    temperature: float = qcrd.option(0.0, "at which the judge answers")


# ----------------------------------------------------------------------------------------------------------------------
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


def run_path(options: Options, row: str, seed: int) -> Path:
    """Where a run of a study lives: named by its options, so that studies share the runs they have in common."""
    words = re.sub(r"[^\w.]+", "-", f"{options.student} {options.options} {row}".replace("--", "")).strip("-")
    return Path("runs") / "studies" / Path(options.task).stem / f"{words}-s{seed}"


def run_missing(options: Options, rows: dict[str, str]) -> None:
    """Train every row and seed that has no result yet, `jobs` at a time, each on its share of the cores."""
    missing = [(row, seed) for row in set(rows.values()) for seed in range(options.seeds)]
    missing = [(row, seed) for row, seed in missing if not (run_path(options, row, seed) / "result.json").exists()]
    missing.sort(key=lambda run: (run[1], run[0]))
    threads = str(max(1, (os.cpu_count() or 1) // options.jobs))

    def one(row: str, seed: int) -> None:
        out = run_path(options, row, seed)
        out.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(Path(qcrd.__file__)), "--task", options.task, "--student", options.student,
                   "--data", options.data, "--seed", str(seed), "--out", str(out),
                   *shlex.split(options.options), *shlex.split(row)]  # fmt: skip
        command = [str(run_path(options, "--method dss", seed)) if word == "DSS" else word for word in command]
        environment = os.environ | {"OMP_NUM_THREADS": threads}
        with (out / "log.txt").open("w") as log:
            code = subprocess.run(command, check=False, stdout=log, stderr=log, env=environment).returncode
        if code:
            raise UserError(f"{shlex.join(command)} ended with code {code}: {out / 'log.txt'} tells why.")

    pool = ThreadPoolExecutor(options.jobs)
    try:
        with tqdm(total=len(missing), desc=f"study {options.study}", unit="run") as bar:
            # what needs the dss run of its seed waits until all dss runs are there
            for wave in ([run for run in missing if "DSS" not in run[0]], [run for run in missing if "DSS" in run[0]]):
                for future in as_completed([pool.submit(one, row, seed) for row, seed in wave]):
                    future.result()
                    bar.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def results_of(options: Options, row: str) -> list[dict[str, float]]:
    """The results of a row, a seed each."""
    return [json.loads((run_path(options, row, s) / "result.json").read_text()) for s in range(options.seeds)]


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the mean, in points."""
    points = 100 * np.array(values)
    return float(points.mean()), float(points.std(ddof=1) / math.sqrt(len(points))) if len(points) > 1 else math.nan


def paired_difference(ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str) -> str:
    """The mean over seeds of ours - theirs in points, and its 95% interval by Student's t."""
    gain, error = summary([a[key] - b[key] for a, b in zip(ours, theirs, strict=True)])
    n = len(ours)
    half = error * (T_975[n - 2] if 2 <= n <= len(T_975) + 1 else 1.96)
    return f"{gain:+.1f} [{gain - half:+.1f}, {gain + half:+.1f}]"


def study(options: Options) -> list[dict[str, Any]]:
    """Run a study; print its table and write it to runs/studies/ as Markdown and CSV."""
    rows = STUDIES[options.study]
    baseline = "--method dss --labels teacher" if options.study == "labels" else "--method dss"
    run_missing(options, rows | {"": baseline})
    results = {row: results_of(options, row) for row in {*rows.values(), baseline}}
    figures = dict(zip(rows, PAPER.get((options.study, options.student), [()] * len(rows)), strict=True))
    table = []
    for name, row in rows.items():
        line: dict[str, Any] = {options.study: name}
        for key in [key for key in ("accuracy", "validity") if key in results[row][0]]:
            line[key] = "{:.1f} ± {:.1f}".format(*summary([r[key] for r in results[row]]))
            if row != baseline and key in results[baseline][0]:
                line[f"{key} - dss, 95%"] = paired_difference(results[row], results[baseline], key)
        paper = dict(zip(PAPER_TASKS, figures[name])).get(options.task)
        if paper is not None:
            line["paper"] = paper
        table.append(line)
    name = f"{options.study}-{Path(options.task).stem}-{Path(options.student).name}"
    write_table(table, Path("runs") / "studies" / name)
    return table


def write_table(table: list[dict[str, Any]], path: Path) -> None:
    columns = list(dict.fromkeys(key for line in table for key in line))
    rows = [columns, ["---"] * len(columns), *([str(line.get(c, "")) for c in columns] for line in table)]
    markdown = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    print(markdown + f"Written to {path}.md and .csv")


# ----------------------------------------------------------------------------------------------------------------------
# Scoring


def open_run(folder: str, options: Options) -> qcrd.Models:
    """The models of a run directory or Hugging Face folder, with the run's options."""
    path = Path(folder)
    config: dict[str, Any] = {"student": folder, "task": options.task, "data": options.data, "judge": "none"}
    if (path / "config.json").exists() and (path / "student").is_dir():
        config = json.loads((path / "config.json").read_text()) | {"student": str(path / "student")}
    models = qcrd.load_models(qcrd.fill_in(qcrd.Options(**config)))
    if models.judge is not None:
        load_model(models.judge, path / "discriminator.safetensors")
    return models


def scores_of(models: qcrd.Models, questions: Sequence[qcrd.Question], texts: Sequence[str]) -> torch.Tensor:
    """D(x, r), (N, 1), of one rationale a question, without gradients and dropout."""
    with models.constant(), models.autocast():
        return models.score(questions, [[text] for text in texts], torch.ones(len(texts), 1, dtype=torch.bool))


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word pairs over all word pairs of the texts."""
    pairs = Counter(pair for text in texts for pair in zip(text.split(), text.split()[1:]))
    return len(pairs) / max(1, sum(pairs.values()))


def score(folder: str, options: Options) -> dict[str, float]:
    """Label accuracy on the test split, and of the rationales: validity, distinct-2 and mean D score; rows are saved."""
    models = open_run(folder, options)
    task, splits = data.load_task(models.options.task, models.options.data)
    limit = qcrd.label_limit(models, splits["train"])
    result, rows = qcrd.evaluate(models, task, splits["test"], limit, "test")
    texts = [row["rationale"] for row in rows if "rationale" in row]
    if texts:
        result["distinct-2"] = distinct_2(texts)
    if texts and models.judge is not None:
        questions = [qcrd.Question(example, example.label, [], []) for example in splits["test"]]
        result["mean D score"] = scores_of(models, questions, texts).mean().item()
    qcrd.write_jsonl(Path(folder) / "predictions.jsonl", rows)
    print(f"{folder}: " + ", ".join(f"{key} {value:.3f}" for key, value in result.items()))
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Pictures. Okabe and Ito's colours, which colour-blind readers can tell apart, and a line style each.

STYLES = [("#0072B2", "-"), ("#E69F00", "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("#000000", "-"), ("#D55E00", "--")]


def draw(path: Path, title: str, x_label: str, y_label: str, lines: dict[str, Any]) -> None:
    """A line for each name, of (x, y) or (x, y, error), written to `path` as PNG."""
    import matplotlib.figure  # the only thing that needs it

    axes = (figure := matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for (name, line), (color, style) in zip(lines.items(), STYLES * 3):
        error = line[2] if len(line) == 3 else None
        axes.errorbar(line[0], line[1], error, label=name, color=color, linestyle=style, capsize=3)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"Drawn: {path}")


def plot_run(folder: str, options: Options) -> None:
    """Each loss against the round, and, where there is a discriminator, its scores as in the paper's Fig. 6."""
    rounds = [row for _, row in data.parse_jsonl(data.read_file(Path(folder) / "metrics.jsonl"), "metrics.jsonl")]
    losses = {
        key: ([r["round"] for r in rounds], [r[key] for r in rounds]) for key in rounds[0] if key.startswith("L_")
    }
    title = f"Losses of {Path(folder).name}, mean over each round"
    draw(Path(folder) / "losses.png", title, "round", "loss (nats per token; L_judge: nats)", losses)
    models = open_run(folder, options)
    if models.judge is None:
        return
    _, _, questions = qcrd.prepare(models.options)
    held_out = [q for q in questions if q.held_out][:500]
    groups = {
        "teacher, positives": [(q, text) for q in held_out for text in q.positives],
        "teacher, negatives": [(q, text) for q in held_out for text in q.negatives],
    }
    limit = qcrd.rationale_limit(models, questions)
    for t in (1.5, 2.0):
        texts = models.generate([f"explain: {q.example.input}" for q in held_out], limit, t, f"student at {t}")
        groups[f"student at temperature {t}"] = list(zip(held_out, texts, strict=True))
    edges = np.linspace(0, 1, 26)
    lines = {}
    for name, pairs in groups.items():
        if pairs:
            scores = scores_of(models, *zip(*pairs)).cpu().numpy()
            lines[f"{name} ({len(pairs)})"] = (edges[:-1] + 0.02, np.histogram(scores, edges, density=True)[0])
    title = "Discriminator's scores on held-out training questions"
    draw(Path(folder) / "scores.png", title, "score D(x, r)", "density", lines)


def plot_size(options: Options) -> None:
    """Test accuracy against the share of the training set (the paper's Fig. 4), of a finished size study."""
    lines: dict[str, tuple[list[float], ...]] = {}
    for name, row in STUDIES["size"].items():
        method, share = name.split(", ")
        point = (float(share.strip("%")), *summary([r["accuracy"] for r in results_of(options, row)]))
        for values, value in zip(lines.setdefault(method, ([], [], [])), point, strict=True):
            values.append(value)
    path = Path("runs") / "studies" / f"size-{Path(options.task).stem}-{Path(options.student).name}.png"
    title = f"{Path(options.task).stem}: accuracy against training-set size, {options.seeds} seeds"
    draw(path, title, "share of the training questions, %", "test accuracy, % (bars: standard error)", lines)


# ----------------------------------------------------------------------------------------------------------------------
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
    first, second = (re.match(r"\W*(a|b|tie)\b", reply.strip().lower()) for reply in (forward, backward))
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
        rows = data.parse_jsonl(data.read_file(Path(run) / "predictions.jsonl"), f"{run}/predictions.jsonl")
        sides.append({row["id"]: row["rationale"] for _, row in rows if row.get("rationale")})
    both = [e for e in splits["test"] if e.id in sides[0] and e.id in sides[1]][: options.pairs]
    if not both:
        raise UserError(f"--judge: {' and '.join(options.runs)} have no rationales in common: score them first.")
    asked = []
    for e in both:
        for order in ((0, 1), (1, 0)):
            texts = "\n\n".join(f"Explanation {'AB'[n]}: {sides[side][e.id]}" for n, side in enumerate(order))
            asked.append(data.Example(f"{e.id}/{order[0]}", f"Question: {data.question_text(e)}\n\n{texts}", e.label))

    def chat(e: data.Example) -> data.Chat:
        return [{"role": "system", "content": VERDICT}, {"role": "user", "content": e.input}]

    identity = hashlib.sha256(json.dumps([options.judge, options.temperature, [chat(e) for e in asked]]).encode())
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
        if options.study not in STUDIES:
            raise UserError(f"--study {options.study} is not one of {', '.join(STUDIES)}.")
        if options.seeds < 1 or options.jobs < 1:
            raise UserError("--seeds and --jobs must be at least 1.")
        study(options)
        if options.plot and options.study == "size":
            plot_size(options)
    elif options.judge:
        compare(options)
        return
    elif not options.runs:
        raise UserError("nothing to do: name --runs to score, or a --study.")
    for run in options.runs:
        (plot_run if options.plot else score)(run, options)


if __name__ == "__main__":
    qcrd.run_command(main)
