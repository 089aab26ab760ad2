"""Triton kernels, one family a file; installed as ``difffast.triton_kernels``."""

if __name__ != "difffast.triton_kernels":
    raise ImportError(
        f"import this package as difffast.triton_kernels, not as {__name__}: a top-level triton_kernels is another project"
    )
