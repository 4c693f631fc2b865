"""The processor: a C library, compiled on first use, and the Python side of its calls."""
