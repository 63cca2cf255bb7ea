# ResNet-110 of StrucSpars' code, 100 classes.
_base_ = "./resnet110_stem1x1_cifar10.py"

model = dict(head=dict(num_classes=100))
