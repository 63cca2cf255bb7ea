# GConv Prune on PreResNet-164, CIFAR-10, as published: 2 groups (4 and 8 were published too) everywhere behind the
# stem. For numbers of groups that are searched: target=dict(params=0.5), min_channels=8 in place of groups. Run it with
# tools/compress.py, which trains the dense network first, or give its weights as load_from.
_base_ = ["./_base_/models/preresnet164_cifar10.py", "./_base_/cifar10_60e_gconv.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="GConvPrune", groups=2),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
