"""The choice of a layer's formulation: defaults, and measurements on this machine."""
