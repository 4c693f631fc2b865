"""Guesses the tokens that the target model would emit next, as draft trees; it never decides what is emitted."""
