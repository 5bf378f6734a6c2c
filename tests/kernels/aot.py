"""Compile every Triton kernel for sm_90 at the published models' shapes, without a GPU; print what came out.

    LING_FLOW_TRITON=compile python -m tests.kernels.aot [PART-OF-NAME ...]  # one JSON object per compiled kernel

The launchers run as they are, on meta tensors: what they would launch is compiled and not run. Must run in a process
without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tests.kernels.aot_cases import all_cases

NO_PRODUCT = {"_split_kernel"}  # launched before the products of their case
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _NoDevice:
    """What Triton's JIT asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiled() -> Iterator[list[Any]]:
    """Inside, launching a kernel compiles it and adds it to the list."""
    triton.runtime.driver.set_active(_NoDevice())
    found: list[Any] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert max((*grid, 1, 1)[1:3]) <= 65535, f"{self.__name__}: grid {grid}: CUDA's second and third are 16 bits"
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append(kernel)
        return kernel

    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes of stack: what is spilled lies there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", said)}
    return {"registers": used["REG"], "stack": used["STACK"]}


def main() -> None:
    wanted = sys.argv[1:]
    for case in all_cases():
        if wanted and not any(part in case.name for part in wanted):
            continue
        with compiled() as kernels:
            case.launch()
        for kernel in {id(kernel): kernel for kernel in kernels}.values():
            print(
                json.dumps(
                    {
                        "case": case.name,
                        "kernel": kernel.metadata.name,
                        "triton": triton.__version__,
                        "shared": kernel.metadata.shared,
                        "warps": kernel.metadata.num_warps,
                        "wgmma": "wgmma" in kernel.asm["ptx"],
                        "wgmma_wanted": case.wgmma and kernel.metadata.name not in NO_PRODUCT,
                        "fused": kernel.metadata.enable_fp_fusion,
                        **resources(kernel.asm["cubin"]),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
