# GConv Prune: numbers of groups are searched that meet the target; trained like UniformL1. With the mean over layers as
# cost, as published: the loss of all layers together divides early layers to the floor and leaves the last ones whole.
_base_ = "./uniform.py"

pruner = dict(_delete_=True, type="GConvPrune", target=dict(macs=0.5), min_channels=4, search_cost="mean")
model = dict(pruner=pruner)
# As on Mask R-CNN, which has the same width; others were not tried.
at_25 = dict(model=dict(pruner=dict(target=dict(macs=0.25), min_channels=2)))
