"""Control flow made ready for fission: early exits become branches, ranges that differ between threads become while."""

import ast

from .analysis import Analysis, special
from .tree import at, bodies, name


def contains(stmt, kinds):
    """Does a statement (or list) contain a collective of one of ``kinds`` ('B', 'W')?"""
    roots = stmt if isinstance(stmt, list) else [stmt]
    return any(
        (special(s) or "-") in kinds for r in roots for s in ast.walk(r) if isinstance(s, (ast.Assign, ast.Expr))
    )


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


def analyse(program, array_params, nonneg_params, loads_vary=False):
    """Fold early exits, find what is uniform, desugar loops; returns the :class:`Analysis`.

    ``loads_vary``: every thread loads for itself, even what is the same for all.
    """
    fold_exits(program.body, last=True)

    def run():
        diverge = False
        for _ in range(2):
            analysis = Analysis(program.body, program.params, [*array_params, *program.shared, *program.consts],
                                program.local, program.block_dim, nonneg_params, diverge, loads_vary)  # fmt: skip
            if diverge or not diverging_return(program.body, analysis):
                return analysis
            diverge = True
        return analysis

    analysis = run()
    if fold_exits(program.body, True, analysis):
        analysis = run()
    if desugar_loops(program.body, analysis, program):
        analysis = run()
    return analysis


def diverging_return(stmts, analysis):
    for s in stmts:
        if isinstance(s, ast.If) and has_return(s):
            if not analysis.uniform(s.test) or any(diverging_return(b, analysis) for b in bodies(s)):
                return True
        elif isinstance(s, (ast.For, ast.While)) and has_return(s):
            if not analysis.uniform_control(s) or diverging_return(s.body, analysis):
                return True
    return False
