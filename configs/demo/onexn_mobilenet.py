# 1xN: a MobileNetV2 trains on generated images, shown at 96x96, then half of the 16 x 1 blocks of its pointwise
# convolutions go in one shot, filters rearranged, and it trains on with masks.
_base_ = "../_base_/demo_resnet18.py"

larger = dict(type="Resize", scale=96)
train_pipeline = [*_base_.train_pipeline[:-1], larger, _base_.train_pipeline[-1]]
test_pipeline = [*_base_.test_pipeline[:-1], larger, _base_.test_pipeline[-1]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=dict(_base_.model, backbone=dict(type="MobileNetV2"), head=dict(_base_.model.head, in_channels=1280)),
    pruner=dict(type="OneByN", n=16, rate=0.5, rearrange=True, tail="pad"),
    scope="backbone",
    input_size=96,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(
    train_cfg=dict(max_epochs=16, val_interval=8),
    optim_wrapper=dict(optimizer=dict(lr=2e-3)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=40),
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=16, T_max=16),
    ],
)
train_cfg = dict(max_epochs=8, val_interval=4)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, begin=0, end=8, T_max=8)
]
