# StrucSpars on ResNet-20, CIFAR-10, as published: 40 % of the weights of the 20 convolutions behind the stem go. The
# stem is that of the published code (1x1, padded); "./_base_/models/resnet20_cifar10.py" has the usual 3x3 one.
_base_ = ["./_base_/models/resnet20_stem1x1_cifar10.py", "./_base_/cifar10_100e_strucspars.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="StrucSpars", target=dict(weights=0.6), warmup=10, delta=2e-6, initial_rounds=20, rounds=10, interval=None
    ),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
