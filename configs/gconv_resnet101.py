# GConv Prune on ResNet-101, ImageNet, as published: 2 groups everywhere behind the stem. 103 convolutions, 3.96 G MACs
# of 7.80 G.
_base_ = ["./_base_/resnet101_torchvision.py", "./_base_/in1k_30e_gconv.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="GConvPrune", groups=2),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
