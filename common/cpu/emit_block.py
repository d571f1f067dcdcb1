"""Block level: barriers, and the control flow around them, in which all threads must agree."""

import ast

from .fold import contains, diverging_return, has_exit, has_return
from .groups import Context, choose_group


class BlockLevel:
    """The part of the emitter that writes between the walks over the threads."""

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
        if has_return(stmt) and not diverging_return([stmt], self.a):
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
            counter, body = self.counted(stmt)
            self.emit(f"for {counter} in range({args}):")
            self.block_body(body, loop=True)
        else:
            spin = self.spin_start()
            self.emit("while True:")
            self.depth += 1
            self.spin_check(spin, stmt)
            if self.alive:  # where all threads have returned, nobody is left to end the loop
                self.emit("if not _alive.any():")
                self.emit("    break")
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
            self.agreed(stmt, self.warps())
            self.emit(f"if {self.expr(stmt.test)}:")
        else:
            what = "this branch contains a barrier, and its condition"
            if not contains(stmt, "B"):
                what = "this branch leaves a loop with a barrier in it, and its condition"
            count, total = self.agree(stmt, stmt.test, what)
            self.agreed(stmt, self.warps())
            self.emit(f"if {count} > 0:")
        self.block_body(stmt.body)
        if stmt.orelse:
            self.emit("else:" if self.a.uniform(stmt.test) else f"elif {total} > 0:")
            self.block_body(stmt.orelse)

    def agree(self, stmt, test, what):
        """Emit a vote of all threads on ``test``; fails unless they agree. Returns (yes votes, voters)."""
        count, total = self.vote(test)
        self.fail(
            f"{count} != 0 and {count} != {total}",
            stmt,
            f"{what} is true for some threads of the block and false "
            "for others: they would wait for each other forever on a GPU",
            "move the barrier out of the branch, so that every thread of the block reaches it",
        )
        return count, total

    def vote(self, test):
        """Emit a count of the threads for which ``test`` is true. Returns the names (yes votes, voters)."""
        count, total = self.fresh("yes"), self.fresh("all")
        self.emit(f"{count} = 0")
        self.emit(f"{total} = 0")

        def body():
            self.emit(f"{total} += 1")
            self.emit(f"if {self.expr(test)}:")
            self.emit(f"    {count} += 1")

        self.all_threads(body)
        return count, total

    def all_threads(self, body):
        """Emit ``body()`` once for each thread of the block that has not returned."""
        group = choose_group(self.a.block_dim, self.memory, False)
        levels = group.open(self.emit)
        self.depth += levels
        self.lanes(Context(group, ("_alive",) if self.alive else ()), body)
        self.depth -= levels

    def epoch(self, stmt):
        """Emit what a barrier means where accesses are looked at."""
        if self.memory:
            self.tick(stmt, "barrier")
        else:
            self.emit("_ep = _epoch(_z)")

    def barrier(self, stmt):
        node, kind = stmt.value, stmt.value.func.id
        if self.accesses and not self.memory and self.alive:
            self.emit(f"_exited(_z, _alive, _ep, _U({self.access_site(stmt, 'a barrier')}))")
        if kind == "_c_syncthreads":
            return self.epoch(stmt) if self.accesses else self.emit("pass  # syncthreads")
        count, total = self.vote(node.args[0])
        if self.accesses:
            self.epoch(stmt)
        value = {"count": count, "and": f"{count} == {total}", "or": f"{count} > 0"}[kind.rsplit("_", 1)[1]]
        if isinstance(stmt, ast.Assign):
            target = stmt.targets[0].id
            if target not in self.a.varying:
                return self.emit(f"{target} = np.int32({value})")
            self.all_threads(lambda: self.emit(f"{self.place(target)} = np.int32({value})"))
