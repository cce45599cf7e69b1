"""Which formulation computes a layer: defaults, and what was measured on this machine."""
