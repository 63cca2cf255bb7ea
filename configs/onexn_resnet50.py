# 1xN on ResNet-50, ImageNet, as published: half of the N x 1 blocks of all 52 convolutions behind the stem go,
# 11,722,752 weights. For other blocks: --cfg-options model.pruner.n=4.
_base_ = ["./_base_/resnet50_torchvision.py", "./_base_/in1k_180e_onexn.py"]
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="OneByN", n=16, rate=0.5, rearrange=True, kernels="all"),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
