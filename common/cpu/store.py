"""What is kept on disk between runs: one file an entry, with a digest of its content, in a folder of the user's own.

An entry is read only if it is whole, belongs to this user and nobody else can write it; anything else counts as not
there, and is made anew. A folder that cannot be used costs a compilation in each process, and one line of warning.
"""

import functools
import hashlib
import json
import opcode
import os
import re
import stat
import sys
import tempfile
import warnings
from pathlib import Path

MAGIC = b"kernel-by-kernel 2\n"

_warned = set()  # folders that a warning was given for


def cache_dir():
    """Where compiled kernels are kept: ``MINI_CACHE_DIR``, or a folder below the user's cache."""
    chosen = os.environ.get("MINI_CACHE_DIR")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "kernel-by-kernel"


def read(name):
    """The content (bytes) of an entry; None if there is none that is whole and to be trusted."""
    folder = cache_dir()
    try:
        if not _ours(os.lstat(folder), folder):
            return None
        with open(os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not _ours(os.fstat(file.fileno()), None):
                return None
            data = file.read()
    except OSError:  # not there, or not to be read
        return None
    head = len(MAGIC) + 32
    content = data[head:]
    if data[: len(MAGIC)] != MAGIC or data[len(MAGIC) : head] != hashlib.sha256(content).digest():
        return None
    return content


def write(name, content):
    """Keep ``content`` (bytes) as an entry; where that cannot be done, warn once and go on without."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _ours(os.lstat(folder), folder):
            return
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f"{name}.", suffix=".tmp")
        try:
            with open(handle, "wb") as file:
                file.write(MAGIC + hashlib.sha256(content).digest() + content)
            os.replace(temporary, folder / name)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        _warn(folder, f"{error.strerror or error}")


def _ours(status, folder):
    """May what has this ``os.stat`` result be trusted? A folder of ours that others can write is closed to them."""
    if folder is None:
        return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
    if not stat.S_ISDIR(status.st_mode):
        if stat.S_ISLNK(status.st_mode) and folder.is_dir():  # a link that this user has set
            return status.st_uid == os.geteuid() and _ours(os.stat(folder), folder)
        _warn(folder, "it is not a folder")
        return False
    if status.st_uid != os.geteuid():
        _warn(folder, "it belongs to another user")
        return False
    if status.st_mode & 0o077:
        os.chmod(folder, 0o700)
    return True


def _warn(folder, why):
    if folder not in _warned:
        _warned.add(folder)
        warnings.warn(
            f"compiled kernels cannot be kept in {folder} ({why}); they are compiled in each process. "
            "Set MINI_CACHE_DIR to a folder of your own",
            stacklevel=2,
        )


def short_digest(text):
    """20 hexadecimal digits that stand for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]


# --- what code is made of ---------------------------------------------------------------------------------------------


def meaning(path):
    """The digest of what a Python file means: of its code without comments and docstrings."""
    return _meanings((Path(path),))[Path(path).stem][0]


def meaning_of_module(name):
    """The same of an imported module; empty if it has no file of Python."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return meaning(file) if file and file.endswith(".py") else ""


@functools.cache
def meaning_of_backend(*names):
    """A digest of the modules ``names`` of this folder and of all that they import from it; of all without names."""
    known = _meanings(tuple(sorted(Path(__file__).parent.glob("*.py"))))
    todo, used = list(names or known), {}
    while todo:
        name = todo.pop()
        if name in known and name not in used:
            used[name], imports = known[name]
            todo += imports
    return hashlib.sha256(repr(sorted(used.items())).encode()).hexdigest()


@functools.cache
def _meanings(paths):
    """{module: (digest, relative imports)} of Python files. Parsing takes time, so it is kept, by the files' bytes."""
    texts = [path.read_bytes() for path in paths]
    name = f"meaning_{hashlib.sha256(repr((sys.version_info[:2], texts)).encode()).hexdigest()[:24]}"
    known = read(name)
    if known is None:
        meanings = {
            path.stem: (short_digest(_meaning_of(text)), sorted(_relative_imports(text.decode())))
            for path, text in zip(paths, texts)
        }
        known = json.dumps(meanings).encode()
        write(name, known)
    return json.loads(known)


NOP = opcode.opmap["NOP"]
IMPORT = re.compile(r"^[ \t]*from \.(\w*) import (\([^)]*\)|[^\n#]*)", re.MULTILINE)


def _relative_imports(text):
    """The modules of its own folder that a file imports."""
    found = set()
    for module, names in IMPORT.findall(text):
        found |= {module} if module else {name.split()[0] for name in names.strip("() \n").split(",") if name.strip()}
    return found


def _meaning_of(text):
    """What a file is compiled to, without docstrings and the numbers of lines: four times as fast as by its tree."""

    def described(value):
        if isinstance(value, type(_meaning_of.__code__)):
            facts = value.co_name, value.co_flags, value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount
            names = value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars
            handlers, code = getattr(value, "co_exceptiontable", b""), value.co_code
            code = [code[k : k + 2] for k in range(0, len(code), 2) if code[k] != NOP]  # all that a docstring leaves
            return repr((facts, names, b"".join(code), handlers, [described(const) for const in value.co_consts]))
        if isinstance(value, tuple):
            return f"({', '.join(map(described, value))})"
        if isinstance(value, frozenset):  # whose order is another in each process
            return f"{{{', '.join(sorted(map(described, value)))}}}"
        return f"{type(value).__name__} {value!r}"

    return described(compile(text, "", "exec", dont_inherit=True, optimize=2))
