# RandomChannels that leaves shortcuts whole, as GConvPrune, StrucSpars, Hinge and OneByN do.
_base_ = "./random.py"

model = dict(pruner=dict(prune_shortcuts=False))
