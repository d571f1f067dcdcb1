"""Where this backend registers what Numba's CPU target shall emit: for that target alone.

Numba's shared registry will not do. numba-cuda takes over what others have put there, so on a machine with a GPU a
process that had imported this backend would get its float16, in instructions of the CPU, on the GPU.
"""

from numba.core.imputils import Registry
from numba.core.registry import cpu_target

_registry = Registry("common.cpu")
lower_builtin, lower_cast = _registry.lower, _registry.lower_cast


def install():
    """Give the CPU target what was registered since the last call: the last line of a module that registers."""
    cpu_target.target_context.refresh()
    cpu_target.target_context.install_registry(_registry)
