"""`make real`: a real model, real text and real prompts, in one table."""
