"""Score runs, compare two of them, rerun the paper's tables, and draw pictures.

python eval.py --runs runs/toy-tiny-qcrd-s0               # score a run, or any Hugging Face folder
python eval.py --runs runs/toy-tiny-qcrd-s0 --show 3      # three questions' way through the method
python eval.py --runs runs/toy-tiny-qcrd-s0 --plot        # training curves, density of D's scores
python eval.py --compare runs/A runs/B                    # is A better, and on which questions?
python eval.py --study ablation --seeds 5                 # a table of the paper: runs what it needs
python eval.py --runs runs/A runs/B --judge api:MODEL     # whose rationales are better?
"""

import signal

if __name__ == "__main__":  # Ctrl-C while torch is loaded ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import csv
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_model
from tqdm import tqdm

import data
import qcrd
from data import Example, UserError, first_line
from qcrd import (
    Discriminator,
    Question,
    Rationale,
    Student,
    choose,
    evaluate,
    explain_losses,
    flag,
    option,
    prepare,
    rationales_of,
    read_object,
    set_scores,
    show_predictions,
    without_dropout,
)


@dataclass
class Options:
    runs: list[str] = option(  # noqa: RUF009
        [], "The run directories or Hugging Face folders to score, to show, to draw or to judge."
    )
    task: str = option("toy", "As in qcrd.py; a run directory knows its own.")
    data: str = option(data.DSS_ZIP, "As in qcrd.py; a run directory knows its own.")
    student: str = option("tiny", "The student of a study, as in qcrd.py.")
    show: str = option(
        "", "How many training questions to follow through the method, or the id of one."
    )
    compare: list[str] = option(  # noqa: RUF009
        [], "Two run directories of one task, to compare over the test questions."
    )
    study: list[str] = option(  # noqa: RUF009
        [], "Any of: methods, ablation, quality, noise, schemes, negatives, disc, labels, size."
    )
    seeds: int = option(5, "The seeds of a study: 0, 1, and so on.")
    jobs: int | None = option(
        None, "How many runs of a study go on side by side: by default 2, on a GPU 1."
    )
    options: str = option("", 'More options for all runs of a study, as in "--rounds 10".')
    plot: bool = option(False, "Draw the runs, or the studies.")
    judge: str = option("", "A chat model, or api:MODEL, to compare the rationales of two --runs.")
    pairs: int = option(50, "How many questions' rationales the judge compares.")
    temperature: float = option(0.0, "The temperature at which the judge answers.")
    device: str = option("auto", "As in qcrd.py; it holds for the runs of a study too.")
    api_base: str = option("", "As in qcrd.py.")
    api_concurrency: int = option(8, "As in qcrd.py.")
    max_tokens: int = option(512, "As in qcrd.py.")


@contextmanager
def reworded(old: str, new: str) -> Iterator[None]:
    """Replace words of messages from inside, which name options of qcrd.py."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(old, new))


# --------------------------------------------------------------------------------------------------
# Opening a run


def options_of(run: Path) -> qcrd.Options:
    """The options of a finished run. UserError unless it is one of this version, and its inputs
    are those that it was trained on."""
    config, result = read_object(run / "config.json"), read_object(run / "result.json")
    try:
        own, inputs, _ = qcrd.Options(**config["options"]), config["inputs"], result["accuracy"]
    except (KeyError, TypeError):
        raise UserError(
            f"{run} is not the directory of a finished run of this version: finish it with the"
            " qcrd.py command that began it, or name another."
        )
    # the student and what a fixed student wrote are in the run by now
    for path, digest in qcrd.inputs_of(replace(own, student="tiny", fixed_student="")).items():
        if digest not in inputs.values():
            raise UserError(
                f"{path} is not the file that {run} was trained on, or was changed since: start"
                " eval.py where that run was started, or put the file back."
            )
    return own


def rows_of(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The rows of a file that a run has written. UserError if one has not what is needed."""
    rows = [row for _, row in data.read_jsonl(path)]
    for row, name in product(rows, needed):
        if name not in row:
            raise UserError(f"{path} has a row without {name!r}: train the run again.")
    return rows


