"""What Triton's interpreter cannot show of the register kernel: how exponentials are computed."""

from __future__ import annotations

import pytest
import torch
from compiled import printed_by

CODE = """
import json, re, sys
from fastdml_kernels import static_report
compile_kernel = static_report.compile_kernel
def compile_and_look(*arguments):
    compiled = compile_kernel(*arguments)
    print(json.dumps(re.findall(r"ex2\\.approx[.\\w]*", compiled.asm["ptx"])))
    return compiled
static_report.compile_kernel = compile_and_look
for settings in json.loads(sys.argv[1]):
    static_report.report(2, 100, **settings)
"""


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA's architectures")
def test_an_exponential_is_one_instruction():
    """The form that keeps subnormal results comes with three more. Without a temperature there is
    one for each logit (four a thread and peer), else three: z, z / T, and p for the gradient."""
    plain, tempered = printed_by(CODE, [{}, {"tensor_weights": True}])
    assert plain == ["ex2.approx.ftz.f32"] * (2 * 4)
    assert tempered == ["ex2.approx.ftz.f32"] * (3 * 2 * 4)
