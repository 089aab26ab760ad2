"""Triton kernels, one family a file; installed as ``difffast.triton_kernels``."""

if __name__ != "difffast.triton_kernels":
    raise ImportError(f"import difffast.triton_kernels, not {__name__}: a top-level triton_kernels is another project")
