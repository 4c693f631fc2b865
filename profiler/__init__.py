"""Measure: what this machine can do, and what a plan would cost on it."""
