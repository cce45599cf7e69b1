"""Compare a mixed batch through a real INT4 model with transformers + PEFT.

``recipe`` makes the model and its adapters. ``models`` loads them through PEFT and through the
reference, and ``comparison`` runs both. ``linear_check`` judges every linear. ``served`` serves the
batch through vLLM, running each engine in a process of ``engine``. ``findings`` holds the results
and their rules; ``report`` prints them.
"""
