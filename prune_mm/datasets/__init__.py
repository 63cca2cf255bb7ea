"""Data sets that come with the package: see :mod:`prune_mm.datasets.shapes`.

Nothing is imported here, so ``python -m prune_mm.datasets.shapes`` runs without OpenMMLab installed.
"""
