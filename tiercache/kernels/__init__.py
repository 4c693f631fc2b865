"""Products of planes with activations: one contract, and a dialect for each kind of device."""
