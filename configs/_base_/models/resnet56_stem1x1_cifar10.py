# ResNet-56 as StrucSpars' code has it: a padded 1x1 stem, so that maps have 34x34 positions.
_base_ = "./resnet56_cifar10.py"

model = dict(backbone=dict(stem="published"))
