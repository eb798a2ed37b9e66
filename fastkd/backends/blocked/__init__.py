"""The streaming backend in plain PyTorch: any device, any dtype, memory linear in the rows."""
