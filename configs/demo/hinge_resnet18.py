# Hinge on a ResNet-18, on generated images: the dense network trains first; then matrices behind its convolutions
# shrink, at a learning rate a hundred times that of the weights as published, until the network that would be left is
# within 10 % of half the MACs; then the compact model trains on, and learns from the dense one too.
_base_ = "../_base_/demo_resnet18.py"

model = dict(
    _delete_=True,
    type="prune_mm.PrunableModel",
    model=_base_.model,
    pruner=dict(
        type="Hinge",
        target=dict(macs=0.5),
        strength=0.015,
        threshold=0.1,
        layer_balancing=True,
        same_ratio=True,
    ),
    scope="backbone",
    input_size=64,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

pretrain = dict(
    train_cfg=dict(max_epochs=16, val_interval=8),
    optim_wrapper=dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.01), paramwise_cfg=None),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=40),
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=16, T_max=16),
    ],
)
train_cfg = dict(max_epochs=20, val_interval=5)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="SGD", lr=4e-3, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={".pair.weight": dict(lr_mult=100)}),
)
param_scheduler = []
default_hooks = dict(checkpoint=dict(interval=1))
finetune = dict(
    train_cfg=dict(max_epochs=12, val_interval=6),
    optim_wrapper=dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.01), paramwise_cfg=None),
    param_scheduler=[
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=12, T_max=12)
    ],
    custom_hooks=[dict(type="prune_mm.DistillationHook", teacher=dict(checkpoint="{{pretrained}}"))],
)
