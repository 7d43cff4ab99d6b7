"""From Triton and Gluon sources to machine code, on a machine without a GPU too.

    compile.py    the only door to Triton: one function's source -> cubin and PTX
    pairs.py      instructions for pairs of programs, which Triton cannot express
    pool.py       many functions at once, by processes
    server.py     what runs in them

Nothing here imports torch or the IR, so that a process which compiles is there within 0.2 s.
"""
