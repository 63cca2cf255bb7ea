# DenseNet-40 of gumi: 16 channels behind the first convolution.
_base_ = "./densenet40_cifar10.py"

model = dict(backbone=dict(stem_channels=16), head=dict(in_channels=448))
