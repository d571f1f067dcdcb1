"""Functions that are left early: returns in nested branches and loops, of device functions and of kernels."""

import re

from tests.fuzz.parts import MAX_COST, THREAD, Function


class Returns:
    """Nested returns, and calls of functions that have them; a part of Body."""

    def s_nested_return(self):
        """In a kernel: a thread leaves from within a branch or a loop that single threads are in."""
        if not self.is_kernel or self.level != THREAD or not self.depth or self.chance(0.5):
            return False
        modes = [a.mode for a in self.shared] + [m for saved in self.promised for m in saved.values()]
        if "V" in modes:        # its warp may read what it owns
            return False
        if self.again is not None and re.search(r"_sync\(|\bd[wb]\d\(", "\n".join(self.lines[self.again :])):
            return False            # the others come back to a shuffle, which would read the lane
        self.emit(f"if {self.bool_expr(1)}:")
        self.emit("    return")
        self.exited = "lane"
        return True

    def s_call_returning(self):
        functions = [f for f in self.m.pure_functions if f.name.startswith("dn") and f.cost * self.mult <= MAX_COST]
        if not functions:
            return False
        f = self.rng.choice(functions)
        self.cost = max(self.cost, self.mult * f.cost)
        var = self.new(f.kind, f.lo, f.hi, f.frac)
        with self.simple():
            self.emit(f"{var.name} = {f.name}({self.arguments(f, 2)})")
        self.show(var)
        return True

    def exits(self, depth):
        """A suite that may end the function at any depth; whoever passes through goes on behind it."""
        for _ in range(self.rng.randint(1, 2)):
            form = self.rng.choice(["if", "else", "for", "while", "return"] if depth else ["return", "assign"])
            if form == "assign":
                self.s_assign()
            elif form == "return":
                self.emit(f"if {self.bool_expr(1)}:")
                self.emit(f"    return {self.returns()}")
            elif form in ("if", "else"):
                self.emit(f"if {self.bool_expr(1)}:")
                with self.nest(THREAD):
                    self.exits(depth - 1)
                    if self.chance(0.4):
                        self.emit(f"return {self.returns()}")
                if form == "else":
                    self.emit("else:")
                    with self.nest(THREAD):
                        self.exits(depth - 1)
            else:
                self.leaving_loop(depth, form)

    def leaving_loop(self, depth, form):
        trip, counter = self.rng.randint(2, 3), self.new("i", 0, 3, fixed=True)
        if form == "for":
            self.emit(f"for {counter.name} in range({trip}):")
        else:
            self.emit(f"{counter.name} = {trip}")
            self.emit(f"while {self.pick(f'{counter.name} > 0', 'True')}:")
        with self.nest(THREAD, loop=True, mult=trip):
            self.show(counter)
            if form == "while":
                self.emit(f"{counter.name} -= 1")
                self.emit(f"if {counter.name} < 0:")
                self.emit(f"    {self.pick('break', f'return {self.returns()}')}")
                counter.lo = -1
            self.exits(depth - 1)
            if self.chance(0.3):
                self.emit(f"if {self.bool_expr(0)}:")
                self.emit(f"    {self.pick('break', 'continue')}")


class ReturningModule:
    """Device functions with returns at every depth; a part of Module."""

    def returning_function(self):
        body = self.new_body(THREAD)
        kinds = ["i", *self.rng.choices("if", k=self.rng.randint(0, 1))]
        names = self.parameters(body, kinds)
        kind = self.rng.choice("iif")
        body.returns = self.result(body, kind, *self.interval(kind))
        body.exits(2)
        body.emit(f"return {body.returns()}")
        name = f"dn{len(self.pure_functions)}"
        uniform = not any(f.name in "".join(body.lines) and not f.uniform for f in self.pure_functions)
        function = Function(name, kind, tuple(kinds), *self.interval(kind), uniform, body.cost)
        self.finish(body, name, names, function, self.pure_functions)
