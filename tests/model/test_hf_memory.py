"""Reading, writing, converting and merging a checkpoint of some 270 MB, in a process that watches its own peak."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
import json, sys
from pathlib import Path

import torch

from ling_flow.merging.merge import merge_checkpoints
from ling_flow.model.checkpoint_files import TensorSpec, write_weights
from ling_flow.model.config import ModelConfig
from ling_flow.model.hf import convert_checkpoint, load_pretrained, published_tensors, save_pretrained
from ling_flow.model.transformer import BailingMoeV2ForCausalLM


def peak() -> float:
    """Largest resident memory so far, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def tensors(specs):
    for name, spec in specs.items():
        yield name, torch.randn(spec.shape, generator=generator).mul_(0.02).to(spec.dtype)


def config(experts: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=512, moe_intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, num_experts=experts, num_experts_per_tok=2,
    )


def all_of_it(root: Path, experts: int) -> dict[str, float]:
    with torch.device("meta"):
        model = BailingMoeV2ForCausalLM(config(experts))
    specs = {name: TensorSpec.of(tensor) for name, tensor in published_tensors(model).items()}
    (root / "plain").mkdir(parents=True)
    (root / "plain" / "config.json").write_text(json.dumps(config(experts).to_hf()))
    figures = {"largest": max(spec.nbytes for spec in specs.values()) / 1e6, "before": peak()}
    write_weights(root / "plain", specs, tensors(specs))
    figures["written"] = peak()
    convert_checkpoint(root / "plain", root / "fp8", fp8=True)
    convert_checkpoint(root / "fp8", root / "back", fp8=False)
    merge_checkpoints([root / "plain", root / "back"], [0.5, 0.5], root / "merged")
    figures["converted"] = peak()
    model = load_pretrained(root / "fp8")
    figures["model"] = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6
    figures["loaded"] = peak()
    save_pretrained(model, root / "saved")
    save_pretrained(model, root / "saved8", fp8=True)
    figures["saved"] = peak()
    return figures


torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
all_of_it(Path(sys.argv[1]) / "small", 2)  # what torch itself loads on first use does not count
print(json.dumps(all_of_it(Path(sys.argv[1]) / "large", 80)))
'''


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_is_a_few_tensors_beside_the_model(tmp_path: Path) -> None:
    # Large blocks go back to the system when freed; otherwise the peak would be a matter of the allocator's habits.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    few_tensors = 20 * figures["largest"]
    assert figures["model"] > 10 * few_tensors
    assert figures["written"] - figures["before"] < few_tensors
    assert figures["converted"] - figures["written"] < few_tensors
    assert figures["loaded"] - figures["converted"] < figures["model"] + few_tensors
    assert figures["saved"] - figures["loaded"] < few_tensors
    sizes = {name: (tmp_path / "large" / name / "model.safetensors").stat().st_size for name in ("plain", "fp8")}
    assert sizes["plain"] / 1e6 > figures["model"] - 1
    assert sizes["fp8"] < 0.52 * sizes["plain"]
