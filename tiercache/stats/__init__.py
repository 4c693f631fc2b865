"""What a run did: counters and seconds, as plain data."""
