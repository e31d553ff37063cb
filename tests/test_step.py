"""One training step: the fast path against the obvious one, and who gets a gradient from what."""

import random
from contextlib import nullcontext

import pytest
import torch

import data
import qcrd
from qcrd import Models, Question, contrastive_loss, discriminator_loss, grid, rationale_loss, student_loss
from tests.helpers import make_options, small_models


def a_batch(seed: int = 0) -> tuple[list[Question], dict[str, str]]:
    """Questions with 0 to 3 positives and 0 to 2 teacher negatives, and student negatives for some of them."""
    rng = random.Random(seed)
    questions, drawn = [], {}
    for i in range(6):
        story = data.random_story(rng, rng.choice(data.EVENTS))
        example = data.Example(f"q{i}", story.input(), data.equation(story.start, story.changes()), story=story)
        texts = list(
            dict.fromkeys(
                data.parse_output(data.TASKS["toy"], example, data.think(rng, story, 0.5))[0] for _ in range(8)
            )
        )
        pos, neg = [0, 1, 2, 3, 3, 1][i], [2, 0, 1, 2, 0, 1][i]
        questions.append(Question(example, example.label, texts[:pos], texts[pos : pos + neg]))
        if i % 2:
            drawn[example.id] = texts[-1] + " extra"
    return questions, drawn


def slow_nll(models: Models, prefix: str, question: str, target: str) -> torch.Tensor:
    """One sequence through the whole model, as transformers computes its loss."""
    x = models.tokenizer(f"{prefix} {question}", return_tensors="pt").input_ids
    y = models.tokenizer(target, return_tensors="pt").input_ids
    return models.student(input_ids=x, labels=y).loss


def slow_l_cl(models: Models, batch: list[Question], drawn: dict[str, str]) -> tuple[torch.Tensor, ...]:
    """Every rationale with gradients, one call each, and the discriminator on all of them."""
    nll, score = [], []
    for side in qcrd.rationales_of(batch, drawn, models.options):
        counts = [len(own) for own in side]
        pairs = [(q, text) for q, own in zip(batch, side, strict=True) for text in own]
        losses = [slow_nll(models, "explain:", q.example.input, text) for q, text in pairs]
        nll.append(grid(torch.stack(losses), counts))
        scores = [models.score_constant([q], [text])[0] for q, text in pairs] if models.judge else losses
        score.append(grid(torch.stack(scores).detach(), counts)[0] if models.judge else None)
    (pos, pos_mask), (neg, neg_mask) = nll
    o = models.options
    return contrastive_loss(pos, pos_mask, neg, neg_mask, *score, o.beta, o.delta, o.scheme)


