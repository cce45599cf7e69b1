"""Find out what a checkpoint offers adapters, and record it in its folder."""
