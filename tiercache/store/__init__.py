"""The SSD tier: checkpoints in place and plane stores, how they are made, read and checked."""
