import math

import torch

from blockfp8_titan.numerics import relative_error, sqnr


def test_sqnr_of_known_noise():
    exact = torch.tensor([3.0, 4.0])
    assert math.isclose(sqnr(exact, exact + torch.tensor([0.0, 0.05])), 40.0, abs_tol=1e-4)
    assert sqnr(exact, exact) == math.inf


def test_relative_error_of_known_error():
    assert math.isclose(relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 0.1)


def test_nan_passes_no_bound():
    exact, broken = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert not sqnr(exact, broken) >= 0
    assert not relative_error(exact, broken) < 1
