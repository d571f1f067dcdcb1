"""What is known of each variable before code is emitted.

``varying``    values that may differ between the threads of a block (all others are computed once)
``nonneg``     integers that are never negative, so that an index made of them needs no wrap-around test
``remat``      thread-dependent values cheap enough to be computed again wherever they are needed
               (``row = blockIdx.y * 16 + threadIdx.y``) instead of being stored for every thread

All of it is about speed, except that a variable is only treated as equal in all threads when that is proven.
"""

import ast

from .tree import bodies

BASES = {"_tx", "_ty", "_tz", "_lane", "_warp", "_tid"}
UNIFORM = {"_bx", "_by", "_bz", "_gx", "_gy", "_gz", "_ox", "_oy", "_oz"}
PURE = (ast.BinOp, ast.UnaryOp, ast.Name, ast.Constant, ast.operator, ast.unaryop, ast.expr_context)
CONTROL = (ast.If, ast.For, ast.While)


def loads(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def stores(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def special(stmt):
    """``'B'`` or ``'W'`` if the statement itself is a block or warp collective, else None."""
    value = getattr(stmt, "value", None)
    return getattr(value, "special", None) if isinstance(stmt, (ast.Assign, ast.Expr)) else None


class Definition:
    """One assignment of a variable: its value (None for a loop variable), and where it stands."""

    def __init__(self, stmt, value, path):
        self.stmt, self.value = stmt, value
        self.path = path  # ((statement list, index, control statement that holds the list), ...), outermost first

    @property
    def controls(self):
        return [c for _, _, c in self.path if c is not None]

    @property
    def loops(self):
        held = [c for c in self.controls if isinstance(c, (ast.For, ast.While))]
        return held + ([self.stmt] if isinstance(self.stmt, ast.For) else [])


class Analysis:
    """Facts about a kernel body in normal form with one name per value."""

    def __init__(
        self, body, params, arrays, local, block_dim, nonneg_params, returns_diverge=False, loads_vary=False
    ):
        self.body, self.params = body, set(params)
        self.arrays = set(arrays)  # parameters that are arrays, shared arrays, constants
        self.local = set(local)
        self.block_dim = block_dim
        self.threads = block_dim[0] * block_dim[1] * block_dim[2]
        self.returns_diverge, self.loads_vary = returns_diverge, loads_vary
        self.definitions, self.uses, self.occurrences = {}, {}, {}
        self.order = {}
        self._collect(body, ())
        self.names_in = {}  # id(stmt) -> names below it; computed on demand
        self.varying = set()
        self._find_varying()
        self.nonneg = set()
        self._find_nonneg(nonneg_params)
        self.remat = {}
        self._find_remat()

    # -- collection -----------------------------------------------------------------------------------------
    def _collect(self, stmts, path, control=None):
        for i, stmt in enumerate(stmts):
            here = (*path, (stmts, i, control))
            self.order[id(stmt)] = here
            if isinstance(stmt, ast.Assign):
                for n in ast.walk(stmt.targets[0]):
                    if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
                        self.definitions.setdefault(n.id, []).append(Definition(stmt, stmt.value, here))
            elif isinstance(stmt, ast.For):
                self.definitions.setdefault(stmt.target.id, []).append(Definition(stmt, None, here))
            for n in self._own_names(stmt):
                self.occurrences.setdefault(n.id, set()).add(id(n))
                if isinstance(n.ctx, ast.Load):
                    self.uses.setdefault(n.id, []).append(here)
            for sub in bodies(stmt):
                self._collect(sub, here, stmt)

    @staticmethod
    def _own_names(stmt):
        """Names of a statement, without those of the statements inside it."""
        if isinstance(stmt, ast.If) or isinstance(stmt, ast.While):
            roots = [stmt.test]
        elif isinstance(stmt, ast.For):
            roots = [stmt.target, stmt.iter]
        else:
            roots = [stmt]
        return [n for r in roots for n in ast.walk(r) if isinstance(n, ast.Name)]

    def inside(self, name, stmt):
        """Is every occurrence of a variable inside ``stmt`` (a node or a list of nodes)?"""
        roots = stmt if isinstance(stmt, list) else [stmt]
        key = tuple(map(id, roots))
        if key not in self.names_in:  # the roots are kept too, so that their ids stay theirs
            self.names_in[key] = roots, {id(n) for r in roots for n in ast.walk(r) if isinstance(n, ast.Name)}
        return self.occurrences.get(name, set()) <= self.names_in[key][1]

    def warp_constant(self, node):
        """Is an expression the same for all lanes of each warp?"""
        bx, by, bz = self.block_dim
        constant = {"_warp"} | ({"_ty", "_tz"} if bx % 32 == 0 else set())
        e = self.expand(node)
        if any(isinstance(n, (ast.Subscript, ast.Call)) for n in ast.walk(e)):
            return self.uniform(node)
        return not loads(e) & ((BASES - constant) | self.varying | self.local)

    # -- varying --------------------------------------------------------------------------------------------
    def uniform(self, node):
        """Is an expression the same in all threads of the block (that evaluate it)?"""
        if getattr(node, "special", None) == "B":
            return True  # the result of a barrier with a vote
        for n in ast.walk(node):
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load):
                if n.id in self.varying or n.id in BASES or n.id in self.local:
                    return False
            elif isinstance(n, ast.Call):
                callee = n.func.id if isinstance(n.func, ast.Name) else ""
                if getattr(n, "special", None) or callee.startswith("_atomic_"):
                    return False
                if any(isinstance(a, ast.Name) and a.id in self.arrays for a in n.args):
                    if callee != "len":
                        return False
            elif (
                isinstance(n, ast.Subscript)
                and (self.returns_diverge or self.loads_vary)
                and not isinstance(n.value, (ast.Attribute, ast.Tuple))
            ):
                return False  # all threads may have returned: then nobody may load; or each load is looked at
        return True

    def uniform_control(self, stmt):
        """May the statement's control flow be decided once for the block?"""
        if isinstance(stmt, ast.If):
            return self.uniform(stmt.test)
        if isinstance(stmt, ast.While):
            return self.uniform(stmt.test) and not self.diverging_exit(stmt) and not self.spins(stmt)
        return all(map(self.uniform, stmt.iter.args)) and not self.diverging_exit(stmt)

    def spins(self, stmt):
        """Does a while loop read global memory in its condition? It may wait for another thread: each thread goes its
        own rounds, one thread after the other, and so has its own copy of all that changes in them."""
        return isinstance(stmt, ast.While) and any(
            isinstance(n, ast.Subscript)
            and isinstance(n.value, ast.Name)
            and n.value.id in self.params
            or isinstance(n, ast.Call)
            and isinstance(n.func, ast.Name)
            and n.func.id.startswith("_atomic_")
            for n in ast.walk(stmt.test)
        )

    def diverging_exit(self, loop):
        """Does a break, continue or return of this loop hang on a condition that differs between threads?"""

        def search(stmts, diverged, depth):
            for s in stmts:
                if diverged and (isinstance(s, ast.Return) or isinstance(s, (ast.Break, ast.Continue)) and depth == 0):
                    return True
                if isinstance(s, CONTROL):
                    inner = diverged or isinstance(s, ast.If) and not self.uniform(s.test)
                    deeper = depth + (not isinstance(s, ast.If))
                    if any(search(b, inner, deeper) for b in bodies(s)):
                        return True
            return False

        return search(loop.body, False, 0)

    def _find_varying(self):
        changed = True
        while changed:
            changed = False
            for var, defs in self.definitions.items():
                if var not in self.varying and any(self._varies(var, d) for d in defs):
                    self.varying.add(var)
                    changed = True

    def _varies(self, var, definition):
        if definition.value is not None and not self.uniform(definition.value):
            return True
        if definition.value is None and not self.uniform_control(definition.stmt):
            return True
        # A value set by some threads only is the same for those; it matters where others can see it.
        for control in definition.controls:
            if not self.uniform_control(control) and (not self.inside(var, control) or self.carried(var, control)):
                return True
        return False

    def carried(self, var, control):
        """Can a value of ``var`` from before ``control`` (or its last round) be read inside it?"""
        return any(var in exposed(b) for b in bodies(control))

    # -- sign -----------------------------------------------------------------------------------------------
    def _find_nonneg(self, nonneg_params):
        self.recursive = self._recursive()
        self.nonneg = set(self.definitions) | set(nonneg_params)
        changed = True
        while changed:
            changed = False
            for var, defs in self.definitions.items():
                if var in self.nonneg and not all(self._definition_nonneg(d) for d in defs):
                    self.nonneg.discard(var)
                    changed = True

    def _recursive(self):
        """Variables whose value depends on their own earlier value."""
        depends = {
            v: set().union(*(loads(d.value) if d.value is not None else loads(d.stmt.iter) for d in defs))
            for v, defs in self.definitions.items()
        }
        result = set()
        for v in depends:
            seen, todo = set(), list(depends[v])
            while todo:
                w = todo.pop()
                if w not in seen:
                    seen.add(w)
                    todo += depends.get(w, ())
            if v in seen:
                result.add(v)
        return result

    def _definition_nonneg(self, d):
        if d.value is not None:
            return self.is_nonneg(d.value) if isinstance(d.stmt.targets[0], ast.Name) else False
        args = d.stmt.iter.args
        if len(args) == 3:
            step = args[2]
            if isinstance(step, ast.UnaryOp) and isinstance(step.op, ast.USub):  # counting down
                stop = args[1]
                minus_one = isinstance(stop, ast.UnaryOp) and ast.unparse(stop) == "-1"
                return minus_one or self.is_nonneg(stop)
            return self.is_nonneg(args[0]) and self.is_nonneg(step)
        return True if len(args) == 1 else self.is_nonneg(args[0])

    def is_nonneg(self, e):
        if isinstance(e, ast.Constant):
            return type(e.value) is int and e.value >= 0
        if isinstance(e, ast.Name):
            return e.id in self.nonneg or e.id in BASES or e.id in UNIFORM
        if isinstance(e, ast.Attribute):
            return e.attr == "size"
        if isinstance(e, ast.Subscript) and isinstance(e.value, ast.Tuple):
            return all(map(self.is_nonneg, e.value.elts))
        if isinstance(e, ast.Subscript):
            return isinstance(e.value, ast.Attribute) and e.value.attr == "shape"
        if isinstance(e, ast.IfExp):
            return self.is_nonneg(e.body) and self.is_nonneg(e.orelse)
        if isinstance(e, ast.Call) and isinstance(e.func, ast.Name):
            if e.func.id == "len":
                return True
            signs = [self.is_nonneg(a) for a in e.args]
            if e.func.id in ("min", "_b_min"):
                return all(signs)
            return any(signs) if e.func.id in ("max", "_b_max") else False
        if not isinstance(e, ast.BinOp):
            return False
        left, right = self.is_nonneg(e.left), self.is_nonneg(e.right)
        if isinstance(e.op, ast.BitAnd):
            return (
                left
                and isinstance(e.left, ast.Constant)
                or right
                and isinstance(e.right, ast.Constant)
                or left
                and right
            )
        if not (left and right):
            return False
        grows = [bool(loads(x) & self.recursive) for x in (e.left, e.right)]
        if isinstance(e.op, ast.Add):
            return not all(grows)
        if isinstance(e.op, (ast.Mult, ast.LShift)):  # could overflow if it feeds on itself
            return not any(grows)
        return isinstance(e.op, (ast.FloorDiv, ast.Mod, ast.RShift, ast.BitOr, ast.BitXor))

    # -- rematerialisation ----------------------------------------------------------------------------------
    def _find_remat(self):
        changed = True
        while changed:
            changed = False
            for var in self.varying:
                if var in self.remat or len(self.definitions[var]) != 1:
                    continue
                d = self.definitions[var][0]
                if d.value is None or not isinstance(d.stmt.targets[0], ast.Name) or not self._pure(d.value):
                    continue
                if not all(self._dominates(d.path, u) for u in self.uses.get(var, ())):
                    continue
                expanded = self.expand(d.value)
                if sum(1 for _ in ast.walk(expanded)) > 60:
                    continue
                if all(self._stable(u, d, var) for u in loads(expanded) - BASES - UNIFORM):
                    self.remat[var] = self._warp_form(expanded)
                    changed = True

    def _pure(self, e):
        if isinstance(e, ast.Subscript) and isinstance(e.value, ast.Attribute) and e.value.attr == "shape":
            return isinstance(e.slice, ast.Constant) and isinstance(e.value.value, ast.Name)  # and not of a part
        if isinstance(e, ast.Name):
            return e.id not in self.varying or e.id in self.remat
        if isinstance(e, ast.BinOp):
            integer = isinstance(
                e.op, (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.BitAnd, ast.RShift, ast.LShift)
            )
            return integer and self._pure(e.left) and self._pure(e.right)
        return isinstance(e, ast.Constant) and type(e.value) is int

    @staticmethod
    def _dominates(path, use):
        """Does every way to ``use`` pass the definition at ``path``? (Same list, further down, at any depth.)"""
        stmts, index, _ = path[-1]
        return any(held is stmts and i > index for held, i, _ in use)

    def _stable(self, u, d, var):
        """Is ``u`` the same at every use of ``var`` as it was at ``var``'s definition ``d``?"""
        if u in self.params or u in self.arrays:
            return True
        defs = self.definitions.get(u, ())
        if len(defs) != 1:
            return False
        if defs[0].value is not None and not self._dominates(defs[0].path, d.path):
            return False
        return all(
            all(any(c is loop for _, _, c in use) for use in self.uses.get(var, ())) for loop in defs[0].loops
        )  # fmt: skip

    def expand(self, node):
        """``node`` with rematerialised variables replaced by what they stand for."""
        return self._warp_form(_Expand(self.remat).visit(copy_expr(node)))

    # -- linear forms ---------------------------------------------------------------------------------------
    def linear(self, e):
        """``{base: integer coefficient}`` of an expanded expression; None if it is not linear in the thread."""
        if isinstance(e, ast.Name) and e.id in BASES:
            return {e.id: 1}
        if not loads(e) & (BASES | self.varying | self.local) and self.uniform(e):
            return {}
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Add):
            a, b = self.linear(e.left), self.linear(e.right)
            return None if a is None or b is None else {k: a.get(k, 0) + b.get(k, 0) for k in a.keys() | b.keys()}
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Sub):
            a, b = self.linear(e.left), self.linear(e.right)
            return a if a is not None and b == {} else None
        if isinstance(e, ast.BinOp) and isinstance(e.op, ast.Mult):
            for x, c in ((e.left, e.right), (e.right, e.left)):
                if isinstance(c, ast.Constant) and type(c.value) is int:
                    a = self.linear(x)
                    return None if a is None else {k: v * c.value for k, v in a.items()}
        return None

    def _is_thread_id(self, e):
        """Is an expression the linear thread index of the block (and nothing else)?"""
        form = self.linear(e)
        bx, by, bz = self.block_dim
        want = {k: v for k, v, extent in (("_tx", 1, bx), ("_ty", bx, by), ("_tz", bx * by, bz)) if extent > 1}
        return form is not None and form == want and loads(e) <= BASES

    def _warp_form(self, e):
        """Spell ``tid // 32`` as ``_warp`` and ``tid % 32`` as ``_lane``: then both are known per warp."""
        analysis = self

        class Rewrite(ast.NodeTransformer):
            def visit_BinOp(self, node):
                self.generic_visit(node)
                if not isinstance(node.right, ast.Constant):
                    return node
                pair = (type(node.op), node.right.value)
                divides = pair in ((ast.FloorDiv, 32), (ast.RShift, 5))
                wraps = pair in ((ast.Mod, 32), (ast.BitAnd, 31))
                if not (divides or wraps):
                    return node
                if analysis._is_thread_id(node.left):
                    return ast.copy_location(ast.Name("_warp" if divides else "_lane", ast.Load()), node)
                x = node.left
                ids = (
                    isinstance(x, ast.BinOp)
                    and isinstance(x.op, ast.Add)
                    and {ast.unparse(x.left), ast.unparse(x.right)}
                )
                if ids == {"_ox", "_tx"} and analysis.block_dim[0] % 32 == 0 and analysis.block_dim[1:] == (1, 1):
                    text = "(_ox >> 5) + _warp" if divides else "_lane"
                    return ast.copy_location(ast.parse(text, mode="eval").body, node)
                return node

        return Rewrite().visit(e)


