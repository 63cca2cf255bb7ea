# GConv Prune: a small SSD trains on generated images, then the convolutions of its backbone get 2 groups each in one
# shot, and it trains on with masks. layer1 stays dense.
_base_ = "../_base_/demo_ssd_r18.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="GConvPrune", groups=2, ignore=["layer1"]),
    scope="backbone",
    input_size=128,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(
    train_cfg=dict(max_epochs=12, val_interval=12),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=100),
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=12, T_max=12),
    ],
)
train_cfg = dict(max_epochs=6, val_interval=6)
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=6, T_max=6)
]
