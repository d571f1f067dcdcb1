"""The CPU backend: compiles unmodified ``@cuda.jit`` kernels for the machine's own cores.

The passes, in the order a kernel goes through them::

    frontend   source text  -> AST in a normal form: `cuda.*` names resolved, device functions
                               with barriers inlined, collectives on lines of their own
    webs       one name per value (a name reused as int, then float, becomes two)
    analysis   which values are the same in all threads, which are never negative
    infer      Numba's own type inference on a variant without barriers
    emit       fission: loops over the block's threads between the barriers
    launch     compile with Numba, keep on disk, run blocks on all cores

``kernel.inspect_cpu()`` shows the generated code.
"""
