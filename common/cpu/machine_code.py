"""Machine code of generated functions: compiled by Numba in a child process, kept in `store` between runs."""

import contextlib
import faulthandler
import functools
import gc
import json
import os
import pickle
import resource
import signal
import sys
import time
import types as pytypes
import warnings

import llvmlite
import llvmlite.binding as llvm
import numba
import numpy as np
from numba.core import compiler, config, typed_passes, untyped_passes
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.registry import cpu_target
from numba.core.serialize import dumps
from numba.cpython import numbers

from . import gpu_numbers, store


class Pipeline(compiler.CompilerBase):
    """Numba's passes without those that find nothing in generated code: closures, ``with``, array expressions, …

    They take a tenth of the time (measured over 47 kernels of chapters 7 and 10).
    """

    def define_pipelines(self):
        passes = compiler.PassManager("kernel by kernel")
        passes.add_pass(untyped_passes.TranslateByteCode, "analyzing bytecode")
        passes.add_pass(untyped_passes.FixupArgs, "fix up args")
        passes.add_pass(untyped_passes.IRProcessing, "processing IR")
        passes.add_pass(untyped_passes.RewriteSemanticConstants, "rewrite semantic constants")
        # once before the variables have versions, as Numba does: what it leaves of a phi then may have no type
        passes.add_pass(untyped_passes.DeadBranchPrune, "dead branch pruning")
        passes.add_pass(untyped_passes.GenericRewrites, "nopython rewrites")
        passes.add_pass(untyped_passes.ReconstructSSA, "ssa")
        passes.add_pass(untyped_passes.DeadBranchPrune, "dead branch pruning")
        passes.add_pass(typed_passes.NopythonTypeInference, "nopython frontend")
        passes.add_pass(typed_passes.PreLowerStripPhis, "remove phis nodes")
        lowering = compiler.DefaultPassBuilder.define_nopython_lowering_pipeline(self.state)
        passes.passes.extend(lowering.passes)
        passes.finalize()
        return [passes]


OPTIONS = {
    "error_model": "numpy",
    "fastmath": {"contract"},
    "nogil": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": Pipeline,
}

count = {"compiled": 0, "loaded": 0, "seconds": 0.0}  # of this process: functions, CPU seconds spent on compiling


@functools.cache
def platform():
    """A digest of what machine code depends on besides its text: versions and the processor."""
    versions = sys.version_info[:2], numba.__version__, llvmlite.__version__, np.__version__
    return store.short_digest(repr((versions, cpu_target.target_context.codegen().magic_tuple())))


def name_of(title, text, modules=(), behind=()):
    """A name for the machine code of a generated module.

    text: its text and whatever else decides its code. modules: full names of imported modules whose functions it calls.
    behind: names of modules of this folder that it imports besides `runtime`.
    """
    called = [store.meaning_of_module(module) for module in modules]
    parts = text, called, store.meaning_of_backend("runtime", *behind), platform()
    return f"{title}_{store.short_digest(repr(parts))}"


def module(name):
    """The namespace of a new module for generated code. It can be imported: Numba knows functions by their module."""
    sys.modules[name] = pytypes.ModuleType(name)
    return sys.modules[name].__dict__


class Kept:
    """Stands in for Numba's cache of one function: its machine code is kept in `store`.

    name: a function that returns a name which says what the code is made of: one name never stands for two codes.
    """

    def __init__(self, name):
        self._name = name
        self.arrived = {}  # entry -> content that came from a child process

    cache_path = property(lambda self: str(store.cache_dir()))

    @functools.cached_property
    def name(self):
        return self._name()

    def entry(self, signature):
        return f"{self.name}.{store.short_digest(repr(signature))}.machine"

    def load_overload(self, signature, target):
        """The compiled function of a signature, None if it is not there."""
        target.refresh()
        content = self.arrived.pop(self.entry(signature), None) or store.read(self.entry(signature))
        if content is None:
            return None
        try:
            found = compiler.CompileResult._rebuild(target, *pickle.loads(content))
        except Exception:  # of another Numba, which the name should have told: compile it again
            return None
        count["loaded"] += 1
        return found

    def save_overload(self, signature, result):
        """Keep a function that was compiled in this process."""
        count["compiled"] += 1
        content = self.content(result)
        if content is not None:
            store.write(self.entry(signature), content)

    @staticmethod
    def content(result):
        """A compile result as bytes; None if it cannot be kept, since it holds addresses of this process."""
        if result.library.has_dynamic_globals or any(not lifted.can_cache for lifted in result.lifted):
            return None
        return dumps(result._reduce())

    def enable(self):
        pass

    disable = flush = enable


def kept(dispatcher, name):
    """``dispatcher``, what ``numba.njit`` returned, with its machine code kept in `store`. name: see `Kept`."""
    dispatcher._cache = Kept(name)
    return dispatcher


def _own_name(function):
    """The name of the machine code of a function in a module of this project."""
    module = function.__module__.rpartition(".")[2]
    return lambda: name_of(f"{module}_{function.__name__.strip('_')}", "", [function.__module__], [module])


