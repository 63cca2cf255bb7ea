# ImageNet for Hinge, 8 GPUs x 32; the paper has no recipe for it, so this one is ours. Search: 15 epochs at a constant
# learning rate, 0.1 for the matrices and a hundredth of it for everything else. Then the compact model trains for 90
# epochs and learns from the dense one.
_base_ = ["mmpretrain::_base_/datasets/imagenet_bs32.py", "mmpretrain::_base_/default_runtime.py"]
custom_imports = dict(imports=["prune_mm"], allow_failed_imports=False)

val_cfg = dict()
test_cfg = dict()

train_cfg = dict(by_epoch=True, max_epochs=15, val_interval=1)
optim_wrapper = dict(optimizer=dict(type="SGD", lr=1e-3, momentum=0.9, weight_decay=1e-4))
param_scheduler = []
finetune = dict(
    train_cfg=dict(max_epochs=90),
    optim_wrapper=dict(optimizer=dict(lr=0.05), paramwise_cfg=None),
    param_scheduler=[
        dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=90, T_max=90, convert_to_iter_based=True)
    ],
    custom_hooks=[dict(type="prune_mm.DistillationHook", teacher=dict(checkpoint="{{pretrained}}"))],
)
auto_scale_lr = dict(base_batch_size=256)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=3))
randomness = dict(seed=0)
