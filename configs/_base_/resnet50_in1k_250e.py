# ResNet-50 on ImageNet, as MMPretrain ships it, with CHEX's published recipe: 8 GPUs x 128, SGD, cosine over
# 250 epochs with a warm-up of 8, both by epoch, label smoothing, mixup, no weight decay of norms (the published code
# decays those of the shortcuts), norms that start at 0.5. It was published with mixed precision: --amp.
_base_ = "mmpretrain::resnet/resnet50_8xb32_in1k.py"
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        zero_init_residual=False,
        init_cfg=[
            dict(type="Kaiming", layer=["Conv2d"]),
            dict(type="Constant", val=0.5, layer=["_BatchNorm", "GroupNorm"]),
        ],
    ),
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
    dict(type="LinearLR", start_factor=0.125, by_epoch=True, begin=0, end=8),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=8, end=250, T_max=242),
]
train_cfg = dict(by_epoch=True, max_epochs=250, val_interval=5)
auto_scale_lr = dict(base_batch_size=1024)
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=3))
randomness = dict(seed=0)
