"""Triton kernels, one file an op, installed as ``mtvit_ops.kernels``; importing a kernel needs Triton."""
