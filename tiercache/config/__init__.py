"""What the user asks for: sizes, and the options of `offload`, checked before anything is touched."""
