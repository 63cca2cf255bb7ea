# Hinge on ResNeXt-164 32x1d, CIFAR-10, as published: whole cardinality groups go, by the joint norm of their rows of
# the first and columns of the last 1x1 convolution.
_base_ = ["./_base_/models/resnext164_cifar10.py", "./_base_/cifar10_300e_hinge.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.4438),
        strength=2e-4,
        threshold=5e-3,
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