def prepare_again(path: Path, own: qcrd.Options) -> tuple:
    """What `prepare` gave the run. UserError where that is no longer there."""
    if not (path / "result.json").exists():
        raise UserError(f"{path} is a student alone: --show and --plot need a run directory.")
    found = prepare(replace(own, api_concurrency=0))  # 0: no teacher is asked again
    qcrd.check_samples(path, found[2])
    return found


def load_run(
    folder: str, options: Options
) -> tuple[Path, Student, Discriminator | None, qcrd.Options]:
    """The path, the student, the discriminator if there is one, and the options of a run
    directory, or of a Hugging Face folder."""
    path = Path(folder).expanduser()
    if "model_type" in read_object(path / "config.json"):
        own, student_path = qcrd.Options(task=options.task, data=options.data, disc="none"), path
    else:
        own, student_path = options_of(path), path / "student"
    with reworded("--student", "--runs"):
        student = qcrd.load_student(str(student_path), replace(own, device=options.device))
    disc = qcrd.make_discriminator(student, own)
    if disc:
        weights = path / "discriminator.safetensors"
        try:
            load_model(disc, weights)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{weights} is damaged ({first_line(error)}): train the run again.")
    return path, student, disc, own


# --------------------------------------------------------------------------------------------------
# Scoring


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word pairs over all word pairs of the texts."""
    pairs: list[tuple[str, str]] = []
    for text in texts:
        pairs += pairwise(text.split())
    return len(set(pairs)) / max(1, len(pairs))


def score_run(folder: str, options: Options) -> dict[str, float]:
    """Label accuracy on the test split, and of the rationales validity, distinct-2 and mean D
    score; predictions.jsonl has a row for each question."""
    path, student, disc, own = load_run(folder, options)
    task, splits = data.load_task(own.task, own.data, own.train_size)
    result, rows = evaluate(student, task, splits, "test", own)
    texts = [row["rationale"] for row in rows if "rationale" in row]
    if texts:
        result["distinct-2"] = distinct_2(texts)
    if disc:
        questions = [Question(example, "", [], []) for example in splits["test"]]
        rationales = [Rationale(row, text, True) for row, text in enumerate(texts)]
        with without_dropout(student.model, disc):
            scores = student.fit(qcrd.score, student, disc, questions, rationales)
        result["mean D score"] = scores.mean().item()
    qcrd.write_jsonl(path / "predictions.jsonl", rows)
    print(folder, *(f"{name} {value:.3f}" for name, value in result.items()))
    return result


# --------------------------------------------------------------------------------------------------
# A question's way through the method, as a worked exercise

SEARCHED = 1000  # questions at most, for some that are worth showing


def show(folder: str, options: Options) -> None:
    """Follow training questions of the last round through a finished run: what the student writes
    now, the vote, the chosen rationales, and eqs. 3 to 7 with numbers.

    They are questions whose vote is right and where a negative pushes, if there are any.
    """
    path, student, disc, own = load_run(folder, options)
    task, splits, samples, questions = prepare_again(path, own)
    place = path / "negatives.jsonl"
    written = {str(row["id"]): row["output"] for row in rows_of(place, "id", "output")}
    self_negatives = qcrd.read_negatives(written, questions, own.rounds - 1, own, place)
    wanted = [q for q in questions if q.example.id == options.show]
    if not wanted and not re.fullmatch("[1-9][0-9]*", options.show):
        raise UserError(
            f"--show {options.show}: name a count or an id, such as {questions[0].example.id}."
        )
    batch = wanted + list(chain(*qcrd.round_batches(questions, own, own.rounds - 1)))[:SEARCHED]
    # without a margin, so that a negative beyond it is seen
    chosen = student.fit(choose, student, disc, batch, self_negatives, replace(own, delta=math.inf))
    active = {r.row for r in chosen if not r.is_pos and r.l < own.delta}

    def merit(row: int) -> tuple[bool, bool]:
        example = batch[row].example
        answers = [task.key(sample.answer) for sample in samples.get(example.id, [])]
        return qcrd.self_consistency(answers)[0] == task.key(example.label), row in active

    best = sorted(range(len(batch)), key=merit, reverse=True)
    for row in [0] if wanted else best[: int(options.show)]:
        q = batch[row]
        example = q.example
        print("\nTraining question", example.id)
        rows = evaluate(student, task, splits | {"shown": [example]}, "shown", own)[1]
        show_predictions([example], rows)
        votes = Counter(str(sample.answer) for sample in samples.get(example.id, []))
        print("The teacher's votes:", dict(votes))
        rationales = rationales_of([q], self_negatives)
        with without_dropout(student.model):
            losses = student.fit(explain_losses, student, [q], rationales)
        if rationales:
            known = {(r.text, r.is_pos, r.by_student): r for r in chosen if r.row == row}
            show_losses(own, rationales, losses, known)


WEIGHTS = """
Each rationale, l in nats per token under the student now, D's score s where it was asked, and
what scheme {} made of it. The weight is share * s of a positive (eq. 6), divided by the mean s of
the positives chosen with it unless --quality is printed, and share * (1 - s) of a negative
(eq. 7); without D, and in scheme wmean, it is the share. It multiplies l of a positive (eq. 4),
and of a negative min(l - delta, 0), which is 0 beyond the margin (eq. 5)."""


def show_losses(
    own: qcrd.Options, rationales: list[Rationale], losses: list[float], known: dict
) -> None:
    """The rationales of a question, and eqs. 3 to 7 with their numbers; known are those of them
    that were chosen."""
    print(WEIGHTS.format(own.scheme))
    L = {True: 0.0, False: 0.0}
    for r, l in zip(rationales, losses, strict=True):
        kind = "student's" if r.by_student else "positive" if r.is_pos else "negative"
        r = known.get((r.text, r.is_pos, r.by_student), r)
        of_l = l if r.is_pos else min(l - own.delta, 0)
        L[r.is_pos] += r.weight * of_l
        print(
            f"{kind:<9}  l {l:6.3f}  s {r.score:5.3f}  share {r.share:.2f}"
            f"  weight {r.weight:.3f} * {of_l:6.3f} = {r.weight * of_l:6.3f}"
        )
        print(textwrap.indent(textwrap.fill(r.text, 96), "    "))
    L_cl = L[True] - own.beta * L[False]
    print(
        f"L_cl = L_pos - beta * L_neg = {L[True]:.3f} - {own.beta:g} * {L[False]:.3f} = {L_cl:.3f}"
        " (eq. 3)"
    )


# --------------------------------------------------------------------------------------------------
# Two runs on the same test questions

METRICS = {"accuracy": "correct", "validity": "valid"}  # and what they are the mean of


def two_runs(folders: list[str]) -> list[tuple[Example, dict, dict]]:
    """Each test question of two runs of one task, with the rows of their predictions."""
    tests, rows = [], []
    for folder in folders:
        path = Path(folder).expanduser()
        own = options_of(path)
        tests.append(data.load_task(own.task, own.data)[1]["test"])
        rows.append(rows_of(path / "predictions.jsonl", "id", "label", "correct"))
        if [row["id"] for row in rows[-1]] != [example.id for example in tests[-1]]:
            raise UserError(f"{folder} answered other test questions: score it again with --runs.")
    if len(tests) != 2 or tests[0] != tests[1]:
        raise UserError(f"{folders} are not two runs of one task: name two that are.")
    print("A and B are", *folders)
    return list(zip(tests[0], *rows, strict=True))


# Student's t at 97.5% by the number of values
T_975 = [math.nan] * 3
T_975 += [4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13]


def interval(values: np.ndarray) -> tuple[float, float]:
    """The mean in points, and half of its 95% interval by Student's t; nan for fewer than three
    values."""
    n = len(values)
    t = T_975[n] if n < len(T_975) else 1.96 + 2.5 / (n - 1)  # within 0.005 of it
    return 100 * values.mean(), 100 * t * values.std() / math.sqrt(n - 1)


def spelled(mean: float, half: float) -> str:
    """A mean with half of its interval, as far as there are."""
    return f"{mean:.1f} ± {half:.1f}".removesuffix(" ± nan").removesuffix("nan")


def compare(options: Options) -> None:
    """Print how two runs differ over the test questions, and five on which they disagree."""
    rows = two_runs(options.compare)
    for metric, key in METRICS.items():
        pairs = [(a.get(key), b.get(key)) for _, a, b in rows]
        if None not in pairs[0]:
            a, b = np.array(pairs, float).T
            gain = spelled(*interval(a - b))
            print(f"{metric}: A {a.mean():.1%}, B {b.mean():.1%}, A - B {gain} points")
    print(
        "± is half of the 95% interval, by Student's t, paired over these",
        len(rows),
        "questions.\nIt is about two students; only several seeds tell about methods: see --study.",
    )
    apart = [row for row in rows if row[1]["correct"] != row[2]["correct"]]
    print("On", len(apart), "questions one is right and the other wrong.")
    for example, a, b in apart[:5]:
        print("\nA, then B, on", example.id)
        show_predictions([example, example], [a, b])


# --------------------------------------------------------------------------------------------------
# Studies. A table of the paper is a list of rows, and a row is the options in which a run differs
# from the whole method by default. "against" names the row that it is compared with: dss on the
# same
# questions, samples and labels. A fixed student is named by its row. Studies share equal rows'
# runs.

STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "methods": {
        "finetune": {"method": "finetune"},
        "single": {"method": "single"},
        "dss": {"method": "dss"},
        "mi": {"method": "mi"},
        "qcrd": {},
    },
    "ablation": {
        "dss": {"method": "dss"},
        "+ several positives (ED)": {"negatives": "none", "disc": "none"},
        "+ negatives (NK)": {"disc": "none"},
        "+ quality by D (QJ): qcrd": {},
    },
    "quality": {
        "dss": {"method": "dss"},
        "qcrd, relative": {},
        "qcrd, eq. 6 as printed": {"quality": "printed"},
    },
    "noise": {
        "dss, 0%": {"method": "dss", "toy_errors": 0.0},
        "ED, 0%": {"negatives": "none", "disc": "none", "toy_errors": 0.0, "against": "dss, 0%"},
        "qcrd, 0%": {"toy_errors": 0.0, "against": "dss, 0%"},
        "dss, 25%": {"method": "dss"},
        "ED, 25%": {"negatives": "none", "disc": "none", "against": "dss, 25%"},
        "qcrd, 25%": {"against": "dss, 25%"},
        "dss, 50%": {"method": "dss", "toy_errors": 0.5},
        "ED, 50%": {"negatives": "none", "disc": "none", "toy_errors": 0.5, "against": "dss, 50%"},
        "qcrd, 50%": {"toy_errors": 0.5, "against": "dss, 50%"},
    },
    "schemes": {
        "dss": {"method": "dss"},
        "minmax": {},
        "maxmin": {"scheme": "maxmin"},
        "sampling": {"scheme": "sampling"},
        "mean": {"scheme": "mean"},
        "wmean": {"scheme": "wmean"},
    },
    "negatives": {
        "dss": {"method": "dss"},
        "student, j = 3": {"lag": 3},
        "student, j = 5": {},
        "student, j = 10": {"lag": 10},
        "fixed dss student": {"negatives": "fixed", "fixed_student": "dss"},
        "teacher's minority only (SC)": {"negatives": "teacher"},
    },
    "disc": {
        "dss": {"method": "dss"},
        "own, bce": {},
        "own, paper": {"disc_loss": "paper"},
        "shared, bce": {"disc": "shared"},
        "shared, paper": {"disc": "shared", "disc_loss": "paper"},
    },
    "labels": {
        "dss": {"method": "dss", "labels": "teacher"},
        "mi": {"method": "mi", "labels": "teacher"},
        "qcrd": {"labels": "teacher"},
    },
    "size": {
        "dss, 25%": {"method": "dss", "train_size": 0.25},
        "qcrd, 25%": {"train_size": 0.25, "against": "dss, 25%"},
        "dss, 50%": {"method": "dss", "train_size": 0.5},
        "qcrd, 50%": {"train_size": 0.5, "against": "dss, 50%"},
        "dss, 75%": {"method": "dss", "train_size": 0.75},
        "qcrd, 75%": {"train_size": 0.75, "against": "dss, 75%"},
        "dss, 100%": {"method": "dss"},
        "qcrd, 100%": {"against": "dss, 100%"},
    },
}


class Run(NamedTuple):
    """A run of a study: its directory, and its command line."""

    out: Path
    words: list[str]
    fixed_run: Path | None = None  # of the fixed student, which is made first


def study_path(options: Options, *parts: str) -> Path:
    """A path in the folder of the studies, named by what is said of a run or a study."""
    task = options.task
    if task not in data.TASKS:  # files of one name differ by their content
        task = f"{Path(task).stem}-{data.digest(task)[:8]}"
    name = re.sub(r"[^\w.]+", "-", " ".join([options.student, options.options, *parts]))
    return Path("runs/studies", task, name)


def plan(options: Options, name: str) -> dict[str, list[Run]]:
    """For each row of a study a run a seed. UserError if --options has what the study sets."""
    runs: dict[str, list[Run]] = {}
    taken = {"task", "data", "student", "device", "seed", "out", "overwrite"}
    taken = taken.union(*STUDIES[name].values())
    for typed in map(flag, taken):
        if typed in re.split("[ =]", options.options.replace("_", "-")):
            raise UserError(f"--options {typed}: the study {name} sets that itself; leave it out.")
    for label, row in STUDIES[name].items():
        runs[label] = []
        for seed in range(options.seeds):
            keys = [key for key in row if key not in ("against", "fixed_student")]
            words = [f"{flag(key)}={row[key]}" for key in keys]
            out, fixed_run = study_path(options, *words, f"s{seed}"), None
            if "fixed_student" in row:
                fixed_run = runs[row["fixed_student"]][seed].out
                words.append(f"--fixed-student={fixed_run}")
            words += [f"--task={options.task}", f"--data={options.data}", f"--seed={seed}"]
            words += [f"--student={options.student}", f"--out={out}", *options.options.split()]
            runs[label].append(Run(out, words, fixed_run))
    return runs


def result_of(run: Run) -> dict[str, float]:
    """The metrics of a run; none where it has not finished."""
    return read_object(run.out / "result.json")


def start(run: Run, device: str) -> subprocess.Popen:
    """Train a run in a process of its own."""
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / "log.txt").open("w") as log:
        # a session of its own: Ctrl-C reaches this process alone, which then ends its runs
        return subprocess.Popen(
            [sys.executable, qcrd.__file__, "--device", device, *run.words],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run_missing(runs: list[Run], options: Options) -> None:
    """Train what has no result yet, --jobs runs at a time, each on its share of the cores."""
    # of two runs on one GPU each would have to do with the memory that the other leaves
    jobs = options.jobs or (2 if data.gpu_or_cpu(options.device).startswith("cpu") else 1)
    waiting = []
    for run in runs:
        if result_of(run):
            with reworded("use --out, or --overwrite", "move it away"):
                qcrd.open_run(run.out, qcrd.parse_options(run.words))
        else:
            waiting.append(run)
    print(
        f"{len(runs)} runs, {len(waiting)} of them to be made, {jobs} at a time. How long"
        " that takes stands right of the bar once one has ended."
    )
    if options.student != "tiny":  # which is trained on one thread
        threads = max(1, (os.cpu_count() or 1) // jobs)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # with tokenizers' own threads in each, two runs side by side took a fifth longer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    running: dict[subprocess.Popen, Run] = {}
    try:
        with tqdm(total=len(waiting), unit="run") as bar:
            while waiting or running:
                made_now = [run.out for run in running.values()]
                if waiting and len(running) < jobs and waiting[0].fixed_run not in made_now:
                    run = waiting.pop(0)
                    running[start(run, options.device)] = run
                for process in [process for process in running if process.poll() is not None]:
                    run = running.pop(process)
                    if not result_of(run):
                        raise UserError(f"a run of the study failed: {run.out}/log.txt tells why.")
                    bar.update()
                time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


# --------------------------------------------------------------------------------------------------
# Tables and pictures of studies

COLUMNS = ["accuracy", "validity", "AUC", "accuracy - dss", "validity - dss"]
FAR = 15  # points; a row that is further from dss does not stretch the axis
CAPTION = """
Points, ± half of the 95% interval over seeds, by Student's t; the differences are paired. Fewer
than three seeds have no interval.
"""


def metrics_of(name: str, runs: dict[str, list[Run]]) -> dict[tuple[str, str], tuple]:
    """By row and column the mean over the seeds, and half of its interval; nan where there is
    none."""
    found = {}
    for label, row in STUDIES[name].items():
        for metric in COLUMNS[:3]:
            ours = values(runs, label, metric)
            theirs = values(runs, row.get("against", "dss"), metric)
            found[label, metric] = interval(ours)
            found[label, f"{metric} - dss"] = interval(ours - theirs)
    return found


def values(runs: dict[str, list[Run]], label: str, metric: str) -> np.ndarray:
    """A metric of each run of a row; nan where there is none."""
    found = [result_of(run).get(metric, math.nan) for run in runs.get(label, [])]
    return np.array(found or [math.nan])


def write_table(options: Options, name: str, runs: dict[str, list[Run]]) -> None:
    """Print the table of a study whose runs are there, and write it as Markdown and CSV."""
    found = metrics_of(name, runs)
    table = [[name, *COLUMNS, "seeds", "options of the first"]]
    seeds = str([*range(options.seeds)])
    for label, of_row in runs.items():
        cells = [spelled(*found[label, column]) for column in COLUMNS]
        table.append([label, *cells, seeds, " ".join(of_row[0].words)])
    path = study_path(options, name)
    with Path(f"{path}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    table.insert(1, ["---"] * len(table[0]))
    text = "\n".join([*(f"| {' | '.join(cells)} |" for cells in table), CAPTION])
    qcrd.write_atomically(Path(f"{path}.md"), text)
    print(f"{text}Written to {path}.md and .csv")


VARIES = {"noise": "toy_errors", "size": "train_size"}


def plot_study(options: Options, name: str, runs: dict[str, list[Run]]) -> None:
    """For accuracy and validity a picture: the difference of each row to its dss, but of rows so
    far away that they would stretch the axis; or, where a study varies a share, each method."""
    found, key = metrics_of(name, runs), VARIES.get(name)
    for metric in METRICS:
        lines: dict[str, Any] = {}
        far = []
        for label, row in STUDIES[name].items():
            x: Any = label
            line, column = "rows", f"{metric} - dss"
            if key:
                x = row.get(key, getattr(qcrd.Options(), key))
                line, column = label.split(",")[0], metric
            mean, half = found[label, column]
            if abs(mean) > FAR and not key:
                far.append(label)
            elif not math.isnan(mean):
                points = lines.setdefault(line, [])
                if key:  # a little apart, so that no interval hides another
                    x += 0.01 * list(lines).index(line)
                points.append((x, mean, half))
        if lines:
            title = f"{column}, points with 95% intervals, {options.seeds} seeds"
            title += f"; by {qcrd.flag(key)}" if key else ""
            title += f"\nbeyond {FAR} points, not shown: {', '.join(far)}" if far else ""
            path = Path(f"{study_path(options, name, metric)}.svg")
            draw(path, title, lines, "o-" if key else "o")


def draw(path: Path, title: str, lines: dict[str, list], style: str = ".-") -> None:
    """A line for each name, through its points: x, y and, where it has one, error."""
    import matplotlib.figure  # the only thing that needs it
    import matplotlib.style

    # colours that colour-blind readers can tell apart; text as text, so that an SVG is small
    with matplotlib.style.context(["tableau-colorblind10", {"svg.fonttype": "none"}]):
        figure = matplotlib.figure.Figure(layout="constrained")
        axes = figure.add_subplot(title=title)
        for label, points in lines.items():
            axes.errorbar(*zip(*points), label=label, fmt=style)  # type: ignore[misc, arg-type]
        axes.grid(axis="y")
        axes.tick_params("x", rotation=30)
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=2)  # where it hides nothing
        figure.savefig(path)
    print("Drawn:", path)


def plot_run(folder: str, options: Options) -> None:
    """Each loss against the round, and, where there is a discriminator, the density of its scores
    as in the paper's Fig. 6."""
    path, student, disc, own = load_run(folder, options)
    rows = rows_of(path / "metrics.jsonl", "round")
    lines: dict[str, list] = {}
    for name in dict.fromkeys(chain(*rows)):
        if name.startswith("L_"):  # a round in which D did not learn has no L_D
            lines[name] = [(row["round"], row[name]) for row in rows if name in row]
    draw(path / "losses.png", f"{folder}: losses, nats per token (L_D: nats), by round", lines)
    if not disc:
        return
    held_out = [q for q in prepare_again(path, own)[-1] if q.held_out][:500]
    inputs = [f"explain: {q.example.input}" for q in held_out]
    rationales = rationales_of(held_out, {})
    groups = {
        "positives": [r for r in rationales if r.is_pos],
        "teacher's negatives": [r for r in rationales if not r.is_pos],
    }
    for t in (1.5, 2.0):
        texts = enumerate(student.write(inputs, "samples", temperature=t))
        groups[f"student at temperature {t}"] = [Rationale(*pair, False) for pair in texts]
    lines = {}
    for name, group in groups.items():
        if not group:
            continue
        with without_dropout(student.model, disc):
            student.fit(set_scores, student, disc, held_out, group)
        density, edges = np.histogram([r.score for r in group], 25, (0, 1), density=True)
        lines[name] = list(zip((edges[:-1] + edges[1:]) / 2, density))
    draw(path / "scores.png", f"{folder}: density of s on held-out questions", lines)


