# As for ResNet-20.
_base_ = "../digits_resnet20/chex_onexn.py"

model = dict(model=dict(backbone=dict(depth=56)))
