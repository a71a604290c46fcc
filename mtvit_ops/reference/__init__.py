"""The meaning of every op in plain PyTorch; imports nothing above it."""
