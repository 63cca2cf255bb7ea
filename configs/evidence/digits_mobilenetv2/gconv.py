# GConv Prune: numbers of groups are searched that meet the target; trained like UniformL1.
_base_ = "./uniform.py"

model = dict(pruner=dict(_delete_=True, type="GConvPrune", target=dict(macs=0.5), min_channels=8))
# Groups of 8 channels leave more than 25 %.
at_25 = dict(model=dict(pruner=dict(target=dict(macs=0.25), min_channels=2)))