def studies(options: Options) -> None:
    """Run what is missing of the studies; their tables, and with --plot their pictures."""
    for name in options.study:
        if name not in STUDIES:
            raise UserError(f"--study {name} is not one of {', '.join(STUDIES)}.")
    if "noise" in options.study and options.task != "toy":
        raise UserError("--study noise needs --task toy, whose teacher errs as it is told to.")
    plans = {name: plan(options, name) for name in options.study}
    every: dict[Path, Run] = {}  # studies share runs
    for rows in plans.values():
        every |= {run.out: run for run in chain(*rows.values())}
    run_missing(list(every.values()), options)
    for name, rows in plans.items():
        write_table(options, name, rows)
        if options.plot:
            plot_study(options, name, rows)


# --------------------------------------------------------------------------------------------------
# Whose rationales are better? (the paper's Table 7)

VERDICT = (
    "You compare two explanations of how to answer a question. Judge whether the reasoning is"
    " right, complete and clear, not its length or style. Reply with one word: A if explanation A"
    " is better, B if explanation B is, tie if neither."
)
# How people write their verdict, the clearest way first, where X is A, B or tie.
X = r"(?<!nor )(?<!and )(?<!or )(?:[Ee]xplanation |[Oo]ption )?\b(A|B|[Tt]ie|TIE)\b"
READ_AS = [
    r"^(?:[Ee]xplanation )?(a|b)\.?$",  # the letter alone
    "(?i:answer|boxed|verdict|winner|choice|judge?ment|decision)(?: is)?[ .:>]+X",
    "^X(?: ?[.,:;-]|$)",  # the letter, and perhaps why
    "X(?: (?!not|less|worse)[a-z]+)*? (?:better|best|clearer|stronger|superior|more|wins|>)",
    "(?:better|best|prefer|choose|pick|favou?r|go with|worse than)(?: one)?(?: is)?:? X",
    r"X\W*$",  # the letter at the end
    r"(?i)\b(tie|tied|draw|equal|equally|neither|same|both)\b",
]


