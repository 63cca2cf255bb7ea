# Hinge on ResNet-20, CIFAR-100, as published: rows of a matrix behind both convolutions of each block (a
# decomposition). For columns of the first and rows of the second, leave placement out.
_base_ = ["./_base_/models/resnet20_pad_cifar100.py", "./_base_/cifar100_300e_hinge.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.3298),
        placement="rows",
        strength=2e-4,
        threshold=5e-3,
        same_ratio=True,
        layer_balancing=True,
        annealing=dict(factor=2, high=30, low=25),
    ),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
