"""The cases: each calls one function, with operands drawn from a seed."""
