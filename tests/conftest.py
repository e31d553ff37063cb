"""Shared by the tests: the project on the path, a cache of their own, the real data where it is
present."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# one thread: on calls as short as the tests' a second one costs more than it brings
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch looks for it once, at a GPU's first matrix product, which a test may make before a student
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("QCRD_CACHE", tempfile.mkdtemp(prefix="qcrd-tests-"))
REAL_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip("real data is missing: no ../shared/data beside the checkout")
    return REAL_DATA


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Each test finds them as they were: a command that was stopped ignores them from then on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
