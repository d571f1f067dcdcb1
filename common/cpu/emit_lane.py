"""Lane level: the lane loop, and one thread's code inside it."""

import ast

from .analysis import exposed, loads, stores
from .errors import CompileError
from .fold import has_return
from .tree import name

SPIN_LIMIT = 1 << 32  # rounds of one thread's while loop: some seconds
GROUP_SPIN_LIMIT = 1 << 26  # rounds of a while loop that a whole warp or block takes


class LaneLevel:
    """The part of the emitter that writes one thread's code."""

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
        if "_key" in need:
            remat.append("    _key = 0")
        for text in ctx.group.lane_header(need) + remat:
            self.emit(text)
        if guard:
            self.emit(f"    if {guard}:")
        self.lines += lines
        if "_key" in need:
            self.emit("_close(_z, _touched)")

    def lane_run(self, stmts, ctx):
        """Emit statements as one thread's code inside the lane loop."""
        stmts = [s for s in stmts if not isinstance(s, ast.Pass)]
        outer = self.scalars
        before = exposed(stmts)
        written = {v for s in stmts for v in stores(s)}
        self.scalars = {v for v in written if v not in before and self.a.inside(v, stmts)}
        # what is computed anew where it is needed is computed at the top of the lane loop: too early for a value that
        # depends on something assigned within, such as the variable of a loop in these statements
        early = {v: self.remat.pop(v) for v in written & self.remat.keys() if loads(self.remat[v]) & written}

        def body():
            start = len(self.lines)
            self.scalar(stmts, ctx, 0)
            if len(self.lines) == start:
                self.emit("pass")

        self.lanes(ctx, body)
        self.scalars = outer
        self.remat |= early

    def scalar(self, stmts, ctx, loops):
        for stmt in stmts:
            self.count_statement(stmt)
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
        if self.accesses and isinstance(stmt.value, ast.Call) and self.guarded_call(stmt.value):
            return
        self.emit(self.expr(stmt.value))

    def guarded_call(self, node):
        """Emit a call that changes elements of an array, with the access looked at first; False if it is none."""
        atomic = isinstance(node.func, ast.Name) and node.func.id.startswith("_atomic_")
        stores_elements = getattr(getattr(node, "registered", None), "writes", False)
        if not (atomic or stores_elements) or len(node.args) < 3 or not isinstance(node.args[0], ast.Name):
            return False
        if atomic and node.func.id == "_atomic_compare_and_swap":
            return False
        array = node.args[0].id
        elements = node.registered.elements if stores_elements else 1
        others = []
        for argument in node.args[2:]:  # the operands are computed, and what they load is looked at, before the access
            others.append(self.fresh("new"))
            self.emit(f"{others[-1]} = {self.expr(argument)}")
        access = "ATOMIC" if atomic else "WRITE"
        if node.func.id == "_atomic_exch" and not self.memory:
            access = "EXCHANGE"
        key = self.guarded(array, node.args[1], node, access, elements)
        if key is None:
            return False
        function = node.func.id
        if atomic and array in self.p.shared:
            function = function.replace("_atomic_", "_block_")
        self.emit(f"    {function}({array}, {key}, {', '.join(others)})")
        return True

    def guarded(self, array, index, node, access, elements=1):
        """Emit ``if`` the access may happen; returns the name that holds its index, None if it is not looked at."""
        written = ast.parse(self.expr(index), mode="eval").body
        text = self.touch(array, written, node, access, elements)
        if text is None:
            return None
        key = self.fresh("place")
        self.emit(f"{key} = {text}")
        first = key if self.axes[array] == 1 else f"{key}[0]"
        self.emit(f"if {first} >= 0:")
        return key

    def guarded_store(self, target, operator, value):
        """Emit ``target operator value`` for an element of an array, looked at first; False if it cannot be."""
        if not (self.accesses and isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name)):
            return False
        array = target.value.id
        if array not in self.axes or array not in self.a.arrays | self.a.local:
            return False
        new = self.fresh("new")
        self.emit(f"{new} = {self.expr(value)}")
        key = self.guarded(array, target.slice, target, "WRITE" if operator == "=" else "UPDATE")
        if key is None:
            return False
        if array in self.a.local:
            self.need.add("_i")
            key = f"{key}, _i" if self.axes[array] == 1 else f"{key} + (_i,)"
        self.emit(f"    {array}[{key}] {operator} {new}")
        return True

    def scalar_Assign(self, stmt, ctx, loops):
        target = stmt.targets[0]
        if self.rematerialised(stmt):
            return
        if isinstance(target, ast.Tuple):
            temps = [t.id if self.in_place(t.id) else self.fresh("t") for t in target.elts]
            self.emit(
                f"{', '.join(temps)}, = {self.expr(stmt.value)}"
                if len(temps) == 1
                else f"{', '.join(temps)} = {self.expr(stmt.value)}"
            )
            for t, temp in zip(target.elts, temps):
                if temp != t.id:
                    self.emit(f"{self.place(t.id)} = {temp}")
            return
        if isinstance(target, ast.Subscript) and isinstance(stmt.value, ast.Tuple):
            self.check_row(target, stmt.value)
        if self.guarded_store(target, "=", stmt.value):
            return
        value = self.expr(stmt.value)
        place = self.place(target.id) if isinstance(target, ast.Name) else self.expr(target)
        self.emit(f"{place} = {value}")

    def check_row(self, target, values):
        """Refuse values that a row of a shared or local array has no place for: a GPU's thread would end there."""
        shape, _ = (self.p.local | {k: v[:2] for k, v in self.p.shared.items()}).get(
            getattr(target.value, "id", ""), (None, None)
        )
        parts = target.slice.elts if isinstance(target.slice, ast.Tuple) else [target.slice]
        if shape and len(parts) == len(shape) - 1 and all(not isinstance(p, ast.Slice) for p in parts):
            if shape[-1] != len(values.elts):
                raise CompileError(
                    f"{len(values.elts)} values for a row of {shape[-1]}: on a GPU the thread would end here, silently",
                    *self.origin(target),
                    "assign as many values as the row has elements",
                )

    def rematerialised(self, stmt):
        """Is it the assignment of a value that is computed wherever it is needed?"""
        return (
            isinstance(stmt, ast.Assign) and isinstance(stmt.targets[0], ast.Name) and stmt.targets[0].id in self.remat
        )

    def place(self, var):
        if self.in_place(var):
            return var
        self.need.add("_i")
        return f"{self.storage(var)}[_i]"

    def scalar_AugAssign(self, stmt, ctx, loops):
        op = ast.unparse(ast.fix_missing_locations(ast.AugAssign(name("x", ast.Store()), stmt.op, name("y"))))[1:-1]
        if self.guarded_store(stmt.target, op.strip(), stmt.value):
            return
        value = ast.parse(self.expr(stmt.value), mode="eval").body
        self.emit(f"{self.expr(stmt.target)}{op}{ast.unparse(self.divisor(stmt.op, value, stmt))}")

    def scalar_If(self, stmt, ctx, loops):
        self.emit(f"if {self.watched(stmt, self.expr(stmt.test))}:")
        self.scalar_body(stmt.body, ctx, loops)
        if stmt.orelse:
            self.emit("else:")
            self.scalar_body(stmt.orelse, ctx, loops)

    def scalar_For(self, stmt, ctx, loops):
        args = ", ".join(self.expr(a) for a in stmt.iter.args)
        var = stmt.target.id
        if has_return(stmt):
            self.emit("_ret = False")
        token = self.loop_start()
        if self.in_place(var):
            self.emit(f"for {var} in range({args}):")
        else:
            counter = self.fresh("q")
            self.emit(f"for {counter} in range({args}):")
            self.emit(f"    {self.place(var)} = {counter}")
        self.depth += 1
        self.loop_round(token)
        self.depth -= 1
        self.scalar_body(stmt.body, ctx, loops + 1)
        self.loop_end(token, stmt)
        self.after_loop(stmt, loops)

    def scalar_While(self, stmt, ctx, loops):
        spin = self.spin_start()
        if has_return(stmt):
            self.emit("_ret = False")
        token = self.loop_start()
        keep, self.volatile = getattr(self, "volatile", False), self.a.spins(stmt)
        self.emit(f"while {self.expr(stmt.test)}:")
        self.volatile = keep
        self.depth += 1
        self.need.add("_tid")
        self.spin_check(spin, stmt, "_tid" if self.lane_level else "-1", SPIN_LIMIT)
        self.loop_round(token, stmt)
        self.depth -= 1
        self.scalar_body(stmt.body, ctx, loops + 1)
        self.loop_end(token, stmt)
        self.after_loop(stmt, loops)

    def spin_start(self):
        """Write the start of a counter of rounds; returns its name."""
        spin = self.fresh("spin")
        self.emit(f"{spin} = 0")
        return spin

    def spin_check(self, spin, stmt, thread="-1", limit=None):
        """Write the counter's step: a loop that goes round without end is reported, not left to hang."""
        limit = limit or GROUP_SPIN_LIMIT
        self.emit(f"{spin} += 1")
        self.fail(
            f"{spin} > {limit}",
            stmt,
            f"this loop has gone round {limit} times: it waits for something "
            "that does not happen (the CPU backend runs a block's threads, and the blocks, in order)",
            "look for what should end the loop; and do not wait for a later thread or block inside a kernel: "
            "end the kernel and launch another",
            thread,
        )

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
