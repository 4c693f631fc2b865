"""Answers from an offloaded model: text that comes piece by piece, can be cancelled, and goes on from the last."""
