"""Drafters without weights: they guess from the text so far, from what the target ranked, or from earlier runs."""
