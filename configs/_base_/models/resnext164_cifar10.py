# ResNeXt-164 32x1d of Hinge.
_base_ = "./resnext20_cifar10.py"

model = dict(backbone=dict(depth=164))
