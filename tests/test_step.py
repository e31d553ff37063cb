"""One training step: the fast path against the obvious one, and who gets a gradient from what."""

import random
from typing import Any

import pytest
import torch

import data
import qcrd
from qcrd import (
    SCHEMES,
    Models,
    Question,
    choose,
    contrastive_loss,
    discriminator_loss,
    student_losses,
    weigh,
)
from tests.helpers import a_student, make_options, small_models, tokenizer


def a_batch(seed: int = 0) -> tuple[list[Question], qcrd.Drawn]:
    """Questions with 0 to 3 positives and 0 to 2 teacher negatives, and student negatives for some of them."""
    rng = random.Random(seed)
    questions: list[Question] = []
    drawn: qcrd.Drawn = {}
    for i in range(6):
        story = data.random_story(rng, rng.choice(data.EVENTS))
        example = data.Example(
            f"q{i}", story.input(), data.equation(story.start, story.changes()), story=story
        )
        texts = list(
            dict.fromkeys(
                data.parse_output(data.TASKS["toy"], example, data.think(rng, story, 0.5))[0]
                for _ in range(8)
            )
        )
        pos, neg = [0, 1, 2, 3, 3, 1][i], [2, 0, 1, 2, 0, 1][i]
        questions.append(Question(example, example.label, texts[:pos], texts[pos : pos + neg]))
        if i % 2:
            drawn[example.id] = [texts[-1] + " extra"]
    return questions, drawn


def slow_nll(models: Models, prefix: str, question: str, target: str) -> torch.Tensor:
    """One sequence through the whole model, as transformers computes its loss."""
    x = models.tokenizer(f"{prefix} {question}", return_tensors="pt").input_ids
    y = models.tokenizer(target, return_tensors="pt").input_ids
    return models.student(input_ids=x, labels=y).loss


def slow_l_cl(models: Models, batch: list[Question], drawn: qcrd.Drawn) -> tuple[torch.Tensor, ...]:
    """Every rationale with gradients, one call each, D on all of them, and one row a question."""
    o, terms = models.options, []
    for q in batch:
        texts = q.positives + q.negatives + drawn.get(q.example.id, [])
        l = torch.zeros(1, max(1, len(texts)))
        score = torch.full_like(l, 0.5)
        for j, text in enumerate(texts):
            l = l.index_put(
                (torch.tensor([0]), torch.tensor([j])),
                slow_nll(models, "explain:", q.example.input, text),
            )
            if models.judge:
                pair = models.tokenizer(q.example.input, text, return_tensors="pt")
                score[0, j] = models.judge(pair.input_ids, pair.attention_mask).detach()
        column = torch.arange(l.shape[1])[None]
        is_pos = column < len(q.positives)
        is_neg = (column < len(texts)) & ~is_pos
        pos_pick, neg_pick = SCHEMES[o.scheme]
        pos, neg = choose(l, is_pos, pos_pick, score), choose(l, is_neg, neg_pick, 1 - score)
        weight = (
            torch.where(is_pos, score, 1 - score) if models.judge and o.scheme != "wmean" else None
        )
        terms.append(contrastive_loss(l, pos, neg, weight, o.beta, o.delta))
    return tuple(torch.stack(list(term)).mean() for term in zip(*terms, strict=True))


def gradients(models: Models, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    models.student.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in models.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scheme", ["minmax", "maxmin", "mean", "wmean"])
@pytest.mark.parametrize("judge", ["own", "none"])
@pytest.mark.parametrize(
    "delta", [3.0, 5.6]
)  # random weights give about 5.8 nats a token: all beyond, and some below
def test_two_passes_give_the_loss_and_gradient_of_all_rationales_at_once(scheme, judge, delta):
    models = small_models(make_options(scheme=scheme, judge=judge, delta=delta, quality="printed"))
    models.group_size = 4
    batch, drawn = a_batch()
    _, fast, _, figures = student_losses(models, weigh(models, batch, drawn))
    slow, pos, neg = slow_l_cl(models, batch, drawn)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-5)
    assert figures["L_positive"] == pytest.approx(pos.item(), abs=1e-5)
    assert figures["L_negative"] == pytest.approx(neg.item(), abs=1e-5)
    fast_grad, slow_grad = gradients(models, fast), gradients(models, slow)
    for name, grad in slow_grad.items():
        assert torch.allclose(fast_grad[name], grad, atol=1e-5), name


