# ImageNet with StrucSpars' published recipe. Search: 8 GPUs x 64, 60 epochs at a constant learning rate, no weight
# decay, from random weights. Then the compact model trains on: 120 epochs, linear warm-up of 5, cosine, weight decay.
_base_ = ["mmpretrain::_base_/datasets/imagenet_bs64.py", "mmpretrain::_base_/default_runtime.py"]
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=224, crop_ratio_range=(0.1, 1.0), aspect_ratio_range=(0.8, 1.25)),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
val_cfg = dict()
test_cfg = dict()

train_cfg = dict(by_epoch=True, max_epochs=60, val_interval=1)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=0.0))
param_scheduler = []
finetune = dict(
    train_cfg=dict(max_epochs=120),
    optim_wrapper=dict(optimizer=dict(weight_decay=1e-4)),
    param_scheduler=[
        dict(type="LinearLR", start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", by_epoch=True, begin=5, end=120, T_max=115, convert_to_iter_based=True),
    ],
)
sync_bn = "torch"
auto_scale_lr = dict(base_batch_size=512)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=3))
randomness = dict(seed=0)
