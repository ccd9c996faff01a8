"""Awkward patterns: each example's norm is that of the plain loop, or the package says why there is none."""

from collections.abc import Iterator

import pytest
import torch

from tests.conformance.patterns import Pattern, load
from tests.conformance.reference import RELATIVE, agrees, judge

PATTERNS = load()
CASES = [(pattern, dtype) for pattern in PATTERNS.values() for dtype in RELATIVE]

pytestmark = [
    pytest.mark.conformance,
    # What patterns use of torch is deprecated there, or in beta; they are tested because people use them.
    pytest.mark.filterwarnings(r"ignore:.torch\.nn\.utils\.weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:Using padding='same' with even kernel lengths:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:.torch\.jit\.script. is deprecated:DeprecationWarning:torch\.jit\._script"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning"),
]


@pytest.fixture(autouse=True)
def _default_dtype_restored() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def test_there_are_many_of_them():
    assert len(PATTERNS) >= 45


@pytest.mark.parametrize(
    ("pattern", "dtype"), CASES, ids=[f"{pattern.name}-{str(dtype).removeprefix('torch.')}" for pattern, dtype in CASES]
)
def test_is_measured_right_or_refused(pattern: Pattern, dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    setup = pattern.build()
    verdict = judge(setup.module, setup.batch, setup.loss, setup.examples, dtype, pick=setup.pick)
    assert verdict.kind != "wrong", verdict.detail
    assert agrees(verdict, pattern.refused) or (pattern.or_right and verdict.kind == "right"), verdict
