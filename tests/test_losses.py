"""The equations, with numbers worked out by hand."""

import inspect
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import tensor

import data
import qcrd
from qcrd import (
    Discriminator,
    OutputLayerLoss,
    Question,
    contrastive_loss,
    judge_auc,
    judge_loss,
    mutual_information_loss,
    self_consistency,
    token_mean,
    total_loss,
)

YES = torch.ones(1, 2, dtype=torch.bool)
POS, NEG = tensor([[0.5, 1.5]]), tensor([[1.0, 2.0]])  # l of two positives and two negatives, in nats per token
S_POS, S_NEG = tensor([[0.9, 0.4]]), tensor([[0.2, 0.7]])


def test_token_mean_is_the_mean_over_each_rows_own_tokens():
    # row 0 has two tokens of probability 1/2 and 1/4, row 1 one token of probability 1/8
    result = token_mean(tensor([math.log(2), math.log(4), math.log(8)]), tensor([0, 0, 1]), 2)
    assert torch.allclose(result, tensor([(math.log(2) + math.log(4)) / 2, math.log(8)]))


def test_output_layer_loss_by_hand():
    # one token, a vocabulary of two, logits log 3 and 0: probabilities 3/4 and 1/4
    states, weight = tensor([[1.0]], requires_grad=True), tensor([[math.log(3)], [0.0]], requires_grad=True)
    loss = OutputLayerLoss.apply(states, weight, tensor([0]), True)
    assert loss.item() == pytest.approx(math.log(4 / 3))
    loss.sum().backward()
    assert torch.allclose(weight.grad, tensor([[-0.25], [0.25]]))  # softmax - one-hot
    assert states.grad.item() == pytest.approx(-0.25 * math.log(3))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_output_layer_loss_in_parts_is_the_cross_entropy_of_all_logits(monkeypatch, dtype, tolerance):
    torch.manual_seed(0)
    states, weight, targets = torch.randn(13, 8), torch.randn(50, 8), torch.randint(50, (13,))
    pull = torch.rand(13)  # a weight of each token's loss
    monkeypatch.setattr(qcrd, "LOGITS_CPU", 50 * 4)  # four tokens at a time, then one
    found = []
    for fast in (False, True):
        a, w = states.to(dtype).requires_grad_(), weight.clone().requires_grad_()
        if fast:
            losses = OutputLayerLoss.apply(a, w, targets, True)
        else:
            losses = torch.nn.functional.cross_entropy(a.float() @ w.T, targets, reduction="none")
        (losses * pull).sum().backward()
        found.append((losses.detach(), a.grad.float(), w.grad))
    for slow, quick in zip(*found, strict=True):
        assert (slow - quick).abs().max() <= tolerance * slow.abs().max()
    assert torch.equal(OutputLayerLoss.apply(states.to(dtype), weight, targets, False), found[1][0])


def test_eqs_3_to_5_minmax_takes_the_easiest_positive_and_the_least_likely_negative():
    loss, pos, neg = contrastive_loss(POS, YES, NEG, YES, beta=0.2, delta=3.0)
    assert pos.item() == pytest.approx(0.5)  # min(0.5, 1.5)
    assert neg.item() == pytest.approx(-1.0)  # max(1 - 3, 2 - 3)
    assert loss.item() == pytest.approx(0.5 + 0.2 * 1.0)


def test_eqs_6_and_7_weigh_the_chosen_rationales_by_their_own_scores():
    loss, pos, neg = contrastive_loss(POS, YES, NEG, YES, S_POS, S_NEG)
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
    loss, pos_term, neg_term = contrastive_loss(POS, YES, NEG, YES, S_POS, S_NEG, scheme=scheme)
    assert pos_term.item() == pytest.approx(pos)
    assert neg_term.item() == pytest.approx(neg)
    assert loss.item() == pytest.approx(pos - 0.2 * neg)


def test_sampling_takes_one_real_rationale_each_and_every_one_in_turn():
    mask = tensor([[True, True, False]])
    nll = tensor([[0.5, 1.5, 9.0]])
    torch.manual_seed(0)
    seen = {contrastive_loss(nll, mask, nll, ~mask & False, scheme="sampling")[1].item() for _ in range(50)}
    assert seen == {0.5, 1.5}


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="minmax"):
        contrastive_loss(POS, YES, NEG, YES, scheme="median")


def test_a_question_without_positives_or_negatives_has_zero_in_that_term_and_still_counts_in_n():
    nll, mask = tensor([[0.6], [9.0]]), tensor([[True], [False]])
    _, pos, neg = contrastive_loss(nll, mask, nll, mask)
    assert pos.item() == pytest.approx(0.6 / 2)
    assert neg.item() == pytest.approx((0.6 - 3) / 2)
    empty = torch.zeros(2, 0)
    assert contrastive_loss(nll, mask, empty, empty.bool())[2].item() == 0


def test_a_negative_beyond_the_margin_pushes_no_more_and_one_below_does():
    neg = tensor([[3.0], [2.9], [7.0]], requires_grad=True)
    some = torch.ones(3, 1, dtype=torch.bool)
    contrastive_loss(neg.detach(), some, neg, some, beta=0.2, delta=3.0)[0].backward()
    # d/dl of -beta * (l - delta) / N = -0.2 / 3 below the margin: descending makes l larger, the negative less likely
    assert neg.grad.flatten().tolist() == pytest.approx([0.0, -0.2 / 3, 0.0])