def gradients(models: Models, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    models.student.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in models.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scheme", ["minmax", "maxmin", "mean", "wmean"])
@pytest.mark.parametrize("judge", ["own", "none"])
@pytest.mark.parametrize("delta", [3.0, 5.6])  # random weights give about 5.8 nats a token: all beyond, and some below
def test_two_passes_give_the_loss_and_gradient_of_all_rationales_at_once(scheme, judge, delta):
    models = small_models(make_options(scheme=scheme, judge=judge, delta=delta))
    batch, drawn = a_batch()
    states, mask = models.encode(
        [
            torch.cat((torch.tensor(models.explain), torch.tensor(x))).numpy()
            for x in models.inputs([q.example.input for q in batch])
        ]
    )
    fast = rationale_loss(models, batch, *qcrd.rationales_of(batch, drawn, models.options), states, mask)
    slow = slow_l_cl(models, batch, drawn)
    for a, b in zip(fast, slow, strict=True):
        assert a.item() == pytest.approx(b.item(), abs=1e-5)
    fast_grad, slow_grad = gradients(models, fast[0]), gradients(models, slow[0])
    assert fast_grad.keys() == slow_grad.keys()
    for name, grad in slow_grad.items():
        assert torch.allclose(fast_grad[name], grad, atol=1e-5), name


@pytest.mark.parametrize("part", [1, 7, 4096])  # tokens in a part of the output layer's loss
@pytest.mark.parametrize("tokens", [1, 30, 10_000])  # one row a pass, a few, all
def test_groups_of_like_length_equal_a_loop_over_single_sequences(monkeypatch, tokens, part):
    models = small_models(make_options())
    monkeypatch.setattr(qcrd, "LOGITS_CPU", part * models.student.config.vocab_size)
    models.group_tokens = tokens
    batch, _ = a_batch(1)
    labels = [q.label for q in batch]
    inputs = [models.tokenizer("predict: " + q.example.input).input_ids for q in batch]
    states, mask = models.encode([torch.tensor(x).numpy() for x in inputs])
    together = models.nll(states, mask, models.targets(labels), range(len(labels)))
    alone = torch.stack([slow_nll(models, "predict:", q.example.input, q.label) for q in batch])
    assert torch.allclose(together, alone, atol=1e-5)


def test_the_prefix_is_tokenized_as_part_of_the_input():
    models = small_models(make_options())
    text = a_batch()[0][0].example.input
    assert [*models.explain, *models.inputs([text])[0]] == models.tokenizer(f"explain: {text}").input_ids


def test_l_cl_trains_the_student_and_not_the_discriminator():
    models = small_models(make_options(alpha1=0.0))
    batch, drawn = a_batch()
    student_loss(models, batch, drawn, 0)[0].backward()
    assert all(p.grad is None for p in models.judge.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in models.student.parameters())


def test_a_frozen_discriminators_features_are_computed_once_and_give_the_same_scores():
    models = small_models(make_options(judge="frozen"))
    batch, _ = a_batch()
    pairs = [(q, text) for q in batch for text in q.positives + q.negatives]
    first = models.score(*zip(*pairs, strict=True))
    known = len(models.frozen)
    assert known == len({(q.example.input, text) for q, text in pairs})
    rows = [
        torch.cat((torch.tensor(models.inputs([q.example.input])[0]), torch.tensor(models.targets([text])[0])))[None]
        for q, text in pairs
    ]
    slow = torch.cat([models.judge(row.long(), torch.ones_like(row)) for row in rows])
    assert torch.allclose(first, slow, atol=1e-5)
    assert torch.equal(models.score(*zip(*pairs, strict=True)), first) and len(models.frozen) == known


@pytest.mark.parametrize(("judge", "trains_encoder"), [("own", False), ("frozen", False), ("shared", True)])
def test_only_a_shared_encoder_lets_l_d_shape_the_student(judge, trains_encoder):
    models = small_models(make_options(judge=judge, alpha1=0.0, alpha2=0.0))
    batch, drawn = a_batch()
    student_loss(models, batch, drawn, 0)[0].backward()
    discriminator_loss(models, batch, drawn, 0)[0].backward()
    encoder = [
        p.grad.abs().sum().item() if p.grad is not None else 0 for p in models.student.get_encoder().parameters()
    ]
    assert (sum(encoder) > 0) == trains_encoder
    assert sum(p.grad.abs().sum().item() for p in models.judge.mlp.parameters()) > 0


def nlls(models: Models, question: Question, texts: list[str]) -> list[float]:
    with torch.no_grad():
        return [slow_nll(models, "explain:", question.example.input, text).item() for text in texts]


def test_after_a_step_the_chosen_positive_is_likelier_and_a_negative_below_the_margin_less_likely():
    models = small_models(make_options(alpha1=0.0, delta=20.0, beta=2.0, judge="none"))
    question = a_batch()[0][2]
    optimizer = torch.optim.SGD(models.student.parameters(), 0.01)
    texts = [*question.positives, *question.negatives]
    before = nlls(models, question, texts)
    chosen = before.index(min(before[:2]))
    student_loss(models, [question], {}, 0)[0].backward()
    optimizer.step()
    after = nlls(models, question, texts)
    assert after[2] > before[2] or after[chosen] < before[chosen]  # both pull at shared words; at least one shows here
    for side, sign in (({"beta": 0.0}, -1), ({"alpha2": 1.0}, 1)):
        models = small_models(make_options(alpha1=0.0, delta=20.0, judge="none", **side))
        lone = Question(question.example, question.label, question.positives if sign < 0 else [], question.negatives)
        student_loss(models, [lone], {}, 0)[0].backward()
        torch.optim.SGD(models.student.parameters(), 0.01).step()
        after, at = nlls(models, question, texts), chosen if sign < 0 else 2
        assert sign * (after[at] - before[at]) > 0


def test_a_negative_beyond_the_margin_gives_the_student_no_gradient():
    models = small_models(make_options(alpha1=0.0, delta=0.1))
    question = a_batch()[0][2]
    lone = Question(question.example, question.label, [], question.negatives)
    loss, _ = student_loss(models, [lone], {}, 0)
    loss.backward()
    assert sum(p.grad.abs().sum().item() for p in models.student.parameters() if p.grad is not None) == 0


def test_grid_lays_values_out_by_question():
    values, mask = grid(torch.tensor([1.0, 3.0, 2.0]), [2, 0, 1])
    assert values.tolist() == [[1, 3], [0, 0], [2, 0]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]


def test_fast_dropout_keeps_the_right_share_scales_it_and_repeats_by_seed():
    layer, x = qcrd.Dropout(0.1), torch.ones(999, 101, requires_grad=True)
    torch.manual_seed(0)
    out = layer(x)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).item()}
    assert (out == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)  # five standard deviations of 1e5 draws
    assert (
        abs(torch.corrcoef(torch.stack([(out[:, :-1] == 0).flatten(), (out[:, 1:] == 0).flatten()]).float())[0, 1])
        < 0.02
    )
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    torch.manual_seed(0)
    assert torch.equal(layer(x), out)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("judge", ["own", "shared"])
def test_in_bf16_one_autocast_around_the_step_gives_the_gradients_of_many(judge):
    grads = []
    for around in (True, False):
        models = small_models(make_options(precision="bf16", judge=judge))
        batch, drawn = a_batch()
        with models.autocast() if around else nullcontext():
            losses = [terms(models, batch, drawn, 0)[0] for terms in (student_loss, discriminator_loss)]
        sum(losses).backward()
        parts = {"student": models.student, "judge": models.judge}
        grads.append({f"{k}.{n}": p.grad for k, part in parts.items() for n, p in part.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad is not None and grads[1][name] is not None, name
        assert torch.allclose(grad, grads[1][name], rtol=0.1, atol=1e-2), name
