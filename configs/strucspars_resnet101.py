# StrucSpars on ResNet-101, ImageNet: as ResNet-50's, the only command that was published; 103 convolutions.
_base_ = ["mmpretrain::_base_/models/resnet101.py", "./_base_/in1k_60e_strucspars.py"]

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
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
