"""Decoding with drafts: the tree pass, its KV cache, what of a tree is accepted, and the loop around it."""