@pytest.mark.parametrize("size", [1, 3, 10_000])  # rationales a pass
@pytest.mark.parametrize("kind", ["t5", "flan", "mt5", "bart", "t5gemma"])
def test_groups_of_like_length_equal_a_loop_over_single_sequences(size, kind):
    student = a_student(kind).eval()
    models = Models(student, tokenizer(), None, make_options(judge="none"))
    models.group_size = size
    batch, _ = a_batch(1)
    texts, kind = qcrd.lay_out(batch, {})
    together = models.loss_of(
        models.encode([f"explain: {q.example.input}" for q in batch]), texts, kind > 0
    )
    for i, own in enumerate(texts):
        alone = [slow_nll(models, "explain:", batch[i].example.input, text).item() for text in own]
        assert together[i, : len(own)].tolist() == pytest.approx(alone, abs=1e-4)
        assert (together[i, len(own) :] == 0).all()


def train_one_step(
    models: Models, batch: list[Question], drawn: qcrd.Drawn, step: int = 0, round_: int = 0
) -> Any:
    """Gradients of one step of both optimizers, which change nothing (SGD at rate 0), and its figures."""
    models.options.lr = 0.0
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD(models.student.parameters(), 0.0)]
    if models.judge is not None:
        optimizers.append(torch.optim.SGD(models.judge.parameters(), 0.0))
    figures = qcrd.train_step(models, optimizers, batch, drawn, round_, step)
    return {n: p.grad for n, p in models.parts.named_parameters()}, figures


@pytest.mark.parametrize("judge_loss", ["bce", "paper"])
@pytest.mark.parametrize(
    "change", [{}, {"scheme": "sampling"}, {"quality": "relative"}, {"mi_weight": 0.1}]
)
def test_grad_accum_changes_nothing_but_memory(judge_loss, change):
    batch, drawn = a_batch()
    found = []
    for parts in (1, 2, 3, 6):
        changes = {
            "grad_accum": parts,
            "batch_size": 6,
            "delta": 5.8,
            "judge_loss": judge_loss,
        } | change
        models = small_models(make_options(**changes))
        found.append(train_one_step(models, batch, drawn)[0])
    for grads in found[1:]:
        for name, grad in grads.items():
            assert (grad is None) == (found[0][name] is None), name
            assert grad is None or torch.allclose(grad, found[0][name], atol=1e-6), name


def test_eq_8_and_the_decay_of_alpha_3(monkeypatch):
    models = small_models(
        make_options(alpha1=0.5, alpha2=0.25, alpha3=0.5, mi_weight=0.1, beta=0.2)
    )
    p = torch.nn.Parameter(torch.tensor([1.0]))
    monkeypatch.setattr(
        qcrd, "student_losses", lambda *_: (0.2 * p.sum(), 0.3 * p.sum(), 0.4 * p.sum(), {})
    )
    monkeypatch.setattr(qcrd, "discriminator_loss", lambda *_: (-0.1 * p.sum(), {}))
    qcrd.train_step(models, [torch.optim.SGD([p], 0.0)] * 2, a_batch()[0][2:3], {}, 2, 0)
    assert p.grad.item() == pytest.approx(0.5 * 0.2 + 0.25 * 0.3 + 0.5 * 0.9**2 * -0.1 + 0.1 * 0.4)


def test_the_discriminator_learns_from_a_random_part_of_a_batch_and_never_from_held_out_questions():
    questions = [
        Question(data.Example(str(i), "x", "y"), "y", ["a"], ["b"], held_out=i % 10 == 9)
        for i in range(64)
    ]
    options = make_options(batch_size=64, judge_every=2)
    drawn = [
        [int(q.example.id) for q in qcrd.judged_questions(questions, options, step)]
        for step in range(0, 40, 2)
    ]
    assert all(len(set(rows)) == 16 and not set(rows) & {9, 19, 29, 39, 49, 59} for rows in drawn)
    assert len(set().union(*drawn)) > 50 and drawn[0] != drawn[1]
    again = qcrd.judged_questions(questions, options, 0)
    assert (
        again == [questions[row] for row in drawn[0]]
        and qcrd.judged_questions(questions, options, 1) == []
    )


