"""Compiled graphs: made once for each kind of call, kept, entered, and saved."""
