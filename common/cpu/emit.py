"""Fission: from a kernel body in normal form to a plain Python function that Numba compiles.

Three levels of code are written::

    block     barriers stand between regions; control flow around barriers must agree in all threads
    group     a region walks the block group by group (a warp or a row); loops and branches that are the same for
              the whole group stand here, and shuffles and votes are carried out here
    lane      everything else, inside `for lane in …`: one thread's code

A value that lives from one lane loop to another is kept for every thread in an array ``a_name[thread]``.
Divergent branches around shuffles run under masks, as on a GPU.
"""

import ast

from .analysis import Analysis, copy_expr, exposed, loads, special, stores
from .errors import CompileError
from .frontend import at, bodies, name
from .groups import choose_group

LANE_BASES = {"_tx", "_ty", "_tz", "_lane", "_warp", "_tid"}
SPIN_LIMIT = 1 << 32
STACK_BUDGET = 1 << 19  # bytes of arrays on the stack of a worker; larger ones go to the heap


def contains(stmt, kinds):
    """Does a statement (or list) contain a collective of one of ``kinds`` ('B', 'W')?"""
    roots = stmt if isinstance(stmt, list) else [stmt]
    return any((special(s) or "-") in kinds for r in roots for s in ast.walk(r) if isinstance(s, (ast.Assign, ast.Expr)))


def has_exit(stmt, kinds=(ast.Break, ast.Continue)):
    """Does it contain a break or continue that leaves a loop around it?"""
    if isinstance(stmt, kinds):
        return True
    if isinstance(stmt, ast.If):
        return any(has_exit(s, kinds) for b in bodies(stmt) for s in b)
    return False


def has_return(stmt):
    return any(isinstance(n, ast.Return) for n in ast.walk(stmt))


def fold_exits(stmts, last=False, analysis=None):
    """``if c: return`` (or continue) before statements without barriers becomes ``if c: … else: those``.

    In place; True if anything changed. ``last``: nothing follows the list, so a trailing return in it can go.
    A return before a shuffle stays, since lanes that have exited count differently from lanes that wait,
    unless ``analysis`` shows that whole warps return.
    """
    changed = False
    for i, stmt in enumerate(stmts):
        rest = stmts[i + 1 :]
        if isinstance(stmt, (ast.For, ast.While)):
            changed |= fold_exits(stmt.body, "loop", analysis)
        if not isinstance(stmt, ast.If):
            continue
        kind = {True: ast.Return, "loop": ast.Continue}.get(last)
        stays = "B" if kind is ast.Continue or analysis and analysis.warp_constant(stmt.test) else "BW"
        if kind and not contains(rest, stays):
            for own, other in ((stmt.body, stmt.orelse), (stmt.orelse, stmt.body)):
                if own and isinstance(own[-1], kind):
                    changed = True
                    del own[-1]
                    other.extend(rest)
                    del stmts[i + 1 :]
                    if not stmt.body:
                        stmt.body.append(at(ast.Pass(), stmt))
                    break
        follows = last if i == len(stmts) - 1 else False
        changed |= fold_exits(stmt.body, follows, analysis)
        changed |= fold_exits(stmt.orelse, follows, analysis)
        if i >= len(stmts) - 1:
            break
    if stmts and last and isinstance(stmts[-1], {True: ast.Return, "loop": ast.Continue}[last]):
        stmts[-1] = at(ast.Pass(), stmts[-1])
        changed = True
    return changed


def desugar_loops(stmts, analysis, program):
    """A ``for`` around a collective whose range differs between threads becomes a ``while``. In place; True if any."""
    changed = False
    out = []
    for stmt in stmts:
        for b in bodies(stmt):
            changed |= desugar_loops(b, analysis, program)
        if isinstance(stmt, ast.For) and contains(stmt, "BW") and not analysis.uniform_control(stmt):
            args = stmt.iter.args
            start, stop = (ast.Constant(0), args[0]) if len(args) == 1 else args[:2]
            step = args[2] if len(args) == 3 else ast.Constant(1)
            i, end, by = (program.fresh(s) for s in ("it", "end", "by"))
            text = f"{i} < {end}"
            if isinstance(step, ast.UnaryOp) and isinstance(step.op, ast.USub):
                text = f"{i} > {end}"
            elif not analysis.is_nonneg(step):
                text = f"({by} > 0 and {i} < {end}) or ({by} < 0 and {i} > {end})"
            body = [
                ast.Assign([name(stmt.target.id, ast.Store())], name(i)),
                ast.Assign([name(i, ast.Store())], ast.BinOp(name(i), ast.Add(), name(by))),
            ]
            loop = ast.While(ast.parse(text, mode="eval").body, body + stmt.body, [])
            new = [ast.Assign([name(n, ast.Store())], v) for n, v in ((i, start), (end, stop), (by, step))] + [loop]
            out += [ast.fix_missing_locations(at(ast.copy_location(n, stmt), stmt)) for n in new]
            changed = True
        else:
            out.append(stmt)
    stmts[:] = out
    return changed


class Context:
    """Where code is being written: the group, the masks in force, the kind of the innermost group-level loop."""

    def __init__(self, group, masks=(), loop=None):
        self.group, self.masks, self.loop = group, tuple(masks), loop

    def but(self, **changes):
        return Context(**{"group": self.group, "masks": self.masks, "loop": self.loop, **changes})


