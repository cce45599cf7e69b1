"""Compare a mixed batch through a real INT4 model with transformers + PEFT.

``recipe`` makes the model and its adapters, ``models`` loads them in both ways, ``comparison`` runs
both, ``linear_check`` judges every linear, ``served`` serves the batch by vLLM with ``engine`` as
the process of each engine, ``findings`` holds the results and their rules, ``report`` prints them.
"""
