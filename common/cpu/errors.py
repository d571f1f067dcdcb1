"""Errors of the CPU backend. Each names a line of the student's file, what is wrong there, and a fix."""

import linecache


class KernelError(Exception):
    """A kernel that cannot be compiled, or a launch that went wrong.

    Attributes: ``filename``, ``lineno`` (of the student's source), ``what``, ``fix``.
    """

    def __init__(self, what, filename=None, lineno=None, fix=None):
        self.what, self.filename, self.lineno, self.fix = what, filename, lineno, fix
        text = what
        if filename is not None:
            line = linecache.getline(filename, lineno).strip() if lineno else ""
            text = f"{filename}:{lineno}: {what}"
            if line:
                text += f"\n    {lineno} | {line}"
        if fix:
            text += f"\n  To fix it: {fix}"
        super().__init__(text)


class CompileError(KernelError):
    """The kernel uses something that a GPU or this backend does not run. ``on_gpu_too``: a GPU refuses it as well."""

    def __init__(self, what, filename=None, lineno=None, fix=None, on_gpu_too=False):
        super().__init__(what, filename, lineno, fix)
        self.on_gpu_too = on_gpu_too


class ArgumentError(CompileError, TypeError):
    """Too many or too few arguments for the kernel."""


class KernelTypeError(KernelError, TypeError):
    """Numba cannot type the kernel: the message is Numba's own, with the student's line."""


class DivergenceError(KernelError):
    """Threads of one block (or lanes of one warp) disagree where they must not."""


class OutOfBoundsError(KernelError, IndexError):
    """An array access outside its shape (reported with ``MINI_CHECK=1``)."""


class HangError(KernelError):
    """A loop that waits for something that no other thread will do."""


class LaunchError(KernelError, ValueError):
    """A launch configuration or argument list that no GPU would take."""


class LaunchTypeError(LaunchError, TypeError):
    """The same, where the type of something is wrong: numba-cuda raises a TypeError there."""


class DivisionError(KernelError, ZeroDivisionError):
    """A division by zero in a kernel with ``debug=True``."""
