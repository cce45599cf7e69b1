"""Adapters on the compiled path: how they are stored, and the deltas that they add to a base."""
