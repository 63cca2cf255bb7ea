# ResNeXt-20 32x1d of Hinge, 100 classes.
_base_ = "./resnext20_cifar10.py"

model = dict(head=dict(num_classes=100))
