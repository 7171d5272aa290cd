"""Triton kernels and their torch references, one op a file: ``from fewstep.kernels.philox import normals``.

Importing an op imports no Triton: that happens at a kernel's first launch (``lang``). ``dispatch`` says who runs an op.
"""
