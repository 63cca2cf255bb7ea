# ResNet-50 on ImageNet, as MMPretrain ships it, with CHEX's published recipe: 8 GPUs x 128, SGD, cosine over
# 250 epochs, label smoothing, mixup, no weight decay of norms.
_base_ = "mmpretrain::resnet/resnet50_8xb32_in1k.py"
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    head=dict(
        loss=dict(_delete_=True, type="LabelSmoothLoss", label_smooth_val=0.1, num_classes=1000, mode="original")
    ),
    train_cfg=dict(augments=dict(type="Mixup", alpha=0.2)),
)
train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = dict(batch_size=128)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="SGD", lr=1.024, momentum=0.875, weight_decay=3.0517578125e-05),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.125, by_epoch=True, begin=0, end=8, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=8, end=250, T_max=242),
]
train_cfg = dict(by_epoch=True, max_epochs=250, val_interval=5)
auto_scale_lr = dict(base_batch_size=1024)
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=3))
randomness = dict(seed=0)
