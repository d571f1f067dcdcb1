"""Warp level: shuffles, votes and matches, carried out for 32 lanes under the masks in force."""

import ast


def _mask_error(kind):
    return (
        f"the mask of cuda.{kind} names lanes that do not take part, or leaves out the calling lane: on a GPU this "
        "is undefined (it may hang)",
        "compute the mask before the branch: mask = cuda.ballot_sync(0xffffffff, condition)",
    )


class WarpLevel:
    """The part of the emitter that writes warp collectives."""

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
                if self.accesses and not self.memory and self.alive and kind.startswith("shfl"):
                    _, exist = self.active_bits(ctx, False, returned=True)  # nobody can read what they had
                self.check_mask(stmt, ctx, mask, act, exist, kind)
            elif kind == "syncwarp":
                # Nobody is here in the rest of a loop's body that all lanes have just left.
                self.fail(f"{act} != 0 and ({exist} & ~{act}) != 0", stmt, *_mask_error(kind))
        if kind == "syncwarp":
            if self.accesses and not self.memory:
                return self.meet(None if full_mask else mask, act, ctx)
            return self.emit("pass  # syncwarp")
        if kind == "activemask":
            return self.lanes(ctx, lambda: self.emit(f"{self.target(stmt)} = np.uint32({act})"))
        if kind.startswith("shfl"):
            return self.shuffle(stmt, ctx, kind, act)
        if kind.startswith("match"):
            return self.match(stmt, ctx, kind, act)
        return self.ballot(stmt, ctx, kind, act)

    def meet(self, mask, act, ctx):
        """Emit what a ``syncwarp`` means for the sanitizer. Lanes with different masks meet in groups of their own."""
        act = act or "0xFFFFFFFF"
        if mask is None:
            return self.emit(f"_syncwarp(_z, _warp, {act})")
        masks = self.buffer("v", "32", "numba.types.int64", 256)
        self.emit(f"{masks}[:] = 0")

        def fill():
            self.need.add("_lane")
            self.emit(f"{masks}[_lane] = ({self.expr(mask)}) & {act}")

        self.lanes(ctx, fill)
        self.emit("for _l in range(32):")
        self.emit(f"    if ({masks}[_l] >> _l) & 1 != 0 and {masks}[_l] & ((1 << _l) - 1) == 0:")
        self.emit(f"        _syncwarp(_z, _warp, {masks}[_l])")

    def target(self, stmt):
        return self.place(stmt.targets[0].id) if isinstance(stmt, ast.Assign) else "_unused"

    def active_bits(self, ctx, whole, returned=False):
        """Emit (names of) the bits of the lanes that are here, and of those that are in the kernel, or were."""
        act, exist = self.fresh("act"), self.fresh("ex")
        if whole:
            self.emit(f"{act} = {exist} = 0xFFFFFFFF")
            return act, exist
        for bits, masks in ((act, ctx.masks), (exist, ("_alive",) if self.alive and not returned else ())):
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
            source = {
                "shfl_sync": off,
                "shfl_up_sync": f"_lane - {off}",
                "shfl_down_sync": f"_lane + {off}",
                "shfl_xor_sync": f"_lane ^ {off}",
            }[kind]
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
        if self.memory:
            self.notice(stmt, "the operations of an instruction of the whole warp")
        if ctx.masks or self.a.threads % 32:
            act, exist = self.active_bits(ctx, False)
            self.fail(
                f"{act} != 0xFFFFFFFF",
                stmt,
                "all 32 lanes of the warp must take part in this instruction",
                "launch a multiple of 32 threads and keep it out of divergent branches",
            )
        arguments = []
        for i in range(len(node.args)):
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
