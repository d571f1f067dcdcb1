"""Small tools for building and reading ASTs."""

import ast


def name(identifier, ctx=None):
    return ast.Name(id=identifier, ctx=ctx or ast.Load())


def call(function, *args, like=None):
    node = ast.Call(func=name(function), args=list(args), keywords=[])
    return at(node, like)


def at(node, like):
    """``node`` with the source position of ``like`` on it and everything new below it."""
    if like is not None:
        for sub in ast.walk(node):
            if not hasattr(sub, "lineno") and isinstance(sub, (ast.expr, ast.stmt)):
                ast.copy_location(sub, like)
                if hasattr(like, "filename"):
                    sub.filename = like.filename
    return node


def assign(target, value, like):
    return at(ast.Assign(targets=[name(target, ast.Store())], value=value), like)


def bodies(stmt):
    """The statement lists directly below a statement."""
    return [getattr(stmt, f) for f in ("body", "orelse") if getattr(stmt, f, None)]


def has_special(node):
    return any(getattr(n, "special", None) for n in ast.walk(node))


def strip_docstring(stmts):
    first = stmts[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return stmts[1:]
    return stmts


def undecided(node):
    """A comparison of literals with a cast in it, in place: Numba decides it early otherwise, cuts off the branch that
    is never taken, and then refuses what reads a variable that was set there."""
    values = [getattr(n, "value", None) for n in (node.left, *node.comparators)]
    if all(type(v) in (int, float) for v in values):
        cast = ast.Attribute(name("np"), "int64" if type(values[0]) is int else "float64", ast.Load())
        node.left = at(ast.Call(cast, [node.left], []), node)
    return node
