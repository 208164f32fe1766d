"""What is fused around the normalization, against the composition of torch's own operators."""

import itertools

import pytest
import torch
from cases import (
    FACTORS,
    FUSED,
    Fused,
    assert_all_accurate,
    compose,
    fused_exact,
    run,
    strides,
)

from tribn.functional import batch_norm

# Values and gradients


def test_every_pair_of_values_occurs():
    for a, b in itertools.combinations(FACTORS, 2):
        seen = {(getattr(case, a), getattr(case, b)) for case in FUSED}
        assert seen == set(itertools.product(FACTORS[a], FACTORS[b])), (a, b)


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_as_accurate_as_torchs_composition(case, device):
    inputs, options = case.call(device)
    results = run(batch_norm, inputs, case.training, **options)
    torch_results = run(compose, inputs, case.training, **options)
    assert_all_accurate(results, torch_results, fused_exact(inputs, case.training, options))
    for name in ("y", "dx"):
        assert strides(results[name]) == strides(torch.empty_like(inputs.x)), name
    if (mask := options.get("mask")) is not None:
        for name in ("y", "dx", "dresidual"):
            if name in results:
                left_out = results[name].movedim(inputs.axis, -1)[~mask]
                assert torch.equal(left_out, torch.zeros_like(left_out)), name
