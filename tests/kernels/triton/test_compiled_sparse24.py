"""What the 2:4 kernels cost on GPUs, known from compiling them alone."""

import pytest
from moe_kernels.triton_kernels.compile_only import can_compile, resources_of

from tests.kernels.triton.compiled_sparse24 import EVERYTHING, SAMPLE
from tests.kernels.triton.test_compiled import check

pytestmark = pytest.mark.skipif(can_compile() is not None, reason=f"kernels cannot be compiled: {can_compile()}")


def test_sample() -> None:
    for case, found in zip(SAMPLE, resources_of([case.request for case in SAMPLE]), strict=True):
        check(case, found)


@pytest.mark.slow
def test_everything() -> None:
    failed = []
    for case, found in zip(EVERYTHING, resources_of([case.request for case in EVERYTHING]), strict=True):
        try:
            check(case, found)
        except AssertionError as error:
            failed.append(f"{case.name}: {str(error).splitlines()[0]}")
    assert not failed, "\n".join(failed)
