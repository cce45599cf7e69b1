"""Adapters on the compiled path: how they are held, and the terms that they add to a base."""
