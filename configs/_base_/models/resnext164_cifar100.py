# ResNeXt-164 32x1d of Hinge, 100 classes.
_base_ = "./resnext164_cifar10.py"

model = dict(head=dict(num_classes=100))
