# 1xN on MobileNet V2, ImageNet, as published: half of the N x 1 blocks of the 34 pointwise convolutions go, 1,062,336
# weights where N divides the filters. For other blocks: --cfg-options model.pruner.n=4.
_base_ = ["mmpretrain::_base_/models/mobilenet_v2_1x.py", "./_base_/in1k_180e_onexn.py"]
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="OneByN", n=16, rate=0.5, rearrange=True),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
load_from = (
    "https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/"
    "mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth"
)
