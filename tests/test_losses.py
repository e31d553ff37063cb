"""The equations, with numbers worked out by hand."""

import inspect
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import tensor

import data
import qcrd
from qcrd import (
    SCHEMES,
    Discriminator,
    Options,
    Question,
    Rationale,
    contrastive_loss,
    disc_auc,
    disc_terms,
    discriminator_loss,
    mutual_information_loss,
    quality_weights,
    self_consistency,
    shares,
)
from tests.helpers import make_options, small_models

# One question with two positives, then two negatives: l in nats per token, and D's scores.
L, S = [0.5, 1.5, 1.0, 2.0], [0.9, 0.4, 0.2, 0.7]
IS_POS = tensor([True, True, False, False])


def l_cl(scheme: str = "minmax", score: list[float] | None = None, l: Any = L) -> list[float]:
    """(L_cl, L_pos, L_neg) of the question above, put together as a training step does, with
    quality weights as printed, beta 0.2 and delta 3."""
    l = torch.as_tensor(l)
    pos_pick, neg_pick = SCHEMES[scheme]
    pos_quality = score[:2] if score else None
    neg_quality = [1 - s for s in score[2:]] if score else None
    share = shares(l[:2].tolist(), pos_pick, pos_quality)
    share = tensor(share + shares(l[2:].tolist(), neg_pick, neg_quality))
    weight = share
    if score and scheme != "wmean":
        weight = quality_weights(share, tensor(score), IS_POS, "printed")
    return [term.item() for term in contrastive_loss(l, weight, IS_POS, 1, beta=0.2, delta=3.0)]


def test_eqs_3_to_5_minmax_takes_the_easiest_positive_and_the_least_likely_negative():
    loss, pos, neg = l_cl()
    assert pos == pytest.approx(0.5)  # min(0.5, 1.5)
    assert neg == pytest.approx(-1.0)  # max(1 - 3, 2 - 3)
    assert loss == pytest.approx(0.5 + 0.2 * 1.0)


def test_eqs_6_and_7_weigh_the_chosen_rationales_by_their_own_scores():
    loss, pos, neg = l_cl(score=S)
    assert pos == pytest.approx(0.9 * 0.5)
    assert neg == pytest.approx((1 - 0.7) * -1.0)
    assert loss == pytest.approx(0.45 + 0.2 * 0.3)


@pytest.mark.parametrize(
    ("scheme", "pos", "neg"),
    [
        ("maxmin", 0.4 * 1.5, 0.8 * -2.0),
        ("mean", (0.9 * 0.5 + 0.4 * 1.5) / 2, (0.8 * -2 + 0.3 * -1) / 2),
        ("wmean", (0.9 * 0.5 + 0.4 * 1.5) / 1.3, (0.8 * -2 + 0.3 * -1) / 1.1),
    ],
)
def test_other_schemes(scheme, pos, neg):
    assert l_cl(scheme, S) == pytest.approx([pos - 0.2 * neg, pos, neg])


def test_the_shares_of_each_pick_by_hand():
    assert shares([0.5, 1.5, 1.0], "min") == [1, 0, 0]
    assert shares([0.5, 1.5, 1.0], "max") == [0, 1, 0]
    assert shares([0.5, 1.5, 1.0, 2.0], "mean") == [0.25] * 4
    assert shares([0.5, 1.5], "weighted", [0.9, 0.3]) == pytest.approx([0.75, 0.25])
    assert shares([0.5, 1.5], "weighted") == [0.5, 0.5]  # without D all are of one quality


def test_of_two_equally_easy_rationales_the_first_is_chosen():
    assert shares([1.0, 0.5, 0.5], "min") == [0, 1, 0]
    assert shares([2.0, 2.0, 0.5], "max") == [1, 0, 0]


def test_sampling_takes_one_rationale_and_every_one_in_turn():
    torch.manual_seed(0)
    seen = {tuple(shares([0.0, 0.0, 0.0], "sample")) for _ in range(50)}
    assert seen == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}