def keep(dispatcher):
    """Keep the machine code of a ``numba.njit`` function of this project; other functions are let alone."""
    if isinstance(dispatcher, Dispatcher) and not isinstance(dispatcher._cache, Kept):
        kept(dispatcher, _own_name(dispatcher.py_func))


def jit(**options):
    """Decorator: ``numba.njit`` for a function of this project that kernels call, kept on disk."""
    return lambda f: kept(numba.njit(**{"error_model": "numpy", "nogil": True} | options)(f), _own_name(f))


def callback(function, signature, optimized=True):
    """A compiled function with an address, as ``numba.cfunc`` makes them, kept on disk.

    optimized: False for one that mostly waits: a third of the time to compile it is saved.
    """
    made = CFunc(function, (signature.args, signature.return_type), {}, {"error_model": "numpy"})
    made._cache = Kept(_own_name(function))
    with global_compiler_lock:
        keep, config.OPT = config.OPT, config.OPT if optimized else type(config.OPT)(0)
        try:
            made.compile()
        finally:
            config.OPT = keep
    return made


@contextlib.contextmanager
def settings():
    """What differs from Numba's ordinary compilation, for as long as one of our kernels is compiled.

    Casts and shifts are a GPU's, see `gpu_numbers`. Signed integers wrap round, as they do there: Numba tells LLVM
    that they never overflow, and a hash like ``x * 6364136223846793005 >> 40`` then came out wrong (found by the random
    kernels). And no garbage collection: Numba makes millions of small objects that all live until it is done; looking
    through them costs a fifth.
    The lock is Numba's own: no other thread compiles meanwhile, with these settings or while this process forks.
    """
    with global_compiler_lock:
        gpu_numbers.install()
        enabled, flags = gc.isenabled(), numbers._int_arith_flags
        gc.disable()
        numbers._int_arith_flags, gpu_numbers.active = (lambda result_type: []), True
        before, start = dict(count), time.thread_time()
        try:
            yield
        finally:
            count["seconds"] += time.thread_time() - start
            _log({key: count[key] - before[key] for key in count})
            numbers._int_arith_flags, gpu_numbers.active = flags, False
            if enabled:
                gc.enable()


def _log(spent):
    """Add a line to the file that ``MINI_COMPILE_LOG`` names, for who counts over many processes."""
    if "MINI_COMPILE_LOG" in os.environ:
        with contextlib.suppress(OSError), open(os.environ["MINI_COMPILE_LOG"], "a") as log:
            log.write(json.dumps(spent) + "\n")


def compile_kernel(run, signature):
    """Compile ``run`` (a dispatcher with a `Kept` cache) for a signature, or load it. Call it within `settings`."""
    if run.overloads:
        return
    entry, survived = run._cache.entry(signature), True
    content = store.read(entry)
    if content is None:
        content, survived = compile_in_child(run, signature)
        if content is not None:
            count["compiled"] += 1
            count["loaded"] -= 1  # what is loaded next was compiled just now
            store.write(entry, content)
    if content is not None:
        run._cache.arrived[entry] = content
    keep, config.LOOP_VECTORIZE = config.LOOP_VECTORIZE, int(survived)
    try:
        run.compile(signature)
    finally:
        config.LOOP_VECTORIZE = keep


def compile_in_child(run, signature):
    """``(content, survived)``: compile in a forked process, which sends the machine code back.

    LLVM checks itself, and aborts the process when it fails: seen once in some hundreds of random kernels, always in
    its loop vectoriser ("VPlan cost model and legacy cost model disagreed"). A notebook must not die of it, so the
    first compilation happens where an abort does no harm; ``survived`` is then False, and the kernel is to be compiled
    here without the vectoriser. ``content`` is None if there was an ordinary error, which will come here as well.
    """
    if not sys.platform.startswith("linux"):
        return None, True  # forking is not safe or not there
    sys.stdout.flush()
    sys.stderr.flush()
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks in programs with threads
        with llvm.ffi.lib._lock:  # llvmlite's own; the child would wait for it for ever if another thread held it
            child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for number in (signal.SIGINT, signal.SIGABRT, signal.SIGSEGV):
                signal.signal(number, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # LLVM's last words would only frighten
            content = _compiled_content(run, signature)
            with open(sending, "wb") as pipe:
                pipe.write(content)
        except BaseException:
            pass  # an ordinary error is raised again, and reported, by the parent
        finally:
            os._exit(0)
    os.close(sending)
    try:
        with open(receiving, "rb") as pipe:
            content = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    _, status, used = os.wait4(child, 0)
    count["seconds"] += used.ru_utime + used.ru_stime
    return (None, False) if os.WIFSIGNALED(status) else (content or None, True)


def _compiled_content(run, signature):
    held = []

    class Hold(Kept):
        def load_overload(self, signature, target):
            return None

        def save_overload(self, signature, result):
            held.append(self.content(result))

    run._cache = Hold(None)
    run.compile(signature)
    return held[0] or b""
