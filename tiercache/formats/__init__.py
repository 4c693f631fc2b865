"""Checkpoints whose weights are quantised already: GGUF files, and GPTQ, AWQ and compressed-tensors folders.

Their tensors are dequantised one by one as they are read. Nothing outside asks which format one has.
"""
