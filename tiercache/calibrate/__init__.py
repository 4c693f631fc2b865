"""Learns from a text what a store's neurons are worth: importance, thresholds, sensitivity, and measured settings."""
