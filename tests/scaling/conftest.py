import pytest

from ling_flow.scaling.fit import fit_scaling_law
from ling_flow.scaling.law import LING_2_LAW, HyperParameterLaw, PowerLaw
from ling_flow.scaling.target import Target
from tests.scaling.synthetic import sweep

TINY_LAW = HyperParameterLaw(
    learning_rate=PowerLaw(coefficient=2.0, exponent=-0.22), batch_tokens=PowerLaw(coefficient=1e-3, exponent=0.5)
)


@pytest.fixture(scope="session")
def tiny_sweep():
    """Fifteen noisy trials on three rungs, three readings each."""
    return sweep(
        TINY_LAW,
        (1e6, 2e6, 4e6),
        (6e4, 1.2e5, 2.4e5),
        (2e-3, 4e-3, 8e-3, 1.6e-2),
        (512, 1024, 2048, 4096),
        noise=0.003,
        seed=3,
    )


@pytest.fixture(scope="session")
def fitted_law(tiny_sweep):
    return fit_scaling_law(tiny_sweep, Target(4e6, 1_000_000), bootstrap_samples=30)


@pytest.fixture(scope="session")
def ling_sweep():
    """Noise-free trials on the published law and grid: C 3e17..3e20, learning rates 2^-11..2^-9, batches 2^18..2^21."""
    return sweep(
        LING_2_LAW,
        (1.5e8, 5e8, 1.5e9, 5e9),
        (2e9, 6e9, 2e10, 6e10),
        tuple(2.0**power for power in (-11, -10, -9)),
        tuple(2**power for power in (18, 19, 20, 21)),
    )
