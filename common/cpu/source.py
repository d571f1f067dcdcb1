"""A kernel's source text as it was imported, and what the names in it stand for, each looked up once a compilation."""

import __future__

import ast
import builtins
import enum
import hashlib
import inspect
import linecache
import time
import types as pytypes
import weakref

import numpy as np
from numba.core import types

from . import store
from .errors import CompileError
from .registry import equivalent_of
from .stubs import Stub

MISSING = object()

_STARTED = time.time()
_frozen = weakref.WeakKeyDictionary()  # device function -> {name: (print, value) when first compiled}
_named = weakref.WeakKeyDictionary()  # function -> see `_outside_names`
_blocks = weakref.WeakKeyDictionary()  # function -> see `_block`
_remembered = weakref.WeakKeyDictionary()  # function -> (lines of its file when decorated, older than this process?)


def remember(function):
    """Keep the text of a function's file as it is now: the file may be edited before the function is compiled."""
    if function in _remembered:
        return
    filename = function.__code__.co_filename
    linecache.checkcache(filename)
    lines = linecache.getlines(filename, function.__globals__)
    entry = linecache.cache.get(filename)
    changed = entry[1] if entry and len(entry) == 4 else None
    _remembered[function] = lines, changed is not None and changed < _STARTED - 2


def _block(function):
    """``(text, first line)`` of a function, decorators included, with the indentation of its file."""
    if function in _blocks:
        return _blocks[function]
    code = function.__code__
    remember(function)
    lines, first = _remembered[function][0], code.co_firstlineno
    if not 0 < first <= len(lines):
        raise CompileError(
            f"the source of {function.__name__} cannot be read",
            fix="the CPU backend compiles source text: define kernels in a file or a notebook cell, not with exec",
        )
    _blocks[function] = "".join(inspect.getblock(lines[first - 1 :])), first
    return _blocks[function]


def source_tree(function):
    """``(FunctionDef, filename)`` of a Python function, with the line numbers of its file; a new tree each time.

    Raises CompileError if the text cannot be read, is no ``def``, or is not what was imported.
    """
    text, first = _block(function)
    filename = function.__code__.co_filename
    try:
        body = ast.parse("if 1:\n" + text if text[:1].isspace() else text).body
    except SyntaxError:
        body = []
    if text[:1].isspace() and body:
        body, first = body[0].body, first - 1
    if not body or not isinstance(body[0], ast.FunctionDef):
        raise CompileError(
            "a kernel must be a plain function", filename, first, "write it with def, at the top of a file or cell"
        )
    node = body[0]
    ast.increment_lineno(node, first - 1)
    if not _is_code_of(node, function):
        raise CompileError(
            f"the text at this line is not the code of {function.__name__} that was imported",
            filename,
            function.__code__.co_firstlineno,
            "the file has been edited since: import it anew (restart, or importlib.reload), then launch",
        )
    return node, filename


def _is_code_of(node, function):
    """Is the text ``node`` the one that ``function`` was made of, as far as that can be told?"""
    code = function.__code__
    arguments = [a.arg for a in node.args.posonlyargs + node.args.args]
    if node.name != code.co_name or tuple(arguments) != code.co_varnames[: code.co_argcount]:
        return False
    lines, old = _remembered[function]
    if old or any(isinstance(n, ast.Assert) for n in ast.walk(node)):  # test runners rewrite asserts
        return True
    flags = code.co_flags & sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
    try:
        whole = compile("".join(lines), code.co_filename, "exec", flags, dont_inherit=True)
    except SyntaxError:  # a notebook's cell may have more than Python's syntax
        return True
    return any(_same_code(c, code) for c in _codes_in(whole) if c.co_firstlineno == code.co_firstlineno)


def _codes_in(code):
    yield code
    for constant in code.co_consts:
        if isinstance(constant, pytypes.CodeType):
            yield from _codes_in(constant)


def _same_code(a, b):
    def parts(code):
        constants = [repr(c) for c in code.co_consts if not isinstance(c, pytypes.CodeType)]
        return code.co_name, code.co_code, code.co_names, constants

    return parts(a) == parts(b)


def python_function(value):
    """The Python function behind a device function (ours, or one made by ``numba.njit``), or None."""
    inner = getattr(value, "py_func", None)
    return inner if isinstance(inner, pytypes.FunctionType) else None


