# Hinge compresses the backbone of a small SSD to half of its MACs, on generated images: the dense detector trains
# first, then matrices behind the convolutions shrink until the network that would be left is within 10 % of the target,
# then the compact model trains on.
_base_ = "../_base_/demo_ssd_r18.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5),
        strength=0.1,
        threshold=0.1,
        layer_balancing=True,
        same_ratio=True,
    ),
    scope="backbone",
    input_size=128,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(
    train_cfg=dict(max_epochs=8, val_interval=8),
    optim_wrapper=dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.01), paramwise_cfg=None),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=100),
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=8, T_max=8),
    ],
)
train_cfg = dict(max_epochs=8, val_interval=8)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="SGD", lr=1e-3, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={".pair.weight": dict(lr_mult=20)}),
)
param_scheduler = [dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=50)]
default_hooks = dict(checkpoint=dict(interval=1))
finetune = dict(
    train_cfg=dict(max_epochs=6, val_interval=6),
    optim_wrapper=dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.01), paramwise_cfg=None),
    param_scheduler=[
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=6, T_max=6)
    ],
)
