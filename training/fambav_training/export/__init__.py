"""Models in formats that need no PyTorch."""
