"""One name per value: renames variables by def-use webs.

A name that is first an int and later a float would unify to float64 in Numba and then fail as an index.
A *web* is a set of definitions that reach a common use; each web gets a name of its own. Reaching definitions
are found by walking the structured AST forwards; loops are walked until nothing changes.
"""

import ast

from .errors import CompileError

UNREACHABLE = None


class _Webs:
    def __init__(self, params, filename):
        self.filename = filename
        self.parent = {}  # union-find over definition ids
        self.order = []  # definition ids in order of appearance
        self.nodes = {}  # definition id -> (name, [Name nodes])
        self.use_of = {}  # id(Name load) -> definition id (any one of its web)
        self.uses = []
        self.loops = []
        for p in params:
            self.define(("param", p), p)

    def define(self, key, identifier, node=None):
        if key not in self.parent:
            self.parent[key] = key
            self.order.append(key)
            self.nodes[key] = (identifier, [node] if node is not None else [])
        return key

    def find(self, key):
        while self.parent[key] != key:
            self.parent[key] = self.parent[self.parent[key]]
            key = self.parent[key]
        return key

    def read(self, node, state, undefined):
        """All names loaded in an expression."""
        for sub in ast.walk(node):
            if isinstance(sub, ast.Name) and isinstance(sub.ctx, ast.Load) and sub.id in self.variables:
                reaching = state.get(sub.id)
                if not reaching:
                    undefined.setdefault(id(sub), sub)
                    continue
                undefined.pop(id(sub), None)
                first, *rest = reaching
                if id(sub) not in self.use_of:
                    self.uses.append(sub)
                    self.use_of[id(sub)] = first
                for other in [self.use_of[id(sub)], *rest]:
                    self.parent[self.find(other)] = self.find(first)

    def write(self, target, state):
        for sub in ast.walk(target):
            if isinstance(sub, ast.Name) and isinstance(sub.ctx, ast.Store):
                state[sub.id] = frozenset([self.define(id(sub), sub.id, sub)])

    def block(self, stmts, state, undefined):
        for i, stmt in enumerate(stmts):
            if state is UNREACHABLE:
                del stmts[i:]  # code after break, continue or return never runs
                return state
            state = self.statement(stmt, state, undefined)
        return state

    def statement(self, stmt, state, undefined):
        if isinstance(stmt, ast.Assign):
            self.read(stmt.value, state, undefined)
            self.read(stmt.targets[0], state, undefined)
            state = dict(state)
            self.write(stmt.targets[0], state)
        elif isinstance(stmt, ast.AugAssign):
            self.read(stmt.value, state, undefined)
            self.read(stmt.target, state, undefined)
        elif isinstance(stmt, ast.Expr):
            self.read(stmt.value, state, undefined)
        elif isinstance(stmt, ast.If):
            self.read(stmt.test, state, undefined)
            then = self.block(stmt.body, dict(state), undefined)
            other = self.block(stmt.orelse, dict(state), undefined)
            state = merge(then, other)
        elif isinstance(stmt, (ast.For, ast.While)):
            state = self.loop(stmt, state, undefined)
        elif isinstance(stmt, ast.Break):
            self.loops[-1]["break"].append(state)
            return UNREACHABLE
        elif isinstance(stmt, ast.Continue):
            self.loops[-1]["continue"].append(state)
            return UNREACHABLE
        elif isinstance(stmt, ast.Return):
            return UNREACHABLE
        return state

    def loop(self, stmt, state, undefined):
        is_for = isinstance(stmt, ast.For)
        if is_for:
            self.read(stmt.iter, state, undefined)
        head = dict(state)
        forever = not is_for and isinstance(stmt.test, ast.Constant) and stmt.test.value
        while True:
            frame = {"break": [], "continue": []}
            self.loops.append(frame)
            inner = dict(head)
            if is_for:
                self.write(stmt.target, inner)
            else:
                self.read(stmt.test, inner, undefined)
            end = self.block(stmt.body, inner, undefined)
            self.loops.pop()
            back = end
            for other in frame["continue"]:
                back = merge(back, other)
            new = merge(head, back)
            if new == head:
                break
            head = new
        out = UNREACHABLE if forever else head
        for other in frame["break"]:
            out = merge(out, other)
        return out


def merge(a, b):
    if a is UNREACHABLE or b is UNREACHABLE:
        return b if a is UNREACHABLE else a
    return {k: a.get(k, frozenset()) | b.get(k, frozenset()) for k in a.keys() | b.keys()}


def rename_webs(params, body, taken, filename):
    """Rename in place so that each web has its own name. ``taken``: names that are not variables.

    Returns the set of all variable names (parameters included). Raises CompileError for a variable that is
    read where no assignment can have reached it.
    """
    webs = _Webs(params, filename)
    stores = [n for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    webs.variables = {n.id for n in stores} | set(params)
    undefined = {}
    webs.block(body, {p: frozenset([("param", p)]) for p in params}, undefined)
    for node in undefined.values():
        if id(node) not in webs.use_of:
            raise CompileError(
                f"{node.id} is read before anything is assigned to it",
                filename,
                node.lineno,
                f"assign {node.id} on every way to this line",
            )
    names, used = {}, set(taken) | set(params)
    for p in params:
        names[webs.find(("param", p))] = p
    counts = {}
    for key in webs.order:
        root = webs.find(key)
        if root in names:
            continue
        identifier = webs.nodes[key][0]
        candidate = identifier
        while candidate in used:
            counts[identifier] = counts.get(identifier, 1) + 1
            candidate = f"{identifier}_{counts[identifier]}"
        used.add(candidate)
        names[root] = candidate
    for key in webs.order:
        for node in webs.nodes[key][1]:
            node.id = names[webs.find(key)]
    for node in webs.uses:
        node.id = names[webs.find(webs.use_of[id(node)])]
    return set(names.values())
