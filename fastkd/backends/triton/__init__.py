"""The streaming backend of Triton kernels, for CUDA tensors or Triton's interpreter (TRITON_INTERPRET=1)."""
