"""How the threads of a block are walked: a few outer loops over *groups*, and one inner loop over a group's lanes.

Statements that are the same for a whole group (a loop over k, say) stand between the two, so that the lane loop is
innermost and LLVM turns it into SIMD code. A group is a warp (32 consecutive threads), or a row of the block.
"""

LANES = 32


class Group:
    """One way to walk a block. ``lines(emit)`` opens the outer loops, ``lane_header`` the inner one.

    ``constant``: position names that are the same for all lanes of a group.
    ``size``: number of lanes, as text.
    ``ends``: what position names are at the first and last lane (None where they do not grow with the lane).
    """

    def __init__(self, kind, block_dim):
        self.kind, self.block_dim = kind, block_dim
        bx, by, bz = block_dim
        self.threads = bx * by * bz
        self.full = kind == "row" or self.threads % LANES == 0 or self.threads < LANES
        self.size = str(bx if kind == "row" else min(LANES, self.threads)) if self.full else "_gn"
        last = f"{int(self.size) - 1}" if self.full else "(_gn - 1)"
        self.constant = {"row": {"_ty", "_tz"}, "line": {"_warp"}, "wide": {"_ty", "_tz", "_warp"}, "any": {"_warp"}}[
            kind
        ]
        self.ends = {
            "row": ({"_tx": "0", "_tid": "_c"}, {"_tx": last, "_tid": f"(_c + {last})"}),
            "line": (
                {"_tx": "_c", "_tid": "_c", "_lane": "0"},
                {"_tx": f"(_c + {last})", "_tid": f"(_c + {last})", "_lane": last},
            ),
            "wide": (
                {"_tx": "_x0", "_tid": "_c", "_lane": "0"},
                {"_tx": f"(_x0 + {last})", "_tid": f"(_c + {last})", "_lane": last},
            ),
            "any": None,
        }[kind]

    def open(self, emit):
        """Write the outer loops; returns how many levels of indentation they took."""
        bx, by, bz = self.block_dim
        levels = 0
        if self.kind in ("row", "wide"):
            for var, extent in (("_tz", bz), ("_ty", by)):
                if extent > 1:
                    emit(f"for {var} in range({extent}):", levels)
                    levels += 1
            base = " + ".join(t for t, e in ((f"_tz * {bx * by}", bz), (f"_ty * {bx}", by)) if e > 1) or "0"
            if self.kind == "row":
                emit(f"_c = {base}", levels)
            else:
                if bx > LANES:
                    emit(f"for _k in range({bx // LANES}):", levels)
                    levels += 1
                    emit(f"_x0 = _k * {LANES}", levels)
                else:
                    emit("_x0 = 0", levels)
                emit(f"_c = {base} + _x0", levels)
                emit("_warp = _c >> 5", levels)
        else:
            warps = -(-self.threads // LANES)
            if warps > 1:
                emit(f"for _warp in range({warps}):", levels)
                levels += 1
                emit(f"_c = _warp * {LANES}", levels)
            else:
                emit("_warp = 0", levels)
                emit("_c = 0", levels)
            if not self.full:
                emit(f"_gn = min({LANES}, {self.threads} - _c)", levels)
        return levels

    def lane_header(self, need):
        """Lines that open the lane loop: the ``for`` itself, then the position names in ``need``."""
        bx, by, bz = self.block_dim
        derived = [f"{axis} = 0" for axis, extent in (("_ty", by), ("_tz", bz)) if extent == 1 and axis in need]
        if self.kind == "row":
            lines = [f"for _tx in range({self.size}):"]
            if need & {"_tid", "_i", "_lane", "_warp"}:
                derived.append("_tid = _c + _tx")
            if "_lane" in need:
                derived.append("_lane = _tid & 31")
            if "_warp" in need:
                derived.append("_warp = _tid >> 5")
        else:
            lines = [f"for _lane in range({self.size}):"]
            if need & {"_tid", "_i"} or "_tx" in need and self.kind != "wide" or self.kind == "any":
                derived.append("_tid = _c + _lane")
            if self.kind == "line":
                if "_tx" in need:
                    derived.append("_tx = _tid")
            elif self.kind == "wide":
                if "_tx" in need:
                    derived.append("_tx = _x0 + _lane")
            else:
                if "_tx" in need:
                    derived.append(f"_tx = _tid % {bx}")
                if "_ty" in need and by > 1:
                    derived.append(f"_ty = (_tid // {bx}) % {by}")
                if "_tz" in need and bz > 1:
                    derived.append(f"_tz = _tid // {bx * by}")
        if "_i" in need:
            derived.append("_i = _U(_tid)")
        return lines + ["    " + d for d in derived]


def choose_group(block_dim, warp, splits):
    """The group that suits a region. ``warp``: it has shuffles or votes; ``splits``: loops outside the lane loop."""
    bx, by, bz = block_dim
    line = by == bz == 1
    if warp or (splits and (line or bx % LANES == 0 or bx < 4)):
        if line:
            return Group("line", block_dim)
        return Group("wide" if bx % LANES == 0 else "any", block_dim)
    if not line and bx < 4:
        return Group("any", block_dim)
    return Group("row", block_dim)


class Context:
    """Where code is being written: the group, the masks in force, the kind of the innermost group-level loop."""

    def __init__(self, group, masks=(), loop=None):
        self.group, self.masks, self.loop = group, tuple(masks), loop

    def but(self, **changes):
        return Context(**{"group": self.group, "masks": self.masks, "loop": self.loop, **changes})
