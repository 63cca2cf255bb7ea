# GConv Prune on ResNet-34, ImageNet, configuration B as published: 16, 8, 4 and 2 groups in the four stages, shortcuts
# dense. 32 convolutions, 0.94 G MACs of 3.66 G.
_base_ = ["./_base_/resnet34_torchvision.py", "./_base_/in1k_30e_gconv.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="GConvPrune", groups="{{ fileDirname }}/groups/resnet34_b.json"),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
