# 1xN: a small Mask R-CNN trains on generated images, then half of the 16 x 1 blocks of the convolutions of its backbone
# go in one shot, filters rearranged, and it trains on with masks.
_base_ = "../_base_/demo_maskrcnn_r18.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(type="OneByN", n=16, rate=0.5, kernels="all", rearrange=True),
    scope="backbone",
    input_size=128,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(
    train_cfg=dict(max_epochs=8, val_interval=8),
    optim_wrapper=dict(optimizer=dict(lr=1e-3)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=100),
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=8, T_max=8),
    ],
)
train_cfg = dict(max_epochs=5, val_interval=5)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=5, T_max=5)
]
