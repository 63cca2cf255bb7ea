# 1xN with blocks of 4 filters in pointwise convolutions; the rate gives half of all MACs. Trained like UniformL1.
_base_ = "./uniform.py"

model = dict(pruner=dict(_delete_=True, type="OneByN", n=4, rate=0.589, rearrange=True))
at_25 = dict(model=dict(pruner=dict(rate=0.882)))
