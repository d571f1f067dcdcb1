"""Statements of random kernels: assignments, branches, loops, synchronisation, memory, names."""

from tests.fuzz.expressions import Expressions
from tests.fuzz.parts import BLOCK, THREAD, WARP, Array, Expr


class Statements(Expressions):
    # -- statements ---------------------------------------------------------------------------------------------------
    def statements(self, count):
        for _ in range(count):
            self.statement()

    def statement(self):
        names, weights = zip(*self.m.statements.items())
        for _ in range(20):
            if getattr(self, f"s_{self.rng.choices(names, weights)[0]}")():
                return

    def suite(self):
        if self.level == BLOCK and self.is_kernel and self.chance(0.25):
            self.s_barrier()
        self.statements(self.rng.randint(1, 2 if self.depth < 3 else 1))

    def random_var(self, kind=None, level=None):
        """A new variable and an expression that fits it."""
        kind = kind or self.rng.choices("ifsb", [6, 4, 2, 2])[0]
        if level is None:
            level = self.rng.choices([THREAD, WARP, BLOCK], [7, 1, 1])[0]
        level = min(level, self.level if self.level > THREAD else THREAD)
        if kind == "i":
            lo, hi = self.pick((0, 15), (0, 255), (0, 1023), (-512, 511))
            return self.new("i", lo, hi, level=level), self.fit(self.int_expr(2, level), lo, hi).text
        if kind == "b":
            return self.new("b", level=level), self.bool_expr(1, level)
        e = self.fit_float(self.float_expr(2, level)).text
        if kind == "s":
            e = f"np.float32({e})"
        return self.new(kind, -32, 32, 3, level), e

    def value_for(self, var):
        if var.kind == "i":
            return self.fit(self.int_expr(2, var.level), var.lo, var.hi).text
        if var.kind == "b":
            return self.bool_expr(1, var.level)
        e = self.fit_float(self.float_expr(2, var.level), int(var.hi), var.frac).text
        return f"np.float32({e})" if var.kind == "s" else e

    def s_assign(self):
        var, text = self.random_var()
        self.emit(f"{var.name} = {text}")
        self.show(var)
        return True

    def target(self):
        """A variable that may be assigned here."""
        options = [v for v in self.visible("ifsb", writable=True) if v.level <= self.level]
        return self.rng.choice(options) if options else None

    def s_reassign(self):
        var = self.target()
        if var is None:
            return False
        if self.chance(0.4):        # keeps its old value where the condition is false
            self.emit(f"if {self.bool_expr(1, var.level)}:  # else {var.name} keeps its value")
            with self.nest(var.level):
                self.emit(f"{var.name} = {self.value_for(var)}")
        else:
            self.emit(f"{var.name} = {self.value_for(var)}")
        return True

    def s_augment(self):
        var = self.target()
        if var is None or var.kind == "b":
            return False
        if var.kind == "i":
            e = self.small(self.int_expr(1, var.level), 1024)
            op = self.pick("+=", "-=", "*=", "//=", "^=")
            if op == "//=":
                self.emit(f"{var.name} //= {self.pick(2, 3, 5)}")
                if var.lo < 0 or self.chance(0.2):
                    self.emit(f"{var.name} = {self.fit(Expr(var.name, var.lo - 1, var.hi), var.lo, var.hi).text}")
                return True
            self.emit(f"{var.name} {op} {e.text}")
            wide = Expr(var.name, -(1 << 40), 1 << 40)
            self.emit(f"{var.name} = {self.fit(wide, var.lo, var.hi).text}")
            return True
        e = self.fit_float(self.float_expr(1, var.level), 16)
        self.emit(f"{var.name} {self.pick('+=', '-=')} {e.text}")
        after = self.fit_float(Expr(var.name, -var.hi - 16, var.hi + 16, 3), int(var.hi)).text
        self.emit(f"{var.name} = {f'np.float32({after})' if var.kind == 's' else after}")
        return True

    def s_tuple(self):
        same = [(a, b) for a in self.visible("i", writable=True) for b in self.visible("i", writable=True)
                if a is not b and a.level == b.level <= self.level and (a.lo, a.hi) == (b.lo, b.hi)]
        if same and self.chance(0.6) or self.chance(0.2):
            if not same:
                pair = [self.new("i", 0, 63), self.new("i", 0, 63)]
                for v in pair:
                    self.emit(f"{v.name} = {self.value_for(v)}")
                    self.show(v)
                same = [pair]
            a, b = self.rng.choice(same)
            self.emit(f"{a.name}, {b.name} = {b.name}, {a.name}")
            return True
        (a, x), (b, y) = self.random_var("i"), self.random_var("f")
        self.emit(f"{a.name}, {b.name} = {x}, {y}")
        self.show(a)
        self.show(b)
        return True

    def branch(self, level):
        self.emit(f"if {self.bool_expr(1, level)}:")
        with self.nest(level):
            self.suite()
        while self.chance(0.25):
            with self.without_collectives():
                c = self.bool_expr(1, level)
            self.emit(f"elif {c}:")
            with self.nest(level):
                self.suite()
        if self.chance(0.5):
            self.emit("else:")
            with self.nest(level):
                self.suite()
        return True

    def s_if(self):
        return self.depth < 3 and self.branch(THREAD)

    def s_block_if(self):
        return self.depth < 3 and self.level == BLOCK and self.branch(BLOCK)

    def s_warp_if(self):
        if self.depth >= 3 or self.level < WARP or self.m.threads <= 32 and self.chance(0.7):
            return False
        if self.is_kernel and self.chance(0.7):
            k = self.rng.randrange(max(1, (self.m.threads + 31) // 32))
            warp = self.pick("warp", "tid // 32", f"tid // {self.pick('32', 'cuda.warpsize')}")
            self.emit(f"if {warp} {self.pick('==', '==', '<=', '!=')} {k}:")
            with self.nest(WARP):
                self.warp_suite()
            if self.chance(0.3):
                self.emit("else:")
                with self.nest(WARP):
                    self.suite()
            return True
        return self.branch(WARP)

    def warp_suite(self):
        if self.chance(0.5):
            self.s_collective()
        self.suite()

    # -- loops
    def trip(self):
        return self.rng.randint(1, 4 if self.mult < 5 else 2)

    def loop_body(self, level, uniform_exit):
        """The suite of a loop; at WARP level and above only uniform conditions may leave it, at its start."""
        if uniform_exit and self.level >= WARP and self.on("uniform_break") and self.chance(0.25):
            with self.simple():
                c = self.bool_expr(0, level)
            self.emit(f"if {c}:")
            self.indent += 1
            self.emit(self.pick("break", "continue"))
            self.indent -= 1
        if self.level == BLOCK and self.chance(0.45) and self.shared:
            self.s_shared_write()
            self.s_barrier()
            if self.chance(0.3):
                self.s_block_if()
        self.suite()

    def s_for(self):
        if self.depth >= 3 or self.mult > 8:
            return False
        counts = [e for k, e, _ in self.atoms if k == "i" and e.text.startswith("na")]
        trip = self.trip()
        divergent = self.level == THREAD or self.chance(0.3)
        level = THREAD if divergent else self.level
        var = self.new("i", 0, 0, level=level, fixed=True)
        if divergent and self.chance(0.6):
            e = self.fit(self.int_expr(1), 0, trip)
            head, var.hi = self.pick((f"range({e.text})", trip), (f"range({e.text}, {trip + 3}, 2)", trip + 2))
        else:
            forms = [(f"range({trip})", 0, trip - 1), (f"range(2, {trip + 2})", 2, trip + 1),
                     (f"range({2 * trip}, 0, -2)", 2, 2 * trip), (f"range({trip - 1}, -1, -1)", 0, trip - 1),
                     ("(4, 2, 1)", 1, 4), ("(1, 5, 3)", 1, 5)]
            forms += [(f"range({e.text})", 0, e.hi - 1) for e in counts] * 2
            forms += [(f"range(1, {e.text})", 1, max(1, e.hi - 1)) for e in counts]
            head, var.lo, var.hi = self.rng.choice(forms)
        self.emit(f"for {var.name} in {head}:")
        with self.nest(level, loop=level == THREAD, mult=5):
            self.show(var)
            self.loop_body(level, True)
        return True

    def s_while(self):
        if self.depth >= 3 or self.mult > 8:
            return False
        divergent = self.level == THREAD or self.chance(0.35)
        level = THREAD if divergent else self.level
        var = self.new("i", -3, 9, level=level, fixed=True)
        start = self.fit(self.int_expr(1, level), 0, 6) if divergent else Expr(str(self.rng.randint(2, 5)), 0, 5)
        self.emit(f"{var.name} = {start.text}")
        self.show(var)
        step = self.pick(f"{var.name} -= {self.pick(1, 1, 2)}", f"{var.name} //= 2", f"{var.name} >>= 1")
        if self.chance(0.3):
            self.emit("while True:")
            with self.nest(level, loop=level == THREAD, mult=6):
                self.emit(step)
                with self.simple():
                    c = self.bool_expr(1, level) if self.chance(0.4) else None
                self.emit(f"if {var.name} <= 0{f' or {c}' if c else ''}:")
                self.indent += 1
                self.emit("break")
                self.indent -= 1
                self.loop_body(level, True)
            return True
        with self.without_collectives():
            extra = f" and {self.bool_expr(1, level)}" if self.chance(0.35) else ""
        self.emit(f"while {var.name} > 0{extra}:")
        with self.nest(level, loop=level == THREAD, mult=6):
            self.emit(step)     # first, so that `continue` cannot loop for ever
            self.loop_body(level, True)
        return True

    def s_accumulate(self):
        if self.depth >= 3 or self.mult > 8:
            return False
        trip, kind = self.rng.randint(2, 8 if self.depth == 0 else 4), self.pick("i", "f", "s")
        level = self.level if self.chance(0.6) else THREAD
        if kind == "i":
            acc = self.new("i", -64 * trip, 64 * trip, fixed=True)
            start = "0"
        else:
            acc = self.new(kind, -16 * trip, 16 * trip, 3, fixed=True)
            start = {"f": self.pick("0.0", "0", "0.0"), "s": "np.float32(0)"}[kind]
        self.emit(f"{acc.name} = {start}")
        counter = self.new("i", 0, trip - 1, level=level, fixed=True)
        head = f"range({trip})" if level or self.chance(0.5) else f"range({self.fit(self.int_expr(1), 0, trip).text})"
        self.emit(f"for {counter.name} in {head}:")
        with self.nest(level, loop=level == THREAD, mult=trip):
            self.show(counter)
            if kind != "s":
                self.show(acc)
            if self.chance(0.5):
                self.loop_body(level, False)
            if self.chance(0.2):
                with self.without_collectives():
                    self.emit(f"if {self.bool_expr(1)}:")
                self.level, inner = THREAD, self.level
                self.indent += 1
                self.add_to(acc, kind)
                self.indent -= 1
                self.level = inner
            else:
                self.add_to(acc, kind)
            if acc in self.vars:
                self.vars.remove(acc)
        self.show(acc)
        return True

    def add_to(self, acc, kind):
        if kind == "i":
            self.emit(f"{acc.name} += {self.fit(self.int_expr(2), -64, 63).text}")
        else:
            e = self.fit_float(self.float_expr(2), 16).text
            self.emit(f"{acc.name} += {f'np.float32({e})' if kind == 's' else e}")

    def s_stride_loop(self):
        """A grid-stride loop over an output, or a block-stride loop over a shared array."""
        if not self.is_kernel or self.depth >= 3 or self.mult > 4:
            return False
        shared = [a for a in self.shared if a.mode == "W" and len(a.shape) == 1 and a.warp_tile]
        outs = [a for a in self.globals if a.mode == "stride"]
        if shared and self.chance(0.5):
            a = self.rng.choice(shared)
            size = str(a.shape[0]) if a.offset is not None else self.pick(str(a.shape[0]), f"{a.name}.shape[0]")
            head = f"range(tid, {size}, nt)"
        elif outs:
            a = self.rng.choice(outs)
            head = f"range(gid, {self.pick(f'{a.name}.shape[0]', f'{a.name}.size')}, gstride)"
        else:
            return False
        var = self.new("i", 0, a.shape[0] - 1, fixed=True)
        self.emit(f"for {var.name} in {head}:")
        with self.nest(THREAD, loop=True, mult=3):
            self.show(var)
            if self.chance(0.4):
                self.suite()
            self.write(a, var.name)
        return True

    def s_place_loop(self):
        """Uniform loops in a branch that some threads take; in them a place made of their variables and the thread."""
        if not self.is_kernel or self.depth >= 3 or self.mult > 4:
            return False
        thread = self.pick(*(e.text for k, e, _ in self.atoms if k == "i" and e.text in ("tid", "lane", "gid")), "tid")
        modulus, scale = self.pick(8, 16), self.pick(1, 2, 4)
        rows, cols = self.rng.randint(2, 3), self.rng.randint(1, 4)
        acc, counters = self.new("i", 0, 0, fixed=True), []
        self.emit(f"{acc.name} = 0")
        with self.without_collectives():
            self.emit(f"if {self.bool_expr(1)}:")
        with self.nest(THREAD):
            for trip in (rows, cols) if self.chance(0.7) else (rows,):
                counters.append((self.new("i", 0, trip - 1, fixed=True), trip))
                self.emit(f"for {counters[-1][0].name} in range({trip}):")
                self.indent += 1
            (outer, trip), inner = counters[0], f" + {counters[1][0].name}" if len(counters) == 2 else ""
            place = self.new("i", 0, 64 * trip + scale * modulus + cols, fixed=True)
            self.emit(f"{place.name} = {outer.name} * 64 + {scale} * ({thread} % {modulus}) + {self.pick(0, 3)}{inner}")
            self.emit(f"if {place.name} < {self.rng.randint(1, 64 * trip)}:")
            self.emit(f"    {acc.name} += {place.name}")
            self.indent -= len(counters)
        acc.hi = rows * cols * (place.hi + 3)
        self.show(acc)
        return True

    def s_loop_variable(self):
        if self.depth >= 3 or self.mult > 8:
            return False
        trip = self.rng.randint(2, 4)
        level = self.pick(THREAD, self.level)  # where all threads go round it together, its body may hold collectives
        # a name of its own: for Numba the loop might not run at all and leave what the name held before
        var = self.new("i", 1, trip, fixed=True, reuse=False)
        self.emit(f"for {var.name} in range(1, {trip + 1}):  # {var.name} is left by the loop")
        with self.nest(level, loop=level == THREAD, mult=trip):
            self.show(var)
            self.loop_body(level, False)
            self.vars.remove(var)
            if level == THREAD and self.chance(0.6):
                self.emit(f"if {self.bool_expr(0)}:")
                self.indent += 1
                self.emit("break")
                self.indent -= 1
        if self.chance(0.4):
            var.lo, var.hi, var.fixed = -8, 31, False
            with self.without_collectives():
                self.emit(f"if {self.bool_expr(1)}:  # else {var.name} keeps its value")
            with self.nest(THREAD):
                self.emit(f"{var.name} = {self.value_for(var)}")
        self.show(var)
        return True

    def s_break(self):
        return self.leave("break")

    def s_continue(self):
        return self.leave("continue")

    def leave(self, word):
        if not self.break_ok or self.level != THREAD:
            return False
        self.emit(f"if {self.bool_expr(1)}:")
        self.indent += 1
        self.emit(word)
        self.indent -= 1
        return True

    def s_return(self):
        if self.returns is None or self.level != THREAD or self.depth == 0 and self.chance(0.5):
            return False
        self.emit(f"if {self.bool_expr(1)}:")
        self.indent += 1
        self.emit(f"return {self.returns(THREAD)}")
        self.indent -= 1
        return True

    def s_early_return(self):
        if not self.is_kernel or self.depth or self.exited == "lane" or self.chance(0.5):
            return False
        level = self.rng.choices([THREAD, WARP, BLOCK], [5, 3, 1])[0]
        if level == THREAD and any(a.mode == "V" for a in self.shared):
            self.barrier()
            for a in self.shared:
                a.mode = "R" if a.mode == "V" else a.mode
        with self.without_collectives(), self.simple():
            c = self.bool_expr(1, level)
        if level == THREAD:
            c = self.pick(c, f"gid >= {self.m.total - self.rng.randint(1, max(1, self.m.total // 2))}", "gid >= nn")
        elif level == WARP:
            c = f"warp {self.pick('==', '>=')} {self.rng.randint(0, max(0, self.m.threads // 32 - 1))}"
        self.emit(f"if {c}:")
        self.indent += 1
        self.emit("return")
        self.indent -= 1
        if level == THREAD:
            self.exited = "lane"
        elif level == WARP:
            self.exited = "warp"
        return True

    # -- synchronisation
    def barrier(self, text="cuda.syncthreads()"):
        self.emit(text)
        for a in self.shared:
            if a.op:
                a.mode = self.pick("A", "R")
            else:
                a.mode = self.rng.choices("WRV", [4, 5, 1 if a.warp_tile and self.exited != "lane" else 0])[0]

    def force(self, array, mode):
        """A barrier after which `array` is in `mode`."""
        self.barrier()
        array.mode = mode

    def s_barrier(self):
        if self.level < BLOCK:
            return False
        self.barrier()
        return True

    def s_vote_barrier(self):
        if self.level < BLOCK:
            return False
        with self.simple():
            c = self.bool_expr(1)
        which = self.pick("count", "and", "or")
        predicate = self.pick(f"int({c})", f"1 if {c} else 0", f"({c}) * 1")
        name = self.new("i", 0, self.m.threads if which == "count" else 1, level=BLOCK)
        self.barrier(f"{name.name} = cuda.syncthreads_{which}({predicate})")
        name.fixed = True
        self.show(name)
        return True

    def s_syncwarp(self):
        if self.level < WARP:
            return False
        self.emit(f"cuda.syncwarp({self.pick('', '', '', self.mask())})")
        if self.exited != "lane":
            for a in self.shared:
                if a.warp_tile and a.mode in ("W", "V"):
                    a.mode = self.pick("W", "V")
        return True

    def s_activemask(self):
        if self.level < BLOCK or self.depth:
            return False
        var = self.new("i", 0, 1, level=WARP, fixed=True, reuse=False)
        self.emit("cuda.syncwarp()")
        self.emit(f"{var.name} = cuda.activemask()")
        self.masks.append(var.name)
        count, text = self.new("i", 0, 32), f"cuda.popc({var.name})"
        self.emit(f"{count.name} = {text} + 0")
        self.show(count)
        return True

    def s_collective(self):
        """Variables made by shuffles and votes, alone and inside expressions."""
        if self.level < WARP:
            return False
        if self.exited == "lane" or self.chance(0.35):
            vote = f"cuda.{self.pick('all', 'any', 'eq')}_sync({self.mask()}, {self.bool_expr(0)})"
            if self.chance(0.3) and self.depth < 3:
                self.emit(f"if {self.pick('', 'not ')}{vote}:")
                with self.nest(WARP):
                    self.warp_suite()
                return True
            if self.chance(0.4):
                var = self.new("b", level=WARP)
                self.emit(f"{var.name} = {vote}")
            else:
                e = self.int_collective(2, WARP)
                if e is None:
                    return False
                hi = max(e.hi, 1)
                var = self.new("i", 0, hi, level=WARP)
                self.emit(f"{var.name} = {e.text}")
            self.show(var)
            return True
        if self.chance(0.5):
            e = self.fit_float(self.shuffle(self.fit_float(self.float_expr(1)), THREAD))
            extra = self.fit_float(self.float_expr(1), 16)
            var = self.new("f", -64, 64, 3)
            self.emit(f"{var.name} = {e.text} {self.pick('+', '-')} {extra.text}")
        else:
            e = self.shuffle(self.fit(self.int_expr(1), 0, 255), THREAD)
            extra = self.fit(self.int_expr(1), 0, 63)
            var = self.new("i", -63, 318)
            self.emit(f"{var.name} = {e.text} {self.pick('+', '-')} {extra.text}")
        self.show(var)
        return True

    def s_match(self):
        if self.level < WARP:
            return False
        mask, same = self.new("i", 0, 1), self.new("b", level=WARP)
        e = self.fit(self.int_expr(1), 0, self.pick(1, 7))
        self.emit(f"{mask.name}, {same.name} = cuda.match_all_sync({self.mask()}, {e.text})")
        self.emit(f"{mask.name} = {mask.name} & 1")
        self.show(mask)
        self.show(same)
        return True

    # -- memory
    def write(self, a, index):
        """One store (or augmented store) to an element that this thread owns."""
        ref = f"{a.name}[{index}]"
        if a.kind == "b":
            self.emit(f"{ref} = {self.bool_expr(1)}")
        elif a.kind == "i":
            if self.chance(0.15):
                self.emit(f"{ref} = {self.fit_float(self.float_expr(1), 32).text if a.dtype[0] != 'u' else 7}")
            elif a not in self.shared and self.chance(0.3) and a.dtype[0] != "u":
                self.emit(f"{ref} {self.pick('+=', '-=', '^=')} {self.fit(self.int_expr(2), -512, 511).text}")
            else:
                lo, hi = self.pick((0, 1023), (0, 255), (0, 63)) if a.dtype[0] == "u" else (-512, 511)
                self.emit(f"{ref} = {self.fit(self.int_expr(2), max(lo, a.lo), min(hi, a.hi)).text}")
        else:
            e = self.fit_float(self.float_expr(2), 32).text
            if self.chance(0.15) and a.dtype != "float16":
                self.emit(f"{ref} = {self.fit(self.int_expr(1), -32, 31).text}")
            else:
                self.emit(f"{ref} = {e}")

    def s_shared_write(self):
        writable = [a for a in self.shared if a.mode == "W"]
        if not writable:
            return False
        a = self.rng.choice(writable)
        if self.chance(0.2) and a.kind == "i":
            own = self.rng.choice(a.own)
            e = Expr(f"({a.name}[{own}] + {self.fit(self.int_expr(1), 0, 63).text})", -1 << 30, 1 << 30)
            self.emit(f"{a.name}[{own}] = {self.fit(e, max(a.lo, -512), 511).text}")
        else:
            self.write(a, self.rng.choice(a.own))
        return True

    def s_output(self):
        plain = [a for a in self.globals if a.mode == "own"]
        if not plain:
            return False
        a = self.rng.choice(plain)
        if a.op:                    # smaller than the grid: guarded
            self.emit(f"if {a.op}:")
            self.indent += 1
            level, self.level = self.level, THREAD
            self.write(a, self.rng.choice(a.own))
            self.level = level
            self.indent -= 1
        else:
            self.write(a, self.rng.choice(a.own))
        return True

    def s_local(self):
        if len(self.locals) > 3 or self.depth > 2 or self.mult > 8:
            return False
        n, kind = self.pick(2, 3, 4, 8), self.pick("i", "f")
        name = self.name(reuse=False).replace("v", "l")
        dtype = self.pick("int32", "int64") if kind == "i" else self.pick("float32", "float64")
        lo, hi, frac = (-512, 511, 0) if kind == "i" else (-32, 32, 3)
        a = Array(name, kind, dtype, (n,), lo, hi, frac, mode="live")
        self.emit(f"{name} = cuda.local.array({n}, {self.m.dtype(dtype)})")
        counter = self.new("i", 0, n - 1, level=self.level, fixed=True)
        self.emit(f"for {counter.name} in range({n}):")
        with self.nest(THREAD, loop=False, mult=n):
            self.show(counter)
            with self.simple():
                self.emit(f"{name}[{counter.name}] = " + (
                    self.fit(self.int_expr(1), lo, hi) if kind == "i" else self.fit_float(self.float_expr(1))).text)
        self.locals.append(a)
        self.statements(1)
        e = self.fit(self.int_expr(1), lo, hi) if kind == "i" else self.fit_float(self.float_expr(1))
        self.emit(f"{name}[{self.index(n, THREAD)}] = {e.text}")
        self.statements(1)
        var = self.new(kind, lo, hi, frac)
        self.emit(f"{var.name} = {name}[{self.index(n, THREAD)}]")
        self.show(var)
        self.locals.remove(a)
        return True

    def s_atomic(self):
        options = [a for a in self.globals if a.mode == "A"] + [a for a in self.shared if a.mode == "A"] * 3
        if not options or self.mult > 40:
            return False
        a = self.rng.choice(options)
        with self.simple():
            index = ", ".join(self.index(n, THREAD) for n in a.shape)
            if len(a.shape) > 1:
                index = f"({index})"
            if a.kind == "i":
                value = self.fit(self.int_expr(1), 0, 15).text
            else:
                value = self.fit_float(self.float_expr(1), 4, 2).text
        self.emit(f"cuda.atomic.{a.op}({a.name}, {index}, {value})")
        return True

    def s_own_atomic(self):
        """An atomic on an element that only this thread touches: its old value is known."""
        options = [a for a in self.globals if a.mode == "own" and not a.op and a.dtype in ("int32", "int64")
                   and len(a.shape) == 1]
        if not options:
            return False
        a, var = self.rng.choice(options), self.new("i", 0, 255)
        value = self.fit(self.int_expr(1), 0, 255).text
        call = self.pick(f"exch({a.name}, gid, {value})", f"add({a.name}, gid, {value})",
                         f"max({a.name}, gid, {value})", f"cas({a.name}, gid, {self.pick(0, 1, 2)}, {value})")
        self.emit(f"{var.name} = cuda.atomic.{call} & 255")
        self.show(var)
        return True

    # -- names
    def s_reuse(self):
        """One name: an int used as an index, then a float (or the other way round)."""
        if not self.inputs:
            return False
        first, second = self.pick("if", "fi")
        (a, x) = self.random_var(first)
        self.emit(f"{a.name} = {x}  # reused below as {'a float' if second == 'f' else 'an int'}")
        self.show(a)
        self.use(a)
        self.retire(a)
        self.dead.remove(a.name)
        b, y = self.random_var(second)
        if b.name not in self.dead and b.reusable:
            self.dead.append(b.name)
        b.name = a.name
        if self.chance(0.25) and second == "i" and self.depth < 3 and self.mult < 8:
            b.lo, b.hi, b.fixed, b.level = 0, 2, True, THREAD
            self.emit(f"for {b.name} in range(3):")
            with self.nest(THREAD, loop=True, mult=3):
                self.show(b)
                self.suite()
            return True
        self.emit(f"{b.name} = {y}")
        self.show(b)
        self.use(b)
        return True

    def use(self, var):
        """A statement in which the value matters."""
        target, arrays = self.new(self.pick("i", "f"), -2048, 2048, 3), [a for a in self.inputs if len(a.shape) == 1]
        arrays = [a for a in arrays if a.kind == target.kind and a.dtype in ("int32", "int64", "float32", "float64")]
        if var.kind == "i" and arrays:
            a = self.rng.choice(arrays)
            text = f"{a.name}[{var.name} % {a.shape[0]}]"
        elif target.kind == "i":
            text = f"{var.name} * 3 + 1" if var.kind == "i" else f"int({var.name} * 4.0)"
        else:
            text = f"{var.name} * 0.5" if var.kind in "fs" else f"{var.name} * 0.125"
        if target.kind == "i":
            target.frac = 0
        self.emit(f"{target.name} = {text}")
        self.show(target)

    def s_maybe(self):
        """A variable that is assigned on one path only, and read on that path only."""
        if self.depth >= 3:
            return False
        level = self.level if self.chance(0.3) else THREAD
        flag = self.new("b", level=level, fixed=True, reuse=False)
        self.emit(f"{flag.name} = {self.bool_expr(1, level)}")
        self.show(flag)
        value = self.new("i", -64, 63, fixed=True, reuse=False)
        self.emit(f"if {flag.name}:")
        with self.nest(level):
            self.emit(f"{value.name} = {self.fit(self.int_expr(2), -64, 63).text}  # read only if assigned")
            if self.chance(0.3):
                self.suite()
        self.statements(self.rng.randint(0, 2))
        if self.chance(0.5):
            result = self.new("i", -64, 63)
            self.emit(f"{result.name} = {value.name} if {flag.name} else {self.rng.randint(-9, 9)}")
            self.show(result)
            return True
        self.emit(f"if {flag.name}:")
        with self.nest(level):
            self.show(value)
            self.suite()
            target = [v for v in self.visible("i", writable=True) if v.level == THREAD]
            if target:
                v = self.rng.choice(target)
                self.emit(f"{v.name} = {self.fit(Expr(f'({v.name} + {value.name})', -4096, 4096), v.lo, v.hi).text}")
            self.vars.remove(value)
        return True
