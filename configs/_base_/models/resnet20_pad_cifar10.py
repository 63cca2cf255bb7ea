# ResNet-20 of Hinge: shortcuts without parameters, a bias in the stem.
_base_ = "./resnet20_cifar10.py"

model = dict(backbone=dict(shortcut="pad", stem_bias=True))
