# As for ResNet-20.
_base_ = "../digits_resnet20/onexn.py"

model = dict(model=dict(backbone=dict(depth=56)), pruner=dict(rate=0.502))
at_25 = dict(model=dict(pruner=dict(rate=0.753)))
