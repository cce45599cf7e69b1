"""Which known mistake a wrong answer is: the definition in steps, and steps done wrong."""
