"""A kernel's source text, and what the names in it stand for."""

import ast
import builtins
import inspect
import textwrap
import types as pytypes

import numpy as np

from .errors import CompileError
from .stubs import Stub

MISSING = object()


def source_tree(function):
    """``(FunctionDef, filename)`` of a Python function, with the line numbers of its file."""
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise CompileError(
            f"the source of {function.__name__} cannot be read",
            mend="the CPU backend compiles source text: define kernels in a file or a notebook cell, not with exec",
        ) from None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef):
        raise CompileError(
            "a kernel must be a plain function",
            function.__code__.co_filename,
            first,
            "write it with def, at the top of a file or cell",
        )
    return node, function.__code__.co_filename


def lookup(function, identifier):
    """What a global, free or builtin name of ``function`` stands for (``MISSING`` if nothing)."""
    code = function.__code__
    if identifier in code.co_freevars:
        try:
            return function.__closure__[code.co_freevars.index(identifier)].cell_contents
        except ValueError:
            return MISSING
    if identifier in function.__globals__:
        return function.__globals__[identifier]
    return getattr(builtins, identifier, MISSING)


def python_function(value):
    """The Python function behind a device function (ours, or one made by ``numba.njit``), or None."""
    inner = getattr(value, "py_func", None)
    return inner if isinstance(inner, pytypes.FunctionType) else None


def static_value(node, function, local_names):
    """The compile-time value of a name or dotted name, ``MISSING`` if it has none."""
    if isinstance(node, ast.Name):
        return MISSING if node.id in local_names else lookup(function, node.id)
    if isinstance(node, ast.Attribute):
        base = static_value(node.value, function, local_names)
        if base is MISSING or isinstance(base, (np.ndarray, Stub)):
            return MISSING
        return getattr(base, node.attr, MISSING)
    return MISSING
