import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional

from ling_flow.kernels.rms_norm import rms_norm
from ling_flow.kernels.rotary import rotary_frequencies, rotary_tables, rotate_, yarn_frequencies, yarn_scale
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
    cos, sin = rotary_tables(positions, rotary_frequencies(4, theta))
    x = random(2, 3, 5, 6)
    pairs = torch.complex(x[..., 0:2], x[..., 2:4])
    for s, position in enumerate(positions.tolist()):
        for i in range(2):
            pairs[:, s, :, i] *= torch.exp(torch.tensor(1j * position * theta ** (-2 * i / 4), dtype=torch.complex128))
    turned = rotate_(x.clone(), cos.unsqueeze(-2), sin.unsqueeze(-2))
    torch.testing.assert_close(turned, torch.cat([pairs.real, pairs.imag, x[..., 4:]], -1), atol=1e-5, rtol=1e-5)


def test_rotation_gradient() -> None:
    cos, sin = rotary_tables(torch.arange(3), rotary_frequencies(4, 100.0))
    cos, sin = cos.unsqueeze(-2).double(), sin.unsqueeze(-2).double()
    norm = (cos.square() + sin.square()).sqrt()  # float32 tables: exactly a rotation only once normalised
    x = random(2, 3, 2, 6).requires_grad_()
    assert gradcheck(lambda x: rotate_(x.clone(), cos / norm, sin / norm), (x,))


def test_swiglu_is_its_formula_with_the_right_gradient() -> None:
    x = random(4, 10).requires_grad_()
    torch.testing.assert_close(swiglu(x), functional.silu(x[:, :5]) * x[:, 5:])
    assert gradcheck(swiglu, (x,))


@pytest.mark.parametrize(("theta", "factor", "length"), [(6e5, 4.0, 32768), (1e4, 8.0, 4096), (50.0, 2.0, 64)])
def test_yarn_is_that_of_transformers(theta: float, factor: float, length: int) -> None:
    from transformers import PretrainedConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = PretrainedConfig(
        hidden_size=256, num_attention_heads=2, head_dim=128, max_position_embeddings=int(factor * length)
    )
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": factor,
        "original_max_position_embeddings": length,
        "partial_rotary_factor": 0.5,
    }
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    torch.testing.assert_close(yarn_frequencies(64, theta, factor, length), frequencies)
    assert yarn_scale(factor) == pytest.approx(scale)