class _Expand(ast.NodeTransformer):
    def __init__(self, table):
        self.table = table

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and node.id in self.table:
            return copy_expr(self.table[node.id])
        return node


def copy_expr(node):
    """A deep copy of an expression that keeps positions and marks."""
    if not isinstance(node, ast.AST):
        return node
    new = type(node)()
    for field in node._fields:
        value = getattr(node, field, None)
        setattr(new, field, [copy_expr(v) for v in value] if isinstance(value, list) else copy_expr(value))
    for attr in ("lineno", "col_offset", "end_lineno", "end_col_offset", "special", "registered", "filename"):
        if hasattr(node, attr):
            setattr(new, attr, getattr(node, attr))
    return new


def exposed(stmts):
    """Variables that may be read in ``stmts`` before they are assigned there."""
    seen = set()
    _exposed(stmts, set(), seen)
    return seen


def _exposed(stmts, assigned, seen):
    """Adds to ``seen``; returns what is surely assigned after ``stmts`` (None: the end is never reached)."""
    for stmt in stmts:
        if isinstance(stmt, ast.If):
            seen |= loads(stmt.test) - assigned
            ends = [_exposed(b, set(assigned), seen) for b in (stmt.body, stmt.orelse)]
            ends = [e for e in ends if e is not None]
            if not ends:
                return None
            assigned = set.intersection(*ends)
        elif isinstance(stmt, ast.For):
            seen |= loads(stmt.iter) - assigned
            _exposed(stmt.body, assigned | {stmt.target.id}, seen)
        elif isinstance(stmt, ast.While):
            seen |= loads(stmt.test) - assigned
            _exposed(stmt.body, set(assigned), seen)
        elif isinstance(stmt, (ast.Break, ast.Continue, ast.Return)):
            return None
        else:
            seen |= loads(stmt) - assigned
            if isinstance(stmt, ast.Assign):
                assigned |= stores(stmt.targets[0])
    return assigned