def test_an_unknown_pick_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'median'.*weighted"):
        shares(L, "median")


@pytest.mark.parametrize("pick", ["min", "max", "sample", "mean", "weighted"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_shares_add_up_to_one(pick, count):
    torch.manual_seed(0)
    share = shares(torch.rand(count).tolist(), pick, torch.rand(count).tolist())
    assert len(share) == count and sum(share) == pytest.approx(1) and min(share) >= 0


def test_qualities_that_are_all_zero_give_finite_shares():
    assert shares([1.0, 2.0], "weighted", [0.0, 0.0]) == [0, 0]


def test_a_question_without_positives_or_negatives_has_zero_in_that_term_and_still_counts_in_n():
    one = torch.ones(1)  # the only rationale of two questions
    loss, pos, neg = contrastive_loss(tensor([0.6]), one, tensor([True]), 2)
    assert pos.item() == pytest.approx(0.6 / 2) and neg.item() == 0
    assert loss.item() == pytest.approx(0.6 / 2)
    loss, pos, neg = contrastive_loss(tensor([0.6]), one, tensor([False]), 2)
    assert pos.item() == 0 and neg.item() == pytest.approx((0.6 - 3) / 2)
    assert loss.item() == pytest.approx(0.2 * 2.4 / 2)


def test_l_cl_of_no_rationale_is_zero():
    nothing = torch.zeros(0)
    assert [x.item() for x in contrastive_loss(nothing, nothing, nothing.bool(), 2)] == [0, 0, 0]


def test_a_negative_beyond_the_margin_pushes_no_more_and_one_below_does():
    l = tensor([3.1, 2.9, 7.0], requires_grad=True)
    contrastive_loss(l, torch.ones(3), tensor([False] * 3), 3, beta=0.2, delta=3.0)[0].backward()
    # below the margin d/dl of -beta * (l - delta) / n is -0.2 / 3: descending makes l larger, the
    # negative less likely
    assert l.grad.tolist() == pytest.approx([0.0, -0.2 / 3, 0.0])


def test_one_negative_beyond_the_margin_switches_the_term_off_for_its_question():
    l = tensor([0.5, 1.5, 1.0, 3.5], requires_grad=True)
    share = tensor(shares([0.5, 1.5], "min") + shares([1.0, 3.5], "max"))
    contrastive_loss(l, share, IS_POS, 1)[0].backward()
    assert l.grad.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_l_cl_gives_the_discriminator_no_gradient():
    score, l = tensor(S, requires_grad=True), tensor(L, requires_grad=True)
    weight = quality_weights(tensor([1.0, 0, 0, 1]), score, IS_POS)
    contrastive_loss(l, weight, IS_POS, 1)[0].backward()
    assert l.grad.abs().sum() > 0 and score.grad is None


# two questions, a positive and a negative each: s 0.9 and 0.3 for the positives, whose mean is 0.6
SCORE = tensor([0.9, 0.2, 0.3, 0.8])
TURNS = tensor([True, False, True, False])


def test_quality_weights_by_hand():
    share = torch.ones(4)
    printed = quality_weights(share, SCORE, TURNS, "printed")
    assert printed.tolist() == pytest.approx([0.9, 0.8, 0.3, 0.2])
    relative = quality_weights(share, SCORE, TURNS, "relative")
    assert relative.tolist() == pytest.approx([1.5, 0.8, 0.5, 0.2])


def test_a_rationale_that_was_not_chosen_has_no_weight_and_no_part_in_the_mean():
    share = tensor([1.0, 1.0, 0.0, 0.5])
    relative = quality_weights(share, SCORE, TURNS)  # the mean of the chosen positives is 0.9
    assert relative.tolist() == pytest.approx([1.0, 0.8, 0.0, 0.1])
    shared = tensor([0.25, 1.0, 0.75, 1.0])  # their mean is 0.25 * 0.9 + 0.75 * 0.3 = 0.45
    relative = quality_weights(shared, SCORE, TURNS)
    assert relative.tolist() == pytest.approx([0.5, 0.8, 0.5, 0.2])


def test_relative_weights_of_a_batch_without_positives_or_with_scores_of_zero_are_finite():
    none = quality_weights(torch.ones(2), tensor([0.3, 0.6]), tensor([False, False]))
    assert none.tolist() == pytest.approx([0.7, 0.4])
    zero = quality_weights(torch.ones(2), tensor([0.0, 0.6]), tensor([True, False]))
    assert zero.tolist() == pytest.approx([0.0, 0.4])


@pytest.mark.parametrize(("quality", "same"), [("relative", True), ("printed", False)])
def test_relative_weights_do_not_see_a_factor_on_all_positives_scores(quality, same):
    scaled = torch.where(TURNS, 0.01 * SCORE, SCORE)
    weight = quality_weights(torch.ones(4), SCORE, TURNS, quality)
    assert torch.allclose(weight, quality_weights(torch.ones(4), scaled, TURNS, quality)) == same


# Question 0 has two positives and a negative, question 1 a positive alone.
ROW, ROW_POS = tensor([0, 0, 0, 1]), tensor([True, True, False, True])
ROWS = [Rationale(row, "r", is_pos) for row, is_pos in zip([0, 0, 0, 1], ROW_POS.tolist())]


def test_eq_2_is_the_log_ratio_of_sums_of_exponentials():
    score = tensor([0.9, 0.4, 0.2, 0.8])  # question 1 has no negative and does not count
    expected = -math.log((math.exp(0.9) + math.exp(0.4)) / math.exp(0.2))
    assert discriminator_loss(score, ROW_POS, ROW, "paper").item() == pytest.approx(expected)
    assert disc_terms(ROWS, "paper") == 1 and disc_terms(ROWS, "bce") == 4


def test_eq_2_is_the_mean_over_questions_in_any_order_of_their_rationales():
    score = tensor([0.9, 0.1, 0.3, 0.6])
    loss = discriminator_loss(
        score, tensor([True, True, False, False]), tensor([4, 7, 4, 7]), "paper"
    )
    assert loss.item() == pytest.approx(-((0.9 - 0.3) + (0.1 - 0.6)) / 2)


def test_bce_is_the_mean_log_probability_of_what_is_so():
    score = tensor([0.9, 0.4, 0.2, 0.8])
    expected = -(math.log(0.9) + math.log(0.4) + math.log(1 - 0.2) + math.log(0.8)) / 4
    assert discriminator_loss(score, ROW_POS, ROW).item() == pytest.approx(expected)


def test_eq_2_does_not_see_a_shift_of_all_scores_and_bce_does():
    def at(shift: float, loss: str) -> float:
        score = tensor([0.5 + shift, 0.3 + shift])
        return discriminator_loss(score, tensor([True, False]), tensor([0, 0]), loss).item()

    assert at(0.0, "paper") == pytest.approx(-0.2) == pytest.approx(at(0.2, "paper"))
    assert at(0.0, "bce") == pytest.approx(-(math.log(0.5) + math.log(0.7)) / 2)
    assert at(0.3, "bce") == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)


@pytest.mark.parametrize("loss", ["paper", "bce"])
def test_parts_of_a_batch_add_up_to_its_loss(loss):
    torch.manual_seed(0)
    score, is_pos = torch.rand(18), torch.rand(18) < 0.5
    row = torch.arange(18) // 3
    rationales = [Rationale(int(r), "r", bool(p)) for r, p in zip(row, is_pos)]
    total = 0.0
    for part in (slice(0, 6), slice(6, 12), slice(12, 18)):
        share = disc_terms(rationales[part], loss) / disc_terms(rationales, loss)
        total += share * discriminator_loss(score[part], is_pos[part], row[part], loss).item()
    assert total == pytest.approx(discriminator_loss(score, is_pos, row, loss).item())


@pytest.mark.parametrize("count", [0, 1])
def test_eq_2_of_a_question_with_one_side_is_zero_and_has_a_gradient(count):
    score = torch.full((count,), 0.5, requires_grad=True)
    value = discriminator_loss(score, torch.ones(count).bool(), torch.zeros(count), "paper")
    value.backward()
    assert value.item() == 0 and score.grad.abs().sum() == 0


def test_bce_of_nothing_is_zero():
    assert discriminator_loss(torch.zeros(0), torch.zeros(0).bool(), torch.zeros(0)).item() == 0


def test_bce_of_a_saturated_score_is_finite_and_so_is_its_gradient():
    score = tensor([0.0, 1.0], requires_grad=True)
    value = discriminator_loss(score, tensor([True, False]), tensor([0, 0]), "bce")
    value.backward()
    assert value.item() == 100 and torch.isfinite(score.grad).all()  # torch cuts the logarithm


def test_mi_is_a_cross_entropy_that_teaches_the_explaining_side_only():
    predict = tensor([[0.5, 0.25]], requires_grad=True)
    explain = tensor([[0.25, 0.5]], requires_grad=True)
    loss = mutual_information_loss(predict, explain)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(2))
    loss.sum().backward()
    assert predict.grad is None
    assert explain.grad.tolist() == [[pytest.approx(-2.0), pytest.approx(-0.5)]]


