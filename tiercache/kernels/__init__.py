"""Products of planes with activations: one contract, and a backend for each kind of device."""
