"""NVIDIA cards: CUDA C, compiled at run time, and the Python side of its launches."""
