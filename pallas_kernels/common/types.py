"""Type aliases for kernel operands. Imports no Pallas."""

from typing import Any

# A reference inside a kernel. Pallas functions are annotated with private
# reference types that `jax.Ref` does not match, so this alias is `Any`.
type Ref = Any
# An array at the launch of a kernel; a reference to it inside the kernel.
type ArrayOrRef = Any
