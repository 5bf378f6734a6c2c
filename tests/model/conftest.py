import pytest

from ling_flow.kernels import experts


@pytest.fixture
def unpadded_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts run on the rows routed to them alone, as formulas of FLOPs and bytes count them."""
    monkeypatch.setattr(experts, "_pads", lambda counts, dtype: False)
    monkeypatch.setattr(experts, "BFLOAT16_STEP", 1)
