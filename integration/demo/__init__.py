"""The main job: a mixed batch through a real INT4 model, held against transformers and PEFT.

``recipe`` makes the model and the adapters, ``models`` puts them together in both ways,
``comparison`` runs them, ``bound_check`` watches their linears, ``findings`` holds what was found
and judges it, ``report`` prints it.
"""
