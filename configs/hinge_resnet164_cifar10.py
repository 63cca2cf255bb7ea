# Hinge on ResNet-164, CIFAR-10, as published: the 1x1 convolutions of its bottlenecks are the matrices, outputs of the
# first and inputs of the last.
_base_ = ["./_base_/models/resnet164_cifar10.py", "./_base_/cifar10_300e_hinge.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5353),
        strength=2e-4,
        threshold=1e-3,
        same_ratio=True,
        layer_balancing=True,
    ),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            ".conv1.weight": dict(lr_mult=100),
            ".conv3.weight": dict(lr_mult=100),
            "backbone.conv1.weight": dict(lr_mult=1),
        }
    )
)
