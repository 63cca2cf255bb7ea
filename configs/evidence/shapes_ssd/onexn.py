# 1xN with blocks of 4 filters; the rate gives half of the MACs (the stem stays dense). Trained like UniformL1. The 1x1
# convolutions of the shortcuts stay dense: they take one of a hundred MACs, and all that goes on to the next stage.
_base_ = "./uniform.py"

onexn = dict(_delete_=True, type="OneByN", n=4, rate=0.56, kernels="all", rearrange=True, ignore=[".*downsample.*"])
model = dict(pruner=onexn)
at_25 = dict(model=dict(pruner=dict(rate=0.838)))
