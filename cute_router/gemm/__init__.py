"""The fused router kernels: GEMM, activation, selection and store in one launch."""