def test_the_vote():
    assert self_consistency([42, 42.0, 7, None, 42]) == (42, [0, 1, 4], [2])


def test_a_tie_goes_to_the_answer_that_came_first():
    assert self_consistency(["b", "a", "a", "b", "c"]) == ("b", [0, 3], [1, 2, 4])


def test_no_parsable_sample_gives_no_winner():
    assert self_consistency([None, None]) == (None, [], [])
    assert self_consistency([]) == (None, [], [])


# Each piece, pasted after `import torch` and nothing else, and what it is then asked.
NOTEBOOKS = {
    "self_consistency": """
assert self_consistency(["12", "12", "7", None]) == ("12", [0, 1], [2])
""",
    "contrastive_loss": """
l = torch.tensor([0.4, 0.9, 1.5], requires_grad=True)
weight = torch.tensor([0.7, 0.0, 0.6])
is_pos = torch.tensor([True, True, False])
L_cl, L_pos, L_neg = contrastive_loss(l, weight, is_pos, 1)
L_cl.backward()
assert torch.isclose(L_pos, torch.tensor(0.7 * 0.4))
assert torch.isclose(L_neg, torch.tensor(0.6 * (1.5 - 3)))
assert torch.isclose(L_cl, L_pos - 0.2 * L_neg)
assert torch.allclose(l.grad, torch.tensor([0.7, 0.0, -0.2 * 0.6]))
""",
    "discriminator_loss": """
score = torch.tensor([0.9, 0.4, 0.2], requires_grad=True)
is_pos, row = torch.tensor([True, True, False]), torch.tensor([0, 0, 0])
bce = discriminator_loss(score, is_pos, row)
bce.backward()
assert torch.isclose(bce, -torch.log(torch.tensor([0.9, 0.4, 0.8])).mean())
assert torch.allclose(score.grad, torch.tensor([-1 / 0.9, -1 / 0.4, 1 / 0.8]) / 3)
eq_2 = discriminator_loss(score.detach(), is_pos, row, "paper")
ratio = (score[0].exp() + score[1].exp()) / score[2].exp()
assert torch.isclose(eq_2, -ratio.log())
""",
    "Discriminator": """
class Output:
    def __init__(self, states):
        self.last_hidden_state = states

class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(10, 4)

    def forward(self, input_ids, attention_mask):
        return Output(self.words(input_ids))

torch.manual_seed(0)
disc = Discriminator(Words(), 4)
ids = torch.tensor([[1, 2, 3], [4, 5, 0], [4, 5, 9]])
mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0]])
score = disc(ids, mask)
assert score.shape == (3,) and score.min() > 0 and score.max() < 1
assert torch.equal(score[1], score[2])  # what the mask hides does not count
alone = disc(ids[1:2, :2], mask[1:2, :2])
assert torch.allclose(score[1:2], alone)
score.sum().backward()
assert all(p.grad is not None for p in disc.parameters())
""",
}


