# GConv Prune on ResNet-50, ImageNet, as published: 2 groups everywhere behind the stem. 52 convolutions, 2.10 G MACs of
# 4.09 G. To search the numbers of groups instead: target=dict(params=0.5), min_channels=8 in place of groups.
_base_ = ["./_base_/resnet50_torchvision.py", "./_base_/in1k_30e_gconv.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="GConvPrune", groups=2),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
