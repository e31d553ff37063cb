"""Tasks, the toy and its exact check, parsing, the cache."""

import json
import random
from collections import Counter

import numpy as np
import pytest

import data
from data import TASKS, Example, Sample, UserError, equation_value, parse_output
from tests.conftest import ROOT
from tests.helpers import make_options


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("( ( 7 + 5 ) - 2 )", 10),
        ("84 / 2", 42),
        ("( 84.0 / 2.0 )", 42),
        ("-3 + 5", 2),
        ("42", 42),
        ("2 * (3 + 4)", 14),
    ],
)
def test_equations_have_values(text, value):
    assert equation_value(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "1/0", "9**9**9", "__import__('os')", "(" * 10_000, "(" * 90 + ")" * 90, "7x = 14", "1 2", "1e9", "9" * 201, "()", "2(3)", "1,2"],
)  # fmt: skip
def test_anything_else_has_none(text):
    assert equation_value(text) is None


def test_toy_splits_share_no_story_and_are_the_same_every_time():
    splits, again = data.toy_splits(), data.toy_splits()
    inputs = [e.input for split in splits.values() for e in split]
    assert len(inputs) == len(set(inputs)) == sum(data.TOY_SIZES.values())
    assert splits == again
    assert len(splits["test"]) == 1000


def test_labels_steps_and_events_agree():
    for example in data.toy_splits()["valid"]:
        story = example.story
        count = story.start
        for event in story.events:
            if event.thing == story.thing and story.person in (event.who, event.other):
                up = (event.verb in ("bought", "found", "got")) == (story.person == event.who)
                count += event.n if up else -event.n
        assert (
            equation_value(example.label)
            == count
            == data.follow(story.start, story.changes())[-1].c
        )


STORY = data.Story("Anna", "apples", 7, (data.Event("Anna", "bought", 5, "apples"), data.Event("Ben", "found", 3, "apples"), data.Event("Anna", "gave", 2, "apples", "Ben")))  # fmt: skip


def test_how_a_story_reads():
    told = "Anna had 7 apples. Anna bought 5 apples. Ben found 3 apples. Anna gave 2 apples to Ben."
    assert STORY.input() == told + "\nHow many apples does Anna have now?"
    gift = data.Event("Anna", "got", 2, "apples", "Ben")
    assert str(gift) == "Anna got 2 apples from Ben"
    changes = [
        gift.change(*of)
        for of in (("Anna", "apples"), ("Ben", "apples"), ("Anna", "eggs"), ("Emma", "apples"))
    ]
    assert changes == [2, -2, 0, 0]


def test_stories_have_one_to_three_events_and_some_have_distractors():
    stories = [e.story for e in data.toy_splits()["test"]]
    assert {len(s.events) for s in stories} == {1, 2, 3}
    assert all(1 <= len(s.changes()) <= len(s.events) for s in stories)
    assert any(len(s.changes()) < len(s.events) for s in stories)


EXAMPLE = Example("q", STORY.input(), "( ( 7 + 5 ) - 2 )", story=STORY)


@pytest.mark.parametrize(
    ("rationale", "valid"),
    [
        ("Anna had 7 apples. 7 + 5 = 12. 12 - 2 = 10. So 10.", True),
        ("7 + 5 = 12. 12 - 2 = 10. So 12.", False),  # ends elsewhere
        ("7 + 5 = 12. 12 - 2 = 9. So 9.", False),  # a sum is wrong
        ("7 - 2 = 5. 5 + 5 = 10. So 10.", False),  # out of order
        ("7 + 5 = 12. So 10.", False),  # a step left out
        ("7 + 5 = 12. 12 + 3 = 15. 15 - 2 = 13. So 13.", False),  # a step too many
        ("It is 10.", False),
        ("", False),
    ],
)
def test_the_exact_check(rationale, valid):
    assert data.is_valid(EXAMPLE, rationale) is valid


