"""The CPU backend: compiles unmodified ``@cuda.jit`` kernels for the machine's own cores.

The passes, in the order a kernel goes through them::

    source     the text of a kernel as it was imported, and what the names in it stand for
    frontend   text -> AST in a normal form: `cuda.*` names resolved, device functions with barriers inlined,
               collectives on lines of their own
    webs       one name per value (a name reused as int, then float, becomes two)
    views      names of parts of arrays written out: `row = tile[i]`, `row[j]` -> `tile[i, j]`
    analysis   which values are the same in all threads, which are never negative
    infer      Numba's own type inference on a variant without barriers; `device_code` has the device functions
    emit       fission: loops over the block's threads between the barriers
    module_text, machine_code
               the generated module, compiled by Numba, with a GPU's casts and shifts (`gpu_numbers`) and
               what else the CPU target has no code for (`half`, `scalars`, registered in `lowering`)
    store      what is kept on disk
    launch     arguments as explicit `signatures` have them; blocks on all cores; `guard` and `crash` watch

`pipeline` calls the passes up to `module_text`, `compile` the rest.
``kernel.inspect_cpu()`` shows the generated code.
"""
