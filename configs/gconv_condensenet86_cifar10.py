# GConv Prune on CondenseNet-86, CIFAR-10, as published: its topology with dense convolutions (DenseNet-86) trains
# first, then all convolutions behind the stem get 4 groups, as CondenseNet has them. Run it with tools/compress.py,
# which trains the dense network first, or give its weights as load_from.
_base_ = ["./_base_/models/condensenet86_cifar10.py", "./_base_/cifar10_100e_gconv.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="GConvPrune", groups=4),
    scope="backbone",
    input_size=32,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