def test_a_right_teacher_is_always_valid_and_a_wrong_one_never():
    rng = random.Random(0)
    for example in data.toy_splits()["valid"]:
        rationale, answer = parse_output(TASKS["toy"], example, data.think(rng, example.story, 0.0))
        assert data.is_valid(example, rationale) and TASKS["toy"].correct(answer, example)
        rationale, _ = parse_output(TASKS["toy"], example, data.think(rng, example.story, 1.0))
        assert not data.is_valid(example, rationale)


CQA = Example(
    "c", "?", "math problem", ("park", "coloring book", "garden center", "math problem", "gravity")
)
NLI = Example("n", "?", "neutral", data.NLI)


@pytest.mark.parametrize(
    ("task", "example", "output", "rationale", "answer"),
    [
        ("svamp", None, "<Explanation>: Two and two.\n<Answer>: ( 2 + 2 )", "Two and two.", "( 2 + 2 )"),
        ("svamp", None, "84 / 2 = 42. The answer is (84 / 2).\n\nQ: There are 120 students. The answer is 3.", "84 / 2 = 42.", "(84 / 2)"),
        ("svamp", None, " Rationale: 30 * 7 = 210, hence the answer is 30 * 7 = 210. \nAnswer: 210", "30 * 7 = 210", "210"),
        ("svamp", None, "He is short. The answer is (23 - (-2)).", "He is short.", "(23 - (-2))"),
        ("svamp", None, "It costs $1,200. Hence the answer is $1,200 dollars", "It costs $1,200.", "1200"),
        ("svamp", None, " 30", "", "30"),
        ("svamp", None, "I do not know.", "", None),
        ("cqa", CQA, "Only math problem fits. So the answer is (d) math problem.\n\nQ: x\nA: So the answer is (a) park.", "Only math problem fits.", "math problem"),
        ("cqa", CQA, "Rationale: They fall, hence the answer is Answer: (e)", "They fall", "gravity"),
        ("cqa", CQA, "It is a simple problem. The answer is d.", "It is a simple problem.", "math problem"),
        ("cqa", CQA, "So the answer is either (a) park or (e) gravity.", "", "park"),
        ("cqa", CQA, "So the answer is (z) zoo.", "", None),
        ("anli", NLI, "He is a senator. So the answer is entailment.\n\nPremise: more", "He is a senator.", "entailment"),
        ("anli", NLI, "Rationale: It is not stated.\nhence the answer is Answer: (b)", "It is not stated.", "neutral"),
    ],
)  # fmt: skip
def test_parsing(task, example, output, rationale, answer):
    assert parse_output(TASKS[task], example or Example("s", "?", "1"), output) == (
        rationale,
        answer,
    )


NUMBER_OUTPUTS = [
    ("He has 40 and gets 2 more.\n**Answer**: 42", "He has 40 and gets 2 more.", 42),
    ("He has 40.\n**Answer:** 42", "He has 40.", 42),
    ("**Explanation:** one two three four\n\n**Answer:** **42**\n\nLet me know!", "one two three four", 42),
    ("### Explanation\nforty and two.\n### Answer\n42", "forty and two.", None),
    ("40 and 2 make the total 42. \\[ \\boxed{42} \\]", "40 and 2 make the total 42.", 42),
    ("So we get $40 + 2 = 42$. The final answer is $\\boxed{42}$.", "So we get 40 + 2 = 42.", 42),
    ("It is \\(6 \\times 7\\). Answer: \\text{6 \\times 7}", "It is 6 * 7.", 42),
    ("Half of it. Answer: \\frac{84}{2}", "Half of it.", 42),
    ("40 + 2 = <<40+2=42>>42 apples.\n#### 42", "40 + 2 = 42 apples.", 42),
    ("The answer is \u22123.", "", -3),
    ("<Answer>: 6 x 7 = 42", "", 42),
    ("Six rows of seven. Answer: 6 \u00d7 7", "Six rows of seven.", 42),
    ("Explanation: half of it\nAnswer: 84 \u00f7 2", "half of it", 42),
    ("<think>Maybe 50? The answer is 50. No: 40 and 2.</think>\n<Explanation>: 40 apples and 2 more make 42.\n<Answer>: 42", "40 apples and 2 more make 42.", 42),
    ("Maybe 50? The answer is 50.</think><Explanation>: 40 and 2.\n<Answer>: 42", "40 and 2.", 42),
    ("<think>It never ends. The answer is 7.", "", None),
    ("<Explanation>40 and 2 more make 42.</Explanation>\n<Answer>( 40 + 2 )</Answer>", "40 and 2 more make 42.", 42),
    ("<Explanation> : forty.\n<Answer> : 42", "forty.", 42),
    ("2 ** 3 is not read as 23. Answer: 2**3", "2 ** 3 is not read as 23.", 2),
]  # fmt: skip


