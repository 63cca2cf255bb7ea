# Hinge: the dense network trains for half of the epochs; then matrices behind its convolutions shrink for an epoch,
# and the compact model trains on. Two epochs of search cost 2 AP on Mask R-CNN, with two cosines (validation split).
_base_ = "../_base_/shapes_maskrcnn.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5),
        strength=0.57,
        threshold=0.03,
        min_share=0.1,
        layer_balancing=True,
        relative_threshold=True,
        same_ratio=True,
    ),
    scope="backbone",
    input_size=96,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

adamw = dict(_delete_=True, type="AdamW", lr=2e-3, weight_decay=0.01, fused=True)
pretrain = dict(_base_.start, optim_wrapper=dict(optimizer=dict(lr=2e-3)))
train_cfg = dict(max_epochs=1, val_interval=1)
train_dataloader = dict(sampler=dict(start=2800))
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="SGD", lr=1e-3, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={".pair.weight": dict(lr_mult=20)}),
)
param_scheduler = [dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=35)]
default_hooks = dict(checkpoint=dict(interval=1))
finetune = dict(
    train_cfg=dict(max_epochs=9, val_interval=9),
    train_dataloader=dict(sampler=dict(start=3080)),
    optim_wrapper=dict(optimizer=adamw, paramwise_cfg=None),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=35),
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=9, T_max=9),
    ],
)
recalibrate = 40
