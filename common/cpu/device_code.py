"""Device functions of a kernel: each a module of its own with all that it calls, compiled once and kept.

Type inference and the kernel's own compilation use the same compiled function, and kernels with equal device functions
share it. Equal means: of the same text, once the names that the front end has numbered are numbered anew.
"""

import ast

import numba
from numba.core import ir, types

from . import machine_code
from .analysis import copy_expr
from .resolve import HIDDEN
from .tree import undecided

_namespaces = {}  # name of a device module -> its namespace


class DeviceModule:
    """The text of one device function, ``entry``, and of all that it calls.

    signatures: {function: its explicit ones}. modules: see `Program`. recursive: the functions that call themselves.
    """

    def __init__(self, text, entry, signatures, modules, recursive=()):
        self.text, self.entry, self.signatures, self.modules = text, entry, signatures, tuple(modules)
        self.recursive = tuple(recursive)
        self.name = machine_code.name_of(f"dev{entry}", repr((text, sorted(signatures.items()))), self.modules)

    def dispatcher(self):
        """What generated code calls: the function, compiled for its explicit signatures or as calls need it."""
        if self.name not in _namespaces:
            code = compile(self.text, f"<{self.name}>", "exec")
            _namespaces[self.name] = self._run(code, lambda f, key: machine_code.kept(f, lambda: f"{self.name}.{key}"))
        return _namespaces[self.name][self.entry]

    def check_recursion(self, fail):
        """Call ``fail(function, types, types it calls itself with)`` where these differ: a GPU refuses that."""
        for key in self.recursive:
            dispatcher = _namespaces[self.name][key]
            for own, result in dispatcher.overloads.items():
                facts = result.type_annotation
                for call, signature in facts.calltypes.items():
                    callee = isinstance(call, ir.Expr) and call.op == "call" and facts.typemap[call.func.name]
                    if isinstance(callee, types.RecursiveCall) or getattr(callee, "dispatcher", None) is dispatcher:
                        if signature.args != own:
                            fail(key, own, signature.args)

    def fresh_dispatcher(self, trees):
        """The same, compiled from the trees of the source, so that Numba's errors have the lines of the source."""
        head = ast.parse(self.text)
        head.body = [stmt for stmt in head.body if not isinstance(stmt, ast.FunctionDef)]
        names = machine_code.module(self.name + "_anew")
        exec(compile(head, f"<{self.name}>", "exec"), names)
        for tree in trees:
            exec(compile(ast.Module([tree], []), tree.filename, "exec"), names)
            names[tree.name] = self._jit(names[tree.name])
        return self._signed(names)[self.entry]

    def _run(self, code, keep):
        def device(function):
            dispatcher = self._jit(function)
            # what calls itself is compiled, and looked at, in each process
            return dispatcher if function.__name__ in self.recursive else keep(dispatcher, function.__name__)

        names = machine_code.module(self.name)
        names["_device"] = device
        exec(code, names)
        return self._signed(names)

    def _signed(self, names):
        for key, signatures in self.signatures.items():
            for signature in signatures:
                names[key].compile(signature)
            names[key].disable_compile()
        return names

    @staticmethod
    def _jit(function):
        return numba.njit(**machine_code.OPTIONS)(function)


def device_modules(program):
    """``{name in the program: DeviceModule}`` of the device functions that a program calls."""
    return {key: _module(program, key) for key in program.device}


def module_trees(program, entry):
    """``(trees, names)``: copies of ``entry`` and the functions that it calls, renamed, and {name before: after}."""
    order, begun, consts = [], set(), {}  # order: callees first

    def visit(key):
        if key in begun:
            return
        begun.add(key)
        for node in ast.walk(program.device[key]):
            if isinstance(node, ast.Name):
                if node.id in program.device:
                    visit(node.id)
                elif node.id in program.consts:
                    consts.setdefault(node.id, f"_k{len(consts)}")
        order.append(key)

    visit(entry)
    names = {key: f"_d{i}_{key.partition('_')[2].partition('_')[2]}" for i, key in enumerate(order)} | consts
    trees = []
    for key in order:
        tree = copy_expr(program.device[key])
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                node.id = names.get(node.id, node.id)
            elif isinstance(node, ast.Compare):
                undecided(node)
        tree.name, tree.filename = names[key], program.device[key].filename
        trees.append(tree)
    return trees, names


def _module(program, entry):
    trees, names = module_trees(program, entry)
    lines = ['"""Device functions: generated, do not edit."""', "from common.cpu.runtime import *", ""]
    lines += [f"{names[key]} = {text}" for key, text in program.consts.items() if key in names]
    for tree in trees:
        lines += ["", "", "@_device", ast.unparse(tree)]
    functions = {names[key]: function for function, key in program.device_names.items() if key in names}
    signatures = {}  # callees first: a caller is compiled with what they return by theirs
    for tree in trees:
        function = functions[tree.name]
        if function in program.names.signatures:
            hidden = (types.int64,) * (len(HIDDEN) if program.traits(function)[1] else 0)
            given = program.names.signatures[function]
            args = [(*map(_any_layout, s if isinstance(s, tuple) else s.args), *hidden) for s in given]
            signatures[tree.name] = [a if isinstance(s, tuple) else s.return_type(*a) for s, a in zip(given, args)]
    recursive = [names[program.device_names[f]] for f in program.recursive if program.device_names[f] in names]
    return DeviceModule("\n".join([*lines, ""]), names[entry], signatures, program.modules, recursive)


def _any_layout(kind):
    """An array type with any strides: rows of local arrays have them here, where a GPU's are contiguous."""
    return kind.copy(layout="A") if isinstance(kind, types.Array) else kind
