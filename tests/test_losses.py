"""The equations, with numbers worked out by hand."""

import inspect
import math
import subprocess
import sys

import pytest
import torch
from torch import tensor

import data
from qcrd import (
    SCHEMES,
    Discriminator,
    Question,
    choose,
    contrastive_loss,
    judge_auc,
    judge_check,
    judge_loss,
    judge_terms,
    mutual_information_loss,
    quality_weights,
    self_consistency,
)
from tests.helpers import make_options, small_models

# one question with two positives, then two negatives: l in nats per token, D's scores, and which is which
L, S = tensor([[0.5, 1.5, 1.0, 2.0]]), tensor([[0.9, 0.4, 0.2, 0.7]])
IS_POS, IS_NEG = tensor([[True, True, False, False]]), tensor([[False, False, True, True]])


def l_cl(scheme: str = "minmax", score: torch.Tensor | None = None, l: torch.Tensor = L) -> tuple:
    """(L_cl, its positive and its negative term) of the question above, as a training step puts them together."""
    pos_pick, neg_pick = SCHEMES[scheme]
    pos = choose(l, IS_POS, pos_pick, score)
    neg = choose(l, IS_NEG, neg_pick, None if score is None else 1 - score)
    weight = None if score is None or scheme == "wmean" else quality_weights(score, pos)
    return contrastive_loss(l, pos, neg, weight, beta=0.2, delta=3.0)


def test_eqs_3_to_5_minmax_takes_the_easiest_positive_and_the_least_likely_negative():
    loss, pos, neg = l_cl()
    assert pos.item() == pytest.approx(0.5)  # min(0.5, 1.5)
    assert neg.item() == pytest.approx(-1.0)  # max(1 - 3, 2 - 3)
    assert loss.item() == pytest.approx(0.5 + 0.2 * 1.0)


def test_eqs_6_and_7_weigh_the_chosen_rationales_by_their_own_scores():
    loss, pos, neg = l_cl(score=S)
    assert pos.item() == pytest.approx(0.9 * 0.5)
    assert neg.item() == pytest.approx((1 - 0.7) * -1.0)
    assert loss.item() == pytest.approx(0.45 + 0.2 * 0.3)


@pytest.mark.parametrize(
    ("scheme", "pos", "neg"),
    [
        ("maxmin", 0.4 * 1.5, 0.8 * -2.0),
        ("mean", (0.9 * 0.5 + 0.4 * 1.5) / 2, (0.8 * -2 + 0.3 * -1) / 2),
        ("wmean", (0.9 * 0.5 + 0.4 * 1.5) / 1.3, (0.8 * -2 + 0.3 * -1) / 1.1),
    ],
)
def test_other_schemes(scheme, pos, neg):
    loss, pos_term, neg_term = l_cl(scheme, S)
    assert pos_term.item() == pytest.approx(pos)
    assert neg_term.item() == pytest.approx(neg)
    assert loss.item() == pytest.approx(pos - 0.2 * neg)


def test_sampling_takes_one_real_rationale_each_and_every_one_in_turn():
    mask = tensor([[True, True, False]])
    torch.manual_seed(0)
    seen = {tuple(choose(torch.zeros(1, 3), mask, "sampling")[0].tolist()) for _ in range(50)}
    assert seen == {(1, 0, 0), (0, 1, 0)}


def test_an_unknown_pick_is_refused():
    with pytest.raises(ValueError, match="wmean"):
        choose(L, IS_POS, "median")


@pytest.mark.parametrize("pick", ["min", "max", "sampling", "mean", "wmean"])
def test_shares_add_up_to_one_or_to_nothing_where_there_is_no_rationale(pick):
    mask = tensor([[True, True, False], [False, False, False]])
    share = choose(torch.rand(2, 3), mask, pick, torch.rand(2, 3))
    assert share.sum(1).tolist() == pytest.approx([1, 0]) and (share[~mask] == 0).all()
    assert choose(torch.zeros(2, 0), torch.zeros(2, 0).bool(), pick).shape == (2, 0)


def test_a_question_without_positives_or_negatives_has_zero_in_that_term_and_still_counts_in_n():
    l, one = tensor([[0.6], [9.0]]), tensor([[1.0], [0.0]])
    loss, pos, neg = contrastive_loss(l, one, torch.zeros(2, 1))
    assert pos.tolist() == pytest.approx([0.6, 0]) and neg.tolist() == [0, 0]
    assert loss.item() == pytest.approx(0.6 / 2)
    loss, pos, neg = contrastive_loss(l, torch.zeros(2, 1), one)
    assert neg.tolist() == pytest.approx([0.6 - 3, 0]) and loss.item() == pytest.approx(
        0.2 * 2.4 / 2
    )