def test_each_piece_works_pasted_into_a_notebook_that_imports_torch_alone(tmp_path):
    notebooks = [
        ["import torch", inspect.getsource(getattr(qcrd, name)), cell]
        for name, cell in NOTEBOOKS.items()
    ]
    code = f"""
for cells in {notebooks!r}:
    notebook = {{}}
    for cell in cells:
        exec(cell, notebook)
print("they work")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "they work\n", done.stderr


def test_a_pasted_piece_has_the_defaults_of_the_program():
    options = Options()
    of_piece = {
        (contrastive_loss, "beta"): options.beta,
        (contrastive_loss, "delta"): options.delta,
        (discriminator_loss, "loss"): options.disc_loss,
        (quality_weights, "quality"): options.quality,
    }
    for (piece, name), default in of_piece.items():
        assert inspect.signature(piece).parameters[name].default == default, name


def test_max_pooling_and_the_two_layers_of_the_discriminator_by_hand():
    class Encoder(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            states = tensor([[[1.0, -2.0], [3.0, -4.0], [9.0, 9.0]]])
            return type("Output", (), {"last_hidden_state": states})

    disc = Discriminator(Encoder(), 2)
    with torch.no_grad():
        for layer, weight, bias in ((0, [[1.0, 1.0], [0.0, 1.0]], 0.5), (2, [[0.4, 5.0]], -0.1)):
            disc.mlp[layer].weight.copy_(tensor(weight))
            disc.mlp[layer].bias.fill_(bias)
    # the max over the two tokens that count is (3, -2), the first layer gives (1.5, -1.5)
    score = disc(torch.zeros(1, 3), tensor([[1, 1, 0]]))
    assert score.item() == pytest.approx(1 / (1 + math.exp(-(0.4 * 1.5 - 0.1))))


def with_scores(monkeypatch: pytest.MonkeyPatch, scores: dict[str, float]) -> None:
    """D gives these scores to these texts."""
    monkeypatch.setattr(
        qcrd, "score", lambda student, disc, questions, rs: tensor([scores[r.text] for r in rs])
    )


def test_auc_of_the_discriminator_by_hand(monkeypatch):
    with_scores(monkeypatch, {"a": 0.9, "b": 0.4, "c": 0.6, "d": 0.4, "e": 0.1, "f": 0.8})
    models = small_models(make_options())
    example = data.Example("q", "x", "y")
    questions = [
        # a > c, a > d, b < c, b = d: 2.5 of 4
        Question(example, "y", ["a", "b"], ["c", "d"], held_out=True),
        Question(example, "y", ["e"], ["f"], held_out=True),  # e < f: 0 of 1
        Question(example, "y", ["a"], [], held_out=True),  # no pair
        Question(example, "y", ["a"], ["b"]),  # not held out
    ]
    assert disc_auc(*models, questions) == pytest.approx(2.5 / 5)
    assert disc_auc(*models, questions[2:]) == 0.5  # chance: no pair


def test_where_the_exact_check_can_say_which_rationale_is_good_the_auc_is_by_it(monkeypatch):
    story = data.Story("Anna", "apples", 3, (data.Event("Anna", "bought", 2, "apples"),))
    example = data.Example("q", story.input(), "( 3 + 2 )", story=story)
    good, bad = "3 + 2 = 5. Now 5.", "3 - 2 = 1. Now 1."
    with_scores(monkeypatch, {good: 0.7, bad: 0.2})
    # the vote has it the wrong way round
    question = Question(example, "( 3 + 2 )", [bad], [good], held_out=True)
    assert disc_auc(*small_models(make_options()), [question]) == 1
