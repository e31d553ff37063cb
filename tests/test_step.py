"""One training step: the fast path against the obvious one, who gets a gradient from what, and
what happens where memory runs out."""

import functools
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import data
import qcrd
from data import UserError
from qcrd import (
    SCHEMES,
    Discriminator,
    Options,
    Question,
    SelfNegatives,
    Student,
    choose,
    contrastive_loss,
    disc_gradients,
    mutual_information_loss,
    quality_weights,
    shares,
    student_losses,
)
from tests.helpers import Full, make_options, small_models, small_student

EVERY_SCHEME = ["minmax", "maxmin", "sampling", "mean", "wmean"]


def a_batch(seed: int = 0) -> tuple[list[Question], SelfNegatives]:
    """Six questions with 0 to 3 positives and 0 to 2 teacher negatives, and student negatives for
    some of them."""
    return deepcopy(make_batch(seed))


@functools.cache
def make_batch(seed: int) -> tuple[list[Question], SelfNegatives]:
    rng = random.Random(seed)
    questions: list[Question] = []
    self_negatives: SelfNegatives = {}
    for i, (pos, neg) in enumerate([(0, 2), (1, 0), (2, 1), (3, 2), (3, 0), (1, 1)]):
        story = data.random_story(rng, rng.choice(data.EVENTS))
        label = data.equation(story.start, story.changes())
        example = data.Example(f"q{i}", story.input(), label, story=story)
        texts: list[str] = []
        while len(texts) < 6:
            text, _ = data.parse_output(data.TASKS["toy"], example, data.think(rng, story, 0.5))
            texts = qcrd.distinct([*texts, text])
        questions.append(Question(example, label, texts[:pos], texts[pos : pos + neg]))
        if i % 2:
            self_negatives[example.id] = texts[-1] + " extra"
    return questions, self_negatives