def test_a_negative_beyond_the_margin_pushes_no_more_and_one_below_does():
    l = tensor([[3.0], [2.9], [7.0]], requires_grad=True)
    contrastive_loss(l, torch.zeros(3, 1), torch.ones(3, 1), beta=0.2, delta=3.0)[0].backward()
    # d/dl of -beta * (l - delta) / N = -0.2 / 3 below the margin: descending makes l larger, the negative less likely
    assert l.grad.flatten().tolist() == pytest.approx([0.0, -0.2 / 3, 0.0])


def test_one_negative_beyond_the_margin_switches_the_term_off_for_its_question():
    l = tensor([[0.5, 1.5, 1.0, 3.5]], requires_grad=True)
    l_cl(l=l)[0].backward()
    assert l.grad.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_l_cl_gives_the_discriminator_no_gradient():
    score, l = S.clone().requires_grad_(), L.clone().requires_grad_()
    l_cl(score=score, l=l)[0].backward()
    assert l.grad is not None and score.grad is None


def test_relative_quality_weights_by_hand():
    # two questions, a positive and a negative each: s 0.9 and 0.3 for positives (mean 0.6), 1 - s 0.8 and 0.2
    score = tensor([[0.9, 0.2], [0.3, 0.8]])
    pos = tensor([[1.0, 0.0], [1.0, 0.0]])
    assert quality_weights(score, pos).tolist() == [
        pytest.approx([0.9, 0.8]),
        pytest.approx([0.3, 0.2]),
    ]
    relative = quality_weights(score, pos, "relative")
    assert relative.tolist() == [pytest.approx([1.5, 0.8]), pytest.approx([0.5, 0.2])]


def test_relative_weights_do_not_see_a_factor_on_all_positives_scores_and_printed_ones_do():
    torch.manual_seed(0)
    score = torch.rand(5, 4)
    pos, neg = choose(score, tensor([[True, True, False, False]] * 5), "max"), choose(score, tensor([[False, False, True, True]] * 5), "max")  # fmt: skip
    scaled = torch.where(pos > 0, 0.01 * score, score)
    for quality, same in (("relative", True), ("printed", False)):
        grads = []
        for s in (score, scaled):
            l = torch.full((5, 4), 0.5, requires_grad=True)
            contrastive_loss(l, pos, neg, quality_weights(s, pos, quality))[0].backward()
            grads.append(l.grad)
        assert torch.allclose(*grads, atol=1e-7) == same


KIND = tensor(
    [[1, 1, 2], [1, 0, 0]]
)  # question 0: two positives, one negative; question 1: no negative


def test_eq_2_is_the_log_ratio_of_sums_of_exponentials():
    score = tensor([[0.9, 0.4, 0.2], [0.8, 0.0, 0.0]])  # question 1 does not count
    expected = -math.log((math.exp(0.9) + math.exp(0.4)) / math.exp(0.2))
    assert judge_loss(score, KIND, "paper").item() == pytest.approx(expected)
    assert judge_terms(KIND, "paper") == 1 and judge_terms(KIND, "bce") == 4


def test_eq_2_does_not_see_a_shift_of_all_scores_and_bce_does():
    def at(shift, loss):
        return judge_loss(tensor([[0.5 + shift, 0.3 + shift]]), tensor([[1, 3]]), loss).item()

    assert at(0.0, "paper") == pytest.approx(at(0.2, "paper"))
    assert at(0.0, "bce") == pytest.approx(-(math.log(0.5) + math.log(0.7)) / 2)
    assert at(0.2, "bce") == pytest.approx(-(math.log(0.7) + math.log(0.5)) / 2)
    assert at(0.3, "bce") == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)


@pytest.mark.parametrize("loss", ["paper", "bce"])
def test_parts_of_a_batch_add_up_to_its_judge_loss(loss):
    torch.manual_seed(0)
    score, kind = torch.rand(6, 3), torch.randint(4, (6, 3))
    terms = judge_terms(kind, loss)
    parts = [judge_loss(score[i : i + 2], kind[i : i + 2], loss, terms) for i in (0, 2, 4)]
    assert sum(parts).item() == pytest.approx(judge_loss(score, kind, loss).item())


