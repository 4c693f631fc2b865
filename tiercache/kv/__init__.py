"""The KV cache: its layout, the pass over a tree of tokens, and SpecKV, which keeps a part of a prompt."""