def slow_logits(student: Student, text: str, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and loss of one target for one input, as transformers computes them."""
    x = student.tokenizer(text, return_tensors="pt").input_ids.to(student.device)
    y = student.tokenizer(target, return_tensors="pt").input_ids.to(student.device)
    output = student.model(input_ids=x, labels=y)
    return output.logits[0], output.loss


def slow_nll(student: Student, text: str, target: str) -> torch.Tensor:
    return slow_logits(student, text, target)[1]


def slow_score(student: Student, disc: Discriminator, question: str, text: str) -> float:
    pair = student.tokenizer(question, text, return_tensors="pt").to(student.device)
    return disc(pair.input_ids, pair.attention_mask).item()


def slow_losses(
    student: Student,
    disc: Discriminator | None,
    questions: list[Question],
    self_negatives: SelfNegatives,
    options: Options,
) -> dict[str, torch.Tensor]:
    """The obvious way: every rationale with gradients, one call each, and D on all of them."""
    l, share, score, is_pos, L_pred, L_mi = [], [], [], [], [], []
    for q in questions:
        predict, explain = f"predict: {q.example.input}", f"explain: {q.example.input}"
        logits, loss = slow_logits(student, predict, q.label)
        L_pred.append(loss)
        if q.positives:
            p_explain = slow_logits(student, explain, q.positives[0])[0].softmax(1).amax(0)
            p_predict = logits.softmax(1).amax(0)
            L_mi.append(mutual_information_loss(p_predict[None], p_explain[None])[0])
        bad = [*q.negatives, *(self_negatives[i] for i in [q.example.id] if i in self_negatives)]
        for side, texts in enumerate((q.positives, bad)):
            own_l = [slow_nll(student, explain, text) for text in texts]
            s = [slow_score(student, disc, q.example.input, t) if disc else 0.5 for t in texts]
            pick = SCHEMES[options.scheme][side]
            quality = [1 - x for x in s] if side else s
            if texts:
                share += shares([x.item() for x in own_l], pick, quality)
            l, score, is_pos = l + own_l, score + s, is_pos + [side == 0] * len(texts)
    weight, positive = torch.tensor(share), torch.tensor(is_pos)
    if disc and options.scheme != "wmean":
        weight = quality_weights(weight, torch.tensor(score), positive, options.quality)
    n, margins = len(questions), (options.beta, options.delta)
    weight, positive = weight.to(student.device), positive.to(student.device)
    L_cl, L_pos, L_neg = contrastive_loss(torch.stack(l), weight, positive, n, *margins)
    L_pred_mean, L_mi_mean = torch.stack(L_pred).mean(), torch.stack(L_mi).sum() / n
    return {"L_pred": L_pred_mean, "L_cl": L_cl, "L_pos": L_pos, "L_neg": L_neg, "L_mi": L_mi_mean}


@functools.cache
def negatives_l() -> list[list[float]]:
    """l of the negatives of each question of `a_batch` under the small student."""
    student = small_student(make_options())
    questions, self_negatives = a_batch()
    found: list[list[float]] = [[] for _ in questions]
    for r in qcrd.rationales_of(questions, self_negatives):
        if not r.is_pos:
            text = f"explain: {questions[r.row].example.input}"
            found[r.row].append(slow_nll(student, text, r.text).item())
    return found


def amid() -> float:
    """A margin that the least likely negative of two questions of `a_batch` stays below, and of
    three does not."""
    largest = sorted(max(of_question) for of_question in negatives_l() if of_question)
    return (largest[1] + largest[2]) / 2


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found: dict, expected: dict, within: float) -> None:
    assert found.keys() == expected.keys() and len(expected) > 0
    for name, grad in expected.items():
        assert torch.allclose(found[name], grad, atol=within, rtol=0), name


JUDGED = [("own", "relative"), ("own", "printed"), ("none", "relative")]
CASES = [(scheme, *judged, "amid", "cpu") for scheme in EVERY_SCHEME for judged in JUDGED]
CASES += [("minmax", "own", "relative", delta, "cpu") for delta in (3.0, 20.0)]  # all beyond, none
CASES += [("minmax", *judged, "amid", "cuda") for judged in JUDGED]


@pytest.mark.parametrize(("scheme", "disc", "quality", "delta", "device"), CASES)
def test_two_passes_give_the_losses_and_gradients_of_all_rationales_at_once(
    scheme, disc, quality, delta, device
):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    delta = amid() if delta == "amid" else delta
    options = make_options(
        scheme=scheme, disc=disc, quality=quality, delta=delta, mi_weight=0.1, device=device
    )
    student, disc = small_models(options)
    student.group_tokens = 128  # several groups
    questions, self_negatives = a_batch()
    torch.manual_seed(1)  # sampling draws the same
    chosen = choose(student, disc, questions, self_negatives, options)
    fast = student_losses(student, questions, chosen, options)
    torch.manual_seed(1)
    slow = slow_losses(student, disc, questions, self_negatives, options)
    assert fast.keys() == slow.keys()
    for name, loss in slow.items():
        assert fast[name].item() == pytest.approx(loss.item(), abs=1e-5), name
    assert fast["L_cl"].device.type == device
    assert (slow["L_neg"].item() == 0) == (delta == 3.0)
    found = gradients(student.model, fast["L_pred"] + fast["L_cl"] + fast["L_mi"])
    expected = gradients(student.model, slow["L_pred"] + slow["L_cl"] + slow["L_mi"])
    assert_equal_gradients(found, expected, 1e-5)


def test_single_learns_rationale_and_label_as_one_target_and_nothing_else():
    options = make_options(method="single")
    student, disc = small_models(options)
    example = data.Example("q", "How many?", "( 3 + 2 )")
    samples = {"q": [data.Sample("t", "It is 3 + 2.", "( 3 + 2 )")]}
    questions = qcrd.vote(data.TASKS["toy"], [example], samples, options)
    assert disc is None
    assert questions[0].label == "It is 3 + 2. So the answer is ( 3 + 2 )"
    chosen = choose(student, disc, questions, {}, options)
    fast = student_losses(student, questions, chosen, options)
    slow = slow_nll(student, "predict: How many?", questions[0].label)
    assert chosen == [] and fast["L_cl"].item() == 0 and "L_mi" not in fast
    total = options.alpha1 * fast["L_pred"] + options.alpha2 * fast["L_cl"]
    assert_equal_gradients(gradients(student.model, total), gradients(student.model, slow), 1e-5)


def test_dss_is_half_the_label_and_half_one_rationale():
    options = make_options(method="dss")
    student, disc = small_models(options)
    q = a_batch()[0][1]
    chosen = choose(student, disc, [q], {}, options)
    fast = student_losses(student, [q], chosen, options)
    total = options.alpha1 * fast["L_pred"] + options.alpha2 * fast["L_cl"]
    slow = 0.5 * slow_nll(student, f"predict: {q.example.input}", q.label)
    slow = slow + 0.5 * slow_nll(student, f"explain: {q.example.input}", q.positives[0])
    assert_equal_gradients(gradients(student.model, total), gradients(student.model, slow), 1e-5)


@pytest.mark.parametrize("tokens", [1, 128, 100_000])  # a group
@pytest.mark.parametrize("kind", ["t5", "flan", "mt5", "bart", "t5gemma"])
def test_groups_of_like_length_equal_a_loop_over_single_sequences(tokens, kind):
    student = small_student(make_options(), kind)
    student.model.eval()
    student.group_tokens = tokens
    questions, self_negatives = a_batch(1)
    rationales = qcrd.rationales_of(questions, self_negatives)
    with torch.no_grad():
        together = qcrd.explain_losses(student, questions, rationales)
        for r, l in zip(rationales, together, strict=True):
            alone = slow_nll(student, f"explain: {questions[r.row].example.input}", r.text).item()
            assert l == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("tokens", [1, 100_000])
def test_the_scores_of_groups_equal_those_of_single_pairs(tokens):
    student, disc = small_models(make_options())
    student.group_tokens = tokens
    questions, self_negatives = a_batch(1)
    rationales = qcrd.rationales_of(questions, self_negatives)
    together = qcrd.score(student, disc, questions, rationales)
    for r, s in zip(rationales, together.tolist(), strict=True):
        alone = slow_score(student, disc, questions[r.row].example.input, r.text)
        assert s == pytest.approx(alone, abs=1e-5)


def train_one_step(
    options: Options, step: int = 0, models: Any = None, batch: Any = None
) -> tuple[dict, dict]:
    """All gradients of a step, by default on `a_batch`, unclipped, and its metrics; it changes
    nothing."""
    student, disc = models or small_models(options)
    optimizers = qcrd.make_optimizers(student, disc, options)
    arguments = (student, disc, optimizers, *(batch or a_batch()), 0, step, options)
    with mock.patch.object(qcrd, "clip_and_step"):
        metrics = qcrd.train_step(*arguments)
    found = dict(student.model.named_parameters())
    if disc is not None:
        found |= {f"disc.{name}": p for name, p in disc.named_parameters()}
    return {name: p.grad for name, p in found.items() if p.grad is not None}, metrics


STEPS: list[dict[str, Any]] = [{"scheme": scheme} for scheme in EVERY_SCHEME]
STEPS += [{"quality": "printed"}, {"mi_weight": 0.1}, {"disc": "shared"}, {"disc": "none"}]


@pytest.mark.parametrize("disc_loss", ["bce", "paper"])
@pytest.mark.parametrize("change", STEPS)
def test_micro_batch_changes_nothing_but_memory(disc_loss, change):
    options = make_options(batch_size=6, delta=amid(), disc_loss=disc_loss, micro_batch=6, **change)
    models = small_models(options)
    whole, metrics = train_one_step(options, models=models)
    assert metrics["L_cl"] != 0 and ("L_D" in metrics) == (options.disc != "none")
    for size in (1, 2, 3):
        models[0].micro_batch = size
        found, same = train_one_step(options, models=models)
        assert_equal_gradients(found, whole, 1e-6)
        assert same == pytest.approx(metrics, abs=1e-5)


def test_a_micro_batch_is_so_many_questions_at_most():
    student = small_student(make_options(micro_batch=4))
    questions, self_negatives = a_batch()
    rationales = qcrd.rationales_of(questions, self_negatives)
    parts = list(student.micro_batches(questions, rationales, 2))
    assert [some for some, _ in parts] == [questions[:4], questions[4:]]
    for some, those in parts:  # each rationale's row is its question's in the part
        assert those == qcrd.rationales_of(some, self_negatives)
    student.micro_batch = 0
    assert list(student.micro_batches(questions, rationales, 2)) == [(questions, rationales)]


def test_a_micro_batch_is_as_many_questions_as_make_so_many_tokens(monkeypatch):
    student = small_student(make_options())
    questions, self_negatives = a_batch()
    rationales = qcrd.rationales_of(questions, self_negatives)

    def sizes(*how: Any) -> list[int]:
        return [len(some) for some, _ in student.micro_batches(questions, *how)]

    # inputs of 100 tokens and six rationales of 50 in all, so that a question makes 250: it is read
    # after predict: and after explain:
    monkeypatch.setattr(student, "ids", lambda text, limit: [0] * (100 if " " in text else 50))
    for q in questions:
        q.example = data.Example(q.example.id, "an input", "")
    six = [replace(rationales[0], row=row, text="r") for row in range(6)]
    student.micro_batch_tokens = 999
    assert sizes(six, 2) == [3, 3]
    student.micro_batch_tokens = 1000
    assert sizes(six, 2) == [4, 2] and sizes([], 2) == [5, 1]
    assert sizes(six, 4) == [2, 2, 2]  # each question read four times
    student.micro_batch_tokens = 1
    assert sizes(six, 2) == [1] * 6


def test_on_a_cpu_a_larger_student_has_fewer_tokens_in_a_backward_pass(monkeypatch):
    assert small_student(make_options()).micro_batch_tokens == 6144
    parameters = sum(p.numel() for p in small_student(make_options()).model.parameters())
    monkeypatch.setattr(qcrd, "T5_SMALL", parameters / 3)
    student = small_student(make_options())
    assert student.micro_batch_tokens == pytest.approx(2048)
    assert student.write_tokens == pytest.approx(32768 / 3)


def test_a_step_is_eq_8_with_the_decay_of_alpha_3_and_mis_loss():
    options = make_options(alpha1=0.5, alpha2=0.25, alpha3=0.3, mi_weight=0.1, disc="shared")
    student, disc = small_models(options)
    questions, self_negatives = a_batch()
    chosen = choose(student, disc, questions, self_negatives, options)
    losses = student_losses(student, questions, chosen, options)
    total = 0.5 * losses["L_pred"] + 0.25 * losses["L_cl"] + 0.1 * losses["L_mi"]
    expected = gradients(student.model, total)
    # nobody is held out and 8 at least are drawn, so that D learns from all six
    disc_gradients(student, disc, questions, self_negatives, 0.3 * 0.9**2, options)
    expected = {n: p.grad.clone() for n, p in student.model.named_parameters()}
    optimizers = qcrd.make_optimizers(student, disc, options)
    with mock.patch.object(qcrd, "clip_and_step"):
        arguments = (questions, self_negatives, 2, 4, options)
        qcrd.train_step(student, disc, optimizers, *arguments)
    found = {n: p.grad for n, p in student.model.named_parameters()}
    assert_equal_gradients(found, expected, 1e-6)


def test_the_gradients_of_student_and_discriminator_are_clipped_apart_at_norm_1():
    options = make_options()
    student, disc = small_models(options)
    optimizers = qcrd.make_optimizers(student, disc, options)
    for model, size in ((student.model, 1e4), (disc, 1e-4)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, size)
    for name, model in (("student", student.model), ("disc", disc)):
        norms: list[float] = []

        def seen(_: Any, model: Any = model, norms: list = norms) -> None:
            norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item())

        with mock.patch.object(qcrd.AdamW, "step", seen):
            qcrd.clip_and_step(optimizers[name])
        (norm,) = norms
        whole = sum(p.numel() for p in model.parameters()) ** 0.5
        assert norm == pytest.approx(min(1.0, whole * {"student": 1e4, "disc": 1e-4}[name]), 1e-3)


def test_the_discriminator_learns_every_few_steps_alone():
    options = make_options(disc_every=4)
    models = small_models(options)
    for step in (0, 1, 3, 4, 8):
        found, metrics = train_one_step(options, step, models)
        learns = step % 4 == 0
        assert ("L_D" in metrics) == learns == any(name.startswith("disc.") for name in found)


def test_the_discriminator_learns_from_a_random_part_of_a_batch_and_never_from_held_out_questions():
    questions = [
        Question(data.Example(str(i), "x", "y"), "y", ["a"], ["b"], held_out=i % 10 == 9)
        for i in range(64)
    ]
    options = make_options(batch_size=64)
    drawn = []
    for step in range(20):
        drawn.append({int(q.example.id) for q in qcrd.disc_questions(questions, options, step)})
    assert all(len(rows) == 16 for rows in drawn)
    assert all(not rows & {9, 19, 29, 39, 49, 59} for rows in drawn)
    assert len(set().union(*drawn)) > 50 and drawn[0] != drawn[1]
    again = qcrd.disc_questions(questions, options, 0)
    assert again == [q for q in questions if int(q.example.id) in drawn[0]]


def test_a_batch_that_is_all_held_out_teaches_the_discriminator_nothing_and_the_student_goes_on():
    options = make_options()
    questions, self_negatives = a_batch()
    for q in questions:
        q.held_out = True
    student, disc = small_models(options)
    optimizers = qcrd.make_optimizers(student, disc, options)
    before = [p.clone() for p in disc.parameters()]
    metrics = qcrd.train_step(student, disc, optimizers, questions, self_negatives, 0, 0, options)
    assert "L_D" not in metrics and metrics["L_pred"] > 0
    assert all(torch.equal(p, q) for p, q in zip(before, disc.parameters(), strict=True))


def test_the_figures_of_d_are_its_loss_and_its_mean_score_of_each_kind_by_hand(monkeypatch):
    options = make_options()
    student, disc = small_models(options)
    questions, self_negatives = a_batch()
    scores = {}
    for number, r in enumerate(qcrd.rationales_of(questions, self_negatives)):
        scores[r.text] = (number + 1) / 20

    def score(student: Any, disc: Any, questions: Any, rationales: Any) -> torch.Tensor:
        return torch.tensor([scores[r.text] for r in rationales], requires_grad=True)

    monkeypatch.setattr(qcrd, "score", score)
    # in order: - - | + s | + + - | + + + - - s | + + + | + - s
    pos, neg, by_student = [3, 5, 6, 8, 9, 10, 14, 15, 16, 17], [1, 2, 7, 11, 12, 18], [4, 13, 19]
    for micro_batch in (0, 1):
        student.micro_batch = micro_batch
        metrics = disc_gradients(student, disc, questions, self_negatives, 1.0, options)
        assert metrics["s_pos"] == pytest.approx(sum(pos) / 10 / 20)
        assert metrics["s_neg"] == pytest.approx(sum(neg) / 6 / 20)
        assert metrics["s_self"] == pytest.approx(sum(by_student) / 3 / 20)
        right = [n / 20 for n in pos] + [1 - n / 20 for n in neg + by_student]
        assert metrics["L_D"] == pytest.approx(-torch.tensor(right).log().mean().item())


def test_active_is_the_share_of_questions_whose_negative_term_pushes():
    assert train_one_step(make_options(delta=amid()))[1]["active"] == pytest.approx(2 / 6)
    assert train_one_step(make_options(delta=3.0))[1]["active"] == 0
    assert train_one_step(make_options(delta=20.0))[1]["active"] == pytest.approx(5 / 6)


def test_choice_and_margin_are_settled_without_dropout():
    options = make_options(delta=amid())
    student, disc = small_models(options)
    for module in [*student.model.modules(), *disc.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = a_batch()
    first = choose(student, disc, *batch, options)
    assert repr(first) == repr(choose(student, disc, *batch, options))
    assert student.model.training and disc.training


def test_l_cl_trains_the_student_and_not_the_discriminator():
    options = make_options(delta=amid())
    student, disc = small_models(options)
    questions, self_negatives = a_batch()
    chosen = choose(student, disc, questions, self_negatives, options)
    student_losses(student, questions, chosen, options)["L_cl"].backward()
    assert all(p.grad is None for p in disc.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.model.parameters())


@pytest.mark.parametrize(("disc", "trains_encoder"), [("own", False), ("shared", True)])
def test_only_a_shared_encoder_lets_l_d_shape_the_student(disc, trains_encoder):
    options = make_options(disc=disc)
    student, disc = small_models(options)
    disc_gradients(student, disc, *a_batch(), 1.0, options)
    encoder = student.model.get_encoder().parameters()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder) == trains_encoder
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in disc.mlp.parameters())
    optimizers = qcrd.make_optimizers(student, disc, options)
    of_disc = {id(p) for group in optimizers["disc"].param_groups for p in group["params"]}
    of_student = {id(p) for p in student.model.parameters()}
    assert not of_disc & of_student  # each parameter is stepped once


def test_the_discriminator_starts_as_a_copy_of_the_students_encoder():
    student, disc = small_models(make_options(disc="own"))
    pairs = zip(student.model.get_encoder().parameters(), disc.encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
    student, disc = small_models(make_options(disc="shared"))
    assert disc.encoder is student.model.get_encoder()


@pytest.mark.parametrize(("beta", "towards"), [(0.0, "positive"), (2.0, "negative")])
def test_a_step_makes_the_positive_likelier_and_a_negative_below_the_margin_less_likely(
    beta, towards
):
    options = make_options(delta=20.0, disc="none", beta=beta)
    student, _ = small_models(options)
    q = a_batch()[0][2]
    explain = f"explain: {q.example.input}"
    lone = Question(q.example, q.label, q.positives if towards == "positive" else [], q.negatives)
    before = [slow_nll(student, explain, t).item() for t in (*q.positives, *q.negatives)]
    easiest = before.index(min(before[:2]))
    chosen = choose(student, None, [lone], {}, options)
    student_losses(student, [lone], chosen, options)["L_cl"].backward()
    torch.optim.SGD(student.model.parameters(), 0.01).step()
    after = [slow_nll(student, explain, t).item() for t in (*q.positives, *q.negatives)]
    if towards == "positive":
        assert after[easiest] < before[easiest]
    else:
        assert after[2] > before[2]


def test_a_negative_beyond_the_margin_gives_the_student_no_gradient():
    options = make_options(delta=0.1)
    student, disc = small_models(options)
    q = a_batch()[0][2]
    lone = Question(q.example, q.label, [], q.negatives)
    chosen = choose(student, disc, [lone], {}, options)
    loss = student_losses(student, [lone], chosen, options)["L_cl"]
    assert chosen == [] and loss.item() == 0


def test_the_rationales_of_a_batch_come_with_their_question_and_kind():
    sides: list[tuple[list[str], list[str]]] = [(["a", "b"], ["c"]), ([], []), ([], [])]
    questions = [
        Question(data.Example(str(i), "x", "y"), "y", *side) for i, side in enumerate(sides)
    ]
    found = qcrd.rationales_of(questions, {"2": "d", "elsewhere": "e"})
    told = [(r.row, r.text, r.is_pos, r.by_student) for r in found]
    assert told == [
        (0, "a", True, False),
        (0, "b", True, False),
        (0, "c", False, False),
        (2, "d", False, True),
    ]
    assert qcrd.rationales_of(questions[1:2], {}) == []


@pytest.mark.parametrize("disc", ["own", "shared"])
def test_a_step_in_bf16_gives_every_parameter_the_gradient_of_fp32_but_for_rounding(disc):
    changes = {"disc": disc, "delta": 20.0}
    exact, _ = train_one_step(make_options(precision="fp32", **changes))
    rounded, _ = train_one_step(make_options(precision="bf16", **changes))
    assert exact.keys() == rounded.keys()
    for name, grad in exact.items():
        if grad.norm() > 1e-3:
            cosine = torch.cosine_similarity(grad.flatten(), rounded[name].flatten(), 0)
            assert cosine > 0.95, name


# --------------------------------------------------------------------------------------------------
# Memory


def assert_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 1 and re.search("Memory is full: .* smaller pieces", lines[0]), lines


IN_A_STEP = [
    ("explain_losses", 1),  # in choose
    ("score", 1),  # in choose
    ("student_losses", 1),
    ("contrastive_loss", 2),  # after the gradients of one micro-batch
    ("discriminator_loss", 1),  # after the student's gradients
    ("discriminator_loss", 2),
]


@pytest.mark.parametrize(("name", "call"), IN_A_STEP)
def test_a_step_whose_memory_runs_out_goes_on_in_halves_and_ends_the_same(
    monkeypatch, capsys, name, call
):
    options = make_options(batch_size=6, delta=amid(), micro_batch=4)
    expected, metrics = train_one_step(options)
    full = Full(getattr(qcrd, name), call)
    monkeypatch.setattr(qcrd, name, full)
    models = small_models(options)
    found, same = train_one_step(options, models=models)
    assert_equal_gradients(found, expected, 1e-6)
    assert same == pytest.approx(metrics, abs=1e-5)
    assert full.calls > call and models[0].room == {"training": 0.5, "writing": 1}
    parts = models[0].micro_batches(a_batch()[0], [], 2)
    assert [len(some) for some, _ in parts] == [2, 2, 2]
    assert_said_once(capsys)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_pretraining_whose_memory_runs_out_ends_with_the_same_discriminator(
    monkeypatch, capsys, call
):
    options = make_options(disc_steps=3)
    found = []
    for fails in (False, True):
        student, disc = small_models(options)
        optimizer = torch.optim.SGD(disc.parameters(), 0.1)
        if fails:
            full = Full(qcrd.discriminator_loss, call)
            monkeypatch.setattr(qcrd, "discriminator_loss", full)
        qcrd.pretrain_disc(student, disc, a_batch()[0], optimizer, options)
        found.append(torch.cat([p.flatten() for p in disc.parameters()]))
    assert torch.allclose(*found, atol=1e-5) and full.calls >= 4
    assert_said_once(capsys)


def test_dropout_in_pretraining_does_not_depend_on_where_memory_ran_out():
    options = make_options(disc_steps=4, micro_batch=1)
    found = []
    for call in (0, 1, 3):  # 0: it never does
        student, disc = small_models(options)
        for module in disc.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        student.group_tokens = 1  # one rationale at a time, with full memory or without
        optimizer = torch.optim.SGD(disc.parameters(), 0.1)
        full = Full(qcrd.discriminator_loss, call)
        with mock.patch.object(qcrd, "discriminator_loss", full):
            qcrd.pretrain_disc(student, disc, a_batch()[0], optimizer, options)
        assert (student.room["training"] < 1) == (call > 0)
        found.append(torch.cat([p.flatten() for p in disc.parameters()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_auc_whose_memory_runs_out_is_the_same(monkeypatch, capsys):
    models = small_models(make_options())
    questions, _ = a_batch()
    for q in questions:
        q.held_out = True
    expected = qcrd.disc_auc(*models, questions)
    full = Full(qcrd.score, 1)
    monkeypatch.setattr(qcrd, "score", full)
    assert qcrd.disc_auc(*models, questions) == expected
    assert full.calls == 2 and models[0].model.training and models[1].training
    assert_said_once(capsys)


def test_writing_whose_memory_runs_out_gives_the_same_texts_in_smaller_pieces(monkeypatch, capsys):
    student = small_student(make_options())
    with torch.no_grad():  # so that what it reads tells in what it writes
        for name, parameter in student.model.named_parameters():
            parameter.mul_(40 if "EncDecAttention.o" in name else 1)
    inputs = [f"explain: {q.example.input}" for q in a_batch()[0]]
    expected = student.write(inputs, "x", 12)
    assert len(set(expected)) > 1
    longest = max(len(student.ids(text, 1024)) for text in inputs)
    student.write_tokens = len(inputs) * longest
    full = Full(student.model.generate, 1)
    monkeypatch.setattr(student.model, "generate", full)
    assert student.write(inputs, "x", 12) == expected
    assert full.calls > 2  # all, then halves
    assert student.room == {"training": 1, "writing": 0.5}  # training needs other memory
    assert_said_once(capsys)


def test_what_is_drawn_does_not_depend_on_where_memory_ran_out():
    inputs = [f"explain: {q.example.input}" for q in a_batch()[0]]
    texts = []
    for call in (1, 2, 3):
        student = small_student(make_options())
        student.write_tokens = 2 * max(len(student.ids(text, 1024)) for text in inputs)
        full = Full(student.model.generate, call)
        torch.manual_seed(3)
        with mock.patch.object(student.model, "generate", full):
            texts.append(student.write(inputs, "x", 8, 1.5))
        assert student.room["writing"] == 0.5 and full.calls > call
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 1


def test_what_is_written_counts_in_what_is_answered_at_once():
    student = small_student(make_options())
    sizes = []

    def generate(input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        sizes.append((*input_ids.shape, max_new_tokens))
        return input_ids

    inputs = [f"explain: {' a' * (i % 5)}" for i in range(100)]
    lengths = [len(student.ids(text, 1024)) for text in inputs]
    for student.write_tokens, limit in ((10**9, 30), (60, 4), (60, 20), (60, 60)):
        sizes.clear()
        with mock.patch.object(student.model, "generate", generate):
            student.write(inputs, "x", limit)
        assert sum(rows for rows, _, _ in sizes) == 100
        for rows, longest, written in sizes:
            assert written == limit and longest <= max(lengths)
            assert rows == 1 or rows * (longest + limit) <= 3 * student.write_tokens
        if limit == 4:  # short texts: as many as their inputs allow
            assert sizes[0][0] == 60 // max(lengths)
        if limit == 20:
            assert sizes[0][0] == 60 // max(10, max(lengths))
        if limit == 60:
            assert {rows for rows, _, _ in sizes} == {2}


@pytest.mark.parametrize("disc", ["own", "shared"])
def test_a_step_and_the_pretraining_leave_no_gradients_in_memory(disc):
    options = make_options(disc_steps=1, disc=disc)
    student, disc = small_models(options)
    optimizers = qcrd.make_optimizers(student, disc, options)
    before = [p.clone() for p in disc.parameters()]
    qcrd.pretrain_disc(student, disc, a_batch()[0], optimizers["disc"], options)
    assert not all(map(torch.equal, before, disc.parameters()))
    assert all(p.grad is None for p in [*student.model.parameters(), *disc.parameters()])
    before = [p.clone() for p in student.model.parameters()]
    qcrd.train_step(student, disc, optimizers, *a_batch(), 0, 0, options)
    assert not all(map(torch.equal, before, student.model.parameters()))
    assert all(p.grad is None for p in [*student.model.parameters(), *disc.parameters()])


FULL = [
    MemoryError(),
    RuntimeError("could not create a primitive"),  # oneDNN's, in bf16 on a CPU
    OSError(12, "Cannot allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"
    ),
]


@pytest.mark.parametrize("error", [e for e in FULL if not isinstance(e, OSError)])
def test_whatever_torch_calls_full_memory_a_step_goes_on(monkeypatch, capsys, error):
    options = make_options()
    models = small_models(options)
    monkeypatch.setattr(qcrd, "student_losses", Full(qcrd.student_losses, 1, error))
    train_one_step(options, models=models)
    assert models[0].room["training"] == 0.5
    assert_said_once(capsys)


@contextmanager
def at_most(more: float) -> Iterator[None]:
    """Inside, the process may allocate so many bytes more than it has."""
    resource = pytest.importorskip("resource")  # Windows has none
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells how much a process has, and keeps it to a limit")
    found = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(found[1]) + int(more), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def test_where_memory_does_run_out_a_step_ends_the_same(capsys):
    options = make_options(device="cpu")
    long = "a " * 700
    questions = [Question(data.Example(str(i), long, "b"), "b", ["c"], ["d"]) for i in range(16)]
    found = []
    for more in (1e10, 2e8):
        models = small_models(options)
        models[0].micro_batch_tokens = 1e9
        with at_most(more):
            step = train_one_step(options, models=models, batch=(questions, {}))
        found.append((models[0].room["training"], *step))
    (whole, expected, metrics), (room, grads, same) = found
    assert whole == 1 and room < 1
    assert_equal_gradients(grads, expected, 1e-5)
    assert same == pytest.approx(metrics, abs=1e-5)
    assert_said_once(capsys)


OTHERS = [
    RuntimeError("CUDA error: device-side assert"),
    RuntimeError("could not create a primitive descriptor for a matmul primitive"),
    KeyError("a"),
]


@pytest.mark.parametrize("error", OTHERS)
def test_another_error_of_a_step_is_not_taken_for_full_memory(monkeypatch, error):
    options = make_options()
    models = small_models(options)
    monkeypatch.setattr(qcrd, "student_losses", Full(qcrd.student_losses, 1, error))
    with pytest.raises(type(error)):
        train_one_step(options, models=models)
    assert models[0].room["training"] == 1


@pytest.mark.parametrize("error", FULL)
def test_memory_that_is_full_on_loading_is_not_called_damage(tmp_path, monkeypatch, error):
    options = make_options()
    student, disc = small_models(options)
    optimizers = qcrd.make_optimizers(student, disc, options)
    qcrd.save_checkpoint(tmp_path, student, disc, optimizers, [{"round": 0}], {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", Full(torch.load, None, error))
        with pytest.raises(type(error)):
            qcrd.load_checkpoint(tmp_path, student, disc, optimizers)
    monkeypatch.setattr(qcrd, "try_student", Full(qcrd.try_student, None, error))
    student.model.save_pretrained(tmp_path)
    student.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(type(error)):
        qcrd.load_student(str(tmp_path), options)


@pytest.mark.parametrize("release", ["5.15.167.4-microsoft-standard-WSL2", "6.8.0-45-generic"])
def test_under_windows_a_gpus_driver_may_not_go_on_in_the_computers_memory(monkeypatch, release):
    device = torch.device("cuda", 1)
    on_gpu = mock.Mock(device=device, is_cuda=True)
    limited = mock.Mock()
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: on_gpu)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", mock.Mock())
    monkeypatch.setattr(torch.cuda, "mem_get_info", {device: (5e9, 8e9)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "memory_reserved", {device: 1e9}.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limited)
    monkeypatch.setattr(qcrd.platform, "release", lambda: release)
    assert qcrd.device_of(make_options(device="cuda:1")) == "cuda:1"
    if "WSL" in release:  # four fifths of the 5 GB that are free and of the 1 GB that is its own
        limited.assert_called_once_with(pytest.approx(0.6), device)
        assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ  # its driver may fail at them
    else:
        limited.assert_not_called()
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_it_is_the_students_gpu_that_is_asked_for_bf16(monkeypatch):
    asked: list[Any] = []

    class Current:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            asked.append(self.device)

        def __exit__(self, *_: object) -> None:
            asked.append(None)

    def supported(including_emulation: bool) -> bool:
        return not including_emulation and asked == [torch.device("cuda:1")]

    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    model = mock.Mock(device=torch.device("cuda:1"))
    model.get_input_embeddings().weight = torch.zeros(4, 4)
    assert Student(model, None, make_options(precision="auto")).bf16


def test_with_a_quarter_of_the_room_there_are_four_times_as_many_passes(monkeypatch):
    options = make_options()
    student = small_student(options)
    questions = [Question(data.Example(str(i), "a b c", "d"), "d", ["e f"], []) for i in range(16)]
    chosen = [qcrd.Rationale(row, "e f", True, share=1.0, weight=1.0) for row in range(16)]
    length = {text: len(student.ids(text, 256)) for text in ("a b c", "d", "e f")}
    student.micro_batch_tokens = 16 * (2 * length["a b c"] + length["e f"])
    student.group_tokens = 32 * max(length["d"], length["e f"])  # all 16 labels and rationales
    passes = Full(student.logits, 0)  # never full
    monkeypatch.setattr(student, "logits", passes)
    counts = []
    for student.room["training"] in (1, 1 / 4):  # 4 micro-batches, and not each in 4 groups
        passes.calls = 0
        for some, those in student.micro_batches(questions, chosen, inputs=2):
            student_losses(student, some, those, options)
        counts.append(passes.calls)
    assert counts == [1, 4]


def test_after_memory_ran_out_once_the_rest_of_the_run_uses_less_and_a_resumed_one_too(
    tmp_path, monkeypatch
):
    options = make_options()
    student, disc = small_models(options)
    student.room = {"training": 0.25, "writing": 0.5}
    optimizers = qcrd.make_optimizers(student, disc, options)
    qcrd.save_checkpoint(tmp_path, student, disc, optimizers, [{"round": 0}], {})
    resumed, disc = small_models(options)
    optimizers = qcrd.make_optimizers(resumed, disc, options)
    qcrd.load_checkpoint(tmp_path, resumed, disc, optimizers)
    assert resumed.room == student.room


@pytest.mark.parametrize("name", ["explain_losses", "student_losses", "score", "generate"])
def test_where_not_even_one_question_fits_one_sentence_says_what_to_lower(
    monkeypatch, capsys, name
):
    options = make_options()
    student, disc = small_models(options)
    place = student.model if name == "generate" else qcrd
    monkeypatch.setattr(place, name, Full(getattr(place, name), None))
    with pytest.raises(UserError) as error:
        if name == "generate":
            student.write(["explain: a"], "x", 2)
        elif name == "score":
            held_out = a_batch()[0]
            for q in held_out:
                q.held_out = True
            qcrd.disc_auc(student, disc, held_out)
        else:
            train_one_step(options, models=(student, disc))
    sentence = str(error.value)
    assert "--student" in sentence and "--max-input" in sentence and "\n" not in sentence
    assert_said_once(capsys)
