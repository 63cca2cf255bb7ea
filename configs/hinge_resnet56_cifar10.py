# Hinge on ResNet-56, CIFAR-10, as published: rows of a matrix behind both convolutions of each block, shrunk by l1/2.
# For columns of the first and rows of the second, leave placement out.
_base_ = ["./_base_/models/resnet56_pad_cifar10.py", "./_base_/cifar10_300e_hinge.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5),
        placement="rows",
        regularizer="l1d2",
        strength=4e-4,
        threshold=5e-3,
        same_ratio=True,
        layer_balancing=True,
        annealing=dict(factor=2, high=10, low=5),
    ),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
