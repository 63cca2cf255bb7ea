# DenseNet-40 of Hinge, 100 classes.
_base_ = "./densenet40_cifar10.py"

model = dict(head=dict(num_classes=100))
