"""Calibrated quantisation: codes that make up for one another's errors on real inputs."""