@pytest.mark.parametrize(("output", "rationale", "value"), NUMBER_OUTPUTS)
def test_numbers_as_models_write_them(output, rationale, value):
    task = TASKS["svamp"]
    found, answer = parse_output(task, Example("s", "?", "42"), output)
    assert found == rationale and not data.MARKER.search(found) and "think>" not in found
    if "###" in output:  # a heading's answer stands in the next line
        value = 42
    assert task.key(answer) == value


LETTERS = Example("l", "?", "beta", ("alpha", "beta", "gamma"))


@pytest.mark.parametrize(
    ("example", "output", "answer"),
    [
        (LETTERS, "It must be so, so the answer is Option B.", "beta"),
        (LETTERS, "We see. The correct option is B.", "beta"),
        (LETTERS, "The correct choice is (c).", "gamma"),
        (LETTERS, "The best answer is B", "beta"),
        (LETTERS, "Thus \\boxed{B}", "beta"),
        (LETTERS, "Thus \\boxed{\\text{(b) beta}}", "beta"),
        (LETTERS, "**Answer**: **B**", "beta"),
        (LETTERS, "Answer: B. beta", "beta"),
        (LETTERS, "Answer: b) beta", "beta"),
        (LETTERS, "<Answer>(b) beta</Answer>", "beta"),
        (LETTERS, "The answer is not (a) alpha but (b) beta.", "beta"),
        (LETTERS, "Option B is correct because it fits well here.", "beta"),
        (NLI, "The hypothesis is not an entailment; it is a contradiction.", "contradiction"),
        (NLI, "The premise entails the hypothesis.", "entailment"),
        (NLI, "This contradicts the premise.", "contradiction"),
        (
            NLI,
            "It does not contradict the premise, nor does it entail it; so it is neutral.",
            "neutral",
        ),
        (NLI, "It isn't entailed; neutral.", "neutral"),
        (NLI, "The hypothesis is not entailed.", None),
    ],
)
def test_choices_as_models_name_them(example, output, answer):
    task = TASKS["cqa" if example is LETTERS else "anli"]
    rationale, found = parse_output(task, example, output)
    assert found == answer and not data.MARKER.search(rationale)


