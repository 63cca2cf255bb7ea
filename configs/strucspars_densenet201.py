# StrucSpars on DenseNet-201, ImageNet: the published options of ResNet-50, since the published code does not run on
# this network. 199 convolutions: those of the dense layers and the transitions.
_base_ = ["mmpretrain::_base_/models/densenet/densenet201.py", "./_base_/in1k_60e_strucspars.py"]

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
