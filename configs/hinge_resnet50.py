# Hinge on ResNet-50, ImageNet. Published (table 4 of the paper): 46.55 % of the FLOPs, top-1 error 25.30; neither code
# nor recipe. Ours is the schedule; the 1x1 convolutions of the bottlenecks are the matrices, with the published
# settings of ResNet-164 but for the threshold (0.001 there).
_base_ = ["mmpretrain::_base_/models/resnet50.py", "./_base_/in1k_90e_hinge.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.4655),
        strength=2e-4,
        threshold=5e-3,
        same_ratio=True,
        layer_balancing=True,
    ),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
load_from = "https://mmassets.onedl.ai/mmclassification/v0/resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth"

optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            ".conv1.weight": dict(lr_mult=100),
            ".conv3.weight": dict(lr_mult=100),
            "backbone.conv1.weight": dict(lr_mult=1),
        }
    )
)