MONEY = Example(
    "m", "?", "bank", ("library", "department store", "bank", "doctor's office", "new york")
)
NUMBERS_READ = {
    "the last number, where there is no marker": [
        ("She had 9.\n\nThen 9 - 4 = 5.\n\nTherefore she has 5 eggs left.", 5),
        ("Step 1: 6 boxes hold 4 each.\nStep 2: 6 * 4 = 24", 24),
    ],
    "a line that introduces the answer": [
        ("The answer is given below.\n7", 7),
        ("Answer:\n\n7", 7),
        ("The answer is:\n- 3 + 4 = 7", 7),
        ("Final answer:\n\\[\n\\boxed{7}\n\\]", 7),
    ],
    "separators of thousands": [
        ("Answer: 1,200,000", 1_200_000),
        ("Answer: 12 000 apples", 12_000),
        ("Answer: 1\u00a0200", 1200),
        ("Answer: 1\u2019200", 1200),
        ("Answer: 1 200 + 300 = 1 500", 1500),
        ("$\\boxed{12{,}500}$", 12_500),
        ("\\boxed{1\\,200}", 1200),
        ("Answer: $ 236,000.50", 236_000.5),
    ],
    "decimals without a zero": [("Answer: .25", 0.25), ("Answer: 1 - .5", 0.5), ("It costs $.75. Answer: $.75", 0.75)],
    "units": [
        ("Answer: 12 cookies / 4 children = 3 cookies each", 3),
        ("Answer: 10 dollars - 3 dollars", 7),
        ("Answer: 3 boxes x 4 apples = 12 apples", 12),
        ("Answer: 60 km/h * 2 h = 120 km", 120),
        ("Answer: (2 apples + 3 apples) * 2 = 10 apples", 10),
        ("Answer: 5\u20ac + 3\u20ac = 8\u20ac", 8),
    ],
    "leading zeros": [("Answer: 007", 7), ("Answer: 05 + 02", 7), ("Answer: 0", 0)],
    "words": [
        ("Answer: seven", 7),
        ("The answer is Twelve apples.", 12),
        ("Answer: one of them", None),
        ("Answer: two hundred", None),
    ],
    "ranges": [
        ("Answer: 3 to 4", None),
        ("Answer: 3\u20134 apples", None),
        ("Answer: 3-4 apples", None),
        ("Answer: between 3 and 4", None),
        ("Answer: 8 \u2013 3", 5),
    ],
    "fullwidth signs": [
        ("Answer: \uff17", 7),
        ("\u7b54\u6848\uff1a\uff17", 7),
        ("Answer\uff1a\uff08\uff13\uff0b\uff14\uff09", 7),
    ],
    "a number that is denied": [("The answer is not 5 but 7.", 7)],
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERS_READ)
def test_numbers_are_read(kind):
    for output, value in NUMBERS_READ[kind]:
        _, answer = parse_output(TASKS["svamp"], Example("s", "?", "7"), output)
        assert TASKS["svamp"].key(answer) == value, output


CHOICES_READ = {
    "a line that introduces the answer": [
        ("The correct answer is:\n\n(c) bank", "bank"),
        ("Answer: Let me think.\nIt is (c) bank.", "bank"),
    ],
    "typed signs": [
        ("The answer is \u201cdoctor\u2019s office\u201d.", "doctor's office"),
        ("Answer\uff1a\uff23", "bank"),
        ("\u7b54\u6848\u662f\uff08C\uff09\u3002", "bank"),
        ("Answer: \uff42\uff41\uff4e\uff4b", "bank"),
    ],
    "a letter with a reason": [
        ("Answer: C, since it keeps money", "bank"),
        ("Answer: C \u2013 a bank, not a library", "bank"),
        ("Answer: C which keeps money", "bank"),
        ("The answer is A because it lends books.", "library"),
        ("The answer is a bank because it keeps money, unlike a library.", "bank"),
    ],
    "a letter in other phrases": [
        ("My answer is C", "bank"),
        ("Correct option: C", "bank"),
        ("The answer is clearly C.", "bank"),
        ("The answer is most likely C", "bank"),
        ("The answer must be (c).", "bank"),
        ("The answer must be a place. I would go with option C.", "bank"),
        ("So it is (c) because it keeps money.", "bank"),
        ("The answer is (z) zoo.", None),
    ],
    "a choice that is denied": [
        ("The answer is not (a) but (c).", "bank"),
        ("The answer is not library but bank.", "bank"),
    ],
}
LABELS_READ = {
    "denied by a verb": [
        ("The hypothesis can't be an entailment. It is neutral.", "neutral"),
        ("It doesn\u2019t entail the hypothesis, it contradicts it.", "contradiction"),
        ("The premise never contradicts the hypothesis; neutral.", "neutral"),
        ("The premise neither entails the hypothesis nor contradicts it, so neutral.", "neutral"),
    ],
    "denied by another word": [
        ("There is no contradiction here; it is neutral.", "neutral"),
        ("Rather than a contradiction, this is neutral.", "neutral"),
        ("It is a contradiction, not an entailment.", "contradiction"),
        ("That would not be enough to entail the hypothesis. It is neutral.", "neutral"),
    ],
    "denied, and nothing else is named": [
        ("Answer: not entailment", None),
        ("Answer: non-contradiction", None),
    ],
    "another word is denied": [
        ("The premise does not mention it, so it is neutral.", "neutral"),
        ("It is not stated so it is neutral.", "neutral"),
    ],
}


