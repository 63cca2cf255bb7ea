"""Do the methods keep the accuracy they promise? A matrix of trainings, measured, cached and written down.

``matrix`` knows the runs and their configs, ``steps`` what one run does (by the tools of the project), ``pool`` runs
several side by side, ``results`` keeps the raw numbers, ``page`` and ``plots`` show them; ``tools/evidence.py`` is the
command.
"""
