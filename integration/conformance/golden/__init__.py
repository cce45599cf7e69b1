"""Golden files: the oracle's cases for backends in any language, written and checked."""