def read_verdict(reply: str) -> str | None:
    """A, B or tie, as a judge wrote it; None where it cannot be read."""
    text = (
        re.sub(data.THINKING, "", reply, flags=re.IGNORECASE)
        .replace("\\text", "")
        .replace("\n", " . ")
    )
    text = re.sub(r"[^\w.,:;'>-]+", " ", text).strip(" .")  # without LaTeX and Markdown
    for pattern in READ_AS:
        found = re.findall(pattern.replace("X", X), text)
        if found:
            return found[-1].upper() if len(found[-1]) == 1 else "tie"
    return None


def verdict(forward: str, backward: str) -> str:
    """A, B or tie out of the replies for (A, B) and (B, A): only where both agree is one better."""
    first, second = read_verdict(forward), read_verdict(backward)
    if first is None or second is None:
        return "not read"
    return {"AB": "A", "BA": "B"}.get(first + second, "tie")


def sign_test(a: int, b: int) -> float:
    """Two-sided p-value of a wins against b, ties left out, if both were equally likely."""
    tail = sum(math.comb(a + b, i) for i in range(max(a, b), a + b + 1)) / 2 ** (a + b)
    return min(1.0, 2 * tail)


def ask_judge(example: Example) -> data.Chat:
    """The question for the judge as chat messages."""
    return [{"role": "system", "content": VERDICT}, {"role": "user", "content": example.input}]


