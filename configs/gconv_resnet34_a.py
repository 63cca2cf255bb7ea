# GConv Prune on ResNet-34, ImageNet, configuration A as published: 8, 4, 2 and 1 groups in the four stages. 28
# convolutions, 1.73 G MACs of 3.66 G.
_base_ = ["./_base_/resnet34_torchvision.py", "./_base_/in1k_30e_gconv.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="GConvPrune", groups="{{ fileDirname }}/groups/resnet34_a.json"),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
