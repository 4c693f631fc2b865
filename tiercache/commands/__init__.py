"""The commands: each file a few of them, all on one application."""