class Emitter:
    """Writes the generated function of one kernel. ``types``: variable -> Numba type."""

    def __init__(self, program, analysis, types, check=False):
        self.p, self.a, self.types, self.check = program, analysis, types, check
        self.lines, self.depth = [], 0
        self.stored = {}  # variable -> name of its per-thread array
        self.scratch = {}  # name -> (shape text, dtype text, bytes)
        self.sites = []  # (filename, line, what, mend) of every place that can fail
        self.remat = dict(analysis.remat)
        self.alive = analysis.returns_diverge
        self.scalars = set()
        self.need = set()
        self.lane_level = False
        self.counter = 0
        self.block_loops = 0
        # variables that some path reads before it assigns them (never in a valid run), or that groups carry
        self.preset = {v for v in exposed(program.body) if v in analysis.definitions and v not in analysis.varying}

    # -- writing --------------------------------------------------------------------------------------------
    def emit(self, text, extra=0):
        self.lines.append("    " * (self.depth + extra) + text)

    def fresh(self, stem):
        self.counter += 1
        return f"_{stem}{self.counter}"

    def buffer(self, stem, shape, dtype, nbytes):
        key = self.fresh(stem)
        self.scratch[key] = (shape, dtype, nbytes)
        return key

    def site(self, node, what, mend):
        self.sites.append((self.p.filename, getattr(node, "lineno", 0), what, mend))
        return len(self.sites) - 1

    def fail(self, condition, node, what, mend, thread="0"):
        """Emit: if ``condition``, report an error at ``node``'s line and stop."""
        site = self.site(node, what, mend)
        self.emit(f"if {condition}:")
        self.emit(f"    _report(_err, {site}, _bx, _by, _bz, {thread})")
        self.emit("    return")

    # -- expressions ----------------------------------------------------------------------------------------
    def expr(self, node):
        """Source text of an expression at the present level."""
        node = copy_expr(node) if self.lane_level else self.expand(node)
        return ast.unparse(ast.fix_missing_locations(_Writer(self).visit(node)))

    def expand(self, node):
        keep, self.a.remat = self.a.remat, self.remat
        node = self.a.expand(node)
        self.a.remat = keep
        return node

    def dtype_text(self, var):
        kind = self.types[var]
        if not hasattr(kind, "bitwidth") and kind.name not in ("bool", "boolean"):
            d = self.a.definitions[var][0]
            raise CompileError(f"{var} is a {kind} and lives across a barrier, shuffle or loop", self.p.filename,
                               d.stmt.lineno, "use its parts (numbers) instead, or index the array where it is needed")  # fmt: skip
        return "numba.types." + ("boolean" if kind.name in ("bool", "boolean") else kind.name)

    def size_of(self, var):
        return max(1, getattr(self.types[var], "bitwidth", 8) // 8)

    def storage(self, var):
        """Text of the per-thread array element of a variable."""
        if var not in self.stored:
            self.stored[var] = key = f"a_{var.lstrip('_')}" if not var.startswith("_") else f"a{var}"
            self.scratch[key] = (str(self.a.threads), self.dtype_text(var), self.a.threads * self.size_of(var))
        return self.stored[var]

    def in_place(self, var):
        """Is a variable an ordinary local of the generated function here?"""
        return var not in self.a.varying or var in self.scalars

    # -- block level ----------------------------------------------------------------------------------------
    def block(self, stmts):
        region = []
        for stmt in stmts:
            if not self.is_block_level(stmt):
                if self.uniform_tree(stmt) and self.movable(stmt, region):
                    self.scalar([stmt], None, 0)  # the same for the whole block: computed once
                else:
                    region.append(stmt)
                continue
            self.region(region)
            region = []
            self.block_statement(stmt)
        self.region(region)

    def is_block_level(self, stmt):
        if contains(stmt, "B"):
            return True
        if isinstance(stmt, ast.Return):
            return True
        if has_return(stmt) and not _diverging_return([stmt], self.a):
            return True
        return self.block_loops > 0 and has_exit(stmt)

    def block_statement(self, stmt):
        if isinstance(stmt, (ast.Assign, ast.Expr)):
            return self.barrier(stmt)
        if isinstance(stmt, ast.If):
            return self.block_if(stmt)
        if isinstance(stmt, ast.Return):
            if self.block_loops:
                self.emit("_done = True")
                self.emit("break")
            else:
                self.emit("continue")
            return None
        if isinstance(stmt, (ast.Break, ast.Continue)):
            return self.emit("break" if isinstance(stmt, ast.Break) else "continue")
        if isinstance(stmt, ast.For):
            args = ", ".join(self.expr(a) for a in stmt.iter.args)
            self.emit(f"for {stmt.target.id} in range({args}):")
            self.block_body(stmt.body, loop=True)
        else:
            self.emit("while True:")
            self.depth += 1
            if not (isinstance(stmt.test, ast.Constant) and stmt.test.value):
                if self.a.uniform(stmt.test):
                    self.emit(f"if not ({self.expr(stmt.test)}):")
                else:
                    count, total = self.agree(stmt, stmt.test, "this loop contains a barrier, and its condition")
                    self.emit(f"if {count} == 0:")
                self.emit("    break")
            self.depth -= 1
            self.block_body(stmt.body, loop=True)
        if any(has_return(s) for s in stmt.body):
            self.emit("if _done:")
            self.emit("    continue" if self.block_loops == 0 else "    break")

    def block_body(self, stmts, loop=False):
        self.depth += 1
        self.block_loops += loop
        before = len(self.lines)
        self.block(stmts)
        if len(self.lines) == before:
            self.emit("pass")
        self.block_loops -= loop
        self.depth -= 1

    def block_if(self, stmt):
        if self.a.uniform(stmt.test):
            self.emit(f"if {self.expr(stmt.test)}:")
        else:
            what = "this branch contains a barrier, and its condition"
            if not contains(stmt, "B"):
                what = "this branch leaves a loop with a barrier in it, and its condition"
            count, total = self.agree(stmt, stmt.test, what)
            self.emit(f"if {count} > 0:")
        self.block_body(stmt.body)
        if stmt.orelse:
            self.emit("else:" if self.a.uniform(stmt.test) else f"elif {total} > 0:")
            self.block_body(stmt.orelse)

    def agree(self, stmt, test, what):
        """Emit a vote of all threads on ``test``; fails unless they agree. Returns (yes votes, voters)."""
        count, total = self.fresh("yes"), self.fresh("all")
        group = choose_group(self.a.block_dim, False, False)
        self.emit(f"{count} = 0")
        self.emit(f"{total} = 0")
        with_levels = group.open(self.emit)
        self.depth += with_levels
        self.lanes(Context(group, ("_alive",) if self.alive else ()), lambda: self.vote(test, count, total))
        self.depth -= with_levels
        self.fail(f"{count} != 0 and {count} != {total}", stmt, f"{what} is true for some threads of the block and false "
                  "for others: they would wait for each other forever on a GPU",
                  "move the barrier out of the branch, so that every thread of the block reaches it")  # fmt: skip
        return count, total

    def vote(self, test, count, total):
        self.emit(f"{total} += 1")
        self.emit(f"if {self.expr(test)}:")
        self.emit(f"    {count} += 1")

    def barrier(self, stmt):
        node, kind = stmt.value, stmt.value.func.id
        if kind == "_c_syncthreads":
            return self.emit("pass  # syncthreads")
        count, total = self.fresh("yes"), self.fresh("all")
        group = choose_group(self.a.block_dim, False, False)
        self.emit(f"{count} = 0")
        self.emit(f"{total} = 0")
        levels = group.open(self.emit)
        self.depth += levels
        self.lanes(Context(group, ("_alive",) if self.alive else ()), lambda: self.vote(node.args[0], count, total))
        self.depth -= levels
        value = {"count": count, "and": f"{count} == {total}", "or": f"{count} > 0"}[kind.rsplit("_", 1)[1]]
        if isinstance(stmt, ast.Assign):
            target = stmt.targets[0].id
            if target not in self.a.varying:
                return self.emit(f"{target} = np.int32({value})")
            levels = group.open(self.emit)
            self.depth += levels
            self.lanes(Context(group, ("_alive",) if self.alive else ()),
                       lambda: self.emit(f"{self.place(target)} = np.int32({value})"))  # fmt: skip
            self.depth -= levels

    # -- regions --------------------------------------------------------------------------------------------
    def region(self, stmts):
        """Emit statements between two barriers: one walk over the groups, or several where loops want wider groups."""
        stmts = [s for s in stmts if not isinstance(s, ast.Pass)]
        parts = []
        for stmt in stmts:
            wide = not contains(stmt, "W") and self.splits(stmt) and self.wants_row(stmt)
            if parts and parts[-1][0] == wide:
                parts[-1][1].append(stmt)
            else:
                parts.append((wide, [stmt]))
        for wide, part in parts:
            self.walk(part, wide)

    def walk(self, stmts, wide):
        """One walk over all groups of the block."""
        warp = contains(stmts, "W")
        group = choose_group(self.a.block_dim, warp, not wide and (warp or any(map(self.splits, stmts))))
        carried = {v for s in stmts for v in stores(s) if v not in self.a.varying} & exposed(stmts)
        self.preset |= carried
        for v in sorted(carried):  # each group starts from the values that the region was entered with
            self.emit(f"_in_{v} = {v}")
        levels = group.open(self.emit)
        self.depth += levels
        for v in sorted(carried):
            self.emit(f"{v} = _in_{v}")
        self.group(stmts, Context(group, ("_alive",) if self.alive else ()))
        self.depth -= levels

    def wants_row(self, stmt):
        """Are all loops strided by the thread index? Then neighbouring threads of the whole block read memory in order."""
        for s in ast.walk(stmt):
            if isinstance(s, ast.While) or isinstance(s, ast.For) and self.a.uniform_control(s):
                return False
            if isinstance(s, (ast.For, ast.If)):
                parts = s.iter.args if isinstance(s, ast.For) else [s.test]
                if any(loads(self.expand(p)) & {"_lane", "_warp"} for p in parts):
                    return False
        return True

    def uniform_assign(self, stmt):
        return (
            isinstance(stmt, ast.Assign)
            and special(stmt) is None
            and stores(stmt.targets[0])
            and not stores(stmt.targets[0]) & self.a.varying
        )

    def uniform_tree(self, stmt):
        """Is it an assignment that is the same in all threads, or control flow around nothing but such?"""
        if isinstance(stmt, (ast.Assign, ast.Pass, ast.Break, ast.Continue)):
            return isinstance(stmt, ast.Pass) or has_exit(stmt) or self.uniform_assign(stmt)
        if not isinstance(stmt, (ast.If, ast.For, ast.While)) or has_exit(stmt):
            return False
        return self.a.uniform_control(stmt) and not self.spins(stmt) and all(self.uniform_tree(s) for b in bodies(stmt) for s in b)

    def movable(self, stmt, before):
        """May a uniform statement run ahead of the statements ``before`` it?"""
        if not before:
            return True
        if any(isinstance(n, (ast.Subscript, ast.Call)) for n in ast.walk(stmt)):
            return False
        target, reads = stores(stmt), loads(stmt)
        return not any((stores(b) & (reads | target)) or (loads(b) & target) for b in before)

    def uniform_statement(self, stmt):
        keep, self.lane_level = self.lane_level, False
        targets = ast.unparse(stmt.targets[0])
        self.emit(f"{targets} = {self.expr(stmt.value)}")
        self.lane_level = keep

    def splits(self, stmt):
        """Does a statement hold something that is better (or only) done for a whole group at a time?"""
        if special(stmt):
            return True
        if isinstance(stmt, ast.For) and (self.a.uniform_control(stmt) or self.strided(stmt)):
            return True
        if isinstance(stmt, ast.While) and self.a.uniform_control(stmt) and not self.spins(stmt):
            return True
        if isinstance(stmt, (ast.For, ast.While)):
            return contains(stmt, "W")
        return any(self.splits(s) for b in bodies(stmt) for s in b)

    def must_split(self, stmt, ctx):
        """Must a branch stand outside the lane loop? (It is, or may be, taken by all lanes alike.)"""
        if contains(stmt, "W") or ctx.loop == "plain" and has_exit(stmt):
            return True
        # a value that is the same in all threads is assigned once, not once a lane
        return self.a.uniform(stmt.test) and any(self.uniform_assign(s) for s in ast.walk(stmt))

    def group(self, stmts, ctx):
        """Emit statements for one group of lanes."""
        run = []
        start = len(self.lines)

        def flush():
            if run:
                self.lane_run(list(run), ctx)
                run.clear()

        for stmt in stmts:
            if isinstance(stmt, ast.Pass) or self.rematerialised(stmt):
                continue
            if self.uniform_assign(stmt):
                if not self.movable(stmt, run):
                    flush()
                self.uniform_statement(stmt)
            elif special(stmt):
                flush()
                self.collective(stmt, ctx)
            elif isinstance(stmt, ast.If):
                handler = self.group_if(stmt, ctx)
                if handler is None:
                    run.append(stmt)
                else:
                    flush()
                    handler()
            elif isinstance(stmt, (ast.For, ast.While)):
                handler = self.group_loop(stmt, ctx)
                if handler is None:
                    run.append(stmt)
                else:
                    flush()
                    handler()
            elif isinstance(stmt, (ast.Break, ast.Continue)) and ctx.loop == "plain":
                flush()
                self.emit("break" if isinstance(stmt, ast.Break) else "continue")
            else:
                run.append(stmt)
        flush()
        if len(self.lines) == start:
            self.emit("pass")

    def nested(self, stmts, ctx):
        self.depth += 1
        self.group(stmts, ctx)
        self.depth -= 1

    def group_constant(self, node, ctx):
        """Is an expression the same for all lanes of a group?"""
        if self.a.uniform(node):
            return True
        e = self.expand(node)
        if any(isinstance(n, (ast.Subscript, ast.Call)) for n in ast.walk(e)):
            return False
        free = loads(e)
        return not free & ((LANE_BASES - ctx.group.constant) | self.a.varying | self.a.local)

    def group_if(self, stmt, ctx):
        must = self.must_split(stmt, ctx)
        guard = None if must or ctx.masks or self.check or stmt.orelse else self.all_lanes(stmt.test, ctx)
        if not (must or guard or any(self.splits(s) for b in bodies(stmt) for s in b)):
            return None
        if self.a.uniform(stmt.test) or self.group_constant(stmt.test, ctx) and not self.alive:
            return lambda: self.plain_if(stmt, ctx)
        if must:
            return lambda: self.masked_if(stmt, ctx)
        if ctx.masks or any(isinstance(n, ast.Call) for n in ast.walk(stmt.test)) or has_exit(stmt) or has_return(stmt):
            return None
        return lambda: self.two_way_if(stmt, ctx, guard)

    def plain_if(self, stmt, ctx):
        self.emit(f"if {self.expr(stmt.test)}:")
        self.nested(stmt.body, ctx)
        if stmt.orelse:
            self.emit("else:")
            self.nested(stmt.orelse, ctx)

    def two_way_if(self, stmt, ctx, guard=None):
        """All lanes agree: emit the branch for the group. They do not: each lane on its own."""
        if guard:
            self.emit(f"if {guard}:  # true for every lane of the group")
        else:
            count = self.fresh("n")
            self.emit(f"{count} = 0")
            self.lanes(ctx, lambda: (self.emit(f"if {self.expr(stmt.test)}:"), self.emit(f"    {count} += 1")))
            self.emit(f"if {count} == {ctx.group.size}:")
        self.nested(stmt.body, ctx)
        if stmt.orelse and any(map(self.splits, stmt.orelse)) and not guard:
            self.emit(f"elif {count} == 0:")
            self.nested(stmt.orelse, ctx)
            self.emit("else:")
        else:
            self.emit("else:" if stmt.orelse or guard else f"elif {count} > 0:")
        self.depth += 1
        self.lane_run([stmt], ctx)
        self.depth -= 1

    def all_lanes(self, test, ctx):
        """Text of a condition that holds if ``test`` holds for every lane of the group; None if there is none so simple.

        For bounds guards: ``i < n`` holds for all lanes if it does for the last one, when i grows with the lane.
        """
        if ctx.group.ends is None:
            return None
        parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
        texts, grows = [], False
        for part in parts:
            if not isinstance(part, ast.Compare):
                return None
            for left, op, right in zip([part.left, *part.comparators], part.ops, part.comparators):
                if isinstance(op, (ast.Gt, ast.GtE)):
                    left, right = right, left
                elif not isinstance(op, (ast.Lt, ast.LtE)):
                    return None
                sign = "<" if isinstance(op, (ast.Lt, ast.Gt)) else "<="
                sides = []
                for side, end in ((left, 1), (right, 0)):  # the largest left side against the smallest right side
                    if self.group_constant(side, ctx):
                        sides.append(self.expr(side))
                        continue
                    side = self.expand(side)
                    form = self.a.linear(side)
                    if form is None or any(v < 0 for v in form.values()):
                        return None
                    if set(form) - ctx.group.constant - set(ctx.group.ends[end]):
                        return None
                    grows = True
                    sides.append(_substitute(side, ctx.group.ends[end]))
                texts.append(f"{sides[0]} {sign} {sides[1]}")
        return " and ".join(texts) if grows else None

    def masked_if(self, stmt, ctx):
        changing = [m for m in ctx.masks if m.startswith(("_lp", "_ct", "_alive"))]
        yes = self.buffer("m", "32", "numba.types.boolean", 32)
        no = self.buffer("m", "32", "numba.types.boolean", 32) if stmt.orelse else None
        test = self.fresh("c")
        for m in filter(None, (yes, no)):
            self.emit(f"{m}[:] = False")

        def body():
            self.emit(f"{test} = {self.expr(stmt.test)}")
            self.need.add("_lane")
            self.emit(f"if {test}:")
            self.emit(f"    {yes}[_lane] = True")
            if no:
                self.emit("else:")
                self.emit(f"    {no}[_lane] = True")

        self.lanes(ctx, body)
        for mask, stmts in ((yes, stmt.body), (no, stmt.orelse)):
            if mask:
                self.emit(f"if _any({mask}):")
                self.nested(stmts, ctx.but(masks=[mask, *changing]))

    def group_loop(self, stmt, ctx):
        if contains(stmt, "W"):
            if self.a.uniform_control(stmt):
                return lambda: self.plain_loop(stmt, ctx)
            return lambda: self.masked_while(stmt, ctx)
        if has_return(stmt):
            return None
        if self.a.uniform_control(stmt) and not self.spins(stmt):
            return lambda: self.plain_loop(stmt, ctx)
        if isinstance(stmt, ast.For) and not ctx.masks and not self.check and self.strided(stmt):
            return lambda: self.strided_for(stmt, ctx)
        return None

    def plain_loop(self, stmt, ctx):
        if isinstance(stmt, ast.For):
            args = ", ".join(self.expr(a) for a in stmt.iter.args)
            self.emit(f"for {stmt.target.id} in range({args}):")
        else:
            self.emit(f"while {self.expr(stmt.test)}:")
        self.nested(stmt.body, ctx.but(loop="plain"))

    def masked_while(self, stmt, ctx):
        active = self.buffer("lp", "32", "numba.types.boolean", 32)
        again = self.buffer("ct", "32", "numba.types.boolean", 32)
        masks = [active, again] + [m for m in ctx.masks if m.startswith("_alive")]
        inner = ctx.but(masks=masks, loop=(active, again))
        self.emit(f"{active}[:] = False")
        self.emit(f"{again}[:] = True")
        self.lanes(ctx, lambda: (self.need.add("_lane"), self.emit(f"{active}[_lane] = True")))
        self.emit("while True:")
        self.depth += 1
        self.emit(f"{again}[:] = True")
        if not (isinstance(stmt.test, ast.Constant) and stmt.test.value):
            self.lanes(inner, lambda: (self.emit(f"if not ({self.expr(stmt.test)}):"), self.emit(f"    {active}[_lane] = False")))
        if self.alive:
            self.lanes(ctx.but(masks=[active]), lambda: (self.need.add("_i"), self.emit("if not _alive[_i]:"),
                                                         self.emit(f"    {active}[_lane] = False")))  # fmt: skip
        self.emit(f"if not _any({active}):")
        self.emit("    break")
        self.group(stmt.body, inner)
        self.depth -= 1

    def strided(self, stmt):
        """Is it ``for j in range(start + thread, stop, step)``, which all lanes can walk side by side?"""
        args = stmt.iter.args
        if len(args) < 2 or self.check or has_return(stmt) or any(has_exit(s) for s in stmt.body):
            return False
        step = args[2] if len(args) == 3 else ast.Constant(1)
        if not (self.a.uniform(args[1]) and self.a.uniform(step) and self.a.is_nonneg(step)):
            return False
        if not self.a.inside(stmt.target.id, stmt) or len(self.a.definitions[stmt.target.id]) != 1:
            return False
        form = self.a.linear(self.expand(args[0]))
        return bool(form) and all(v >= 0 for v in form.values())

    def strided_for(self, stmt, ctx):
        args = stmt.iter.args
        var = stmt.target.id
        step = args[2] if len(args) == 3 else ast.Constant(1)
        start = self.expand(args[0])
        if ctx.group.ends is None or loads(start) & LANE_BASES - ctx.group.constant - set(ctx.group.ends[0]):
            return self.lane_run([stmt], ctx)
        stop, by, rounds, r = (self.fresh(s) for s in ("stop", "by", "full", "r"))
        first, last = (_substitute(start, ends) for ends in ctx.group.ends)
        self.emit(f"{stop} = {self.expr(args[1])}")
        self.emit(f"{by} = {self.expr(step)}")
        self.emit(f"{rounds} = max(0, ({stop} - ({last}) + {by} - 1) // {by})  # rounds in which every lane takes part")
        self.emit(f"for {r} in range({rounds}):")
        place = ast.BinOp(start, ast.Add(), ast.BinOp(name(r), ast.Mult(), name(by)))
        self.remat[var] = at(place, stmt)
        if self.a.is_nonneg(start):
            self.a.nonneg |= {r, by}
        self.nested(stmt.body, ctx.but(loop=None))
        del self.remat[var]
        tail = ast.BinOp(copy_expr(args[0]), ast.Add(), ast.BinOp(name(rounds), ast.Mult(), name(by)))
        rest = ast.For(stmt.target, ast.Call(name("range"), [tail, name(stop), name(by)], []), stmt.body, [])
        self.emit(f"if {first} + {rounds} * {by} < {stop}:")
        self.depth += 1
        self.lane_run([at(ast.copy_location(rest, stmt), stmt)], ctx)
        self.depth -= 1

    # -- lanes ----------------------------------------------------------------------------------------------
    def lanes(self, ctx, body):
        """Emit the lane loop around what ``body()`` writes, with the masks in force as a guard."""
        keep = self.lines, self.depth, self.need, self.lane_level
        self.lines, self.depth, self.need, self.lane_level = [], self.depth + 1 + bool(ctx.masks), set(), True
        body()
        lines, need = self.lines, self.need
        self.lines, self.depth, self.need, self.lane_level = keep
        guard = ""
        if ctx.masks:
            need |= {"_i" if m == "_alive" else "_lane" for m in ctx.masks}
            guard = " and ".join(f"{m}[{'_i' if m == '_alive' else '_lane'}]" for m in ctx.masks)
        remat = []
        for var in sorted(need & self.remat.keys()):
            text = ast.unparse(ast.fix_missing_locations(self.remat[var]))
            remat.append(f"    {var} = {text}")
            need |= loads(self.remat[var])
        for text in ctx.group.lane_header(need) + remat:
            self.emit(text)
        if guard:
            self.emit(f"    if {guard}:")
        self.lines += lines

    def lane_run(self, stmts, ctx):
        """Emit statements as one thread's code inside the lane loop."""
        stmts = [s for s in stmts if not isinstance(s, ast.Pass)]
        outer = self.scalars
        before = exposed(stmts)
        written = {v for s in stmts for v in stores(s)}
        self.scalars = {v for v in written if v not in before and self.a.inside(v, stmts)}

        def body():
            start = len(self.lines)
            self.scalar(stmts, ctx, 0)
            if len(self.lines) == start:
                self.emit("pass")

        self.lanes(ctx, body)
        self.scalars = outer

    def scalar(self, stmts, ctx, loops):
        for stmt in stmts:
            getattr(self, f"scalar_{type(stmt).__name__}")(stmt, ctx, loops)

    def scalar_body(self, stmts, ctx, loops):
        self.depth += 1
        start = len(self.lines)
        self.scalar(stmts, ctx, loops)
        if len(self.lines) == start:
            self.emit("pass")
        self.depth -= 1

    def scalar_Pass(self, stmt, ctx, loops):
        pass

    def scalar_Expr(self, stmt, ctx, loops):
        self.emit(self.expr(stmt.value))

    def scalar_Assign(self, stmt, ctx, loops):
        target = stmt.targets[0]
        if self.rematerialised(stmt):
            return
        if isinstance(target, ast.Tuple):
            temps = [t.id if self.in_place(t.id) else self.fresh("t") for t in target.elts]
            self.emit(f"{', '.join(temps)}, = {self.expr(stmt.value)}" if len(temps) == 1 else f"{', '.join(temps)} = {self.expr(stmt.value)}")
            for t, temp in zip(target.elts, temps):
                if temp != t.id:
                    self.emit(f"{self.place(t.id)} = {temp}")
            return
        value = self.expr(stmt.value)
        place = self.place(target.id) if isinstance(target, ast.Name) else self.expr(target)
        self.emit(f"{place} = {value}")

    def rematerialised(self, stmt):
        """Is it the assignment of a value that is computed wherever it is needed?"""
        return isinstance(stmt, ast.Assign) and isinstance(stmt.targets[0], ast.Name) and stmt.targets[0].id in self.remat

    def place(self, var):
        if self.in_place(var):
            return var
        self.need.add("_i")
        return f"{self.storage(var)}[_i]"

    def scalar_AugAssign(self, stmt, ctx, loops):
        op = ast.unparse(ast.fix_missing_locations(ast.AugAssign(name("x", ast.Store()), stmt.op, name("y"))))[1:-1]
        self.emit(f"{self.expr(stmt.target)}{op}{self.expr(stmt.value)}")

    def scalar_If(self, stmt, ctx, loops):
        self.emit(f"if {self.expr(stmt.test)}:")
        self.scalar_body(stmt.body, ctx, loops)
        if stmt.orelse:
            self.emit("else:")
            self.scalar_body(stmt.orelse, ctx, loops)

    def scalar_For(self, stmt, ctx, loops):
        args = ", ".join(self.expr(a) for a in stmt.iter.args)
        var = stmt.target.id
        if has_return(stmt):
            self.emit("_ret = False")
        if self.in_place(var):
            self.emit(f"for {var} in range({args}):")
        else:
            counter = self.fresh("q")
            self.emit(f"for {counter} in range({args}):")
            self.emit(f"    {self.place(var)} = {counter}")
        self.scalar_body(stmt.body, ctx, loops + 1)
        self.after_loop(stmt, loops)

    def scalar_While(self, stmt, ctx, loops):
        spin = self.fresh("spin")
        self.emit(f"{spin} = 0")
        if has_return(stmt):
            self.emit("_ret = False")
        keep, self.volatile = getattr(self, "volatile", False), self.spins(stmt)
        self.emit(f"while {self.expr(stmt.test)}:")
        self.volatile = keep
        self.depth += 1
        self.emit(f"{spin} += 1")
        self.fail(f"{spin} > {SPIN_LIMIT}", stmt, f"this loop has gone round {SPIN_LIMIT} times: it waits for something "
                  "that does not happen (the CPU backend runs a block's threads, and the blocks, in order)",
                  "do not wait for a later thread or block inside a kernel; end the kernel and launch another", "_tid")  # fmt: skip
        self.need.add("_tid")
        self.depth -= 1
        self.scalar_body(stmt.body, ctx, loops + 1)
        self.after_loop(stmt, loops)

    def spins(self, stmt):
        """Does a while loop read global memory in its condition (perhaps waiting for another block)?"""
        return isinstance(stmt, ast.While) and any(
            isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name) and n.value.id in self.a.params
            or isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id.startswith("_atomic_")
            for n in ast.walk(stmt.test)
        )  # fmt: skip

    def after_loop(self, stmt, loops):
        if has_return(stmt):
            self.emit("if _ret:")
            self.emit("    break" if loops else "    continue")

    def scalar_Return(self, stmt, ctx, loops):
        if self.alive:
            self.need.add("_i")
            self.emit("_alive[_i] = False")
        if loops:
            self.emit("_ret = True")
            self.emit("break")
        else:
            self.emit("continue")

    def scalar_Break(self, stmt, ctx, loops):
        self.leave(ctx, loops, 0, "break")

    def scalar_Continue(self, stmt, ctx, loops):
        self.leave(ctx, loops, 1, "continue")

    def leave(self, ctx, loops, which, word):
        if loops:
            return self.emit(word)
        self.need.add("_lane")  # a loop that runs under masks: this lane leaves it
        self.emit(f"{ctx.loop[which]}[_lane] = False")
        self.emit("continue")

    # -- warp collectives -----------------------------------------------------------------------------------
    def collective(self, stmt, ctx):
        node = stmt.value
        if getattr(node, "registered", None):
            return self.warp_intrinsic(stmt, ctx)
        kind = node.func.id.removeprefix("_c_")
        whole = not ctx.masks and ctx.group.full and self.a.threads >= 32
        mask = None if kind == "activemask" or not node.args else node.args[0]
        full_mask = mask is None or isinstance(mask, ast.Constant) and mask.value in (-1, 0xFFFFFFFF)
        full_mask |= mask is not None and ast.unparse(mask) == "-1"
        act = exist = None
        if not (whole and (full_mask or kind == "syncwarp")) or kind in ("activemask", "all_sync", "eq_sync"):
            act, exist = self.active_bits(ctx, whole)
            if mask is not None:
                self.check_mask(stmt, ctx, mask, act, exist, kind)
            elif kind == "syncwarp":
                self.fail(f"({exist} & ~{act}) != 0", stmt, *_mask_error(kind))
        if kind == "syncwarp":
            return self.emit("pass  # syncwarp")
        if kind == "activemask":
            return self.lanes(ctx, lambda: self.emit(f"{self.target(stmt)} = np.uint32({act})"))
        if kind.startswith("shfl"):
            return self.shuffle(stmt, ctx, kind, act)
        if kind.startswith("match"):
            return self.match(stmt, ctx, kind, act)
        return self.ballot(stmt, ctx, kind, act)

    def target(self, stmt):
        return self.place(stmt.targets[0].id) if isinstance(stmt, ast.Assign) else "_unused"

    def active_bits(self, ctx, whole):
        act, exist = self.fresh("act"), self.fresh("ex")
        if whole:
            self.emit(f"{act} = {exist} = 0xFFFFFFFF")
            return act, exist
        for bits, masks in ((act, ctx.masks), (exist, ("_alive",) if self.alive else ())):
            self.emit(f"{bits} = 0")

            def one(bits=bits):
                self.need.add("_lane")
                self.emit(f"{bits} |= 1 << _lane")

            self.lanes(ctx.but(masks=masks), one)
        return act, exist

    def check_mask(self, stmt, ctx, mask, act, exist, kind):
        bad, m = self.fresh("bad"), self.fresh("mk")
        self.emit(f"{bad} = -1")

        def body():
            self.need |= {"_lane", "_tid"}
            self.emit(f"{m} = ({self.expr(mask)}) & 0xFFFFFFFF")
            self.emit(f"if ({m} >> _lane) & 1 == 0 or ({m} & {exist} & ~{act}) != 0:")
            self.emit(f"    {bad} = _tid")

        self.lanes(ctx, body)
        self.fail(f"{bad} >= 0", stmt, *_mask_error(kind), thread=bad)

    def shuffle(self, stmt, ctx, kind, act):
        _, value, offset = stmt.value.args
        if not isinstance(stmt, ast.Assign):
            return
        var = stmt.targets[0].id
        values = self.buffer("v", "32", self.dtype_text(var), 32 * self.size_of(var))
        sources = None
        if not self.a.uniform(offset):
            sources = self.buffer("s", "32", "numba.types.int64", 256)

        def fill():
            self.need.add("_lane")
            self.emit(f"{values}[_lane] = {self.expr(value)}")
            if sources:
                self.emit(f"{sources}[_lane] = {self.expr(offset)}")

        self.lanes(ctx, fill)

        def read():
            self.need.add("_lane")
            off = f"({sources}[_lane] & 31)" if sources else f"(({self.expr(offset)}) & 31)"
            source = {"shfl_sync": off, "shfl_up_sync": f"_lane - {off}", "shfl_down_sync": f"_lane + {off}",
                      "shfl_xor_sync": f"_lane ^ {off}"}[kind]  # fmt: skip
            self.emit(f"_src = {source}")
            valid = {"shfl_up_sync": "_src >= 0", "shfl_down_sync": "_src < 32"}.get(kind)
            if act is not None:
                valid = (f"{valid} and " if valid else "") + f"({act} >> _src) & 1 != 0"
            self.emit(f"{self.place(var)} = {values}[_U(_src" + (f" if {valid} else _lane)]" if valid else ")]"))

        self.lanes(ctx, read)

    def ballot(self, stmt, ctx, kind, act):
        mask, predicate = stmt.value.args
        bits = self.fresh("bits")
        self.emit(f"{bits} = 0")

        def collect():
            self.need.add("_lane")
            self.emit(f"if {self.expr(predicate)}:")
            self.emit(f"    {bits} |= 1 << _lane")

        self.lanes(ctx, collect)

        def read():
            m = self.fresh("mk")
            self.emit(f"{m} = ({self.expr(mask)}) & 0xFFFFFFFF")
            value = {
                "ballot_sync": f"np.int32({bits} & {m})",
                "any_sync": f"({bits} & {m}) != 0",
                "all_sync": f"({bits} & {m}) == ({m} & {act})",
                "eq_sync": f"({bits} & {m}) == 0 or ({bits} & {m}) == ({m} & {act})",
            }[kind]
            self.emit(f"{self.target(stmt)} = {value}")

        self.lanes(ctx, read)

    def match(self, stmt, ctx, kind, act):
        mask, value = stmt.value.args
        act = act or "0xFFFFFFFF"
        values = self.buffer("v", "32", f"numba.types.{self.types[('value', id(stmt))].name}", 256)

        def fill():
            self.need.add("_lane")
            self.emit(f"{values}[_lane] = {self.expr(value)}")

        self.lanes(ctx, fill)

        def read():
            m = self.fresh("mk")
            self.need.add("_lane")
            self.emit(f"{m} = ({self.expr(mask)}) & {act}")
            found = f"_same({values}, _lane, {m})"
            if kind == "match_any_sync":
                return self.emit(f"{self.target(stmt)} = np.int32({found})")
            hit = self.fresh("all")
            self.emit(f"{hit} = {found} == {m}")
            if isinstance(stmt, ast.Assign):
                target = stmt.targets[0]
                parts = target.elts if isinstance(target, ast.Tuple) else None
                if parts is None:
                    self.emit(f"{self.place(target.id)} = (np.int32({m} if {hit} else 0), {hit})")
                else:
                    self.emit(f"{self.place(parts[0].id)} = np.int32({m} if {hit} else 0)")
                    self.emit(f"{self.place(parts[1].id)} = {hit}")

        self.lanes(ctx, read)

    def warp_intrinsic(self, stmt, ctx):
        node = stmt.value
        if ctx.masks or self.a.threads % 32:
            act, exist = self.active_bits(ctx, False)
            self.fail(f"{act} != 0xFFFFFFFF", stmt, "all 32 lanes of the warp must take part in this instruction",
                      "launch a multiple of 32 threads and keep it out of divergent branches")  # fmt: skip
        arguments = []
        for i, a in enumerate(node.args):
            kind = self.types[("argument", id(stmt), i)]
            arguments.append(self.buffer("v", "32", f"numba.types.{kind.name}", 256))

        def fill():
            self.need.add("_lane")
            for buffer, a in zip(arguments, node.args):
                self.emit(f"{buffer}[_lane] = {self.expr(a)}")

        if arguments:
            self.lanes(ctx, fill)
        returns = node.registered.returns
        returns = returns if isinstance(returns, tuple) else (returns,)
        outputs = [self.buffer("v", "32", f"numba.types.{k}", 256) for k in map(str, returns)]
        self.emit(f"{node.func.id}({', '.join(arguments + outputs)})")
        if not isinstance(stmt, ast.Assign):
            return
        target = stmt.targets[0]
        parts = target.elts if isinstance(target, ast.Tuple) else [target]

        def read():
            self.need.add("_lane")
            for part, buffer in zip(parts, outputs):
                self.emit(f"{self.place(part.id)} = {buffer}[_lane]")

        self.lanes(ctx, read)


