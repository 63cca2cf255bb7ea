# StrucSpars on ResNet-101, ImageNet: as ResNet-50's, the only command that was published; 103 convolutions.
_base_ = ["mmpretrain::_base_/models/resnet101.py", "./_base_/in1k_60e_strucspars.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    # Trained from random weights, as published with no norm at zero.
    model=dict(_base_.model, backbone=dict(_base_.model.backbone, zero_init_residual=False)),
    pruner=dict(
        type="StrucSpars",
        target=dict(weights=0.65),
        warmup=5,
        delta=2e-6,
        initial_rounds=50,
        rounds=20,
        interval=500,
        interval_rounds=5,
    ),
    scope="backbone",
    input_size=224,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]
