"""Memory in tiers: slabs, what is kept or passes through them, and the copies between."""
