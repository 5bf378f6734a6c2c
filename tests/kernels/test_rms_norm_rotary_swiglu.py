import torch
from torch.autograd import gradcheck
from torch.nn import functional

from ling_flow.kernels.rms_norm import rms_norm
from ling_flow.kernels.rotary import rotary_tables, rotate_
from ling_flow.kernels.swiglu import swiglu


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_is_its_formula_with_the_right_gradient() -> None:
    x, weight = random(3, 5, 8).requires_grad_(), random(8, seed=1).requires_grad_()
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 0.1), expected)
    assert gradcheck(lambda x, w: rms_norm(x, w, 0.1), (x, weight))


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    # 300² squares overflow nothing in bfloat16, but a bfloat16 sum of 4096 of them would stop growing.
    x = torch.full((1, 4096), 300.0, dtype=torch.bfloat16)
    assert rms_norm(x, torch.ones(4096, dtype=torch.bfloat16), 1e-6).eq(1).all()


def test_rotation_is_complex_multiplication_on_the_first_elements() -> None:
    positions, theta = torch.tensor([0, 1, 7]), 100.0
    cos, sin = rotary_tables(positions, 4, theta)
    x = random(2, 3, 5, 6)
    pairs = torch.complex(x[..., 0:2], x[..., 2:4])
    for s, position in enumerate(positions.tolist()):
        for i in range(2):
            pairs[:, s, :, i] *= torch.exp(torch.tensor(1j * position * theta ** (-2 * i / 4), dtype=torch.complex128))
    turned = rotate_(x.clone(), cos.unsqueeze(-2), sin.unsqueeze(-2))
    torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag, x[..., 4:]], -1), atol=1e-5, rtol=1e-5)


def test_rotation_gradient() -> None:
    cos, sin = rotary_tables(torch.arange(3), 4, 100.0)
    cos, sin = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double()
    norm = (cos.square() + sin.square()).sqrt()  # float32 tables: exactly a rotation only once normalised
    x = random(2, 3, 2, 6).requires_grad_()
    assert gradcheck(lambda x: rotate_(x.clone(), cos / norm, sin / norm), (x,))


def test_swiglu_is_its_formula_with_the_right_gradient() -> None:
    x = random(4, 10).requires_grad_()
    torch.testing.assert_close(swiglu(x), functional.silu(x[:, :5]) * x[:, 5:])
    assert gradcheck(swiglu, (x,))