@pytest.mark.parametrize("loss", ["paper", "bce"])
def test_judge_loss_of_nothing_is_zero_and_has_a_gradient(loss):
    score = torch.zeros(2, 1, requires_grad=True)
    value = judge_loss(score, torch.zeros(2, 1, dtype=torch.long), loss)
    value.backward()
    assert value.item() == 0 and score.grad.abs().sum() == 0


def test_bce_of_a_saturated_score_is_finite_and_so_is_its_gradient():
    score = tensor([[0.0, 1.0]], requires_grad=True)
    value = judge_loss(score, tensor([[1, 2]]), "bce")
    value.backward()
    assert 10 < value.item() < 20 and torch.isfinite(score.grad).all()


def test_mi_is_a_cross_entropy_that_teaches_the_explaining_side_only():
    pred, expl = (
        tensor([[0.5, 0.25]], requires_grad=True),
        tensor([[0.25, 0.5]], requires_grad=True),
    )
    loss = mutual_information_loss(pred, expl)[0]
    assert loss.item() == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(2))
    loss.backward()
    assert pred.grad is None and expl.grad.tolist() == [[pytest.approx(-2.0), pytest.approx(-0.5)]]


def test_the_vote():
    assert self_consistency([42, 42.0, 7, None, 42]) == (42, [0, 1, 4], [2])


def test_a_tie_goes_to_the_answer_that_came_first():
    assert self_consistency(["b", "a", "a", "b", "c"]) == ("b", [0, 3], [1, 2, 4])


def test_no_parsable_sample_gives_no_winner():
    assert self_consistency([None, None]) == (None, [], [])
    assert self_consistency([]) == (None, [], [])


NOTEBOOK = """
import math
from collections.abc import Hashable, Sequence
from types import SimpleNamespace
import torch
import torch.nn.functional as F
from torch import Tensor, nn

{pasted}

winner, pos, neg = self_consistency(["12", "12", "7", None])
assert (winner, pos, neg) == ("12", [0, 1], [2])
words = nn.Embedding(10, 4)
judge = Discriminator(lambda input_ids, attention_mask: SimpleNamespace(last_hidden_state=words(input_ids)), 4)
ids = torch.tensor([[1, 2, 3], [4, 5, 0], [6, 0, 0]])
score = judge(ids, (ids != 0).long())
nll = torch.tensor([0.4, 0.9, 1.5], requires_grad=True)
loss, pos_term, neg_term = contrastive_loss(
    nll[None], torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 1.0]]),
    torch.stack([score[0], score[1], 1 - score[2]])[None])
loss.backward()
assert torch.allclose(pos_term, 0.4 * score[0]) and torch.allclose(neg_term, (1.5 - 3) * (1 - score[2]))
assert torch.allclose(nll.grad, torch.stack([score[0], score[0] * 0, -0.2 * (1 - score[2])]).detach())
print("it works")
"""


def test_the_three_names_work_pasted_into_a_notebook(tmp_path):
    pasted = "\n\n".join(
        inspect.getsource(part) for part in (self_consistency, Discriminator, contrastive_loss)
    )
    (tmp_path / "notebook.py").write_text(NOTEBOOK.replace("{pasted}", pasted))
    done = subprocess.run(
        [sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "it works\n", done.stderr


def test_auc_of_the_discriminator_by_hand():
    scores = {"a": 0.9, "b": 0.4, "c": 0.6, "d": 0.4, "e": 0.1, "f": 0.8}
    models = small_models(make_options())
    models.score = lambda questions, texts, where: tensor(
        [
            [scores.get(own[j], 0) if j < len(own) else 0 for j in range(where.shape[1])]
            for own in texts
        ]
    )
    example = data.Example("q", "x", "y")
    questions = [
        Question(
            example, "y", ["a", "b"], ["c", "d"], held_out=True
        ),  # pairs a>c, a>d, b<c, b=d: 2.5 of 4
        Question(example, "y", ["e"], ["f"], held_out=True),  # e<f: 0 of 1
        Question(example, "y", ["a"], [], held_out=True),  # no pair
        Question(example, "y", ["a"], ["b"]),  # not held out
    ]
    assert judge_auc(models, questions) == pytest.approx(2.5 / 5)
    assert math.isnan(judge_auc(models, questions[2:]))
    assert judge_check(models, questions[2:], {}) == {}  # NaN is no JSON