def test_choice_and_margin_are_settled_without_dropout():
    models = small_models(make_options(delta=5.8))
    for module in models.parts.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch, drawn = a_batch()
    first = weigh(models, batch, drawn)
    again = weigh(models, batch, drawn)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.neg_share, again.neg_share)
    assert models.student.training and models.judge.training


def test_l_cl_trains_the_student_and_not_the_discriminator():
    models = small_models(make_options(delta=5.8))
    batch, drawn = a_batch()
    student_losses(models, weigh(models, batch, drawn))[1].backward()
    assert all(p.grad is None for p in models.judge.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in models.student.parameters())


@pytest.mark.parametrize(("judge", "trains_encoder"), [("own", False), ("shared", True)])
def test_only_a_shared_encoder_lets_l_d_shape_the_student(judge, trains_encoder):
    models = small_models(make_options(judge=judge))
    batch, drawn = a_batch()
    discriminator_loss(models, [batch[0], *batch[2:4]], drawn)[0].backward()
    encoder = [
        p.grad.abs().sum().item() if p.grad is not None else 0
        for p in models.student.get_encoder().parameters()
    ]
    assert (sum(encoder) > 0) == trains_encoder
    assert sum(p.grad.abs().sum().item() for p in models.judge.mlp.parameters()) > 0


def nlls(models: Models, question: Question, texts: list[str]) -> list[float]:
    with torch.no_grad():
        return [slow_nll(models, "explain:", question.example.input, text).item() for text in texts]


def l_cl(models: Models, question: Question) -> torch.Tensor:
    return student_losses(models, weigh(models, [question], {}))[1]


def test_after_a_step_the_chosen_positive_is_likelier_and_a_negative_below_the_margin_less_likely():
    question = a_batch()[0][2]
    texts = [*question.positives, *question.negatives]
    for side, sign in (({"beta": 0.0}, -1), ({"beta": 2.0}, 1)):
        models = small_models(make_options(delta=20.0, judge="none", **side))
        before = nlls(models, question, texts)
        chosen = before.index(min(before[:2]))
        lone = Question(
            question.example,
            question.label,
            question.positives if sign < 0 else [],
            question.negatives,
        )
        l_cl(models, lone).backward()
        torch.optim.SGD(models.student.parameters(), 0.01).step()
        after, at = nlls(models, question, texts), chosen if sign < 0 else 2
        assert sign * (after[at] - before[at]) > 0


def test_a_negative_beyond_the_margin_gives_the_student_no_gradient():
    question = a_batch()[0][2]
    lone = Question(question.example, question.label, [], question.negatives)
    models = small_models(make_options(delta=0.1))
    loss = l_cl(models, lone)
    assert loss.item() == 0 and all((grad == 0).all() for grad in gradients(models, loss).values())


def test_rows_of_unlike_length_are_laid_out_with_zeros():
    sides: list[tuple[list[str], list[str]]] = [(["a", "b"], ["c"]), ([], []), ([], [])]
    questions = [
        Question(data.Example(str(i), "x", "y"), "y", *side) for i, side in enumerate(sides)
    ]
    texts, kind = qcrd.lay_out(questions, {"2": ["d"], "elsewhere": ["e"]})
    assert kind.tolist() == [[1, 1, 2], [0, 0, 0], [3, 0, 0]] and texts == [
        ["a", "b", "c"],
        [],
        ["d"],
    ]
    assert qcrd.lay_out(questions[1:], {})[1].shape == (2, 0)


@pytest.mark.parametrize("judge", ["own", "shared"])
def test_a_step_in_bf16_gives_every_parameter_the_gradient_of_fp32_but_for_rounding(judge):
    batch, drawn = a_batch()
    found = []
    for precision in ("fp32", "bf16"):
        models = small_models(make_options(precision=precision, judge=judge, delta=5.8))
        found.append(train_one_step(models, batch, drawn)[0])
    for name, grad in found[0].items():
        assert (grad is None) == (found[1][name] is None), name
        if grad is not None and grad.norm() > 1e-3:
            assert torch.cosine_similarity(grad.flatten(), found[1][name].flatten(), 0) > 0.95, name
