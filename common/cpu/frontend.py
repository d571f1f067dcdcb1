"""Front end: Python source of a kernel -> AST in a normal form.

After it, a kernel body has only assignments, stores, ``if``, ``for … in range``, ``while``, ``break``,
``continue``, ``return``, ``print`` and calls; every ``cuda.*`` name is resolved; device functions that contain
collectives are inlined; a collective (barrier, shuffle, vote) stands alone, as
``Assign(name, Call)`` or ``Expr(Call)``.

Internal names start with an underscore: ``_tx _ty _tz`` thread, ``_bx _by _bz`` block, ``_gx _gy _gz`` grid,
``_lane`` lane. A user's name that starts with one is renamed.
"""

import ast

from .errors import CompileError
from .inline import Inlining
from .lower import Lowering
from .registry import equivalent_of
from .resolve import Resolver
from .source import MISSING, local_names, python_function, source_tree
from .stubs import Stub


class Program:
    """A kernel in normal form, with all that its generated module needs."""

    def __init__(self, function, names, block_dim, tables, inline_accesses=False, device=False):
        self.names = names  # what the names in it stand for, see `source.Names`
        self.block_dim = block_dim  # (x, y, z)
        self.inline_accesses = inline_accesses  # also inline device functions that index arrays: then all is checked;
        # "all": and all others
        self.fences = False  # has it a threadfence?
        self.titles = {}  # unique name of a shared or local array -> the name it has in the source
        self.tables = tables  # names of the scalar equivalents, see runtime.py
        self.shared = {}  # name -> (shape or None for dynamic, numba dtype, line)
        self.local = {}  # name -> (shape, numba dtype)
        self.consts = {}  # name -> python text
        self.device = {}  # generated njit device functions: name -> FunctionDef, in order of need
        self.device_names = {}  # python function -> name
        self.unseen = []  # device functions that are not inlined though accesses are to be looked at, and why
        self.recursive = set()  # python functions that call themselves
        self.modules = set()  # full names of the modules of registered equivalents
        self.inlined = 0
        self.temps = 0
        self.uses = {}  # python function -> what `traits` returns
        self.kernel = FunctionFront(self, function)
        self.name, self.filename = function.__name__, self.kernel.filename
        self.params, self.body = ([], []) if device else self.kernel.lower_kernel()

    def fresh(self, stem="t"):
        self.temps += 1
        return f"_{stem}{self.temps}"

    def const(self, text, stem="k"):
        for key, value in self.consts.items():
            if value == text:
                return key
        key = f"_{stem}{len(self.consts)}"
        self.consts[key] = text
        return key

    def traits(self, function):
        """``(is inlined, uses thread positions, must be inlined)``, through calls.

        It must be for barriers, shuffles and shared arrays; it also is where accesses are to be looked at.
        """
        if function in self.uses:
            return self.uses[function]
        self.uses[function] = (False, False, False)  # recursion ends here
        tree, _ = source_tree(function)
        own = local_names(tree)
        inline, needed, position, recursive = self.inline_accesses == "all", False, False, False
        for node in (n for stmt in tree.body for n in ast.walk(stmt)):
            if self.inline_accesses and isinstance(node, ast.Subscript):
                inline = True
            if not isinstance(node, (ast.Name, ast.Attribute)):
                continue
            value = self.names.static_value(node, function, own)
            if isinstance(value, Stub):
                needed |= value.role in ("block", "warp") or value.name == "shared.array"
                inline |= self.inline_accesses and value.role == "atomic"
                position |= value.role in ("position", "grid")
            elif python_function(value):
                recursive |= python_function(value) is function
                sub = self.traits(python_function(value))
                needed, inline, position = needed or sub[2], inline or sub[0], position or sub[1]
            elif value is not MISSING and equivalent_of(value) is not None:
                equivalent = equivalent_of(value)
                needed |= equivalent.level == "warp"
                inline |= self.inline_accesses and equivalent.elements > 0
        if inline and not needed and (recursive or len(self.names.signatures.get(function, ())) > 1):
            inline = False  # which of its signatures is meant is known when types are
            self.unseen.append(f"{function.__name__} {'calls itself' if recursive else 'has several signatures'}")
        self.uses[function] = (inline or needed, position, needed)
        return self.uses[function]


class FunctionFront(Lowering, Inlining, Resolver):
    """Resolves and normalises one function (the kernel, or a device function being inlined)."""

    def __init__(self, program, function, prefix="", bindings=None):
        self.program, self.function, self.prefix = program, function, prefix
        self.tree, self.filename = source_tree(function)
        for node in ast.walk(self.tree):
            node.filename = self.filename
        self.bindings = dict(bindings or {})  # parameter -> AST it stands for (inlining)
        args = self.tree.args
        if args.vararg or args.kwarg or args.kwonlyargs or args.defaults:
            self.fail(
                self.tree,
                "a kernel takes positional parameters only, without defaults",
                "list the parameters one by one",
            )
        self.param_names = [a.arg for a in args.posonlyargs + args.args]
        self.locals = local_names(self.tree)
        self.inline_stack = [function]
        self.result_cast = None  # name of a cast of what is returned, where an inlined function has a signature
        self.hoisting = True  # False for device functions compiled on their own
        self.arrays = {}  # local name -> unique name of a shared or local array

    def fail(self, node, what, fix=None, on_gpu_too=False):
        raise CompileError(what, self.filename, getattr(node, "lineno", None), fix, on_gpu_too)
