# As for ResNet-20, with SGD for the search only.
_base_ = "../_base_/digits_mobilenetv2.py"

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
        relative_threshold=True,
        same_ratio=True,
    ),
    scope="backbone",
    input_size=48,
)
custom_hooks = [dict(type="prune_mm.PruningHook")]

adamw = dict(_delete_=True, type="AdamW", lr=2e-3, weight_decay=0.05, fused=True)
pretrain = dict(_base_.start, optim_wrapper=dict(optimizer=dict(lr=2e-3)))
train_cfg = dict(max_epochs=6, val_interval=6)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="SGD", lr=5e-3, momentum=0.9, weight_decay=5e-4),
    paramwise_cfg=dict(custom_keys={".pair.weight": dict(lr_mult=20)}),
)
param_scheduler = []
default_hooks = dict(checkpoint=dict(interval=1))
finetune = dict(
    train_cfg=dict(max_epochs=24, val_interval=24),
    optim_wrapper=dict(optimizer=adamw, paramwise_cfg=None),
    param_scheduler=[
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=True, convert_to_iter_based=True, end=24, T_max=24),
    ],
)
recalibrate = 20
# The default of 0.2 of the channels of each layer is too many here.
at_25 = dict(model=dict(pruner=dict(target=dict(macs=0.25), min_share=0.1)))
