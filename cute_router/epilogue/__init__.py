"""What follows a router's GEMM: activation, choice, weights."""
