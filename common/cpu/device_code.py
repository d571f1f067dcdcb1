"""Device functions of a kernel: each a module of its own with all that it calls, compiled once and kept.

Type inference and the kernel's own compilation use the same compiled function, and kernels with equal device functions
share it. Equal means: of the same text, once the names that the front end has numbered are numbered anew.
"""

import ast

import numba
from numba.core import types

from . import machine_code
from .analysis import copy_expr
from .resolve import HIDDEN

_namespaces = {}  # name of a device module -> its namespace


class DeviceModule:
    """The text of one device function, ``entry``, and of all that it calls.

    signatures: {function: its explicit ones}. modules: see `Program`.
    """

    def __init__(self, text, entry, signatures, modules):
        self.text, self.entry, self.signatures, self.modules = text, entry, signatures, tuple(modules)
        self.name = machine_code.name_of(f"dev{entry}", repr((text, sorted(signatures.items()))), self.modules)

    def dispatcher(self):
        """What generated code calls: the function, compiled for its explicit signatures or as calls need it."""
        if self.name not in _namespaces:
            code = compile(self.text, f"<{self.name}>", "exec")
            _namespaces[self.name] = self._run(code, lambda f, key: machine_code.kept(f, lambda: f"{self.name}.{key}"))
        return _namespaces[self.name][self.entry]

    def fresh_dispatcher(self, trees):
        """The same, compiled from the trees of the source, so that Numba's errors have the lines of the source."""
        head = ast.parse(self.text)
        head.body = [stmt for stmt in head.body if not isinstance(stmt, ast.FunctionDef)]
        names = self._run(compile(head, "<device functions>", "exec"), None)
        for tree in trees:
            exec(compile(ast.Module([tree], []), tree.filename, "exec"), names)
            names[tree.name] = self._jit(names[tree.name])
        return names[self.entry]

    def _run(self, code, keep):
        def device(function):
            dispatcher = self._jit(function)
            return keep(dispatcher, function.__name__) if keep else dispatcher

        names = {"__name__": self.name, "_device": device}
        exec(code, names)
        for key, signatures in self.signatures.items():
            for given in signatures if key in names else ():
                names[key].compile(given)
            if key in names:
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
    order, consts = [], {}

    def visit(key):
        if key in order:
            return
        order.append(key)
        for node in ast.walk(program.device[key]):
            if isinstance(node, ast.Name):
                if node.id in program.device:
                    visit(node.id)
                elif node.id in program.consts:
                    consts.setdefault(node.id, f"_k{len(consts)}")

    visit(entry)
    names = {key: f"_d{i}_{key.partition('_')[2].partition('_')[2]}" for i, key in enumerate(order)} | consts
    trees = []
    for key in reversed(order):
        tree = copy_expr(program.device[key])
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                node.id = names.get(node.id, node.id)
        tree.name, tree.filename = names[key], program.device[key].filename
        trees.append(tree)
    return trees, names


def _module(program, entry):
    trees, names = module_trees(program, entry)
    lines = ['"""Device functions: generated, do not edit."""', "from common.cpu.runtime import *", ""]
    lines += [f"{names[key]} = {text}" for key, text in program.consts.items() if key in names]
    for tree in trees:
        lines += ["", "", "@_device", ast.unparse(tree)]
    signatures = {}
    for function, key in program.device_names.items():
        if key in names and function in program.names.signatures:
            hidden = (types.int64,) * (len(HIDDEN) if program.traits(function)[1] else 0)
            given = program.names.signatures[function]
            signatures[names[key]] = [(*s.args, *hidden) if s.return_type is None else s.return_type(*s.args, *hidden)
                                      for s in given]  # fmt: skip
    return DeviceModule("\n".join([*lines, ""]), names[entry], signatures, program.modules)
