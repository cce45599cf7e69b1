"""The verdict on a result: the exact answer, its bound, the yardstick and the rules."""
