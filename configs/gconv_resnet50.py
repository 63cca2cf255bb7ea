# GConv Prune on ResNet-50, ImageNet. Published (recipe of the authors' code): 2 groups everywhere behind the stem, that
# is 52 convolutions and 2.10 G MACs of 4.09 G, sorted with N_S = 10, then 30 epochs of the schedule in the base. Ours:
# the best of several sortings is kept (faithful=True: as published). To search the numbers of groups instead:
# target=dict(params=0.5), min_channels=8 in place of groups.
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
