# DenseNet-40 of gumi, 100 classes.
_base_ = "./densenet40_stem16_cifar10.py"

model = dict(head=dict(num_classes=100))
