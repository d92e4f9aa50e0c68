"""Triton kernels interpreted, and compiled down to a GPU's instructions, on machines without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

AMPERE, HOPPER = 80, 90
REPOSITORY = Path(__file__).parents[1]


def interpreted(program: str, *arguments: str) -> list[str]:
    """What a program prints in which Triton's kernels are interpreted, word by word."""
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def compiled(
    kernel: object, capability: int, *, types: Mapping[str, str], constants: Mapping[str, object], **options: int
) -> Mapping[str, object]:
    """What Triton's compiler makes of it, by stage; `types` are those of the arguments that are not 32-bit integers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
