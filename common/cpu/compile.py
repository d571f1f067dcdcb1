"""From a kernel and the types of its arguments to a compiled function, kept on disk between runs."""

import pickle

import numba
from numba.core import types

from . import machine_code, memlog, native, shadow, store
from .device_code import DeviceModule
from .errors import CompileError
from .pipeline import check_device, check_kernel, generate


class Compiled:
    """A kernel compiled for one block shape and one list of argument types.

    run: the compiled function, without a dispatcher in front: that would look at the types of all arguments again, and
    is slow where an array is float16. tables: what is known of the kernel beside its code. source: the generated code.
    """

    def __init__(self, result, types, tables, source):
        self.run, self.sites, self.source = result.entry_point, tables["SITES"], source
        self._result, self._types, self._native = result, types, None
        self.static_bytes, self.uses_dynamic = tables["STATIC_SHARED_BYTES"], tables["DYNAMIC_SHARED"]
        self.arrays = tables.get("ARRAYS", [])  # these seven: where accesses are looked at
        self.shared_cells, self.stamps = tables.get("SHARED_CELLS", (0, 0)), tables.get("STAMPS", 0)
        self.lanes, self.in_order = tables.get("LANES", 0), tables.get("IN_ORDER", True)
        self.notices, self.fences = tables.get("NOTICES", []), tables.get("FENCES", False)
        self.parts_taken = tables.get("PARTS", [])  # arrays that may be written where it is not seen
        self.points, self.counters = tables.get("POINTS", []), tables.get("COUNTERS", [])  # memory reports

    def native(self):
        """``(address, types of the arguments)`` of the machine code behind ``run``; None where a `native.record`, which
        is there for such functions only, does not do for them."""
        if self._native is None:
            result, address = self._result, None
            if native.IS_HERE and native.layout_of(self._types, result.target_context):
                address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name) or None
            self._native = address, self._types
        return self._native


def load(function, names, block_dim, arg_types, nonneg, check, debug):
    """The :class:`Compiled` kernel, from disk if it is there.

    names: the `source.Names` that the kernel is compiled with. nonneg: which arguments are integers that are not
    negative. check: "", "bounds", "accesses" or "memory". debug: are divisions by zero reported?
    """
    with machine_code.settings():
        what = [str(t) for t in arg_types], check
        backend = store.meaning_of_backend(), machine_code.platform()
        made_of = names.digest(function), *backend, block_dim, nonneg, what, debug
        entry = f"kernel_{function.__name__}_{store.short_digest(repr(made_of))}.tables"
        known = _unpickled(store.read(entry))
        if known is None:
            code, devices, modules, tables = generate(function, names, block_dim, arg_types, nonneg, check, debug)
            described = [(key, d.text, d.entry, d.signatures, d.modules, d.recursive) for key, d in devices.items()]
            known = code, described, modules, tables
            if names.complete:
                store.write(entry, pickle.dumps(known))
        code, devices, modules, tables = known
        devices = {key: DeviceModule(*described) for key, *described in devices}
        run = _run(function.__name__, code, devices, modules, what)
        signature = (*[types.int64] * 5, types.uint8[::1], types.int64[::1], *arg_types)
        if check == "accesses":
            shadow.prepare()
            signature += (*[types.int64] * 4, types.int64[:, ::1])
        elif check == "memory":
            signature += tuple(memlog.PARAMETERS.values())
        machine_code.compile_kernel(run, signature)
    source = "\n".join([code, *(device.text for device in devices.values())])
    return Compiled(run.overloads[signature], signature, tables, source)


def check_types(function, names, signature, device):
    """What the decorator does for an explicit signature: values of globals are kept, a type error is raised at once.

    What a GPU runs and this backend does not is reported at the first launch.
    """
    with machine_code.settings():
        try:
            names.digest(function)
            check_device(function, names, [signature]) if device else check_kernel(function, names, signature)
        except CompileError as error:
            if error.on_gpu_too:
                raise


_runs = {}  # name of machine code -> the dispatcher of a generated module's ``run``: kernels of equal code share it


def _run(title, code, devices, modules, what):
    described = code, [(key, device.name) for key, device in devices.items()], what
    behind = {"accesses": ("shadow",), "memory": ("memlog",)}.get(what[1], ())
    name = machine_code.name_of(f"run_{title}", repr(described), modules, behind)
    if name not in _runs:
        names = machine_code.module(name)
        names |= {key: device.dispatcher() for key, device in devices.items()}
        exec(compile(code, f"<{name}>", "exec"), names)
        _runs[name] = machine_code.kept(numba.njit(**machine_code.OPTIONS)(names["run"]), lambda: name)
    return _runs[name]


def _unpickled(content):
    try:
        return None if content is None else pickle.loads(content)
    except Exception:  # written by another Python: as if it were not there
        return None