@pytest.mark.parametrize(
    ("task", "example", "kinds"), [("cqa", MONEY, CHOICES_READ), ("anli", NLI, LABELS_READ)]
)
def test_choices_are_read(task, example, kinds):
    for kind, cases in kinds.items():
        for output, choice in cases:
            assert parse_output(TASKS[task], example, output)[1] == choice, (kind, output)


WHOLE = "<Explanation>: 3 and 4 make 7.\n<Answer>: 7"
RATIONALES_READ = {
    "a phrase inside the rationale is no marker": [
        ("We need to know what the answer is. 3 and 4 make 7.\nAnswer: 7", "We need to know what the answer is. 3 and 4 make 7."),
        ("The answer is found by adding 3 and 4.\nAnswer: 7", "The answer is found by adding 3 and 4."),
        ("The answer is not obvious, so add.\n<Answer>: 7", "The answer is not obvious, so add."),
        ("<Explanation>: answer : 3 and 4 .\n<Answer>: 7", "answer : 3 and 4 ."),
    ],
    "the answer stands first": [
        ("**Answer:** 7\n\n**Explanation:** Three and four.", "Three and four."),
        ("The answer is 7.\n\nRationale: Three and four.", "Three and four."),
        ("### Answer\n7\n### Explanation\nThree and four.", "Three and four."),
        ("7\nReasoning: Three and four make it.", "Three and four make it."),
    ],
    "no word of the marker stays": [
        ("Add 3 and 4. So, the final answer: 7", "Add 3 and 4."),
        ("Add 3 and 4. My final answer is 7.", "Add 3 and 4."),
        ("Add 3 and 4.\n**Final Answer**: 7", "Add 3 and 4."),
        ("Add 3 and 4.\n### Final Answer\n7", "Add 3 and 4."),
        ("Add 3 and 4. The best choice: 7", "Add 3 and 4."),
    ],
    "the question restated": [
        ("Q: Anna had 3 and got 4?\nA: 3 and 4 make 7. The answer is 7.", "3 and 4 make 7."),
        (f"Here is my answer:\n\nQuestion: Anna had 3.\nHow many?\n\n{WHOLE}", "3 and 4 make 7."),
        (f"**Question:** Anna had 3 and got 4?\n\n{WHOLE}\n\nQuestion: Ben had 5?\n<Explanation>: No.\n<Answer>: 5", "3 and 4 make 7."),
        ("3 and 4 make 7.\n\nQuestion: Ben had 5?\n<Explanation>: 5.\n<Answer>: 5", "3 and 4 make 7."),
    ],
    "thoughts": [
        ("<think>" + "so " * 50_000 + f"The answer is 5.</think>\n{WHOLE}", "3 and 4 make 7."),
        (f"<thinking>Maybe 5? Answer: 5</thinking>\n{WHOLE}", "3 and 4 make 7."),
        (f"<thought>Maybe 5? Answer: 5</thought>{WHOLE}", "3 and 4 make 7."),
        (f"[THINK]Maybe 5?[/THINK]{WHOLE}", "3 and 4 make 7."),
        (f"<|begin_of_thought|>Maybe 5?<|end_of_thought|>{WHOLE}", "3 and 4 make 7."),
        (f"<|channel|>analysis<|message|>5?<|end|><|start|>assistant<|channel|>final<|message|>{WHOLE}", "3 and 4 make 7."),
    ],
    "JSON and code fences": [
        ('{"answer": 7, "explanation": "3 and 4 make 7."}', "3 and 4 make 7."),
        ('[{"reasoning": "3 and 4 make 7.", "final_answer": "7"}]', "3 and 4 make 7."),
        ('```json\n{\n  "Explanation": "He said \\"7\\".\\nSo 7.",\n  "Answer": 7\n}\n```\nWell?', 'He said "7".\nSo 7.'),
        ("{'explanation': '3 and 4 make 7.', 'answer': 7}", "3 and 4 make 7."),
        ('{"explanation": "3 and 4 make 7.", "answer": 7', "3 and 4 make 7."),
        (f"```\n{WHOLE}\n```", "3 and 4 make 7."),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", RATIONALES_READ)
def test_rationales_are_read(kind):
    for output, rationale in RATIONALES_READ[kind]:
        found, answer = parse_output(TASKS["svamp"], Example("s", "?", "7"), output)
        assert (found, TASKS["svamp"].key(answer)) == (rationale, 7), output


def test_a_thought_that_never_ends_is_no_answer():
    for output in ("<thinking>Maybe 5? The answer is 5.", "<think>" + "so " * 50_000 + "Answer: 5"):
        assert parse_output(TASKS["svamp"], Example("s", "?", "7"), output) == ("", None)


def test_an_answer_in_words_keeps_its_own_full_stops():
    task, example = data.Task("own"), Example("x", "?", "U.S.")
    for output in ("It is far. The answer is U.S.", "It is far.\nAnswer: as follows:\n\nU.S."):
        assert parse_output(task, example, output) == ("It is far.", "U.S.")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,200", 1200),
        ("1 200", 1200),
        ("1\u00a0200", 1200),
        ("$5", 5),
        ("5%", 5),
        ("\u22125", -5),
        ("05", 5),
        (".5", 0.5),
        ("\uff15", 5),
        ("1.05", 1.05),
        ("100,000 + 10", 100_010),
    ],
)
def test_numbers_as_people_write_them_have_values(text, value):
    assert equation_value(data.bare_number(text)) == value


