# GConv Prune: numbers of groups are searched that meet the target. What a cut into groups leaves wants a larger
# learning rate than UniformL1, with which it is trained otherwise alike.
_base_ = "./uniform.py"

model = dict(pruner=dict(_delete_=True, type="GConvPrune", target=dict(macs=0.5), min_channels=2))
optim_wrapper = dict(optimizer=dict(lr=0.1))
at_25 = dict(model=dict(pruner=dict(target=dict(macs=0.25))))
