"""Group level: what is done for a whole warp or row of threads at a time, outside the lane loop."""

import ast

from .analysis import BASES, copy_expr, exposed, loads, special, stores
from .emit_memory import reads_elements
from .fold import contains, has_exit, has_return
from .groups import Context, choose_group
from .tree import assign, at, bodies, name


def substitute(node, table):
    class Put(ast.NodeTransformer):
        def visit_Name(self, n):
            return ast.parse(table[n.id], mode="eval").body if n.id in table else n

    return ast.unparse(ast.fix_missing_locations(Put().visit(copy_expr(node))))


class GroupLevel:
    """The part of the emitter that writes regions: loops and branches that a group takes together."""

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
        warp = self.memory or contains(stmts, "W")
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
        """Are all loops strided by the thread index? Then the whole block reads memory in order."""
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
        return (
            self.a.uniform_control(stmt)
            and not (isinstance(stmt, ast.For) and stmt.target.id in self.a.varying)
            and not self.a.spins(stmt)
            and all(self.uniform_tree(s) for b in bodies(stmt) for s in b)
        )

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
        if isinstance(stmt, ast.While) and self.a.uniform_control(stmt) and not self.a.spins(stmt):
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
                self.count_group(stmt, ctx)
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
        return not free & ((BASES - ctx.group.constant) | self.a.varying | self.a.local)

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
        if self.memory and reads_elements(stmt.test):  # each load is to be seen once
            return None
        if self.keeps_views(stmt, stores(stmt)):
            return None
        return lambda: self.two_way_if(stmt, ctx, guard)

    def keeps_views(self, stmt, names):
        """Is a view of an array among variables that also stand outside of ``stmt``? Only a lane can keep it."""
        names = names & self.a.varying - self.remat.keys()
        return any(not self.storable(v) and not self.a.inside(v, stmt) for v in names)

    def plain_if(self, stmt, ctx):
        self.agreed(stmt, 1)
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
            test = lambda: self.watched(stmt, self.expr(stmt.test))
            self.lanes(ctx, lambda: (self.emit(f"if {test()}:"), self.emit(f"    {count} += 1")))
            self.emit(f"if {count} == {ctx.group.size}:")
        self.nested(stmt.body, ctx)
        if stmt.orelse and any(map(self.splits, stmt.orelse)) and not guard:
            self.emit(f"elif {count} == 0:")
            self.nested(stmt.orelse, ctx)
            self.emit("else:")
        else:
            self.emit("else:" if stmt.orelse or guard else f"elif {count} > 0:")
        self.depth += 1
        self.quiet.add(id(stmt))
        self.lane_run([stmt], ctx)
        self.depth -= 1

    def all_lanes(self, test, ctx):
        """Text of a condition that holds if ``test`` holds for every lane; None if there is none so simple.

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
                    sides.append(substitute(side, ctx.group.ends[end]))
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
            self.emit(f"{test} = {self.watched(stmt, self.expr(stmt.test))}")
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
        carried = (stores(stmt) - self.a.varying) & exposed([stmt])  # such a value must not change once a lane
        if not carried and self.keeps_views(stmt, loads(stmt) | stores(stmt)):
            return None
        if self.a.uniform_control(stmt) and not self.a.spins(stmt):
            return lambda: self.plain_loop(stmt, ctx)
        if isinstance(stmt, ast.For) and not ctx.masks and not self.check and self.strided(stmt):
            return lambda: self.strided_for(stmt, ctx)
        return None

    def plain_loop(self, stmt, ctx):
        if isinstance(stmt, ast.For):
            args = ", ".join(self.expr(a) for a in stmt.iter.args)
            counter, body = self.counted(stmt)
            self.emit(f"for {counter} in range({args}):")
        else:
            body = stmt.body
            spin = self.spin_start()
            self.emit(f"while {self.expr(stmt.test)}:")
            self.depth += 1
            self.spin_check(spin, stmt)
            self.depth -= 1
        self.nested(body, ctx.but(loop="plain"))

    def counted(self, stmt):
        """(counter, body) of a for loop that is written outside the lane loop.

        All threads go round it together, and yet its variable may differ between them: when some got there a value
        that is read later, by another way. Then it is set in each round, thread by thread.
        """
        if self.in_place(stmt.target.id):
            return stmt.target.id, stmt.body
        counter = self.fresh("q")
        return counter, [assign(stmt.target.id, name(counter), stmt), *stmt.body]

    def masked_while(self, stmt, ctx):
        active = self.buffer("lp", "32", "numba.types.boolean", 32)
        again = self.buffer("ct", "32", "numba.types.boolean", 32)
        masks = [active, again] + [m for m in ctx.masks if m.startswith("_alive")]
        inner = ctx.but(masks=masks, loop=(active, again))
        self.emit(f"{active}[:] = False")
        self.emit(f"{again}[:] = True")
        self.lanes(ctx, lambda: (self.need.add("_lane"), self.emit(f"{active}[_lane] = True")))
        spin = self.spin_start()
        self.emit("while True:")
        self.depth += 1
        self.spin_check(spin, stmt)
        self.emit(f"{again}[:] = True")
        if not (isinstance(stmt.test, ast.Constant) and stmt.test.value):
            self.lanes(
                inner,
                lambda: (
                    self.emit(f"if not ({self.watched(stmt, self.expr(stmt.test))}):"),
                    self.emit(f"    {active}[_lane] = False"),
                ),
            )
        if self.alive:
            self.lanes(
                ctx.but(masks=[active]),
                lambda: (
                    self.need.add("_i"),
                    self.emit("if not _alive[_i]:"),
                    self.emit(f"    {active}[_lane] = False"),
                ),
            )
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
        if ctx.group.ends is None or loads(start) & BASES - ctx.group.constant - set(ctx.group.ends[0]):
            return self.lane_run([stmt], ctx)
        stop, by, rounds, r = (self.fresh(s) for s in ("stop", "by", "full", "r"))
        first, last = (substitute(start, ends) for ends in ctx.group.ends)
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
