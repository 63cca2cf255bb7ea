# GConv Prune on DenseNet-86, which is CondenseNet-86 with dense convolutions, CIFAR-10, as published: 2 groups.
_base_ = "./gconv_condensenet86_cifar10.py"

model = dict(pruner=dict(groups=2))