def test_one_negative_beyond_the_margin_switches_the_term_off_for_its_question():
    neg = tensor([[1.0, 3.5]], requires_grad=True)
    contrastive_loss(POS, YES, neg, YES)[0].backward()
    assert neg.grad.tolist() == [[0.0, 0.0]]


def test_l_cl_gives_the_discriminator_no_gradient():
    s_pos, s_neg = S_POS.clone().requires_grad_(), S_NEG.clone().requires_grad_()
    pos = POS.clone().requires_grad_()
    contrastive_loss(pos, YES, NEG, YES, s_pos, s_neg)[0].backward()
    assert pos.grad is not None and s_pos.grad is None and s_neg.grad is None


def test_eq_2_is_the_log_ratio_of_sums_of_exponentials():
    # question 0: positives 0.9 and 0.4, negative 0.2; question 1: no negative, so it does not count
    pos, pos_mask = tensor([[0.9, 0.4], [0.8, 0.0]]), tensor([[True, True], [True, False]])
    neg, neg_mask = tensor([[0.2], [0.0]]), tensor([[True], [False]])
    expected = -math.log((math.exp(0.9) + math.exp(0.4)) / math.exp(0.2))
    assert judge_loss(pos, pos_mask, neg, neg_mask, "paper").item() == pytest.approx(expected)


def test_eq_2_does_not_see_a_shift_of_all_scores_and_bce_does():
    def at(shift, kind):
        return judge_loss(tensor([[0.5 + shift]]), YES[:, :1], tensor([[0.3 + shift]]), YES[:, :1], kind).item()

    assert at(0.0, "paper") == pytest.approx(at(0.2, "paper"))
    assert at(0.0, "bce") == pytest.approx(-(math.log(0.5) + math.log(0.7)) / 2)
    assert at(0.2, "bce") == pytest.approx(-(math.log(0.7) + math.log(0.5)) / 2)
    assert at(0.3, "bce") == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)


@pytest.mark.parametrize("kind", ["paper", "bce"])
def test_judge_loss_of_nothing_is_zero_and_has_a_gradient(kind):
    score = torch.zeros(2, 1, requires_grad=True)
    nothing = torch.zeros(2, 1, dtype=torch.bool)
    loss = judge_loss(score, nothing, score, nothing, kind)
    loss.backward()
    assert loss.item() == 0 and score.grad.abs().sum() == 0


def test_eq_8_and_the_decay_of_alpha_3():
    l_pred, l_cl, l_d = tensor(2.0), tensor(3.0), tensor(-1.0)
    assert total_loss(l_pred, l_cl, l_d, (0.5, 0.5, 0.5), 0).item() == pytest.approx(1 + 1.5 - 0.5)
    assert total_loss(l_pred, l_cl, l_d, (0.5, 0.5, 0.5), 2).item() == pytest.approx(1 + 1.5 - 0.5 * 0.81)


def test_mi_is_a_cross_entropy_that_teaches_the_explaining_side_only():
    pred, expl = tensor([[0.5, 0.25]], requires_grad=True), tensor([[0.25, 0.5]], requires_grad=True)
    loss = mutual_information_loss(pred, expl)
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
    nll[None, pos], torch.ones(1, 2, dtype=torch.bool), nll[None, neg], torch.ones(1, 1, dtype=torch.bool),
    score[None, pos], score[None, neg])
loss.backward()
assert torch.allclose(pos_term, 0.4 * score[0]) and torch.allclose(neg_term, (1.5 - 3) * (1 - score[2]))
assert torch.allclose(nll.grad, torch.stack([score[0], score[0] * 0, -0.2 * (1 - score[2])]).detach())
print("it works")
"""


def test_the_three_names_work_pasted_into_a_notebook(tmp_path):
    pasted = "\n\n".join(inspect.getsource(part) for part in (self_consistency, Discriminator, contrastive_loss))
    (tmp_path / "notebook.py").write_text(NOTEBOOK.replace("{pasted}", pasted))
    done = subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "it works\n", done.stderr


def test_auc_of_the_discriminator_by_hand():
    scores = {"a": 0.9, "b": 0.4, "c": 0.6, "d": 0.4, "e": 0.1, "f": 0.8}
    judge = SimpleNamespace(score_constant=lambda questions, texts: tensor([scores[t] for t in texts]))
    example = data.Example("q", "x", "y")
    questions = [
        Question(example, "y", ["a", "b"], ["c", "d"], held_out=True),  # pairs a>c, a>d, b<c, b=d: 2.5 of 4
        Question(example, "y", ["e"], ["f"], held_out=True),  # e<f: 0 of 1
        Question(example, "y", ["a"], [], held_out=True),  # no pair
        Question(example, "y", ["a"], ["b"]),  # not held out
    ]
    assert judge_auc(judge, questions) == pytest.approx(2.5 / 5)
    assert math.isnan(judge_auc(judge, questions[2:]))
