"""Decide: what stays in a tier, what comes next, what leaves. Integers in, integers out; no torch, no clock."""
