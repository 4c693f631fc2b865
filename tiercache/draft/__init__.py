"""Guesses the tokens that the target would emit, as trees; never decides what is emitted."""
