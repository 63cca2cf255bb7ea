# 1xN on MobileNet V3-small, ImageNet, as published: half of the N x 1 blocks of the 40 pointwise convolutions go, those
# of gates too, 426,496 weights where N divides the filters. For other blocks: --cfg-options model.pruner.n=4.
_base_ = ["mmpretrain::_base_/models/mobilenet_v3/mobilenet_v3_small_imagenet.py", "./_base_/in1k_180e_onexn.py"]
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
load_from = "https://download.openmmlab.com/mmclassification/v0/mobilenet_v3/convert/mobilenet_v3_small-8427ecf0.pth"
