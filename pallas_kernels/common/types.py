"""Types of what a kernel is given. Imports no Pallas."""

from typing import Any

# A reference inside a kernel. Pallas's functions ask for references of private
# types, which `jax.Ref` is not: to a type checker, a reference is anything.
type Ref = Any
# An array where a kernel is launched, a reference to it inside the kernel.
type ArrayOrRef = Any
