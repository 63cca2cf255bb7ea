# ResNet-56 with 1x1 convolution and batch norm as projections.
_base_ = "./resnet20_cifar10.py"

model = dict(backbone=dict(depth=56))