def test_outputs_gathered_by_others_are_read():
    path = ROOT.parent / "shared" / "cases" / "outputs.jsonl"
    if not path.is_file():
        pytest.skip("there is no ../shared/cases/outputs.jsonl beside the checkout")
    for line in path.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        task = TASKS[case["task"]]
        example = Example("c", "?", "?", tuple(case.get("choices", ())))
        rationale, answer = parse_output(task, example, case["output"])
        if "value" in case:
            assert task.key(answer) == case["value"], case
        else:
            assert answer == case["answer"], case
        assert rationale == case.get("rationale", rationale), case


def test_a_task_of_ones_own_with_numbers_as_labels_compares_by_value(tmp_path):
    rows = [{"input": f"What is {i} and 2?", "label": label} for i, label in enumerate(["15", 15, "1,234", "$3", "( 7 + 8 )"])]  # fmt: skip
    path = tmp_path / "gsm.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\n" for row in rows).encode())
    task, splits = data.load_task(str(path))
    assert task.numeric and sorted(e.label for split in splits.values() for e in split) == sorted(["15", "15", "1,234", "$3", "( 7 + 8 )"])  # fmt: skip
    example = Example("x", "?", "15")
    for output in (
        "The answer is $15.",
        "The answer is 15.0",
        "The answer is 13 + 2 = 15",
        "So it is.\n#### 15",
    ):
        assert task.correct(parse_output(task, example, output)[1], example), output
    assert task.correct("1234", Example("y", "?", "1,234")) and not task.correct("16", example)
    rows[0]["label"] = "fifteen"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not data.load_task(str(path))[0].numeric


def test_a_task_of_ones_own_takes_the_text_after_the_marker():
    example = Example("x", "?", "blue")
    assert parse_output(data.Task("own"), example, "The sky. So the answer is blue.") == (
        "The sky.",
        "blue",
    )


