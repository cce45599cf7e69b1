"""The questions: each case is data, drawn from a seed, for one function of the contract."""
