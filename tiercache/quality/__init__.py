"""What a mode of running costs in quality: perplexity, KL, agreement and tasks, against exact weights and per byte."""
