# StrucSpars on ResNet-56, CIFAR-10: the published options of ResNet-20. 56 convolutions behind the stem.
_base_ = ["./_base_/models/resnet56_stem1x1_cifar10.py", "./_base_/cifar10_100e_strucspars.py"]

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
