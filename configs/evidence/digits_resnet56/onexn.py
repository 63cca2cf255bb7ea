# 1xN with blocks of 2 filters; the rate gives half of the MACs (the stem stays dense). Trained like UniformL1.
_base_ = "./uniform.py"

model = dict(pruner=dict(_delete_=True, type="OneByN", n=2, rate=0.502, kernels="all", rearrange=True))
at_25 = dict(_delete_=True, model=dict(pruner=dict(rate=0.753)))
