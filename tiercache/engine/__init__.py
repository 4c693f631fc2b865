"""Opening a model: what was named, what fits, how it runs (exact or mixed), and how everything is taken back."""