@pytest.mark.parametrize(
    ("task", "least"),
    [("svamp", (0.99, 0.9)), ("cqa", (0.99, 0.9)), ("anli", (0.99, 0.9)), ("esnli", (0.99, 0.9))],
)
def test_real_teacher_outputs_parse(real_data, task, least):
    record, splits = data.load_task(task, str(real_data / "datasets.zip"))
    examples = {e.id: e for split in splits.values() for e in split}
    total, parsed = Counter(), Counter()
    for id, teacher, _, output in data.read_samples(real_data / "samples" / f"{task}.jsonl"):
        rationale, answer = parse_output(record, examples[id], output)
        family = teacher.split("-")[0]
        total[family] += 1
        parsed[family] += record.key(answer) is not None and (
            not examples[id].choices or answer in examples[id].choices
        )
        assert not data.MARKER.search(rationale) and "<Answer>" not in rationale
    for family in total:
        assert parsed[family] / total[family] >= (least[1] if family == "llama" else least[0]), (
            family
        )


def test_the_metric_is_dss_s_metric():
    rng = random.Random(0)
    task = TASKS["svamp"]
    for _ in range(300):
        a, b = (
            f"( {rng.randint(0, 9)}.0 {rng.choice('+-*/')} {rng.randint(0, 9)}.0 )"
            for _ in range(2)
        )

        def dss(
            text: str,
        ) -> float:  # what its metric computes for such equations; nan where Python raises
            x, op, y = text.split()[1:4]
            ops = {
                "+": float.__add__,
                "-": float.__sub__,
                "*": float.__mul__,
                "/": lambda p, q: p / q if q else np.nan,
            }
            return ops[op](float(x), float(y))

        assert task.correct(a, Example("q", "?", b)) == (dss(a) == dss(b))
    assert not TASKS["cqa"].correct("Math problem", CQA) and TASKS["cqa"].correct(
        "math problem", CQA
    )


def test_splits_are_those_of_dss(real_data):
    _, svamp = data.load_task("svamp", str(real_data / "datasets.zip"))
    assert {k: len(v) for k, v in svamp.items()} == {"train": 720, "valid": 80, "test": 200}
    _, anli = data.load_task("anli", str(real_data / "datasets.zip"))
    assert {k: len(v) for k, v in anli.items()} == {"train": 800, "valid": 200, "test": 1000}
    assert "</s>" in anli["train"][0].input and anli["train"][0].label == "contradiction"


def test_train_size_is_a_count_or_a_fraction(real_data):
    zip_path = str(real_data / "datasets.zip")
    assert len(data.load_task("svamp", zip_path, 100)[1]["train"]) == 100
    assert len(data.load_task("svamp", zip_path, 0.25)[1]["train"]) == 180
    with pytest.raises(UserError, match="--train-size 721"):
        data.load_task("svamp", zip_path, 721)


def test_palm_is_the_default_teacher_of_the_real_tasks(real_data, capsys):
    options = make_options(task="svamp", data=str(real_data / "datasets.zip"))
    task, splits = data.load_task("svamp", options.data)
    samples = data.collect(task, splits["train"], [], options)
    assert "--k" in capsys.readouterr().out
    assert (
        all(len(own) == 1 and own[0].teacher == "palm-540b" for own in samples.values())
        and len(samples) == 720
    )


def test_a_task_of_ones_own_holds_out_by_seed_and_brings_its_rationales(tmp_path):
    rows = [
        {
            "input": f"Is {i} even?",
            "label": "no" if i % 2 else "yes",
            "choices": ["yes", "no"],
            "rationale": f"{i} halves.",
        }
        for i in range(50)
    ]
    path = tmp_path / "even.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, splits = data.load_task(str(path))
    assert {k: len(v) for k, v in splits.items()} == {"train": 40, "valid": 5, "test": 5}
    assert len({e.id for split in splits.values() for e in split}) == 50
    assert data.load_task(str(path))[1] == splits
    samples = data.collect(task, splits["train"], [], make_options())
    example = splits["train"][0]
    assert samples[example.id] == [Sample("own", example.rationale, example.label)]
