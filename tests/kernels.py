"""Triton kernels compiled down to a GPU's instructions, on machines without one."""

from __future__ import annotations

from collections.abc import Mapping

AMPERE, HOPPER = 80, 90


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
