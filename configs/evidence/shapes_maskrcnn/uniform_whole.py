# UniformL1 that leaves shortcuts whole, as GConvPrune, StrucSpars, Hinge and OneByN do: inner layers lose more instead.
_base_ = "./uniform.py"

model = dict(pruner=dict(prune_shortcuts=False))
