"""The cases: for one function each, with operands drawn from a seed."""
