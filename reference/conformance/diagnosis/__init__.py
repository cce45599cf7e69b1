"""The diagnosis of a wrong result: the definition in steps, and the steps done wrong."""