def _mask_error(kind):
    return (f"the mask of cuda.{kind} names lanes that do not take part, or leaves out the calling lane: on a GPU this "
            "is undefined (it may hang)",
            "compute the mask before the branch: mask = cuda.ballot_sync(0xffffffff, condition)")  # fmt: skip


def _substitute(node, table):
    class Put(ast.NodeTransformer):
        def visit_Name(self, n):
            return ast.parse(table[n.id], mode="eval").body if n.id in table else n

    return ast.unparse(ast.fix_missing_locations(Put().visit(copy_expr(node))))


class _Writer(ast.NodeTransformer):
    """Rewrites an expression for the place where it is written: storage of variables, index signs, checks."""

    def __init__(self, emitter):
        self.e = emitter

    def visit_Name(self, node):
        e = self.e
        if node.id in e.a.local:
            e.need.add("_i")
            axes = ", ".join([":"] * len(e.p.local[node.id][0]) + ["_i"])
            return ast.parse(f"{node.id}[{axes}]", mode="eval").body
        if node.id in e.remat or node.id in ("_tx", "_ty", "_tz", "_lane", "_warp", "_tid"):
            e.need.add(node.id)
            return node
        if e.in_place(node.id):
            return node
        e.need.add("_i")
        return ast.Subscript(name(e.storage(node.id)), name("_i"), node.ctx)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Name) and node.func.id.startswith("_atomic_"):
            array = node.args[0].id
            node.args[1:] = [self.visit(a) for a in node.args[1:]]
            if node.func.id != "_atomic_compare_and_swap":
                node.args[1] = self.index_of(array, node.args[1], node)
            if array in self.e.p.shared:
                node.func = name(node.func.id.replace("_atomic_", "_block_"))
            return node
        node.args = [self.visit(a) for a in node.args]
        return node

    def visit_Attribute(self, node):
        return node

    def visit_Subscript(self, node):
        e = self.e
        if isinstance(node.value, ast.Attribute):
            return node
        if not isinstance(node.value, ast.Name):
            return self.generic_visit(node)
        array = node.value.id
        known = array in e.a.arrays or array in e.a.local
        index = self.index_of(array, self.shield(node.slice), node) if known else self.visit(node.slice)
        if not known:
            return ast.Subscript(self.visit(node.value), index, node.ctx)
        if array in e.a.local:
            e.need.add("_i")
            parts = index.elts if isinstance(index, ast.Tuple) else [index]
            index = ast.Tuple([*parts, name("_i")], ast.Load())
        if getattr(e, "volatile", False) and array in e.a.params and isinstance(node.ctx, ast.Load):
            return ast.Call(name("_volatile_load"), [name(array), index], [])
        return ast.Subscript(name(array), index, node.ctx)

    def shield(self, index):
        """The index with its sign noted before variables are replaced by their storage."""
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        new = []
        for part in parts:
            sign = self.e.a.is_nonneg(part) or self.e.a.is_nonneg(self.e.expand(part))
            visited = part if isinstance(part, ast.Slice) else self.visit(part)
            visited.known_nonneg = sign
            new.append(visited)
        return ast.Tuple(new, ast.Load()) if isinstance(index, ast.Tuple) else new[0]

    def index_of(self, array, index, where):
        e = self.e
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        new = []
        for axis, part in enumerate(parts):
            if isinstance(part, ast.Slice):
                new.append(part)
            elif e.check:
                site = e.site(where, f"{array}", "")
                thread = "_tid" if e.lane_level else "-1"
                e.need.add("_tid")
                new.append(ast.parse(
                    f"_inside({ast.unparse(ast.fix_missing_locations(part))}, {array}.shape[{axis}], {axis}, _err, {site},"
                    f" _bx, _by, _bz, {thread})", mode="eval").body)  # fmt: skip
            elif isinstance(part, ast.Constant) or not getattr(part, "known_nonneg", False):
                new.append(part)
            else:
                new.append(ast.Call(name("_U"), [part], []))
        return ast.Tuple(new, ast.Load()) if isinstance(index, ast.Tuple) else new[0]


def analyse(program, array_params, nonneg_params):
    """Fold early exits, find what is uniform, desugar loops; returns the :class:`Analysis`."""
    fold_exits(program.body, last=True)

    def run():
        diverge = False
        for _ in range(2):
            analysis = Analysis(program.body, program.params, [*array_params, *program.shared, *program.consts],
                                program.local, program.block_dim, nonneg_params, diverge)  # fmt: skip
            if diverge or not _diverging_return(program.body, analysis):
                return analysis
            diverge = True
        return analysis

    analysis = run()
    if fold_exits(program.body, True, analysis):
        analysis = run()
    if desugar_loops(program.body, analysis, program):
        analysis = run()
    return analysis


def _diverging_return(stmts, analysis):
    for s in stmts:
        if isinstance(s, ast.If) and has_return(s):
            if not analysis.uniform(s.test) or any(_diverging_return(b, analysis) for b in bodies(s)):
                return True
        elif isinstance(s, (ast.For, ast.While)) and has_return(s):
            if not analysis.uniform_control(s) or _diverging_return(s.body, analysis):
                return True
    return False
