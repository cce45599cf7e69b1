"""The verdict on one answer: the exact result, its bound, and the rules that an error may break."""