class Names:
    """What the names in a kernel and in its device functions stand for, as they were when a compilation began.

    Each is looked up once: the digest that names the compiled kernel and the compiler see the same values.
    """

    def __init__(self):
        self._values = {}  # (function, "C.N") -> value or MISSING
        self._dispatchers = {}  # python function -> its device function
        self.signatures = {}  # python function -> explicit signatures of its device function
        self.closed = False  # the digest has been made: what is looked up now and was not before is not in it
        self.complete = True

    def lookup(self, function, identifier):
        """What a global, free or builtin name of ``function`` stands for (``MISSING`` if nothing)."""
        return self._get(function, identifier, lambda: _lookup(function, identifier))

    def static_value(self, node, function, local_names):
        """The compile-time value of a name or dotted name, ``MISSING`` if it has none."""
        if isinstance(node, ast.Name):
            return MISSING if node.id in local_names else self.lookup(function, node.id)
        if not isinstance(node, ast.Attribute):
            return MISSING
        base = self.static_value(node.value, function, local_names)
        if base is MISSING or isinstance(base, (np.ndarray, np.generic, Stub)):
            return MISSING
        return self._get(function, _dotted(node), lambda: getattr(base, node.attr, MISSING))

    def _get(self, function, chain, look):
        key = function, chain
        if key not in self._values:
            self.complete &= not self.closed
            value = look()
            self._values[key] = value
            if python_function(value) is not None:
                self._dispatchers[value.py_func] = value
                if getattr(value, "explicit", None):
                    for frozen in value.frozen_names:  # it was compiled when it was decorated
                        self._values |= frozen._values
                        self.signatures |= frozen.signatures
                    self.signatures[value.py_func] = value.explicit.all
        return self._values[key]

    def digest(self, function):
        """A hash of all that decides what a kernel means: its text, its helpers' texts, the values they name."""
        digest = hashlib.sha256()
        numbers = {}  # function -> its place among those met

        def add_value(value):
            inner = python_function(value)
            if inner is not None:
                digest.update(repr([str(s) for s in self.signatures.get(inner, ())]).encode())
                return add_function(inner)
            if isinstance(value, np.ndarray):
                return digest.update(repr((value.shape, value.strides, value.dtype.str)).encode() + value.tobytes())
            if isinstance(value, (list, tuple)):
                digest.update(f"{type(value).__name__} of {len(value)}: ".encode())
                for v in value:
                    add_value(v)
                return None
            if equivalent_of(value) is not None:  # what an intrinsic does stands in the module of its equivalent
                digest.update(store.meaning_of_module(equivalent_of(value).function.__module__).encode())
            if isinstance(value, types.Type):  # float32 and float64 are of one class
                return digest.update(f"{type(value).__name__}:{value};".encode())
            if isinstance(value, enum.Enum):
                digest.update(str(value).encode())
                return add_value(value.value)
            if isinstance(value, (bool, int, float, complex, str, bytes, type(None), np.generic)):
                return digest.update(f"{type(value).__name__}:{value!r};".encode())
            name = getattr(value, "__qualname__", None) or getattr(value, "__name__", type(value).__qualname__)
            return digest.update(f"{getattr(value, '__module__', '')}.{name};".encode())

        def add_function(f):
            known = f in numbers
            digest.update(f"function {numbers.setdefault(f, len(numbers))};".encode())
            if known:
                return
            digest.update(_block(f)[0].encode())
            digest.update(f"{f.__code__.co_filename}:{f.__code__.co_firstlineno};".encode())
            own, chains = _outside_names(f)
            for parts in chains:
                values = [self.static_value(part, f, own) for part in parts]
                value = next((v for v in values if v is not MISSING), MISSING)
                if f in self._dispatchers and f not in self.signatures:
                    _check_frozen(self._dispatchers[f], _dotted(parts[0]), value, parts[0].lineno)
                digest.update(_dotted(parts[0]).encode() + b"=")
                if value is not MISSING:
                    add_value(value)

        add_function(function)
        self.closed = True
        return digest.hexdigest()


def _check_frozen(dispatcher, chain, value, line):
    """Refuse a name that has another value than when a device function was first compiled.

    A GPU compiles a device function once for each list of types that it is called with, so it would go on with the
    value of then, but where the types are new. The types are not known yet here, and either number might be wrong.
    """
    now = _fingerprint(value)
    first, _ = _frozen.setdefault(dispatcher, {}).setdefault(chain, (now, value))  # which keeps the object, and its id
    if first != now:
        name = dispatcher.py_func.__name__
        raise CompileError(
            f"{chain} has changed since {name} was compiled for another kernel",
            dispatcher.py_func.__code__.co_filename,
            line,
            f"a GPU would still have the {chain} of then: define {name} anew, or pass {chain} to it",
        )


def _fingerprint(value):
    """What two constants must have in common to be the same to compiled code."""
    if isinstance(value, np.ndarray):
        return value.shape, value.strides, value.dtype.str, value.tobytes()
    if isinstance(value, (list, tuple)):
        return type(value), [_fingerprint(v) for v in value]
    if isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        return type(value), repr(value)
    return id(value)


def local_names(tree, nodes=None):
    """Names that are local to a function: its parameters and what it assigns. nodes: its tree's, if they are known."""
    arguments = tree.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    stored = {n.id for n in nodes or ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {a.arg for a in named if a is not None} | stored


def _outside_names(function):
    """``(names that are its own, what its body loads besides)``: the latter as lists of nodes, ``C.N`` and its ``C``.

    Of each function once a process: much of the time that a kernel takes to be found on the disk is spent here.
    """
    if function not in _named:
        tree, _ = source_tree(function)
        nodes = [n for stmt in tree.body for n in ast.walk(stmt) if isinstance(n, (ast.Name, ast.Attribute))]
        own, chains = local_names(tree, nodes), []
        inner = {id(n.value) for n in nodes if isinstance(n, ast.Attribute)}
        for node in nodes:
            parts = [node]
            while isinstance(parts[-1], ast.Attribute):
                parts.append(parts[-1].value)
            loaded = isinstance(node.ctx, ast.Load) and id(node) not in inner
            if loaded and isinstance(parts[-1], ast.Name) and parts[-1].id not in own:
                chains.append(parts)
        _named[function] = own, chains
    return _named[function]


def _dotted(node):
    return node.id if isinstance(node, ast.Name) else f"{_dotted(node.value)}.{node.attr}"


def _lookup(function, identifier):
    code = function.__code__
    if identifier in code.co_freevars:
        try:
            return function.__closure__[code.co_freevars.index(identifier)].cell_contents
        except ValueError:
            return MISSING
    if identifier in function.__globals__:
        return function.__globals__[identifier]
    return getattr(builtins, identifier, MISSING)