def judge(options: Options) -> Counter:
    """Let a model compare the rationales of two runs, each pair in both orders; how many questions
    A won, tied, lost, and of how many a reply could not be read."""
    rows = two_runs(options.runs)[: options.pairs]
    if not all("rationale" in a and "rationale" in b for _, a, b in rows):
        raise UserError("--judge: one of the runs writes no rationales.")
    text = "Question: {}\n\nExplanation A: {}\n\nExplanation B: {}"
    asked = []
    for example, *sides in rows:
        for a, b in (sides, sides[::-1]):
            filled = text.format(data.question_text(example), a["rationale"], b["rationale"])
            asked.append(Example(filled, filled, ""))
    cache = data.Cache(data.CACHE / "verdicts.jsonl")
    with reworded("--teacher", "--judge"):
        replies = data.sampled(cache, asked, 1, options.judge, ask_judge, options)
    texts = [replies[example.id, 0] for example in asked]
    counts = Counter(map(verdict, texts[::2], texts[1::2]))
    print(dict(counts), f"sign test p = {sign_test(counts['A'], counts['B']):.3f}")
    if counts["not read"] > counts.total() / 10:
        print("warning: too many replies could not be read: try another --judge.")
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = Options(**qcrd.parse([Options], __doc__, argv))
    jobs = 1 if options.jobs is None else options.jobs
    if min(options.seeds, jobs, options.pairs, options.api_concurrency) < 1:
        raise UserError("--seeds, --jobs, --pairs and --api-concurrency must be at least 1.")
    if options.study:
        studies(options)
    elif options.compare:
        compare(options)
    elif options.judge:
        judge(options)
    elif not options.runs:
        raise UserError("nothing to do: name --runs to score, two to --compare, or a --study.")
    else:
        for run in options.runs:
            if options.show:
                show(run, options)
            elif options.plot:
                plot_run(run, options)
            else:
                score_run(run, options)


if __name__ == "__main__":
    qcrd.run_command(main)
