"""Decodes with draft trees: the loop, its verification rules, the scheduler of drafters and `generate`."""
