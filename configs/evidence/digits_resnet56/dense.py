# As for ResNet-20.
_base_ = "../digits_resnet20/dense.py"

model = dict(backbone=dict(depth=56))
