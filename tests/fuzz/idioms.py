"""What people write: reductions, scans, votes, double buffers."""

from tests.fuzz.parts import BLOCK, MAX_COST, THREAD, WARP, Expr
from tests.fuzz.statements import Statements


class Idioms(Statements):
    """The statements of one function: those that follow a pattern which people use."""

    def scratch(self, kinds="if"):
        """A one-dimensional shared array with one element a thread, for an idiom at BLOCK level."""
        if self.level < BLOCK or self.mult > 4 or self.depth >= 3:
            return None
        options = [a for a in self.shared if a.warp_tile and a.kind in kinds and a.dtype != "uint32" and not a.op]
        return self.rng.choice(options) if options else None

    def own_value(self, a, limit):
        if a.kind == "i":
            return self.fit(self.int_expr(1), 0, limit).text
        return self.fit_float(self.float_expr(1), limit, 2).text

    def s_tree_reduce(self):
        a = self.scratch()
        if a is None or self.exited == "lane":
            return False
        if a.mode != "W":
            self.force(a, "W")
        self.emit(f"{a.name}[tid] = {self.own_value(a, 8)}")
        self.emit("cuda.syncthreads()")
        half = 1
        while half < self.m.threads:
            half *= 2
        step, n = self.new("i", 0, 128, level=BLOCK, fixed=True), self.m.threads
        how = self.pick("+", "+", "max", "min")
        old, other = f"{a.name}[tid]", f"{a.name}[tid + {step.name}]"
        update = f"{old} += {other}" if how == "+" else f"{old} = {how}({old}, {other})"
        self.emit(f"{step.name} = {max(half // 2, 1)}")
        self.emit(f"while {step.name} > 0:")
        self.indent += 1
        self.emit(f"if tid < {step.name} and tid + {step.name} < {self.pick(str(n), 'nt')}:")
        self.emit(f"    {update}")
        self.emit("cuda.syncthreads()")
        self.emit(self.pick(f"{step.name} //= 2", f"{step.name} >>= 1"))
        self.indent -= 1
        self.dead.append(step.name)
        var = self.new(a.kind, -8 * n, 8 * n, 2 if a.kind == "f" else 0, level=BLOCK, fixed=True)
        self.emit(f"{var.name} = {a.name}[0]")
        self.show(var)
        self.barrier()
        return True

    def s_scan(self):
        a = self.scratch()
        if a is None or self.exited == "lane":
            return False
        if a.mode != "W":
            self.force(a, "W")
        n = self.m.threads
        self.emit(f"{a.name}[tid] = {self.own_value(a, 4)}")
        self.emit("cuda.syncthreads()")
        off, t, doubling = self.new("i", fixed=True), self.new(a.kind, fixed=True), self.chance(0.5)
        zero = "0" if a.kind == "i" else self.pick("0.0", "0")
        if doubling:
            self.emit(f"{off.name} = 1")
            self.emit(f"while {off.name} < {self.pick('nt', str(n))}:")
        else:
            k = self.new("i", fixed=True)
            self.emit(f"for {k.name} in range({max(1, (n - 1).bit_length())}):")
            self.emit(f"    {off.name} = 1 << {k.name}")
            self.dead.append(k.name)
        self.indent += 1
        if self.chance(0.5):
            self.emit(f"{t.name} = {a.name}[tid - {off.name}] if tid >= {off.name} else {zero}")
        else:
            self.emit(f"{t.name} = {zero if a.kind == 'i' else '0.0'}")
            self.emit(f"if tid >= {off.name}:")
            self.emit(f"    {t.name} = {a.name}[tid - {off.name}]")
        self.emit("cuda.syncthreads()")
        self.emit(f"{a.name}[tid] += {t.name}")
        self.emit("cuda.syncthreads()")
        if doubling:
            self.emit(f"{off.name} *= 2")
        self.indent -= 1
        self.dead += [off.name, t.name]
        var = self.new(a.kind, -4 * n, 4 * n, 2 if a.kind == "f" else 0, fixed=True)
        self.emit(f"{var.name} = {a.name}[{self.pick('tid', 'nt - 1 - tid')}]")
        self.show(var)
        self.barrier()
        return True

    def warp_ready(self):
        return self.level >= WARP and self.exited != "lane" and self.mult <= 12 and self.depth < 3

    def s_butterfly(self):
        if not self.warp_ready() or not self.full:
            return False
        kind = self.pick("i", "f")
        var = self.new(kind, -512, 512, 2 if kind == "f" else 0, fixed=True)
        value = self.fit(self.int_expr(1), -15, 15) if kind == "i" else self.fit_float(self.float_expr(1), 8, 2)
        self.emit(f"{var.name} = {value.text} + {'0' if kind == 'i' else '0.0'}")
        how = self.pick("+", "max")
        k = self.new("i", fixed=True)
        form = self.rng.randrange(3)
        self.emit([f"for {k.name} in (16, 8, 4, 2, 1):", f"for {k.name} in range(5):", f"{k.name} = 16"][form])
        if form == 2:
            self.emit(f"while {k.name} > 0:")
        amount = f"1 << {k.name}" if form == 1 else k.name
        other = f"cuda.shfl_xor_sync({self.mask()}, {var.name}, {amount})"
        self.emit(f"    {var.name} += {other}" if how == "+" else f"    {var.name} = max({var.name}, {other})")
        if form == 2:
            self.emit(f"    {k.name} //= 2")
        self.dead.append(k.name)
        self.show(var)
        return True

    def s_warp_scan(self):
        if not self.warp_ready():
            return False
        var, t, d = self.new("i", -512, 512, fixed=True), self.new("i", fixed=True), self.new("i", fixed=True)
        self.emit(f"{var.name} = {self.fit(self.int_expr(1), -15, 15).text} + 0")
        self.emit(f"{d.name} = 1")
        self.emit(f"while {d.name} < {self.pick('32', 'cuda.warpsize')}:")
        self.emit(f"    {t.name} = cuda.shfl_up_sync({self.mask()}, {var.name}, {d.name})")
        self.emit(f"    if {self.lane_text()} >= {d.name}:")
        self.emit(f"        {var.name} += {t.name}")
        self.emit(f"    {d.name} *= 2")
        self.dead += [t.name, d.name]
        self.show(var)
        return True

    def s_warp_down(self):
        """A reduction that also works in a ragged warp: lanes without a partner drop what they receive."""
        if not self.warp_ready():
            return False
        var, t, d = self.new("i", -512, 512, fixed=True), self.new("i", fixed=True), self.new("i", fixed=True)
        self.emit(f"{var.name} = {self.fit(self.int_expr(1), -15, 15).text} + 0")
        self.emit(f"{d.name} = 16")
        self.emit(f"while {d.name} > 0:")
        self.emit(f"    {t.name} = cuda.shfl_down_sync({self.mask()}, {var.name}, {d.name})")
        self.emit(f"    if {self.lane_text()} + {d.name} < {self.wn}:")
        self.emit(f"        {var.name} += {t.name}")
        self.emit(f"    {d.name} >>= 1")
        self.dead += [t.name, d.name]
        self.show(var)
        return True

    def s_compact(self):
        if self.level < WARP:
            return False
        m, keep = self.new("i", level=WARP, fixed=True), self.new("b", fixed=True)
        self.emit(f"{keep.name} = {self.bool_expr(1)}")
        self.emit(f"{m.name} = cuda.ballot_sync({self.mask()}, {keep.name})")
        position = self.new("i", 0, 32)
        self.emit(f"{position.name} = cuda.popc({m.name} & cuda.lanemask_lt()) if {keep.name} else 32")
        self.dead.append(m.name)
        self.show(keep)
        self.show(position)
        return True

    def s_match_group(self):
        """Lanes with the same key form a group with its own mask."""
        if self.level < WARP:
            return False
        m, leader = self.new("i", fixed=True), self.new("i", 0, 31, fixed=True)
        key = self.fit(self.int_expr(1), 0, 3)
        self.emit(f"{m.name} = cuda.match_any_sync({self.mask()}, {key.text})")
        self.emit(f"{leader.name} = cuda.ffs({m.name}) - 1")
        var = self.new("i", 0, 255)
        value = self.fit(self.int_expr(1), 0, 255).text
        self.emit(f"{var.name} = cuda.shfl_sync({m.name}, {value}, {leader.name})")
        test = self.new("b")
        with self.without_collectives():
            c = self.bool_expr(0)
        self.emit(f"{test.name} = cuda.{self.pick('all', 'any', 'eq')}_sync({m.name}, {c})")
        self.dead.append(m.name)
        for v in (leader, var, test):
            self.show(v)
        return True

    def s_submask(self):
        """A branch taken by half a warp, whose mask names exactly these lanes."""
        if not self.warp_ready() or not self.full:
            return False
        n, mask = self.pick((16, "0xFFFF"), (8, "0xFF"), (4, "0xF"))
        target = [v for v in self.visible("i", writable=True) if v.level == THREAD]
        if not target:
            return False
        v = self.rng.choice(target)
        self.emit(f"if {self.lane_text()} < {n}:")
        op = self.pick(f"cuda.shfl_xor_sync({mask}, {v.name}, {n // 2})",
                       f"cuda.shfl_sync({mask}, {v.name}, {self.rng.randrange(n)})",
                       f"cuda.shfl_up_sync({mask}, {v.name}, 1)",
                       f"cuda.popc(cuda.ballot_sync({mask}, {v.name} % 2 == 0))")
        self.emit(f"    {v.name} = {self.fit(Expr(f'({op} + 1)', -4096, 4096), v.lo, v.hi).text}")
        if self.chance(0.5):
            self.emit(f"    cuda.syncwarp({mask})")
        return True

    def s_vote_loop(self):
        """A loop that goes on while any thread of the block (or of the warp) has work."""
        if self.level < WARP or self.depth >= 2 or self.mult > 4:
            return False
        block = self.level == BLOCK and self.chance(0.6)
        work = self.new("i", 0, 5, fixed=True)
        count = self.new("i", 0, 5, level=BLOCK if block else WARP, fixed=True)
        self.emit(f"{work.name} = {self.fit(self.int_expr(1), 0, 5).text}")
        self.emit(f"{count.name} = 0")
        test = f"cuda.any_sync({self.mask()}, {work.name} > 0)"
        if block:
            test = f"cuda.syncthreads_or(int({work.name} > 0))"
        inverse = self.chance(0.4)
        self.emit("while True:" if inverse else f"while {test}:")
        level = BLOCK if block else WARP
        self.show(work)
        self.show(count)
        with self.nest(level, loop=False, mult=5):
            if inverse:
                self.emit(f"if {f'{test} == 0' if block else f'not {test}'}:")
                self.emit("    break")
            self.emit(f"if {work.name} > 0:")
            with self.nest(THREAD):
                self.emit(f"{work.name} -= 1")
                self.suite()
            self.emit(f"{count.name} += 1")
            if self.chance(0.5):
                self.suite()
        return True

    def s_double_buffer(self):
        """Two halves in turn, one barrier a round."""
        if not self.is_kernel or self.level < BLOCK or self.depth > 1 or self.mult > 4 or not self.m.double_buffers:
            return False
        if self.exited:
            return False
        a = self.m.double_buffers[0]
        rounds = self.rng.randint(2, 4)
        k, var = self.new("i", 0, rounds - 1, level=BLOCK, fixed=True), self.new("i", 0, 64 * rounds, fixed=True)
        self.emit("cuda.syncthreads()")
        self.emit(f"{var.name} = 0")
        self.emit(f"for {k.name} in range({rounds}):")
        with self.nest(BLOCK, loop=False, mult=rounds):
            self.show(k)
            with self.simple():
                value = self.fit(self.int_expr(2), 0, 63).text
                self.emit(f"{a.name}[{k.name} % 2, tid] = {value}")
                self.emit("cuda.syncthreads()")
                self.emit(f"{var.name} += {a.name}[{k.name} & 1, {self.index(self.m.threads, THREAD)}]")
        self.emit("cuda.syncthreads()")
        self.show(var)
        return True

    def s_call_block(self):
        """A call of a device function that holds barriers."""
        if not self.m.block_functions or self.level < BLOCK or self.mult > 4 or self.exited:
            return False
        f, needs = self.rng.choice(self.m.block_functions)
        if f.cost * self.mult > MAX_COST:
            return False
        array = None
        texts = []
        with self.simple():
            for kind in f.params:
                if kind == "s":
                    options = [a for a in self.shared if a.warp_tile and a.dtype == needs]
                    if not options:
                        return False
                    array = self.rng.choice(options)
                    texts.append(array.name)
                elif kind == "u":
                    texts.append(self.fit(self.int_expr(1, BLOCK), 0, 7).text)
                elif kind == "i":
                    texts.append(self.fit(self.int_expr(1), -64, 63).text)
                else:
                    texts.append(self.fit_float(self.float_expr(1)).text)
            texts += ["tid", "nt"]
            extra = self.fit(self.int_expr(1), 0, 63).text if f.kind == "i" else self.float_literal().text
        call = f"{f.name}({', '.join(texts)})"
        if self.chance(0.4):
            call = self.pick(f"{call} + {extra}", f"{extra} + {call}")
        var = self.new(f.kind, f.lo - 64, f.hi + 64, max(f.frac, 2) if f.kind == "f" else 0)
        self.emit(f"{var.name} = {call}")
        self.show(var)
        if array is not None:
            array.mode = "W"
        return True
