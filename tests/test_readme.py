"""The README's code runs as it stands, and what it names is there."""

import re
import subprocess
import sys

import qcrd
from tests.conftest import ROOT
from tests.helpers import make_options, small_student, tokenizer

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run_block(code: str, folder) -> str:
    """What a block of code prints in a process of its own, where qcrd can be imported."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_in_your_own_code_gives_the_numbers_worked_out_by_hand(tmp_path):
    code = BLOCKS[0] + "\nprint(L_cl.item(), L_pos.item(), L_neg.item())\nprint(l.grad.tolist())\n"
    losses, gradients = run_block(code, tmp_path).splitlines()
    # positives' scores 0.9 and 0.8 by their mean of 0.85; negatives' 1 - 0.2 and 1 - 0.3
    pos = (0.9 / 0.85 * 0.4 + 0.8 / 0.85 * 0.9) / 2
    neg = (0.8 * (1.5 - 3) + 0.7 * (2.0 - 3)) / 2
    for value, expected in zip(losses.split(), (pos - 0.2 * neg, pos, neg), strict=True):
        assert abs(float(value) - expected) < 1e-6
    assert re.fullmatch(r"\[0\.52\d+, -0\.0[78]\d*, 0\.47\d+, -0\.0[67]\d*\]", gradients)


def test_the_trained_student_is_asked_as_the_readme_says(tmp_path):
    folder = tmp_path / "runs" / "toy-tiny-qcrd-s0" / "student"
    student = small_student(make_options())
    student.model.generation_config.max_new_tokens = 5
    student.model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    assert len(run_block(BLOCKS[1], tmp_path).split("\n")) == 3  # explain, predict, and the end


def test_the_functions_that_the_readme_names_are_there():
    steps = README.split("## The method in five steps")[1].split("\n## ")[0]
    names = [name for name in re.findall(r"`(\w+)`", steps)]
    assert len(names) >= 9 and all(hasattr(qcrd, name) for name in names)


def test_the_readme_has_no_place_that_is_still_to_be_filled_in():
    assert "<<" not in README and "TODO" not in README
